"""``qsr data``: build training databases from photos, and check data before a training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qsr_plugin.data.build import BuildReport, build_lmdb_pair
from qsr_plugin.data.check import Problem, check_options, check_pair
from qsr_plugin.errors import UserError

app = typer.Typer(help="Build and check training data.", no_args_is_help=True)
_out, _err = Console(), Console(stderr=True)


@app.command()
def build(
    photos: Annotated[Path, typer.Argument(help="Folder of high-resolution photos (PNG, JPEG, WebP, BMP).")],
    out: Annotated[Path, typer.Argument(help="Folder for GT.lmdb and LQ.lmdb; a stopped build continues there.")],
    scale: Annotated[int, typer.Option(help="Factor between high and low resolution.")] = 4,
    sub_image: Annotated[int, typer.Option(help="Side of a sub-image in pixels; 0 keeps photos whole.")] = 480,
    step: Annotated[int, typer.Option(help="Distance between neighbouring sub-images in pixels.")] = 240,
    shrink: Annotated[list[float], typer.Option(help="Use a copy shrunk by this factor; may be repeated.")] = [1.0],
    border: Annotated[int, typer.Option(help="Pixels to cut off each side of a photo first.")] = 0,
    min_side: Annotated[int, typer.Option(help="Leave out copies with a shorter side below this.")] = 192,
    min_std: Annotated[float, typer.Option(help="Leave out sub-images flatter than this (levels of 255).")] = 0.0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out unreadable photos.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete what OUT holds and start again.")] = False,
) -> None:
    """Turn a folder of photos into the pair of LMDBs that BasicSR trains from."""
    try:
        report = build_lmdb_pair(
            photos,
            out,
            scale,
            sub_image=sub_image,
            step=step,
            shrink=tuple(shrink),
            border=border,
            min_side=min_side,
            min_std=min_std,
            skip_bad=skip_bad,
            overwrite=overwrite,
            progress=True,
        )
    except ValueError as error:
        _fail(str(error))
    if report.already_complete:
        _out.print("Already complete: nothing was done.")
    elif report.resumed:
        _out.print(f"Continued: {report.resumed} photos had been done before.")
    _out.print(_report_table(report))


@app.command()
def check(
    opt: Annotated[Path | None, typer.Option("-opt", "--opt", help="BasicSR option file; checks all its data.")] = None,
    gt: Annotated[Path | None, typer.Option(help="Folder or .lmdb of high-resolution images.")] = None,
    lq: Annotated[Path | None, typer.Option(help="Folder or .lmdb of low-resolution images.")] = None,
    scale: Annotated[int, typer.Option(help="Factor between them; -opt has its own.")] = 4,
    filename_tmpl: Annotated[str, typer.Option(help="LQ file name from the GT one, without extension: {}x4.")] = "{}",
    sample: Annotated[int | None, typer.Option(min=1, help="Decode only this many pairs; default all.")] = None,
) -> None:
    """Check data before a training: missing keys or files, damaged images, sizes that do not match.

    The exit code is 1 if there is a problem.
    """
    if (opt is None) == (gt is None or lq is None) or (opt is not None and (gt or lq)):
        _fail("give either -opt FILE, or both --gt and --lq.")
    if opt is not None:
        problems = check_options(_read_options(opt), sample=sample, progress=True)
    else:
        problems = check_pair(gt, lq, scale, filename_tmpl=filename_tmpl, sample=sample, progress=True)
    if problems:
        _out.print(_problem_table(problems))
        raise typer.Exit(1)
    _out.print("No problem found.")


def _read_options(path: Path) -> dict[str, object]:
    from qsr_plugin.options_file import load_options  # with torch behind it, which building needs not

    try:
        options = load_options(path.expanduser())
    except (UserError, OSError) as error:
        _fail(str(error))
    if not options.get("datasets"):
        _fail(f"{path} has no 'datasets' block; give a BasicSR option file.")
    return options


def _report_table(report: BuildReport) -> Table:
    table = Table("what", "value", title="training data")
    rows = (
        ("photos read", report.photos),
        ("photos without a usable sub-image", report.unused),
        ("unreadable photos skipped", len(report.bad)),
        ("sub-image pairs", report.sub_images),
        ("size on disk", f"{report.size / 2**20:.1f} MiB"),
        ("dataroot_gt", report.gt),
        ("dataroot_lq", report.lq),
    )
    for name, value in rows:
        table.add_row(name, escape(str(value)))
    return table


def _problem_table(problems: list[Problem]) -> Table:
    table = Table("data set", "where", "item", "problem", title=f"problems found: {len(problems)}", show_lines=True)
    for problem in problems:
        cells = problem.dataset, problem.where, problem.item, problem.message
        table.add_row(*(escape(cell) for cell in cells), style="red")
    for column in table.columns:
        column.overflow = "fold"
    return table


def _fail(message: str) -> NoReturn:
    _err.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
