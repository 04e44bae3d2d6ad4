"""Folded networks compute the same to the last bit, cost the same, and keep their weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qsr_plugin
from qsr_plugin import calibrate, complexity, fold, load_recipe, quantize_model, save_quantized
from qsr_plugin.checkpoint import CheckpointError
from qsr_plugin.deploy.folding import FoldedQuantizer
from qsr_plugin.errors import UserError
from qsr_plugin.quant.surgery import quantizers, sites
from qsr_plugin.report.complexity_types import CONVENTIONS
from qsr_plugin.report.sensitivity import sensitivity
from tests.backbones import FITTING
from tests.recipes import METHODS

methods = pytest.mark.parametrize("method", METHODS)
#: One convention for each way to count parameters.
LEARNING = {rule.params: name for name, rule in CONVENTIONS.items()}.values()
#: Every backbone, with two recipes that differ in where the grid of a weight comes from.
BACKBONES = [(method, backbone) for method, backbone in FITTING if method in ("ddtb", "2dquant") and backbone != "EDSR"]


def output(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


@pytest.mark.parametrize(("method", "backbone"), [*((method, "EDSR") for method in METHODS), *BACKBONES])
def test_the_output_is_the_same_to_the_last_bit(quantized, images, method: str, backbone: str) -> None:
    net = quantized(method, backbone)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    folded = fold(net.train())
    assert net.training and not folded.training
    assert torch.equal(output(net.eval(), images[0]), output(folded, images[0]))
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items()), "the network is left alone"
    assert not any(isinstance(quantizer, FoldedQuantizer) for _, quantizer in quantizers(net))


@methods
def test_weights_have_at_most_as_many_values_as_their_bits_and_say_their_grid(quantized, method: str) -> None:
    folded = fold(quantized(method, bits=3))
    seen = 0
    for _, site in sites(folded):
        if (quantizer := site.quantizer("weight")) is None:
            continue
        grid, seen = quantizer.qparams(), seen + 1
        per_channel = grid.scale.dim() == 1
        for part in site.weight if per_channel else [site.weight]:
            assert len(part.unique()) <= (8 if quantizer.candidates == (3,) else 256)
        shape = (-1, *[1] * (site.weight.dim() - 1)) if per_channel else ()
        codes = site.weight / grid.scale.view(shape) + grid.zero_point.view(shape)
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        assert grid.qmin <= codes.round().min() and codes.round().max() <= grid.qmax
        assert torch.equal(quantizer.qparams_of(site.weight).scale, grid.scale)
        assert not site.weight.requires_grad
    assert seen


@methods
def test_costs_are_reported_as_before(quantized, images, method: str) -> None:
    net = quantized(method)
    folded = fold(net)
    output(net, images[0]), output(folded, images[0])  # where bits depend on the image, those of the last one count
    for convention in LEARNING:
        assert complexity(folded, (4, 4), convention=convention) == complexity(net, (4, 4), convention=convention)


def test_folding_twice_and_folding_a_float_network_change_nothing(quantized, tiny_net, images) -> None:
    net = quantized("dorefa")
    once, plain = fold(net), tiny_net()
    assert torch.equal(output(fold(once), images[0]), output(net, images[0]))
    assert torch.equal(output(fold(plain), images[0]), output(plain, images[0]))


def test_calibrating_again_moves_activations_alone(quantized, images) -> None:
    folded = fold(quantized("minmax"))
    weights = {name: site.weight.clone() for name, site in sites(folded) if site.quantizer("weight") is not None}
    before = output(folded, images[0])
    calibrate(folded, [batch * 0.2 for batch in images])
    assert weights and all(torch.equal(folded.get_submodule(name).weight, value) for name, value in weights.items())
    assert not torch.equal(output(folded, images[0]), before)


def test_layers_that_share_a_weight_share_its_quantized_values() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(3)])
    net[1].weight = net[2].weight = net[0].weight
    rules = [{"match": name, "port": "weight"} for name in ("0", "1")]
    recipe = {"base": "minmax", "placement": "here", "placements": {"here": rules}}
    x = torch.rand(1, 3, 4, 4)
    net = calibrate(quantize_model(net, load_recipe(recipe, weight_bits=2)), [x]).eval()
    folded = fold(net)
    assert folded[0].weight is folded[1].weight and torch.equal(folded[2].weight, net[2].weight)
    assert torch.equal(output(folded, x), output(net, x))


def test_what_cannot_be_folded_says_why(quantized, tiny_net, images) -> None:
    with pytest.raises(UserError, match=r"not calibrated: body.0.conv1.input \(\d+ places in all\).*calibrate"):
        fold(quantize_model(tiny_net(), load_recipe("pams", placement="body")))
    net = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 3, 1)))
    rules = [{"match": "0", "port": "weight"}]
    quantize_model(net, {"base": "pams", "placement": "here", "placements": {"here": rules}})
    with pytest.raises(UserError, match="the weight of 0 is computed anew in each forward: remove the parametrization"):
        fold(net)


def test_a_folded_network_is_not_saved_or_measured_as_if_its_weights_were_float(quantized, images, tmp_path) -> None:
    folded = fold(quantized("pams"))
    with pytest.raises(CheckpointError, match="weights of this network are folded.*save_packed"):
        save_quantized(folded, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="are folded.*no layer can be run in float"):
        sensitivity(folded, images)
    assert not list(tmp_path.iterdir())


def test_public_names() -> None:
    assert {"fold", "export_onnx"} <= set(qsr_plugin.__all__) and qsr_plugin.fold is fold
