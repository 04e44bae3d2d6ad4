"""Stateless arithmetic of uniform quantization; the only place where rounding and clipping are written.

Every uniform quantizer of the package is one call of :func:`fake_quantize`. Its gradient rules are those of a
straight-through rounding between clipped bounds (Bengio et al., arXiv 1308.3432), written for general bounds and step:
a trained max scale (Li et al., ECCV 2020), a learned step (Esser et al., ICLR 2020) and learned asymmetric bounds
follow from them by the chain rule, because bounds and span are ordinary differentiable tensors for the caller.
"""

from __future__ import annotations

import math
from typing import Literal, Union

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Integer limits: plain numbers for one bit width, or tensors that broadcast over the sample axis.
Limits = tuple[Union[float, Tensor], Union[float, Tensor]]
#: Which side an element counts for that lies exactly on a bound.
Ties = Literal["inside", "split", "outside"]

#: A range never gets narrower than this; keeps dead sites finite (all-zero features, zero weights).
TINY_RANGE = 1e-12


def int_limits(bits: int | Tensor, *, signed: bool = True, narrow: bool = False) -> Limits:
    """Smallest and largest integer code of a bit width.

    Args:
        bits: Bit width, an int or a tensor of any shape (real values allowed: learned bit widths).
        signed: Two's-complement range around zero, else codes start at 0.
        narrow: Drop the most negative code so that the range is symmetric. Only for signed codes.

    Returns:
        ``(qmin, qmax)``, floats for an int and tensors of the same shape for a tensor. For 4 bits: (-8, 7) signed,
        (-7, 7) signed narrow, (0, 15) unsigned.
    """
    if not signed:
        return (0.0 if isinstance(bits, int) else torch.zeros_like(bits)), 2.0**bits - 1.0
    qmax = 2.0 ** (bits - 1) - 1.0
    return (-qmax if narrow else -qmax - 1.0), qmax


def round_ste(x: Tensor) -> Tensor:
    """Round half to even with gradient one.

    Args:
        x: Float tensor of any shape.

    Returns:
        Rounded tensor of the same shape; ``d out / d x = 1`` everywhere.

    Example:
        >>> x = torch.tensor([0.5, 1.5, -0.7], requires_grad=True)
        >>> y = round_ste(x); y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.0, 2.0, -1.0], [1.0, 1.0, 1.0])
    """
    return x + (torch.round(x) - x).detach()


