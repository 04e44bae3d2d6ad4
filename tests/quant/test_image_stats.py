"""Statistics of images: the printed worked examples, OpenCV's integers, and each image by itself."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from qsr_plugin.quant.image_stats import edge_scores, entropies, gradient_magnitudes

STATISTICS = (gradient_magnitudes, edge_scores, entropies)


def as_batch(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) RGB levels as ``(1, 3, H, W)`` in 0..1."""
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1).unsqueeze(0)


def pattern(height: int, width: int, a: int, b: int, c: int, d: int, p: int) -> Tensor:
    """Image of the worked examples: channel k is ``(a y + b x + 17 c k + d ((x y) mod 7) (k + 1)) mod p``."""
    y, x = np.mgrid[:height, :width]
    return as_batch(np.stack([(a * y + b * x + 17 * c * k + d * (x * y % 7) * (k + 1)) % p for k in range(3)], -1))


def left_and_right(left: int, right: int) -> Tensor:
    """4x4 gray image of two halves."""
    return as_batch(np.tile(np.array([left, left, right, right])[None, :, None], (4, 1, 3)))


def random_batch(count: int = 5, height: int = 13, width: int = 21) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator).float() / 255


def test_gradients_of_two_halves_and_of_one_red_pixel() -> None:
    assert (1000 * gradient_magnitudes(left_and_right(0, 255))).tolist() == [[pytest.approx(250), 0]]
    red = torch.zeros(1, 3, 3, 3)
    red[0, 0, 1, 1] = 1
    assert (1000 * gradient_magnitudes(red)).tolist() == [pytest.approx([33.2222, 33.2222], abs=5e-5)]


@pytest.mark.parametrize(
    ("numbers", "complexity"),
    [
        ((1, 1, 0, 0, 97), 3.56209),
        ((3, 5, 1, 2, 251), 19.80159),
        ((11, 7, 2, 3, 211), 39.96477),
        ((29, 31, 3, 5, 239), 73.41377),
    ],
)
def test_mean_gradient_of_the_published_patterns(numbers: tuple[int, ...], complexity: float) -> None:
    found = 1000 * gradient_magnitudes(pattern(12, 10, *numbers)).mean(1)
    assert found.item() == pytest.approx(complexity, abs=5e-6, rel=3e-7)


def test_gradients_are_sobel_over_eight_in_cross_correlation_with_replicated_borders() -> None:
    image = random_batch(1)[0]
    gray = (0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]).double().numpy()
    wanted = [
        np.abs(cv2.Sobel(gray, cv2.CV_64F, *order, ksize=3, scale=1 / 8, borderType=cv2.BORDER_REPLICATE)).mean()
        for order in ((1, 0), (0, 1))
    ]
    assert gradient_magnitudes(image[None])[0].tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 2), (10, 12), (33, 57)])
def test_edge_scores_are_those_of_opencv(size: tuple[int, int]) -> None:
    generator = np.random.default_rng(size[0])
    for _ in range(5):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        response = cv2.convertScaleAbs(cv2.Laplacian(gray, cv2.CV_16S, ksize=3))
        assert edge_scores(as_batch(pixels)).item() == pytest.approx(response.astype(np.int64).mean(), rel=1e-6)


def test_published_edge_scores() -> None:
    """Two of the published figures are of random images whose seed is not known; these are of the same kind."""
    random = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 255
    assert (edge_scores(random).item(), edge_scores(random, saturated=True).item()) == (200.46875, 15.40625)
    assert edge_scores(left_and_right(0, 200)).item() == 127.5
    mild = as_batch(np.random.default_rng(0).integers(100, 113, (10, 12, 3)))
    assert edge_scores(mild).item() > 10 and edge_scores(mild, saturated=True).item() == 0


def test_edge_kernel_by_an_impulse() -> None:
    impulse = torch.zeros(1, 3, 5, 5)
    impulse[..., 2, 2] = 30 / 255  # too weak to saturate: 8 * 30 < 255
    assert edge_scores(impulse).item() == pytest.approx((8 * 30 + 4 * 2 * 30) / 25)
    impulse[..., 2, 2] = 1
    assert edge_scores(impulse).item() == pytest.approx((255 + 4 * 255) / 25)


@pytest.mark.parametrize(("value", "entropy"), [(0, 0.731509), (100, 1.183793), (128, 1.183941), (255, 0.733037)])
def test_entropy_of_constant_images(value: int, entropy: float) -> None:
    assert entropies(torch.full((1, 3, 6, 6), value / 255)).item() == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize(
    ("side", "numbers", "entropy"),
    [
        (12, (1, 1, 0, 0, 97), 1.317452),
        (12, (11, 7, 2, 3, 211), 2.833333),
        (16, (29, 31, 3, 5, 256), 3.045479),
    ],
)
def test_entropy_of_the_published_patterns(side: int, numbers: tuple[int, ...], entropy: float) -> None:
    assert entropies(pattern(side, side, *numbers)).item() == pytest.approx(entropy, abs=2e-6)


def test_entropy_of_many_pixels_is_that_of_all_together() -> None:
    image = random_batch(1, 90, 100)  # more than one step of the sum over pixels
    gray = (torch.tensor([0.2989, 0.5870, 0.1140]).double().view(3, 1, 1) * image[0].double()).sum(0).flatten()
    centres = torch.linspace(0, 1, 32, dtype=torch.float64)
    means = torch.exp(-0.5 * ((gray[:, None] - centres) / 0.0255) ** 2).mean(0)
    share = means / means.sum()
    wanted = -(share * share.log()).sum().item()
    assert entropies(image).item() == pytest.approx(wanted, rel=1e-5)
    assert wanted < math.log(32)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_number_of_an_image_does_not_depend_on_the_others(statistic) -> None:
    batch = random_batch(16)
    together = statistic(batch)
    assert torch.equal(together, torch.cat([statistic(image[None]) for image in batch]))
    assert torch.equal(together[:5], statistic(batch[:5]))
    assert together.unique(dim=0).shape[0] == 16


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1)])
def test_tiny_images_have_finite_statistics(statistic, size: tuple[int, int]) -> None:
    assert torch.isfinite(statistic(random_batch(2, *size))).all()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.37])
def test_images_of_one_colour_have_no_gradients_and_no_edges(value: float) -> None:
    image = torch.full((2, 3, 9, 8), value)
    image[:, 1] = 1 - value
    assert gradient_magnitudes(image).eq(0).all() and edge_scores(image).eq(0).all()
    assert entropies(image).lt(1.2).all() and torch.isfinite(entropies(image)).all()


@pytest.mark.parametrize("statistic", STATISTICS)
def test_precision_is_float32_or_better_and_there_is_no_gradient(statistic) -> None:
    batch = random_batch(2).requires_grad_()
    plain = statistic(batch)
    assert plain.dtype == torch.float32 and not plain.requires_grad
    assert statistic(batch.double()).dtype == torch.float64
    torch.testing.assert_close(statistic(batch.double()).float(), plain, rtol=1e-5, atol=1e-7)
    coarse = batch.bfloat16()
    assert torch.equal(statistic(coarse), statistic(coarse.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(statistic(batch), plain)
    assert torch.equal(statistic(batch.detach().to(memory_format=torch.channels_last)), plain)
