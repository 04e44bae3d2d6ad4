"""Windows of HAT: cutting an image into them, tables of position biases, masks of shifted images.

Nothing depends on the size of the image, so all is made once, with the network. Buffers have the values of the
authors' release (Chen et al., CVPR 2023, arXiv 2205.04437).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Added to the similarity of two positions that are no neighbours in the image.
_FAR = -100.0


class Windows(NamedTuple):
    """What the attention blocks of one forward share; T positions in a window, S in the larger one around it.

    Attributes:
        inner: (T, T), row of the table of position biases for each pair of positions in a window.
        overlap: (T, S), the same for a window and the larger one.
        masks: (4, 1, T, T) for each kind of window of a shifted image: 0, or -100 where the pair is no pair there.
        kinds: (N * windows,), the kind of each window.
    """

    inner: Tensor
    overlap: Tensor
    masks: Tensor
    kinds: Tensor


def overlapping_size(window_size: int, overlap_ratio: float) -> int:
    """Side of the windows that keys and values of the overlapping attention are taken from.

    Raises:
        ValueError: If they do not extend a window equally on both sides.
    """
    extra = int(window_size * overlap_ratio)
    if extra < 0 or extra % 2:
        raise ValueError(
            f"HAT: overlap_ratio is {overlap_ratio}, which extends windows of {window_size} by {extra}; allowed is an "
            "even number from 0, for both sides: change overlap_ratio"
        )
    return window_size + extra


def inner_index(window_size: int) -> Tensor:
    """Buffer ``relative_position_index_SA`` of the release: row of the bias table for a pair of positions, (T, T)."""
    own = torch.arange(window_size)
    return _rows(own[:, None] - own + window_size - 1, 2 * window_size - 1)


def overlap_index(window_size: int, outer_size: int) -> Tensor:
    """Buffer ``relative_position_index_OCA`` of the release, (T, S).

    Offsets count from ``2 - outer_size``; rows below zero are those from the end of the table, as in the release.
    """
    own, outer = torch.arange(window_size), torch.arange(outer_size)
    return _rows(outer - own[:, None] + window_size - outer_size + 1, window_size + outer_size - 1)


def _rows(offsets: Tensor, side: int) -> Tensor:
    """``offset_y * side + offset_x`` for all pairs of positions, from the (t, s) offsets along one axis."""
    rows = offsets[:, None, :, None] * side + offsets[None, :, None, :]
    return rows.flatten(2).flatten(0, 1)


def shift_masks(window_size: int, shift: int) -> Tensor:
    """Masks of the four kinds of windows after a cyclic shift, (4, 1, T, T).

    In the last column (kind 1), the last row (kind 2) and the corner (kind 3) a window joins two ends of the image.
    """
    wrapped = torch.arange(window_size) >= window_size - shift
    column = wrapped.expand(window_size, -1).flatten()
    row = wrapped[:, None].expand(-1, window_size).flatten()
    across, down = (part[:, None] != part for part in (column, row))
    return torch.stack([torch.zeros_like(across), across, down, across | down]).unsqueeze(1) * _FAR


def window_kinds(rows: int, columns: int, device: torch.device) -> Tensor:
    """Kind of each of ``rows * columns`` windows, for :func:`shift_masks`."""
    last_row, last_column = (torch.arange(number, device=device) == number - 1 for number in (rows, columns))
    return (2 * last_row[:, None] + last_column.int()).flatten()


def to_windows(x: Tensor, size: int) -> Tensor:
    """(N, H, W, C) to (N * windows, size * size, C), the windows of an image in a row."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels).transpose(2, 3)
    return x.reshape(-1, size * size, channels)


def from_windows(windows: Tensor, size: int, x_size: tuple[int, int]) -> Tensor:
    """Inverse of :func:`to_windows`, to (N, H, W, C)."""
    (height, width), channels = x_size, windows.shape[-1]
    x = windows.view(-1, height // size, width // size, size, size, channels).transpose(2, 3)
    return x.reshape(-1, height, width, channels)
