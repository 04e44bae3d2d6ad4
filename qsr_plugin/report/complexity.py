"""What a network costs: multiply-accumulates, bit operations, average bits of activations, and size when stored.

Everything is counted on a copy without data (PyTorch's meta device), so no image is computed and the network stays as
it is. Multiply-accumulates (MACs) are those of convolutions, linear layers and matrix products, as modules or as
plain expressions; batch norm, activation functions, quantizers and bit policies are not counted. What quantizers spend
on ranges that they take from each image, and bit policies on choosing, is told apart from it.

A layer's input counts as quantized only if the very tensor that arrives is what an activation quantizer returned, not
changed since: a branch that reads the raw tensor beside a quantized identity path is a 32-bit layer. A tensor that was
reshaped or activated in between counts as 32 bits.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qsr_plugin.data.patches import PatchOptions, patches_of
from qsr_plugin.errors import suggest
from qsr_plugin.quant.depth import depth_blocks
from qsr_plugin.quant.policy import BitDecision, BitPolicy, PolicyPart, policy_class
from qsr_plugin.quant.quantizer import Quantizer
from qsr_plugin.quant.record import ForwardRecord, RecordingRoot
from qsr_plugin.quant.schema import FLOAT_BITS, Recipe
from qsr_plugin.quant.sites import MatMul, Site
from qsr_plugin.quant.surgery import plugin_keys, quantizers
from qsr_plugin.report.complexity_types import CONVENTIONS, DEFAULT_SIZE, ComplexityReport, SiteCost
from qsr_plugin.report.fab import mean_bits
from qsr_plugin.report.storage import storage_bits


def complexity(
    net: nn.Module,
    input_size: tuple[int, int] = DEFAULT_SIZE,
    *,
    convention: str = "macs-bits",
    bits: Mapping[str, float] | None = None,
    patches: PatchOptions | Mapping[str, Any] | None = None,
) -> ComplexityReport:
    """Count what a float or quantized network costs. The network is neither run, moved nor changed.

    Fixed bit widths need no calibration and no forward. Where a policy chooses bits, they are those given, or else
    taken from the record of the network's last forward; without either, what depends on them is ``None``. A network
    with depth is counted at the depth it is set to; what is stored is all of it.

    Args:
        net: Network that takes (N, 3, H, W).
        input_size: Low-resolution (height, width) in pixels.
        convention: How to count bit operations, a key of :data:`CONVENTIONS`.
        bits: Mean bits at each place ``site.port`` where a policy chooses, e.g. ``EvaluationResult.place_bits``.
        patches: How the image is cut (:class:`qsr_plugin.data.patches.PatchOptions` or the same as plain data): the
            costs are those of all its patches. Whole if not given.

    Raises:
        ValueError: For an impossible size, impossible patches, an unknown convention, or bits that lack a place.
    """
    if len(input_size) != 2 or not all(isinstance(side, int) and side > 0 for side in input_size):
        raise ValueError(f"input_size is {input_size}; give the low-resolution (height, width) in pixels, both above 0")
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown BitOPs convention '{convention}'. {suggest(convention, CONVENTIONS)}")
    patches = PatchOptions.read(patches, "patches")
    probe = _Probe(net)
    for shape, times in Counter([input_size] if patches is None else _shapes(input_size, patches)).items():
        probe.run(shape, times)
    uses, ran = probe.uses(), probe.overhead
    place_bits = _place_bits(net, ran, bits)
    counted = {place for place, quantizer in quantizers(net) if quantizer.counts_in_fab and place in ran}
    modules, fed, rows = dict(net.named_modules()), defaultdict(int), []
    for name, use in uses.items():
        for place in {place for operand in use.operands for place in operand if place in counted}:
            fed[place] += use.macs
        rows.append(_site_cost(name, modules[name], use, place_bits, counted))
    rule, quantized = CONVENTIONS[convention], [row for row in rows if row.quantized]
    recipe, added, blocks = getattr(net, "recipe", None), plugin_keys(net), [block for _, block in depth_blocks(net)]
    return ComplexityReport(
        network=getattr(net, "float_class", type(net)).__name__,
        method="float" if recipe is None else method_label(recipe),
        input_size=(input_size[0], input_size[1]),
        convention=convention,
        fab=_weighted_mean(place_bits, dict.fromkeys(counted, 1)),
        weighted_fab=_weighted_mean(place_bits, fed if sum(fed.values()) else dict.fromkeys(counted, 1)),
        bitops=_bit_operations(rows if rule.float_layers else quantized, rule.factor),
        bitops_quantized=_bit_operations(quantized, rule.factor),
        macs=sum(row.macs for row in rows),
        parameters=sum(p.numel() for key, p in net.named_parameters() if key not in added),
        storage_bits=storage_bits(net),
        float_storage_bits=storage_bits(net, as_float=True),
        sites=tuple(rows),
        overhead=sum(ran.values()),
        policy_ops=probe.policy_ops,
        patches=patches,
        blocks=(sum(not block.skipped for block in blocks), len(blocks)) if blocks else None,
    )


# -- bits -------------------------------------------------------------------------------------------------------------


def _place_bits(net: nn.Module, ran: Collection[str], given: Mapping[str, float] | None) -> dict[str, float | None]:
    """Bits at the activation places that ran: the fixed width, or the mean of what was chosen as far as it is known."""
    record = getattr(net, "_last_record", None)
    known = given if given is not None else {} if record is None else record.bits
    bits: dict[str, float | None] = {}
    for place, quantizer in quantizers(net):
        if place in ran and len(quantizer.candidates) == 1:
            bits[place] = quantizer.candidates[0]
        elif place in ran:
            bits[place] = mean_bits(known[place]) if place in known else None
            if given is not None and place not in given:
                raise ValueError(f"bits say nothing of {place}, where a policy chooses: give its mean bits as well")
    return bits


def _shapes(input_size: tuple[int, int], patches: PatchOptions) -> Iterable[tuple[int, int]]:
    return (patch.shape for patch in patches_of(*input_size, patches))


def method_label(recipe: Recipe) -> str:
    """Method and bits, as ``cadyq W8A4/6/8``.

    ``W4A4MP`` where a policy goes around one width (mixed precision), ``W4A4+`` where some layers got more bits.
    """
    act, reach = recipe.bits.act, policy_class(recipe.policy.type).reach
    widths = "/".join(map(str, act)) if isinstance(act, tuple) else f"{act}{'MP' if reach else ''}"
    return f"{recipe.method} W{recipe.bits.weight}A{widths}{'+' * any(rule.in_fab for rule in recipe.rules)}"


def _weighted_mean(bits: Mapping[str, float | None], weights: Mapping[str, int]) -> float | None:
    """Mean over the places that have a weight; 32 if none has, ``None`` if bits are not known."""
    widths = [bits[place] for place in weights]
    if None in widths:
        return None
    return fmean(widths, weights.values()) if widths else float(FLOAT_BITS)


def _bit_operations(rows: list[SiteCost], factor: float) -> float | None:
    if any(None in (row.weight_bits, row.act_bits) for row in rows):
        return None
    return factor * math.fsum(row.macs * row.weight_bits * row.act_bits for row in rows)


# -- one forward without data -----------------------------------------------------------------------------------------


@dataclass
class _Use:
    """What a module did: its own MACs, and per operand the places its tensors came from (``None``: float)."""

    macs: int = 0
    operands: tuple[set[str | None], set[str | None]] = field(default_factory=lambda: (set(), set()))


class _NoChoice(PolicyPart):
    """Stands in for a policy: runs nothing that would be counted, and notes what it was asked for."""

    seen: ForwardRecord | None = None

    def __init__(self, policy: BitPolicy) -> None:
        super().__init__()
        self.policy, self.shapes = policy, []

    def decide(self, features: Tensor, record: ForwardRecord | None) -> BitDecision:
        self.shapes.append(features.shape)
        return BitDecision(max(self.policy.candidates))


class _Probe:
    """A copy of a network that runs without data and counts.

    Attributes:
        overhead: Activation place that ran to the float operations its quantizer spends on ranges.
        policy_ops: Float operations of the bit policies.
    """

    def __init__(self, net: nn.Module) -> None:
        self._probe = _copy_without_data(net)
        self._uses: dict[nn.Module, _Use] = defaultdict(_Use)
        self._made: dict[int, tuple[Tensor, int, str]] = {}  # keeps the tensors, so that no id is used twice
        self._running: list[list[int]] = []  # of every module now running: total at its start, what its children took
        self._counter = FlopCounterMode(display=False)
        self._times = 1
        self.overhead: dict[str, int] = {}
        self.policy_ops = 0
        for module in self._probe.modules():
            module.register_forward_pre_hook(self._before)
            module.register_forward_hook(self._after)

    def run(self, size: tuple[int, int], times: int) -> None:
        """Count one image of (height, width), as if there were so many."""
        self._times = times
        dtype = next((p.dtype for p in self._probe.parameters()), torch.float32)
        with torch.no_grad(), self._counter:
            self._probe(torch.zeros(1, 3, *size, dtype=dtype, device="meta"))
        asked = [part for part in self._probe.modules() if isinstance(part, _NoChoice) and part.shapes]
        self.policy_ops += times * sum(part.policy.overhead_ops(shape) for part in asked for shape in part.shapes)
        adaptive = [part.policy for part in asked if len(part.policy.candidates) > 1]
        self.policy_ops += times * adaptive[0].shared_ops(self._probe.last_record()) if adaptive else 0
        for part in asked:
            part.shapes.clear()

    def uses(self) -> dict[str, _Use]:
        """What multiplies, by name in module order."""
        probe, uses = self._probe, self._uses
        inner = {part for m in probe.modules() if isinstance(m, (Quantizer, PolicyPart)) for part in m.modules()}
        return {name: uses[m] for name, m in probe.named_modules() if m not in inner and uses[m].macs}

    def _before(self, module: nn.Module, args: tuple[object, ...]) -> None:
        for operand, port, x in zip(self._uses[module].operands, _operand_ports(module), args, strict=False):
            own = module.quantizer(port) if isinstance(module, Site) else None
            tensor, version, place = self._made.get(id(x), (None, None, None))
            operand.add(own.site if own else place if tensor is not None and x._version == version else None)
        self._running.append([self._counter.get_total_flops(), 0])

    def _after(self, module: nn.Module, args: tuple[object, ...], out: object) -> None:
        start, children = self._running.pop()
        spent = self._counter.get_total_flops() - start
        self._uses[module].macs += self._times * (spent - children) // 2
        if self._running:
            self._running[-1][1] += spent
        if isinstance(module, Quantizer) and module.role == "act":
            self._made[id(out)] = (out, out._version, module.site)
            more = self._times * module.overhead_ops(out.numel())
            self.overhead[module.site] = self.overhead.get(module.site, 0) + more


def _copy_without_data(net: nn.Module) -> nn.Module:
    """A copy on the meta device, in evaluation mode, with its quantizers ready to run and nothing to choose bits."""
    probe = copy.deepcopy(net).to("meta").eval()
    for module in probe.modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
        vars(module).update({key: value.to("meta") for key, value in plain.items()})
        if isinstance(module, Quantizer) and module.needs_calibration:
            module.mark_calibrated()  # what calibration decided is kept; numbers there are none
    for name, policy in [(name, m) for name, m in probe.named_modules() if isinstance(m, BitPolicy)]:
        parent, _, own = name.rpartition(".")
        setattr(probe.get_submodule(parent), own, _NoChoice(policy))
    return probe


def _operand_ports(module: nn.Module) -> tuple[str, ...]:
    """Ports of the operands that are activations; none for modules that are no layer themselves."""
    if isinstance(module, MatMul):
        return ("left", "right")
    return ("input",) if isinstance(getattr(module, "weight", None), Tensor) else ()


def _site_cost(
    name: str, module: nn.Module, use: _Use, bits: Mapping[str, float | None], counted: set[str]
) -> SiteCost:
    def widest(places: set[str | None]) -> float | None:
        widths = [FLOAT_BITS if place is None else bits[place] for place in places]
        return None if None in widths else max(widths, default=FLOAT_BITS)

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
        quantized=any(width is None or width < FLOAT_BITS for width in (weight_bits, act_bits)),
        in_fab=any(place in counted for operand in use.operands for place in operand),
    )


def _float_class(module: nn.Module) -> type:
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, (Site, RecordingRoot)))
