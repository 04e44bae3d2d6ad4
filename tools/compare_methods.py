"""Train every static method from the same float network, with the same data, length and seed, and compare them.

    python tools/compare_methods.py --backbone edsr_small_x4 --bits W2A2,W4A4 --iters 1000 -o comparison

Written to the output folder after every training: ``comparison.md``, ``.json`` and ``.csv`` with PSNR and SSIM before
(calibrated only) and after the training, FAB, BitOPs, size, and the time of a training iteration relative to the float
network's, which is timed right before it; ``tradeoff.png`` and ``gain.png``. The trained networks are in ``models``,
options and logs in ``runs``.

Called again with the same settings it trains only what has no result yet, so a long comparison survives a crash. A
method that fails becomes a row that says why, and is tried again by the next call.

How a published run becomes a short one, the same for all methods:

* The recipe is that of the method's option file for the backbone in options/train, else the shipped one.
* Stages keep their share of the run: published length x iterations / published total, at least 10 iterations. The total
  is that of the method's option files for the backbone in options/train, else of any of its, else of qat.yml.
* Learning rates of activation ranges x published total / iterations: with Adam they then can travel as far as in the
  published run; but no further than the median width of the ranges of the float network's activations, measured once.
* All other learning rates and the losses are as published; --lr sets that of the weights.
* Optimiser, batch, crops and decay (halved after the shares --milestones) are the same for all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qsr_plugin import compat, demo
from qsr_plugin.checkpoint import write_atomically
from qsr_plugin.errors import UserError
from qsr_plugin.report import comparison
from qsr_plugin.report.comparison import Row
from qsr_plugin.report.plots import gain_plot, tradeoff_plot
from qsr_plugin.report.result_io import write_results
from qsr_plugin.report.result_schema import Result, ResultTable

console = Console(highlight=False)
_DEFAULT_TEST = "Set5=datasets/Set5/HR:datasets/Set5/LRbicx4"


def parse_tests(entries: list[str]) -> dict[str, tuple[Path, Path]]:
    """``NAME=HR:LR`` entries as name to folders."""
    tests = {}
    for entry in entries:
        name, equals, folders = entry.partition("=")
        hr, colon, lr = folders.partition(":")
        if not (name and equals and hr and colon and lr):
            raise typer.BadParameter(f"--test is '{entry}'; expected NAME=HR_FOLDER:LR_FOLDER, e.g. {_DEFAULT_TEST}")
        tests[name] = Path(hr).expanduser().resolve(), Path(lr).expanduser().resolve()
    return tests


@contextmanager
def progress(runs: int, iters: int) -> Iterator[tuple[Progress, int]]:
    """A bar over all iterations of all trainings."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )  # fmt: skip
    with Progress(*columns, console=console, speed_estimate_period=600) as bar:
        yield bar, bar.add_task("starting", total=runs * iters)


