"""Picture of chosen bits: a map over the image, and beside it the share of each width in every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from qsr_plugin.report.bit_maps import BitMap
from qsr_plugin.report.plots import check_ending, save_figure

# In inches: sides the image may have, room above and below it, margin, gap between image and table, width of a letter;
# highest and lowest row of the table, its greatest height, width of a column, and of all columns together.
_WIDEST, _HIGHEST, _TITLE, _BELOW, _MARGIN, _GAP, _LETTER = 6.4, 5.2, 0.62, 0.75, 0.2, 0.25, 0.072
_ROW, _LEAST_ROW, _TABLE, _COLUMN, _COLUMNS = 0.165, 0.05, 9.0, 0.46, 3.2
_BAR, _LEAST_BAR = 0.13, 2.4  # height of the colour bar, and how wide it is at least
_TEXT, _SMALLEST, _LONGEST = 9.0, 4.5, 24  # points, points, letters
_TRANSLUCENT, _CONTRAST = 0.55, 0.65  # the image is gray and pale, so that the colours are those of the bar
_BITS, _SHARES = colormaps["viridis"], colormaps["Blues"]  # both even in lightness, so that no colour vision is needed
_HALO = [withStroke(linewidth=1.8, foreground="white")]
_SHARE = "Share of patches by width, %"
_LUMINANCE = (0.299, 0.587, 0.114)


def save_bits(path: str | Path, image: np.ndarray, maps: Sequence[BitMap]) -> None:
    """Draw what networks chose on one image, one below the other.

    Args:
        path: ``.png`` or ``.svg``.
        image: (H, W, 3) RGB uint8, the low-resolution image.
        maps: One for each network, of this image.

    Raises:
        ValueError: For another ending, no map, or a patch outside of the image.
        OSError: If the file cannot be written.
    """
    check_ending(path)
    save_figure(bits_figure(image, maps), path)


def bits_figure(image: np.ndarray, maps: Sequence[BitMap]) -> Figure:
    """The figure that :func:`save_bits` writes; axes are map, colour bar, layers and total of each network in turn.

    Raises:
        ValueError: If there is no map, or a patch lies outside of the image.
    """
    if not maps:
        raise ValueError("no bits to draw: give at least one network")
    height, width = image.shape[:2]
    for patch in (patch for one in maps for patch in one.patches):
        if min(patch.top, patch.left) < 0 or patch.top + patch.height > height or patch.left + patch.width > width:
            raise ValueError(f"{patch} does not lie in the image of {height}x{width} (height x width)")
    layout = _Layout(height, width, maps)
    figure = Figure(figsize=(layout.width, layout.band * len(maps)), facecolor="white")
    FigureCanvasAgg(figure)
    low, high = _limits([value for one in maps for value in one.by_patch])
    gray = 255 - _CONTRAST * (255 - image @ np.array(_LUMINANCE))
    for number, one in enumerate(maps):
        axes = layout.axes(figure, number, _MARGIN, _TITLE, layout.image_width, layout.image_height)
        _draw_map(axes, gray, one, Normalize(low, high), layout.zoom)
        below = _TITLE + layout.image_height + 0.1
        bar = layout.axes(figure, number, _MARGIN, below, layout.bar_width, _BAR)
        _draw_bar(figure, bar, Normalize(low, high))
        _draw_layers(figure, layout, number, one)
    return figure


class _Layout:
    """Sizes in inches; every network has a band of the same height."""

    def __init__(self, height: int, width: int, maps: Sequence[BitMap]) -> None:
        rows, columns = max(len(one.places) for one in maps), max(len(one.widths) for one in maps)
        self.row = max(min(_ROW, _TABLE / (rows + 2)), _LEAST_ROW)
        self.column = min(_COLUMN, _COLUMNS / columns)
        names = max(len(name) for one in maps for name in _short(one.places))
        table = (rows + 2) * self.row
        self.zoom = min(_WIDEST / width, max(_HIGHEST, table - _BELOW) / height)
        self.image_height, self.image_width = height * self.zoom, width * self.zoom
        self.bar_width = max(self.image_width, _LEAST_BAR)
        title = max(len(text) for one in maps for text in (one.label, _note(one))) * _LETTER
        self.table_left = _MARGIN + max(self.bar_width, title) + _GAP + names * _LETTER + 0.1
        self.width = self.table_left + max((columns + 1) * self.column, len(_SHARE) * _LETTER) + 2 * _MARGIN
        self.band = _TITLE + max(self.image_height + _BELOW, table + _MARGIN + 0.2)

    def axes(self, figure: Figure, number: int, left: float, top: float, width: float, height: float) -> Axes:
        """Axes in a band; ``top`` counts from the upper edge of the band."""
        whole_width, whole_height = figure.get_size_inches()
        bottom = whole_height - number * self.band - top - height
        return figure.add_axes((left / whole_width, bottom / whole_height, width / whole_width, height / whole_height))


def _draw_map(axes: Axes, gray: np.ndarray, one: BitMap, norm: Normalize, zoom: float) -> None:
    axes.imshow(gray, cmap="gray", vmin=0, vmax=255, interpolation="bicubic", aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    digits = 1 if norm.vmax - norm.vmin > 1.5 else 2
    for patch, value in zip(one.patches, one.by_patch):
        corner, sides = (patch.left - 0.5, patch.top - 0.5), (patch.width, patch.height)
        axes.add_patch(Rectangle(corner, *sides, facecolor=_BITS(norm(value)), alpha=_TRANSLUCENT, linewidth=0))
        axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor="white", linewidth=0.9))
        # A digit is about 0.6 of its size wide; one tenth of the patch on each side stays free.
        size = min(_TEXT, 72 * zoom * 0.8 * min(patch.width / (0.6 * (digits + 2)), patch.height))
        if size >= _SMALLEST:
            middle = patch.left + patch.width / 2 - 0.5, patch.top + patch.height / 2 - 0.5
            axes.text(*middle, f"{value:.{digits}f}", size=size, ha="center", va="center", path_effects=_HALO)
    axes.text(0, 1 + 0.33 / _inches(axes), one.label, transform=axes.transAxes, size=_TEXT + 1.5)
    axes.text(0, 1 + 0.1 / _inches(axes), _note(one), transform=axes.transAxes, size=_TEXT, color="0.35")


def _note(one: BitMap) -> str:
    return f"{one.method}, FAB {one.fab:.2f} bits"


def _inches(axes: Axes) -> float:
    """Height of the axes."""
    return axes.get_position().height * axes.figure.get_size_inches()[1]


def _draw_bar(figure: Figure, axes: Axes, norm: Normalize) -> None:
    bar = figure.colorbar(ScalarMappable(norm, _BITS), cax=axes, orientation="horizontal", alpha=_TRANSLUCENT)
    bar.set_label("mean bits of a patch", size=_TEXT)
    bar.ax.tick_params(labelsize=_TEXT)
    bar.outline.set_visible(False)


def _draw_layers(figure: Figure, layout: _Layout, number: int, one: BitMap) -> None:
    """Share of the patches that chose each width, one row per layer; below it all layers together."""
    rows, columns = one.shares.shape
    names = _short(one.places)
    top = _TITLE + layout.row
    wide = columns * layout.column
    layers = layout.axes(figure, number, layout.table_left, top, wide, rows * layout.row)
    total = layout.axes(figure, number, layout.table_left, top + (rows + 0.5) * layout.row, wide, layout.row)
    step = math.ceil(0.1 / layout.row)  # of the rows that are named, so that names do not touch
    size = min(_TEXT - 1.5, 72 * layout.row * step * 0.72)
    for axes, shares, means in ((layers, one.shares, one.by_place), (total, one.shares.mean(0)[None], [one.fab])):
        axes.imshow(shares, cmap=_SHARES, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.tick_params(length=0, labelsize=size, pad=3)
        axes.spines[:].set(color="0.8", linewidth=0.6)
        axes.set_xticks([])
        for row in range(0, len(shares), step):
            if step == 1:
                for column, share in enumerate(shares[row]):
                    ink = "white" if share > 0.55 else "black"
                    text = f"{100 * share:.0f}" if share else ""
                    axes.text(column, row, text, size=size, color=ink, ha="center", va="center_baseline")
            axes.text(columns - 0.3, row, f"{means[row]:.2f}", size=size, ha="left", va="center_baseline")
    layers.set_yticks(range(0, rows, step), names[::step])
    total.set_yticks([0], ["all layers"])
    layers.xaxis.tick_top()
    layers.set_xticks(range(columns), [str(width) for width in one.widths], size=_TEXT)
    layers.annotate(
        "mean", (columns - 0.3, 1), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points", size=_TEXT
    )
    layers.text(0, 1 + 0.33 / _inches(layers), _SHARE, transform=layers.transAxes, size=_TEXT, color="0.35")


def _short(places: Sequence[str]) -> list[str]:
    """Names without the port if all have the same, long ones cut at their start."""
    same = len({place.rpartition(".")[2] for place in places}) == 1
    names = [place.rpartition(".")[0] if same else place for place in places]
    return [name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :] for name in names]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the colours: halves of a bit around all values, at least one bit apart."""
    low, high = math.floor(2 * min(values)) / 2, math.ceil(2 * max(values)) / 2
    return (low - 0.5, high + 0.5) if low == high else (low, max(high, low + 1))
