"""Side-by-side pictures."""

from __future__ import annotations

import cv2
import matplotlib.figure
import numpy as np
import pytest

from qsr_plugin.data.images import read_rgb
from qsr_plugin.report import crops
from qsr_plugin.report.crops import Box, most_detailed_box, save_crops


def flat_with_detail(height: int = 90, width: int = 120) -> np.ndarray:
    image = np.full((height, width, 3), 128, np.uint8)
    image[40:60, 70:90] = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    return image


def draw(monkeypatch, tmp_path, hr: np.ndarray, results: dict, **options) -> matplotlib.figure.Figure:
    """The figure that ``save_crops`` writes, with every text laid out."""
    drawn = []
    original = crops._draw
    monkeypatch.setattr(crops, "_draw", lambda *args: drawn.append(original(*args)) or drawn[-1])
    save_crops(tmp_path / "crops.png", hr, results, 4, **options)
    return drawn[0]


def test_the_box_finds_the_detail() -> None:
    box = most_detailed_box(flat_with_detail(), 4)
    assert box.height == box.width == 18
    assert 38 <= box.top <= 44
    assert 68 <= box.left <= 74


@pytest.mark.parametrize("shape", [(90, 120), (12, 200), (9, 9), (1, 1), (1, 100)])
def test_the_box_lies_inside_any_image(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for scale in (2, 4):
        top, left, height, width = most_detailed_box(image, scale)
        assert top >= 0
        assert left >= 0
        assert height >= 1
        assert width >= 1
        assert top + height <= shape[0]
        assert left + width <= shape[1]


def test_the_box_stays_away_from_the_border() -> None:
    image = np.full((100, 100, 3), 128, np.uint8)
    image[::2, :4] = 0
    assert most_detailed_box(image, 4).left >= 4


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_writes_a_readable_picture(tmp_path, suffix: str) -> None:
    hr = flat_with_detail()
    path = tmp_path / f"crops{suffix}"
    box = save_crops(path, hr, {"4 bits": cv2.GaussianBlur(hr, (5, 5), 2), "8 bits": hr}, 4, box=(40, 70, 10, 20))
    assert box == Box(40, 70, 10, 20)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if suffix == ".png":
        height, width, _ = read_rgb(path).shape
        assert 300 < height < 1000
        assert 600 < width < 3000
    else:
        assert path.read_text("utf-8").lstrip().startswith("<?xml")


def test_crops_are_exact_and_carry_label_and_psnr(monkeypatch, tmp_path) -> None:
    hr = flat_with_detail()
    worse = np.clip(hr.astype(int) + 5, 0, 255).astype(np.uint8)
    figure = draw(monkeypatch, tmp_path, hr, {"four": worse, "same": hr}, box=(40, 70, 10, 20))
    whole, *tiles = figure.axes
    assert np.array_equal(whole.images[0].get_array(), hr)
    assert whole.patches[0].get_bbox().bounds == (69.5, 39.5, 20, 10)
    for axes, image in zip(tiles, (hr, worse, hr), strict=True):
        assert np.array_equal(axes.images[0].get_array(), image[40:50, 70:90])
        assert axes.images[0].get_interpolation() == "nearest"
        bounds = axes.get_window_extent()
        assert bounds.width / bounds.height == pytest.approx(2)
    texts = [[text.get_text() for text in axes.texts] for axes in tiles]
    assert texts[1] == ["four", f"{crops.psnr_ssim(worse, hr, 4)[0]:.2f} dB"]
    assert texts[2] == ["same", "identical"]


@pytest.mark.parametrize("count", [1, 3, 5, 9])
@pytest.mark.parametrize("shape", [(90, 120), (60, 240), (160, 60)])
def test_nothing_overlaps_or_leaves_the_picture(monkeypatch, tmp_path, count: int, shape: tuple[int, int]) -> None:
    hr = np.random.default_rng(2).integers(0, 256, (*shape, 3), dtype=np.uint8)
    results = {f"A rather long label of network {number}": hr // 2 for number in range(count)}
    figure = draw(monkeypatch, tmp_path, hr, results, box=(5, 5, 40, 14))
    renderer = figure.canvas.get_renderer()
    boxes = [axes.get_window_extent() for axes in figure.axes]
    boxes += [text.get_window_extent(renderer) for axes in figure.axes for text in axes.texts if text.get_text()]
    for index, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_what_cannot_be_drawn(tmp_path) -> None:
    hr = flat_with_detail()
    with pytest.raises(ValueError, match=r"written as \.png or \.svg"):
        save_crops(tmp_path / "crops.jpg", hr, {"a": hr}, 4)
    with pytest.raises(ValueError, match="no results to draw"):
        save_crops(tmp_path / "crops.png", hr, {}, 4)
    with pytest.raises(ValueError, match=r"'a' is \(45, 120, 3\) uint8; expected"):
        save_crops(tmp_path / "crops.png", hr, {"a": hr[::2]}, 4)
    with pytest.raises(ValueError, match="does not lie in the image of 90x120"):
        save_crops(tmp_path / "crops.png", hr, {"a": hr}, 4, box=(80, 0, 20, 20))
    assert not list(tmp_path.iterdir())