def grad_scale(x: Tensor, factor: float | Tensor) -> Tensor:
    """Identity, to the last bit, whose gradient is multiplied by ``factor`` (Esser et al., ICLR 2020, Sec. 2.2)."""
    scaled = x * factor
    return x.detach() + (scaled - scaled.detach())


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Give a tensor of one value per image the shape that broadcasts over ``x``.

    Args:
        values: ``(N,)``, one value per image.
        x: ``(M, ...)`` with ``M`` a multiple of ``N``: transformers fold the windows of an image into the batch, image
            after image, so each value is repeated ``M // N`` times.

    Returns:
        Tensor of shape ``(M, 1, ..., 1)`` with as many axes as ``x``.

    Raises:
        ValueError: If ``M`` is not a multiple of ``N``.
    """
    images, batch = values.shape[0], x.shape[0]
    if batch % images:
        raise ValueError(
            f"bits for {images} image(s) do not fit a batch of {batch}: expected a multiple of {images}. "
            "Give one bit width per image of the batch."
        )
    if batch != images:
        values = values.repeat_interleave(batch // images)
    return values.view(batch, *([1] * (x.dim() - 1)))


def at_bits(values: Tensor, candidates: tuple[int, ...], bits: int | Tensor) -> Tensor:
    """Take, of one number per candidate bit width, those of the widths asked for.

    Args:
        values: ``(K,)``, differentiable.
        candidates: The K bit widths, ascending.
        bits: One of them, or a tensor of them of any shape. Bits that carry a gradient are real numbers, and may be a
            rounding error beside their candidate.

    Returns:
        Tensor of the shape of ``bits``.
    """
    if not isinstance(bits, Tensor):
        return values[candidates.index(bits)]
    bits = bits.detach()
    below = [(bits > (low + high) / 2).long() for low, high in zip(candidates, candidates[1:])]
    return values[sum(below, torch.zeros_like(bits, dtype=torch.long))]


def fake_quantize(
    x: Tensor,
    span: Tensor,
    steps: float | Tensor,
    limits: Limits | None = None,
    *,
    bounds: tuple[Tensor, Tensor] | None = None,
    anchor: Tensor | None = None,
    shift: float | Tensor = 0.0,
    ties: Ties = "inside",
    steepness: float = 0.0,
) -> Tensor:
    """Quantize to a uniform grid and back.

    ``x_q = anchor + s * (clip(round((x - anchor) / s + shift), qmin, qmax) - shift)`` with ``s = span / steps``.

    The step is given as a stretch of the axis and the number of steps in it, so that ``x * steps / span`` falls on the
    same side of a rounding tie as most formulas of the papers (one that divides first may differ in the last bit);
    ``shift`` is given in steps for the same reason. Rounding is half to even. Arithmetic is done in at least float32;
    the result has the dtype of ``x``.

    Gradients, with ``x_q`` the result, inside and outside as told by ``bounds``, for straight-through rounding::

        d x_q / d x     = 1 inside, 0 outside
        d x_q / d span  = (x_q - x) / span inside, 0 outside
        d x_q / d steps = -(x_q - x) / steps inside, 0 outside
        d x_q / d upper = 1 above the upper bound, 0 elsewhere
        d x_q / d lower = 1 below the lower bound, 0 elsewhere

    With a ``steepness`` k the derivative of rounding is not 1 but that of a soft staircase (Qin et al., NeurIPS 2023),
    ``R'(v) = k sech^2(k (f - 1/2)) / (2 tanh(k/2))`` with f the fraction of ``v = x / s``, and inside
    ``d x_q / d x = R'``, ``d x_q / d span = (x_q - x R') / span``.

    Args:
        x: Float tensor of any shape and range, not modified.
        span: Positive stretch, in units of ``x``, broadcastable to ``x``.
        steps: How many steps make up the span; a number, or a tensor broadcastable to ``x``.
        limits: Smallest and largest code, see :func:`int_limits`; ``None`` leaves codes unlimited.
        bounds: ``(lower, upper)``: the clip range in units of ``x``, broadcastable to ``x``: which elements are
            outside, and where the gradient of what is clipped goes. ``None`` means that every element counts as inside,
            also where its code is limited.
        anchor: Value of code ``shift``, broadcastable to ``x``; 0 if not given. Receives no gradient.
        shift: Code of the anchor, in steps; 1/2 makes a grid without a level at the anchor. Receives no gradient.
        ties: How elements exactly on a bound count: ``inside`` (as :func:`torch.clamp`), ``outside`` (strict
            inequality) or ``split``, half and half (element-wise minimum and maximum).
        steepness: Steepness of the soft staircase; 0 for straight-through rounding. Not together with an anchor.

    Returns:
        Fake-quantized tensor with the shape and dtype of ``x``.
    """
    lower, upper = bounds if bounds is not None else (None, None)
    return _FakeQuantize.apply(x, span, steps, lower, upper, anchor, limits, shift, ties, steepness)


class _FakeQuantize(torch.autograd.Function):
    """Few passes, most of them in place; masks are avoided, because they do not vectorise."""

    @staticmethod
    def forward(ctx, x, span, steps, lower, upper, anchor, limits, shift, ties, steepness):  # noqa: D102
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        rate = steps / span
        shifted = isinstance(shift, Tensor) or shift != 0.0
        y = wide * rate if anchor is None else (wide - anchor).mul_(rate)
        if shifted:
            y.add_(shift)
        y.round_()
        if limits is not None:
            qmin, qmax = limits  # one pass with two tensors takes eight times as long as two with one
            y.clamp_(qmin, qmax) if not isinstance(qmax, Tensor) else y.clamp_min_(qmin).clamp_max_(qmax)
        if shifted:
            y.sub_(shift)
        y.mul_(span / steps)
        if anchor is not None:
            y.add_(anchor)
        # The rounding error is kept, not the result: whoever gets the result may change it in place.
        error = torch.sub(y, wide) if steepness or any(ctx.needs_input_grad[1:3]) else None
        kept = wide if upper is not None or steepness else None
        ctx.save_for_backward(kept, error, span, lower, upper, steps if isinstance(steps, Tensor) else None)
        ctx.ties, ctx.wide, ctx.steepness, ctx.steps = ties, wide.dtype, steepness, steps
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: D102
        x, error, span, lower, upper, steps = ctx.saved_tensors
        need_x, need_span, need_steps, need_lower, need_upper = ctx.needs_input_grad[:5]
        wide = grad.to(ctx.wide)
        inside, below, above = wide, None, None
        if upper is not None:
            inside, below, above = _divide(wide, x, lower, upper, ctx.ties, need_lower, need_upper)
        grad_span = grad_steps = None
        if need_span:
            grad_span = _reduce(inside, error, span)
        if need_steps:
            grad_steps = -_reduce(inside, error, steps) / steps
        through = inside
        if ctx.steepness:
            through = _through_staircase(inside, error, span / ctx.steps, ctx.steepness)
            if need_span:
                turned = torch.sub(inside, through, out=inside if upper is not None else None)
                grad_span += _reduce(turned, x, span)
        if need_span:
            grad_span /= span
        grad_x = through.to(grad.dtype) if need_x else None
        return grad_x, grad_span, grad_steps, below, above, None, None, None, None, None


def _through_staircase(grad: Tensor, error: Tensor, step: Tensor, steepness: float) -> Tensor:
    """``grad`` times ``k sech^2(k (f - 1/2)) / (2 tanh(k/2))``.

    ``|f - 1/2| = 1/2 - |round(v) - v|``, sech is even, and ``sech^2(z) = 4 sigmoid(2z) (1 - sigmoid(2z))``, which costs
    a tenth of tanh.
    """
    scale = 2.0 * steepness / math.tanh(steepness / 2.0)
    level = error.abs().mul_(2.0 * steepness / step).sub_(steepness).sigmoid_()
    return torch.ops.aten.sigmoid_backward.grad_input(grad, level, grad_input=level).mul_(scale)


def _divide(
    grad: Tensor, x: Tensor, lower: Tensor, upper: Tensor, ties: Ties, need_lower: bool, need_upper: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A gradient where ``x`` is inside of its bounds (0 elsewhere), and its sums below and above them, where needed.

    A bound that is one number can be read from the CPU's memory at no cost; then the backward passes of clamp and
    threshold do at once what takes six passes over signs.
    """
    if lower.numel() == upper.numel() == 1 and _reads_are_free(x):
        return _divide_by_numbers(grad, x, lower, upper, ties, need_lower, need_upper)
    side = _sides(x, lower, upper, ties)
    outside = side.abs()
    inside = torch.addcmul(grad, grad, outside, value=-1.0)
    if not (need_lower or need_upper):
        return inside, None, None
    sided, total = _reduce(grad, side, upper), _reduce(grad, outside, upper)
    return inside, (total - sided) * 0.5, (total + sided) * 0.5


