"""What a chain of linear modules makes near the borders, where its inner convolutions pad with zeros.

There it is linear as well, with other kernels. They are the gradients of single pixels of its result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qsr_plugin.deploy.collapsed import Border, CollapsedTail, Correction
from qsr_plugin.deploy.linear_chain import ZERO, AffineMap, Function, equal, random_map

_SIDES = {"top": (-1, 0), "bottom": (1, 0), "left": (0, -1), "right": (0, 1)}
_CORNERS = {f"{y}_{x}": (_SIDES[y][0], _SIDES[x][1]) for y in ("top", "bottom") for x in ("left", "right")}


@torch.enable_grad()
def exact_border(f: Function, found: AffineMap, radius: int) -> Border:
    """Corrections with which a convolution and a pixel shuffle equal a chain everywhere.

    Args:
        f: (N, C, h, w) to (N, C', scale h, scale w), float64, linear with a constant; takes gradients.
        found: What it is away from the borders.
        radius: Its :func:`~qsr_plugin.deploy.linear_chain.reach`.

    Raises:
        RuntimeError: If it has no gradient.
    """
    lines = -(-found.ring // found.scale)
    outputs, channels, *size = found.kernel.shape
    padding = tuple(one // 2 for one in size)
    side = 2 * max(radius, lines) + 1
    x = torch.zeros(outputs, channels, side, side, dtype=torch.float64, requires_grad=True)
    want = F.pixel_unshuffle(f(x), found.scale)
    got, border = F.conv2d(x, found.kernel, found.bias, padding=padding), Border(lines)
    for places, parts in ((_SIDES, border.sides), (_CORNERS, border.corners)):
        missing = want - (border(x, got) if border.sides else got)
        parts.update({name: _correction(missing, x, ends, lines, found.kernel) for name, ends in places.items()})
    return border


def smallest_side(f: Function, tail: CollapsedTail, channels: int) -> int | None:
    """Sides from which on a tail with a border equals the chain; ``None`` if it does not with larger ones either."""
    lines, reach = tail.border.lines, max(tail.conv.kernel_size)
    sides = range(2 * lines, 2 * (lines + reach))
    if not _agree(f, tail, (1, channels, sides.stop, sides.stop + 3)):
        return None
    return next((side for side in sides if _agree(f, tail, (1, channels, side, side))), sides.stop)


def _agree(f: Function, tail: CollapsedTail, shape: tuple[int, ...]) -> bool:
    x = random_map(shape, 6)
    try:
        return equal(f(x), tail(x))
    except RuntimeError:  # too small for a kernel or for a mirror image
        return False


def _correction(missing: Tensor, x: Tensor, ends: tuple[int, int], lines: int, inside: Tensor) -> Correction:
    """What is missing in the lines at some ends: in the corner of both, or in the middle of a side.

    Args:
        missing: (C', C', side, side), the same for each of the batch.
        x: (C', C, side, side), zeros that it was computed from.
        ends: See :class:`Correction`.
        lines: How many.
        inside: The kernel away from the borders, which gives the size along a side and what counts as zero.
    """
    side = x.shape[-1]
    rows, columns = (_places(end, lines, side) for end in ends)
    kernel = torch.stack([torch.stack([_gradient(missing, x, row, column) for column in columns]) for row in rows])
    bias = torch.stack([torch.stack([missing[0, :, row, column] for column in columns]) for row in rows])
    used = kernel.abs().amax((0, 1, 2, 3)) > ZERO * inside.abs().max()
    for axis, (end, along) in enumerate(zip(ends, inside.shape[2:])):
        places = torch.where(used.any(1 - axis))[0]
        first, last = (int(places.min()), int(places.max())) if len(places) else (side - 1, 0)
        count = along if end == 0 else max(1, last + 1 if end < 0 else side - first)
        start = {-1: 0, 0: side // 2 - along // 2, 1: side - count}[end]
        kernel = kernel.narrow(4 + axis, start, count)
    return Correction(kernel, bias, ends)


def _places(end: int, lines: int, side: int) -> range:
    """The lines at one end, or the one in the middle."""
    return {-1: range(lines), 0: range(side // 2, side // 2 + 1), 1: range(side - lines, side)}[end]


def _gradient(missing: Tensor, x: Tensor, row: int, column: int) -> Tensor:
    """(C', C, side, side): the gradient of each channel in one place; the batch holds them all."""
    chosen, channels = torch.zeros_like(missing), torch.arange(len(missing))
    chosen[channels, channels, row, column] = 1
    return torch.autograd.grad(missing, x, chosen, retain_graph=True)[0]
