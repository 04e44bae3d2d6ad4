"""2DQuant: searched, then distilled bounds for activations and weights (Liu et al., NeurIPS 2024, arXiv 2406.06649).

Both kinds of tensors have an asymmetric grid between two bounds per tensor. Stage one searches the bounds with the
least squared error; stage two, in the recipe, trains all of them against the float network. No weight is trained.
"""

from __future__ import annotations

from typing import Literal, Optional

import torch
from pydantic import Field
from torch import Tensor

from qsr_plugin.methods.minmax_percentile import AsymmetricQuantizer
from qsr_plugin.quant.observers import Observer, Range, minmax, refuse_non_finite
from qsr_plugin.quant.ops import TINY_RANGE, fake_quantize
from qsr_plugin.quant.quantizer import StrictOptions, register_quantizer
from qsr_plugin.quant.range_histogram import RangeHistogram

#: Tensors that reach below zero by no more than this share of how far they reach above it are searched from above
#: alone: what comes out of a ReLU, a GELU or a softmax.
ONE_SIDED = 0.1
Sides = Literal["both", "upper", "auto"]


def candidate(low: Tensor, high: Tensor, index: int, candidates: int, *, one_sided: bool) -> Range:
    """One pair of bounds of the search, ``index`` steps inside of the widest.

    Args:
        low: 0-d tensor, smallest value.
        high: 0-d tensor, largest value.
        index: Which one, counted from 0, the widest.
        candidates: How many there are.
        one_sided: Move the upper bound alone, by ``(high - low) / candidates`` per step; otherwise both, each by half
            of that.
    """
    step = (high - low) / (candidates if one_sided else 2 * candidates)
    return (low if one_sided else low + index * step), high - index * step


def search_bounds(
    values: Tensor, counts: Optional[Tensor], bits: int, candidates: int, *, ends: Range, one_sided: bool
) -> Range:
    """Bounds with the least squared quantization error; the first of equal ones wins.

    Args:
        values: ``(B,)`` values.
        counts: ``(B,)`` how often each occurs, or ``None`` for once.
        bits: Bit width of the grid.
        candidates: How many pairs are tried.
        ends: Smallest and largest value.
        one_sided: See :func:`candidate`.
    """
    steps, weights = 2.0**bits - 1.0, None if counts is None else counts.double()
    best, best_error = ends, None
    for index in range(candidates):
        low, high = candidate(*ends, index, candidates, one_sided=one_sided)
        span = (high - low).clamp_min(TINY_RANGE)
        gap = fake_quantize(values, span, steps, (0.0, steps), bounds=(low, high), anchor=low).sub_(values).double()
        error = gap.square().sum() if weights is None else torch.dot(weights, gap.square())
        if best_error is None or bool(error < best_error):
            best, best_error = (low, high), error
    return best


class BoundSearchObserver(Observer):
    """Bounds of :func:`search_bounds` over all tensors of a calibration.

    Activations are kept as a histogram, so that memory does not grow with them; a weight, which is seen once, as it is.

    Args:
        bits: Bit width of the grid.
        candidates: How many pairs of bounds are tried.
        search: ``both`` ends move, the ``upper`` one alone, or ``auto``: by :data:`ONE_SIDED`.
        bins: Bins of the histogram; 0 searches on the last tensor itself.
    """

    def __init__(self, bits: int, candidates: int, search: Sides, bins: int) -> None:
        self._bits, self._candidates, self._search = bits, candidates, search
        self._histogram = RangeHistogram(bins) if bins else None
        self._values: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take one tensor into account.

        Raises:
            ValueError: If it holds a NaN or an infinity, or is empty.
        """
        refuse_non_finite(x)
        if self._histogram is None:
            self._values = x.detach().float().flatten()
        else:
            self._histogram.add(x)

    def range(self) -> Range:
        """``(low, high)`` as 0-d float32 tensors.

        Raises:
            RuntimeError: If nothing was observed.
        """
        values, counts = self._values, None
        if self._histogram is not None and self._histogram.counts.numel():
            values, counts = self._histogram.centres, self._histogram.counts
        if values is None:
            raise RuntimeError("nothing was observed: the forward pass of the calibration never reached this site")
        low, high = minmax(values) if counts is None else (self._histogram.low, self._histogram.high)
        one_sided = self._search == "upper" or (self._search == "auto" and bool(-low <= ONE_SIDED * high))
        return search_bounds(values, counts, self._bits, self._candidates, ends=(low, high), one_sided=one_sided)


@register_quantizer("searched_bounds")
class SearchedBoundsQuantizer(AsymmetricQuantizer):
    """Trainable lower and upper bound with the least squared error to start from.

    A value exactly on a bound has a gradient of its own and gives it to the bound as well, as published.
    """

    class Options(StrictOptions):
        """Options of :class:`SearchedBoundsQuantizer`.

        Attributes:
            search: Ends that the search moves: ``both``; ``upper``, published for what comes out of GELU and softmax;
                or ``auto``, which takes ``upper`` for tensors that hardly reach below zero.
            candidates: How many pairs of bounds are tried.
            bins: Bins of the histogram of activations.
        """

        search: Sides = "auto"
        candidates: int = Field(100, ge=1)
        bins: int = Field(16384, ge=2)

    ties = "both"

    def make_observer(self) -> BoundSearchObserver:
        """The observer of the options."""
        o = self.options
        bins = 0 if self.role == "weight" else o.bins
        return BoundSearchObserver(max(self.candidates), o.candidates, o.search, bins)
