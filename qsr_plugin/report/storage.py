"""How many bits a network takes when it is stored with its weights packed."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from qsr_plugin.quant.depth_surgery import ScaledShortcut
from qsr_plugin.quant.policy import PolicyPart
from qsr_plugin.quant.quantizer import Quantizer
from qsr_plugin.quant.schema import FLOAT_BITS
from qsr_plugin.quant.sites import Site
from qsr_plugin.quant.surgery import rebuilt_buffers, sites


def storage_bits(module: nn.Module, *, as_float: bool = False) -> int:
    """Bits to store a module and all below it; what is shared counts once.

    A quantized weight takes its bit width per number, rounded up to whole bytes per tensor. Other parameters, float
    buffers (batch norm's statistics) and the ranges of quantizers take 32 bits per number. Left out is what a reader
    makes anew: integer buffers (counters, index tables), :func:`rebuilt_buffers` (attention masks),
    calibration flags, bounds used in training only.

    Args:
        module: A network, float or quantized, or a part of one.
        as_float: Count the float network inside a quantized one.
    """
    rebuilt = rebuilt_buffers(module)
    return _bits(module, as_float, {id(buffer) for name, buffer in module.named_buffers() if name in rebuilt})


def learned_numbers(net: nn.Module, share: Callable[[float], float]) -> float:
    """How many numbers a network learns, ranges and bit policies included; what is shared counts once.

    Ranges of weights that were folded since (:func:`qsr_plugin.fold`) count as before.

    Args:
        net: A network, float or quantized.
        share: Bits to what a number of a weight with so many counts; all other numbers have 32.
    """
    packed = [(site.weight, site.quantizer("weight")) for _, site in sites(net) if site.quantizer("weight") is not None]
    widths = {id(weight): packer.candidates[0] for weight, packer in packed}
    gone = sum(getattr(packer, "learned_numbers", 0) for _, packer in packed) * share(FLOAT_BITS)
    return gone + math.fsum(p.numel() * share(widths.get(id(p), FLOAT_BITS)) for p in net.parameters())


def _bits(module: nn.Module, as_float: bool, seen: set[int]) -> int:
    if as_float and isinstance(module, (Quantizer, PolicyPart)):
        return 0
    if isinstance(module, Quantizer):
        return module.extra_storage_bits()
    packer = module.quantizer("weight") if isinstance(module, Site) and not as_float else None
    total = 0
    for name, tensor in _stored_tensors(module):
        added = name == "shortcut_scale" and isinstance(module, ScaledShortcut)
        if id(tensor) not in seen and not (as_float and added):
            seen.add(id(tensor))
            width = packer.candidates[0] if packer is not None and name == "weight" else FLOAT_BITS
            total += math.ceil(tensor.numel() * width / 8) * 8
    for child in module.children():
        if id(child) not in seen:
            seen.add(id(child))
            total += _bits(child, as_float, seen)
    return total


def _stored_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    buffers = [
        (name, buffer)
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point() and name not in module._non_persistent_buffers_set
    ]
    return [*module.named_parameters(recurse=False), *buffers]
