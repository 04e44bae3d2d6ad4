"""Stateless arithmetic of uniform quantization; with ``passes.py`` the only place that rounds and clips.

Every uniform quantizer of the package is one call of :func:`fake_quantize`, or of :func:`quantize_levels`, which gives
the same in fewer passes to a trained step at one bit width. Their gradient rules are those of a
straight-through rounding between clipped bounds (Bengio et al., arXiv 1308.3432), written for general bounds and step:
a trained max scale (Li et al., ECCV 2020), a learned step (Esser et al., ICLR 2020) and learned asymmetric bounds
follow from them by the chain rule, because bounds and span are ordinary differentiable tensors for the caller.
"""

from __future__ import annotations

from typing import Union

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsr_plugin.quant import passes
from qsr_plugin.quant.passes import Ties

#: Integer limits: plain numbers for one bit width, or tensors that broadcast over the sample axis.
Limits = tuple[Union[float, Tensor], Union[float, Tensor]]

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
    only_read: bool = False,
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
            inequality), ``split``, half and half (element-wise minimum and maximum), or ``both``: they and the bound
            get the whole gradient.
        steepness: Steepness of the soft staircase; 0 for straight-through rounding. Not together with an anchor.
        only_read: Whether the result is never changed in place: the backward pass then keeps it, not the rounding
            error, which saves a tensor where a convolution keeps it as well.

    Returns:
        Fake-quantized tensor with the shape and dtype of ``x``.
    """
    lower, upper = bounds if bounds is not None else (None, None)
    return _FakeQuantize.apply(x, span, steps, lower, upper, anchor, limits, shift, ties, steepness, only_read)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class _FakeQuantize(torch.autograd.Function):
    """Values and gradients by :mod:`qsr_plugin.quant.passes`."""

    @staticmethod
    def forward(ctx, x, span, steps, lower, upper, anchor, limits, shift, ties, steepness, only_read):  # noqa: D102
        wide = _wide(x)
        y = passes.quantized(wide, steps / span, span / steps, shift, limits, anchor)
        error = None
        if steepness or any(ctx.needs_input_grad[1:3]):
            error = y if only_read else torch.sub(y, wide)  # whoever gets the result may change it in place
        kept = wide if upper is not None or steepness or only_read else None
        ctx.save_for_backward(kept, error, span, lower, upper, steps if isinstance(steps, Tensor) else None)
        ctx.ties, ctx.wide, ctx.steepness, ctx.steps, ctx.only_read = ties, wide.dtype, steepness, steps, only_read
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: D102
        x, error, span, lower, upper, steps = ctx.saved_tensors
        need_x, need_span, need_steps, need_lower, need_upper = ctx.needs_input_grad[:5]
        if ctx.only_read and error is not None:
            error = torch.sub(error, x)
        inside, below, above = grad.to(ctx.wide), None, None
        if upper is not None:
            inside, below, above = passes.divide(inside, x, lower, upper, ctx.ties, need_lower, need_upper)
        grad_span = passes.reduce(inside, error, span) if need_span else None
        grad_steps = -passes.reduce(inside, error, steps) / steps if need_steps else None
        through = inside
        if ctx.steepness:
            through = passes.through_staircase(inside, error.abs(), span / ctx.steps, ctx.steepness)
            if need_span:
                turned = torch.sub(inside, through, out=inside if upper is not None else None)
                grad_span += passes.reduce(turned, x, span)
        if need_span:
            grad_span /= span
        grad_x = through.to(grad.dtype) if need_x else None
        return grad_x, grad_span, grad_steps, below, above, None, None, None, None, None, None


def quantize_levels(
    x: Tensor, span: Tensor, steps: float, limits: tuple[float, float], *, ties: Ties, steepness: float = 0.0
) -> Tensor:
    """:func:`fake_quantize` to the multiples of a trained step ``s = span / steps``, clipped at the outermost of them.

    The same values and gradients as with ``bounds`` of ``limits * s``, in fewer passes and with less memory, because
    the result is kept for the backward pass: who gets it must not change it in place.

    Args:
        x: Float tensor of any shape and range, not modified.
        span: Positive, 0-d.
        steps: How many steps make up the span.
        limits: Smallest and largest code.
        ties: See :func:`fake_quantize`; not ``both``.
        steepness: See :func:`fake_quantize`.

    Returns:
        Fake-quantized tensor with the shape and dtype of ``x``.
    """
    return _QuantizeLevels.apply(x, span, steps, limits, ties, steepness)


class _QuantizeLevels(torch.autograd.Function):
    """``d x_q / d span`` is ``(x_q - R' x) / span`` inside, with R' the slope of rounding, ``x_q / span`` outside."""

    @staticmethod
    def forward(ctx, x, span, steps, limits, ties, steepness):  # noqa: D102
        wide = _wide(x)
        y = passes.quantized(wide, steps / span, span / steps, 0.0, limits, None)
        ctx.save_for_backward(wide, y, span)
        ctx.steps, ctx.limits, ctx.ties, ctx.steepness, ctx.wide = steps, limits, ties, steepness, wide.dtype
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: D102
        x, y, span = ctx.saved_tensors
        wide, need_span = grad.to(ctx.wide), ctx.needs_input_grad[1]
        lower, upper = (limit / ctx.steps * span for limit in ctx.limits)  # exact where a bound is the span
        inside, _, _ = passes.divide(wide, x, lower, upper, ctx.ties, False, False)
        through, total = inside, None
        if ctx.steepness:
            through = passes.through_staircase(inside, torch.sub(y, x).abs_(), span / ctx.steps, ctx.steepness)
            if need_span:
                total = (passes.reduce(wide, y, span) - passes.reduce(through, x, span)) / span
        elif need_span:  # a difference of two sums would lose digits, because the rounding error is small beside x
            error = torch.sub(y, x)
            total = passes.reduce(inside, error, span)
            total = (total + passes.reduce(torch.sub(wide, inside, out=error), y, span)) / span
        return through.to(grad.dtype), total, None, None, None, None
