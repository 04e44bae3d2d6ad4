"""The affine grid of DDTB between a lower and an upper bound (Zhong et al., ECCV 2022); formulas in ``ddtb.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from qsr_plugin.quant.ops import fake_quantize, int_limits
from qsr_plugin.quant.quantizer import QParams


def _grid(lower: Tensor, upper: Tensor, bits: int | Tensor, clamp_codes: bool) -> tuple:
    """Steps between the bounds, ``-z``, and the smallest and largest code."""
    low, high = int_limits(bits)
    steps = high - low
    with torch.no_grad():
        rate = steps / (upper - lower)
        shift = low - (rate * lower).round()
        if not clamp_codes:
            low, high = (rate * lower + shift).round(), (rate * upper + shift).round()
    return steps, shift, (low, high)


def quantize_between(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    bits: int | Tensor,
    clamp_codes: bool,
    *,
    clip: bool = True,
    only_read: bool = False,
) -> Tensor:
    """Clip to two bounds and quantize on the affine grid between them.

    What is clipped gets the value of the outermost level, and the gradient of that level with respect to the bounds.
    On a bound it counts half as clipped.

    Args:
        x: Float tensor of any shape.
        lower: Lower bound, broadcastable to ``x``.
        upper: Upper bound, above the lower one.
        bits: Bit width, a number or broadcastable to ``x``.
        clamp_codes: ``2^b`` levels at most, instead of up to ``2^b + 1``.
        clip: False where nothing lies beyond the bounds: every element then has gradient one.
        only_read: See :func:`fake_quantize`.
    """
    steps, shift, codes = _grid(lower, upper, bits, clamp_codes)
    span, ends = upper - lower, (lower, upper)
    if clip and span.requires_grad:
        with torch.no_grad():  # how far the outermost levels lie beyond, in spans; the rounding is constant
            beyond = [(code - shift) / steps - bound / span for code, bound in zip(codes, ends)]
            still = span.detach()
        change = span - still  # zero: the ends have the values of the bounds and the gradients of the levels
        ends = tuple(bound + part * change for bound, part in zip(ends, beyond))
    ends = ends if clip else None
    return fake_quantize(x, span, steps, codes, bounds=ends, shift=shift, ties="split", only_read=only_read)


def grid_between(lower: Tensor, upper: Tensor, bits: int, clamp_codes: bool) -> QParams:
    """The grid of :func:`quantize_between` for 0-d bounds and one bit width."""
    steps, shift, codes = _grid(lower, upper, bits, clamp_codes)
    return QParams((upper - lower) / steps, shift, *(int(code) for code in codes))
