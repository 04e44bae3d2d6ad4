"""Cost of a training step of every method beside the float step: time in ABBA groups, medians and ranges, peak memory.

    python tools/bench_training.py --methods pams,lsq,odm --bits W4A4 --batch 16 --json bench.json

A step is forward, losses, backward and optimiser, as ``QuantSRModel`` and the host's ``SRModel`` run them. Rows train
with the pixel loss alone, to show what quantizers cost (a method with cooperative weighting keeps its losses); --losses
adds rows with all losses of the recipe and their teacher. Each measurement runs in a process of its own, so that memory
is that of one training and a failure costs one row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from rich.table import Table

from qsr_plugin import compat
from qsr_plugin.errors import UserError
from qsr_plugin.progress import track
from qsr_plugin.report.result_io import write_results
from qsr_plugin.report.result_schema import Result, ResultTable, package_versions
from qsr_plugin.report.tables import size as in_bytes

console = Console(highlight=False)


def isolated(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function, called in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(work: Any, case: Any, float_memory: Optional[int]) -> dict[str, Any]:
    """One row: times, memory, or why there are none."""
    from qsr_plugin.models import step_cost

    row = {"label": case.label, "compiled": work.compiled}
    try:
        row["times"] = isolated(step_cost.measure_times, work, case).to_dict()
        row["memory"], row["float_memory"] = isolated(step_cost.measure_memory, work, case), float_memory
    except Exception as error:  # whatever it is, the other rows go on and the table says it
        row["failed"] = f"{type(error).__name__}: {error}"
    return row


def to_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Rows for the terminal."""
    failed = [f"{row['label']}: {row['failed']}" for row in rows if "failed" in row]
    table = Table(title=title, caption="\n".join(failed) or None, caption_justify="left")
    table.add_column("Step", overflow="fold")
    for heading in ("median", "min", "max", "float, s", "memory", "/ float"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        label = row["label"] + (", compiled" if row["compiled"] else "")
        if "failed" in row:
            table.add_row(label, "failed", style="red")
            continue
        times, memory, plain = row["times"], row["memory"], row["float_memory"]
        figures = times["median_ratios"], min(times["ratios"]), max(times["ratios"]), times["median_plain"]
        share = f"{memory / plain:.2f}" if plain else ""
        table.add_row(label, *(f"{figure:.3f}" for figure in figures), in_bytes(8 * memory), share)
    return table


def result_of(row: dict[str, Any]) -> Result:
    """A row of the result file; the times are its details."""
    told = {"note": row.get("failed", ""), "peak_memory": row.get("memory"), "versions": package_versions()}
    return Result(label=row["label"], method=row["label"].partition(" ")[0], details=row, **told)


def main(
    methods: Annotated[
        Optional[str],
        typer.Option(help="Recipes or recipe files, separated by commas.", show_default="all that train weights"),
    ] = None,
    bits: Annotated[str, typer.Option(help="Weight and activation bits, separated by commas.")] = "W4A4",
    backbone: Annotated[
        str, typer.Option(help="Shipped backbone (see 'qsr list') or a YAML file.")
    ] = "edsr_baseline_x4",
    losses: Annotated[
        bool, typer.Option("--losses", help="Rows with the recipes' losses and teacher as well.")
    ] = False,
    groups: Annotated[int, typer.Option(min=1, help="ABBA groups that are counted.")] = 15,
    batch: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 4,
    size: Annotated[int, typer.Option(min=8, help="Side of the LR crop.")] = 48,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    compiled: Annotated[bool, typer.Option("--compile", help="Rows with torch.compile as well.")] = False,
    json: Annotated[Optional[Path], typer.Option(help="Write everything as JSON.")] = None,
) -> None:
    """Compare training steps with and without quantizers: time in ABBA groups, and peak memory."""
    try:
        compat.import_host()
        from qsr_plugin.models import step_cost
        from qsr_plugin.options_file import backbone_options, parse_bits
        from qsr_plugin.report.comparison_options import static_methods

        work = step_cost.Workload(backbone_options(backbone), batch, size, groups, threads)
        names = methods.split(",") if methods else static_methods()
        cases = [
            case
            for width in bits.split(",")
            for name in names
            for kind in ((False, True) if losses else (False,))
            for case in step_cost.cases(name, *parse_bits(width), with_losses=kind)
        ]
        rows = []
        for way in (False, True) if compiled else (False,):
            here = replace(work, compiled=way)
            float_memory = isolated(step_cost.measure_memory, here, None)
            rows += [measure(here, case, float_memory) for case in track(cases, "measuring", console)]
    except (UserError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} thread(s)"
    title = f"training step / float step, {backbone}, batch {batch} x {size} x {size}, {device}"
    console.print(to_table(rows, title))
    if json is not None:
        shared = {"workload": asdict(work), "device": device}
        write_results(ResultTable(rows=tuple(map(result_of, rows)), settings=shared), json)
        console.print(f"wrote {json}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
