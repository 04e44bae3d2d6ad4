"""Weights with a range per output channel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import calibrate, complexity, load_recipe, quantize_model
from qsr_plugin.methods.per_channel import ChannelQuantizer
from qsr_plugin.quant.surgery import sites
from tests.quant.builders import calibrate_on


def quantizer(weight: Tensor, bits: int = 4) -> ChannelQuantizer:
    made = ChannelQuantizer(ChannelQuantizer.Options(), (bits,), "weight", 0, channels=len(weight))
    return calibrate_on(made, weight)


def with_bound(bound: list[float], bits: int) -> ChannelQuantizer:
    made = quantizer(torch.ones(len(bound), 2), bits)
    with torch.no_grad():
        made.bound.copy_(torch.tensor(bound))
    return made


def test_levels_of_two_channels() -> None:
    # 2 bits: codes -2..1 of steps 0.5 and 2.
    q = with_bound([1.0, 4.0], 2)
    x = torch.tensor([[-1.3, -0.6, 0.2, 0.3, 9.0], [-5.0, -2.9, 0.9, 1.1, 9.0]])
    assert q(x).tolist() == [[-1.0, -0.5, 0.0, 0.5, 0.5], [-4.0, -2.0, 0.0, 2.0, 2.0]]


def test_gradients_by_hand() -> None:
    q = with_bound([1.0], 2)
    x = torch.tensor([[-1.3, 0.2, 0.3, 0.7]], requires_grad=True)
    q(x).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    # Clipped ones move by -1 and 1/2 of the bound, those inside by (x_q - x) / bound: 0 - 0.2 and 0.5 - 0.3.
    assert q.bound.grad.item() == pytest.approx(-1 + 0.5 - 0.2 + 0.2, abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_channel_starts_with_its_own_least_error(bits: int) -> None:
    weight = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 10.0, 0.1, 1e-3, 0.0]
    ).view(-1, 1, 1, 1)
    q = quantizer(weight, bits)
    best = (q(weight) - weight).square().flatten(1).sum(1)
    for factor in (0.5, 0.7, 0.9, 0.95):
        other = with_bound((q.bound.detach() * factor).tolist(), bits)
        assert bool((best <= (other(weight) - weight).square().flatten(1).sum(1) * 1.03 + 1e-20).all())
    assert bool((q.bound[:4] > 0).all()) and bool(torch.isfinite(q(weight)).all())


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_have_a_range_for_each_output_channel_as_well(images, groups: int) -> None:
    rules = [{"match": "1", "port": "weight"}]
    recipe = {"base": "auto", "placement": "x", "placements": {"x": rules}}
    up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=groups)
    with torch.no_grad():
        up.weight[:, 1] *= 100
    net = calibrate(quantize_model(nn.Sequential(nn.Conv2d(3, 8, 1), up), load_recipe(recipe)), images)
    bound = net[1].quantizer("weight").bound
    assert bound.shape == (6 // groups,) and bool((bound[1] > 30 * bound[[0, 2]]).all())
    net(images[0]).sum().backward()
    assert bool(torch.isfinite(bound.grad).all())


def test_grid_and_storage() -> None:
    q = with_bound([1.0, 4.0], 4)
    grid = q.qparams()
    assert grid.scale.tolist() == [0.125, 0.5] and grid.zero_point.tolist() == [0, 0]
    assert (grid.qmin, grid.qmax) == (-8, 7) and q.extra_storage_bits() == 64


def test_a_network_counts_a_range_for_each_channel(tiny_net, images) -> None:
    recipe = {"base": "minmax", "quantizers": {"weight": "per_channel"}}
    net = calibrate(quantize_model(tiny_net("EDSR"), load_recipe(recipe, weight_bits=4, act_bits=4)), images)
    tensor = calibrate(quantize_model(tiny_net("EDSR"), load_recipe("minmax", weight_bits=4, act_bits=4)), images)
    layers = [site for _, site in sites(net) if site.quantizer("weight") is not None]
    more = 32 * sum(site.out_channels - 1 for site in layers)
    assert complexity(net).storage_bits - complexity(tensor).storage_bits == more
