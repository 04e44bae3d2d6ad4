"""Linear ends of networks as one convolution: exact where it says so, and left alone where it is not linear."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin.deploy.collapsed import CollapsedTail, least_side
from qsr_plugin.deploy.lowering import lower
from qsr_plugin.deploy.tail import collapse_tail
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.surgery import quantize_model
from tests.deploy.tails import SIZES, Tail, difference, lively

LINEAR = [
    ("EDSR", {"upscale": 2}),
    ("EDSR", {"upscale": 3}),
    ("EDSR", {"upscale": 4}),
    ("RDN", {"num_grow_ch": 16}),
    ("SwinIR", {"upsampler": "pixelshuffle"}),
    ("HAT", {}),
]


def conv(before: int, after: int, size: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, padding=size // 2, **options)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("kind", "options"), LINEAR, ids=[f"{kind}{options}" for kind, options in LINEAR])
def test_linear_tails_are_exact_everywhere(kind: str, options: dict, tiny_net: Callable[..., nn.Module]) -> None:
    net = lively(tiny_net(kind, **options))
    before = deepcopy(net)
    report = collapse_tail(net)
    assert report.applied, report.reason
    assert report.kernel_size == (5, 5) and report.macs_after < report.macs_before
    assert report.border_macs and report.ring_difference <= 1e-4
    assert sum(isinstance(module, CollapsedTail) for module in net.modules()) == 1
    assert max(difference(before, net, size) for size in SIZES) <= 1e-5


def test_without_the_ring_only_the_outermost_pixels_differ(tiny_net: Callable[..., nn.Module]) -> None:
    net = lively(tiny_net("EDSR", upscale=4))
    net.img_range = 1.0  # or the differences were small in the image
    before = deepcopy(net)
    report = collapse_tail(net, ring=False)
    assert report.applied and report.border_macs == 0 and "the outermost 3 pixels not exact" in str(report)
    assert report.ring == 3  # one pixel of the second stage, which is two of the image, and one of the last convolution
    assert report.interior_difference <= 1e-5 < 1e-3 < report.ring_difference
    assert difference(before, net, (17, 23), border=3) <= 1e-5
    assert difference(before, net, (17, 23), border=2) > 1e-3  # the ring is not narrower than said


def tail_of(net: nn.Module) -> CollapsedTail:
    (tail,) = (module for module in net.modules() if isinstance(module, CollapsedTail))
    return tail


@pytest.mark.parametrize("part", ["sides.top", "sides.right", "corners.bottom_left", "corners.top_right"])
def test_every_part_of_the_border_is_needed_and_reads_what_it_has_to(
    part: str, tiny_net: Callable[..., nn.Module]
) -> None:
    """Two lines of features: the second convolution of the tail reads one line beyond the image, made of these two."""
    net = lively(tiny_net("EDSR", upscale=4))
    net.img_range = 1.0
    before = deepcopy(net)
    collapse_tail(net)
    conv = tail_of(net).border.get_submodule(part).conv
    assert conv.kernel_size == {"sides.top": (2, 5), "sides.right": (5, 2)}.get(part, (2, 2))
    with torch.no_grad():
        conv.bias.zero_()
    assert difference(before, net, (17, 23)) > 1e-4
    assert difference(before, net, (17, 23), border=4) <= 1e-5


def test_smaller_features_than_two_borders_are_the_business_of_the_original_modules(
    tiny_net: Callable[..., nn.Module],
) -> None:
    net = lively(tiny_net("EDSR", upscale=4))
    before = deepcopy(net)
    collapse_tail(net)
    tail, seen = tail_of(net), []
    tail.original.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    assert tail.smallest == tail.minimum == least_side(net) == 2 and least_side(before) == 1
    assert max(difference(before, net, size) for size in ((2, 2), (1, 9), (9, 1), (2, 9))) <= 1e-5
    assert seen == [(1, 9), (9, 1)]


def test_multiplications_are_those_of_the_layers(tiny_net: Callable[..., nn.Module]) -> None:
    report = collapse_tail(tiny_net("EDSR", upscale=4, num_feat=16))
    assert report.modules == ("upsample.0", "upsample.1", "upsample.2", "upsample.3", "conv_last")
    assert report.macs_before == 9 * 16 * 64 + 4 * 9 * 16 * 64 + 16 * 9 * 16 * 3
    assert report.macs_after == 25 * 16 * 3 * 16 and report.border_macs == 2 * 5 * 16 * 3 * 16
    assert str(report).endswith("are one 5x5 convolution and a pixel shuffle (2.8 times fewer multiplications)")


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("MSRResNet", {}, "'lrelu' (LeakyReLU) is not linear"),
        ("SRResNet", {}, "'up_act1' (PReLU) is not linear"),
        ("CARN", {}, "'upsample.up.body.1' (ReLU) is not linear"),
        ("IDN", {}, "'upsample' (ConvTranspose2d) makes 31x31 pixels of 16x16"),
        (
            "SwinIR",
            {},
            "no gain, one convolution would need 864 multiplications per pixel, and upsample.0, upsample.1 need 864",
        ),
        ("RLFN", {"num_feat": 8}, "one convolution would need 864 multiplications"),
    ],
)
def test_others_are_refused_and_stay_as_they_are(
    kind: str, options: dict, words: str, tiny_net: Callable[..., nn.Module]
) -> None:
    net = lively(tiny_net(kind, **options))
    before, classes = deepcopy(net), [type(module) for module in net.modules()]
    report = collapse_tail(net)
    assert not report.applied and words in report.reason
    assert [type(module) for module in net.modules()] == classes
    assert difference(before, net, (17, 23)) == 0


@pytest.mark.parametrize(
    "tail",
    [
        lambda: (conv(12, 48, 5), nn.PixelShuffle(2), conv(12, 3, 7)),
        lambda: (conv(12, 108, 1), nn.PixelShuffle(3), conv(12, 3, 5, padding_mode="reflect")),
        lambda: (nn.Conv2d(12, 48, (1, 3), padding=(0, 1)), nn.PixelShuffle(2), conv(12, 3, 1)),
        lambda: (nn.Conv2d(12, 96, 2, padding="same"), nn.PixelShuffle(2), conv(24, 3)),
        lambda: (nn.ConvTranspose2d(12, 24, 2, stride=2), nn.BatchNorm2d(24), conv(24, 24), conv(24, 3)),
        lambda: (conv(12, 96), nn.Upsample(scale_factor=2), conv(96, 3, groups=3), nn.Identity()),
    ],
    ids=["large", "reflect", "flat", "even", "transposed", "nearest"],
)
@pytest.mark.parametrize("size", [(17, 23), (4, 9), (3, 4)])
def test_any_linear_modules_are_a_convolution(tail: Callable[[], tuple[nn.Module, ...]], size: tuple[int, int]) -> None:
    net = lively(Tail(*tail()))
    before = deepcopy(net)
    report = collapse_tail(net)
    assert report.applied, report.reason
    assert difference(before, net, size) <= 1e-5


def test_rows_of_zeros_are_trimmed() -> None:
    net = lively(Tail(nn.Conv2d(12, 48, (1, 3), padding=(0, 1)), nn.PixelShuffle(2), conv(12, 3, 1)))
    assert collapse_tail(net).kernel_size == (1, 3)


def test_the_part_that_saves_most_is_replaced() -> None:
    net = lively(Tail(conv(12, 4, 1), conv(4, 16), nn.PixelShuffle(2), conv(4, 8), conv(8, 3), channels=12))
    before = deepcopy(net)
    report = collapse_tail(net)
    assert report.applied and report.modules == ("tail.1", "tail.2", "tail.3", "tail.4")
    assert difference(before, net, (9, 8)) <= 1e-5


class Clip(nn.Module):
    """Linear between two limits."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-1e3, 1e3)


