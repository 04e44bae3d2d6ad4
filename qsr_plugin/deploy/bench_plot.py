"""Plot of ``qsr bench``: how many times as fast each variant is as the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from qsr_plugin.deploy.bench_names import QUANTIZED, REFERENCE
from qsr_plugin.deploy.bench_rows import Row, Size
from qsr_plugin.report.plots import save_figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_WIDTH, _BAR, _EDGES = 7.2, 0.3, 1.6  # inches: of the figure, height of a bar, title and axis
_TEXT, _GREY = 9.0, "0.45"
_FLOAT = 0.45  # opacity of the bars of float networks
_HALO = [withStroke(linewidth=2.5, foreground="white")]


def bench_plot(rows: Sequence[Row], sizes: Sequence[Size], path: str | Path, *, title: str, below: str) -> None:
    """Draw a bar for each variant and size, with its range; the reference as a dashed line.

    Args:
        rows: Those without figures are left out.
        sizes: Height and width, each in its colour.
        path: ``.png`` or ``.svg``.
        title: Above the plot.
        below: Under it, in small print.

    Raises:
        ValueError: For another ending.
        OSError: If the file cannot be written.
    """
    drawn = [row for row in rows if row.speeds]
    height = _EDGES + len(drawn) * (_BAR * len(sizes) + 0.12)
    figure = Figure(figsize=(_WIDTH, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes, thick = figure.subplots(), 0.8 / len(sizes)
    most = max(speed.most for row in drawn for speed in row.speeds.values())
    for number, size in enumerate(sizes):
        own = [(place, row.speeds[size]) for place, row in enumerate(drawn) if size in row.speeds]
        places = [place + (number - (len(sizes) - 1) / 2) * thick for place, _ in own]
        speeds = [speed for _, speed in own]
        label = f"{size[0]}x{size[1]}"
        colour = _COLOURS[number % len(_COLOURS)]
        bars = axes.barh(places, [speed.faster for speed in speeds], 0.9 * thick, color=colour, label=label)
        for (place, _), bar in zip(own, bars):
            bar.set_alpha(1 if drawn[place].name in QUANTIZED else _FLOAT)
        for place, speed in zip(places, speeds):
            if len(speed.ratios) > 1:
                spread = [[speed.faster - speed.least], [speed.most - speed.faster]]
                axes.errorbar(speed.faster, place, xerr=spread, ecolor="0.2", elinewidth=1, capsize=2)
            axes.annotate(
                f"{speed.faster:.2f}", (speed.most, place), (5, 0), textcoords="offset points", va="center",
                fontsize=_TEXT - 1, path_effects=_HALO, zorder=4,
            )  # fmt: skip
    axes.axvline(1, color=_GREY, linewidth=1, linestyle="--", zorder=3)
    axes.set_xlim(0, 1.12 * most)
    axes.set_yticks(range(len(drawn)), [_name(row) for row in drawn], fontsize=_TEXT)
    axes.set_ylim(len(drawn) - 0.45, -0.55)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_TEXT - 0.5)
    axes.set_xlabel(f"speed, {REFERENCE} = 1; float networks pale", fontsize=_TEXT)
    size = f", {sizes[0][0]}x{sizes[0][1]}" if len(sizes) == 1 else ""
    figure.suptitle(f"{title}{size}", fontsize=_TEXT + 1)
    if len(sizes) > 1:
        axes.legend(loc="upper right", frameon=False, fontsize=_TEXT)  # the first rows are the slow ones
    figure.supxlabel(below, fontsize=_TEXT - 2, color=_GREY, x=0.01, ha="left")
    save_figure(figure, path)


def _name(row: Row) -> str:
    """What a bar is called: the variant, and below it its scores."""
    return "\n".join([row.name, *(f"{test} {quality.psnr:.2f} dB" for test, quality in row.quality.items())])
