"""Range of least quantization error, from histograms of single images.

A few images can hold values a hundred times larger than all others (features that explode at a border). A range of
least mean squared error serves them and fails the rest, so errors are compared by the mean of their *logarithms*: a
range that halves the error of one image is worth as much as one that halves that of any other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qsr_plugin.quant.observers import Observer, Range, minmax, refuse_non_finite
from qsr_plugin.quant.record import current_record

#: Histograms kept at most; with more images every second one is dropped, then every second of those, and so on.
IMAGES = 128
#: Bins of a histogram for 7 bits and less; above, they are a quarter of a step when images fill the range.
BINS = 512
#: Above this bit width rounding is negligible beside clipping: the whole range is taken.
FINEST = 10
#: Share of an image's mean square that is added to its error, so that exact images do not decide alone.
FLOOR = 1e-7
#: Ends are tried at these shares of the way from the mean to the outermost value.
SHARES = torch.logspace(0, -14, 57, base=2.0, dtype=torch.float64)
_FINE = torch.logspace(0.25, -0.25, 17, base=2.0, dtype=torch.float64)
_WHOLE = SHARES[:1]


class LeastErrorObserver(Observer):
    """Chooses the range in which uniform quantization has the least mean logarithm of the images' squared errors.

    Memory is a histogram per image, at most :data:`IMAGES` of them, whatever the images' sizes and number. With more
    than :data:`FINEST` bits there are none, and the range is that of all values.

    Args:
        bits: Bit width that the error is taken at; the grid has ``2^bits`` levels from end to end.
    """

    def __init__(self, bits: int) -> None:
        self._levels = 2**bits - 1
        self._bins = max(BINS, 4 * 2 ** min(bits, FINEST))
        self._whole = bits > FINEST
        self._seen, self._stride = 0, 1
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._ends: Range | None = None
        self._range: Range | None = None

    def update(self, x: Tensor) -> None:
        """Take a batch into account.

        Args:
            x: ``(M, ...)``, the images of the batch one after the other, each in M / N parts (windows).

        Raises:
            ValueError: If the batch holds a NaN or an infinity, or is empty.
        """
        refuse_non_finite(x)
        if self._whole:
            low, high = minmax(x)
            known = self._ends or (low, high)
            self._ends = torch.minimum(known[0], low), torch.maximum(known[1], high)
            return
        record = current_record()
        images = record.images if record is not None and x.shape[0] % record.images == 0 else x.shape[0]
        self._range = None
        for image in x.detach().float().reshape(images, -1):
            if self._seen % self._stride == 0:
                self._kept.append(_histogram(image, self._bins))
            self._seen += 1
            if len(self._kept) > IMAGES:
                self._kept, self._stride = self._kept[::2], 2 * self._stride

    def range(self) -> Range:
        """``(low, high)`` as 0-d float32 tensors.

        Raises:
            RuntimeError: If no batch was observed.
        """
        if self._ends is not None:
            return self._ends
        if not self._kept:
            raise RuntimeError("nothing was observed: the forward pass of the calibration never reached this site")
        if self._range is None:
            self._range = self._search()
        return self._range

    def _search(self) -> Range:
        """Ends between the outermost values and the mean, first moved together, then in turn, then finely."""
        values, shares = (torch.stack(parts) for parts in zip(*self._kept))
        low, high = values.min(), values.max()
        if bool((told := (values != 0).any(1)).any()):  # images of zeros alone would decide by how near a level zero is
            values, shares = values[told], shares[told]
        middle = (values * shares).sum(1).mean().clamp(low, high)

        def ends(shrunk_low: Tensor, shrunk_high: Tensor) -> Range:
            return middle - (middle - low) * shrunk_low, middle + (high - middle) * shrunk_high

        def best(below: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
            below, above = torch.broadcast_tensors(below, above)
            errors = torch.stack([self._error(values, shares, *ends(*pair)) for pair in zip(below, above)])
            chosen = errors.argmin()  # the first, which is the widest
            return below[chosen : chosen + 1], above[chosen : chosen + 1]

        bounded = bool(low == 0)  # behind a ReLU zero stays the lowest level
        below, above = best(_WHOLE if bounded else SHARES, SHARES)
        for fine in (False, False, True, True):
            below, above = best(below, (above * _FINE).clamp(max=1) if fine else SHARES)
            if not bounded:
                below, above = best((below * _FINE).clamp(max=1) if fine else SHARES, above)
        return tuple(end.squeeze(0).float() for end in ends(below, above))

    def _error(self, values: Tensor, shares: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Mean over images of the logarithm of the mean squared error between two ends."""
        step = ((high - low) / self._levels).clamp_min(torch.finfo(torch.float64).tiny)
        gaps = values.sub(low).div_(step).round_().clamp_(0, self._levels).mul_(step).add_(low).sub_(values)
        errors = gaps.square_().mul_(shares).sum(1)
        return (errors + FLOOR * (values.square() * shares).sum(1) + torch.finfo(torch.float64).tiny).log().mean()


def _histogram(image: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Mean value of each of ``bins`` equal parts of an image's range, and the share of its elements there.

    Two more with share 0 are the smallest and the largest value. Both are float64 and on the CPU; values are counted
    from the smallest one, so that those far from zero lose nothing.
    """
    low, high = torch.aminmax(image)
    offsets = image - low
    width = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    index = (offsets * (bins / width)).long().clamp_(0, bins - 1)
    counts = torch.bincount(index, minlength=bins)
    sums = torch.bincount(index, weights=offsets.double(), minlength=bins)
    means = sums / counts.clamp_min(1)  # empty bins stand at the smallest value
    values = torch.cat([means, torch.stack(torch.aminmax(offsets)).double()]) + low.double()
    return values.cpu(), F.pad(counts.double() / image.numel(), (0, 2)).cpu()
