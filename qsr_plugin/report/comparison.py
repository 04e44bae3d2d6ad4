"""Rows of a comparison of trained networks: as a table for the terminal, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from qsr_plugin.report.result_schema import FLOAT, Quality, Result
from qsr_plugin.report.tables import quantity, size


@dataclass(frozen=True)
class Row:
    """One network of a comparison, or one method that failed.

    Attributes:
        label: What to call it, unique.
        method: Recipe.
        bits: Like ``W4A4``; ``float`` for the float network.
        placement: Which places are quantized.
        start: Test set to ``{"psnr", "ssim"}`` before the training: float weights, calibrated ranges.
        end: The same after it; empty if there was none.
        fab: Mean bits of the counted activations.
        bitops: Bit operations for one image, see :mod:`qsr_plugin.report.complexity`.
        storage_bits: Size with weights packed.
        seconds: Time of a training iteration.
        float_seconds: That of the float network, measured right before.
        iterations: Length of the training.
        note: Why there are no scores, or what else must be known.
    """

    label: str
    method: str
    bits: str
    placement: str = ""
    start: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    end: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    fab: float | None = None
    bitops: float | None = None
    storage_bits: int | None = None
    seconds: float | None = None
    float_seconds: float | None = None
    iterations: int | None = None
    note: str = ""

    @property
    def failed(self) -> bool:
        """Whether there are no scores."""
        return not self.end and not self.start

    @property
    def cost(self) -> float | None:
        """Time of a training iteration, relative to the float network's."""
        return self.seconds / self.float_seconds if self.seconds and self.float_seconds else None

    @classmethod
    def of(cls, result: Result) -> Row:
        """What a table shows of a result."""
        start, end = _scores(result.before), _scores(result.quality)
        costs = (None, None, None)
        if result.costs is not None:
            costs = result.costs.fab, result.costs.bitops, result.costs.storage_bits
        took = result.training
        times = () if took is None else (took.seconds, took.float_seconds, took.iterations)
        named = (result.label, result.method, result.bits or FLOAT, result.placement)
        return cls(*named, start, end, *costs, *times, note=result.note)

    def points(self, test: str) -> dict[str, Any]:
        """Figures of one test set under the names that :mod:`qsr_plugin.report.plots` knows."""
        before, after = self.start.get(test, {}), self.end.get(test) or self.start.get(test, {})
        costs = {"fab": self.fab, "bitops": self.bitops, "storage_bits": self.storage_bits, "cost": self.cost}
        return {"label": self.label, "bits": self.bits, "method": self.method, "start": before, **after, **costs}


def _scores(quality: Mapping[str, Quality]) -> dict[str, dict[str, float]]:
    return {name: {"psnr": one.psnr, "ssim": one.ssim} for name, one in quality.items()}


def _columns(rows: Sequence[Row]) -> list[str]:
    """Names of the test sets, in the order of their first appearance."""
    return list(dict.fromkeys(test for row in rows for test in row.start))


def _cells(row: Row, tests: Sequence[str]) -> list[str]:
    scores = [text for test in tests for text in (_change(row, test, "psnr", 2), _change(row, test, "ssim", 4))]
    return [
        row.label, row.placement, *scores, _number(row.fab, "{:.2f}"),
        "" if row.bitops is None else quantity(row.bitops), "" if row.storage_bits is None else size(row.storage_bits),
        _number(row.cost, "{:.2f}"),
    ]  # fmt: skip


def _headings(tests: Sequence[str]) -> list[str]:
    scores = [f"{test} {what}" for test in tests for what in ("PSNR", "SSIM")]
    return ["Network", "Placement", *scores, "FAB", "BitOPs", "Size", "Time / float"]


def _change(row: Row, test: str, what: str, digits: int) -> str:
    before, after = (scores.get(test, {}).get(what) for scores in (row.start, row.end))
    return " → ".join(f"{value:.{digits}f}" for value in (before, after) if value is not None)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def to_table(rows: Sequence[Row], title: str = "") -> Table:
    """A table for the terminal, SSIM after the training only; below it what failed and why."""
    tests = _columns(rows)
    table = Table(title=title or None, caption="\n".join(_notes(rows)) or None, caption_justify="left")
    table.add_column("Network", overflow="fold")
    for heading in _headings(tests)[2:]:
        table.add_column(heading.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for row in rows:
        first, _, *cells = _cells(row, tests)
        for place in range(1, 2 * len(tests), 2):
            cells[place] = cells[place].rpartition("→ ")[2]
        if row.failed:
            cells[0] = "failed"
        table.add_row(first, *cells, style="red" if row.failed else None)
    return table


def _notes(rows: Sequence[Row]) -> list[str]:
    return [f"{row.label}: {'failed: ' if row.failed else ''}{' '.join(row.note.split())}" for row in rows if row.note]


def to_markdown(rows: Sequence[Row], heading: str = "") -> str:
    """The table as Markdown: PSNR (dB) and SSIM on Y as ``before → after``, then a list of what failed and why."""
    tests = _columns(rows)
    lines = [f"# {heading}", ""] if heading else []
    headings = _headings(tests)
    lines += ["| " + " | ".join(headings) + " |", "|---|---|" + "---:|" * (len(headings) - 2)]
    for row in rows:
        cells = _cells(row, tests)
        if row.failed:
            cells[2] = "failed"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    notes = [f"* {note}" for note in _notes(rows)]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """One line per row, numbers unrounded; scores as ``SET_psnr_start``, ``SET_psnr``, ``SET_ssim_start``, ..."""
    tests, plain = _columns(rows), [name for name in Row.__dataclass_fields__ if name not in ("start", "end", "note")]
    keys = [(test, what) for test in tests for what in ("psnr", "ssim")]
    scores = [f"{test}_{what}{when}" for test, what in keys for when in ("_start", "")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, "cost", *scores, "note"])
    for row in rows:
        values = [when.get(test, {}).get(what, "") for test, what in keys for when in (row.start, row.end)]
        own = ["" if getattr(row, name) is None else getattr(row, name) for name in plain]
        writer.writerow([*own, "" if row.cost is None else row.cost, *values, " ".join(row.note.split())])
    return text.getvalue()
