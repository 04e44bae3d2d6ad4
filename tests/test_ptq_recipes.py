"""What the recipes of the published post-training methods say, against what is published: schedules, losses, places."""

from __future__ import annotations

from typing import Any

import basicsr  # noqa: F401  (registers the backbones)
import pytest
import torch
from qsr_plugin.archs.quant_net_arch import build_backbone
from torch import nn

from qsr_plugin import calibrate, load_recipe
from qsr_plugin.models.tuning import check_tuning
from qsr_plugin.quant.quantizer import Quantizer
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.surgery import quantize_model, quantizers
from tests.backbones import TRANSFORMERS, tiny_options

#: Pixels are 0..1 here, in the published harness 0..255; the L1 loss, their other part, is smaller by as much.
PIXELS = 255
RANGES = {"weight_ranges": 1e-2, "ranges": 1e-2}
BITS = {"bits": 1e-2, "thresholds": 1e-1}


def tiny(backbone: str) -> nn.Module:
    return build_backbone(tiny_options(backbone)).eval()


def epochs(*turns: dict[str, float]) -> list[dict[str, float]]:
    """Rates by group of ten epochs that take turns; each turn's fall by a tenth whenever it comes again."""
    return [
        {group: rate * 0.9 ** (epoch // len(turns)) for group, rate in turns[epoch % len(turns)].items()}
        for epoch in range(10)
    ]


def rates(stage: Any) -> dict[str, float]:
    return {group: getattr(stage.lr, group) for group in stage.train}


ADABM = epochs({"weight_ranges": 1e-2}, {"ranges": 1e-2}, BITS)
STATIC = epochs({"weight_ranges": 1e-2}, {"ranges": 1e-2})


@pytest.mark.parametrize(
    ("method", "wanted"),
    [("adabm", ADABM), *((f"{ranges}_ft", STATIC) for ranges in ("minmax", "percentile", "omse"))],
)
def test_ten_epochs_of_a_hundred_images_take_turns(method: str, wanted: list[dict[str, float]]) -> None:
    recipe = load_recipe(method)
    assert [rates(stage) for stage in recipe.stages] == [pytest.approx(one) for one in wanted]
    assert {stage.iters for stage in recipe.stages} == {50} and recipe.tuning.batch == 2
    assert recipe.tuning.schedule == "constant" and not recipe.tuning.relative
    assert (recipe.calibration.images, recipe.calibration.batch) == (100, 16)
    assert recipe.calibration.fit == (2 if method == "adabm" else 0)
    losses = {loss.type: loss.extras() for loss in recipe.losses}
    wanted_losses = {"TeacherLoss": 1, "BlockFeatureLoss": 10 / PIXELS}
    wanted_losses |= {"BitLoss": 50 / PIXELS} if method == "adabm" else {}
    assert {name: extras["loss_weight"] for name, extras in losses.items()} == pytest.approx(wanted_losses)


@pytest.mark.parametrize(
    ("method", "feature_loss", "schedule", "learn"),
    [
        ("ptq4sr", ("UnitFeatureLoss", 5 / PIXELS), "constant", {"ranges": 1e-2, "weight_ranges": 1e-3}),
        ("2dquant", ("UnitFeatureMSELoss", 5), "cosine", RANGES),
    ],
)
def test_all_bounds_learn_together(method: str, feature_loss: Any, schedule: str, learn: dict[str, float]) -> None:
    recipe = load_recipe(method)
    (stage,) = recipe.stages
    assert rates(stage) == learn and recipe.tuning.schedule == schedule
    losses = {loss.type: loss.extras()["loss_weight"] for loss in recipe.losses}
    assert losses == pytest.approx({"TeacherLoss": 1, feature_loss[0]: feature_loss[1]})


def weights_of(net: nn.Module) -> set[str]:
    return {place.removesuffix(".weight") for place, quantizer in quantizers(net) if quantizer.role == "weight"}


@pytest.mark.parametrize("backbone", TRANSFORMERS)
@pytest.mark.parametrize("method", ["percentile", "ptq4sr", "2dquant"])
def test_methods_of_one_comparison_have_the_same_places(backbone: str, method: str) -> None:
    places = [
        [place for place, _ in quantizers(quantize_model(tiny(backbone), load_recipe(one, placement="transformer")))]
        for one in (method, "minmax")
    ]
    assert places[0] == places[1]


def activations(net: nn.Module) -> dict[str, Quantizer]:
    return {place: quantizer for place, quantizer in quantizers(net) if quantizer.role == "act"}


@pytest.mark.parametrize("method", ["minmax", "percentile", "ptq4sr", "2dquant"])
def test_transformer_places_are_those_of_the_published_comparison(method: str) -> None:
    """All linear layers and four operands of attention in each block; no convolution. Weights take both bounds."""
    net = quantize_model(tiny("SwinIR"), load_recipe(method, weight_bits=4, act_bits=4, placement="transformer"))
    blocks = [name for name, module in net.named_modules() if type(module).__name__ == "SwinTransformerBlock"]
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert blocks and weights_of(net) == {f"{block}.{layer}" for block in blocks for layer in layers}
    acts = set(activations(net))
    assert len(acts) == 8 * len(blocks) and {f"{block}.mlp.fc2.input" for block in blocks} <= acts
    weights = [quantizer for _, quantizer in quantizers(net) if quantizer.role == "weight"]
    assert all(len(list(quantizer.range_parameters())) == 2 for quantizer in weights), "lower and upper"


def test_the_search_moves_the_upper_end_alone_behind_a_gelu() -> None:
    """Published by the kind of tensor: whatever the values of the calibration are."""
    net = quantize_model(tiny("SwinIR"), load_recipe("2dquant", placement="transformer"))
    found = {place: quantizer.options.search for place, quantizer in activations(net).items()}
    assert {search for place, search in found.items() if place.endswith("mlp.fc2.input")} == {"upper"}
    assert {search for place, search in found.items() if not place.endswith("mlp.fc2.input")} == {"auto"}


def test_features_that_the_authors_of_2dquant_compare() -> None:
    losses = [{"type": "TeacherLoss"}, {"type": "UnitFeatureMSELoss", "features": "layers.*.residual_group:output"}]
    check_tuning(quantize_model(tiny("SwinIR"), load_recipe("2dquant", losses=losses)))


@pytest.mark.parametrize("placement", ["rdn", "rdn_full"])
def test_adabm_keeps_the_local_fusion_of_rdn_at_the_recipes_bits(placement: str) -> None:
    """Dense and both global fusion convolutions adapt; the local fusion has b bits and counts; the rest is 8 bits."""
    net = quantize_model(tiny("RDN"), load_recipe("adabm", weight_bits=4, act_bits=4, placement=placement))
    by_widths: dict[tuple[int, ...], set[str]] = {}
    for place, quantizer in activations(net).items():
        by_widths.setdefault(quantizer.candidates, set()).add(place)
    fusion = by_widths.pop((4,))
    assert fusion == {f"RDBs.{block}.LFF.input" for block in range(len(net.RDBs))}
    assert all(activations(net)[place].counts_in_fab for place in fusion)
    chosen = by_widths.pop((2, 3, 4, 5, 6))
    assert {"GFF.0.input", "GFF.1.input"} <= chosen
    assert all(".convs." in place or place.startswith("GFF") for place in chosen)
    outer = by_widths.pop((8,), set())
    assert not by_widths and bool(outer) is (placement == "rdn_full")
    assert all(place.startswith(("SFENet", "UPNet")) for place in outer)
    assert set(net.bit_policy.places) == chosen


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 8}, "adapt: false is for an activation at the recipe's bits"),
        ({"port": "weight"}, "adapt: false is for an activation at the recipe's bits"),
        ({"keep_float": True}, "adapt: false is for an activation at the recipe's bits"),
    ],
)
def test_what_adapt_does_not_go_with(changes: dict[str, Any], said: str) -> None:
    rule = {"match": "**", "port": "input", "adapt": False, **changes}
    with pytest.raises(RecipeError, match=said):
        load_recipe("adabm", placement="own", placements={"own": [rule]})


def test_several_candidates_have_no_width_of_their_own(tiny_net: Any) -> None:
    rule = {"role": "block.conv", "port": "input", "adapt": False}
    recipe = load_recipe("cadyq", placement="own", placements={"own": [rule]})
    with pytest.raises(RecipeError, match=r"adapt: false needs one width, and bits.act is \[4, 6, 8\]"):
        quantize_model(tiny_net(), recipe)


def test_a_place_that_does_not_adapt_runs_at_the_recipes_bits() -> None:
    net = quantize_model(tiny("RDN"), load_recipe("adabm", weight_bits=4, act_bits=4, placement="rdn"))
    calibrate(net, torch.rand(2, 3, 12, 12))
    with torch.no_grad():
        net(torch.rand(2, 3, 12, 12))
    bits = net.last_record().bits
    assert bits["RDBs.0.LFF.input"] == 4 and isinstance(bits["GFF.0.input"], torch.Tensor)
