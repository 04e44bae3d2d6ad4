"""Recipes for tests: all shipped ones, completed by what no recipe file can bring along, and those made by hand.

A recipe is *adaptive* if its policy chooses among several bit widths. Most can also be given one width, which is what
tests at equal bits want; a policy that works around a width (``reach``) is adaptive at any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from qsr_plugin.quant.places import find_places
from qsr_plugin.quant.policy import policy_class
from qsr_plugin.quant.recipe import list_methods, load_recipe
from qsr_plugin.quant.schema import Recipe

#: Roles that transformers alone have.
TRANSFORMER_ROLES = ("block.linear", "block.mlp", "block.mlp_last", "block.attention")


def is_adaptive(method: str) -> bool:
    """Whether the recipe as shipped chooses among bit widths."""
    return isinstance(load_recipe(method).act_widths, tuple)


def equal(method: str, bits: int, **changes: Any) -> Recipe:
    """A recipe with one bit width for weights and activations, as near to ``bits`` as its policy can be given."""
    reach = policy_class(load_recipe(method).policy.type).reach
    return load_recipe(method, weight_bits=bits, act_bits=min(max(bits, 2 + reach), 16 - reach), **changes)


def by_role(method: str, transformer: bool = False) -> list[str]:
    """Placements of a recipe that every backbone with a role table has, or every transformer among them."""
    missing = {None} if transformer else {None, *TRANSFORMER_ROLES}
    placements = load_recipe(method).placements
    return [name for name, rules in placements.items() if not missing & {rule.role for rule in rules}]


def widths(recipe: Recipe) -> tuple[int, ...]:
    """Activation bit widths that a recipe may use."""
    return recipe.act_widths if isinstance(recipe.act_widths, tuple) else (recipe.act_widths,)


def _table(places: list[str], candidates: tuple[int, ...]) -> dict[str, Any]:
    """A bit table by edge score in which neighbouring rows differ."""
    low, middle, high = candidates[0], candidates[len(candidates) // 2], candidates[-1]
    last = len(places) - 1
    rows = [
        [low] * len(places),
        [low if index % 2 else middle for index in range(len(places))],
        [high if index == last else low for index in range(len(places))],
    ]
    scores = [0.0, 30.0, 60.0, 100.0, 140.0, 180.0, 195.0, 200.0, 205.0]
    bits = ["".join(map(str, rows[number % 3])) for number in range(len(scores))]
    return {"places": places, "candidates": list(candidates), "scores": scores, "bits": bits, "patch": 8, "step": 8}


#: Policy -> options that depend on the network: its places with a choice and their candidates.
COMPLETIONS: dict[str, Callable[[list[str], tuple[int, ...]], dict[str, Any]]] = {
    "edge_table": lambda places, candidates: {"table": _table(places, candidates), "max_bits_train": 9.0},
}


def for_network(recipe: Recipe, net: nn.Module) -> Recipe:
    """The recipe with the options of its policy that depend on the network."""
    make, choices = COMPLETIONS.get(recipe.policy.type), recipe.act_widths
    if make is None or not isinstance(choices, tuple):
        return recipe
    places = [f"{place.name}.{place.port}" for place in find_places(net, recipe) if place.bits == choices]
    return load_recipe(recipe, policy=make(places, choices))


def shipped(method: str, net: nn.Module, **changes: Any) -> Recipe:
    """A recipe with its own bits, completed for a network."""
    return for_network(load_recipe(method, **changes), net)


METHODS = list_methods()
#: Those the host can train: no learning rates in quantization steps.
TRAINED = [name for name in METHODS if (tuning := load_recipe(name).tuning) is None or not tuning.relative]
ADAPTIVE = [method for method in METHODS if is_adaptive(method)]


def custom_recipe(*rules: dict, act: object = 4, weight: int = 4, **more: object) -> dict:
    """Recipe with min-max quantizers at places given by hand."""
    quantizers = {"act": "asymmetric", "weight": "symmetric"}
    bits = {"weight": weight, "act": act}
    placement = {"placement": "all", "placements": {"all": rules}}
    return {"method": "hand", **placement, "quantizers": quantizers, "bits": bits, **more}
