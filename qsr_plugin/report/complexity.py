"""What a network costs: multiply-accumulates, bit operations, average bits of activations, and size when stored.

Everything is counted on a copy without data (PyTorch's meta device), so no image is computed and the network stays as
it is. Multiply-accumulates (MACs) are those of convolutions, linear layers and matrix products, as modules or as
plain expressions; batch norm, activation functions, quantizers and bit policies are not counted. What quantizers spend
on ranges that they take from each image, and bit policies on choosing, is told apart from it.

A layer's input counts as quantized only if the very tensor that arrives is what an activation quantizer returned, or a
view of it, not changed since: a branch that reads the raw tensor beside a quantized identity path is a 32-bit layer. A
tensor that was copied or activated in between counts as 32 bits.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from statistics import fmean
from typing import Any

from torch import nn

from qsr_plugin.data.patches import PatchOptions, patches_of
from qsr_plugin.errors import suggest
from qsr_plugin.quant.depth import depth_blocks
from qsr_plugin.quant.policy import policy_class
from qsr_plugin.quant.record import RecordingRoot
from qsr_plugin.quant.schema import FLOAT_BITS, Recipe
from qsr_plugin.quant.sites import Site
from qsr_plugin.quant.surgery import plugin_keys, quantizers
from qsr_plugin.report.complexity_probe import Probe, Use, operand_ports
from qsr_plugin.report.complexity_types import CONVENTIONS, ComplexityReport, Convention, SiteCost
from qsr_plugin.report.fab import mean_bits
from qsr_plugin.report.storage import learned_numbers, storage_bits


def complexity(
    net: nn.Module,
    input_size: tuple[int, int] | None = None,
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
        input_size: Low-resolution (height, width) in pixels; by default the one of the convention, mostly 180 x 320.
        convention: How to count operations and parameters, a key of :data:`CONVENTIONS`.
        bits: Mean bits at each place ``site.port`` where a policy chooses, e.g. ``EvaluationResult.place_bits``.
        patches: How the image is cut (:class:`qsr_plugin.data.patches.PatchOptions` or the same as plain data): the
            costs are those of all its patches. Whole if not given.

    Raises:
        ValueError: For an impossible size, impossible patches, an unknown convention, or bits that lack a place.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown BitOPs convention '{convention}'. {suggest(convention, CONVENTIONS)}")
    rule = CONVENTIONS[convention]
    input_size = rule.input_size if input_size is None else input_size
    if len(input_size) != 2 or not all(isinstance(side, int) and side > 0 for side in input_size):
        raise ValueError(f"input_size is {input_size}; give the low-resolution (height, width) in pixels, both above 0")
    patches = PatchOptions.read(patches, "patches")
    probe = Probe(net)
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
    quantized = [row for row in rows if row.quantized]
    recipe, added, blocks = getattr(net, "recipe", None), plugin_keys(net), [block for _, block in depth_blocks(net)]
    return ComplexityReport(
        network=getattr(net, "float_class", type(net)).__name__,
        method="float" if recipe is None else method_label(recipe),
        input_size=(input_size[0], input_size[1]),
        convention=convention,
        fab=_weighted_mean(place_bits, dict.fromkeys(counted, 1)),
        weighted_fab=_weighted_mean(place_bits, fed if sum(fed.values()) else dict.fromkeys(counted, 1)),
        bitops=_operations(rows, rule),
        bitops_quantized=_operations(quantized, rule),
        macs=sum(row.macs for row in rows),
        parameters=sum(p.numel() for key, p in net.named_parameters() if key not in added),
        storage_bits=storage_bits(net),
        float_storage_bits=storage_bits(net, as_float=True),
        scaled_parameters=_scaled_parameters(net, rows, rule),
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
    raised = recipe.fragile.bits if recipe.fragile is not None else ()
    more = any(rule.in_fab or (rule.match is not None and rule.bits in raised) for rule in recipe.rules)
    return f"{recipe.method} W{recipe.bits.weight}A{widths}{'+' * more}"


def _weighted_mean(bits: Mapping[str, float | None], weights: Mapping[str, int]) -> float | None:
    """Mean over the places that have a weight; 32 if none has, ``None`` if bits are not known."""
    widths = [bits[place] for place in weights]
    if None in widths:
        return None
    return fmean(widths, weights.values()) if widths else float(FLOAT_BITS)


# -- layers -----------------------------------------------------------------------------------------------------------


def _operations(rows: list[SiteCost], rule: Convention) -> float | None:
    spent = [rule.operations(row) for row in rows]
    return None if None in spent else math.fsum(spent)


def _scaled_parameters(net: nn.Module, rows: list[SiteCost], rule: Convention) -> float:
    if rule.params == "stored":
        return storage_bits(net) / FLOAT_BITS
    if rule.params == "weights":
        return math.fsum(rule.numbers(row) for row in rows)
    return learned_numbers(net, rule.share if rule.params == "learned" else lambda bits: 1.0)


def _site_cost(name: str, module: nn.Module, use: Use, bits: Mapping[str, float | None], counted: set[str]) -> SiteCost:
    def widest(places: set[str | None]) -> float | None:
        widths = [FLOAT_BITS if place is None else bits[place] for place in places]
        return None if None in widths else max(widths, default=FLOAT_BITS)

    layer = bool(operand_ports(module))
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
        weights=module.weight.numel() if "input" in operand_ports(module) else 0,
        conv_biases=use.conv_biases,
        norm_values=use.norm_values,
    )


def _float_class(module: nn.Module) -> type:
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, (Site, RecordingRoot)))
