"""More bits for fragile places: the right ones, within the budget, and nothing else changed."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import calibrate, complexity, load_recipe, quantize_model
from qsr_plugin.fragile_places import with_fragile_places
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.schema import Recipe
from qsr_plugin.quant.surgery import quantizers
from qsr_plugin.report.complexity import method_label
from tests.recipes import METHODS


def minmax(bits: int = 4, fragile: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    """Ranges without clipping, so that bits are all that counts."""
    given = {"placement": "full", **({} if fragile is None else {"fragile": fragile}), **changes}
    return load_recipe("minmax", weight_bits=bits, act_bits=bits, **given)


def quantized(float_net: nn.Module, recipe: Recipe, images: list[Tensor]) -> nn.Module:
    return calibrate(quantize_model(deepcopy(float_net), recipe), images).eval()


def choose(float_net: nn.Module, recipe: Recipe, images: list[Tensor], **more: Any) -> Recipe:
    return with_fragile_places(quantized(float_net, recipe, images), float_net, images, **more).recipe


def raised(recipe: Recipe, before: Recipe) -> list[str]:
    """``site.port`` of the extra rules."""
    assert recipe.rules[: len(before.rules)] == before.rules
    return [f"{rule.match}.{rule.port}" for rule in recipe.rules[len(before.rules) :]]


def body_bitops(net: nn.Module) -> float:
    """Of the layers that the recipe gives no bits of their own: blocks, and the convolution after them."""
    rows = [row for row in complexity(net).sites if row.name.startswith(("body", "conv_after_body"))]
    return sum(row.macs * row.weight_bits * row.act_bits for row in rows)


@pytest.fixture
def float_net(tiny_net) -> nn.Module:
    """Four blocks; one convolution's weight has an outlier that leaves the other values few levels."""
    net = tiny_net("EDSR", num_block=4)
    with torch.no_grad():
        for parameter in net.body.parameters():
            parameter.mul_(3)
        net.body[2].conv1.weight[0, 0, 0, 0] = 8.0
    return net


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.34, 0.67, 1.0])
@pytest.mark.parametrize("bits", [5, 6, 8])
def test_budget_is_kept_and_used(float_net, images, monkeypatch, budget: float, bits: int) -> None:
    """Nine layers of one size: the first operand of one costs ``bits / 4 - 1`` ninths, the second ``bits / 4`` times it."""
    monkeypatch.setattr("qsr_plugin.fragile_places.SHARE", -math.inf)
    before = minmax(fragile={"bits": bits, "budget": budget})
    after = choose(float_net, before, images)
    base = body_bitops(quantize_model(deepcopy(float_net), before))
    growth = body_bitops(quantize_model(deepcopy(float_net), after)) / base - 1
    operands = Counter(name.rpartition(".")[0] for name in raised(after, before))
    first, second = (bits / 4 - 1) / 9, bits / 4 * (bits / 4 - 1) / 9
    assert growth == pytest.approx(first * len(operands) + second * sum(count - 1 for count in operands.values()))
    further = [first] * (len(operands) < 9) + [second] * (1 in operands.values())
    assert growth <= budget + 1e-9 and all(growth + price > budget for price in further)
    assert (after is before) == (budget < first)


