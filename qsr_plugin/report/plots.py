"""Plots of a comparison: quality over cost, and what the training gained. Readable when shown 800 pixels wide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from qsr_plugin.checkpoint import write_atomically
from qsr_plugin.errors import suggest
from qsr_plugin.report.labels import write_labels
from qsr_plugin.report.tables import quantity

_SUFFIXES = (".png", ".svg")
_DPI, _WIDTH, _HEIGHT = 160, 7.2, 4.6  # 1152 pixels wide; inches
# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow that white paper swallows.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
_TEXT, _GREY = 9.0, "0.45"
_HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps text readable over lines

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


def tradeoff_plot(
    rows: Sequence[Row], x: str, y: str, path: str | Path, *, title: str = "", front: bool = False, below: str = ""
) -> None:
    """Draw one labelled dot per network.

    Dots of one method share colour and shape; those of one series are joined by a line in the order of ``x``. Where
    some networks choose bits by content, the dots of all others are open. A float network without the figure ``x``
    becomes a horizontal line to compare with.

    Args:
        rows: ``label``, ``method``, and the figures ``x`` and ``y`` (not finite or missing: the row is left out);
            optionally ``series`` (networks of one name are joined) and ``adaptive`` (it chooses bits by content).
        x: Key of :data:`AXES`.
        y: Key of :data:`AXES`.
        path: ``.png`` or ``.svg``.
        title: Above the plot.
        front: Also draw the Pareto front: the most of ``y`` that is to be had for each ``x``.
        below: Title of the ``x`` axis; that of :data:`AXES` by default, whose BitOPs are those of ``macs-bits``.

    Raises:
        ValueError: For an unknown key, another ending, or no row to draw.
        OSError: If the file cannot be written.
    """
    _check_axes(x, y)
    drawn = [row for row in rows if all(_number(row.get(key)) for key in (x, y))]
    _check(path, drawn, f"{x} and {y}")
    figure, axes = _figure(title, _HEIGHT)
    points = [(row[x] / AXES[x].unit, row[y] / AXES[y].unit) for row in drawn]
    style = _styles(drawn)
    open_others = any(row.get("adaptive") for row in drawn)
    segments = []
    for series in dict.fromkeys(row["series"] for row in drawn if row.get("series")):
        ends = sorted((point, row["method"]) for point, row in zip(points, drawn) if row.get("series") == series)
        line = [point for point, _ in ends]
        axes.plot(*zip(*line), color=style[ends[0][1]][0], linewidth=1.3, alpha=0.55, zorder=2)
        segments += zip(line, line[1:])
    for point, row in zip(points, drawn):
        colour, marker = style[row["method"]]
        open_dot = open_others and not row.get("adaptive") and row["method"] != "float"
        edge = {"markerfacecolor": "white", "markeredgewidth": 1.6} if open_dot else {"markeredgecolor": "white"}
        size = 9.0 if open_others and not open_dot else 7.5  # a white edge makes a dot look smaller
        axes.plot(*point, linestyle="none", zorder=3, color=colour, marker=marker, markersize=size, **edge)
    _scale(axes, x, y, [value for value, _ in points])
    axes.set_xlabel(below or AXES[x].title, fontsize=_TEXT)
    if front:
        best = pareto_front(points)
        axes.plot(*zip(*best), drawstyle="steps-post", color=_GREY, linewidth=1, linestyle=":", zorder=1)
        for a, b in zip(best, best[1:]):
            segments += [(a, (b[0], a[1])), ((b[0], a[1]), b)]
    for row in rows:
        if row["method"] == "float" and _number(row.get(y)) and not _number(row.get(x)):
            level = row[y] / AXES[y].unit
            axes.axhline(level, color=_GREY, linewidth=1, linestyle="--", zorder=1)
            segments.append(tuple((limit, level) for limit in axes.get_xlim()))
            axes.annotate(
                f"{row['label']}\n{row[y]:.2f}", (1, level), (4, 0), xycoords=("axes fraction", "data"), va="center",
                textcoords="offset points", fontsize=_TEXT - 0.5, color=_GREY,
            )  # fmt: skip
    if open_others:
        _explain_dots(axes)
    axes.grid(color="0.9", linewidth=0.8)
    figure.tight_layout()
    colours = [style[row["method"]][0] for row in drawn]
    write_labels(axes, points, [row["label"] for row in drawn], colours, _TEXT, lines=segments)
    save_figure(figure, path)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that none other beats (less or equal first figure, more second), by the first figure."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


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
    save_figure(figure, path)


# -- parts ------------------------------------------------------------------------------------------------------------


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _check_axes(*keys: str) -> None:
    for key in keys:
        if key not in AXES:
            raise ValueError(f"no axis '{key}'. {suggest(key, AXES)}")


def _check(path: str | Path, drawn: Sequence[Row], needed: str) -> None:
    check_ending(path)
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
    """Title of ``y``, ticks and limits; room on the right for the labels."""
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


def _explain_dots(axes: Axes) -> None:
    """What filled and open dots mean, below the plot's title."""
    dot = {"linestyle": "none", "marker": "o", "markersize": 6.5, "markeredgecolor": _GREY}
    handles = [
        Line2D([], [], markerfacecolor=face, label=label, **dot)
        for face, label in ((_GREY, "bits chosen by content"), ("white", "fixed bits"))
    ]
    options = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 2, "frameon": False}
    axes.legend(handles=handles, fontsize=_TEXT - 0.5, handletextpad=0.2, columnspacing=1.0, borderpad=0.2, **options)


def check_ending(path: str | Path) -> None:
    """Refuse a path that :func:`save_figure` could not write, before work is done for it.

    Raises:
        ValueError: For another ending than ``.png`` and ``.svg``.
    """
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{path}: plots are written as {' or '.join(_SUFFIXES)}; change the ending")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as its ending says, whole or not at all; the same figure gives the same file.

    Args:
        figure: With a canvas.
        path: ``.png`` or ``.svg``.

    Raises:
        ValueError: For another ending.
        OSError: If the file cannot be written.
    """
    check_ending(path)
    kind = Path(path).suffix.lower()[1:]
    metadata = {"Date": None} if kind == "svg" else None
    with rc_context({"svg.hashsalt": "qsr"}):
        write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=_DPI, metadata=metadata))
