"""Chosen places alone quantize: none is the float network, all the quantized one, bit by bit."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from qsr_plugin import calibrate, load_recipe, quantize_model
from qsr_plugin.quant.record import float_mode, only_places
from qsr_plugin.quant.surgery import quantizers
from tests.recipes import METHODS, shipped


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["EDSR", "SRResNet"])
def test_none_is_the_float_network_and_all_the_quantized_one(tiny_net, images, kind: str, method: str) -> None:
    float_net = tiny_net(kind)
    net = deepcopy(float_net)
    calibrate(quantize_model(net, shipped(method, net)), images).eval()
    with torch.no_grad():
        quantized = net(images[0])
        with only_places(()):
            assert torch.equal(net(images[0]), float_net(images[0]))
        with only_places([place for place, _ in quantizers(net)]):
            assert torch.equal(net(images[0]), quantized)
        assert torch.equal(net(images[0]), quantized) and not torch.equal(quantized, float_net(images[0]))


class Layers(nn.Module):
    """One layer for each way in which a weight is read: an own class, and a forward that reads the attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.conv(x))


@pytest.fixture
def layers() -> nn.Module:
    torch.manual_seed(0)
    return Layers()


def quantized(float_net: nn.Module, *ports: str, images: list[torch.Tensor]) -> nn.Module:
    rules = [{"match": name, "port": port} for name, port in (port.split(".") for port in ports)]
    recipe = load_recipe("percentile", weight_bits=3, act_bits=3, placement="x", placements={"x": rules})
    return calibrate(quantize_model(deepcopy(float_net), recipe), images)


PLACES = ["conv.input", "conv.weight", "conv.output", "up.input", "up.weight", "up.output"]


@pytest.mark.parametrize("chosen", [PLACES[:1], PLACES[1:2], PLACES[2:3], PLACES[4:5], PLACES[5:], PLACES[1:5:3]])
def test_a_place_alone_is_a_network_with_no_other_quantizer(layers, images, chosen: list[str]) -> None:
    """Ranges come from the float pass, so they are the same in both."""
    net, own = quantized(layers, *PLACES, images=images), quantized(layers, *chosen, images=images)
    with only_places(chosen):
        out = net(images[0])
    assert torch.equal(out, own(images[0])) and not torch.equal(out, layers(images[0]))
    assert set(net.last_record().bits) == {"conv.input"} & set(chosen) | {"conv.output", "up.output"} & set(chosen)


def test_blocks_nest_and_end_with_an_error(layers, images) -> None:
    net = quantized(layers, *PLACES, images=images)
    both = net(images[0])
    with only_places(["conv.weight"]):
        one = net(images[0])
        with float_mode():
            assert torch.equal(net(images[0]), layers(images[0]))
        assert torch.equal(net(images[0]), one)
    with pytest.raises(KeyError), only_places(()):
        raise KeyError
    assert torch.equal(net(images[0]), both) and not torch.equal(one, both)
