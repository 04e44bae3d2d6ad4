"""More bits for the layers that hurt most: which ones, within a budget of bit operations.

After a calibration each layer of the body is quantized alone (:mod:`qsr_plugin.report.sensitivity`), at the recipe's
bits and again at those of ``recipe.fragile``. What the damage falls by, for each bit operation that it costs, decides
the order; layers are taken as long as the budget lasts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

from torch import Tensor, nn

from qsr_plugin.progress import Progress, no_progress
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.places import Place, find_places
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.schema import Recipe, Rule
from qsr_plugin.quant.surgery import quantize_model
from qsr_plugin.report.complexity import complexity
from qsr_plugin.report.complexity_types import SiteCost
from qsr_plugin.report.sensitivity import output_errors

logger = logging.getLogger("qsr_plugin")

#: Damage is measured on the middle of so many images, of this side in LR pixels: the ranking needs no more.
PROBES, PROBE = 16, 48
#: Of many layers, on fewer images (at least two), so that no more than about so many of them pass.
PASSES = 512
#: A layer is worth more bits if it removes at least this share of what all of them together do alone.
SHARE = 0.01
#: Ports of the two operands of a layer: the activation, and the weight or the right matrix.
_OPERANDS = (("input", "left"), ("weight", "right"))


@dataclass(frozen=True)
class _Layer:
    """A layer of the body.

    Attributes:
        cost: Its row of the complexity report.
        places: Its own places at the operands, by port.
    """

    cost: SiteCost
    places: dict[str, Place]

    def bitops(self, widths: dict[str, int]) -> float:
        """Bit operations with some ports at other widths."""
        found = (self.cost.act_bits, self.cost.weight_bits)
        act, weight = (
            next((widths[port] for port in ports if port in widths), bits) for ports, bits in zip(_OPERANDS, found)
        )
        return self.cost.macs * act * weight

    def below(self, bits: int) -> dict[str, Place]:
        """Places with fewer bits."""
        return {port: place for port, place in self.places.items() if place.bits < bits}


def with_fragile_places(
    net: nn.Module, float_net: nn.Module, crops: Sequence[Tensor], *, progress: Progress = no_progress
) -> Recipe:
    """The recipe of a calibrated network with more bits for the layers where they remove most damage for their cost.

    Input and weight of a layer are raised together, to a width of ``recipe.fragile.bits``. The layers raised cost at
    most the share ``recipe.fragile.budget`` of what all layers of the body cost at the recipe's own bits, in MACs x
    weight bits x activation bits; layers with bits of their own are no part of it. Layers that the recipe raises
    already count as spent, so a recipe that comes from here comes back as it is unless there is room left.

    Args:
        net: Quantized with a recipe that has ``fragile``, calibrated; not changed.
        float_net: The float network it was made from; not changed.
        crops: ``(N, 3, H, W)`` tensors, RGB in [0, 1]: the images it was calibrated on.
        progress: Shows how far the measurement is.

    Returns:
        The recipe with a rule for each place raised, at the end of its placement; the same recipe if no place has fewer
        bits than that, no layer fits, or none of those that fit matters.

    Raises:
        RecipeError: If the recipe has no ``fragile``, or a quantizer cannot do that many bits.
        ValueError: See :func:`qsr_plugin.report.sensitivity.sensitivity`.
    """
    recipe = net.recipe
    if recipe.fragile is None:
        raise RecipeError(f"method '{recipe.method}' has no 'fragile': add fragile: {{bits: 8, budget: 0.05}}")
    bits, body = _raised_to(recipe), _body(net, float_net)
    base = sum(layer.bitops({port: _own_bits(recipe, port) for port in layer.places}) for layer in body)
    left = (1 + recipe.fragile.budget) * base - sum(layer.bitops({}) for layer in body)
    prices = {
        layer.cost.name: layer.bitops(dict.fromkeys(layer.below(bits), bits)) - layer.bitops({}) for layer in body
    }
    low = [layer for layer in body if layer.below(bits)]
    able = [layer for layer in low if prices[layer.cost.name] <= left]
    if not able:
        if low and len(low) == len(body):  # none was raised before
            cheapest = min(prices[layer.cost.name] for layer in low) / base
            logger.info(
                "no layer gets %d bits: the cheapest would add %.1f %% to the BitOPs of the body, and recipe.fragile "
                "allows %.1f %%",
                bits, 100 * cheapest, 100 * left / base,
            )  # fmt: skip
        return recipe
    groups = {layer.cost.name: frozenset(f"{layer.cost.name}.{port}" for port in layer.places) for layer in able}
    probes = _probes(crops, len(groups))
    before, _ = output_errors(net, probes, groups.values(), progress=progress)
    raised = quantize_model(deepcopy(float_net), _with_rules(recipe, able))
    calibrate(raised, crops)
    after, _ = output_errors(raised, probes, groups.values(), progress=progress)
    removed = {name: before[group] - after[group] for name, group in groups.items()}
    least, chosen = SHARE * sum(before.values()), []
    for layer in sorted(able, key=lambda layer: -removed[layer.cost.name] / prices[layer.cost.name]):
        price = prices[layer.cost.name]
        if price <= left and removed[layer.cost.name] > least:
            chosen.append(layer)
            left -= price
    return _with_rules(recipe, chosen) if chosen else recipe


def _body(net: nn.Module, float_net: nn.Module) -> list[_Layer]:
    """Layers with places of their own at an operand, none of which has bits that keep it out of FAB."""
    operands = {port for ports in _OPERANDS for port in ports}
    places: dict[str, dict[str, Place]] = {}
    for place in find_places(float_net, net.recipe):  # a quantized network has other modules and classes
        if place.port in operands:
            places.setdefault(place.name, {})[place.port] = place
    return [
        _Layer(cost, places[cost.name])
        for cost in complexity(net).sites
        if cost.name in places and not any(place.own_bits for place in places[cost.name].values())
    ]


def _probes(crops: Sequence[Tensor], layers: int) -> list[Tensor]:
    """The middle of images that are spread evenly over the crops; of many layers, of fewer images."""
    images = [image for batch in crops for image in batch.split(1)]
    count = min(PROBES, max(2, PASSES // layers))
    chosen = images[:: max(1, len(images) // count)][:count]
    return [_middle(_middle(image, -1), -2) for image in chosen]


def _middle(image: Tensor, axis: int) -> Tensor:
    length = min(PROBE, image.shape[axis])
    return image.narrow(axis, (image.shape[axis] - length) // 2, length)


def _own_bits(recipe: Recipe, port: str) -> int:
    return recipe.bits.weight if port == "weight" else recipe.bits.act


def _raised_to(recipe: Recipe) -> int:
    return recipe.fragile.above(min(recipe.bits.weight, recipe.bits.act))


def _with_rules(recipe: Recipe, layers: Sequence[_Layer]) -> Recipe:
    """The recipe with these layers at the bits of its ``fragile``, by rules in this order."""
    bits = _raised_to(recipe)
    rules = [_raised(recipe, place, bits) for layer in layers for place in layer.below(bits).values()]
    placements = {**recipe.placements, recipe.placement: (*recipe.rules, *rules)}
    return recipe.model_copy(update={"placements": placements})


def _raised(recipe: Recipe, place: Place, bits: int) -> Rule:
    """A rule for one place with what the rule it replaces says beside the bits."""
    old = recipe.rules[place.rule]
    kept = {"quantizer": old.quantizer, "pad_first": old.pad_first}
    return Rule(match=place.name, port=place.port, bits=bits, in_fab=True, **kept)
