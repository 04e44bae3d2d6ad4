"""Plot of a table of post-training methods: quality by method, a panel for each bit width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from qsr_plugin.report.plots import check_ending, save_figure
from qsr_plugin.report.ptq_rows import PtqRow, in_seconds
from qsr_plugin.report.result_schema import FLOAT

_COLOURS, _MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), ("o", "s", "^", "D")
_PANEL, _LINE, _EDGES = 3.3, 0.4, 1.2  # inches: width of a panel, height of a method with one placement, title and axis
_NAMES = 1.7  # inches for the names of the methods
_TEXT, _GREY = 9.0, "0.45"
_HALO = [withStroke(linewidth=2.5, foreground="white")]
#: Decibels below the best of a panel, or the float network, that its axis shows; what is worse is at its left edge.
_SHOWN = 6.0


def ptq_plot(rows: Sequence[PtqRow], test: str, path: str | Path, *, title: str = "") -> None:
    """Draw the PSNR of each method as a dot, by bits and placement; the float network as a dashed line.

    Scores far below the others are arrows at the left edge. Below the name of a method stands the median of the seconds
    it took. Rows without a score are left out.

    Args:
        rows: Of one network.
        test: Test set.
        path: ``.png`` or ``.svg``.
        title: Above the plot.

    Raises:
        ValueError: For another ending, or no quantized network with a score on the test set.
        OSError: If the file cannot be written.
    """
    check_ending(path)
    drawn = [row for row in rows if test in row.scores and row.method != FLOAT]
    if not drawn:
        raise ValueError(f"no quantized network has a score on {test}: there is nothing to draw")
    level = next((row.scores[test]["psnr"] for row in rows if row.method == FLOAT and test in row.scores), None)
    widths, placements, methods = (
        list(dict.fromkeys(getattr(row, name) for row in drawn)) for name in ("bits", "placement", "method")
    )
    height = _EDGES + _LINE * len(methods) * (0.5 + 0.5 * len(placements))
    figure = Figure(figsize=(_NAMES + _PANEL * len(widths), height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    for axes, bits in zip(panels, widths):
        _panel(axes, [row for row in drawn if row.bits == bits], test, methods, placements, level)
        axes.set_title(bits, fontsize=_TEXT + 1, loc="left")
    panels[0].set_yticks(range(len(methods)), [_named(method, drawn) for method in methods], fontsize=_TEXT)
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    if title:
        figure.suptitle(title, fontsize=_TEXT + 2)
    handles = [
        Line2D([], [], linestyle="none", color=colour, marker=marker, label=placement)
        for placement, colour, marker in zip(placements, _COLOURS, _MARKERS)
    ]
    if level is not None:
        handles.append(Line2D([], [], color=_GREY, linewidth=1, linestyle="--", label=f"float {level:.2f}"))
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False, fontsize=_TEXT)
    save_figure(figure, path)


def _panel(
    axes: Axes, rows: Sequence[PtqRow], test: str, methods: list[str], placements: list[str], level: float | None
) -> None:
    """Dots with their values, those of one method below each other by placement."""
    scores = [row.scores[test]["psnr"] for row in rows] + ([] if level is None else [level])
    high = max(scores)
    low = min(score for score in scores if score >= high - _SHOWN)
    span = max(high - low, 0.1)
    left = low - 0.3 * span  # room for the values, and for arrows
    for row in rows:
        number, psnr = placements.index(row.placement), row.scores[test]["psnr"]
        place = methods.index(row.method) + (number - (len(placements) - 1) / 2) * 0.8 / len(placements)
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        away = psnr < low
        axes.plot(
            [left if away else psnr], [place], color=colour, marker="<" if away else marker, markersize=6.5, zorder=3,
            clip_on=False,
        )  # fmt: skip
        axes.annotate(
            f"{psnr:.2f}", (left if away else psnr, place), (7 if away else -7, 0), textcoords="offset points",
            ha="left" if away else "right", va="center", fontsize=_TEXT - 1, path_effects=_HALO, zorder=4,
        )  # fmt: skip
    if level is not None:
        axes.axvline(level, color=_GREY, linewidth=1, linestyle="--", zorder=1)
    axes.set_xlim(left, high + 0.08 * span)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_TEXT - 0.5)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    for line in range(1, len(methods)):
        axes.axhline(line - 0.5, color="0.93", linewidth=0.8, zorder=0)
    axes.set_xlabel(f"PSNR on Y, {test}, dB", fontsize=_TEXT)


def _named(method: str, rows: Sequence[PtqRow]) -> str:
    spent = [row.spent for row in rows if row.method == method and row.spent is not None]
    return f"{method}\n{in_seconds(median(spent))} s" if spent else method
