"""The collapsed tail of a network in a packed file: its kernel, and which modules it stands for."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Optional

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from qsr_plugin.checkpoint import CheckpointError
from qsr_plugin.deploy.calls import quantizes
from qsr_plugin.deploy.collapsed import CollapsedTail
from qsr_plugin.deploy.linear_chain import AffineMap
from qsr_plugin.deploy.tail import collapse_tail, put_tail


class _Entry(BaseModel):
    """What the metadata say of the tail; the checksum is of all of it and of the tensors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    modules: list[str] = Field(min_length=1)
    shape: list[int] = Field(min_length=4, max_length=4)
    scale: int = Field(ge=2)
    ring: int = Field(ge=0)
    crc32: int = 0


def tail_in(net: nn.Module) -> Optional[CollapsedTail]:
    """The collapsed tail of a network, if it has one.

    Raises:
        CheckpointError: If its border is exact, which needs the modules that it stands for.
    """
    tail = next((module for module in net.modules() if isinstance(module, CollapsedTail)), None)
    if tail is not None and tail.border is not None:
        raise CheckpointError(
            f"{tail.replaced[0]} is a collapsed tail with an exact border, which a file does not hold: save the "
            "network from before collapse_tail, with collapse=True"
        )
    return tail


def collapse(net: nn.Module) -> None:
    """Collapse the tail of a network without an exact border, in place; nothing happens if it is collapsed already.

    Raises:
        CheckpointError: If that is not possible, with the reason.
    """
    if tail_in(net) is None and not (report := collapse_tail(net, ring=False)).applied:
        raise CheckpointError(f"{report}. Leave out collapse (--collapse)")


def described(tail: CollapsedTail, state: Mapping[str, Tensor]) -> str:
    """The metadata entry for a tail, of the tensors as the file holds them."""
    shape, scale = list(tail.conv.weight.shape), tail.shuffle.upscale_factor
    entry = _Entry(modules=list(tail.replaced), shape=shape, scale=scale, ring=tail.ring)
    return entry.model_copy(update={"crc32": _checksum(entry, *_tensors(entry, state))}).model_dump_json()


def put_described(net: nn.Module, text: str, state: Mapping[str, Tensor]) -> None:
    """Put a tail in the place of the modules that it stands for, in place.

    Args:
        net: Freshly built.
        text: The metadata entry.
        state: Tensors of the file.

    Raises:
        ValueError: If the entry or the tensors are damaged, or do not fit the network.
    """
    entry = _Entry.model_validate_json(text)
    weight, bias = _tensors(entry, state)
    if entry.shape[0] % entry.scale**2 or any(side % 2 == 0 for side in entry.shape[2:]):
        raise ValueError(f"a kernel of {entry.shape} is none of a collapsed tail of scale {entry.scale}")
    if _checksum(entry, weight, bias) != entry.crc32:
        raise ValueError(f"the collapsed tail {entry.modules[0]} has another checksum than it was written with")
    modules = []
    for name in entry.modules:
        try:
            modules.append(net.get_submodule(name))
        except AttributeError:
            raise ValueError(f"its tail stands for {name}, which this network does not have") from None
        if quantizes(modules[-1]):
            raise ValueError(f"its tail stands for {name}, which is quantized in this network")
    found = AffineMap(weight.float(), bias.float(), entry.scale, entry.ring)
    put_tail(net, modules, CollapsedTail(found, tuple(entry.modules)))


def _tensors(entry: _Entry, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Kernel and bias in a file.

    Raises:
        ValueError: If they are not there, or of another shape or type than the entry says.
    """
    found = []
    for part, shape in (("weight", entry.shape), ("bias", entry.shape[:1])):
        key = f"{entry.modules[0]}.conv.{part}"
        tensor = state.get(key)
        if tensor is None:
            raise ValueError(f"it lacks '{key}'")
        if list(tensor.shape) != shape or tensor.dtype not in (torch.float32, torch.float16):
            raise ValueError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, its metadata say {tuple(shape)}")
        found.append(tensor)
    return found[0], found[1]


def _checksum(entry: _Entry, weight: Tensor, bias: Tensor) -> int:
    said = entry.model_dump_json(exclude={"crc32"}).encode()
    return zlib.crc32(said + b"".join(value.contiguous().numpy().tobytes() for value in (weight, bias)))
