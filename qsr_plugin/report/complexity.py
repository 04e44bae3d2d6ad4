"""What a network costs: multiply-accumulates, bit operations, average bits of activations, and size when stored.

Everything is counted on a copy without data (PyTorch's meta device), so no image is computed and the network stays as
it is. Multiply-accumulates (MACs) are those of convolutions, linear layers and matrix products, as modules or as
plain expressions; batch norm, activation functions, quantizers and bit policies are not counted. What quantizers spend
on ranges that they take from each image is told apart from it, as overhead.

A layer's input counts as quantized only if the very tensor that arrives is what an activation quantizer returned, not
changed since: a branch that reads the raw tensor beside a quantized identity path is a 32-bit layer. A tensor that was
reshaped or activated in between counts as 32 bits.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qsr_plugin.errors import suggest
from qsr_plugin.quant.depth import depth_blocks
from qsr_plugin.quant.policy import BitPolicy
from qsr_plugin.quant.quantizer import Quantizer
from qsr_plugin.quant.record import RecordingRoot
from qsr_plugin.quant.schema import FLOAT_BITS
from qsr_plugin.quant.sites import MatMul, Site
from qsr_plugin.quant.surgery import plugin_keys, quantizers
from qsr_plugin.report.complexity_types import CONVENTIONS, DEFAULT_SIZE, ComplexityReport, SiteCost
from qsr_plugin.report.fab import mean_bits
from qsr_plugin.report.storage import storage_bits


def complexity(
    net: nn.Module, input_size: tuple[int, int] = DEFAULT_SIZE, *, convention: str = "macs-bits"
) -> ComplexityReport:
    """Count what a float or quantized network costs. The network is neither run, moved nor changed.

    Fixed bit widths need no calibration and no forward. Where a policy chooses bits, they are taken from the record of
    the network's last forward. A network with depth is counted at the depth it is set to; what is stored is all of it.

    Args:
        net: Network that takes (N, 3, H, W).
        input_size: Low-resolution (height, width) in pixels.
        convention: How to count bit operations, a key of :data:`CONVENTIONS`.

    Raises:
        ValueError: For an impossible size or an unknown convention.
        RuntimeError: If a policy chooses bits and there is no record of a forward that did.
    """
    if len(input_size) != 2 or not all(isinstance(side, int) and side > 0 for side in input_size):
        raise ValueError(f"input_size is {input_size}; give the low-resolution (height, width) in pixels, both above 0")
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown BitOPs convention '{convention}'. {suggest(convention, CONVENTIONS)}")
    uses, ran = _measure(net, input_size)
    bits = _place_bits(net, ran)
    counted = {place for place, quantizer in quantizers(net) if quantizer.counts_in_fab and place in ran}
    modules, fed, rows = dict(net.named_modules()), defaultdict(int), []
    for name, use in uses.items():
        for place in {place for operand in use.operands for place in operand if place in counted}:
            fed[place] += use.macs
        rows.append(_site_cost(name, modules[name], use, bits, counted))
    rule, quantized = CONVENTIONS[convention], [row for row in rows if row.quantized]
    recipe, added, blocks = getattr(net, "recipe", None), plugin_keys(net), [block for _, block in depth_blocks(net)]
    return ComplexityReport(
        network=getattr(net, "float_class", type(net)).__name__,
        method="float" if recipe is None else _method(recipe.method, recipe.bits.weight, recipe.bits.act),
        input_size=(input_size[0], input_size[1]),
        convention=convention,
        fab=fmean(bits[place] for place in counted) if counted else float(FLOAT_BITS),
        weighted_fab=_weighted_fab(bits, counted, fed),
        bitops=rule.factor * _bit_operations(rows if rule.float_layers else quantized),
        bitops_quantized=rule.factor * _bit_operations(quantized),
        macs=sum(row.macs for row in rows),
        parameters=sum(p.numel() for key, p in net.named_parameters() if key not in added),
        storage_bits=storage_bits(net),
        float_storage_bits=storage_bits(net, as_float=True),
        sites=tuple(rows),
        overhead=sum(ran.values()),
        blocks=(sum(not block.skipped for block in blocks), len(blocks)) if blocks else None,
    )


# -- bits -------------------------------------------------------------------------------------------------------------


def _place_bits(net: nn.Module, ran: Collection[str]) -> dict[str, float]:
    """Bits at the activation places that ran: the fixed width, or the mean of what the last forward chose."""
    bits: dict[str, float] = {}
    for place, quantizer in quantizers(net):
        if place in ran and len(quantizer.candidates) == 1:
            bits[place] = quantizer.candidates[0]
        elif place in ran:
            chosen = net.last_record().bits
            if place not in chosen:
                raise RuntimeError(f"no record of the bits chosen at {place}: run the network on images first")
            bits[place] = mean_bits(chosen[place])
    return bits


def _method(name: str, weight: int, act: int | tuple[int, ...]) -> str:
    return f"{name} W{weight}A{'/'.join(map(str, act)) if isinstance(act, tuple) else act}"


def _weighted_fab(bits: dict[str, float], counted: set[str], fed: dict[str, int]) -> float:
    total = sum(fed.values())
    if not total:
        return fmean(bits[place] for place in counted) if counted else float(FLOAT_BITS)
    return sum(bits[place] * macs for place, macs in fed.items()) / total


def _bit_operations(rows: list[SiteCost]) -> float:
    return math.fsum(row.macs * row.weight_bits * row.act_bits for row in rows)


# -- one forward without data -----------------------------------------------------------------------------------------


@dataclass
class _Use:
    """What a module did: its own MACs, and per operand the places its tensors came from (``None``: float)."""

    macs: int = 0
    operands: tuple[set[str | None], set[str | None]] = field(default_factory=lambda: (set(), set()))


def _measure(net: nn.Module, input_size: tuple[int, int]) -> tuple[dict[str, _Use], dict[str, int]]:
    """Run a copy without data.

    Returns:
        What multiplies, by name in module order; and the overhead of the activation places that ran.
    """
    probe = _copy_without_data(net)
    uses: dict[nn.Module, _Use] = defaultdict(_Use)
    made: dict[int, tuple[Tensor, int, str]] = {}  # keeps the tensors, so that no id is used twice
    ran: dict[str, int] = {}
    running: list[list[int]] = []  # of every module now running: total at its start, what its children took
    counter = FlopCounterMode(display=False)

    def before(module: nn.Module, args: tuple[object, ...]) -> None:
        for operand, port, x in zip(uses[module].operands, _operand_ports(module), args, strict=False):
            own = module.quantizer(port) if isinstance(module, Site) else None
            tensor, version, place = made.get(id(x), (None, None, None))
            operand.add(own.site if own else place if tensor is not None and x._version == version else None)
        running.append([counter.get_total_flops(), 0])

    def after(module: nn.Module, args: tuple[object, ...], out: object) -> None:
        start, children = running.pop()
        spent = counter.get_total_flops() - start
        uses[module].macs += (spent - children) // 2
        if running:
            running[-1][1] += spent
        if isinstance(module, Quantizer) and module.role == "act":
            made[id(out)] = (out, out._version, module.site)
            ran[module.site] = ran.get(module.site, 0) + module.overhead_ops(out.numel())

    for module in probe.modules():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    dtype = next((p.dtype for p in probe.parameters()), torch.float32)
    with torch.no_grad(), counter:
        probe(torch.zeros(1, 3, *input_size, dtype=dtype, device="meta"))
    inner = {part for m in probe.modules() if isinstance(m, (Quantizer, BitPolicy)) for part in m.modules()}
    return {name: uses[m] for name, m in probe.named_modules() if m not in inner and uses[m].macs}, ran


def _copy_without_data(net: nn.Module) -> nn.Module:
    """A copy on the meta device, in evaluation mode, with its quantizers ready to run."""
    probe = copy.deepcopy(net).to("meta").eval()
    for module in probe.modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
        vars(module).update({key: value.to("meta") for key, value in plain.items()})
        if isinstance(module, Quantizer) and module.needs_calibration:
            module.mark_calibrated()  # what calibration decided is kept; numbers there are none
    return probe


def _operand_ports(module: nn.Module) -> tuple[str, ...]:
    """Ports of the operands that are activations; none for modules that are no layer themselves."""
    if isinstance(module, MatMul):
        return ("left", "right")
    return ("input",) if isinstance(getattr(module, "weight", None), Tensor) else ()


def _site_cost(name: str, module: nn.Module, use: _Use, bits: dict[str, float], counted: set[str]) -> SiteCost:
    def widest(places: set[str | None]) -> float:
        return max((FLOAT_BITS if place is None else bits[place] for place in places), default=FLOAT_BITS)

    layer = bool(_operand_ports(module))
    weight = module.quantizer("weight") if isinstance(module, Site) else None
    weight_bits = widest(use.operands[1]) if weight is None else weight.candidates[0]
    act_bits = widest(use.operands[0])
    return SiteCost(
        name=name or "(network)",
        kind=_float_class(module).__name__ if layer else "expression",
        macs=use.macs,
        weight_bits=weight_bits,
        act_bits=act_bits,
        parameters=sum(p.numel() for p in module.parameters(recurse=False)) if layer else 0,
        storage_bits=storage_bits(module) if layer else 0,
        quantized=min(weight_bits, act_bits) < FLOAT_BITS,
        in_fab=any(place in counted for operand in use.operands for place in operand),
    )


def _float_class(module: nn.Module) -> type:
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, (Site, RecordingRoot)))
