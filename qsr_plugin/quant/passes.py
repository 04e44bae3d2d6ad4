"""The passes over memory that fake quantization and its gradients are made of, as few as PyTorch's operations allow.

Most work in place. Masks are avoided, because they do not vectorise on a CPU.
"""

from __future__ import annotations

import math
from typing import Literal, Optional

import numpy as np
import torch
from torch import Tensor

#: Which side an element counts for that lies exactly on a bound; ``both``: its own gradient is that of an inner one,
#: and the bound gets it as well.
Ties = Literal["inside", "split", "outside", "both"]


def quantized(
    x: Tensor,
    rate: Tensor,
    back: Tensor,
    shift: float | Tensor,
    limits: Optional[tuple[float | Tensor, float | Tensor]],
    anchor: Optional[Tensor],
) -> Tensor:
    """Quantize float32 or wider.

    Args:
        x: Any shape, not modified.
        rate: Steps per unit of ``x``, broadcastable to it.
        back: Units of ``x`` per step.
        shift: Code of the anchor.
        limits: Smallest and largest code.
        anchor: Value of code ``shift``; ``None`` for 0.
    """
    shifted = isinstance(shift, Tensor) or shift != 0.0
    y = x * rate if anchor is None else (x - anchor).mul_(rate)
    if shifted:
        y.add_(shift)
    y.round_()
    if limits is not None:
        qmin, qmax = limits  # one pass with two tensors takes eight times as long as two with one
        y.clamp_(qmin, qmax) if not isinstance(qmax, Tensor) else y.clamp_min_(qmin).clamp_max_(qmax)
    if shifted:
        y.sub_(shift)
    y.mul_(back)
    if anchor is not None:
        y.add_(anchor)
    return y


def through_staircase(grad: Tensor, distance: Tensor, step: Tensor, steepness: float) -> Tensor:
    """``grad`` times ``k sech^2(k (f - 1/2)) / (2 tanh(k/2))``.

    ``|f - 1/2| = 1/2 - |round(v) - v|``, sech is even, and ``sech^2(z) = 4 sigmoid(2z) (1 - sigmoid(2z))``, which costs
    a tenth of tanh.

    Args:
        grad: Not modified.
        distance: From the nearest level, ``step |round(v) - v|``; overwritten.
        step: Distance of two levels.
        steepness: The k.
    """
    factor = 2.0 * steepness / step
    if factor.numel() == 1 and _reads_are_free(distance):
        torch.add(distance.new_tensor(-steepness), distance, alpha=factor.item(), out=distance)
    else:
        distance.mul_(factor).sub_(steepness)
    level, scale = distance.sigmoid_(), 2.0 * steepness / math.tanh(steepness / 2.0)
    return torch.ops.aten.sigmoid_backward.grad_input(grad, level, grad_input=level).mul_(scale)


def divide(
    grad: Tensor, x: Tensor, lower: Tensor, upper: Tensor, ties: Ties, need_lower: bool, need_upper: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A gradient where ``x`` is inside of its bounds (0 elsewhere), and its sums below and above them, where needed.

    A bound that is one number can be read from the CPU's memory at no cost; then the backward passes of clamp and
    threshold do at once what takes six passes over signs.
    """
    if lower.numel() == upper.numel() == 1 and _reads_are_free(x):
        return _divide_by_numbers(grad, x, lower, upper, ties, need_lower, need_upper)
    side = _sides(x, lower, upper, "inside" if ties == "both" else ties)
    outside = side.abs()
    inside = torch.addcmul(grad, grad, outside, value=-1.0)
    if not (need_lower or need_upper):
        return inside, None, None
    if ties == "both":
        side = _sides(x, lower, upper, "outside")
        outside = side.abs()
    sided, total = reduce(grad, side, upper), reduce(grad, outside, upper)
    return inside, (total - sided) * 0.5, (total + sided) * 0.5


def _reads_are_free(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _divide_by_numbers(
    grad: Tensor, x: Tensor, lower: Tensor, upper: Tensor, ties: Ties, need_lower: bool, need_upper: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    low, high = lower.item(), upper.item()
    strictly = with_bounds = None
    if ties != "inside":
        strictly = torch.ops.aten.hardtanh_backward(grad, x, low, high)  # a value on a bound counts as outside
    if ties != "outside":
        real = np.float32 if x.dtype == torch.float32 else np.float64
        ends = np.nextafter(real(low), real(-np.inf)), np.nextafter(real(high), real(np.inf))
        with_bounds = torch.ops.aten.hardtanh_backward(grad, x, *map(float, ends))
    inside = strictly.lerp_(with_bounds, 0.5) if ties == "split" else strictly if ties == "outside" else with_bounds
    if not (need_lower or need_upper):
        return inside, None, None
    if ties == "inside" and not need_lower:
        return inside, None, _shaped(torch.ops.aten.threshold_backward(grad, x, high).sum(), upper)
    spare = {"split": with_bounds, "both": strictly}.get(ties)
    outside = torch.sub(grad, strictly if ties == "both" else inside, out=spare)
    total = outside.sum()
    above = torch.ops.aten.threshold_backward.grad_input(outside, x, (low + high) / 2, grad_input=outside).sum()
    return inside, _shaped(total - above, lower), _shaped(above, upper)


def _sides(x: Tensor, lower: Tensor, upper: Tensor, ties: Ties) -> Tensor:
    """How far each element counts as above (0 to 1) or below (0 to -1) the bounds.

    Only signs of differences are used: a dead range may be 1e-12 wide and its data a billion times larger.
    """
    if ties == "inside":
        side = torch.maximum(x, lower)
        return torch.sub(x, torch.minimum(side, upper, out=side), out=side).sign_()
    side = torch.sub(x, lower).sign_()
    side.add_(torch.sub(x, upper).sign_())  # 0 inside, +-1 on a bound, +-2 outside
    return side.mul_(0.5) if ties == "split" else side.clamp_(-1.0, 1.0)


def reduce(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Sum of products over every axis along which ``like`` broadcasts; one pass where ``like`` is a scalar."""
    if like.numel() == 1 and a.is_contiguous() and b.is_contiguous():
        return _shaped(torch.dot(a.view(-1), b.view(-1)), like)
    return (a * b).sum_to_size(like.shape)


def _shaped(total: Tensor, like: Tensor) -> Tensor:
    return total.view(like.shape) if like.dim() else total
