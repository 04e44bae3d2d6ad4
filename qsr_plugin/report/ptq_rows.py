"""Rows of a table of post-training methods: for the terminal, as Markdown, CSV and HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qsr_plugin.report.result_schema import FLOAT, Result
from qsr_plugin.report.tables import quantity, size

_WIDE = 250  # columns of a page
_COSTS = ("fab", "bitops", "storage_bits")


@dataclass(frozen=True)
class PtqRow:
    """One network made by one method, or why there is none.

    Attributes:
        network: What the float network is called.
        method: Recipe; ``float`` for the float network itself.
        bits: Like ``W4A4``; empty for the float network.
        placement: Which places are quantized.
        scores: Test set to its means ``{"psnr", "ssim", "fab"}``: dB and SSIM on Y, bits.
        fab: Mean bits of the counted activations on the first test set.
        bitops: Bit operations for one image, see :mod:`qsr_plugin.report.complexity`; with the bits of ``fab``.
        storage_bits: Size with weights packed.
        seconds: By what they were spent on: calibration and tuning, without tests and reading.
        memory: Peak of the process in bytes until the network was made, tests left out; on a GPU that of its tensors.
        fragile: Places that got more bits than the recipe's.
        note: Why there are no scores.
    """

    network: str
    method: str
    bits: str = ""
    placement: str = ""
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    fab: float | None = None
    bitops: float | None = None
    storage_bits: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    memory: int | None = None
    fragile: tuple[str, ...] = ()
    note: str = ""

    @property
    def failed(self) -> bool:
        """Whether there are no scores."""
        return not self.scores

    @property
    def label(self) -> str:
        """Everything that tells it from other rows."""
        return " ".join(part for part in (self.network, self.method, self.bits, self.placement) if part)

    @property
    def spent(self) -> float | None:
        """Seconds in all."""
        return sum(self.seconds.values()) if self.seconds else None

    @classmethod
    def of(cls, result: Result) -> PtqRow:
        """What a table shows of a result."""
        quality = result.quality
        scores = {name: {"psnr": one.psnr, "ssim": one.ssim, "fab": one.fab} for name, one in quality.items()}
        costs = {} if result.costs is None else {name: getattr(result.costs, name) for name in _COSTS}
        if quality:
            costs["fab"] = next(iter(quality.values())).fab
        same = {name: getattr(result, name) for name in ("network", "method", "bits", "placement", "seconds", "note")}
        fragile = tuple(result.details.get("fragile", ()))
        return cls(**same, **costs, scores=scores, memory=result.peak_memory, fragile=fragile)


def networks_of(rows: Iterable[PtqRow]) -> dict[str, list[PtqRow]]:
    """Rows by network, in their order."""
    found: dict[str, list[PtqRow]] = {}
    for row in rows:
        found.setdefault(row.network, []).append(row)
    return found


def tests_of(rows: Iterable[PtqRow]) -> list[str]:
    """Names of the test sets, in the order of their first appearance."""
    return list(dict.fromkeys(test for row in rows for test in row.scores))


def in_seconds(seconds: float) -> str:
    """Seconds as text, tenths only where they matter."""
    return f"{seconds:.{1 if seconds < 10 else 0}f}"


def to_table(rows: Sequence[PtqRow], title: str = "") -> Table:
    """A table of one network for the terminal; below it what failed and why.

    The highest PSNR among the rows of the same bits and placement is bold.
    """
    tests, best, longest = tests_of(rows), _best(rows), max(len(row.method) for row in rows)
    table = Table(title=escape(title) or None, caption=escape("\n".join(_notes(rows))) or None, caption_justify="left")
    for number, heading in enumerate(_headings(tests)):
        justify, least = ("right", None) if number > 2 else ("left", 0 if number else longest)
        table.add_column(heading.replace(" ", "\n", 1), justify=justify, min_width=least, overflow="fold")
    before: PtqRow | None = None
    for row in rows:
        if before is not None and (row.bits, row.placement) != (before.bits, before.placement):
            table.add_section()
        cells = [escape(cell) for cell in _cells(row, tests)]
        for place, test in enumerate(tests, 3):
            if (row.label, test) in best:
                cells[place] = f"[bold]{cells[place]}[/bold]"
        table.add_row(*cells, style="red" if row.failed else None)
        before = row
    return table


def to_markdown(rows: Sequence[PtqRow], about: Sequence[str] = ()) -> str:
    """A section with a table for each network; below it what failed and why.

    Args:
        rows: In the order to show them.
        about: Lines that say how the table was made.
    """
    lines = ["# Post-training quantization", "", *(f"* {line}" for line in about)]
    for network, own in networks_of(rows).items():
        tests, best = tests_of(own), _best(own)
        headings = _headings(tests)
        lines += ["", f"## {network}", "", f"| {' | '.join(headings)} |"]
        lines.append("|---|---|---|" + "---:|" * (len(headings) - 3))
        for row in own:
            cells = [cell.replace("|", "\\|") for cell in _cells(row, tests)]
            for place, test in enumerate(tests, 3):
                if (row.label, test) in best:
                    cells[place] = f"**{cells[place]}**"
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"* {note}" for note in _notes(own))]
    return "\n".join(lines).rstrip() + "\n"


def to_csv(rows: Sequence[PtqRow]) -> str:
    """One line per row, numbers unrounded; scores as ``SET_psnr``, ``SET_ssim`` and ``SET_fab``."""
    plain = ("network", "method", "bits", "placement", "fab", "bitops", "storage_bits")
    keys = [(test, what) for test in tests_of(rows) for what in ("psnr", "ssim", "fab")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, "seconds", "memory_bytes", *(f"{test}_{what}" for test, what in keys), "fragile", "note"])
    for row in rows:
        values = [getattr(row, name) for name in plain] + [row.spent, row.memory]
        values += [row.scores.get(test, {}).get(what) for test, what in keys]
        values += [" ".join(row.fragile), " ".join(row.note.split())]
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()


def to_html(rows: Sequence[PtqRow], about: Sequence[str] = ()) -> str:
    """The tables of the terminal as a page that needs no other file; arguments as for :func:`to_markdown`."""
    console = Console(record=True, file=io.StringIO(), width=_WIDE, highlight=False)
    for line in about:
        console.print(line, markup=False)
    for network, own in networks_of(rows).items():
        console.print("", to_table(own, network))
    return console.export_html()


# -- parts ------------------------------------------------------------------------------------------------------------


def _headings(tests: Sequence[str]) -> list[str]:
    scores = [f"{test} PSNR/SSIM" for test in tests]
    return ["Method", "Bits", "Placement", *scores, "FAB", "BitOPs", "Size", "Seconds", "Memory"]


def _cells(row: PtqRow, tests: Sequence[str]) -> list[str]:
    scores = [_score(row.scores.get(test)) for test in tests]
    if row.failed:
        scores[:1] = ["failed"]
    costs = [
        "" if row.fab is None else f"{row.fab:.2f}",
        "" if row.bitops is None else quantity(row.bitops),
        "" if row.storage_bits is None else size(row.storage_bits),
        "" if row.spent is None else in_seconds(row.spent),
        "" if row.memory is None else size(8 * row.memory),
    ]
    method = f"{row.method} (failed)" if row.failed and not tests else row.method
    return [method, f"{row.bits}+" if row.fragile else row.bits, row.placement, *scores[: len(tests)], *costs]


def _score(means: Mapping[str, float] | None) -> str:
    return "" if means is None else f"{means['psnr']:.2f}/{means['ssim']:.4f}"


def _best(rows: Sequence[PtqRow]) -> set[tuple[str, str]]:
    """Label and test set of the highest PSNR, as it is shown, among two or more of the same bits and placement."""
    best = set()
    for test in tests_of(rows):
        groups: dict[tuple[str, str], dict[str, float]] = {}
        for row in rows:
            if test in row.scores and row.method != FLOAT:
                psnr = round(row.scores[test]["psnr"], 2)
                groups.setdefault((row.bits, row.placement), {})[row.label] = psnr
        for scores in [scores for scores in groups.values() if len(scores) > 1]:
            best |= {(label, test) for label, psnr in scores.items() if psnr == max(scores.values())}
    return best


def _notes(rows: Sequence[PtqRow]) -> list[str]:
    failed = [f"{row.label} failed: {' '.join(row.note.split())}" for row in rows if row.failed]
    return [*failed, *(f"{row.label}: more bits at {', '.join(row.fragile)}" for row in rows if row.fragile)]
