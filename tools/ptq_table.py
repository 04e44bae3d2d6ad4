"""Make a table of post-training methods: networks x bits x placements x methods, without ground truth.

    python tools/ptq_table.py --net edsr_small_x4:assets/edsr_small_x4.safetensors --photos PHOTOS \\
        --data datasets --sets Set5,Set14,B100 -o ptq

All methods see the same crops with the same seed. Every row is made in a process of its own, and kept in ``ptq.json``
as soon as it is there, with what it was made from; called again, only rows that are not there are made. A row that
fails says why, and is made again with ``--retry``. Beside it ``ptq.md``, ``ptq.csv``, on request ``ptq.html``, and for
each network and test set a plot hold the rows of this call: PSNR and SSIM, FAB and BitOPs (with the bits chosen on the
first test set, where they are chosen), size with packed weights, seconds of calibration and tuning, and the peak of
memory until then.

A data folder has SET/HR and SET/LRbicxSCALE; a set without images for a network's scale is left out for it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from qsr_plugin import compat, ptq_table
from qsr_plugin.checkpoint import write_atomically
from qsr_plugin.device import usable_device
from qsr_plugin.errors import UserError
from qsr_plugin.own_modules import import_own
from qsr_plugin.progress import track
from qsr_plugin.ptq_row import Crops
from qsr_plugin.quantize_cli import SeveralTests
from qsr_plugin.report.complexity_types import DEFAULT_SIZE
from qsr_plugin.report.ptq_plot import ptq_plot
from qsr_plugin.report.ptq_rows import PtqRow, in_seconds, networks_of, tests_of, to_html, to_table
from qsr_plugin.report.result_schema import FLOAT
from qsr_plugin.report_cli import set_name

console = Console(highlight=False)
_WIDE = 250  # columns at most of a table that goes to a file


def main(
    net: Annotated[
        list[str], typer.Option(help="NAME:WEIGHTS[:SCALE]; NAME a shipped backbone, a YAML file, or auto. Repeatable.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for rows, tables, plots and logs.")],
    photos: Annotated[Optional[Path], typer.Option(help="Calibrate on HR photos, reduced by each scale.")] = None,
    images: Annotated[Optional[Path], typer.Option(help="Or: on LR images.")] = None,
    data: Annotated[Optional[Path], typer.Option(help="Folder of test sets: SET/HR and SET/LRbicxSCALE.")] = None,
    sets: Annotated[str, typer.Option(help="Its sets, separated by commas.")] = "Set5,Set14,B100",
    test: Annotated[
        Optional[list[Path]], typer.Option(metavar="HR LR", help="Or: folders of a test set. Repeatable.")
    ] = None,
    method: Annotated[
        Optional[str],
        typer.Option(help="Recipes or recipe files, separated by commas.", show_default="all without training"),
    ] = None,
    bits: Annotated[str, typer.Option(help="Weight and activation bits, separated by commas.")] = "W8A8,W6A6,W4A4",
    placement: Annotated[str, typer.Option(help="Which layers, separated by commas.")] = "body,full",
    crop: Annotated[int, typer.Option(min=8, help="Side of a calibration crop in LR pixels.")] = 96,
    calibration_images: Annotated[int, typer.Option(min=1, help="How many files are drawn.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the draw of crops.")] = 0,
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads of every row.", show_default="half of the cores")
    ] = max((os.cpu_count() or 1) // 2, 1),
    jobs: Annotated[
        int, typer.Option("-j", "--jobs", min=1, help="Rows made at once, each with --threads and memory of its own.")
    ] = 1,
    device: Annotated[str, typer.Option(help="Where networks run: cpu, cuda, cuda:1.")] = "cpu",
    retry: Annotated[bool, typer.Option("--retry", help="Make rows again that failed.")] = False,
    imports: Annotated[
        Optional[list[str]],
        typer.Option("--import", metavar="FILE.py", help="Your file that registers networks. Repeatable."),
    ] = None,
    html: Annotated[bool, typer.Option("--html", help="Write ptq.html as well.")] = False,
) -> None:
    """Make a table of post-training methods on the same crops with the same seed; what is there is not made again."""
    compat.import_host()
    try:
        for name in imports or ():
            import_own(name)
        if (images is None) == (photos is None):
            raise typer.BadParameter("give one of --images (low resolution) and --photos (high resolution)")
        if (data is None) == (not test):
            raise typer.BadParameter("give one of --data and --test")
        usable_device(device)
        named = named_tests(test or [])
        planned = ptq_table.plan(
            [ptq_table.read_network(entry) for entry in net],
            ptq_table.read_methods(method.split(",") if method else ptq_table.post_training_methods()),
            bits.split(","),
            placement.split(","),
            crops=lambda one: Crops(
                str((images or photos).resolve()), 1 if images else one.scale, crop, calibration_images, seed
            ),
            tests=lambda one: named or ptq_table.sets_in(data.resolve(), sets.split(","), one.scale),
            threads=threads,
            device=device,
            imports=imports or (),
        )
        kind = "LR images or all there are" if images else "HR photos or all there are"
        about = [
            f"Calibrated on crops of {crop}x{crop} LR pixels from {calibration_images} {kind}, seed {seed}.",
            f"Seconds of calibration and tuning with {threads} thread(s) on {device}; memory at its peak until then.",
            "FAB on the first test set; BitOPs of an image of {}x{} LR pixels.".format(*DEFAULT_SIZE),
        ]
        if jobs > 1:
            about.append(f"{jobs} rows at once: seconds are those of a machine that shares its cores and its memory.")
        if device == "cpu" and jobs > 1 and jobs * threads > (cores := os.cpu_count() or 1):
            told = f"{jobs} rows at once with {threads} thread(s) each wait for one another on {cores} cores"
            console.print(f"{told}: better with fewer", style="yellow", soft_wrap=True)
        rows = ptq_table.make_table(
            planned,
            out,
            about=about,
            retry=retry,
            at_once=jobs,
            told=tell,
            progress=lambda todo: track(todo, "rows", console),
        )
    except KeyboardInterrupt:
        console.print(f"interrupted: rows that are done are in {out / 'ptq.json'}, the same command goes on after them")
        raise
    except (UserError, ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    if html:
        write_atomically(out / "ptq.html", lambda path: path.write_text(to_html(rows, about), "utf-8"))
    plots = 0
    for name, own in networks_of(rows).items():
        Console(width=None if console.is_terminal else _WIDE).print(to_table(own, name))
        for one in tests_of([row for row in own if row.method != FLOAT]):
            ptq_plot(own, one, out / f"ptq_{name}_{one}.png", title=name)
            plots += 1
    written = ["ptq.json", "ptq.md", "ptq.csv", *(["ptq.html"] if html else []), *([f"{plots} plots"] if plots else [])]
    console.print(f"wrote {', '.join(written)} to {out}", markup=False, soft_wrap=True)
    if others := len(ptq_table.kept_rows(out)) - len(rows):
        told = f"ptq.json also keeps {others} row(s) that this call did not ask for: of other settings or networks"
        console.print(told, markup=False, soft_wrap=True)
    if failed := sum(row.failed for row in rows):
        told = f"{failed} row(s) failed, see {out / 'logs'}; they are made again only with --retry"
        console.print(told, style="yellow", markup=False, soft_wrap=True)


def named_tests(folders: list[Path]) -> dict[str, tuple[Path, Path]]:
    """Pairs of folders by the name of the test set: the folder that HR lies in."""
    tests = {set_name(hr): (hr.resolve(), lr.resolve()) for hr, lr in zip(folders[::2], folders[1::2])}
    if 2 * len(tests) != len(folders):
        raise typer.BadParameter("two of --test have the same name, that of the folder which HR lies in: rename one")
    return tests


def tell(row: PtqRow) -> None:
    """A line about a row that was made."""
    scores = ", ".join(f"{test} {means['psnr']:.2f} dB" for test, means in row.scores.items())
    took = "" if row.spent is None else f", {in_seconds(row.spent)} s"
    text = f"failed: {row.note}" if row.failed else f"{scores}{took}"
    console.print(f"{row.label}: {text}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(cls=SeveralTests)(main)
    app()
