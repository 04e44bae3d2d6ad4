"""Scores of networks on folders of image pairs."""

from __future__ import annotations

import math
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.metrics import calculate_metric
from qsr_plugin.archs.quant_net_arch import build_backbone
from torch import Tensor, nn

from qsr_plugin import complexity, list_backbones
from qsr_plugin.checkpoint import load_float_weights
from qsr_plugin.report.evaluate import evaluate, find_pairs, psnr_ssim, super_resolve
from tests.quant.choosers import quantized


class Enlarge(nn.Module):
    """Repeats pixels and adds a constant; keeps the type of tensors it was asked with."""

    def __init__(self, scale: int = 2, offset: float = 0.0) -> None:
        super().__init__()
        self.scale, self.offset, self.modes = scale, offset, []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3) + self.offset


def photo(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 230, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def pairs(write_images) -> tuple[Path, Path]:
    """Two images, HR being LR with every pixel doubled."""
    lr = {name: photo(seed) for seed, name in enumerate(("a.png", "b.png"))}
    hr = {name: image.repeat(2, 0).repeat(2, 1) for name, image in lr.items()}
    return write_images("hr", hr), write_images("lr", lr)


def test_a_constant_error_has_the_psnr_computed_by_hand(pairs) -> None:
    """Five gray levels more in R, G and B are 5 x (65.481 + 128.553 + 24.966) / 255 more in Y."""
    result = evaluate(Enlarge(offset=5 / 255), *pairs, 2)
    y = 5 * (65.481 + 128.553 + 24.966) / 255
    assert result.psnr == pytest.approx(20 * math.log10(255 / y), abs=1e-3)
    assert 0.99 < result.ssim < 1
    assert [score.name for score in result.images] == ["a.png", "b.png"]
    assert (result.scale, result.fab) == (2, 32)


def test_a_perfect_network(pairs) -> None:
    result = evaluate(Enlarge(), *pairs, 2)
    assert (result.psnr, result.ssim) == (math.inf, pytest.approx(1))


def test_output_is_clipped_and_rounded() -> None:
    values = torch.tensor([-0.2, 0.4999 / 255, 0.5001 / 255, 1.3])

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return values.reshape(1, 1, 2, 2).expand(1, 3, 2, 2)

    sr = super_resolve(Fixed(), np.zeros((1, 1, 3), np.uint8))
    assert (sr.dtype, sr.shape) == (np.uint8, (2, 2, 3))
    assert sr[..., 0].ravel().tolist() == [0, 0, 1, 255]


def test_scores_are_those_of_the_host_and_colours_are_not_swapped() -> None:
    sr, hr = photo(1), photo(2)
    opt = {"crop_border": 3, "test_y_channel": True}
    data = {"img": cv2.cvtColor(sr, cv2.COLOR_RGB2BGR), "img2": cv2.cvtColor(hr, cv2.COLOR_RGB2BGR)}
    expected = tuple(calculate_metric(data, {"type": f"calculate_{name}", **opt}) for name in ("psnr", "ssim"))
    assert psnr_ssim(sr, hr, 3) == pytest.approx(expected)
    red, blue = np.zeros((20, 20, 3), np.uint8), np.zeros((20, 20, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    black = np.zeros_like(red)
    assert psnr_ssim(red, black, 0)[0] < psnr_ssim(blue, black, 0)[0] - 5  # red is brighter than blue


@pytest.mark.parametrize("backbone", list_backbones())
@pytest.mark.parametrize("recipe", [None, "pams"])
def test_every_backbone_float_and_quantized(tiny, pairs, backbone: str, recipe: str | None) -> None:
    net = tiny(backbone) if recipe is None else tiny(backbone, recipe, weight_bits=4, act_bits=4)
    result = evaluate(net, *pairs, 2)
    assert result.fab == (32 if recipe is None else 4)
    assert math.isfinite(result.psnr)
    assert -1 <= result.ssim <= 1
    assert result.psnr == pytest.approx(sum(score.psnr for score in result.images) / 2)
    assert result.to_dict()["images"][1]["name"] == "b.png"


def test_modes_of_modules_are_restored_and_evaluation_mode_is_used(pairs) -> None:
    net = nn.Sequential(Enlarge(), nn.Identity())
    net.train()
    net[1].eval()
    evaluate(net, *pairs, 2)
    assert net[0].modes == [False, False]
    assert (net.training, net[0].training, net[1].training) == (True, True, False)


def test_progress_wraps_the_pairs(pairs) -> None:
    seen = []

    def progress(items):
        seen.append(len(items))
        yield from items

    evaluate(Enlarge(), *pairs, 2, progress=progress)
    assert seen == [2]


def test_other_endings_and_names_with_the_scale(write_images) -> None:
    hr = write_images("hr", {"a.png": photo(0), "b.png": photo(1)})
    lr = write_images("lr", {"ax2.png": photo(0), "b.bmp": photo(1)})
    found = [(left.name, right.name) for left, right in find_pairs(hr, lr, 2)]
    assert found == [("a.png", "ax2.png"), ("b.png", "b.bmp")]


def test_missing_partners_are_named(write_images) -> None:
    both = write_images("both", {"a.png": photo(0), "b.png": photo(1)})
    one = write_images("one", {"a.png": photo(0)})
    with pytest.raises(ValueError, match=r"b\.png: no partner in .*one.*Looked for b or bx2.*found a\.png"):
        find_pairs(both, one, 2)
    with pytest.raises(ValueError, match=r"1 image\(s\) without a partner in .*one: b\.png"):
        find_pairs(one, both, 2)


def test_sizes_that_do_not_fit_name_both_files(write_images) -> None:
    hr = write_images("hr", {"a.png": photo(0, 48, 66)})
    lr = write_images("lr", {"a.png": photo(0, 24, 32)})
    with pytest.raises(ValueError, match=r"hr/a\.png is 66x48 and .*lr/a\.png is 32x24: HR must be exactly 2 times LR"):
        evaluate(Enlarge(), hr, lr, 2)


def test_network_of_another_scale(pairs) -> None:
    with pytest.raises(ValueError, match="the network made 96x72 of 32x24, scale 2 asks for 64x48"):
        evaluate(Enlarge(scale=3), *pairs, 2)


def test_images_too_small_to_score(write_images) -> None:
    hr, lr = write_images("hr", {"a.png": photo(0, 14, 40)}), write_images("lr", {"a.png": photo(0, 7, 20)})
    with pytest.raises(ValueError, match="a.png is 40x14: too small to score, at scale 2 each side needs 15 pixels"):
        evaluate(Enlarge(), hr, lr, 2)


def test_output_that_is_not_finite_names_the_image(pairs) -> None:
    with pytest.raises(ValueError, match=r"lr/a\.png: the network's output holds NaN or infinity"):
        evaluate(Enlarge(offset=math.nan), *pairs, 2)


def test_float_srresnet_on_set5() -> None:
    """The published network has 32.01 dB on Set5 at x4."""
    if not os.environ.get("QSR_DATA"):
        pytest.skip("QSR_DATA is not set: needs Set5 and weights/srresnet_x4.pth")
    data = Path(os.environ["QSR_DATA"])
    net = build_backbone({"type": "SRResNet", "bias": True, "bn_eps": 1e-3, "output": "tanh"})
    load_float_weights(net, data / "weights" / "srresnet_x4.pth")
    result = evaluate(net, data / "Set5" / "HR", data / "Set5" / "LRbicx4", 4)
    assert result.psnr == pytest.approx(32.01, abs=0.02)
    assert result.ssim == pytest.approx(0.893, abs=0.002)


@pytest.fixture
def adaptive(choosers: None, images: list[Tensor]) -> nn.Module:
    """A network of scale 1 whose bits follow the brightness."""
    return quantized("toy_brightness", images)


@pytest.fixture
def uneven(write_images) -> tuple[Path, Path]:
    """A dark image, and a larger one that is dark on the left and bright on the right."""
    dark, half = np.full((17, 20, 3), 30, np.uint8), np.full((17, 52, 3), 30, np.uint8)
    half[:, 26:] = 220
    folder = write_images("uneven", {"a.png": dark, "b.png": half})
    return folder, folder


def test_bits_of_a_set_by_hand(adaptive: nn.Module, uneven: tuple[Path, Path]) -> None:
    """Dark is 4 bits, bright 8, half of each 6. Rows of patches of 13 pixels; then of 16, 16 (the left 10 dark), 20."""
    whole = evaluate(adaptive, *uneven, 1)
    assert [score.fab for score in whole.images] == [4.0, 6.0] and whole.fab == 5.0
    assert whole.bits.shares == {"4": 0.5, "6": 0.5} and whole.patches is None
    assert whole.to_dict()["protocol"] == "whole images"
    for batch in (1, 16):
        cut = evaluate(adaptive, *uneven, 1, patches={"size": 13, "last": "enlarge", "batch": batch})
        assert [score.fab for score in cut.images] == [4.0, 6.0]
        assert cut.bits.shares == {"4": 0.75, "8": 0.25}
        assert cut.to_dict()["patches"] == {"size": 13, "overlap": 0, "last": "enlarge"}
    third = evaluate(adaptive, *uneven, 1, patches={"size": 16, "overlap": 0, "last": "enlarge"})
    assert third.images[1].fab == pytest.approx((4 + 4 + 8) / 3), "patches weigh alike, also the larger last one"
    assert (third.bits.lowest, third.bits.highest) == (4.0, third.images[1].fab)
    assert third.place_bits == dict.fromkeys(adaptive.bit_policy.places, third.fab)
    report = complexity(adaptive, (17, 52), bits=third.place_bits)
    assert report.fab == pytest.approx(third.fab), "and not those of the last image"


def test_patches_of_a_float_network_change_nothing_but_the_protocol(pairs) -> None:
    whole, cut = (evaluate(Enlarge(), *pairs, 2, patches=cut) for cut in (None, {"size": 7, "overlap": 2}))
    assert [score.psnr for score in cut.images] == [math.inf] * 2 == [score.psnr for score in whole.images]
    assert (cut.fab, cut.bits.shares) == (32, {})


def test_patches_are_checked_before_anything_runs(pairs) -> None:
    with pytest.raises(ValueError, match=r"patches\.siez: unknown key. Did you mean 'size'"):
        evaluate(Enlarge(), *pairs, 2, patches={"siez": 7})
