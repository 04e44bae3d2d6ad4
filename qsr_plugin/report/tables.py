"""Reports as tables for the terminal and as JSON files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.table import Table

from qsr_plugin.checkpoint import write_atomically
from qsr_plugin.data.patches import protocol
from qsr_plugin.report.complexity_types import CONVENTIONS, ComplexityReport
from qsr_plugin.report.evaluate import EvaluationResult

#: What stands for bits that a policy chooses, as long as no image has run.
NO_RECORD = "no record"


def site_table(report: ComplexityReport) -> Table:
    """One row per layer that runs, then what is stored beside them (norms, ranges, blocks left out), and the totals.

    ``W bits`` and ``A bits`` are those of weight and input (means where a policy chooses); ``FAB`` says whether the
    place of the input counts there.
    """
    table = Table(title=f"{report.network}, {report.method}", caption=counted_at(report), show_footer=True)
    right = {"justify": "right", "no_wrap": True}
    table.add_column("Layer", "total", overflow="fold", min_width=max(len(row.name) for row in report.sites))
    table.add_column("MACs", quantity(report.macs), **right)
    table.add_column("W bits", **right)
    table.add_column("A bits", **right)
    table.add_column("Parameters", f"{report.parameters:,}", **right)
    table.add_column("Size", size(report.storage_bits), **right)
    table.add_column("FAB", justify="center")
    for row in report.sites:
        bits = known(row.weight_bits, "{:.4g}"), known(row.act_bits, "{:.4g}")
        numbers = quantity(row.macs), *bits, f"{row.parameters:,}", size(row.storage_bits)
        table.add_row(row.name, *numbers, "yes" if row.in_fab else "", style=None if row.quantized else "dim")
    parameters = report.parameters - sum(row.parameters for row in report.sites)
    bits = report.storage_bits - sum(row.storage_bits for row in report.sites)
    table.add_row("(other)", "", "", "", f"{parameters:,}", size(bits), "", style="dim", end_section=True)
    return table


def summary_table(report: ComplexityReport, scores: Mapping[str, EvaluationResult] | None = None) -> Table:
    """Totals of one network, and its scores by data set.

    Args:
        report: From :func:`qsr_plugin.complexity`.
        scores: Name of the data set to its result.
    """
    counted = counted_at(report, CONVENTIONS[report.convention].stated)
    table = Table(title=f"{report.network}, {report.method}", caption=counted, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    quantized = sum(row.quantized for row in report.sites)
    running, stored = report.blocks or (0, 0)
    unit = CONVENTIONS[report.convention].unit
    rows = {"Blocks": f"{running} of {stored} run"} if stored else {}
    rows |= {
        "Parameters": f"{report.parameters:,}",
        "MACs": quantity(report.macs),
        "in quantized layers": f"{report.quantized_share:.1%} ({quantized} of {len(report.sites)} layers)",
        "FAB": known(report.fab, "{:.2f} bits"),
        "FAB weighted by MACs": known(report.weighted_fab, "{:.2f} bits"),
        unit: operations(report.bitops),
        f"{unit} of quantized layers": operations(report.bitops_quantized),
        f"Params by '{report.convention}'": quantity(report.scaled_parameters),
        **({"Ranges found at run time": f"{quantity(report.overhead)} float operations"} if report.overhead else {}),
        **({"Choosing bits": f"{quantity(report.policy_ops)} float operations"} if report.policy_ops else {}),
        "Size" if running == stored else f"Size of all {stored} blocks": size(report.storage_bits),
        "Size in float": f"{size(report.float_storage_bits)} ({report.float_storage_bits / report.storage_bits:.2f} x)",
    }
    for name, result in (scores or {}).items():
        rows[f"{name} x{result.scale}"] = f"{result.psnr:.2f} dB / {result.ssim:.4f}"
        if result.bits is not None and result.bits.varies:
            rows[f"{name} FAB (min, max)"] = fab_text(result)
            rows[f"{name} bits"] = result.bits.shares_text()
        if result.patches is not None:
            rows[f"{name} run as"] = protocol(result.patches)
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def depth_table(reports: Iterable[ComplexityReport]) -> Table:
    """One row per depth of one network, each slimmed to it: what it costs to run and to store.

    Args:
        reports: Costs of the slimmed networks (:func:`qsr_plugin.slim`), at least one.
    """
    reports = list(reports)
    table = Table(title=f"{reports[0].network}, {reports[0].method}, by depth", caption=counted_at(reports[0]))
    for heading in ("Blocks", "MACs", CONVENTIONS[reports[0].convention].unit, "FAB", "Size if slimmed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for report in reports:
        costs = quantity(report.macs), operations(report.bitops), known(report.fab, "{:.2f}")
        table.add_row(str(report.blocks[0]), *costs, size(report.storage_bits))
    return table


def results_table(results: Mapping[str, tuple[ComplexityReport, EvaluationResult]], title: str = "") -> Table:
    """One row per network, to compare them. Where FAB differs from image to image, its range stands beside the mean.

    Args:
        results: Label to costs and scores.
        title: Above the table, e.g. the name of the data set.

    Raises:
        ValueError: If there is none, or they were counted in different ways or at different sizes, scales or patches.
    """
    ways = {
        (report.convention, report.input_size, result.scale, protocol(report.patches), protocol(result.patches))
        for report, result in results.values()
    }
    if len(ways) != 1:
        found = "; ".join(f"{c} at {h}x{w}, x{s}, {p}, scored on {q}" for c, (h, w), s, p, q in sorted(ways))
        raise ValueError(
            "results to compare need one BitOPs convention, input size, scale and way of cutting images, found: "
            f"{found or 'no result'}"
        )
    first, score = next(iter(results.values()))
    way = f" Scores and FAB on {protocol(score.patches)}."
    table = Table(title=title or None, caption=counted_at(first) + way)
    table.add_column("Network")
    for heading in ("PSNR", "SSIM", "FAB", "BitOPs", "Size"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, (report, result) in results.items():
        scores = f"{result.psnr:.2f}", f"{result.ssim:.4f}", fab_text(result)
        table.add_row(label, *scores, operations(report.bitops), size(report.storage_bits))
    return table


def write_json(data: Mapping[str, object], path: str | Path) -> None:
    """Write plain data as JSON, whole or not at all. Infinity and NaN become the strings ``inf`` and ``nan``.

    Args:
        data: What the ``to_dict`` of reports and results return, alone or nested.
        path: Final place.

    Raises:
        OSError: If the file cannot be written.
    """
    text = json.dumps(_strict(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def quantity(number: float) -> str:
    """A count with a decimal prefix and three or more digits, e.g. ``114.2 G``."""
    for prefix, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unit:
            return f"{number / unit:.4g} {prefix}"
    return f"{number:.4g}"


def size(bits: int) -> str:
    """Bits as bytes with a decimal prefix, e.g. ``1.942 MB``."""
    return f"{quantity(bits / 8)}B" if bits >= 8000 else f"{bits // 8} B"


def counted_at(report: ComplexityReport, stated: str = "") -> str:
    """At what size and by which convention costs were counted; what that convention counts is ``stated`` if given."""
    height, width = report.input_size
    rule = CONVENTIONS[report.convention]
    counted = f"{rule.unit} '{report.convention}': {stated or rule.text}"
    cut = "" if report.patches is None else f", in {protocol(report.patches)}"
    sizes = "Size with packed weights, 1 MB is 10^6 bytes."
    return f"Per image of {height}x{width} (LR height x width){cut}. {counted}. {sizes}"


def known(number: float | None, form: str) -> str:
    """A figure in a format, or that there is no record of it."""
    return NO_RECORD if number is None else form.format(number)


def operations(number: float | None) -> str:
    """Bit operations, or that there is no record of them."""
    return NO_RECORD if number is None else quantity(number)


def fab_text(result: EvaluationResult) -> str:
    """Mean over the images, and the range if they differ."""
    bits = result.bits
    spread = bits is not None and bits.highest - bits.lowest >= 0.005
    return f"{result.fab:.2f}" + (f" [{bits.lowest:.2f}, {bits.highest:.2f}]" if spread else "")


def _strict(data: object) -> object:
    if isinstance(data, Mapping):
        return {str(key): _strict(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_strict(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data
