"""Side-by-side picture: the whole HR image with a box, and the same crop of every result, enlarged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from qsr_plugin.checkpoint import write_atomically
from qsr_plugin.report.evaluate import psnr_ssim

_ACCENT = "#d62728"
_SUFFIXES = (".png", ".svg")
_DPI = 160
# In inches: longer side of an enlarged crop, space between and around pictures, height of the two lines below a
# picture, and the width these lines need.
_TILE, _GAP, _MARGIN, _TEXT, _TEXT_WIDTH = 1.75, 0.12, 0.15, 0.39, 1.3
_WIDEST = 1.2  # the whole image may be this much wider than all tiles together
_SIZE, _SMALLEST = 9.0, 6.0  # points
_LETTERS_PER_INCH = 11.5  # of a bold label at full size


Tile = tuple[np.ndarray, str, str]  # picture, label, note


class Box(NamedTuple):
    """Part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: np.ndarray) -> np.ndarray:
        """The part of an (H, W, ...) array."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


def save_crops(
    path: str | Path,
    hr: np.ndarray,
    results: Mapping[str, np.ndarray],
    scale: int,
    *,
    box: tuple[int, int, int, int] | None = None,
) -> Box:
    """Draw the HR image beside one crop of HR and of every result, each result with its PSNR.

    The PSNR is that of the whole image on Y with ``scale`` border pixels left out, as in the tables. Crops are enlarged
    without smoothing.

    Args:
        path: Picture to write, ``.png`` or ``.svg``.
        hr: (H, W, 3) RGB uint8.
        results: Label to super-resolved image of the same shape, in the order of drawing.
        scale: Factor of the super-resolution.
        box: Crop as (top, left, height, width) in HR pixels; by default the most detailed part, see
            :func:`most_detailed_box`.

    Returns:
        The box drawn.

    Raises:
        ValueError: For another ending, no result, a result of another shape, or a box outside of the image.
        OSError: If the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"{path}: crops are written as {' or '.join(_SUFFIXES)}; change the ending")
    if not results:
        raise ValueError("no results to draw: give at least one label with its image")
    for label, image in results.items():
        if image.shape != hr.shape or image.dtype != np.uint8:
            raise ValueError(f"'{label}' is {image.shape} {image.dtype}; expected RGB uint8 like HR, {hr.shape}")
    area = Box(*box) if box is not None else most_detailed_box(hr, scale)
    if min(area) < 0 or 0 in area[2:] or area.top + area.height > hr.shape[0] or area.left + area.width > hr.shape[1]:
        raise ValueError(f"{area} does not lie in the image of {hr.shape[0]}x{hr.shape[1]} (height x width)")
    tiles = [(area.of(hr), "HR", "PSNR, whole image")]
    for label, image in results.items():
        psnr = psnr_ssim(image, hr, scale)[0]
        tiles.append((area.of(image), label, f"{psnr:.2f} dB" if math.isfinite(psnr) else "identical"))
    figure = _draw(hr, area, tiles)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=suffix[1:], dpi=_DPI))
    return area


def most_detailed_box(image: np.ndarray, scale: int) -> Box:
    """The square with the most gradient energy, a fifth of the shorter side long, away from the border.

    Args:
        image: (H, W, 3) RGB uint8.
        scale: Border pixels to stay away from.
    """
    height, width = image.shape[:2]
    side = max(1, min(round(min(height, width) / 5), min(height, width) - 2 * scale))
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64)
    dy, dx = np.gradient(gray) if min(height, width) > 1 else (np.zeros_like(gray), np.zeros_like(gray))
    return largest_box(dx**2 + dy**2, side, scale if min(height, width) >= side + 2 * scale else 0)


def largest_box(amount: np.ndarray, side: int, border: int = 0) -> Box:
    """The square with the largest sum.

    Args:
        amount: (H, W), neither side shorter than ``side`` and twice ``border``.
        side: Of the square, in pixels.
        border: Pixels to stay away from the border.
    """
    total = cv2.integral(amount)
    energy = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    inside = energy[border : energy.shape[0] - border, border : energy.shape[1] - border]
    top, left = np.unravel_index(int(inside.argmax()), inside.shape)
    return Box(int(top) + border, int(left) + border, side, side)


def _draw(hr: np.ndarray, area: Box, tiles: list[Tile]) -> Figure:
    """Lay everything out in inches: the image on the left, as high as the rows of tiles on the right."""
    rows = 1 if len(tiles) <= 3 else 2 if len(tiles) <= 8 else 3
    columns = math.ceil(len(tiles) / rows)
    unit = _TILE / max(area.height, area.width)
    tile_h, tile_w = area.height * unit, area.width * unit
    column_w = max(tile_w, _TEXT_WIDTH)
    step_h, step_w = tile_h + _TEXT + _GAP, column_w + _GAP
    inner_h = max(rows * step_h - _GAP, _TILE + _TEXT)
    zoom = min((inner_h - _TEXT) / hr.shape[0], _WIDEST * columns * step_w / hr.shape[1])
    image_h, image_w = hr.shape[0] * zoom, hr.shape[1] * zoom
    left_w = max(image_w, _TEXT_WIDTH)
    total_w, total_h = 2 * _MARGIN + left_w + columns * step_w, 2 * _MARGIN + inner_h
    figure = Figure(figsize=(total_w, total_h), facecolor="white")
    FigureCanvasAgg(figure)

    def place(picture: np.ndarray, left: float, top: float, height: float, width: float, interpolation: str) -> Axes:
        axes = figure.add_axes((left / total_w, 1 - (top + height) / total_h, width / total_w, height / total_h))
        axes.imshow(picture, interpolation=interpolation, aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    whole = place(hr, _MARGIN + (left_w - image_w) / 2, _MARGIN, image_h, image_w, "antialiased")
    corner = area.left - 0.5, area.top - 0.5
    whole.add_patch(Rectangle(corner, area.width, area.height, fill=False, edgecolor=_ACCENT, linewidth=1.6))
    _write_below(whole, "", f"{hr.shape[1]} x {hr.shape[0]} pixels", image_h, left_w)
    for number, (crop, label, note) in enumerate(tiles):
        row, column = divmod(number, columns)
        left = _MARGIN + left_w + _GAP + column * step_w + (column_w - tile_w) / 2
        axes = place(crop, left, _MARGIN + row * step_h, tile_h, tile_w, "nearest")
        if number == 0:
            axes.spines[:].set(visible=True, color=_ACCENT, linewidth=1.6)
        _write_below(axes, label, note, tile_h, column_w)
    return figure


def _write_below(axes: Axes, label: str, note: str, height: float, width: float) -> None:
    """Label and note under a picture; a label too long for the width is set smaller, then cut."""
    fits = int(_LETTERS_PER_INCH * width)
    size = max(_SMALLEST, _SIZE * min(1.0, fits / max(len(label), 1)))
    longest = int(fits * _SIZE / size)
    label = label if len(label) <= longest else label[: longest - 1] + "…"
    options = {"transform": axes.transAxes, "ha": "center", "va": "top"}
    axes.text(0.5, -0.05 / height, label, fontsize=size, fontweight="bold", **options)
    axes.text(0.5, -(0.21 if label else 0.05) / height, note, fontsize=_SIZE, color="0.35", **options)
