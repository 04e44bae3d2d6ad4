"""Sites: any layer equals its float self at 32 bits, and the float layer fed with quantized operands below."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from qsr_plugin.methods.pams import MaxAbsQuantizer, PAMSQuantizer
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.policy import FixedBits
from qsr_plugin.quant.quantizer import StrictOptions
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.sites import (
    MatMul,
    PortSite,
    QuantConv2d,
    QuantLinear,
    QuantMatMul,
    derived_class,
    register_site_class,
    site_class_for,
)
from qsr_plugin.quant.surgery import quantize_model
from tests.quant.builders import ACTS, over


class ScaledConv(nn.Conv2d):
    """A subclass with a forward of its own, as backbones have."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x * 0.5, self.weight, self.bias, padding=1).tanh()


LAYERS = {
    "plain": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "no bias": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
    "subclass": lambda: ScaledConv(4, 6, 3),
    "linear": lambda: nn.Linear(8, 5),
    "prelu": lambda: nn.PReLU(4),
}
layers = pytest.mark.parametrize("kind", LAYERS)


def recipe(bits: int, *rules: dict, act: int | None = None) -> dict:
    return {
        "method": "mine",
        "bits": {"weight": bits, "act": act or bits},
        "quantizers": {"act": "pams", "weight": "maxabs"},
        "placement": "all",
        "placements": {"all": list(rules) or [{"match": "0", "port": p} for p in ("input", "weight", "output")]},
    }


def layer_and_input(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(LAYERS[kind]()), torch.randn(2, 4, 9, 8)


@layers
def test_at_32_bits_a_layer_is_its_float_self(kind: str) -> None:
    net, x = layer_and_input(kind)
    want, keys = net(x), set(net.state_dict())
    quantize_model(net, recipe(32))
    assert torch.equal(net(x), want) and set(net.state_dict()) == keys


@layers
def test_at_4_bits_a_layer_is_the_float_layer_with_quantized_operands(kind: str) -> None:
    net, x = layer_and_input(kind)
    plain, pointer = copy.deepcopy(net[0]), net[0].weight.data_ptr()
    calibrate(quantize_model(net, recipe(4)), [x])
    site = net[0]
    q = MaxAbsQuantizer(MaxAbsQuantizer.Options(), (4,), "weight", 0)
    with torch.no_grad():
        plain.weight.copy_(q(plain.weight))
    x_q = site.quantizer("input")(x)
    want = site.quantizer("output")(plain(x_q))
    assert not torch.equal(x_q, x)
    assert torch.equal(net(x), want)
    assert site.weight.data_ptr() == pointer, "the parameter is the float layer's own"
    out = net(x)
    out.sum().backward()
    for parameter in net.parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
    assert "weight" not in site.__dict__ and isinstance(site.weight, nn.Parameter)


@layers
def test_the_float_layer_is_back_in_full_after_a_forward_that_fails(kind: str) -> None:
    net, x = layer_and_input(kind)
    calibrate(quantize_model(net, recipe(4)), [x])
    net[0].quantizer("output").quantize = None
    with pytest.raises(TypeError):
        net(x)
    assert "weight" not in net[0].__dict__


def test_a_weight_made_by_a_parametrization_is_refused_not_ignored() -> None:
    net = nn.Sequential(weight_norm(nn.Conv2d(3, 3, 3)))
    with pytest.raises(RecipeError, match="remove_parametrizations"):
        quantize_model(net, recipe(4))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weight_computed_before_each_forward_is_quantized() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 3, 3))), torch.randn(1, 3, 6, 6)
    want = net(x)
    calibrate(quantize_model(net, recipe(2, {"match": "0", "port": "weight"})), [x])
    assert net[0].quantized_weight().unique().numel() <= 3
    assert not torch.equal(net(x), want)


