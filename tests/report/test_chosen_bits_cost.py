"""Costs of networks whose bits a policy chooses: by the last forward, by a set of images, in patches."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import complexity, load_recipe, quantize_model
from qsr_plugin.quant.policy import POLICIES, BitDecision, BitPolicy
from qsr_plugin.quant.record import ForwardRecord, float_mode
from qsr_plugin.quant.surgery import quantizers
from tests.recipes import custom_recipe


class ByOrder(BitPolicy):
    """4 bits at the first place of a forward, 4 and 8 alternating over the images at the others.

    Multiplies on the way, which is not to be counted among the layers.
    """

    def decide(self, features: Tensor, record: ForwardRecord | None) -> BitDecision:
        features = nn.functional.conv2d(features, features.new_ones(1, features.shape[1], 1, 1))
        second = 8 if record.bits else 4
        return BitDecision(torch.tensor([4, second] * features.shape[0], device=features.device)[: features.shape[0]])

    def overhead_ops(self, shape: torch.Size) -> int:
        return 3 * shape.numel()

    def shared_ops(self, record: ForwardRecord) -> int:
        return 10 * record.pixels


@pytest.fixture
def chosen_bits(monkeypatch) -> nn.Module:
    """Two convolutions, of 3x4 and 4x12 weights, whose bits a policy chooses."""
    monkeypatch.setitem(POLICIES, "by_order", ByOrder)
    rules = [{"match": "?", "port": port} for port in ("input", "weight")]
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 12, 1))
    quantize_model(net, load_recipe(custom_recipe(*rules, act=[4, 8], policy="by_order")))
    for _, quantizer in quantizers(net):
        with torch.no_grad():
            quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
        quantizer.mark_calibrated()
    return net


def test_without_a_record_the_static_part_is_reported(chosen_bits: nn.Module) -> None:
    never = complexity(chosen_bits, (4, 4))
    with float_mode():
        chosen_bits(torch.zeros(1, 3, 4, 4))
    for report in (never, complexity(chosen_bits, (4, 4))):
        assert (report.fab, report.weighted_fab, report.bitops, report.bitops_quantized) == (None,) * 4
        assert [(site.macs, site.weight_bits, site.act_bits) for site in report.sites] == [
            (192, 4, None),
            (768, 4, None),
        ]
        assert all(site.quantized and site.in_fab for site in report.sites)
        assert (report.macs, report.parameters) == (960, 16 + 60)
        assert report.storage_bits < report.float_storage_bits
        assert json.loads(json.dumps(report.to_dict()))["fab"] is None


def test_chosen_bits_come_from_the_last_forward(chosen_bits: nn.Module) -> None:
    chosen_bits(torch.zeros(4, 3, 2, 2))
    report = complexity(chosen_bits, (4, 4))
    assert [site.act_bits for site in report.sites] == [4, 6]
    assert report.fab == 5
    assert report.weighted_fab == pytest.approx((4 * 12 + 6 * 48) / 60)
    assert report.bitops == 16 * (12 * 4 * 4 + 48 * 4 * 6)
    assert report.method == "hand W4A4/8"


def test_bits_of_a_set_are_used_where_they_are_given(chosen_bits: nn.Module) -> None:
    chosen_bits(torch.zeros(4, 3, 2, 2))
    report = complexity(chosen_bits, (4, 4), bits={"0.input": 5.0, "1.input": 7.5})
    assert [site.act_bits for site in report.sites] == [5.0, 7.5]
    assert report.fab == 6.25
    assert report.bitops == 16 * (12 * 4 * 5 + 48 * 4 * 7.5)
    with pytest.raises(ValueError, match=r"bits say nothing of 1\.input"):
        complexity(chosen_bits, (4, 4), bits={"0.input": 5.0})


def test_choosing_bits_is_counted_beside_the_layers(chosen_bits: nn.Module) -> None:
    """Two places with 3 and 4 channels, three operations per element, ten per pixel for both together."""
    report = complexity(chosen_bits, (4, 5), bits={"0.input": 4, "1.input": 4})
    assert report.policy_ops == 20 * (3 * 3 + 3 * 4 + 10)
    assert (report.macs, report.overhead) == (20 * 60, 0)
    assert complexity(quantize_model(nn.Sequential(nn.Conv2d(3, 4, 1)), load_recipe(custom_recipe(
        {"match": "0", "port": "input"}))), (4, 5)).policy_ops == 0  # fmt: skip


def test_patches_cost_what_they_overlap(chosen_bits: nn.Module) -> None:
    """1280x720 at x4 in patches of 96 with step 90: one row, columns 0, 90 and 180, so 332 instead of 320 pixels."""
    bits = {"0.input": 4, "1.input": 6}
    whole = complexity(chosen_bits, bits=bits)
    cut = complexity(chosen_bits, bits=bits, patches={"size": 96, "overlap": 6, "last": "enlarge"})
    assert cut.macs / whole.macs == cut.bitops / whole.bitops == cut.policy_ops / whole.policy_ops == 332 / 320
    assert (cut.fab, cut.storage_bits) == (whole.fab, whole.storage_bits)
    assert cut.to_dict()["protocol"] == "patches of 96x96, overlap 6, last enlarged"
    assert whole.to_dict()["protocol"] == "whole images" and whole.to_dict()["patches"] is None
    assert cut.to_dict()["patches"] == {"size": 96, "overlap": 6, "last": "enlarge"}
    with pytest.raises(ValueError, match=r"patches\.sise: unknown key"):
        complexity(chosen_bits, patches={"sise": 96})


@pytest.mark.parametrize(
    ("method", "ops"),
    [
        ("adabm", 19 * 60),
        # Four places of eight channels that choose among three widths.
        ("cadyq", 19 * 60 + 4 * (3 * 8 * 60 + 2 * 3 * (8 + 2))),
        # Eight channels at three scales, three widths to choose from.
        ("granular_dq", 165 * 60 + 12 * 8 * 60 + 2 * 3 * 8 * 3),
    ],
)
def test_what_published_policies_spend(tiny, method: str, ops: int) -> None:
    """On 6 x 10 pixels, at the inputs of two blocks' convolutions; a fixed width costs nothing to choose."""
    net = tiny("EDSR", method, placement="body")
    assert complexity(net, (6, 10)).policy_ops == ops
    assert complexity(tiny("EDSR", "pams"), (6, 10)).policy_ops == 0
