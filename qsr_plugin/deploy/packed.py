"""Packed files: a quantized network whose weights take as many bits on disk as their grid has.

The file is a ``.safetensors`` with the metadata of :func:`qsr_plugin.save_quantized`, format 2, and these tensors:

* ``<site>.weight.codes``, uint8: the codes, counted from the smallest, b bits each without gaps in the order of the
  weight's elements;
* ``<site>.weight.grid``, float32: what turns codes back into values, a grid table of :mod:`qsr_plugin.deploy.codes`;
* everything else as it is, with the weights that cannot be packed in float.

The metadata entry ``packed`` gives, for each site: bits, smallest and largest code, and the CRC-32 of the codes. If the
tail is collapsed, the entry ``collapsed`` names the modules that one convolution stands for, and its shape; its kernel
has the name of the first of them (:mod:`qsr_plugin.deploy.packed_tail`).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from qsr_plugin import checkpoint
from qsr_plugin.checkpoint import CheckpointError
from qsr_plugin.deploy.codes import CodedWeight, coded, grid_in, pack, table_of, unpack
from qsr_plugin.deploy.folding import fold, put_folded
from qsr_plugin.deploy.packed_tail import collapse as collapse_in
from qsr_plugin.deploy.packed_tail import described, put_described, tail_in
from qsr_plugin.quant.quantizer import QParams
from qsr_plugin.quant.sites import Site
from qsr_plugin.quant.surgery import persistent_state, plugin_keys, sites
from qsr_plugin.report.storage import storage_bits


class _Entry(BaseModel):
    """What the metadata say of one site; without a checksum its weight is stored in float."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    bits: int = Field(ge=2, le=16)
    qmin: int
    qmax: int
    crc32: Optional[int] = None


_ENTRIES = TypeAdapter(dict[str, _Entry])


@dataclass(frozen=True)
class PackedRow:
    """One layer in a packed file.

    Attributes:
        name: Dotted name of the layer.
        bits: Bit width of its weight.
        codes_bytes: Bytes of the packed codes; 0 for a weight that is stored in float.
        side_bytes: Bytes of its grid.
    """

    name: str
    bits: int
    codes_bytes: int
    side_bytes: int


@dataclass(frozen=True)
class PackedReport:
    """What a packed file takes, in bytes.

    Attributes:
        path: The file.
        file_bytes: Its size: codes and grids of ``rows``, and the next three.
        float_layer_bytes: Weights that are not packed, biases and norms.
        range_bytes: Ranges of activations, bit policies, counters.
        header_bytes: Names, shapes and metadata.
        quantized_bytes: The same network in a file of ``save_quantized``.
        float_bytes: The float network's numbers in 32 bits.
        theoretical_bytes: All of them at the recipe's weight bits, as papers count.
        stated_bytes: The storage that :func:`qsr_plugin.complexity` states of the network in the file.
        rows: The layers with quantized weights.
        in_float: Those of them that are stored in float: no uniform grid, more than 8 bits, or very few elements.
        half: Whether parameters of float layers are stored in 16 bits.
        collapsed: Modules that the one convolution of a collapsed tail stands for, in order; () if it is not collapsed.
        ring: How many of the outermost pixels of an image differ for that.
    """

    path: Path
    file_bytes: int
    float_layer_bytes: int
    range_bytes: int
    header_bytes: int
    quantized_bytes: int
    float_bytes: int
    theoretical_bytes: int
    stated_bytes: int
    rows: tuple[PackedRow, ...]
    in_float: tuple[str, ...]
    half: bool
    collapsed: tuple[str, ...] = ()
    ring: int = 0


# -- writing ---------------------------------------------------------------------------------------------------------


def save_packed(net: nn.Module, path: Union[str, Path], *, half: bool = False, collapse: bool = False) -> PackedReport:
    """Save a quantized network with its weights packed; :func:`qsr_plugin.load_quantized` rebuilds it.

    The loaded network is folded (:func:`qsr_plugin.fold`): in evaluation mode its output equals that of ``net`` to the
    last bit, and its weights can neither be calibrated nor trained.

    Args:
        net: Quantized and calibrated, float32; may be folded already. Not changed.
        path: Ends in ``.safetensors``.
        half: Store the parameters of float layers in 16 bits where they fit; the outputs then agree roughly, not
            exactly.
        collapse: Store the linear end of the network as one convolution (:func:`qsr_plugin.deploy.tail.collapse_tail`),
            without what makes its border exact: the outermost pixels then differ, ``PackedReport.ring`` of them, the
            others by rounding.

    Returns:
        What the file takes.

    Raises:
        CheckpointError: If the network is not quantized, its constructor's arguments are not known, a weight is NaN or
            infinite, or its tail cannot be collapsed and shall be.
        UserError: If it is not calibrated.
        OSError: If the file cannot be written.
    """
    checkpoint.check_quantized_path(path)
    if getattr(net, "recipe", None) is None:
        raise CheckpointError(f"{type(net).__name__} is not quantized: call quantize_model(net, recipe) first")
    folded = fold(net).cpu().float()
    if collapse:
        collapse_in(folded)
    tail = tail_in(folded)
    state, entries, rows = persistent_state(folded), {}, []
    added = plugin_keys(folded)
    ranges = added | {key for key, value in state.items() if not value.is_floating_point()}
    for name, site in sites(folded):
        if (quantizer := site.quantizer("weight")) is None:
            continue
        bits, key = quantizer.candidates[0], f"{name}.weight"
        added.add(key)
        entry, parts = _packed(name, site)
        if entry is not None:
            entries[name] = entry.model_dump(exclude_none=True)
        if "codes" in parts:
            del state[key]
        state |= {f"{key}.{part}": tensor for part, tensor in parts.items()}
        rows.append(PackedRow(name, bits, *(_bytes(parts.get(part)) for part in ("codes", "grid"))))
    if half:
        learned = {key for key, _ in folded.named_parameters()} - added
        state |= {key: _halved(state[key]) for key in learned}
    said = {"format": str(checkpoint.PACKED_FORMAT), "packed": json.dumps(entries), "half": str(half)}
    said |= {} if tail is None else {"collapsed": described(tail, state)}
    tensors = {key: value.detach().contiguous().clone() for key, value in state.items()}
    data = safetensors_bytes(tensors, metadata={**checkpoint.metadata_of(net), **said})
    checkpoint.write_atomically(path, lambda temporary: temporary.write_bytes(data))
    held, range_bytes = sum(map(_bytes, tensors.values())), sum(_bytes(tensors[key]) for key in ranges)
    float_bytes = storage_bits(net, as_float=True) // 8
    return PackedReport(
        path=Path(path),
        file_bytes=len(data),
        float_layer_bytes=held - range_bytes - sum(row.codes_bytes + row.side_bytes for row in rows),
        range_bytes=range_bytes,
        header_bytes=len(data) - held,
        quantized_bytes=len(checkpoint.serialized(net)),
        float_bytes=float_bytes,
        theoretical_bytes=math.ceil(float_bytes * net.recipe.bits.weight / 32),
        stated_bytes=storage_bits(folded) // 8,
        rows=tuple(rows),
        in_float=tuple(row.name for row in rows if not row.codes_bytes),
        half=half,
        collapsed=() if tail is None else tail.replaced,
        ring=0 if tail is None else tail.ring,
    )


