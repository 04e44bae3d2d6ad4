"""More bits for the places that hurt most: which ones, within a budget of bit operations.

After a calibration each input and each weight of the body's layers is quantized alone
(:mod:`qsr_plugin.report.sensitivity`), at the recipe's bits and again at those of ``recipe.fragile``. What the damage
falls by, for each bit operation that it costs, decides the order; places are taken as long as the budget lasts. The
outer layers, those with bits of their own, have a budget of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from torch import Tensor, nn

from qsr_plugin.progress import Progress, no_progress
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.places import Place, find_places
from qsr_plugin.quant.quantizer import Quantizer
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.schema import Recipe, Rule
from qsr_plugin.quant.surgery import quantize_model, quantizers
from qsr_plugin.report.complexity import complexity
from qsr_plugin.report.complexity_types import SiteCost
from qsr_plugin.report.sensitivity import output_errors

logger = logging.getLogger("qsr_plugin")

#: Damage is measured on the middle of so many images, of this side in LR pixels: the ranking needs no more.
PROBES, PROBE = 16, 48
#: Of many places, on fewer images (at least two), so that no more than about so many of them pass.
PASSES = 512
#: A place is worth more bits if it removes at least this share of what all of them do alone, where none counts as more
#: than 25 dB: one that makes features explode says nothing of the others.
SHARE, MOST = 0.01, 3e-3
#: Ports of the two operands of a layer: the activation, and the weight or the right matrix.
_OPERANDS = (("input", "left"), ("weight", "right"))


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer with places of its own.

    Attributes:
        cost: Its row of the complexity report.
        places: Its own places at the operands, by port.
    """

    cost: SiteCost
    places: dict[str, Place]

    @property
    def outer(self) -> bool:
        """Whether it has bits of its own, which keep it out of FAB."""
        return any(place.own_bits for place in self.places.values())

    def bitops(self, widths: dict[str, int]) -> float:
        """Bit operations with some ports at other widths."""
        found = (self.cost.act_bits, self.cost.weight_bits)
        act, weight = (
            next((widths[port] for port in ports if port in widths), bits) for ports, bits in zip(_OPERANDS, found)
        )
        return self.cost.macs * act * weight


def with_fragile_places(
    net: nn.Module, float_net: nn.Module, crops: Sequence[Tensor], *, progress: Progress = no_progress
) -> nn.Module:
    """A calibrated network with more bits for the places where they remove most damage for their cost.

    Inputs and weights are raised each for itself, to a width of ``recipe.fragile.bits``. Those of the body cost at most
    the share ``recipe.fragile.budget`` of what all layers of the body cost at the recipe's own bits, in MACs x weight
    bits x activation bits, so that the second operand of a layer costs more than the first. The outer layers, those
    with bits of their own, are no part of it: they are chosen apart, and cost at most the share
    ``recipe.fragile.outer_budget`` of what all layers cost, each at its own bits. Places that the recipe raises already
    count as spent, so a recipe that comes from here comes back as it is unless there is room left.

    Args:
        net: Quantized with a recipe that has ``fragile``, calibrated; not changed.
        float_net: The float network it was made from; not changed.
        crops: ``(N, 3, H, W)`` tensors, RGB in [0, 1]: the images it was calibrated on.
        progress: Shows how far the measurement is.

    Returns:
        A calibrated network in evaluation mode, whose recipe has a rule for each place raised at the end of its
        placement; ``net`` itself if no place has fewer bits than that, none fits, or none of those that fit matters.

    Raises:
        RecipeError: If the recipe has no ``fragile``, or a quantizer cannot do that many bits.
        ValueError: See :func:`qsr_plugin.report.sensitivity.sensitivity`.
    """
    recipe = net.recipe
    if recipe.fragile is None:
        raise RecipeError(f"method '{recipe.method}' has no 'fragile': add fragile: {{bits: 8, budget: 0.05}}")
    layers = _layers(net, float_net)
    body = [layer for layer in layers if not layer.outer]
    outer = [layer for layer in layers if layer.outer]
    search = _Search(net, float_net, crops, progress)
    chosen = search.choose(body, "the body", recipe.fragile.budget, _base(recipe, body))
    if share := recipe.fragile.outer_budget:
        chosen += search.choose(outer, "the outer layers", share, _base(recipe, layers))
    return search.made_with(chosen) if chosen else net


