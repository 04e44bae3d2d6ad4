"""Plots of a comparison: quality over cost, and what the training gained. Readable when shown 800 pixels wide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from qsr_plugin.checkpoint import write_atomically
from qsr_plugin.errors import suggest
from qsr_plugin.report.tables import quantity

_SUFFIXES = (".png", ".svg")
_DPI, _WIDTH, _HEIGHT = 160, 7.2, 4.6  # 1152 pixels wide; inches
# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow that white paper swallows.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
_TEXT, _GREY = 9.0, "0.45"
_HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps text readable over lines
_LABEL_GAP = 14.0  # points between the rightmost dot of a group and its labels

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Axis:
    """How a figure is shown on an axis.

    Attributes:
        title: With its unit.
        unit: What the numbers are divided by.
        plain: Written as plain numbers; else with a decimal prefix.
        log: Equal ratios take equal room.
    """

    title: str
    unit: float = 1.0
    plain: bool = True
    log: bool = False


#: Figures that rows may hold, and how they are drawn.
AXES = {
    "psnr": Axis("PSNR on Y, dB"),
    "ssim": Axis("SSIM on Y"),
    "bitops": Axis("BitOPs of one image (MACs x weight bits x activation bits)", plain=False, log=True),
    "storage_bits": Axis("Size, MB", unit=8e6, log=True),
    "fab": Axis("FAB, bits"),
    "cost": Axis("Time of a training iteration, relative to float"),
}


def tradeoff_plot(rows: Sequence[Row], x: str, y: str, path: str | Path, *, title: str = "") -> None:
    """Draw one labelled dot per network.

    Dots of one method share colour and shape. Labels stand in a column to the right of each group of dots, in the
    order of the dots, with a line to each.

    Args:
        rows: ``label``, ``method``, and the figures ``x`` and ``y`` (not finite or missing: the row is left out).
        x: Key of :data:`AXES`.
        y: Key of :data:`AXES`.
        path: ``.png`` or ``.svg``.
        title: Above the plot.

    Raises:
        ValueError: For an unknown key, another ending, or no row to draw.
        OSError: If the file cannot be written.
    """
    _check_axes(x, y)
    drawn = [row for row in rows if all(_number(row.get(key)) for key in (x, y))]
    _check(path, drawn, f"{x} and {y}")
    figure, axes = _figure(title, _HEIGHT)
    style = _styles(drawn)
    for method, (colour, marker) in style.items():
        points = sorted((row[x] / AXES[x].unit, row[y] / AXES[y].unit) for row in drawn if row["method"] == method)
        options = {"color": colour, "marker": marker, "markersize": 7.5, "markeredgecolor": "white"}
        axes.plot(*zip(*points), linestyle="none", zorder=3, **options)
    _scale(axes, x, y, [row[x] / AXES[x].unit for row in drawn])
    axes.grid(color="0.9", linewidth=0.8)
    points = [(row[x] / AXES[x].unit, row[y] / AXES[y].unit) for row in drawn]
    figure.tight_layout()
    _write_labels(axes, points, [row["label"] for row in drawn], [style[row["method"]][0] for row in drawn])
    _save(figure, path)


def gain_plot(rows: Sequence[Row], y: str, path: str | Path, *, title: str = "") -> None:
    """Draw for each network what it scored before and after the training, as two dots on one line.

    Args:
        rows: ``label``, ``method``, the figure ``y`` after the training, and ``start`` with ``y`` before it. A row
            without ``start`` (the float network) becomes a vertical line to compare with.
        y: Key of :data:`AXES`.
        path: ``.png`` or ``.svg``.
        title: Above the plot.

    Raises:
        ValueError: For an unknown key, another ending, or no row to draw.
        OSError: If the file cannot be written.
    """
    _check_axes(y)
    drawn = [row for row in rows if _number(row.get(y)) and _number((row.get("start") or {}).get(y))]
    _check(path, drawn, f"{y} before and after a training")
    figure, axes = _figure(title, 1.15 + 0.3 * len(drawn))
    style = _styles(drawn)
    digits = 2 if y == "psnr" else 4
    for place, row in enumerate(drawn):
        start, end, (colour, marker) = row["start"][y], row[y], style[row["method"]]
        axes.plot(
            [start, end], [place, place], color=colour, linewidth=2.2, alpha=0.45, solid_capstyle="butt", zorder=2
        )
        dot = {"linestyle": "none", "marker": marker, "markersize": 7.5, "color": colour, "zorder": 3}
        axes.plot([start], [place], markerfacecolor="white", **dot)
        axes.plot([end], [place], **dot)
        for value, other in ((start, end), (end, start)):
            right = value > other or (value == other and value is end)
            offset, side = (8, "left") if right else (-8, "right")
            axes.annotate(
                f"{value:.{digits}f}", (value, place), (offset, 0), textcoords="offset points", ha=side, va="center",
                fontsize=_TEXT - 0.5, color="black" if value == end else _GREY, path_effects=_HALO,
            )  # fmt: skip
    for row in rows:
        if _number(row.get(y)) and not row.get("start"):
            axes.axvline(row[y], color=_GREY, linewidth=1, linestyle="--", zorder=1)
            axes.annotate(
                f"{row['label']} {row[y]:.{digits}f}", (row[y], 1), (-3, 3), xycoords=("data", "axes fraction"),
                textcoords="offset points", fontsize=_TEXT - 0.5, color=_GREY, ha="right",
            )  # fmt: skip
    axes.set_yticks(range(len(drawn)), [row["label"] for row in drawn], fontsize=_TEXT)
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    axes.margins(x=0.14)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_xlabel(f"{AXES[y].title}: before (open) and after the training (filled)", fontsize=_TEXT)
    figure.tight_layout()
    _save(figure, path)


# -- parts ------------------------------------------------------------------------------------------------------------


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _check_axes(*keys: str) -> None:
    for key in keys:
        if key not in AXES:
            raise ValueError(f"no axis '{key}'. {suggest(key, AXES)}")


def _check(path: str | Path, drawn: Sequence[Row], needed: str) -> None:
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{path}: plots are written as {' or '.join(_SUFFIXES)}; change the ending")
    if not drawn:
        raise ValueError(f"no row has finite {needed}: there is nothing to draw")


def _figure(title: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_TEXT)
    if title:
        axes.set_title(title, fontsize=_TEXT + 1.5, loc="left", pad=16)
    return figure, axes


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker by method, the float network apart; more methods than colours still differ by marker."""
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != "float"]
    styles = {m: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, m in enumerate(methods)}
    return {"float": (_GREY, "*"), **styles}


