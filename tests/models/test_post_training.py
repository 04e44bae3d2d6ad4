"""The steps of post-training quantization in their order."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr_plugin import calibrate, fragile_places, load_recipe, quantize_model, save_quantized
from qsr_plugin.checkpoint import CheckpointError
from qsr_plugin.errors import UserError
from qsr_plugin.post_training import post_train
from qsr_plugin.quant.schema import Rule
from qsr_plugin.quant.surgery import quantizers

RATE = {"weight_ranges": 1.0e-2, "ranges": 1.0e-2}
STAGES = [{"train": [group], "iters": 2, "lr": {group: rate}} for group, rate in RATE.items()]


def recipe(method: str = "minmax", **changes: object):
    return load_recipe(method, weight_bits=4, act_bits=4, placement="body", **changes)


def test_calibrated_only(tiny_net, images) -> None:
    float_net = tiny_net()
    before = {key: value.clone() for key, value in float_net.state_dict().items()}
    made = post_train(float_net, recipe(), images)
    assert list(made.seconds) == ["calibration"] and made.fragile == () and made.recipe == recipe()
    assert made.net.recipe == made.recipe and not made.net.training and made.net._last_record is None
    assert getattr(float_net, "recipe", None) is None
    assert all(torch.equal(float_net.state_dict()[key], value) for key, value in before.items())
    with torch.no_grad():
        assert not torch.equal(made.net(images[0]), float_net(images[0]))


@pytest.mark.parametrize("tuned", [True, False])
def test_tuned_if_the_recipe_says_how(tiny_net, images, tuned: bool) -> None:
    told: list[tuple[str, int]] = []

    def progress(items, description: str):
        told.append((description, len(items)))
        return items

    made = post_train(tiny_net(), recipe("percentile_ft", stages=STAGES), images, tuned=tuned, progress=progress)
    spent = ["teacher", "weight_ranges", "ranges"] if tuned else []
    assert list(made.seconds) == ["calibration", *spent]
    assert told == [("calibrating", 3)] + [("tuning", 4)] * tuned


def test_fragile_places_get_their_bits_before_the_tuning(tiny_net, images, monkeypatch: pytest.MonkeyPatch) -> None:
    def raised(net, float_net, crops, *, progress):
        assert len(crops) == 3 and dict(quantizers(net))["body.0.conv1.input"].calibrated
        rules = (*net.recipe.rules, Rule(match="body.0.conv1", port="input", bits=8, in_fab=True))
        more = net.recipe.model_copy(update={"placements": {**net.recipe.placements, "body": rules}})
        return calibrate(quantize_model(deepcopy(float_net), more), crops)

    monkeypatch.setattr(fragile_places, "with_fragile_places", raised)
    asked = recipe("percentile_ft", stages=STAGES, fragile={"bits": 8, "budget": 0.1})
    made = post_train(tiny_net(), asked, images)
    assert made.fragile == ("body.0.conv1.input",) and made.net.recipe == made.recipe != asked
    bits = {place: quantizer.candidates for place, quantizer in quantizers(made.net) if place.endswith("input")}
    assert bits.pop("body.0.conv1.input") == (8,) and set(bits.values()) == {(4,)}
    assert list(made.seconds) == ["calibration", "fragile places", "teacher", "weight_ranges", "ranges"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"losses": [{"type": "TeacherLos"}]}, "TeacherLoss"),
        ({"losses": [{"type": "TeacherLoss", "weight": 1}]}, "unexpected keyword argument 'weight'"),
        ({"losses": [{"type": "BlockFeatureLoss", "features": "blok:output"}]}, "cannot tap 'blok:output'"),
        ({"stages": [{"train": ["ranges"], "iters": 1}]}, r"stages\[0\].lr.ranges is missing"),
        ({"stages": [{"train": ["bits"], "iters": 1, "lr": {"bits": 1.0}}]}, "this network has no such parameters"),
        ({"placement": "own", "placements": {"own": [{"role": "bloc.conv", "port": "input"}]}}, "no role 'bloc.conv'"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused_before_the_work(
    tiny_net, images, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], said: str
) -> None:
    net, asked = tiny_net(), load_recipe("percentile_ft", **changes)
    with caplog.at_level("INFO", logger="qsr_plugin"), pytest.raises(UserError, match=said):
        post_train(net, asked, images)
    assert "calibrated" not in caplog.text and getattr(net, "recipe", None) is None
    if "placement" not in changes:
        post_train(net, asked, images, tuned=False)  # nothing of it matters then


def test_no_crops(tiny_net) -> None:
    with pytest.raises(ValueError, match="no calibration images"):
        post_train(tiny_net(), recipe(), [])


def test_a_network_that_cannot_be_saved_is_told_before_the_work(
    tiny_net, images, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of a class that no file can name, and one that has the name of another; not one that says what it is."""

    class Plain(torch.nn.Sequential):
        pass

    for kind in (Plain, type("EDSR", (Plain,), {})):
        caplog.clear()
        own = kind(torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Conv2d(3, 3, 3, padding=1))
        asked = recipe(placements={"body": [{"match": "?", "port": "input"}, {"match": "?", "port": "weight"}]})
        made = post_train(own, asked, images)
        told = f"the constructor arguments of {kind.__name__} are not known"
        assert told in caplog.text and "calibrated" not in caplog.text.split(told)[0]
        with pytest.raises(CheckpointError, match=told):
            save_quantized(made.net, tmp_path / "net.safetensors")
        caplog.clear()
        own.backbone_options = {"type": "Plain"}
        post_train(own, asked, images)
        assert "save_quantized" not in caplog.text
    post_train(tiny_net(), recipe(), images)
    assert "save_quantized" not in caplog.text
