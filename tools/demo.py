"""Everything once, in minutes on a CPU: photos -> LMDB -> float -> 8 bits -> 4 bits -> trained -> report -> engine."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from qsr_plugin import (
    Recipe,
    calibrate,
    compat,
    complexity,
    demo,
    load_quantized,
    load_recipe,
    quantize_model,
    save_quantized,
)
from qsr_plugin.checkpoint import load_float_weights
from qsr_plugin.data.build import build_lmdb_pair
from qsr_plugin.data.images import list_images, read_rgb
from qsr_plugin.errors import UserError
from qsr_plugin.watched_run import Step
from qsr_plugin.watched_run import train as train_watched

console = Console(highlight=False)


class Results:
    """Networks with their costs and scores, in the order of the table."""

    def __init__(self, folders: demo.Folders) -> None:
        self.folders = folders
        self.nets: dict[str, nn.Module] = {}
        self.rows: dict[str, tuple[Any, Any]] = {}

    def add(self, label: str, net: nn.Module) -> None:
        """Score a network on the test photos and say how it did."""
        self.nets[label] = net
        self.rows[label] = (complexity(net), self.score(net))
        console.print(f"   {label}: [bold]{self.rows[label][1].psnr:.2f} dB[/bold] on the test photos")

    def score(self, net: nn.Module) -> Any:
        """PSNR and SSIM on the test photos."""
        from qsr_plugin.report.evaluate import evaluate

        return evaluate(net, self.folders.hr, self.folders.lr, demo.SCALE)


@contextmanager
def step(number: int, text: str) -> Iterator[None]:
    """A heading, and the seconds it took."""
    console.print(f"\n[bold cyan]{number} of 7[/bold cyan]  [bold]{text}[/bold]")
    start = time.perf_counter()
    yield
    console.print(f"   [dim]{time.perf_counter() - start:.0f} s[/dim]")


def prepare(folders: demo.Folders) -> None:
    """Photos, the two databases of the training, and the test images."""
    demo.write_photos(folders)
    console.print(f"   train on {', '.join(demo.TRAIN_PHOTOS)}")
    console.print(f"   test on  {', '.join(demo.TEST_PHOTOS)}")
    cuts = {"sub_image": 192, "step": 96, "shrink": (1.0, 0.6)}
    report = build_lmdb_pair(folders.train, folders.data, demo.SCALE, **cuts, overwrite=True, progress=True)
    console.print(f"   {report.sub_images} pairs of sub-images in {report.gt} and {report.lq.name}", soft_wrap=True)


def float_network(options: dict[str, Any], weights: Path) -> nn.Module:
    """The small EDSR with its float weights."""
    from qsr_plugin.archs.quant_net_arch import build_backbone

    net = build_backbone(options["network_g"]["backbone"])
    load_float_weights(net, weights)
    return net.eval()


def calibrated(options: dict[str, Any], weights: Path, recipe: Recipe, path: Path) -> nn.Module:
    """The float network, quantized and calibrated on crops of the training photos; saved as ``path``."""
    net = quantize_model(float_network(options, weights), recipe)
    calibrate(net, demo.calibration_crops(options, recipe.calibration.images, recipe.calibration.batch))
    save_quantized(net, path)
    return net


def train(options: dict[str, Any], folders: demo.Folders) -> nn.Module:
    """The short PAMS run, with a bar; its network."""
    columns = (
        TextColumn("   {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        total = options["train"]["total_iter"]
        task = bar.add_task("starting", total=total, note="")

        def watch(seen: Step) -> None:
            done = int(bar.tasks[task].completed)
            if seen.psnr is not None and done < total:
                bar.console.print(f"   after {done} iterations: {seen.psnr:.2f} dB")
            elif seen.psnr is None:
                bar.update(task, completed=seen.iteration, description="training", note=f"loss {seen.loss:.4f}")

        trained = train_watched(options, folders.root, watch)
        bar.update(task, completed=total)
    path = folders.models / "pams_w4a4_trained.safetensors"
    shutil.copyfile(trained, path)
    return load_quantized(path)


def report(results: Results) -> None:
    """The table, the pictures, and where everything is."""
    from qsr_plugin.report.crops import save_crops
    from qsr_plugin.report.evaluate import super_resolve
    from qsr_plugin.report.result_io import write_results
    from qsr_plugin.report.result_schema import ResultTable
    from qsr_plugin.report.tables import results_table

    folders, bicubic = results.folders, demo.Bicubic()
    table = results_table(results.rows, title=f"{len(demo.TEST_PHOTOS)} test photos, x{demo.SCALE}")
    plain = results.score(bicubic)
    table.add_section()
    table.add_row("bicubic, no network", f"{plain.psnr:.2f}", f"{plain.ssim:.4f}", "-", "-", "-", style="dim")
    for path in list_images(folders.hr):
        lr = read_rgb(folders.lr / path.name)
        images = {label: super_resolve(net, lr) for label, net in {"bicubic": bicubic, **results.nets}.items()}
        box = demo.TEST_PHOTOS[path.stem]
        save_crops(folders.pictures / path.name, read_rgb(path), images, demo.SCALE, box=box)
    rows = tuple(result_of(label, results.nets[label], *figures) for label, figures in results.rows.items())
    write_results(ResultTable(rows=rows), folders.root / "results.json")
    console.print(table)
    console.print(
        "Quantized are the residual blocks; 'full' adds the rest, first, upsampling and last layers at 8 bits."
    )
    console.print("PAMS also quantizes the path around each block, which the others leave float.")
    console.print("FAB: mean bits of the block activations. Size: with weights packed.")


def result_of(label: str, net: nn.Module, costs: Any, score: Any) -> Any:
    """A network of the table as a result."""
    from qsr_plugin.report.result_schema import Costs, Quality, Result, described, of_backbone, package_versions

    said = described(net.recipe) if hasattr(net, "recipe") else {}
    said |= {"label": label, **of_backbone(net.backbone_options), "versions": package_versions()}
    return Result(**said, quality={"photos": Quality.of(score, costs.bitops)}, costs=Costs.of(costs))


def make_fast(path: Path, folders: demo.Folders) -> None:
    """The trained network as a packed file and for an integer engine, and how fast it is there."""
    from qsr_plugin.deploy.bench_cli import bench
    from qsr_plugin.deploy.engine import require
    from qsr_plugin.deploy.onnx_export import export_onnx
    from qsr_plugin.deploy.packed import save_packed

    try:
        for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
            require(package)
    except UserError as error:
        console.print(f"   left out: {error}")
        return
    net = load_quantized(path)
    for line in str(export_onnx(net, path.with_suffix(".onnx"))).splitlines():
        console.print(f"   {line}", markup=False, soft_wrap=True)
    packed = save_packed(net, path.with_name(f"{path.stem}_packed.safetensors"))
    console.print(f"   packed: {packed.file_bytes / 1000:.1f} kB, float weights {packed.float_bytes / 1000:.1f} kB")
    variants = "torch,openvino-float,openvino-float-passes,openvino-int8"
    bench(path, variants=variants, rounds=3, seconds=0.2, out=folders.root / "speed.json")


def run(folders: demo.Folders, weights: Path, iters: Optional[int]) -> None:
    """All steps."""
    options = demo.demo_options(folders, weights, iters)
    results = Results(folders)
    with step(1, "Photos that scikit-image ships, cut into an LMDB to train from"):
        prepare(folders)
    with step(2, "The float network"):
        results.add("float", float_network(options, weights))
    with step(3, "8 bits: calibrated, not trained"):
        recipe = load_recipe("minmax", weight_bits=8, act_bits=8)
        results.add("min-max W8A8", calibrated(options, weights, recipe, folders.models / "minmax_w8a8.safetensors"))
    with step(4, "4 bits: calibrated, not trained"):
        recipe = load_recipe("percentile", weight_bits=4, act_bits=4)
        net = calibrated(options, weights, recipe, folders.models / "percentile_w4a4.safetensors")
        results.add("percentile W4A4", net)
        recipe = load_recipe("percentile", weight_bits=4, act_bits=4, placement="full")
        net = calibrated(options, weights, recipe, folders.models / "percentile_w4a4_full.safetensors")
        results.add("percentile W4A4, full", net)
        recipe = load_recipe(options["network_g"]["recipe"])
        net = calibrated(options, weights, recipe, folders.models / "pams_w4a4.safetensors")
        results.add("PAMS W4A4, calibrated", net)
    with step(5, f"4 bits: PAMS, trained for {options['train']['total_iter']} iterations"):
        results.add("PAMS W4A4, trained", train(options, folders))
    with step(6, "Comparison"):
        report(results)
    with step(7, "The trained network as a product: ONNX for an integer engine, packed weights, speed"):
        make_fast(folders.models / "pams_w4a4_trained.safetensors", folders)


def main(
    out: Annotated[Path, typer.Option(help="Folder for everything this makes.")] = Path("demo_output"),
    iters: Annotated[Optional[int], typer.Option(min=1, help="Iterations of the training.")] = None,
    weights: Annotated[Optional[Path], typer.Option(help="Other float weights of the small EDSR.")] = None,
) -> None:
    """Quantize the small EDSR that comes with the package to 8 and 4 bits, train it at 4 bits, and compare."""
    folders, start = demo.Folders(out), time.perf_counter()
    try:
        compat.import_host()
        run(folders, weights or demo.packaged_weights(), iters)
    except (UserError, ValueError) as error:
        Console(stderr=True).print(f"\nerror: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    places = {"pictures": folders.pictures, "networks": folders.models, "figures": folders.root / "results.json"}
    if (speed := folders.root / "speed.json").is_file():
        places["speed"] = speed
    console.print(f"\n[bold]Done[/bold] in {(time.perf_counter() - start) / 60:.1f} minutes.")
    for name, place in places.items():
        console.print(f"   {name}: {place.resolve()}", soft_wrap=True)
    console.print("   (.safetensors hold the weights in float, ready to be trained further, but for the packed one)")


if __name__ == "__main__":
    typer.run(main)
