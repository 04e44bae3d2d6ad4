"""MACs, bits and BitOPs against hand counts."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from qsr_plugin.archs.quant_net_arch import build_backbone
from torch import Tensor, nn

from qsr_plugin import complexity, list_backbones, list_methods, load_recipe, quantize_model
from qsr_plugin.quant.policy import policy_class
from qsr_plugin.quant.sites import MatMul
from qsr_plugin.quant.surgery import quantizers
from qsr_plugin.report.complexity import CONVENTIONS
from qsr_plugin.report.fab import feature_average_bits
from tests.backbones import FITTING, names_of
from tests.recipes import custom_recipe

EDSR_BASELINE = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 64, "num_block": 16, "upscale": 4}
BODY_CONV = 64 * 64 * 9 * 180 * 320


def row(report, name: str):
    return next(site for site in report.sites if site.name == name)


def test_edsr_baseline_equals_the_hand_count() -> None:
    report = complexity(build_backbone(EDSR_BASELINE))
    head, tail = 3 * 64 * 9 * 180 * 320, 64 * 3 * 9 * 720 * 1280
    upsampler = 64 * 256 * 9 * (180 * 320 + 360 * 640)
    assert report.macs == head + 33 * BODY_CONV + upsampler + tail == 114_230_476_800
    assert row(report, "body.7.conv2").macs == BODY_CONV == 2_123_366_400
    assert len(report.sites) == 1 + 32 + 1 + 2 + 1
    assert report.parameters == 1_517_571


@pytest.mark.parametrize("backbone", list_backbones())
def test_mmengine_counts_the_same(tiny, backbone: str) -> None:
    net = tiny(backbone)
    analyzer = FlopAnalyzer(net, (torch.zeros(1, 3, 12, 20),)).unsupported_ops_warnings(False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's own
        by_module = analyzer.by_module_and_operator()
    report = complexity(net, (12, 20))
    kinds = {kind for counted in by_module.values() for kind in counted} & {"conv", "linear", "matmul"}
    products = {name: sum(by_module[name][kind] for kind in kinds) for name, _ in net.named_modules()}
    own = {
        name: products[name] - sum(products[f"{name}.{child}".lstrip(".")] for child, _ in module.named_children())
        for name, module in net.named_modules()
    }
    assert {site.name: site.macs for site in report.sites} == {name: macs for name, macs in own.items() if macs}
    assert report.macs == products[""] > 0


class Mixed(nn.Module):
    """Every kind of layer, and one matrix product written as an expression."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4, bias=False)
        self.transposed = nn.ConvTranspose2d(12, 6, 4, stride=2, padding=1, groups=2)
        self.linear = nn.Linear(6, 5)
        self.product = MatMul()

    def forward(self, x: Tensor) -> Tensor:
        x = self.transposed(self.grouped(self.plain(x)))
        tokens = self.linear(x.flatten(2).transpose(1, 2))
        return self.product(tokens.transpose(1, 2), tokens) @ torch.zeros(5, 7, device=x.device)


