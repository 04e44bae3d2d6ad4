"""A histogram of all tensors of a calibration, in memory that does not grow with them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

#: Elements counted at once: their counts are exact in float32.
_CHUNK = 2**22


class RangeHistogram:
    """Counts of equally wide bins over everything seen so far.

    The first tensor sets the width: ``bins`` of them from its smallest to its largest value. Later tensors append bins
    of this width on the side they exceed; where more than ``2 * bins`` would be needed, pairs of bins are merged, so
    that no count leaves its bin. There are ``bins`` to ``2 * bins`` bins, and counts are exact up to the rounding of
    float32 at an edge. A value on an edge counts for the bin above it, on the last edge of its time for the one below.

    Args:
        bins: Bins of the first tensor, 2 or more.

    Attributes:
        low: Smallest value seen, 0-d float32.
        high: Largest value seen, 0-d float32.
        counts: ``(B,)`` int64, elements per bin; one bin while all values are equal, none before the first tensor.
    """

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.low, self.high = torch.tensor(math.inf), torch.tensor(-math.inf)
        self.counts = torch.zeros(0, dtype=torch.int64)
        self._start, self._width = 0.0, 0.0

    def add(self, x: Tensor) -> None:
        """Count the elements of one tensor.

        Args:
            x: Float tensor of any shape with at least one element, all finite.
        """
        values = x.detach().float().flatten()
        low, high = torch.aminmax(values)
        old = self.low.to(low.device)
        self.low, self.high = torch.minimum(old, low), torch.maximum(self.high.to(low.device), high)
        if self._width > 0.0:
            self._cover(self.low.item(), self.high.item())
        else:
            self._begin(old.item(), self.low.item(), self.high.item())
        if self._width == 0.0:
            self.counts += values.numel()
            return
        end = self._start + self._width * self.counts.numel()
        for part in values.split(_CHUNK):
            self.counts += part.histc(self.counts.numel(), self._start, end).long()

    @property
    def edges(self) -> Tensor:
        """``(B + 1,)`` float32 edges of the bins; the outermost ones are the smallest and the largest value seen."""
        steps = torch.arange(self.counts.numel() + 1, dtype=torch.float64, device=self.counts.device)
        return (self._start + self._width * steps).float().clamp(self.low, self.high)

    @property
    def centres(self) -> Tensor:
        """``(B,)`` float32 middles of the bins."""
        return self.edges.unfold(0, 2, 1).mean(1)

    def _begin(self, old: float, low: float, high: float) -> None:
        """Make the bins of the first tensor; all that was seen before it has the value ``old``."""
        self._start, self._width = low, (high - low) / self.bins
        earlier = self.counts.sum()
        self.counts = torch.zeros(self.bins if high > low else 1, dtype=torch.int64, device=self.low.device)
        where = min(int((old - low) / self._width), self.bins - 1) if earlier and high > low else 0
        self.counts[where] += earlier.to(self.counts.device)

    def _cover(self, low: float, high: float) -> None:
        """Merge and append bins so that they reach from ``low`` to ``high``."""
        while True:
            count = self.counts.numel()
            before = max(0, math.ceil((self._start - low) / self._width))
            after = max(0, math.ceil((high - self._start) / self._width) - count)
            if before + count + after <= 2 * self.bins:
                break
            self.counts = F.pad(self.counts, (0, count % 2)).view(-1, 2).sum(1)
            self._width *= 2
        self.counts = F.pad(self.counts, (before, after))
        self._start -= before * self._width