def test_the_places_that_remove_most_damage_for_their_cost_are_chosen(float_net, images) -> None:
    """All first operands cost the same, a second one twice that: the damage alone at 4 bits less that at 8 decides."""
    before = minmax(fragile={"bits": 8, "budget": 0.45})
    after = choose(float_net, before, images)
    names = [f"body.{block}.conv{conv}" for block in range(4) for conv in (1, 2)] + ["conv_after_body"]
    removed = {}
    for name, port in itertools.product(names, ("input", "weight")):
        errors = []
        for bits in (4, 8):
            alone = minmax(placement="x", placements={"x": [{"match": name, "port": port, "bits": bits}]})
            with torch.no_grad():
                net = quantized(float_net, alone, images)
                errors.append(sum((net(x) - float_net(x)).square().mean().item() for x in images))
        removed[name, port] = errors[0] - errors[1]
    want, left = [], 4  # in units of a first operand, 1 / 9
    while left:
        price = {one: 1 + any(one[0] == other[0] for other in want) for one in removed if one not in want}
        want.append(max((one for one in price if price[one] <= left), key=lambda one: removed[one] / price[one]))
        left -= price[want[-1]]
    assert want[0] == ("body.2.conv1", "weight"), "the one with the outlier"
    assert raised(after, before) == [f"{name}.{port}" for name, port in want]


FIXED = [method for method in METHODS if load_recipe(method, weight_bits=4, act_bits=4).policy.type == "fixed"]


@pytest.mark.parametrize("fit", [0, 3])
@pytest.mark.parametrize("method", FIXED)
def test_the_network_is_the_one_that_its_recipe_makes(float_net, images, method: str, fit: int) -> None:
    """Bit for bit, though few places are calibrated again; in evaluation mode, and able to run."""
    recipe = load_recipe(method, weight_bits=4, act_bits=4, fragile={"bits": 8, "budget": 0.34, "outer_budget": 0.2})
    recipe = load_recipe(recipe, calibration={"fit": fit})
    net = with_fragile_places(quantized(float_net, recipe, images), float_net, images)
    assert raised(net.recipe, recipe) and not net.training
    want = quantized(float_net, net.recipe, images)
    found = net.state_dict()
    assert all(torch.equal(found[key], value) for key, value in want.state_dict().items())
    with torch.no_grad():
        assert torch.equal(net(images[0]), want(images[0]))


def told_errors(monkeypatch: pytest.MonkeyPatch, damages: dict[int, dict[str, float]]) -> list[list[str]]:
    """Damage by bits and place instead of a measurement; what is asked for comes back, by call."""
    asked: list[list[str]] = []

    def errors(net: nn.Module, crops: object, groups: Collection[frozenset[str]], **_: object) -> tuple[Any, int]:
        widths = {place: quantizer.candidates[0] for place, quantizer in quantizers(net)}
        asked.append([min(group) for group in groups])
        return {group: damages[widths[min(group)]].get(min(group), 0.0) for group in groups}, 1

    monkeypatch.setattr("qsr_plugin.fragile_places.output_errors", errors)
    return asked


@pytest.mark.parametrize(
    ("budget", "want"),
    [
        (0.10, ["conv_first.input"]),
        (0.20, ["conv_first.input", "body.0.conv1.weight"]),
        (0.30, ["conv_first.input", "body.0.conv1.weight", "body.0.conv2.input"]),
        (0.45, ["conv_first.input", "body.0.conv1.weight", "body.0.conv2.input", "body.0.conv1.input"]),
    ],
)
def test_damage_removed_counts_by_what_it_costs(tiny_net, images, monkeypatch, budget: float, want: list[str]) -> None:
    """Convolutions of 1, 1, 1, 1 and 3/8 of the multiplications, 4.375 in all; at 6 bits 1.5 times as dear.

    The greatest damage hardly falls with more bits; the second operand of a layer costs 1.5 times what the first does, so
    that a smaller damage elsewhere goes before it; one damage grows.
    """
    damages = {
        4: {"body.1.conv1.input": 10.0, "body.0.conv1.weight": 9.0, "body.0.conv1.input": 5.5,
            "body.0.conv2.input": 4.0, "conv_first.input": 5.0, "body.1.conv2.weight": 1.0},
        6: {"body.1.conv1.input": 9.95, "body.1.conv2.weight": 2.0},
    }  # fmt: skip
    told_errors(monkeypatch, damages)
    rules = [{"match": name, "port": port} for name in ("body.*.conv?", "conv_first") for port in ("input", "weight")]
    before = minmax(placement="x", placements={"x": rules}, fragile={"bits": 6, "budget": budget})
    after = choose(tiny_net("EDSR"), before, images)
    assert raised(after, before) == want


