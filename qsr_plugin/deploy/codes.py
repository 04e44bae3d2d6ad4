"""Integer codes of quantized weights: packed into a stream of bits, and the few numbers that turn them back exactly.

A weight on a uniform grid is ``(code - zero point) * scale`` up to rounding. A file has to give back the very numbers,
so the way back is tried when the file is written, and told by the number of rows in a *grid table*, float32 (K, C) with
C one or the output channels:

* K = 1, 2: scale, and the zero point where it is not 0: ``(code - zero point) * scale``;
* K = 3: these and the value of the smallest code: ``steps * scale + smallest``, steps counted from there;
* K = 2 + 2^bits: scale, zero point, and the value of each code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from qsr_plugin.quant.quantizer import QParams

#: Bit widths that are packed.
WIDTHS = range(2, 9)
_NEAR = 4  # units in the last place around the computed smallest level in which the real one is looked for


def pack(codes: Tensor, bits: int) -> Tensor:
    """Put integers into a stream of exactly ``bits`` bits each.

    Args:
        codes: Integers from 0 to ``2^bits - 1``, any shape.
        bits: 2 to 8.

    Returns:
        uint8 ``(ceil(numel * bits / 8),)``: lowest bit first, the last byte filled with zeros.

    Raises:
        ValueError: For another width, or a code that does not fit.
    """
    _check_width(bits)
    values = codes.cpu().numpy().ravel()
    if values.size and not 0 <= values.min() <= values.max() < 2**bits:
        raise ValueError(f"codes from {values.min()} to {values.max()} do not fit {bits} bits: 0 to {2**bits - 1} do")
    stream = (values.astype(np.uint8)[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return torch.from_numpy(np.packbits(stream, bitorder="little"))


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """The integers that :func:`pack` has put into a stream.

    Args:
        data: uint8, one axis.
        bits: 2 to 8.
        count: How many there are.

    Returns:
        uint8 ``(count,)``.

    Raises:
        ValueError: For another width, type or length.
    """
    _check_width(bits)
    expected = math.ceil(count * bits / 8)
    if data.dtype != torch.uint8 or tuple(data.shape) != (expected,):
        raise ValueError(f"{count} codes of {bits} bits are {expected} bytes, found {data.dtype} {tuple(data.shape)}")
    stream = np.unpackbits(data.cpu().numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little")[:, 0].copy())


def _check_width(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"cannot pack {bits} bits: {WIDTHS[0]} to {WIDTHS[-1]} can be")


@dataclass(frozen=True)
class CodedWeight:
    """A quantized weight in integers.

    Attributes:
        codes: uint8, the shape of the weight, counted from the smallest code.
        table: Grid table, see the top of this file.
        bits: Bit width, 2 to 8.
        qmin: Smallest code.
        axis: Axis of the output channels.
    """

    codes: Tensor
    table: Tensor
    bits: int
    qmin: int
    axis: int

    def values(self) -> Tensor:
        """The weight, float32."""
        rows = [_along(row, self.codes, self.axis) for row in self.table]
        if len(rows) > 3:
            levels = self.table[2:].t()
            channel = _along(torch.arange(len(levels)), self.codes, self.axis)
            return levels[channel, self.codes.long()]
        if len(rows) == 3:
            return self.codes.float() * rows[0] + rows[2]
        codes = self.codes.float() + self.qmin
        return (codes - rows[1] if len(rows) == 2 else codes) * rows[0]


def table_of(grid: QParams) -> Tensor:
    """Scale, and the zero point unless it is 0, as a grid table."""
    scale, zero = grid.scale.reshape(-1), grid.zero_point.reshape(-1)
    return torch.stack([scale, zero.expand_as(scale)] if bool(zero.any()) else [scale]).float()


def grid_in(table: Tensor, qmin: int, qmax: int) -> QParams:
    """The grid that a table begins with; scale and zero point are 0-d where it has one column.

    Args:
        table: Grid table.
        qmin: Smallest code.
        qmax: Largest code.

    Raises:
        ValueError: If it is no grid table.
    """
    if table.dtype != torch.float32 or table.dim() != 2 or not table.numel():
        raise ValueError(f"a grid is a float32 table, found {table.dtype} {tuple(table.shape)}")
    if not bool(table.isfinite().all() and (table[0] > 0).all()):
        raise ValueError("a grid has a finite scale above 0")
    scale, zero = table[0], torch.zeros_like(table[0]) if len(table) == 1 else table[1]
    return QParams(scale[0], zero[0], qmin, qmax) if len(scale) == 1 else QParams(scale, zero, qmin, qmax)


def coded(weight: Tensor, grid: QParams, bits: int, axis: int) -> Optional[CodedWeight]:
    """Integers for a quantized weight, whose ``values`` are that weight to the last bit.

    Args:
        weight: float32, finite.
        grid: The grid that it lies on.
        bits: Bit width.
        axis: Axis of the output channels.

    Returns:
        ``None`` if the weight cannot be packed: not on the grid, more codes than the bits have, another width than 2 to
        8, or so few elements that they are smaller in float.
    """
    if bits not in WIDTHS or grid.qmax - grid.qmin >= 2**bits:
        return None
    scale, zero = (_along(value.double().reshape(-1), weight, axis) for value in (grid.scale, grid.zero_point))
    codes = torch.round(weight.double() / scale + zero) - grid.qmin
    if not 0 <= float(codes.min()) <= float(codes.max()) <= grid.qmax - grid.qmin:
        return None
    codes = codes.to(torch.uint8)
    for table in _tables(weight, codes, table_of(grid), grid, bits, axis):
        found = CodedWeight(codes, table, bits, grid.qmin, axis)
        small = 4 * table.numel() + codes.numel() * bits / 8 < 4 * weight.numel()
        if small and torch.equal(found.values(), weight):
            return found
    return None


def _tables(weight: Tensor, codes: Tensor, table: Tensor, grid: QParams, bits: int, axis: int) -> Iterator[Tensor]:
    """Grid tables that may give the weight back, the smallest first."""
    yield table
    head = table if len(table) == 2 else torch.cat([table, torch.zeros_like(table)])
    if table.shape[1] == 1:
        below = above = (grid.qmin - head[1:]) * head[:1]
        for _ in range(_NEAR + 1):
            yield torch.cat([head, below])
            yield torch.cat([head, above])
            below, above = (torch.nextafter(v, v.new_tensor(end)) for v, end in ((below, -math.inf), (above, math.inf)))
    levels = torch.zeros(table.shape[1], 2**bits)
    channel = _along(torch.arange(len(levels)), codes, axis).expand(codes.shape)
    levels[channel, codes.long()] = weight
    yield torch.cat([head, levels.t()])


def _along(values: Tensor, weight: Tensor, axis: int) -> Tensor:
    """One number, or one per channel, to broadcast over a weight."""
    return values.view([-1 if index == axis else 1 for index in range(weight.dim())])
