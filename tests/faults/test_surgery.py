"""Networks and recipes that do not fit each other, or that are unusual but must work."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.sites import Site
from qsr_plugin.quant.surgery import quantize_model, quantizers, tap
from tests.backbones import FITTING
from tests.recipes import by_role


def recipe(*rules: dict, **changes: object):
    return load_recipe({"base": "pams", "placement": "mine", "placements": {"mine": list(rules)}, **changes})


def refused(net: nn.Module, *rules: dict, **changes: object) -> str:
    with pytest.raises(ValueError) as error:
        quantize_model(net, recipe(*rules, **changes))
    assert not any(isinstance(module, Site) for module in net.modules()), "a refused network is left as it was"
    return str(error.value)


# -- recipes that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"match": "body.*.cnov1", "port": "input"}, r"rule 1 .*'body\.\*\.cnov1' matches no module of EDSR\. Near: .*body\.0\.conv1"),
        ({"match": "conv_frist", "port": "input"}, r"Near: .*conv_first"),
        ({"role": "blok.conv", "port": "input"}, r"EDSR has no role 'blok\.conv'\. Did you mean 'block\.conv'"),
        ({"match": "conv_last", "port": "inptu"}, r"Conv2d has no port 'inptu'\. Ports of this module: input, weight, output"),
        ({"match": "body.0", "port": "weight"}, r"ResidualBlockNoBN has no port 'weight'"),
        ({"match": "conv_last"}, r"say the port, one of input, weight, output"),
        ({"match": "conv_last", "port": "input", "quantizer": "maxabs"}, r"'maxabs' is for weight, port 'input' needs act"),
        ({"match": "conv_last", "port": "weight", "quantizer": "pams"}, r"'pams' is for act, port 'weight' needs weight"),
        ({"match": "conv_last", "type": "conv2d", "port": "input"}, r"'conv_last' of type conv2d matches no module"),
    ],
)  # fmt: skip
def test_rules_that_do_not_fit_are_named(tiny_net, rule: dict, message: str) -> None:
    assert re.search(message, refused(tiny_net(), {"match": "conv_last", "port": "output"}, rule))


def test_roles_need_layers_that_can_play_them() -> None:
    message = refused(nn.Sequential(nn.PixelShuffle(1)), {"role": "block.conv", "port": "input"})
    assert "Sequential has no role table, and no convolution" in message and "EDSR" in message and "'match'" in message
    message = refused(nn.Sequential(nn.Conv2d(3, 3, 3)), {"role": "block.conv", "port": "input"})
    assert "Sequential has no role 'block.conv'. Allowed: body_end, head, tail, upsampler." in message


def test_candidates_need_a_policy_that_chooses(tiny_net) -> None:
    assert "takes one bit width" in refused(tiny_net(), {"match": "conv_last", "port": "input"}, bits={"act": [4, 8]})


def test_a_network_refused_once_can_be_quantized_afterwards(tiny_net, images) -> None:
    net = tiny_net()
    refused(net, {"match": "body.*.conv1", "port": "weight"}, {"match": "body.0", "port": "weight"})
    calibrate(quantize_model(net, "pams"), images)
    assert torch.equal(net(images[0]), calibrate(quantize_model(tiny_net(), "pams"), images)(images[0]))


def test_quantizing_twice_is_refused(tiny_net) -> None:
    net = quantize_model(tiny_net(), "pams")
    with pytest.raises(RuntimeError, match="already quantized with 'pams': build a fresh float network"):
        quantize_model(net, "minmax")
    float_bits = quantize_model(tiny_net(), load_recipe("pams", weight_bits=32, act_bits=32))
    with pytest.raises(RuntimeError, match="already quantized"):
        quantize_model(float_bits, "pams")


def test_taps_come_after_quantizing(tiny_net) -> None:
    with pytest.raises(RuntimeError, match="quantize the network first, then tap it"):
        quantize_model(tap(tiny_net(), "features", "f"), "pams")


# -- unusual networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "backbone"), FITTING)
def test_32_bits_reproduce_the_float_network_exactly(tiny_net, images, method: str, backbone: str) -> None:
    recipe = load_recipe(method)
    for placement in by_role(method):
        # Every bit width of the recipe is float, those of single rules included.
        rules = [{**r.model_dump(exclude_none=True), "bits": 32, "adapt": True} for r in recipe.placements[placement]]
        net = quantize_model(
            tiny_net(backbone),
            load_recipe(recipe, weight_bits=32, act_bits=32, placement="all", placements={"all": rules}),
        )
        calibrate(net, images)
        assert torch.equal(net(images[0]), tiny_net(backbone)(images[0])) and not list(quantizers(net))


class Shared(nn.Module):
    """One convolution and one in-place ReLU, each used in two places under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.act1 = self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act2(self.first(self.act1(x + 0))))


