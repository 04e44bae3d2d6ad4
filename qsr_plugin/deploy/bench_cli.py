"""``qsr bench``: how fast a quantized network is beside its float form, in several engines."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qsr_plugin import compat
from qsr_plugin.deploy.bench_names import DEFAULT, ONNXRUNTIME, VARIANTS
from qsr_plugin.progress import track
from qsr_plugin.quantize_cli import SeveralTests
from qsr_plugin.report_cli import Pair, console, set_name

Option = typer.Option
#: Measured if no size is given.
DEFAULT_SIZE = (96, 96)
_WIDE = 250  # columns at most of a table that goes to a file


class SeveralSizes(SeveralTests):
    """A command whose ``--size H W`` may be repeated."""

    pairs = {"--size": "a height and a width: --size 180 320"}


def bench(
    model: Annotated[Path, typer.Argument(metavar="FILE", help="Quantized or packed .safetensors.")],
    weights: Annotated[
        Optional[Path],
        Option("--float", help="Float checkpoint it was made from; else the float weights in the file."),
    ] = None,
    size: Annotated[
        Optional[list[int]],
        Option(metavar="H W", help="LR height and width of the image; may be repeated.", show_default="96 96"),
    ] = None,
    threads: Annotated[int, Option(min=1, help="CPU threads of every engine.")] = 1,
    rounds: Annotated[int, Option(min=1, help="How often each variant is paired with the reference.")] = 5,
    seconds: Annotated[float, Option(min=0.0, help="Least time of one measurement; four make a pair.")] = 0.5,
    variants: Annotated[
        Optional[str],
        Option(help=f"Separated by commas: {', '.join(VARIANTS)}.", show_default=f"all but {ONNXRUNTIME}"),
    ] = None,
    bits: Annotated[
        Optional[int], Option(help="One width for places whose bits depend on the image, as in qsr export.")
    ] = None,
    images: Annotated[
        Optional[Path],
        Option(help="Folder of LR images that nncf and an 8-bit tail are calibrated on; else synthetic ones."),
    ] = None,
    memory: Annotated[bool, Option("--memory", help="Peak memory as well, each in a process of its own.")] = False,
    test: Pair = None,
    out: Annotated[
        Optional[Path], Option("-o", "--out", help="Results to write, .json, with a plot .png; else NAME_bench.json.")
    ] = None,
) -> None:
    """Measure a quantized network beside its float form, in several engines, in one process.

    Speed is a ratio to the float network in OpenVINO, measured in turn with it. Writes OUT.json and OUT.png.
    """
    compat.import_host()
    from qsr_plugin import load_quantized
    from qsr_plugin.checkpoint import check_writable
    from qsr_plugin.deploy import bench as work
    from qsr_plugin.deploy.bench_machine import described, machine
    from qsr_plugin.deploy.bench_plot import bench_plot
    from qsr_plugin.deploy.bench_rows import Protocol, answers, legend, result_of, threads_text, to_table
    from qsr_plugin.deploy.bench_variants import Models, float_network_of
    from qsr_plugin.deploy.engine import require
    from qsr_plugin.report.complexity import method_label
    from qsr_plugin.report.evaluate import check_pairs, find_pairs
    from qsr_plugin.report.result_io import write_results
    from qsr_plugin.report.result_schema import ResultTable, of_backbone

    sizes = tuple(dict.fromkeys(zip(size[::2], size[1::2]))) if size else (DEFAULT_SIZE,)
    if min(map(min, sizes)) < 1:
        raise typer.BadParameter("--size takes a height and a width of 1 pixel or more")
    out = out or Path(f"{model.stem}_bench.json")
    if out.suffix != ".json":
        raise typer.BadParameter(f"-o {out}: results are written as .json, with a plot .png beside it")
    if model.suffix != ".safetensors":
        raise typer.BadParameter(
            f"'{model}': give a quantized .safetensors, which is exported here; of float weights 'qsr quantize' makes "
            "one, a training writes one beside each .pth"
        )
    names = work.check_variants(DEFAULT if variants is None else [name.strip() for name in variants.split(",")])
    for package in ("openvino", "onnx", "onnxscript", "onnxruntime"):
        require(package)
    check_writable(out)
    net = load_quantized(model)
    float_net = float_network_of(net, weights, model)
    if weights is None and getattr(net, "folded", False):
        console.print(f"note: {model} is packed, its float network has quantized weights: --float gives others")
    elif weights is None and net.recipe.tuning is not None:
        console.print(f"note: the weights in {model} were tuned to be quantized: --float gives those from before")
    about = of_backbone(net.backbone_options)
    tests = {} if test is None else {set_name(test[0]): test}
    for hr, lr in tests.values():
        check_pairs(find_pairs(hr, lr, about["scale"]), about["scale"])
    protocol = Protocol(sizes, threads, rounds, seconds)
    calibration = _batches(images)
    with tempfile.TemporaryDirectory(prefix="qsr_bench_") as folder:
        models = Models(net, float_net, Path(folder), threads=threads, bits=bits, images=calibration)
        rows = work.bench(models, names, protocol, memory=memory, tests=tests, progress=_track)
    known, title = machine(), f"{about['architecture']}, {method_label(net.recipe)}"
    for one in sizes:
        console.print(to_table(rows, one, title), width=None if console.is_terminal else _WIDE, crop=False)
    for line in answers(rows, sizes):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for line in (*legend(rows, protocol), f"  machine: {described(known)}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    results = [result_of(row, net, str(model), str(weights or "")) for row in rows]
    settings = {"machine": known, "sizes": sizes, "threads": threads, "rounds": rounds, "seconds": seconds}
    write_results(ResultTable(rows=tuple(results), settings={**settings, "protocol": str(protocol)}), out)
    plot = out.with_suffix(".png")
    bench_plot(rows, sizes, plot, title=f"{title}, {threads_text(threads)}", below=described(known))
    console.print(f"wrote {out} and {plot}", highlight=False, markup=False, soft_wrap=True)


def _batches(folder: Optional[Path]) -> list[Any]:
    """Crops of the images in a folder."""
    if folder is None:
        return []
    from qsr_plugin.data.calibration_set import crops_from_folder

    return list(crops_from_folder(folder, images=100, batch=1))


def _track(items: Sequence[Any], description: str) -> Iterable[Any]:
    return track(items, description, console)
