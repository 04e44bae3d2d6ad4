"""``qsr table``: the bits that a network with trained selectors chooses, by edge score, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from qsr_plugin import compat
from qsr_plugin.progress import track


def table(
    model: Annotated[Path, typer.Argument(help="Quantized .safetensors with trained bit selectors, e.g. of cadyq.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Table to write, .json.")],
    images: Annotated[Optional[Path], typer.Option(help="Folder of LR images, e.g. of the validation set.")] = None,
    photos: Annotated[
        Optional[Path], typer.Option(help="Or: folder of HR photos, reduced by the network's scale.")
    ] = None,
    patch: Annotated[int, typer.Option(min=1, help="Side of a patch in LR pixels.")] = 96,
    step: Annotated[int, typer.Option(min=1, help="Distance between patches in LR pixels.")] = 94,
    batch: Annotated[int, typer.Option(min=1, help="Patches that run together.")] = 8,
) -> None:
    """Make the table of bits by edge score that the recipe cabm looks up."""
    if (images is None) == (photos is None):
        raise typer.BadParameter("give one of --images (low resolution) and --photos (high resolution)")
    if out.suffix != ".json":
        raise typer.BadParameter(f"'{out}': tables are saved as .json; change the ending")
    compat.import_host()
    from qsr_plugin import load_quantized
    from qsr_plugin.data.images import list_images
    from qsr_plugin.options_file import scale_of
    from qsr_plugin.report.edge_table import build_table, low_resolution, table_summary
    from qsr_plugin.report.tables import write_json

    console, paths = Console(), list_images(images or photos)
    net = load_quantized(model)
    scale = 1 if images else scale_of(net.backbone_options)
    progress = track(paths, "looking at images", console)
    report = build_table(net, (low_resolution(path, scale) for path in progress), patch=patch, step=step, batch=batch)
    write_json(report.table.model_dump(mode="json"), out)
    console.print(table_summary(report))
    console.print(f"wrote {out}; next: a training with recipe cabm and recipe.policy.table: {out}", highlight=False)