def test_a_module_under_two_names_gets_one_quantizer(images) -> None:
    rules = [{"match": name, "port": port} for name in ("first", "second") for port in ("input", "weight")]
    net = calibrate(quantize_model(Shared(), recipe(*rules)), images)
    assert [place for place, _ in quantizers(net)] == ["first.input", "first.weight"]
    net(images[0])
    assert list(net.last_record().bits) == ["first.input"]


def test_in_place_activations_do_not_reach_the_callers_tensor(images) -> None:
    """Quantizers before and after a shared in-place ReLU, in training: values kept, gradients as without in-place."""
    gradients = []
    for inplace in (True, False):
        torch.manual_seed(0)
        net = Shared()
        net.act1.inplace = inplace
        ports = [("first", "output"), ("act1", "input"), ("act1", "output")]
        quantize_model(net, recipe(*({"match": m, "port": p} for m, p in ports)))
        x, before = images[0] - 0.5, images[0] - 0.5
        calibrate(net, [x])
        net.train()(x).square().sum().backward()
        assert torch.equal(x, before)
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


def test_in_place_addition_on_a_quantized_result_trains(tiny_net, images) -> None:
    """EDSR adds its global skip in place to the last body convolution's result."""
    net = calibrate(quantize_model(tiny_net(), recipe({"role": "body_end", "port": "output"})), images)
    net(images[0]).sum().backward()
    assert net.conv_after_body.quantizer("output").alpha.grad is not None


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_after_a_quantized_convolution_sees_that_convolutions_result(
    tiny_net, images, training: bool
) -> None:
    net = calibrate(quantize_model(tiny_net("SRResNet", num_block=1), "pams"), images).train(training)
    block, seen = net.body[0], {}
    block.conv1.register_forward_hook(lambda module, args, out: seen.update(x=args[0].detach(), y=out.detach().clone()))
    mean = block.bn1.running_mean.clone()
    net(images[0])
    by_hand = nn.functional.conv2d(seen["x"], block.conv1.quantized_weight(), block.conv1.bias, padding=1)
    assert torch.equal(seen["y"], by_hand)
    moved = torch.lerp(mean, by_hand.mean((0, 2, 3)), 0.1)
    assert torch.allclose(block.bn1.running_mean, moved if training else mean, atol=1e-6)


def test_a_module_that_the_forward_never_reaches_is_named_by_calibration(tiny_net, images) -> None:
    net = tiny_net()
    net.spare = nn.Conv2d(3, 3, 1)
    quantize_model(net, recipe({"match": "conv_last", "port": "input"}, {"match": "spare", "port": "input"}))
    with pytest.raises(RuntimeError, match="spare.input: nothing was observed"):
        calibrate(net, images)
    assert not any(q.is_calibrated for _, q in quantizers(net)), "a failed calibration sets no range at all"


def test_a_recipe_error_is_a_value_error() -> None:
    assert issubclass(RecipeError, ValueError)
