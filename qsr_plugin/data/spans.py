"""Where images are cut into patches, and which patch each pixel of the result is taken from.

How the last patch of a row ends is told in :mod:`qsr_plugin.data.patches`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Pixels = TypeVar("Pixels", np.ndarray, Tensor)

#: What becomes of the last patch of a row or column.
Last = Literal["shift", "enlarge"]


@dataclass(frozen=True)
class Span:
    """One patch along one axis, in input pixels.

    Attributes:
        start: First pixel of the patch.
        stop: One after its last pixel.
        keep_from: First pixel whose result is taken from this patch.
        keep_to: One after the last such pixel.
    """

    start: int
    stop: int
    keep_from: int
    keep_to: int


class Patch(NamedTuple):
    """One patch of an image, in input pixels."""

    y: Span
    x: Span

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.y.stop - self.y.start, self.x.stop - self.x.start

    def of(self, image: Pixels) -> Pixels:
        """This part of ``(..., H, W)``, an array or a tensor."""
        return image[..., self.y.start : self.y.stop, self.x.start : self.x.stop]


def spans(length: int, size: int, overlap: int, last: Last = "shift") -> list[Span]:
    """Cut an axis into overlapping patches.

    With ``last="shift"`` all have the same size and the last one is moved back to end at the border; a side shorter
    than a patch is one patch. With ``last="enlarge"`` patches start at 0, step, 2 step, ... as far as a whole one fits,
    ``step = size - overlap``, and the last one is extended to the border: it has at most ``size + step - 1`` pixels,
    and a side shorter than ``size + step`` is one patch. Neighbours meet in the middle of what they share, rounded
    down.

    Args:
        length: Pixels along the axis.
        size: Pixels of a patch.
        overlap: Pixels that neighbours share, at least.
        last: What becomes of the last patch.

    Raises:
        ValueError: Unless ``0 <= overlap < size``; with a larger stride than patch, pixels would be left out.
    """
    if size < 1 or not 0 <= overlap < size:
        raise ValueError(
            f"patch size {size} with overlap {overlap}: the overlap must be 0 to {max(size - 1, 0)} pixels"
        )
    step = size - overlap
    if last == "enlarge":
        starts = list(range(0, max(length - size, 0) + 1, step))
    else:
        starts = [*range(0, length - size, step), max(length - size, 0)]
    stops = [*(start + size for start in starts[:-1]), length]
    borders = [0, *((stop + start) // 2 for stop, start in zip(stops, starts[1:])), length]
    return [Span(*span) for span in zip(starts, stops, borders, borders[1:])]