def test_places_that_hardly_matter_are_left_alone(tiny_net, images, monkeypatch, caplog) -> None:
    """However cheap they are: 1 % of the damage of all places is the least that one has to remove.

    Where all its damage is less than that, it is neither calibrated nor measured with more bits.
    """
    names = [f"body.{block}.conv{conv}.input" for block in (0, 1) for conv in (1, 2)]
    damages = {4: dict(zip(names, (6.0e-4, 3.9e-4, 0.09e-4, 0.11e-4))), 8: {names[1]: 3.85e-4}}
    asked = told_errors(monkeypatch, damages)
    before = minmax(placement="body", fragile={"bits": 8, "budget": 1.0})
    with caplog.at_level("INFO", "qsr_plugin"):
        after = choose(tiny_net("EDSR"), before, images)
    assert raised(after, before) == [names[0], names[3]]
    assert len(asked[0]) == 8 and asked[1] == [names[0], names[1], names[3]]
    told = [line.split(" quantizers")[0] for line in caplog.messages if line.startswith("calibrated")]
    assert told == ["calibrated 8", "calibrated 3"]


def test_an_exploding_place_leaves_the_others_their_chance(tiny_net, images, monkeypatch) -> None:
    """It comes first, and counts as 3e-3 in the sum of which others have to remove 1 %."""
    names = [f"body.{block}.conv{conv}.input" for block in (0, 1) for conv in (1, 2)]
    told_errors(monkeypatch, {4: dict(zip(names, (1e9, 4.1e-5, 1.9e-5, 2.9e-5))), 8: {}})
    before = minmax(placement="body", fragile={"bits": 8, "budget": 1.0})
    assert raised(choose(tiny_net("EDSR"), before, images), before) == [names[0], names[1]]


def test_many_places_are_measured_on_fewer_images(float_net, images, monkeypatch) -> None:
    """18 places, and three images each are 54 passes."""
    monkeypatch.setattr("qsr_plugin.fragile_places.PASSES", 59)
    monkeypatch.setattr("qsr_plugin.fragile_places.SHARE", -math.inf)
    seen: list[object] = []
    shown = lambda items, text: (seen.append(text) or item for item in items)  # noqa: E731
    choose(float_net, minmax(fragile={"bits": 8, "budget": 0.34}), images, progress=shown)
    assert len(seen) == 2 * 18 * 3


def test_places_keep_their_quantizer_and_padding(tiny_net, images) -> None:
    act = {"type": "asymmetric", "observer": "percentile", "alpha": 0.98}
    rules = [
        {"match": "body.*.conv?", "port": "input", "quantizer": act, "pad_first": True},
        {"match": "body.*.conv?", "port": "weight"},
        {"match": "conv_first", "port": "weight", "bits": 4},
    ]
    before = minmax(placement="x", placements={"x": rules, "other": []}, fragile={"bits": 8, "budget": 1.0})
    after = choose(tiny_net(), before, images)
    new = after.rules[len(rules) :]
    assert len(new) == 4 and all(rule.bits == 8 and rule.in_fab for rule in new), "of four layers, 25 % each"
    kept = {"input": (True, before.rules[0].quantizer), "weight": (False, None)}
    assert {rule.port for rule in new} == set(kept)
    assert all((rule.pad_first, rule.quantizer) == kept[rule.port] for rule in new)
    net = quantize_model(tiny_net(), after)
    site = net.get_submodule(next(rule.match for rule in new if rule.port == "input"))
    assert (
        site.pad_first and site.quantizer("input").options.alpha == 0.98 and site.quantizer("input").candidates == (8,)
    )
    assert after.placements["other"] == before.placements["other"]
    assert load_recipe(after.to_dict()) == after