class Position(nn.Module):
    """Adds something else in every place."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[-1]).to(x)


class Whole(nn.Module):
    """Takes off the mean of the image."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Clip(), "'tail.2' (Clip) is not linear"),
        (Position(), "'tail.2' (Position) does not treat all places of an image alike"),
        (Whole(), "'tail.2' (Whole) reads further than"),
    ],
)
def test_what_is_no_convolution_is_named(module: nn.Module, words: str) -> None:
    net = lively(Tail(conv(12, 48), nn.PixelShuffle(2), module, conv(12, 3)))
    report = collapse_tail(net)
    assert not report.applied and words in report.reason


class Still(nn.Module):
    """Linear, but autograd does not know."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    "last",
    [lambda: (conv(12, 3, padding_mode="circular"),), lambda: (Still(), conv(12, 3))],
    ids=["circular", "no gradient"],
)
def test_borders_that_no_small_convolution_makes(last: Callable[[], tuple[nn.Module, ...]]) -> None:
    """Made of the other end of a line, or unknown; away from the border both are convolutions."""
    net = lively(Tail(conv(12, 48), nn.PixelShuffle(2), *last()))
    before, other = deepcopy(net), deepcopy(net)
    assert "make something else of the borders" in collapse_tail(net).reason
    assert difference(before, net, (9, 8)) == 0
    assert collapse_tail(other, ring=False).applied and difference(before, other, (9, 8), border=2) <= 1e-5


def test_in_inference_mode_and_twice(tiny_net: Callable[..., nn.Module]) -> None:
    net = lively(tiny_net("EDSR", num_block=1))
    before = deepcopy(net)
    with torch.inference_mode():
        assert collapse_tail(net).applied
    assert difference(before, net, (9, 8)) <= 1e-5
    assert str(collapse_tail(net)) == "tail: collapsed already" and difference(before, net, (9, 8)) <= 1e-5


class ReadTwice(Tail):
    """A result inside the tail is used in another place as well; or changed in place."""

    in_place = False

    def forward(self, x: Tensor) -> Tensor:
        first = self.tail[0](self.head(x))
        if self.in_place:
            first += 1
        second = self.tail[2](self.tail[1](first))
        return second if self.in_place else second + first.mean()


@pytest.mark.parametrize(
    ("in_place", "words"), [(False, "is read in several places"), (True, "is not the result of one")]
)
def test_results_used_elsewhere_stay(in_place: bool, words: str) -> None:
    net = lively(ReadTwice(conv(12, 48), nn.PixelShuffle(2), conv(12, 3)))
    net.in_place = in_place
    report = collapse_tail(net)
    assert not report.applied and words in report.reason


def test_modules_that_also_run_elsewhere_are_not_replaced() -> None:
    shuffle = nn.PixelShuffle(2)
    net = lively(Tail(conv(12, 48), shuffle, nn.ReLU(), conv(12, 48), shuffle, conv(12, 3)))
    assert not collapse_tail(net).applied
    net = lively(Tail(conv(12, 48), shuffle, conv(12, 48), shuffle, conv(12, 3)))
    before = deepcopy(net)
    assert collapse_tail(net).applied
    assert difference(before, net, (5, 6)) <= 1e-5


@pytest.mark.parametrize("lowered", [False, True])
def test_quantized_tails_are_refused_and_others_collapsed_behind_a_quantized_body(
    lowered: bool, tiny_net: Callable[..., nn.Module], images: list[Tensor]
) -> None:
    for recipe, applied in (("fqsr", False), ("minmax", True)):
        net = calibrate(quantize_model(lively(tiny_net("EDSR")), recipe), images).eval()
        net = lower(net) if lowered else net
        before = deepcopy(net)
        report = collapse_tail(net)
        assert report.applied is applied, report.reason
        assert applied or "quantizes" in report.reason
        assert difference(before, net, (9, 11)) <= 1e-5


def test_training_mode_and_networks_that_take_no_image_are_refused() -> None:
    assert "call net.eval()" in collapse_tail(Tail(conv(12, 48)).train()).reason
    assert "takes no small test image" in collapse_tail(nn.Sequential(nn.Linear(7, 3)).eval()).reason


def test_exported_with_any_size(tiny_net: Callable[..., nn.Module], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = lively(tiny_net("EDSR", num_block=1))
    before = deepcopy(net)
    assert collapse_tail(net).applied
    sides = {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    image = torch.rand(1, 3, 12, 14)
    program = torch.onnx.export(
        net, (image,), dynamo=True, dynamic_shapes=(sides,), input_names=["image"], verbose=False
    )
    program.save(tmp_path / "net.onnx")
    kinds = [node.op_type for node in program.model_proto.graph.node]
    assert kinds.count("DepthToSpace") == 1 and kinds.count("Conv") == 4 + 1 + 8  # the tail's one, sides and corners
    assert not [one.name for one in program.model_proto.graph.initializer if "original" in one.name]
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for size in ((17, 9), (2, 2), (2, 3), (3, 40)):
        image = torch.rand(1, 3, *size)
        (got,) = session.run(None, {"image": image.numpy()})
        with torch.no_grad():
            assert float((before(image) - torch.from_numpy(got)).abs().max()) <= 1e-5
