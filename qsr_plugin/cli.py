"""The ``qsr`` command line, over the same functions as the Python interface."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from qsr_plugin.data.cli import app as data_app
from qsr_plugin.deploy.bench_cli import SeveralSizes, bench
from qsr_plugin.deploy.export_cli import export
from qsr_plugin.deploy.upscale_cli import upscale
from qsr_plugin.errors import UserError
from qsr_plugin.own_modules import import_own
from qsr_plugin.plot_cli import app as plot_app
from qsr_plugin.quantize_cli import SeveralTests, quantize
from qsr_plugin.report_cli import console, report, slim
from qsr_plugin.table_cli import table

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.add_typer(data_app, name="data")
app.add_typer(plot_app, name="plot")

_HOST_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.callback()
def before_each(
    imports: Annotated[
        Optional[list[str]],
        typer.Option("--import", metavar="FILE.py", help="Your file or module that registers networks; repeatable."),
    ] = None,
) -> None:
    """Quantized image super-resolution for BasicSR."""
    for name in imports or ():
        import_own(name)


@app.command(context_settings=_HOST_FLAGS)
def train(context: typer.Context) -> None:
    """Train: -opt FILE, with BasicSR's flags; 'qsr train --help' lists them."""
    from qsr_plugin.train import main as run

    run(context.args)


@app.command(context_settings=_HOST_FLAGS)
def test(context: typer.Context) -> None:
    """Test: -opt FILE, with BasicSR's flags; 'qsr test --help' lists them."""
    from qsr_plugin.test import main as run

    run(context.args)


app.command(cls=SeveralTests)(quantize)
app.command()(report)
app.command()(slim)
app.command()(table)
app.command()(export)
app.command()(upscale)
app.command(cls=SeveralSizes)(bench)


@app.command("list")
def list_all() -> None:
    """Methods and backbones that come with the package."""
    from qsr_plugin import list_methods
    from qsr_plugin.options_file import options_folder
    from qsr_plugin.ptq_table import post_training_methods

    untrained = sorted(post_training_methods())
    trained = [name for name in list_methods() if name not in untrained]
    table = Table("methods without training", "methods of a training", "backbones (--arch)")
    backbones = sorted(path.stem for path in (options_folder() / "backbones").glob("*.yml"))
    table.add_row("\n".join(untrained), "\n".join(trained), "\n".join(backbones))
    console.print(table)


def main() -> None:
    """Entry point of the ``qsr`` script: messages instead of tracebacks for what a user can mend."""
    log = logging.getLogger("qsr_plugin")
    log.addHandler(RichHandler(console=Console(stderr=True), show_path=False, show_time=False))
    log.setLevel(logging.INFO)
    logging.getLogger("qsr_plugin.compat").setLevel(logging.WARNING)  # 'python -m qsr_plugin.compat' lists its repairs
    try:
        app()
    except (UserError, ValueError, OSError, FloatingPointError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