def write_report(results: list[Result], settings: dict[str, object], out: Path, heading: str) -> list[Row]:
    """Tables and plots of what there is so far; the rows they show."""
    write_results(ResultTable(rows=tuple(results), settings=settings), out / "comparison.json")
    rows = [Row.of(result) for result in results]
    for name, text in (("md", comparison.to_markdown(rows, heading)), ("csv", comparison.to_csv(rows))):
        write_atomically(out / f"comparison.{name}", lambda path, text=text: path.write_text(text, "utf-8"))
    first = next(iter(settings["tests"]))
    points = [row.points(first) for row in rows if not row.failed]
    tradeoff_plot(points, "bitops", "psnr", out / "tradeoff.png", title=f"{first}: {heading}")
    if any(point["start"] for point in points):
        gain_plot(points, "psnr", out / "gain.png", title=f"{first}: {heading}")
    return rows


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for results, networks and runs.")],
    backbone: Annotated[str, typer.Option(help="Shipped backbone (see 'qsr list') or a YAML file.")] = "edsr_small_x4",
    weights: Annotated[
        Optional[Path], typer.Option(help="Its float weights.", show_default="those that come with edsr_small_x4")
    ] = None,
    methods: Annotated[
        Optional[str],
        typer.Option(help="Recipes or recipe files, separated by commas.", show_default="all that train weights"),
    ] = None,
    bits: Annotated[str, typer.Option(help="Weight and activation bits, separated by commas.")] = "W4A4",
    placement: Annotated[
        str, typer.Option(help="published, or same: the placement 'body' of every recipe.")
    ] = "published",
    iters: Annotated[int, typer.Option(min=20, help="Iterations of every training.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 16,
    lq_size: Annotated[int, typer.Option(min=8, help="Side of the low-resolution crops.")] = 48,
    lr: Annotated[
        Optional[float], typer.Option(help="Learning rate of the weights.", show_default="the published")
    ] = None,
    milestones: Annotated[str, typer.Option(help="Shares of the run after which learning rates halve.")] = "0.5,0.75",
    seed: Annotated[int, typer.Option(help="Of data order and random numbers.")] = 0,
    freeze_batch_norm: Annotated[
        bool,
        typer.Option("--freeze-batch-norm", help="Keep the float network's batch norm statistics, for all methods."),
    ] = False,
    data: Annotated[Path, typer.Option(help="Folder made by 'qsr data build'.")] = Path("datasets/photos_x4"),
    test: Annotated[list[str], typer.Option(help="Test set as NAME=HR:LR; may be repeated.")] = [_DEFAULT_TEST],
) -> None:
    """Train every static method from the same float network with the same data, length and seed, and compare them.

    Stages keep their share of the published run (at least 10 iterations each); learning rates of activation ranges are
    multiplied by published / given iterations, but take ranges no further in the run than their median width in the
    float network; everything else is as published, with the same optimiser and decay for all. Called again, it trains
    only what has no result yet.
    """
    try:
        compat.import_host()
        from qsr_plugin.report import comparison_options, comparison_runs

        if placement not in ("published", "same"):
            raise typer.BadParameter(f"--placement is '{placement}'; expected published or same")
        if weights is None and backbone != "edsr_small_x4":
            raise typer.BadParameter(f"--weights: the float weights of {backbone}; only edsr_small_x4 comes with some")
        settings = comparison_options.Settings(
            backbone, (weights or demo.packaged_weights()).resolve(), data.resolve(), parse_tests(test), iters, batch,
            lq_size, placement, lr, tuple(float(share) for share in milestones.split(",")), seed, freeze_batch_norm,
        )  # fmt: skip
        names = methods.split(",") if methods else comparison_options.static_methods()
        jobs = [(name, width) for width in bits.split(",") for name in names]
        comparison_options.check_jobs(jobs)
        heading = f"{Path(backbone).stem}, {iters} iterations of batch {batch}, placement {placement}"
        rows = compare(comparison_runs, settings, jobs, out, heading)
    except (UserError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    console.print(comparison.to_table(rows, heading))
    console.print(f"wrote comparison.md, .json, .csv, tradeoff.png and gain.png to {out}", soft_wrap=True)


def compare(runs, settings, jobs: list[tuple[str, str]], out: Path, heading: str) -> list[Row]:
    """Do what has no result yet; the rows in the order of the jobs, the float network first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reference, span = runs.reference(settings, out, device)
    kept = {job: runs.kept_method(settings, *job, span, out) for job in jobs}
    shared = {**settings.to_dict(), "span": span}
    todo = [job for job, rows in kept.items() if rows is None]
    if todo:
        with progress(len(todo), settings.iters) as (bar, task):
            for number, (method, width) in enumerate(todo):
                bar.update(task, description=f"{escape(Path(method).stem)} {width}")

                def watch(step, before=number * settings.iters) -> None:
                    if step.iteration is not None:
                        bar.update(task, completed=before + step.iteration)

                rows = runs.run_method(settings, method, width, span, out, device, watch)
                kept[method, width] = rows
                bar.update(task, completed=(number + 1) * settings.iters)
                bar.console.print(told(Row.of(rows[0])), markup=False, soft_wrap=True)
                write_report(ordered(reference, kept), shared, out, heading)
    return write_report(ordered(reference, kept), shared, out, heading)


def ordered(reference: list[Result], kept: dict[tuple[str, str], Optional[list[Result]]]) -> list[Result]:
    """The float row and all rows there are."""
    return [*reference, *(row for rows in kept.values() for row in rows or [])]


def told(row: Row) -> str:
    """A line about a finished training."""
    if row.failed:
        return f"{row.label}: failed: {row.note}"
    scores = ", ".join(f"{t} {row.start[t]['psnr']:.2f} -> {row.end[t]['psnr']:.2f} dB" for t in row.end)
    return f"{row.label}: {scores}, {row.cost:.2f} x float time"


if __name__ == "__main__":
    typer.run(main)
