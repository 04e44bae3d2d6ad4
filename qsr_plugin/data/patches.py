"""Whole images in patches: where to cut, how to put the results together, and what to do when memory runs out.

Neighbouring patches overlap; each output pixel is taken from one patch only, the one in which it lies deeper, so
nothing is averaged and no seam can show as long as the overlap covers the network's receptive field.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger("qsr_plugin")

#: Patches are not made smaller than this when memory runs out.
SMALLEST = 16


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


def spans(length: int, size: int, overlap: int) -> list[Span]:
    """Cut an axis into overlapping patches of equal size.

    The last patch is moved back to end at the border. A side shorter than a patch is one patch.

    Args:
        length: Pixels along the axis.
        size: Pixels of a patch.
        overlap: Pixels that neighbours share, at least.

    Raises:
        ValueError: Unless ``0 <= overlap < size``; with a larger stride than patch, pixels would be left out.
    """
    if size < 1 or not 0 <= overlap < size:
        raise ValueError(
            f"patch size {size} with overlap {overlap}: the overlap must be 0 to {max(size - 1, 0)} pixels"
        )
    if length <= size:
        return [Span(0, length, 0, length)]
    starts = [*range(0, length - size, size - overlap), length - size]
    # Neighbours meet in the middle of what they share.
    borders = [0, *((a + size + b) // 2 for a, b in zip(starts, starts[1:])), length]
    return [Span(start, start + size, low, high) for start, low, high in zip(starts, borders, borders[1:])]


def run_in_patches(
    net: Callable[[Tensor], Tensor], image: Tensor, scale: int, size: int, overlap: int, batch: int = 1
) -> Tensor:
    """Super-resolve images patch by patch.

    Args:
        net: Takes (N, C, h, w), returns (N, C', scale h, scale w).
        image: (1, C, H, W), on the network's device.
        scale: Factor of the network.
        size: Side of a patch in input pixels.
        overlap: Pixels that neighbouring patches share.
        batch: Patches of equal size that run together.

    Returns:
        (1, C', scale H, scale W).

    Raises:
        ValueError: If overlap and size do not fit, or the network's output is not ``scale`` times its input.
        torch.OutOfMemoryError: If even the smallest patches do not fit; never a result with missing parts.
    """
    while True:
        try:
            return _run(net, image, scale, size, overlap, batch)
        except (torch.OutOfMemoryError, MemoryError):
            smaller = max(size // 2, SMALLEST)
            if batch > 1:
                batch = max(batch // 2, 1)
            elif smaller < min(size, max(image.shape[2:])) and overlap < smaller:
                size = smaller
            else:
                raise
            logger.warning("out of memory: going on with patches of %d pixels, %d at a time", size, batch)


def _run(net: Callable[[Tensor], Tensor], image: Tensor, scale: int, size: int, overlap: int, batch: int) -> Tensor:
    places = [(y, x) for y in spans(image.shape[2], size, overlap) for x in spans(image.shape[3], size, overlap)]
    out: Tensor | None = None
    for first in range(0, len(places), batch):
        group = places[first : first + batch]
        results = net(torch.cat([image[:, :, y.start : y.stop, x.start : x.stop] for y, x in group]))
        y, x = group[0]
        expected = (scale * (y.stop - y.start), scale * (x.stop - x.start))
        if tuple(results.shape[2:]) != expected:
            raise ValueError(
                f"the network made {tuple(results.shape[2:])} of a patch, scale {scale} asks for {expected}"
            )
        if out is None:
            out = results.new_empty(1, results.shape[1], scale * image.shape[2], scale * image.shape[3])
        for result, (y, x) in zip(results, group):
            part = result[
                :,
                scale * (y.keep_from - y.start) : scale * (y.keep_to - y.start),
                scale * (x.keep_from - x.start) : scale * (x.keep_to - x.start),
            ]
            out[0, :, scale * y.keep_from : scale * y.keep_to, scale * x.keep_from : scale * x.keep_to] = part
    return out