def test_raised_inputs_count_in_fab(float_net, images) -> None:
    before = minmax(fragile={"bits": 8, "budget": 0.34})
    after = choose(float_net, before, images)
    net, inputs = quantized(float_net, after, images), [one for one in raised(after, before) if one.endswith("input")]
    counted = [quantizer for place, quantizer in quantizers(net) if quantizer.counts_in_fab]
    assert 0 < len(inputs) < len(raised(after, before)) == 3
    assert sorted(q.candidates[0] for q in counted) == [4] * (9 - len(inputs)) + [8] * len(inputs)
    assert complexity(net).fab == pytest.approx(4 + 4 * len(inputs) / 9)


def test_what_is_raised_already_is_spent(float_net, images, caplog) -> None:
    """Quantizing again with the recipe that came out changes it no more; a larger budget adds to it."""
    before = minmax(fragile={"bits": 8, "budget": 0.2})
    with caplog.at_level("INFO", logger="qsr_plugin"):
        once = choose(float_net, before, images)
        assert len(raised(once, before)) == 1 and choose(float_net, once, images) is once
    assert "calibrated" in caplog.text and "no place of" not in caplog.text
    larger = load_recipe(once, fragile={"bits": 8, "budget": 0.25})
    assert len(raised(choose(float_net, larger, images), once)) == 1


OUTER = ("conv_first", "upsample", "conv_last")


def of_outer(names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(OUTER)]


def test_layers_with_bits_of_their_own_take_no_part_without_a_budget(float_net, images) -> None:
    after = choose(float_net, before := minmax(fragile={"bits": 16, "budget": 1.0}, bits=8), images)
    assert not of_outer(raised(after, before))


@pytest.mark.parametrize("share", [0.03, 0.2, 1.0])
def test_layers_with_bits_of_their_own_have_a_budget_of_their_own(float_net, images, monkeypatch, share: float) -> None:
    """Places of the body stay the same; further BitOPs are within a share of those of all layers, and used up."""
    monkeypatch.setattr("qsr_plugin.fragile_places.SHARE", -math.inf)
    before = minmax(fragile={"bits": 16, "budget": 0.3}, bits=8)
    body = choose(float_net, before, images)
    given = load_recipe(before, fragile={"bits": 16, "budget": 0.3, "outer_budget": share})
    both = choose(float_net, given, images)
    names = raised(both, given)
    assert names[: len(raised(body, before))] == raised(body, before)
    assert of_outer(names) == names[len(raised(body, before)) :] != []
    base, without, now = (
        {row.name: row.macs * row.weight_bits * row.act_bits for row in complexity(net).sites}
        for net in (quantize_model(deepcopy(float_net), recipe) for recipe in (before, body, both))
    )
    growth = (sum(now.values()) - sum(without.values())) / sum(base.values())
    assert 0 < growth <= share
    further = [
        now[name] for name in base if name.startswith(OUTER) and now[name] < 4 * base[name]
    ]  # an operand doubles
    assert all(growth + price / sum(base.values()) > share for price in further)
    assert choose(float_net, both, images) is both, "what is raised already is spent"


def test_outer_places_do_not_count_in_fab_and_are_told_by_the_label(float_net, images) -> None:
    given = minmax(fragile={"bits": 16, "budget": 0.01, "outer_budget": 0.5}, bits=8)
    after = choose(float_net, given, images)
    assert raised(after, given) == of_outer(raised(after, given)) != []
    assert complexity(quantized(float_net, after, images)).fab == 8
    assert method_label(given) == "minmax W8A8" and method_label(after) == "minmax W8A8+"


def test_bits_that_outer_layers_have_from_the_start_are_not_spent(float_net, images) -> None:
    """8 bits outside and 4 within; the budget is for what goes beyond."""
    given = minmax(fragile={"bits": 16, "budget": 0.01, "outer_budget": 0.5})
    after = choose(float_net, given, images)
    assert raised(after, given) == of_outer(raised(after, given)) != []
    assert choose(float_net, after, images) is after