def _packed(name: str, site: Site) -> tuple[Optional[_Entry], dict[str, Tensor]]:
    """What the file says of a folded weight, and the tensors beside it or, with codes, instead of it."""
    weight, quantizer = site.weight.detach(), site.quantizer("weight")
    if not bool(weight.isfinite().all()):
        raise CheckpointError(f"the weight of {name} holds NaN or infinity: take the last checkpoint without")
    try:
        grid = quantizer.qparams()
    except NotImplementedError:
        return None, {}
    bits = quantizer.candidates[0]
    found = coded(weight, grid, bits, quantizer.channel_axis)
    if found is None:
        return _Entry(bits=bits, qmin=grid.qmin, qmax=grid.qmax), {"grid": table_of(grid)}
    stream = pack(found.codes, bits)
    entry = _Entry(bits=bits, qmin=grid.qmin, qmax=grid.qmax, crc32=_checksum(stream))
    return entry, {"codes": stream, "grid": found.table}


def _checksum(stream: Tensor) -> int:
    return zlib.crc32(stream.numpy().tobytes())


def _bytes(tensor: Optional[Tensor]) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _halved(values: Tensor) -> Tensor:
    half = values.half()
    return half if bool(half.isfinite().all()) else values


# -- reading ---------------------------------------------------------------------------------------------------------


def unpacked(
    net: nn.Module, content: Mapping[str, Tensor], metadata: Mapping[str, str], path: Union[str, Path]
) -> dict[str, Tensor]:
    """Fold a freshly built network, and give the state dict that a packed file holds for it.

    Args:
        net: The network that the file describes, quantized; its weight quantizers are replaced, and its tail if the
            file has it collapsed.
        content: Tensors of the file.
        metadata: Text of the file.
        path: For messages.

    Raises:
        CheckpointError: If the codes are damaged or do not fit the network.
    """
    state = dict(content)
    try:
        entries = _ENTRIES.validate_json(metadata.get("packed", ""))
        for name, site in sites(net):
            if site.quantizer("weight") is None:
                continue
            entry, key = entries.pop(name, None), f"{name}.weight"
            try:
                grid = None if entry is None else _read(site, entry, state, key)
            except KeyError as missing:
                raise ValueError(f"it lacks {missing}") from None
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
            put_folded(site, grid)
            site.weight = nn.Parameter(site.weight.detach().clone(), requires_grad=False)  # two layers may share it
        if "collapsed" in metadata:
            put_described(net, metadata["collapsed"], state)
        if entries:
            raise ValueError(f"{next(iter(entries))} has no quantized weight in this network")
    except ValueError as error:
        raise CheckpointError(f"{path} is a packed file that is damaged ({error}): get or write it again") from None
    net.folded = True
    return state


def _read(site: Site, entry: _Entry, state: dict[str, Tensor], key: str) -> QParams:
    """The grid of one site; its codes, if there are any, become the weight in ``state``."""
    quantizer, weight = site.quantizer("weight"), site.weight
    axis, table = quantizer.channel_axis, state.pop(f"{key}.grid")
    if (entry.bits,) != quantizer.candidates:
        raise ValueError(f"{entry.bits} bits, its recipe says {quantizer.candidates[0]}")
    grid = grid_in(table, entry.qmin, entry.qmax)
    if table.shape[1] not in (1, weight.shape[axis]) or len(table) not in (1, 2, 3, 2 + 2**entry.bits):
        raise ValueError(f"a grid of {tuple(table.shape)} does not fit a weight of {tuple(weight.shape)}")
    if entry.crc32 is None:
        return grid
    stream = state.pop(f"{key}.codes")
    codes = unpack(stream, entry.bits, weight.numel())
    if _checksum(stream) != entry.crc32:
        raise ValueError("its codes have another checksum than they were written with")
    state[key] = CodedWeight(codes.view(weight.shape), table, entry.bits, entry.qmin, axis).values()
    return grid