def _depends_on_others(net: nn.Module) -> bool:
    """Whether the range of a place depends on the bits of others, so that all of them are calibrated together."""
    alone = Quantizer.settle.__func__
    settled = any(type(quantizer).settle.__func__ is not alone for _, quantizer in quantizers(net))
    return settled or net.recipe.calibration.fit > 0


def _base(recipe: Recipe, layers: Sequence[_Layer]) -> float:
    """Bit operations of layers with the bits they have before any place is raised."""
    return sum(
        layer.bitops({port: _bits_before(recipe, place) for port, place in layer.places.items()}) for layer in layers
    )


@dataclass(frozen=True, eq=False)
class _Search:
    """What places are measured with: see :func:`with_fragile_places`."""

    net: nn.Module
    float_net: nn.Module
    crops: Sequence[Tensor]
    progress: Progress
    #: Calibrated with more bits, by place.
    raised: dict[str, Quantizer] = field(default_factory=dict)

    def made_with(self, chosen: Sequence[tuple[_Layer, str]]) -> nn.Module:
        """The network with more bits at some places, calibrated."""
        recipe = _with_rules(self.net.recipe, _rules(self.net.recipe, chosen))
        made = quantize_model(deepcopy(self.float_net), recipe).eval()
        if _depends_on_others(self.net):
            return calibrate(made, self.crops)
        known = dict(quantizers(self.net)) | {_name(*one): self.raised[_name(*one)] for one in chosen}
        for place, quantizer in quantizers(made):
            quantizer.load_state_dict(known[place].state_dict())
        return made

    def choose(self, layers: Sequence[_Layer], told: str, share: float, base: float) -> list[tuple[_Layer, str]]:
        """Places of some layers, called ``told``, for at most a share of the bit operations ``base``."""
        recipe, bits = self.net.recipe, _raised_to(self.net.recipe)
        spent = sum(layer.bitops({}) for layer in layers) - _base(recipe, layers)
        left = share * base - spent
        low = [(layer, port) for layer in layers for port, place in layer.places.items() if place.bits < bits]
        prices = {(layer.cost.name, port): layer.bitops({port: bits}) - layer.bitops({}) for layer, port in low}
        able = [(layer, port) for layer, port in low if prices[layer.cost.name, port] <= left]
        if not able:
            if low and not spent:
                logger.info(
                    "no place of %s gets %d bits: the cheapest would add %.1f %% to the BitOPs, and recipe.fragile "
                    "allows %.1f %%",
                    told, bits, 100 * min(prices.values()) / base, 100 * left / base,
                )  # fmt: skip
            return []
        removed = self._removed(able)
        return _chosen([one for one in able if _name(*one) in removed], removed, bits, left)

    def _removed(self, able: Sequence[tuple[_Layer, str]]) -> dict[str, float]:
        """By how much the damage of places falls with more bits, of those that :data:`SHARE` leaves."""
        probes = _probes(self.crops, len(able))
        before = self._damage(self.net, able, probes)
        least = SHARE * sum(min(damage, MOST) for damage in before.values())
        able = [one for one in able if before[_name(*one)] > least]  # no place removes more than it does
        if not able:
            return {}
        alone = _only_rules(self.net.recipe, _rules(self.net.recipe, able))
        raised = calibrate(quantize_model(deepcopy(self.float_net), alone), self.crops)
        self.raised.update(quantizers(raised))
        after = self._damage(raised, able, probes)
        return {name: before[name] - damage for name, damage in after.items() if before[name] - damage > least}

    def _damage(
        self, net: nn.Module, places: Sequence[tuple[_Layer, str]], probes: Sequence[Tensor]
    ) -> dict[str, float]:
        """What each place does alone, by name."""
        errors, _ = output_errors(net, probes, [frozenset([_name(*one)]) for one in places], progress=self.progress)
        return {min(group): damage for group, damage in errors.items()}


