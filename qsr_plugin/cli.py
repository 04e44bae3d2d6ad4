"""The ``qsr`` command line, over the same functions as the Python interface."""

from __future__ import annotations

import logging
import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from qsr_plugin import compat
from qsr_plugin.data.cli import app as data_app
from qsr_plugin.errors import UserError
from qsr_plugin.plot_cli import app as plot_app
from qsr_plugin.progress import track
from qsr_plugin.table_cli import table

app = typer.Typer(help="Quantized image super-resolution for BasicSR.", no_args_is_help=True, add_completion=False)
app.add_typer(data_app, name="data")
app.add_typer(plot_app, name="plot")
console = Console()

_HOST_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


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


Weights = Annotated[Path, typer.Argument(help="Float weights: .pth (bare, params or params_ema) or .safetensors.")]
Arch = Annotated[str, typer.Option(help="Shipped backbone (see 'qsr list') or a YAML file with a network_g block.")]
Pair = Annotated[Optional[tuple[Path, Path]], typer.Option("--test", help="HR folder and LR folder to evaluate on.")]


@app.command()
def quantize(
    weights: Weights,
    out: Annotated[Path, typer.Option("-o", "--out", help="Quantized model to write, .safetensors.")],
    arch: Arch,
    images: Annotated[Optional[Path], typer.Option(help="Folder of LR images to calibrate on.")] = None,
    photos: Annotated[
        Optional[Path], typer.Option(help="Or: folder of HR photos, reduced by the network's scale.")
    ] = None,
    method: Annotated[str, typer.Option(help="Shipped recipe (see 'qsr list') or a recipe YAML.")] = "percentile",
    bits: Annotated[
        str, typer.Option(help="Weight and activation bits, e.g. W4A4; 32 is float. W4A4MP: a method that adapts them.")
    ] = "W8A8",
    placement: Annotated[Optional[str], typer.Option(help="Which layers: a placement of the recipe.")] = None,
    tuned: Annotated[
        bool, typer.Option("--tune/--no-tune", help="Tune ranges and bits if the recipe says how, or only calibrate.")
    ] = True,
    test: Pair = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw of calibration crops.")] = 0,
) -> None:
    """Calibrate (and tune) a float network into a quantized one, and report what it costs and how it scores."""
    compat.import_host()
    from qsr_plugin import load_recipe, quantize_model, save_quantized
    from qsr_plugin.checkpoint import check_quantized_path
    from qsr_plugin.data.calibration_set import CROP, crops_from_folder
    from qsr_plugin.memory import keep_freed_memory
    from qsr_plugin.options_file import backbone_options, parse_bits, scale_of
    from qsr_plugin.quant.policy import policy_class
    from qsr_plugin.report.tables import write_json

    weight_bits, act_bits = parse_bits(bits)
    changes = {"placement": placement} if placement else {}
    recipe = load_recipe(method, weight_bits=weight_bits, act_bits=act_bits, **changes)
    if recipe.policy.type != "fixed" and not policy_class(recipe.policy.type).reach:
        raise typer.BadParameter(
            f"'{recipe.method}' chooses among several widths and learns how in a training: qsr train, with an option "
            "file like those in options/train. Methods for qsr quantize have one width, or adapt around one (adabm)"
        )
    if bits.upper().endswith("MP") and recipe.policy.type == "fixed":
        raise typer.BadParameter(f"--bits {bits} asks for adaptive bits, which '{recipe.method}' has not: leave out MP")
    if (images is None) == (photos is None):
        raise typer.BadParameter("give one of --images (low resolution) and --photos (high resolution)")
    check_quantized_path(out)
    backbone = backbone_options(arch)
    scale = scale_of(backbone)
    float_net = _float_network(backbone, weights)
    net = quantize_model(deepcopy(float_net), recipe)
    count, batch = recipe.calibration.images, recipe.calibration.batch
    cut = {"scale": 1 if images else scale, "side": CROP // scale}
    crops = crops_from_folder(images or photos, images=count, batch=batch, seed=seed, **cut)
    crops = list(track(crops, "reading images", console))
    keep_freed_memory()
    results: dict[str, Any] = {"weights": str(weights), "model": str(out)}
    results["seconds"] = _post_training(net, float_net if tuned else None, crops)
    save_quantized(net, out)
    net._last_record = None  # bits chosen on calibration crops are no figure of the network
    _report_of_quantized(net, float_net, test and (*test, scale), results)
    write_json(results, out.with_suffix(".json"))
    console.print(f"wrote {out} and {out.with_suffix('.json')}", highlight=False)


@app.command()
def report(
    model: Annotated[Path, typer.Argument(help="Quantized .safetensors, or an option file with a network_g block.")],
    size: Annotated[str, typer.Option(help="LR height x width that MACs are counted for.")] = "180x320",
    convention: Annotated[str, typer.Option(help="How BitOPs are counted: macs-bits or cadyq.")] = "macs-bits",
    sites: Annotated[bool, typer.Option("--sites", help="One row per layer as well.")] = False,
    depth: Annotated[Optional[int], typer.Option(help="How many blocks run, for a network with depth.")] = None,
    test: Pair = None,
    patch: Annotated[Optional[int], typer.Option(help="Cut images into patches with this side, in LR pixels.")] = None,
    overlap: Annotated[int, typer.Option(help="LR pixels that neighbouring patches share.")] = 0,
    last: Annotated[str, typer.Option(help="Last patch of a row: enlarge (as published) or shift.")] = "enlarge",
    batch: Annotated[int, typer.Option(help="Patches of one size that run together.")] = 1,
    json: Annotated[Optional[Path], typer.Option(help="Write everything as JSON.")] = None,
) -> None:
    """What a network costs: MACs by layer, FAB, BitOPs, storage; with --test also PSNR, SSIM and the bits chosen."""
    compat.import_host()
    from qsr_plugin import complexity, load_quantized, set_depth, slim
    from qsr_plugin.data.patches import PatchOptions
    from qsr_plugin.options_file import scale_of
    from qsr_plugin.quant.depth import trained_depths
    from qsr_plugin.report.evaluate import evaluate
    from qsr_plugin.report.tables import depth_table, site_table, summary_table, write_json

    found = re.fullmatch(r"(\d+)x(\d+)", size)
    if not found:
        raise typer.BadParameter(f"--size is '{size}'; expected HEIGHTxWIDTH, e.g. 180x320")
    if model.suffix == ".pth":
        raise typer.BadParameter(f"'{model}' names no backbone: give the .safetensors that lies beside it")
    trained = model.suffix == ".safetensors"
    if test is not None and not trained:
        raise typer.BadParameter(f"--test needs weights: give a quantized .safetensors instead of '{model}'")
    if patch is None and (overlap or batch != 1):
        raise typer.BadParameter("--overlap and --batch are of patches: give --patch as well, e.g. --patch 96")
    cut = {"size": patch, "overlap": overlap, "last": last, "batch": batch}
    patches = None if patch is None else PatchOptions.read(cut, "patches")
    net = set_depth(load_quantized(model) if trained else _network_of_file(model), depth)
    scores, bits = {}, None
    if test is not None:
        scale = scale_of(net.backbone_options)
        score = evaluate(net, *test, scale, patches=patches, progress=lambda pairs: track(pairs, "testing", console))
        scores[_set_name(test[0])], bits = score, score.place_bits
    counting = {"input_size": (int(found[1]), int(found[2])), "convention": convention, "patches": patches}
    costs = complexity(net, bits=bits, **counting)
    depths = trained_depths(net) if depth is None else ()
    by_depth = [complexity(slim(net, blocks), **counting) for blocks in depths]
    if sites:
        console.print(site_table(costs))
    console.print(summary_table(costs, scores))
    if by_depth:
        console.print(depth_table(by_depth))
    if json is not None:
        results = {**costs.to_dict(), "scores": {name: score.to_dict() for name, score in scores.items()}}
        write_json({**results, "depths": [one.to_dict() for one in by_depth]} if by_depth else results, json)
        console.print(f"wrote {json}", highlight=False)


@app.command()
def slim(
    model: Annotated[Path, typer.Argument(help="Quantized .safetensors of a network with depth.")],
    depth: Annotated[int, typer.Option(help="How many blocks to keep.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Smaller model to write, .safetensors.")],
) -> None:
    """Drop the blocks that do not run at a depth, for a smaller file with the same output."""
    compat.import_host()
    from qsr_plugin import complexity, load_quantized, save_quantized
    from qsr_plugin import slim as slimmed
    from qsr_plugin.report.tables import depth_table, size

    net = load_quantized(model)
    small = slimmed(net, depth)
    save_quantized(small, out)
    console.print(depth_table([complexity(net), complexity(small)]))
    was, now = (size(8 * path.stat().st_size) for path in (model, out))
    console.print(f"wrote {out}: file of {now}, was {was}", highlight=False)


app.command()(table)


@app.command("list")
def list_all() -> None:
    """Methods and backbones that come with the package."""
    from qsr_plugin import list_methods
    from qsr_plugin.options_file import options_folder

    table = Table("methods (--method)", "backbones (--arch)")
    backbones = sorted(path.stem for path in (options_folder() / "backbones").glob("*.yml"))
    table.add_row("\n".join(list_methods()), "\n".join(backbones))
    console.print(table)


def _float_network(backbone: dict[str, Any], weights: Path) -> Any:
    from qsr_plugin.archs.quant_net_arch import build_backbone
    from qsr_plugin.checkpoint import load_float_weights

    net = build_backbone(backbone)
    load_float_weights(net, weights)
    return net.eval()


def _post_training(net: Any, teacher: Any, crops: list) -> dict[str, float]:
    """Calibrate, and tune if the recipe says how and there is a teacher; seconds by what they were spent on."""
    from qsr_plugin import calibrate
    from qsr_plugin.models.tuning import tune

    seconds: dict[str, float] = {}
    calibrate(net, track(crops, "calibrating", console), spent=seconds)
    _print_shares("calibrated", seconds)
    if teacher is not None and net.recipe.tuning is not None:
        spent = tune(net, teacher, crops, progress=lambda steps: track(steps, "tuning", console))
        _print_shares("tuned", spent)
        seconds |= spent
    return seconds


def _print_shares(done: str, seconds: dict[str, float]) -> None:
    """One line per phase of a step of the work."""
    total = sum(seconds.values())
    console.print(f"{done} in {total:.0f} s", highlight=False)
    if len(seconds) > 1:
        for name, one in seconds.items():
            console.print(f"  {name}: {one:.0f} s, {one / total:.0%}", highlight=False)


def _report_of_quantized(net: Any, float_net: Any, test: Any, results: dict[str, Any]) -> None:
    """Print what a network costs, and on a test set how it scores beside the float one; fill in ``results``."""
    from qsr_plugin import complexity
    from qsr_plugin.report.complexity import method_label
    from qsr_plugin.report.evaluate import evaluate
    from qsr_plugin.report.tables import results_table, summary_table

    if test is None:
        costs = complexity(net)
        console.print(summary_table(costs))
        if costs.fab is None:
            console.print(f"'{net.recipe.method}' chooses bits by the image: for FAB and BitOPs, give --test HR LR")
    else:
        rows = {}
        for name, one in (("float", float_net), (method_label(net.recipe), net)):
            score = evaluate(one, *test, progress=lambda pairs, name=name: track(pairs, f"testing {name}", console))
            costs = complexity(one, bits=score.place_bits)
            spent = {"bitops": costs.bitops, "storage_bits": costs.storage_bits}
            rows[name], results[name] = (costs, score), {"set": _set_name(test[0]), **score.to_dict(), **spent}
        console.print(results_table(rows, title=str(test[0])))
    results["complexity"] = costs.to_dict()


def _set_name(hr: Path) -> str:
    """``Set5`` for ``Set5/HR``."""
    return hr.resolve().parent.name or "test"


def _network_of_file(path: Path) -> Any:
    """The network of an option file: quantized if there is a recipe, else its float backbone."""
    from qsr_plugin.archs.quant_net_arch import QuantNet, build_backbone
    from qsr_plugin.options_file import arch_options, backbone_options

    options = arch_options(str(path))
    recipe = options.get("recipe", options["network_g"].get("recipe"))
    backbone = backbone_options(str(path))
    return build_backbone(backbone) if recipe is None else QuantNet(backbone, recipe)


def main() -> None:
    """Entry point of the ``qsr`` script: messages instead of tracebacks for what a user can mend."""
    log = logging.getLogger("qsr_plugin")
    log.addHandler(RichHandler(console=Console(stderr=True), show_path=False, show_time=False))
    log.setLevel(logging.INFO)
    logging.getLogger("qsr_plugin.compat").setLevel(logging.WARNING)  # 'python -m qsr_plugin.compat' lists its repairs
    try:
        app()
    except (UserError, ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
