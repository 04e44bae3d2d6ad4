"""The part of ``qsr report`` that quantizes one layer at a time and ranks the damage."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, Optional

import typer
from rich.console import Console
from torch import nn

from qsr_plugin.errors import UserError
from qsr_plugin.progress import track


def check(folder: Optional[Path], plot: Optional[Path], trained: bool, weights: Optional[Path] = None) -> None:
    """Refuse options that cannot be served before any work is done.

    Args:
        folder: ``--sensitivity``.
        plot: ``--sensitivity-plot``.
        trained: Whether the network comes with weights and ranges.
        weights: ``--float``.

    Raises:
        typer.BadParameter: For a picture or float weights without a measurement, or a network without weights.
        ValueError: For a folder without images, or a picture that is neither .png nor .svg.
    """
    from qsr_plugin.data.images import list_images
    from qsr_plugin.report.plots import check_ending

    if folder is None:
        if plot is not None:
            raise typer.BadParameter(
                "--sensitivity-plot draws what --sensitivity FOLDER measures: give a folder of LR images as well"
            )
        if weights is not None:
            raise typer.BadParameter("--float is for --sensitivity FOLDER: give a folder of LR images as well")
        return
    if not trained:
        raise typer.BadParameter("--sensitivity needs weights and ranges: give a quantized .safetensors")
    list_images(folder)
    if plot is not None:
        check_ending(plot)


def measured_network(net: nn.Module, weights: Optional[Path], model: Path) -> nn.Module:
    """The network whose layers are ranked: ``net``, or a copy of it with the float weights it was made from.

    Args:
        net: Quantized and calibrated; not changed.
        weights: Float checkpoint.
        model: File of ``net``.

    Raises:
        UserError: If its weights were tuned together with its quantizers, and there are no others; or if these do not
            fit.
    """
    if weights is None:
        if _is_tuned(net):
            raise UserError(
                f"{model}: its weights were tuned together with its quantizers, and are no float network without them. "
                "Give the checkpoint it was made from: --float WEIGHTS"
            )
        return net
    from qsr_plugin.deploy.bench_variants import float_network_of

    copy = deepcopy(net)
    copy.load_state_dict(float_network_of(net, weights, model).state_dict(), strict=False)
    return copy


def _is_tuned(net: nn.Module) -> bool:
    """Whether its recipe tunes weights together with their quantizers."""
    return net.recipe.tuning is not None and any("weights" in stage.train for stage in net.recipe.stages)


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
    if _is_tuned(net):
        console.print(
            "note: layers are quantized on the float weights. The tuned weights of the file make up for part of this "
            "damage, so its own output is nearer to the float network's than that of all places together",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if plot is not None:
        sensitivity_plot(found, plot)
        console.print(f"wrote {plot}", highlight=False, markup=False, soft_wrap=True)
    return found.to_dict()
