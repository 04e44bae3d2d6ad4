"""What a network costs: multiply-accumulates, bit operations, average bits of activations, and size when stored.

Everything is counted on a copy without data (PyTorch's meta device), so no image is computed and the network stays as
it is. Multiply-accumulates (MACs) are those of convolutions, linear layers and matrix products, as modules or as
plain expressions; batch norm, activation functions, quantizers and bit policies are not counted.

A layer's input counts as quantized only if the very tensor that arrives is what an activation quantizer returned, not
changed since: a branch that reads the raw tensor beside a quantized identity path is a 32-bit layer. A tensor that was
reshaped or activated in between counts as 32 bits.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qsr_plugin.errors import suggest
from qsr_plugin.quant.policy import BitPolicy
from qsr_plugin.quant.quantizer import Quantizer
from qsr_plugin.quant.record import RecordingRoot
from qsr_plugin.quant.schema import FLOAT_BITS
from qsr_plugin.quant.sites import MatMul, Site
from qsr_plugin.quant.surgery import plugin_keys, quantizers
from qsr_plugin.report.fab import mean_bits
from qsr_plugin.report.storage import storage_bits

#: LR size (height, width) of 1280x720 at scale 4, the size the papers count at.
DEFAULT_SIZE = (180, 320)


@dataclass(frozen=True)
class Convention:
    """One way of counting bit operations.

    Attributes:
        text: What is summed, for the reader of a report.
        factor: Times MACs x weight bits x activation bits.
        float_layers: Whether layers without quantization take part, as 32 x 32.
    """

    text: str
    factor: float
    float_layers: bool


#: Ways to count BitOPs. Figures of two conventions must not be compared; for one set of layers they differ by 512.
CONVENTIONS = {
    "macs-bits": Convention("MACs x weight bits x activation bits, all layers, float ones as 32 x 32", 1.0, True),
    # Hong et al., ECCV 2022: scaled so that a 32-bit network has as many BitOPs as FLOPs.
    "cadyq": Convention("2 x MACs x weight bits / 32 x activation bits / 32, quantized layers only", 2 / 1024, False),
}


@dataclass(frozen=True)
class SiteCost:
    """One layer, or the plain matrix products and convolutions in one module's own forward.

    Attributes:
        name: Dotted module name; ``(network)`` for expressions in the network's own forward.
        kind: Class of the float module; ``expression`` for plain expressions.
        macs: Multiply-accumulates for one image.
        weight_bits: Bits of the weight; of the right operand in a matrix product.
        act_bits: Bits of the input; a mean over images where a policy chooses.
        parameters: Numbers in weight and bias.
        storage_bits: Weight (packed), bias, and what its own quantizers store.
        quantized: Whether weight or input has fewer than 32 bits.
        in_fab: Whether the place that quantizes its input counts in FAB.
    """

    name: str
    kind: str
    macs: int
    weight_bits: float
    act_bits: float
    parameters: int
    storage_bits: int
    quantized: bool
    in_fab: bool


@dataclass(frozen=True)
class ComplexityReport:
    """Costs of one network for one image of one size.

    Attributes:
        network: Class of the float network.
        method: Recipe and bits, or ``float``.
        input_size: Low-resolution (height, width) the MACs and BitOPs are for.
        convention: Key of :data:`CONVENTIONS` that ``bitops`` follows.
        fab: Mean bits over the counted activation places; 32 for a float network.
        weighted_fab: The same, each place weighted by the MACs of the layers it feeds; ``fab`` if they feed none.
        bitops: Bit operations by the convention.
        bitops_quantized: Those of the quantized layers alone.
        macs: Multiply-accumulates of all layers.
        parameters: Numbers a float model learns, quantizers left out.
        storage_bits: Size of a stored model: weights packed to whole bytes per tensor, the rest in 32 bits. Counters,
            calibration flags and integer tables are left out.
        float_storage_bits: The same for the float network.
        sites: One row per layer, in module order.
    """

    network: str
    method: str
    input_size: tuple[int, int]
    convention: str
    fab: float
    weighted_fab: float
    bitops: float
    bitops_quantized: float
    macs: int
    parameters: int
    storage_bits: int
    float_storage_bits: int
    sites: tuple[SiteCost, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON; the convention is spelt out as ``convention_text``."""
        return {**asdict(self), "convention_text": CONVENTIONS[self.convention].text}


def complexity(
    net: nn.Module, input_size: tuple[int, int] = DEFAULT_SIZE, *, convention: str = "macs-bits"
) -> ComplexityReport:
    """Count what a float or quantized network costs. The network is neither run, moved nor changed.

    Fixed bit widths need no calibration and no forward. Where a policy chooses bits, they are taken from the record of
    the network's last forward.

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
    bits = _place_bits(net)
    counted = {place for place, quantizer in quantizers(net) if quantizer.counts_in_fab}
    modules, fed = dict(net.named_modules()), defaultdict(int)
    rows = []
    for name, use in _measure(net, input_size).items():
        for place in {place for operand in use.operands for place in operand if place in counted}:
            fed[place] += use.macs
        rows.append(_site_cost(name, modules[name], use, bits, counted))
    rule, quantized = CONVENTIONS[convention], [row for row in rows if row.quantized]
    recipe, added = getattr(net, "recipe", None), plugin_keys(net)
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
    )


# -- bits -------------------------------------------------------------------------------------------------------------


def _place_bits(net: nn.Module) -> dict[str, float]:
    """Bits at every activation place: the fixed width, or the mean of what the last forward chose."""
    bits: dict[str, float] = {}
    for place, quantizer in quantizers(net):
        if quantizer.role == "act" and len(quantizer.candidates) == 1:
            bits[place] = quantizer.candidates[0]
        elif quantizer.role == "act":
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


def _measure(net: nn.Module, input_size: tuple[int, int]) -> dict[str, _Use]:
    """Run a copy without data; returns the modules that multiply by themselves, by name, in module order."""
    probe = _copy_without_data(net)
    uses: dict[nn.Module, _Use] = defaultdict(_Use)
    made: dict[int, tuple[Tensor, int, str]] = {}  # keeps the tensors, so that no id is used twice
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

    for module in probe.modules():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    dtype = next((p.dtype for p in probe.parameters()), torch.float32)
    with torch.no_grad(), counter:
        probe(torch.zeros(1, 3, *input_size, dtype=dtype, device="meta"))
    inner = {part for m in probe.modules() if isinstance(m, (Quantizer, BitPolicy)) for part in m.modules()}
    return {name: uses[m] for name, m in probe.named_modules() if m not in inner and uses[m].macs}


def _copy_without_data(net: nn.Module) -> nn.Module:
    """A copy on the meta device, in evaluation mode, with its quantizers ready to run."""
    probe = copy.deepcopy(net).to("meta").eval()
    for module in probe.modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
        vars(module).update({key: value.to("meta") for key, value in plain.items()})
        if isinstance(module, Quantizer) and module.needs_calibration:
            with torch.no_grad():
                module.set_range(torch.tensor(-1.0, device="meta"), torch.tensor(1.0, device="meta"))
            module.mark_calibrated()
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
