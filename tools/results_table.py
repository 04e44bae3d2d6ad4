"""Make tables with the columns of the papers from result files of any command.

    python tools/results_table.py ptq/ rlfn_x4_w4a4.json --columns adabm -o table.md -o table.tex

Result files are those of ``qsr quantize``, ``qsr report --json``, trainings and tests, ``tools/ptq_table.py`` and
``tools/compare_methods.py``; of a folder, all that lie in it. A table has the float network first, then a group for
each bit width, and marks the best and the second of every group. Without -o it is printed as Markdown.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from qsr_plugin.errors import UserError
from qsr_plugin.report.paper_columns import LAYOUTS
from qsr_plugin.report.paper_formats import check_format, to_markdown, write_table
from qsr_plugin.report.paper_tables import collect, paper_table


def main(
    results: Annotated[list[Path], typer.Argument(help="Result files, and folders of them.")],
    columns: Annotated[str, typer.Option(help=f"Whose columns: {', '.join(LAYOUTS)}.")] = "all",
    sets: Annotated[
        Optional[str], typer.Option(help="Test sets, separated by commas.", show_default="all there are")
    ] = None,
    out: Annotated[
        Optional[list[Path]], typer.Option("-o", "--out", help="File to write, .md, .html or .tex; may be repeated.")
    ] = None,
) -> None:
    """Make tables with the columns of the papers from result files of any command."""
    try:
        for path in out or ():
            check_format(path)
        table = paper_table(collect(results), columns, sets.split(",") if sets else None)
        for path in out or ():
            write_table(table, path)
    except (UserError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    console = Console(highlight=False)
    text = f"wrote {', '.join(map(str, out))}\n" if out else to_markdown(table)
    console.print(text, markup=False, soft_wrap=True, end="")


if __name__ == "__main__":
    typer.run(main)