def _chosen(
    able: list[tuple[_Layer, str]], removed: dict[str, float], bits: int, left: float
) -> list[tuple[_Layer, str]]:
    """One place after the other, always the one that removes most for each bit operation, as long as one fits."""
    chosen: list[tuple[_Layer, str]] = []
    widths: dict[str, dict[str, int]] = {layer.cost.name: {} for layer, _ in able}
    while True:
        prices = {}
        for layer, port in able:
            now = widths[layer.cost.name]
            if port not in now:
                prices[layer, port] = layer.bitops({**now, port: bits}) - layer.bitops(now)
        fitting = [one for one, price in prices.items() if price <= left]
        if not fitting:
            return chosen
        best = max(fitting, key=lambda one: removed[_name(*one)] / prices[one])
        chosen.append(best)
        widths[best[0].cost.name][best[1]] = bits
        left -= prices[best]


def _name(layer: _Layer, port: str) -> str:
    return f"{layer.cost.name}.{port}"


def _layers(net: nn.Module, float_net: nn.Module) -> list[_Layer]:
    """Layers with places of their own at an operand."""
    operands = {port for ports in _OPERANDS for port in ports}
    places: dict[str, dict[str, Place]] = {}
    for place in find_places(float_net, net.recipe):  # a quantized network has other modules and classes
        if place.port in operands:
            places.setdefault(place.name, {})[place.port] = place
    return [_Layer(cost, places[cost.name]) for cost in complexity(net).sites if cost.name in places]


def _probes(crops: Sequence[Tensor], places: int) -> list[Tensor]:
    """The middle of images that are spread evenly over the crops; of many places, of fewer images."""
    images = [image for batch in crops for image in batch.split(1)]
    count = min(PROBES, max(2, PASSES // places))
    chosen = images[:: max(1, len(images) // count)][:count]
    return [_middle(_middle(image, -1), -2) for image in chosen]


def _middle(image: Tensor, axis: int) -> Tensor:
    length = min(PROBE, image.shape[axis])
    return image.narrow(axis, (image.shape[axis] - length) // 2, length)


def _bits_before(recipe: Recipe, place: Place) -> int:
    """Those of the place's own rule, but for one that raised it; else the recipe's."""
    if place.own_bits and recipe.rules[place.rule].match != place.name:
        return place.bits
    return recipe.bits.weight if place.port == "weight" else recipe.bits.act


def _raised_to(recipe: Recipe) -> int:
    return recipe.fragile.above(min(recipe.bits.weight, recipe.bits.act))


def _rules(recipe: Recipe, places: Sequence[tuple[_Layer, str]]) -> list[Rule]:
    """A rule for each of these places, with the bits of ``recipe.fragile``."""
    return [_raised(recipe, layer.places[port], _raised_to(recipe)) for layer, port in places]


def _with_rules(recipe: Recipe, rules: Sequence[Rule]) -> Recipe:
    """The recipe with more rules at the end of its placement."""
    return _only_rules(recipe, (*recipe.rules, *rules))


def _only_rules(recipe: Recipe, rules: Sequence[Rule]) -> Recipe:
    """The recipe with other rules in its placement."""
    return recipe.model_copy(update={"placements": {**recipe.placements, recipe.placement: tuple(rules)}})


def _raised(recipe: Recipe, place: Place, bits: int) -> Rule:
    """A rule for one place with what the rule it replaces says beside the bits."""
    old = recipe.rules[place.rule]
    kept = {"quantizer": old.quantizer, "pad_first": old.pad_first}
    return Rule(match=place.name, port=place.port, bits=bits, in_fab=not place.own_bits, **kept)