def test_matrix_product_quantizes_each_operand_with_its_own_range() -> None:
    torch.manual_seed(0)
    net = nn.Module()
    net.product = site = QuantMatMul.from_float(MatMul(), "product")
    left, right = torch.randn(2, 3, 4), torch.randn(2, 4, 5) * 10
    assert torch.equal(site(left, right), left @ right)
    for port, alpha in (("left", 1.0), ("right", 9.0), ("output", 20.0)):
        q = PAMSQuantizer(PAMSQuantizer.Options(), (4,), "act", -1)
        with torch.no_grad():
            q.set_range(torch.tensor(-alpha), torch.tensor(alpha))
        q.mark_calibrated()
        site.add_quantizer(port, q, FixedBits(StrictOptions(), (4,)))
    want = site.quantizer("output")(site.quantizer("left")(left) @ site.quantizer("right")(right))
    assert torch.equal(site(left, right), want) and site.quantizer("left").site == "product.left"
    assert site_class_for(MatMul(), {"left"}) is QuantMatMul


class Block(nn.Module):
    """A block that takes more than one argument."""

    def forward(self, x: Tensor, scale: float, *, shift: float = 0.0) -> Tensor:
        return x * scale + shift


class BlockNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.unused = Block(), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, 2.0, shift=1.0)


def test_ports_around_any_module_pass_further_arguments_on() -> None:
    x = torch.linspace(-1, 1, 24).view(1, 1, 4, 6)
    rules = [{"match": "block", "port": "input"}, {"match": "block", "port": "output"}]
    net = calibrate(quantize_model(BlockNet(), recipe(4, *rules)), [x])
    block = net.block
    assert isinstance(block, PortSite) and isinstance(block, Block)
    want = block.quantizer("output")(block.quantizer("input")(x) * 2.0 + 1.0)
    assert torch.equal(net(x), want)


@pytest.mark.parametrize(("kind", "res_scale"), [("EDSR", 0.3), ("MSRResNet", 1), ("SRResNet", 1)])
def test_blocks_with_a_shortcut_port_compute_what_the_backbones_block_computes(tiny_net, kind, res_scale) -> None:
    net = tiny_net(kind, **({"res_scale": res_scale} if kind == "EDSR" else {}))
    block, x = net.body[0], torch.randn(2, 8, 7, 5, generator=torch.Generator().manual_seed(0))
    want = block(x)
    chosen = site_class_for(block, {"shortcut", "input"})
    assert "shortcut" in chosen.ports and issubclass(chosen, type(block))
    chosen.from_float(block, "body.0")
    assert torch.equal(block(x), want)


@over(ACTS)
def test_an_activation_may_change_a_quantized_output_in_place(name: str, role: str) -> None:
    x, found = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0)), []
    for in_place in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(in_place))
        given = recipe(4, {"match": "0", "port": "output"}) | {"quantizers": {"act": name, "weight": "maxabs"}}
        calibrate(quantize_model(net, given), [x])
        net(x).square().sum().backward()
        found.append(net[0].weight.grad)
    assert torch.equal(*found) and bool(found[0].abs().sum() > 0)


def test_results_are_kept_where_only_a_convolution_reads_them() -> None:
    ports = ("input", "weight", "output")
    rules = [{"match": "0", "port": port} for port in ports]
    net = quantize_model(nn.Sequential(nn.Conv2d(1, 1, 1)), recipe(4, *rules))
    assert [net[0].quantizer(port).only_read for port in ports] == [True, True, False]
    block = quantize_model(BlockNet(), recipe(4, {"match": "block", "port": "input"})).block
    assert not block.quantizer("input").only_read


def test_classes_are_made_once_and_know_their_ports() -> None:
    assert derived_class(PortSite, Block) is derived_class(PortSite, Block)
    assert site_class_for(nn.Conv2d(1, 1, 1), {"weight"}) is QuantConv2d
    assert site_class_for(nn.Linear(1, 1), {"input"}) is QuantLinear
    assert (QuantConv2d.channel_axis, QuantLinear.channel_axis) == (1, -1)
    with pytest.raises(ValueError, match="Block has no port 'weight'. Ports of this module: input, output"):
        site_class_for(Block(), {"weight"})
    with pytest.raises(TypeError, match="must derive from Site and Block"):
        register_site_class(Block, QuantConv2d)


def test_hooks_and_buffers_survive_the_change_of_class() -> None:
    net, x = layer_and_input("plain")
    calls: list[int] = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    net[0].register_buffer("mine", torch.ones(2))
    calibrate(quantize_model(net, recipe(4)), [x])
    net(x)
    assert len(calls) == 2 and torch.equal(net.state_dict()["0.mine"], torch.ones(2))
