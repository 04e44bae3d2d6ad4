"""The ``qsr`` command line, over the same functions as the Python interface."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import track
from rich.table import Table

from qsr_plugin import compat
from qsr_plugin.data.cli import app as data_app
from qsr_plugin.errors import UserError, suggest

app = typer.Typer(help="Quantized image super-resolution for BasicSR.", no_args_is_help=True, add_completion=False)
app.add_typer(data_app, name="data")
console = Console()

_HOST_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_HOST_FLAGS)
def train(context: typer.Context) -> None:
    """Train: -opt FILE, with BasicSR's flags (--launcher, --auto_resume, --debug, --force_yml)."""
    from qsr_plugin.train import main as run

    run(context.args)


@app.command(context_settings=_HOST_FLAGS)
def test(context: typer.Context) -> None:
    """Test: -opt FILE, with BasicSR's flags."""
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
    bits: Annotated[str, typer.Option(help="Weight and activation bits, e.g. W4A4; 32 is float.")] = "W8A8",
    placement: Annotated[Optional[str], typer.Option(help="Which layers: a placement of the recipe.")] = None,
    test: Pair = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw of calibration crops.")] = 0,
) -> None:
    """Calibrate a float network into a quantized one, and report what it costs and how it scores."""
    from qsr_plugin import calibrate, complexity, load_recipe, save_quantized
    from qsr_plugin.data.calibration_set import crops_from_folder
    from qsr_plugin.report.evaluate import evaluate
    from qsr_plugin.report.tables import results_table, summary_table, write_json

    weight_bits, act_bits = _parse_bits(bits)
    changes = {"placement": placement} if placement else {}
    recipe = load_recipe(method, weight_bits=weight_bits, act_bits=act_bits, **changes)
    if (images is None) == (photos is None):
        raise typer.BadParameter("give one of --images (low resolution) and --photos (high resolution)")
    backbone = _backbone(arch)
    scale = int(backbone.get("upscale", backbone.get("scale", 4)))
    net, float_net = _float_network(backbone, weights), _float_network(backbone, weights)
    from qsr_plugin.quant.surgery import quantize_model

    quantize_model(net, recipe)
    calibration = recipe.calibration
    batches = crops_from_folder(
        images or photos, images=calibration.images, batch=calibration.batch, scale=1 if images else scale, seed=seed
    )
    calibrate(net, track(batches, description="calibrating", total=None, console=console))
    save_quantized(net, out)
    report = complexity(net)
    results: dict[str, Any] = {"weights": str(weights), "model": str(out), "complexity": report.to_dict()}
    if test is None:
        console.print(summary_table(report))
    else:
        rows = {}
        for label, one in (("float", float_net), (f"{recipe.method} {bits}", net)):
            score = evaluate(one, *test, scale, progress=lambda pairs, name=label: track(pairs, f"testing {name}"))
            rows[label] = (complexity(one), score)
            results[label] = score.to_dict()
        console.print(results_table(rows, title=str(test[0])))
    write_json(results, out.with_suffix(".json"))
    console.print(f"wrote {out} and {out.with_suffix('.json')}", highlight=False)


@app.command()
def report(
    model: Annotated[Path, typer.Argument(help="Quantized .safetensors, or an option file with a network_g block.")],
    size: Annotated[str, typer.Option(help="LR height x width that MACs are counted for.")] = "180x320",
    convention: Annotated[str, typer.Option(help="How BitOPs are counted: macs-bits or cadyq.")] = "macs-bits",
    sites: Annotated[bool, typer.Option("--sites", help="One row per layer as well.")] = False,
    test: Pair = None,
    json: Annotated[Optional[Path], typer.Option(help="Write everything as JSON.")] = None,
) -> None:
    """What a network costs: MACs by layer, FAB, BitOPs, storage; with --test also PSNR and SSIM."""
    from qsr_plugin import complexity, load_quantized
    from qsr_plugin.report.evaluate import evaluate
    from qsr_plugin.report.tables import site_table, summary_table, write_json

    found = re.fullmatch(r"(\d+)x(\d+)", size)
    if not found:
        raise typer.BadParameter(f"--size is '{size}'; expected HEIGHTxWIDTH, e.g. 180x320")
    net = load_quantized(model) if model.suffix == ".safetensors" else _network_of_file(model)
    costs = complexity(net, (int(found[1]), int(found[2])), convention=convention)
    scores = {}
    if test is not None:
        scale = round(costs_scale(net))
        scores[test[0].parent.name or "test"] = evaluate(net, *test, scale, progress=lambda p: track(p, "testing"))
    if sites:
        console.print(site_table(costs))
    console.print(summary_table(costs, scores))
    if json is not None:
        write_json({**costs.to_dict(), "scores": {name: score.to_dict() for name, score in scores.items()}}, json)
        console.print(f"wrote {json}", highlight=False)


@app.command("list")
def list_all() -> None:
    """Methods and backbones that come with the package."""
    from qsr_plugin import list_methods
    from qsr_plugin.options_file import options_folder

    table = Table("methods (--method)", "backbones (--arch)")
    backbones = sorted(path.stem for path in (options_folder() / "backbones").glob("*.yml"))
    table.add_row("\n".join(list_methods()), "\n".join(backbones))
    console.print(table)


def costs_scale(net: Any) -> float:
    """Up-sampling factor of a network built from options."""
    options = getattr(net, "backbone_options", {})
    return float(options.get("upscale", options.get("scale", 1)))


def _parse_bits(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"[wW](\d+)[aA](\d+)", text)
    if not found:
        raise typer.BadParameter(f"--bits is '{text}'; expected weight and activation bits, e.g. W4A4 or W8A8")
    return int(found[1]), int(found[2])


def _options_of(arch: str) -> dict[str, Any]:
    from qsr_plugin.options_file import OptionsError, load_options, options_folder, read_yaml

    if Path(arch).suffix in (".yml", ".yaml"):
        network = load_options(arch).get("network_g")
    else:
        folder = options_folder() / "backbones"
        if not (folder / f"{arch}.yml").is_file():
            names = sorted(path.stem for path in folder.glob("*.yml"))
            raise OptionsError(f"unknown backbone '{arch}'. {suggest(arch, names)} Or give a .yml file.")
        network = read_yaml(folder / f"{arch}.yml").get("network_g")
    if not network:
        raise OptionsError(f"{arch} has no network_g block")
    return network


def _backbone(arch: str) -> dict[str, Any]:
    network = _options_of(arch)
    return network["backbone"] if network.get("type") == "QuantNet" else network


def _float_network(backbone: dict[str, Any], weights: Path) -> Any:
    from qsr_plugin.checkpoint import load_float_weights

    compat.import_host()
    from qsr_plugin.archs.quant_net_arch import build_backbone

    net = build_backbone(backbone)
    count = load_float_weights(net, weights)
    console.print(f"loaded {count} of {count} keys from {weights}", highlight=False)
    return net.eval()


def _network_of_file(path: Path) -> Any:
    network = _options_of(str(path))
    compat.import_host()
    from qsr_plugin.archs.quant_net_arch import QuantNet, build_backbone

    if network.get("type") == "QuantNet":
        return QuantNet(network["backbone"], network["recipe"])
    return build_backbone(network)


def main() -> None:
    """Entry point of the ``qsr`` script: messages instead of tracebacks for what a user can mend."""
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.getLogger("qsr_plugin").addHandler(handler)
    try:
        app()
    except (UserError, ValueError) as error:
        logging.getLogger("qsr_plugin").debug("traceback", exc_info=True)
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
