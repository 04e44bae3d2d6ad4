"""What the log says about ranges."""

from __future__ import annotations

import pytest
import torch

from qsr_plugin.models.range_log import range_statistics
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.quant.surgery import quantize_model


def test_ranges_and_clipped_shares_of_every_place(tiny_net, images) -> None:
    net = calibrate(quantize_model(tiny_net("EDSR"), load_recipe("minmax", weight_bits=4, act_bits=4)), images)
    quantizer = net.body[0].conv1.quantizer("input")
    with torch.no_grad():
        quantizer.lower.mul_(0.5)
        quantizer.upper.mul_(0.5)
    net.keep_pairs = True
    net(images[0])
    found = range_statistics(net, net.last_record())
    x, _ = net.last_record().pairs["body.0.conv1.input"]
    step = (quantizer.upper - quantizer.lower) / 15
    share = ((x < quantizer.lower - step / 2) | (x > quantizer.upper + step / 2)).float().mean().item()
    assert share > 0
    scalars = found.scalars()
    assert len(found.places) == 8 and len(scalars) == 24
    assert scalars["clipped/body.0.conv1.input"] == pytest.approx(share)
    assert scalars["clipped/body.1.conv2.weight"] == 0.0
    assert scalars["range_lower/body.0.conv1.input"] == pytest.approx(quantizer.lower.item())
    assert scalars["range_upper/body.0.conv1.input"] == pytest.approx(quantizer.upper.item(), rel=1e-5)
    assert any(line.startswith("body.0.conv1.input: ") and line.endswith("% clipped") for line in found.lines())


def test_the_grid_is_compared_with_what_it_applies_to(tiny_net, images) -> None:
    recipe = load_recipe({"base": "quantsr", "depth": None, "stages": [{}]}, weight_bits=4, act_bits=4)
    net = calibrate(quantize_model(tiny_net("EDSR"), recipe), images)
    with torch.no_grad():
        net.body[0].conv1.quantizer("input").tau.fill_(1e3)
    net.keep_pairs = True
    net(images[0])
    assert range_statistics(net, net.last_record()).scalars()["clipped/body.0.conv1.input"] == 1.0


def test_places_with_a_grid_per_image_show_what_came_out(tiny_net, images) -> None:
    net = calibrate(quantize_model(tiny_net("EDSR"), load_recipe("daq", weight_bits=4, act_bits=4)), images)
    net.keep_pairs = True
    net(images[0])
    found = range_statistics(net, net.last_record())
    _, quantized = net.last_record().pairs["body.0.conv1.input"]
    scalars = found.scalars()
    assert scalars["range_upper/body.0.conv1.input"] == quantized.max().item()
    assert "clipped/body.0.conv1.input" not in scalars and "clipped/body.0.conv1.weight" in scalars
    assert 0 <= found.mean_clipped() <= 1 and any("grid per image" in line for line in found.lines())


def test_a_network_without_pairs_says_nothing(tiny_net, images) -> None:
    net = calibrate(quantize_model(tiny_net("EDSR"), "minmax"), images)
    net(images[0])
    assert range_statistics(net, net.last_record()) is None


def test_pairs_survive_what_follows_in_place(tiny_net, images) -> None:
    """The host's ReLU works in place; what the losses see must not change with it."""
    recipe = {
        "base": "minmax",
        "bits": {"act": 4},
        "placement": "out",
        "placements": {"out": [{"role": "block.conv_first", "port": "output"}]},
    }
    net = calibrate(quantize_model(tiny_net("EDSR"), load_recipe(recipe)), images)
    net.keep_pairs = True
    net(images[0])
    x, quantized = net.last_record().pairs["body.0.conv1.output"]
    assert bool((x < 0).any()) and torch.equal(quantized, net.body[0].conv1.quantizer("output")(x))
