"""The part of ``qsr report`` that quantizes one layer at a time and ranks the damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import typer
from rich.console import Console
from torch import nn

from qsr_plugin.progress import track


def check(folder: Optional[Path], plot: Optional[Path], trained: bool) -> None:
    """Refuse options that cannot be served before any work is done.

    Args:
        folder: ``--sensitivity``.
        plot: ``--sensitivity-plot``.
        trained: Whether the network comes with weights and ranges.

    Raises:
        typer.BadParameter: For a picture without a measurement, or a network without weights.
        ValueError: For a folder without images, or a picture that is neither .png nor .svg.
    """
    from qsr_plugin.data.images import list_images
    from qsr_plugin.report.plots import check_ending

    if folder is None:
        if plot is not None:
            raise typer.BadParameter(
                "--sensitivity-plot draws what --sensitivity FOLDER measures: give a folder of LR images as well"
            )
        return
    if not trained:
        raise typer.BadParameter("--sensitivity needs weights and ranges: give a quantized .safetensors")
    list_images(folder)
    if plot is not None:
        check_ending(plot)


def run(net: nn.Module, folder: Path, plot: Optional[Path], console: Console) -> dict[str, Any]:
    """Measure on a folder of LR images, print the table, draw the picture.

    Args:
        net: Quantized and calibrated.
        folder: LR images of any sizes.
        plot: Picture to write, ``.png`` or ``.svg``.
        console: Where table and progress go.

    Returns:
        Plain data for JSON.

    Raises:
        ValueError: For a bad image, or if a layer makes the output NaN or infinite.
    """
    from qsr_plugin.report.sensitivity import sensitivity
    from qsr_plugin.report.sensitivity_views import sensitivity_plot, sensitivity_table

    found = sensitivity(net, folder, progress=lambda steps, description: track(steps, description, console))
    console.print(sensitivity_table(found))
    if plot is not None:
        sensitivity_plot(found, plot)
        console.print(f"wrote {plot}", highlight=False, markup=False, soft_wrap=True)
    return found.to_dict()
