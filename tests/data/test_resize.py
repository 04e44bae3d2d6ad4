"""The downscaling rule against published images, stored numbers and properties."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsr_plugin.data.images import read_rgb
from qsr_plugin.data.resize import downscale, shrink

# downscale() of formula_image(), stored after it had reproduced the published low-resolution images.
GOLDEN_X4 = [
    [[112, 122, 159], [117, 133, 134], [155, 103, 135]],
    [[140, 120, 123], [119, 134, 130], [143, 111, 128]],
    [[136, 153, 139], [132, 146, 160], [93, 142, 129]],
    [[150, 140, 149], [132, 137, 143], [72, 114, 113]],
]
GOLDEN_X2_RED = [
    [72, 131, 125, 107, 154],
    [119, 136, 91, 124, 167],
    [145, 164, 107, 103, 146],
    [116, 163, 111, 131, 148],
    [106, 137, 150, 120, 91],
    [142, 149, 164, 97, 100],
    [201, 86, 145, 158, 37],
]


def formula_image() -> np.ndarray:
    """A 13 x 10 picture full of steps."""
    row, column, channel = np.meshgrid(np.arange(13), np.arange(10), np.arange(3), indexing="ij")
    return ((row * row * 37 + column * 91 + channel * 53 + row * column * 17) % 256).astype(np.uint8)


def test_golden() -> None:
    assert downscale(formula_image(), 4).tolist() == GOLDEN_X4
    assert downscale(formula_image(), 2)[..., 0].tolist() == GOLDEN_X2_RED


def test_halves_are_rounded_up() -> None:
    """One output pixel between two inputs is their mean; rounding to even would give 0 and 2."""
    pair = np.array([[[0, 2, 254]], [[1, 3, 255]]], np.uint8)
    assert downscale(pair, 2).tolist() == [[[1, 3, 255]]]


def test_the_order_of_the_passes_matters() -> None:
    """Columns first, with rounding in between, is another result: the golden numbers can tell the two apart."""
    columns_first = downscale(formula_image().transpose(1, 0, 2), 4).transpose(1, 0, 2)
    assert columns_first.shape == (4, 3, 3)
    assert columns_first.tolist() != GOLDEN_X4


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize(("name", "count"), [("Set5", 5), ("Set14", 14)])
def test_equals_the_published_images(name: str, count: int, scale: int) -> None:
    if "QSR_DATA" not in os.environ:
        pytest.skip("QSR_DATA is not set: it must name a folder with Set5 and Set14")
    folder = Path(os.environ["QSR_DATA"]) / name
    published = sorted((folder / f"LRbicx{scale}").glob("*.png"))
    assert len(published) == count
    for path in published:
        np.testing.assert_array_equal(downscale(read_rgb(folder / "HR" / path.name), scale), read_rgb(path), path.name)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.integers(0, 255))
def test_a_constant_image_stays_constant(height: int, width: int, scale: int, level: int) -> None:
    result = downscale(np.full((height, width, 3), level, np.uint8), scale)
    assert result.shape == (-(-height // scale), -(-width // scale), 3)
    assert (result == level).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.floats(0.05, 1.0))
def test_shrink_by_any_factor(side: int, factor: float) -> None:
    result = shrink(np.full((side, 7, 1), 200, np.uint8), factor)
    assert side * factor - 1e-6 <= len(result) < side * factor + 1
    assert (result == 200).all()


def test_shrink_agrees_with_downscale_and_does_not_gain_a_pixel() -> None:
    image = formula_image()
    np.testing.assert_array_equal(shrink(image, 0.25), downscale(image, 4))
    np.testing.assert_array_equal(shrink(image, 1.0), image)
    assert 0.07 * 100 > 7
    assert shrink(np.zeros((100, 100, 3), np.uint8), 0.07).shape == (7, 7, 3)


def test_the_input_is_left_alone() -> None:
    image = formula_image()
    before = image.copy()
    one = downscale(image, 1)
    one[:] = 0
    downscale(image[::-1, ::2], 3)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4, 3), np.uint16), "uint16"),
        (np.zeros((4, 4), np.uint8), r"\(4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        ([[1]], "list"),
    ],
)
def test_other_arrays_are_refused(image: object, found: str) -> None:
    with pytest.raises(ValueError, match=rf"uint8 array of shape \(H, W, C\), found .*{found}"):
        downscale(image, 2)


@pytest.mark.parametrize("scale", [0, -2, 2.5, True, "4"])
def test_other_scales_are_refused(scale: object) -> None:
    with pytest.raises(ValueError, match="integer of 1 or more"):
        downscale(formula_image(), scale)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.5, float("nan")])
def test_other_factors_are_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="larger than 0 and at most 1"):
        shrink(formula_image(), factor)
