"""A report as one HTML file: scores, costs, pictures, layers and settings of a quantized network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qsr_plugin.checkpoint import write_atomically
from qsr_plugin.report.complexity_types import ComplexityReport
from qsr_plugin.report.evaluate import EvaluationResult
from qsr_plugin.report.html import template
from qsr_plugin.report.layers import LayerGroup, layer_lines
from qsr_plugin.report.pictures import Example
from qsr_plugin.report.tables import counted_at, fab_text, known, operations, quantity, size

#: Costs and scores of one network on one test set.
Scored = tuple[ComplexityReport, EvaluationResult]


@dataclass(frozen=True)
class Figures:
    """A table of a page.

    Attributes:
        head: Its headings.
        rows: Its lines, as long as the headings.
        caption: Below it; may be empty.
        name: Above it; may be empty.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    name: str = ""


@dataclass(frozen=True)
class Page:
    """What a page shows, in its order.

    Attributes:
        title: What was quantized, and how.
        summary: Its most important figures, a line each.
        scores: One table per test set; none without one.
        cost: Float beside quantized.
        examples: Pictures.
        groups: Layers by bits.
        facts: Settings, by name.
        times: Seconds by what they were spent on.
    """

    title: str
    summary: Sequence[str]
    scores: Sequence[Figures]
    cost: Figures
    examples: Sequence[Example]
    groups: Sequence[LayerGroup]
    facts: Mapping[str, str]
    times: Mapping[str, float]

    @property
    def layers_in_short(self) -> str:
        """The line of totals of the layers."""
        return layer_lines(self.groups)[0]

    @property
    def seconds(self) -> list[tuple[str, str, str]]:
        """Times with their shares."""
        total = sum(self.times.values()) or 1.0
        return [(name, f"{one:.1f}", f"{one / total:.0%}") for name, one in self.times.items()]


def score_figures(name: str, rows: Mapping[str, Scored]) -> Figures:
    """The scores on one test set.

    Args:
        name: Of the set.
        rows: Label to costs and scores; the first one is what the others are compared with.
    """
    first = next(iter(rows.values()))[1]
    lines = []
    for label, (_, score) in rows.items():
        change = f"{score.psnr - first.psnr:+.2f}" if score is not first else ""
        lines.append((label, f"{score.psnr:.2f}", change, f"{score.ssim:.4f}", fab_text(score)))
    caption = (
        f"{len(first.images)} images, x{first.scale}; PSNR (dB) and SSIM on Y, {first.scale} border pixels left out"
    )
    return Figures(("Network", "PSNR", "change", "SSIM", "FAB"), tuple(lines), caption, name)


def cost_figures(plain: ComplexityReport, quantized: ComplexityReport) -> Figures:
    """Costs of the float and the quantized network, and how many times less that is."""
    rows = [
        ("MACs", quantity(plain.macs), quantity(quantized.macs), ""),
        ("FAB, bits", known(plain.fab, "{:.2f}"), known(quantized.fab, "{:.2f}"), ""),
        ("BitOPs", operations(plain.bitops), operations(quantized.bitops), _factor(plain.bitops, quantized.bitops)),
        (
            "Storage",
            *map(size, (plain.storage_bits, quantized.storage_bits)),
            _factor(plain.storage_bits, quantized.storage_bits),
        ),
    ]
    return Figures(("", "float", "quantized", ""), tuple(rows), counted_at(quantized))


def _factor(plain: float | None, quantized: float | None) -> str:
    return f"{plain / quantized:.2f} x less" if plain and quantized else ""


def write_page(page: Page, path: str | Path) -> None:
    """Write a page, whole or not at all.

    Args:
        page: What it shows. All of its text is escaped.
        path: Final place.

    Raises:
        OSError: If the file cannot be written.
    """
    text = template().render(page=page)
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))
