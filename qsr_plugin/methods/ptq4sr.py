"""PTQ4SR: density-based dual clipping of activations (Tu et al., CVPR 2023).

Activations of super-resolution networks have long tails of different length on both sides. Bounds are found by how many
values there are, not by how large they are: of one histogram over the whole calibration, the outermost bin with the
fewer values goes, again and again. The bounds then learn from the float network; schedule and losses are in the recipe.
"""

from __future__ import annotations

from typing import Optional

import torch
from pydantic import Field
from torch import Tensor

from qsr_plugin.methods.minmax_percentile import AsymmetricQuantizer
from qsr_plugin.quant.observers import Observer, Range, refuse_non_finite
from qsr_plugin.quant.quantizer import StrictOptions, register_quantizer
from qsr_plugin.quant.range_histogram import RangeHistogram

#: Share of the values that is clipped below, and from, :data:`FINE_BITS` on.
COARSE_RATIO, FINE_RATIO = 0.01, 0.001
FINE_BITS = 8


def dual_clip(counts: Tensor, ratio: float, *, keep_first: bool = False) -> tuple[int, int]:
    """Take outermost bins away, the emptier one first, until a share of all values is gone.

    Bins of equal counts go together. The last bin taken may exceed the share; one bin is always left.

    Args:
        counts: ``(B,)`` values per bin.
        ratio: Share to clip, in [0, 1).
        keep_first: Only clip above.

    Returns:
        First and last bin that are left.
    """
    heights = counts.tolist()
    first, last, removed, budget = 0, len(heights) - 1, 0, ratio * sum(heights)
    while removed < budget and first < last:
        low, high = heights[first], heights[last]
        below, above = not keep_first and low <= high, keep_first or high <= low
        if below and above and last - first == 1:  # both would leave nothing
            break
        removed += low * below + high * above
        first, last = first + below, last - above
    return first, last


class DualClippingObserver(Observer):
    """Bounds of :func:`dual_clip` on one histogram over all batches.

    Where no value is negative, as behind a ReLU, the lower bound is 0.

    Args:
        bins: Bins of the histogram of the first batch; up to twice as many if later ones exceed its range.
        ratio: Share of the values to clip.
    """

    def __init__(self, bins: int, ratio: float) -> None:
        self._histogram, self._ratio = RangeHistogram(bins), ratio

    def update(self, x: Tensor) -> None:
        """Take one batch into account.

        Raises:
            ValueError: If the batch holds a NaN or an infinity, or is empty.
        """
        refuse_non_finite(x)
        self._histogram.add(x)

    def range(self) -> Range:
        """``(low, high)`` as 0-d float32 tensors.

        Raises:
            RuntimeError: If no batch was observed.
        """
        if not self._histogram.counts.numel():
            raise RuntimeError("nothing was observed: the forward pass of the calibration never reached this site")
        one_sided, edges = bool(self._histogram.low >= 0), self._histogram.edges
        first, last = dual_clip(self._histogram.counts, self._ratio, keep_first=one_sided)
        return torch.zeros_like(edges[0]) if one_sided else edges[first], edges[last + 1]


@register_quantizer("dual_clipping")
class DualClippingQuantizer(AsymmetricQuantizer):
    """Trainable lower and upper bound that start from density-based dual clipping."""

    class Options(StrictOptions):
        """Options of :class:`DualClippingQuantizer`.

        Attributes:
            bins: Bins of the histogram.
            ratio: Share of the values to clip; 1 %, and 0.1 % at 8 bits and more, if not given.
        """

        bins: int = Field(2048, ge=2)
        ratio: Optional[float] = Field(None, ge=0, lt=0.5)

    roles = ("act",)

    def make_observer(self) -> DualClippingObserver:
        """The observer of the options."""
        usual = FINE_RATIO if max(self.candidates) >= FINE_BITS else COARSE_RATIO
        return DualClippingObserver(self.options.bins, usual if self.options.ratio is None else self.options.ratio)