def _reads_are_free(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _divide_by_numbers(
    grad: Tensor, x: Tensor, lower: Tensor, upper: Tensor, ties: Ties, need_lower: bool, need_upper: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    low, high = lower.item(), upper.item()
    inside = with_bounds = None
    if ties != "inside":
        inside = torch.ops.aten.hardtanh_backward(grad, x, low, high)  # a value on a bound counts as outside
    if ties != "outside":
        real = np.float32 if x.dtype == torch.float32 else np.float64
        ends = np.nextafter(real(low), real(-np.inf)), np.nextafter(real(high), real(np.inf))
        with_bounds = torch.ops.aten.hardtanh_backward(grad, x, *map(float, ends))
        inside = with_bounds if inside is None else inside.lerp_(with_bounds, 0.5)
    if not (need_lower or need_upper):
        return inside, None, None
    if ties == "inside" and not need_lower:
        return inside, None, _shaped(torch.ops.aten.threshold_backward(grad, x, high).sum(), upper)
    outside = torch.sub(grad, inside, out=with_bounds if ties == "split" else None)
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


def _reduce(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Sum of products over every axis along which ``like`` broadcasts; one pass where ``like`` is a scalar."""
    if like.numel() == 1 and a.is_contiguous() and b.is_contiguous():
        return _shaped(torch.dot(a.view(-1), b.view(-1)), like)
    return (a * b).sum_to_size(like.shape)


def _shaped(total: Tensor, like: Tensor) -> Tensor:
    return total.view(like.shape) if like.dim() else total
