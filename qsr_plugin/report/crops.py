"""Side-by-side picture: the whole HR image with a box, and the same crop of every result, enlarged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from qsr_plugin.checkpoint import write_atomically
from qsr_plugin.report.evaluate import psnr_ssim

_ACCENT = "#d62728"
_SUFFIXES = (".png", ".svg")
_TILE = 1.75  # inches, longer side of an enlarged crop
_GAP, _MARGIN = 0.12, 0.15
_TEXT = 0.42  # inches below each picture: two lines
_SIZE, _DPI = 9, 160
_LABEL_LENGTH = 24


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
        tiles.append((area.of(image), label, f"{psnr_ssim(image, hr, scale)[0]:.2f} dB"))
    figure = _draw(hr, area, tiles)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=suffix[1:], dpi=_DPI))
    return area


def most_detailed_box(image: np.ndarray, scale: int, *, share: float = 0.2) -> Box:
    """The square with the most gradient energy, away from the border.

    Args:
        image: (H, W, 3) RGB uint8.
        scale: Border pixels to stay away from.
        share: Side of the square as a part of the image's shorter side.
    """
    height, width = image.shape[:2]
    side = max(1, min(round(min(height, width) * share), min(height, width) - 2 * scale))
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64)
    dy, dx = np.gradient(gray) if min(height, width) > 1 else (np.zeros_like(gray), np.zeros_like(gray))
    total = cv2.integral(dx**2 + dy**2)
    energy = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    border = scale if min(height, width) >= side + 2 * scale else 0
    inside = energy[border : energy.shape[0] - border, border : energy.shape[1] - border]
    top, left = np.unravel_index(int(inside.argmax()), inside.shape)
    return Box(int(top) + border, int(left) + border, side, side)


def _draw(hr: np.ndarray, area: Box, tiles: list[tuple[np.ndarray, str, str]]) -> Figure:
    """Lay everything out in inches: the image on the left, as high as the rows of tiles on the right."""
    rows = 1 if len(tiles) <= 3 else 2 if len(tiles) <= 8 else 3
    columns = math.ceil(len(tiles) / rows)
    unit = _TILE / max(area.height, area.width)
    tile_h, tile_w = area.height * unit, area.width * unit
    step_h, step_w = tile_h + _TEXT + _GAP, tile_w + _GAP
    inner_h = rows * step_h - _GAP
    image_h = inner_h - _TEXT
    image_w = image_h * hr.shape[1] / hr.shape[0]
    if image_w > 2 * columns * step_w:  # a panorama
        image_w = 2 * columns * step_w
        image_h = image_w * hr.shape[0] / hr.shape[1]
    total_w = 2 * _MARGIN + image_w + columns * step_w
    total_h = 2 * _MARGIN + inner_h
    figure = Figure(figsize=(total_w, total_h), facecolor="white")
    FigureCanvasAgg(figure)

    def place(picture: np.ndarray, left: float, top: float, height: float, width: float, interpolation: str):
        axes = figure.add_axes((left / total_w, 1 - (top + height) / total_h, width / total_w, height / total_h))
        axes.imshow(picture, interpolation=interpolation, aspect="auto")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        return axes

    image_top = _MARGIN + (inner_h - _TEXT - image_h) / 2
    whole = place(hr, _MARGIN, image_top, image_h, image_w, "antialiased")
    whole.add_patch(
        Rectangle((area.left - 0.5, area.top - 0.5), area.width, area.height, fill=False, edgecolor=_ACCENT, linewidth=1.6)
    )
    whole.set_xlabel(f"{hr.shape[1]} x {hr.shape[0]} pixels", fontsize=_SIZE, color="0.35", labelpad=4)
    for number, (crop, label, note) in enumerate(tiles):
        row, column = divmod(number, columns)
        left = _MARGIN + image_w + _GAP + column * step_w
        axes = place(crop, left, _MARGIN + row * step_h, tile_h, tile_w, "nearest")
        if number == 0:
            axes.spines[:].set(visible=True, color=_ACCENT, linewidth=1.6)
        _write_below(axes, label, note, tile_h)
    return figure


def _write_below(axes, label: str, note: str, height: float) -> None:
    short = label if len(label) <= _LABEL_LENGTH else label[: _LABEL_LENGTH - 1] + "…"
    options = {"transform": axes.transAxes, "ha": "center", "va": "top"}
    axes.text(0.5, -0.05 / height, short, fontsize=_SIZE, fontweight="bold", **options)
    axes.text(0.5, -0.22 / height, note, fontsize=_SIZE, color="0.35", **options)
