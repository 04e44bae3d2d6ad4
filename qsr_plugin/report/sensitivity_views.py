"""Sensitivity for the reader: a table for the terminal, and a bar for each layer as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from qsr_plugin.report.plots import check_ending, save_figure
from qsr_plugin.report.sensitivity import LOST, Sensitivity, SiteDamage, psnr

#: Layers that a picture shows; the others are one line below it.
MOST = 40
_TEXT, _LETTER, _GREY = 9.0, 0.073, "0.45"
_ROW, _WIDTH, _PLOT = 0.21, 7.2, 4.2  # inches
_TITLE, _LEGEND, _BELOW, _MARGIN = 0.4, 0.22, 0.75, 0.12
_BAR = "#56B4E9"
# Port to colour and marker; ports of modules with names of their own share the last.
_STYLES = {"weight": ("#D55E00", "o"), "input": ("#000000", "D"), "output": ("#009E73", "s")}
_OTHER = ("#CC79A7", "^")


def sensitivity_table(found: Sensitivity) -> Table:
    """One row per site, the most damaging first; the ports alone where they were measured."""
    ports = _ports(found.sites)
    table = Table(title=f"{found.network}, {found.method}: each layer quantized alone", caption=_measured(found))
    right = {"justify": "right", "no_wrap": True}
    table.add_column("", **right)
    table.add_column("Layer", overflow="fold", min_width=max(len(row.name) for row in found.sites))
    table.add_column("Bits", no_wrap=True)
    for heading in ("PSNR", "Share", *ports):
        table.add_column(heading, **right)
    for number, row in enumerate(found.sites, 1):
        alone = (_decibels(row.parts[port]) if port in row.parts else "" for port in ports)
        table.add_row(str(number), row.name, _bits(row), _decibels(row.psnr), _percent(row.share), *alone)
    return table


def sensitivity_plot(found: Sensitivity, path: str | Path) -> None:
    """Draw a bar for each of the :data:`MOST` most damaging sites: the longer, the more damage.

    Bars end at the PSNR of the output against the float output, dots at that with one port alone.

    Args:
        found: Where no site does any damage, there are no bars to draw.
        path: ``.png`` or ``.svg``.

    Raises:
        ValueError: For another ending, or if no site changes the output.
        OSError: If the file cannot be written.
    """
    check_ending(path)
    rows = [row for row in found.sites if math.isfinite(row.psnr)][:MOST]
    if not rows:
        raise ValueError(f"{path}: no layer changes the output when it is quantized, so there is nothing to draw")
    names = max(len(row.name) for row in rows) * _LETTER + _MARGIN
    above = _TITLE + (_LEGEND if _ports(rows) else 0.0)
    width, height = max(_WIDTH, names + _PLOT), above + _BELOW + _ROW * len(rows)
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    room = (width - names - 2 * _MARGIN) / width, _ROW * len(rows) / height
    axes = figure.add_axes(((names + _MARGIN) / width, _BELOW / height, *room))
    _draw_bars(axes, rows)
    figure.text(
        _MARGIN / width, 1 - 0.1 / height, f"{found.network}, {found.method}: each layer quantized alone",
        fontsize=_TEXT + 1.5, va="top",
    )  # fmt: skip
    figure.text(_MARGIN / width, 0.08 / height, _summary(found, rows), fontsize=_TEXT - 1, color=_GREY, va="bottom")
    save_figure(figure, path)


def _draw_bars(axes: Axes, rows: Sequence[SiteDamage]) -> None:
    alone = [value for row in rows for value in row.parts.values() if math.isfinite(value)]
    best, worst = max([row.psnr for row in rows] + alone), min([row.psnr for row in rows] + alone)
    span = max(best - worst, 1.0)
    left, right = best + 0.06 * span, worst - 0.34 * span  # room for the figures at the bars' ends
    places = range(len(rows))
    axes.barh(places, [row.psnr - left for row in rows], left=left, height=0.72, color=_BAR, zorder=2)
    for port in _ports(rows):
        colour, marker = _STYLES.get(port, _OTHER)
        dots = [
            (row.parts[port], place) for place, row in zip(places, rows) if math.isfinite(row.parts.get(port, math.inf))
        ]
        face = {"color": colour, "markerfacecolor": colour if port == "weight" else "none"}
        axes.plot(*zip(*dots), linestyle="none", marker=marker, markersize=4, label=f"{port} alone", zorder=3, **face)
    for place, row in zip(places, rows):
        end = min([row.psnr, *(value for value in row.parts.values())])
        axes.annotate(
            f"{_decibels(row.psnr)} dB  {_percent(row.share)}", (end, place), (6, 0), textcoords="offset points",
            fontsize=_TEXT - 1.5, va="center", color="0.25",
        )  # fmt: skip
    axes.set_xlim(left, right)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(places, [row.name for row in rows], fontsize=_TEXT - 1)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.tick_params(axis="x", labelsize=_TEXT - 1)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("PSNR against the float output, dB", fontsize=_TEXT)
    axes.grid(axis="x", color="0.9", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    if any(row.parts for row in rows):
        above = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 6, "frameon": False}
        axes.legend(fontsize=_TEXT - 1, handletextpad=0.1, columnspacing=1.0, borderpad=0.1, **above)


def _summary(found: Sensitivity, drawn: Sequence[SiteDamage]) -> str:
    others = len(found.sites) - len(drawn)
    share = sum(row.share for row in found.sites[len(drawn) :])
    more = f"{others} more layers: {_percent(share)}. " if others else ""
    return (
        f"Longer bars: more damage; % of the layers' squared errors. {more}All together: {_decibels(found.psnr)} dB. "
        f"{_images(found).capitalize()}."
    )


def _measured(found: Sensitivity) -> str:
    return (
        f"PSNR in dB of the output against the float output, on {_images(found)}; share of the layers' squared errors. "
        f"All places together: {_decibels(found.psnr)} dB. Measured in {found.seconds:.0f} s."
    )


def _images(found: Sensitivity) -> str:
    return f"{found.images} image{'s' if found.images > 1 else ''}"


def _ports(rows: Sequence[SiteDamage]) -> list[str]:
    """Ports that were measured alone, the weight first."""
    ports = dict.fromkeys(port for row in rows for port in row.parts)
    return sorted(ports, key=lambda port: port != "weight")


def _bits(row: SiteDamage) -> str:
    """Like ``W4 A4``; several widths of a port as ``4-8``, of several ports as ``4/8``."""
    texts = {"W": [], "A": []}
    for port, widths in row.bits.items():
        text = str(widths[0]) if len(widths) == 1 else f"{widths[0]}-{widths[-1]}"
        texts["W" if port == "weight" else "A"].append(text)
    return " ".join(kind + "/".join(dict.fromkeys(found)) for kind, found in texts.items() if found)


def _decibels(value: float) -> str:
    """With one decimal; damage is not counted beyond that of a lost image, so the lowest value stands for less too."""
    if not math.isfinite(value):
        return "same"
    return f"{value:.1f}" if value > psnr(LOST) + 1e-6 else f"<= {value:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 else "< 0.1 %"