def test_outer_layers_that_have_as_many_bits_as_fragile_ones_stay(float_net, images) -> None:
    """8 bits outside and 4 within: the places of the body go to 8, the others have them."""
    given = minmax(fragile={"bits": [8, 16], "budget": 0.34, "outer_budget": 1.0})
    assert not of_outer(raised(choose(float_net, given, images), given))


@pytest.mark.parametrize(("bits", "weight"), [(4, 4), (6, 8), (8, 8)])
def test_nothing_to_raise(float_net, images, bits: int, weight: int) -> None:
    recipe = load_recipe(minmax(8), fragile={"bits": bits, "budget": 1.0}, weight_bits=weight)
    assert choose(float_net, recipe, images) is recipe


@pytest.mark.parametrize(("bits", "want"), [(4, 8), (6, 8), (8, 16)])
def test_of_several_widths_the_first_above_the_methods_is_taken(float_net, images, bits: int, want: int) -> None:
    before = load_recipe(minmax(bits), fragile={"bits": [8, 16], "budget": 0.4})
    after = choose(float_net, before, images)
    assert raised(after, before) and {rule.bits for rule in after.rules[len(before.rules) :]} == {want}


@pytest.mark.parametrize(("bits", "says"), [([16, 8], "ascending"), ([], "at least 1"), (17, "16"), ([4, 1], "2")])
def test_widths_that_make_no_sense_are_refused(bits: object, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe(minmax(), fragile={"bits": bits})


def test_a_budget_that_no_place_fits_is_told(float_net, images, caplog) -> None:
    """Nine layers of one size, so that an input or a weight at 8 instead of 4 bits adds a ninth."""
    recipe = minmax(fragile={"bits": 8, "budget": 0.1})
    with caplog.at_level("INFO", "qsr_plugin"):
        assert choose(float_net, recipe, images) is recipe
    assert (
        "no place of the body gets 8 bits: the cheapest would add 11.1 % to the BitOPs, and recipe.fragile allows 10.0 %"
        in caplog.text
    )


def test_one_operand_that_has_enough_is_left_alone(float_net, images) -> None:
    """W4A8 at 8 bits: weights alone, each at the double."""
    before = load_recipe(minmax(), act_bits=8, fragile={"bits": 8, "budget": 0.25})
    names = raised(choose(float_net, before, images), before)
    assert len(names) == 2 and all(name.endswith(".weight") for name in names)


def test_float_activations(float_net, images) -> None:
    before = load_recipe(minmax(), act_bits=32, fragile={"bits": 8, "budget": 0.12})
    assert raised(choose(float_net, before, images), before) == ["body.2.conv1.weight"]


def test_nothing_that_goes_in_is_changed_and_progress_is_shown(float_net, images) -> None:
    recipe = minmax(fragile={"bits": 8, "budget": 0.34})
    net, seen = quantized(float_net, recipe, images), []
    states = [deepcopy(one.state_dict()) for one in (net, float_net)]
    shown = lambda items, text: (seen.append(text) or item for item in items)  # noqa: E731
    with_fragile_places(net, float_net, images, progress=shown)
    for one, state in zip((net, float_net), states):
        assert all(torch.equal(value, state[key]) for key, value in one.state_dict().items())
    assert net.recipe is recipe and 18 * 6 < len(seen) <= 2 * 18 * 6 and set(seen) == {"measuring damage"}


def test_what_is_refused(float_net, images) -> None:
    with pytest.raises(RecipeError, match="has no 'fragile': add fragile"):
        choose(float_net, minmax(), images)
    for method in ("adabm", "cadyq"):
        with pytest.raises(RecipeError, match="chooses its own"):
            load_recipe(method, fragile={"bits": 8})