def test_grouped_strided_transposed_linear_and_matrix_products() -> None:
    report = complexity(Mixed(), (16, 24))
    assert {site.name: (site.kind, site.macs) for site in report.sites} == {
        "(network)": ("expression", 5 * 5 * 7),
        "plain": ("Conv2d", 3 * 8 * 9 * 16 * 24),
        "grouped": ("Conv2d", 12 * (8 // 4) * 9 * 8 * 12),
        "transposed": ("ConvTranspose2d", 12 * (6 // 2) * 16 * 8 * 12),
        "linear": ("Linear", 6 * 5 * 16 * 24),
        "product": ("MatMul", 5 * 5 * 16 * 24),
    }


def test_bits_of_every_kind_of_layer() -> None:
    layers = ("grouped", "transposed", "linear")
    rules = [{"match": name, "port": port} for name in layers for port in ("input", "weight")]
    rules += [{"match": "product", "port": "left"}, {"match": "product", "port": "right", "bits": 6}]
    report = complexity(quantize_model(Mixed(), load_recipe(custom_recipe(*rules, act=5, weight=3))), (16, 24))
    assert {site.name: (site.weight_bits, site.act_bits, site.quantized) for site in report.sites} == {
        "(network)": (32, 32, False),
        "plain": (32, 32, False),
        "grouped": (3, 5, True),
        "transposed": (3, 5, True),
        "linear": (3, 5, True),
        "product": (6, 5, True),
    }
    assert row(report, "transposed").kind == "ConvTranspose2d"


@pytest.mark.parametrize("backbone", list_backbones())
def test_macs_bits_convention_counts_float_layers_as_32_by_32(tiny, backbone: str) -> None:
    report = complexity(tiny(backbone, "minmax", weight_bits=3, act_bits=5), (6, 10))
    quantized = sum(site.macs for site in report.sites if site.quantized)
    assert 0 < quantized < report.macs
    assert report.bitops_quantized == quantized * 3 * 5
    assert report.bitops == report.bitops_quantized + (report.macs - quantized) * 1024


@pytest.mark.parametrize("backbone", list_backbones())
def test_float_network(tiny, backbone: str) -> None:
    report = complexity(tiny(backbone), (6, 10))
    assert (report.fab, report.weighted_fab, report.bitops, report.bitops_quantized) == (32, 32, report.macs * 1024, 0)
    assert report.method == "float"
    assert report.storage_bits == report.float_storage_bits
    assert not any(site.quantized or site.in_fab for site in report.sites)


#: Recipes that have one bit width if they are given one.
ONE_WIDTH = [name for name in list_methods() if not policy_class(load_recipe(name).policy.type).reach]


@pytest.mark.parametrize(("method", "backbone"), [pair for pair in FITTING if pair[0] in ONE_WIDTH])
def test_fixed_four_bits_have_fab_four(tiny, backbone: str, method: str) -> None:
    net = tiny(backbone, method, weight_bits=4, act_bits=4)
    report = complexity(net, (6, 10))
    assert report.fab == report.weighted_fab == 4.0
    net(torch.rand(2, 3, 6, 10))
    assert feature_average_bits(net, net.last_record()) == report.fab
    assert report.method == f"{method} W4A4"
    assert report.network == backbone


def test_ranges_found_at_run_time_are_counted_beside_the_bit_operations(tiny) -> None:
    """Two blocks of two convolutions with 8 x 6 x 10 inputs; the second one of a block reads the result of a ReLU."""
    report, places = complexity(tiny("EDSR", "daq", weight_bits=4, act_bits=4), (6, 10)), 2 * 8 * 6 * 10
    assert report.overhead == places * (7 + 6) == report.to_dict()["overhead"]
    assert complexity(tiny("EDSR", "daq", calibrated=False), (6, 10)).overhead == places * (7 + 7)
    static = complexity(tiny("EDSR", "minmax", weight_bits=4, act_bits=4), (6, 10))
    assert (static.overhead, static.bitops) == (0, report.bitops)


@pytest.mark.parametrize("backbone", list_backbones())
def test_first_and_last_layers_at_bits_of_their_own_are_not_in_fab(tiny, backbone: str) -> None:
    report = complexity(tiny(backbone, "minmax", placement="full", weight_bits=3, act_bits=3), (6, 10))
    assert report.fab == report.weighted_fab == 3.0
    quantized = [site for site in report.sites if site.quantized]
    assert {(site.weight_bits, site.act_bits, site.in_fab) for site in quantized} == {(3, 3, True), (8, 8, False)}
    left = [site.name for site in report.sites if not site.quantized and site.kind != "expression"]
    shifts = ["sub_mean.shifter", "add_mean.shifter"] if backbone == "CARN" else []
    assert [name for name in left if not ("conv_block" in name and backbone == "HAT")] == shifts


#: Their blocks start with a norm, so that no layer reads the block's input.
NORM_FIRST = ("SwinIR", "HAT")


@pytest.mark.parametrize("backbone", [name for name in list_backbones() if name not in NORM_FIRST])
def test_a_layer_has_the_bits_of_the_tensor_it_receives(tiny, backbone: str) -> None:
    """A quantized identity path alone leaves the first convolution with the raw 32-bit tensor."""
    net = tiny(backbone)
    first, later = names_of(net, "block.conv_first"), names_of(net, "block.conv_later")
    both = complexity(tiny(backbone, "pams", weight_bits=4, act_bits=4), (6, 10))
    assert {row(both, name).act_bits for name in (*first, *later)} == {4}
    only = complexity(tiny(backbone, "pams", weight_bits=4, act_bits=4, placement="shortcut_only"), (6, 10))
    assert {row(only, name).act_bits for name in first} == {32} and {row(only, name).act_bits for name in later} == {4}
    assert all(row(only, name).quantized and not row(only, name).in_fab for name in first)
    assert only.fab == 4.0
    assert only.bitops > both.bitops


class Between(nn.Module):
    """A convolution whose input is quantized further up, in a module that leaves it alone or changes it."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change, self.conv = change, nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.change == "in place":
            x.mul_(0.3)
        return self.conv(x + 0.1 if self.change == "new tensor" else x)


@pytest.mark.parametrize(("change", "bits"), [("none", 5), ("in place", 32), ("new tensor", 32)])
def test_a_quantized_tensor_that_was_changed_counts_as_float(change: str, bits: int) -> None:
    net = nn.Sequential(nn.Identity(), Between(change))
    quantize_model(net, load_recipe(custom_recipe({"match": "1", "port": "input"}, act=5)))
    assert row(complexity(net, (4, 4)), "1.conv").act_bits == bits


def test_a_layer_used_twice_costs_twice_and_has_its_widest_input() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 1)
            self.again = self.first
            self.gate = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.first(self.gate(x)))

    net = quantize_model(Twice(), load_recipe(custom_recipe({"match": "gate", "port": "output"})))
    report = complexity(net, (4, 5))
    assert [(site.name, site.macs, site.act_bits) for site in report.sites] == [("first", 2 * 9 * 20, 32)]
    assert report.float_storage_bits == 32 * (9 + 3)


@pytest.mark.parametrize("backbone", list_backbones())
@pytest.mark.parametrize("recipe", [None, "pams"])
def test_the_network_is_left_as_it_is_and_needs_no_calibration(tiny, backbone: str, recipe: str | None) -> None:
    net = tiny(backbone, recipe, calibrated=False).train()
    state = copy.deepcopy(net.state_dict())
    attributes = {name: dict(vars(module)) for name, module in net.named_modules()}
    report = complexity(net, (6, 10))
    assert report.macs > 0
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    for name, module in net.named_modules():
        assert all(value is attributes[name][key] for key, value in vars(module).items() if isinstance(value, Tensor))
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert not any(quantizer.is_calibrated for _, quantizer in quantizers(net) if quantizer.needs_calibration)
    if recipe is not None:
        with pytest.raises(RuntimeError, match="no forward was recorded"):
            net.last_record()


def test_the_size_of_the_input_scales_the_macs_only(tiny) -> None:
    net = tiny("EDSR", "pams")
    small, large = complexity(net, (5, 7)), complexity(net, (10, 21))
    assert large.macs == 6 * small.macs
    assert large.bitops == 6 * small.bitops
    assert (large.fab, large.storage_bits) == (small.fab, small.storage_bits)
    assert complexity(net).input_size == (180, 320)


def test_report_is_plain_data(tiny) -> None:
    report = complexity(tiny("SRResNet", "pams"), (6, 10))
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["convention_text"] == CONVENTIONS["macs-bits"].stated
    assert data["input_size"] == [6, 10]
    assert data["sites"][1]["name"] == "body.0.conv1"
    assert sum(site["macs"] for site in data["sites"]) == data["macs"]


@pytest.mark.parametrize("wrong", [(0, 4), (4,), (4.0, 4), (-1, 4)])
def test_impossible_size(tiny, wrong: tuple) -> None:
    with pytest.raises(ValueError, match="input_size is"):
        complexity(tiny("EDSR"), wrong)


def test_unknown_convention(tiny) -> None:
    with pytest.raises(ValueError, match="Did you mean 'cadyq'"):
        complexity(tiny("EDSR"), (4, 4), convention="cadyk")
