"""Batch norms and image ranges folded into convolutions."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin.deploy.affine import fold_affine
from qsr_plugin.deploy.lowering import lower
from qsr_plugin.deploy.tail import collapse_tail
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.surgery import quantize_model
from tests.deploy.tails import SIZES, Tail, difference, lively


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def conv(before: int, after: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, **options)


@pytest.mark.parametrize(
    ("kind", "options", "ends"),
    [
        ("EDSR", {}, ("conv_first", "conv_last")),
        ("RDN", {}, ("SFENet1", "UPNet.2")),
        ("SwinIR", {"img_range": 255.0}, ("conv_first", "upsample.0")),
        ("SwinIR", {"img_range": 4.0, "upsampler": "", "upscale": 1}, ("conv_first", "conv_last")),
        ("HAT", {"img_range": 255.0}, ("conv_first", "conv_last")),
    ],
)
def test_the_image_range_goes_into_both_ends(
    kind: str, options: dict, ends: tuple[str, str], tiny_net: Callable[..., nn.Module]
) -> None:
    net = lively(tiny_net(kind, **options))
    before = deepcopy(net)
    (report,) = fold_affine(net)
    assert report.applied and report.step == "image range" and report.modules == ends
    assert net.img_range == 1 and net.backbone_options["img_range"] == 1
    assert not torch.equal(net.get_submodule(ends[1]).weight, before.get_submodule(ends[1]).weight)
    assert max(difference(before, net, size) for size in SIZES) <= 1e-5
    assert fold_affine(net) == []  # nothing is left to fold


@pytest.mark.parametrize("kind", ["MSRResNet", "CARN", "IDN"])
def test_nothing_to_fold(kind: str, tiny_net: Callable[..., nn.Module]) -> None:
    assert fold_affine(tiny_net(kind)) == []


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norms_go_into_their_convolutions(bias: bool, tiny_net: Callable[..., nn.Module]) -> None:
    net = lively(tiny_net("SRResNet", bias=bias))
    before = deepcopy(net)
    reports = fold_affine(net)
    assert len(reports) == 5 and all(report.applied for report in reports)
    assert reports[0].modules == ("body.0.conv1", "body.0.bn1")
    assert not [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert max(difference(before, net, size) for size in SIZES) <= 1e-5


class Used(Tail):
    """The result of the convolution before the norm is used in another place as well."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.tail[0](self.head(x))
        return self.tail[1](first) + first


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Used(conv(12, 3), nn.BatchNorm2d(3)), "something else reads"),
        (Tail(conv(12, 12), nn.ReLU(), nn.BatchNorm2d(12)), "no convolution stands directly before"),
        (Tail(conv(12, 3), nn.BatchNorm2d(3, track_running_stats=False)), "takes its statistics from the image"),
        (Tail(*[conv(12, 12), nn.BatchNorm2d(12)] * 2), "runs more than once"),
    ],
    ids=["used", "relu", "statistics", "twice"],
)
def test_other_batch_norms_stay(net: nn.Module, words: str) -> None:
    net = lively(net)
    before = deepcopy(net)
    reports = fold_affine(net)
    assert reports and not any(report.applied for report in reports)
    assert words in reports[0].reason
    assert difference(before, net, (8, 9)) == 0


class Skip(Tail):
    """Scales the image, but adds it to the result without taking the scale off: not a scale that can go."""

    img_range = 255.0

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.img_range
        return super().forward(x) / self.img_range + x


def test_a_step_that_changes_the_image_is_undone() -> None:
    net = lively(Skip(conv(12, 3)))
    before = deepcopy(net)
    (report,) = fold_affine(net)
    assert not report.applied and report.max_difference > 1 and "allowed is 1e-04" in report.reason
    assert net.img_range == 255 and difference(before, net, (8, 9)) == 0


@pytest.mark.parametrize("lowered", [False, True])
def test_quantized_convolutions_are_left_to_the_engine(
    lowered: bool, tiny_net: Callable[..., nn.Module], images: list[Tensor]
) -> None:
    net = calibrate(quantize_model(lively(tiny_net("SRResNet")), "minmax"), images).eval()
    net = lower(net) if lowered else net
    *body, last = fold_affine(net)
    assert len(body) == 4 and not any(report.applied for report in body)
    assert all("quantizes" in report.reason for report in body)
    assert last.applied and last.modules == ("conv_body", "bn_body")


@pytest.mark.parametrize("lowered", [False, True])
def test_float_ends_of_a_low_bit_network_are_folded(
    lowered: bool, tiny_net: Callable[..., nn.Module], images: list[Tensor]
) -> None:
    net = calibrate(quantize_model(lively(tiny_net("EDSR")), "pams"), images).eval()
    net = lower(net) if lowered else net
    before = deepcopy(net)
    (report,) = fold_affine(net)
    assert report.applied and report.max_difference <= 1e-5
    assert collapse_tail(net).applied
    image = images[0]
    with torch.no_grad():
        assert float((before(image) - net(image)).abs().mean()) < 1e-3  # a value may fall on the other side of a step


def test_a_quantized_first_convolution_keeps_the_range(
    tiny_net: Callable[..., nn.Module], images: list[Tensor]
) -> None:
    net = calibrate(quantize_model(lively(tiny_net("EDSR")), "fqsr"), images).eval()
    (report,) = fold_affine(net)
    assert not report.applied and "'conv_first'" in report.reason and "is not a float convolution" in report.reason
    assert str(report).startswith("image range: not folded: ") and net.img_range == 255


def test_training_mode_is_refused() -> None:
    (report,) = fold_affine(Tail(conv(12, 3)).train())
    assert not report.applied and "call net.eval()" in report.reason
