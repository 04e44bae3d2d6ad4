"""``qsr upscale``: enlarge images with a quantized or exported network."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qsr_plugin.errors import UserError
from qsr_plugin.progress import no_progress, track
from qsr_plugin.report_cli import console

Option = typer.Option


def upscale(
    inputs: Annotated[list[Path], typer.Argument(metavar="IN", help="Images, and folders of images.")],
    out: Annotated[Path, Option("-o", "--out", help="Folder for the results; for one image also a file.")],
    model: Annotated[
        list[Path],
        Option(
            help="Quantized or packed .safetensors, or exported .onnx. Several, from the fewest blocks to the most, "
            "share the tiles of an image: those with the fewest edges go to the first."
        ),
    ],
    engine: Annotated[
        Optional[str], Option(help="openvino (default for .onnx), onnxruntime, or torch (.safetensors).")
    ] = None,
    device: Annotated[str, Option(help="cpu; with torch also cuda, under torchrun one GPU for each process.")] = "cpu",
    tile: Annotated[
        Optional[int],
        Option(min=0, help="Side of the tiles in pixels, 0: none. By default 192 for large images and little memory."),
    ] = None,
    overlap: Annotated[
        Optional[int],
        Option(min=0, help="Pixels that neighbouring tiles share. By default as many as the network needs: measured."),
    ] = None,
    batch: Annotated[int, Option(min=1, help="Tiles that run together; more rarely pay on a CPU.")] = 1,
    threads: Annotated[Optional[int], Option(min=1, help="CPU threads; all if not given.")] = None,
    depth: Annotated[
        Optional[str],
        Option(help="How many blocks run, for a .safetensors with depth; several, like 4,8,16, share the tiles."),
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Keep results that are there, make the others.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace results that are there.")] = False,
    form: Annotated[Optional[str], Option("--format", help="png (default), jpg or webp.")] = None,
    suffix: Annotated[str, Option(help="Added to the names of the results, e.g. _x4.")] = "",
) -> None:
    """Enlarge images: the results have the names of the images, in the folder OUT.

    Gray stays gray, transparency and 16 bits per channel are kept. Where memory runs out, smaller tiles are tried.
    Under torchrun the processes share the images. Images that cannot be read are named, the others made; the status is
    1 then.
    """
    from qsr_plugin.deploy.engine import open_engine
    from qsr_plugin.deploy.routing import with_shallower
    from qsr_plugin.deploy.tiles import check_tiles
    from qsr_plugin.deploy.upscale import Tiling, check_any_readable, plan, prepare, share_of_process, upscale_files

    jobs = plan(inputs, out, form=form, suffix=suffix)
    sources = _in_order(model) if depth is None else _of_depths(model, depth)
    if len(sources) > 1 and tile == 0:
        raise UserError("--tile 0 runs whole images, and several depths share tiles: leave out one of the two")
    own_device = _own_gpu(device)
    opened = with_shallower([open_engine(one, engine, threads=threads, device=own_device) for one in sources])
    tiling = Tiling(tile, overlap, batch)
    check_tiles(opened, tile or None, overlap, batch)
    own = share_of_process(jobs)
    left, there = prepare(own, opened.scale, resume=resume, overwrite=overwrite)
    first = os.environ.get("RANK", "0") == "0"
    progress = (lambda items, what: track(items, what, console)) if first else no_progress
    try:
        summary = upscale_files(opened, left, tiling, there=there, skip_broken=len(jobs) > 1, progress=progress)
    except KeyboardInterrupt:
        done = sum(job.target.exists() for job in own)
        console.print(f"interrupted, {done} of {len(own)} done: the same command with --resume makes the others")
        raise
    check_any_readable(jobs, own, summary.broken)
    console.print(f"{opened.kind} x{opened.scale}: {summary}", highlight=False, markup=False, soft_wrap=True)
    if summary.broken and "WORLD_SIZE" not in os.environ:  # torchrun would stop the other processes
        raise typer.Exit(1)


def _in_order(models: list[Path]) -> list[Path]:
    """Refuse networks that are not given from the smallest to the largest."""
    sizes = [path.stat().st_size if path.is_file() else 0 for path in models]  # what is missing is told later
    for (path, size), (after, larger) in zip(zip(models, sizes), zip(models[1:], sizes[1:])):
        if 0 < larger <= size:
            raise UserError(
                f"--model {path} ({size} bytes) comes before {after} ({larger} bytes): several models share the tiles, "
                "given from the fewest blocks to the most. Change the order, or leave one out"
            )
    return models


def _of_depths(models: list[Path], depths: str) -> list[Any]:
    """One network for each depth."""
    if len(models) > 1:
        raise UserError(
            f"--depth {depths} with {len(models)} models: give one model at several depths, or several models"
        )
    if models[0].suffix != ".safetensors":
        raise UserError(
            f"--depth is for quantized .safetensors, not for '{models[0]}': export what qsr slim makes of one"
        )
    try:
        blocks = sorted({int(number) for number in depths.split(",")})
    except ValueError:
        raise UserError(f"--depth is '{depths}'; expected numbers of blocks like 8 or 4,8,16") from None
    from qsr_plugin import fold, load_quantized, set_depth

    net = fold(load_quantized(models[0]))
    return [copy.deepcopy(set_depth(net, number)) for number in blocks]


def _own_gpu(device: str) -> str:
    """The GPU of this process among those that torchrun started."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local else device