def _scale(axes: Axes, x: str, y: str, values: Sequence[float]) -> None:
    """Titles, ticks and limits; room on the right for the labels."""
    axes.set_xlabel(AXES[x].title, fontsize=_TEXT)
    axes.set_ylabel(AXES[y].title, fontsize=_TEXT)
    axes.margins(y=0.1)
    low, high = min(values), max(values)
    if AXES[x].log and low > 0:
        axes.set_xscale("log")
        # A log axis of less than a decade has no ticks of its own: some round numbers between the ends.
        ratio = max(high / low, 1.25)
        ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low / ratio**0.1, high * ratio**0.5)
        axes.set_xlim(low / ratio**0.12, high * ratio**0.55)
        if ratio < 12:
            axes.set_xticks([tick for tick in ticks if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]])
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(axis="x", which="minor", length=0)
    else:
        span = (high - low) or abs(high) or 1.0
        axes.set_xlim(low - 0.08 * span, high + 0.4 * span)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.4g}" if AXES[x].plain else quantity(v)))


def _write_labels(
    axes: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str], colours: Sequence[str]
) -> None:
    """One column of labels to the right of each group of dots that stand closer than their labels are wide."""
    figure = axes.figure
    renderer = figure.canvas.get_renderer()
    per_point = figure.dpi / 72
    texts = [axes.text(0, 0, label, fontsize=_TEXT) for label in labels]
    boxes = [text.get_window_extent(renderer) for text in texts]
    for text in texts:
        text.remove()
    height, gap = max(box.height for box in boxes) * 1.12, _LABEL_GAP * per_point
    pixels = axes.transData.transform(points)
    frame = axes.get_window_extent(renderer)
    groups: list[list[int]] = []
    for index in sorted(range(len(points)), key=lambda i: pixels[i][0]):
        widest = max((boxes[i].width for i in groups[-1]), default=0.0) if groups else 0.0
        if groups and pixels[index][0] - min(pixels[i][0] for i in groups[-1]) < widest + 2 * gap:
            groups[-1].append(index)
        else:
            groups.append([index])
    inverse = axes.transData.inverted()
    leader = {"arrowstyle": "-", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 3}
    for group in groups:
        group.sort(key=lambda i: pixels[i][1])
        column = max(pixels[i][0] for i in group) + gap
        heights = spread([float(pixels[i][1]) for i in group], height, float(frame.y0), float(frame.y1))
        for index, level in zip(group, heights):
            place = inverse.transform((column, level))
            axes.annotate(
                labels[index], points[index], place, fontsize=_TEXT, va="center", ha="left",
                annotation_clip=False, zorder=4, path_effects=_HALO,
                arrowprops={**leader, "color": colours[index]},
            )  # fmt: skip


def spread(wanted: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Move ascending places apart until they are ``least`` from each other, as little as possible.

    Args:
        wanted: Ascending.
        least: Smallest distance.
        low: Nothing goes below, as far as there is room.
        high: Nothing goes above, as far as there is room.

    Returns:
        Ascending places.
    """
    blocks: list[list[float]] = []  # of places that touch each other: centre of the first if all could choose, count
    for place in wanted:
        blocks.append([place, 1.0])
        while len(blocks) > 1 and blocks[-1][0] < blocks[-2][0] + blocks[-2][1] * least:
            start, count = blocks.pop()
            previous, before = blocks[-1]
            # The least squared movement: the mean of what each place would choose for the first of the block.
            blocks[-1] = [(previous * before + (start - before * least) * count) / (before + count), before + count]
    places = [start + number * least for start, count in blocks for number in range(int(count))]
    for number in range(len(places)):
        places[number] = max(places[number], low + (number + 0.5) * least)
    for number in reversed(range(len(places))):
        places[number] = min(places[number], high - (len(places) - number - 0.5) * least)
    return places


def _save(figure: Figure, path: str | Path) -> None:
    suffix = Path(path).suffix.lower()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=suffix[1:], dpi=_DPI))
