"""``qsr report`` and ``qsr slim``: what a network costs and how it scores, and a smaller file of one with depth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from qsr_plugin import compat
from qsr_plugin.progress import track

console = Console()

Pair = Annotated[Optional[tuple[Path, Path]], typer.Option("--test", help="HR folder and LR folder to evaluate on.")]


def report(
    model: Annotated[Path, typer.Argument(help="Quantized .safetensors, or an option file with a network_g block.")],
    size: Annotated[
        Optional[str], typer.Option(help="LR height x width that MACs are counted for; 180x320 by most conventions.")
    ] = None,
    convention: Annotated[
        str,
        typer.Option(help="How operations and parameters count: macs-bits, cadyq, odm, quantsr or quantsr-printed."),
    ] = "macs-bits",
    sites: Annotated[bool, typer.Option("--sites", help="One row per layer as well.")] = False,
    depth: Annotated[Optional[int], typer.Option(help="How many blocks run, for a network with depth.")] = None,
    test: Pair = None,
    patch: Annotated[Optional[int], typer.Option(help="Cut images into patches with this side, in LR pixels.")] = None,
    overlap: Annotated[int, typer.Option(help="LR pixels that neighbouring patches share.")] = 0,
    last: Annotated[str, typer.Option(help="Last patch of a row: enlarge (as published) or shift.")] = "enlarge",
    batch: Annotated[int, typer.Option(help="Patches of one size that run together.")] = 1,
    sensitivity: Annotated[
        Optional[Path], typer.Option(help="Folder of LR images: quantize one layer at a time and rank the damage.")
    ] = None,
    sensitivity_plot: Annotated[Optional[Path], typer.Option(help="Draw that ranking, .png or .svg.")] = None,
    weights: Annotated[
        Optional[Path],
        typer.Option("--float", help="For --sensitivity: the float checkpoint that a tuned file was made from."),
    ] = None,
    json: Annotated[Optional[Path], typer.Option(help="Write everything as JSON.")] = None,
) -> None:
    """What a network costs: MACs by layer, FAB, BitOPs, storage; with --test also PSNR, SSIM and the bits chosen."""
    compat.import_host()
    from qsr_plugin import complexity, load_quantized, sensitivity_cli, set_depth, slim
    from qsr_plugin.data.patches import PatchOptions
    from qsr_plugin.errors import suggest
    from qsr_plugin.options_file import scale_of
    from qsr_plugin.quant.depth import trained_depths
    from qsr_plugin.report.complexity_types import CONVENTIONS
    from qsr_plugin.report.evaluate import evaluate
    from qsr_plugin.report.tables import depth_table, site_table, summary_table

    found = re.fullmatch(r"(\d+)x(\d+)", size or "")
    if size is not None and not found:
        raise typer.BadParameter(f"--size is '{size}'; expected HEIGHTxWIDTH, e.g. 180x320")
    if convention not in CONVENTIONS:
        raise typer.BadParameter(f"--convention is '{convention}'. {suggest(convention, CONVENTIONS)}")
    if model.suffix == ".pth":
        raise typer.BadParameter(
            f"'{model}' names no backbone: of a training, give the .safetensors beside it; float weights are "
            "for 'qsr quantize' first"
        )
    if model.suffix == ".onnx":
        raise typer.BadParameter(f"'{model}' is an exported model: give the .safetensors that it was made from")
    if model.suffix in (".json", ".html"):
        raise typer.BadParameter(f"'{model}' is a report: give the .safetensors it is of, or an option file")
    trained = model.suffix == ".safetensors"
    if test is not None and not trained:
        raise typer.BadParameter(f"--test needs weights: give a quantized .safetensors instead of '{model}'")
    if patch is None and (overlap or batch != 1):
        raise typer.BadParameter("--overlap and --batch are of patches: give --patch as well, e.g. --patch 96")
    sensitivity_cli.check(sensitivity, sensitivity_plot, trained, weights)
    cut = {"size": patch, "overlap": overlap, "last": last, "batch": batch}
    patches = None if patch is None else PatchOptions.read(cut, "patches")
    net = set_depth(load_quantized(model) if trained else _network_of_file(model), depth)
    ranked = None if sensitivity is None else sensitivity_cli.measured_network(net, weights, model)
    scores, bits = {}, None
    if test is not None:
        scale = scale_of(net.backbone_options)
        score = evaluate(net, *test, scale, patches=patches, progress=lambda pairs: track(pairs, "testing", console))
        scores[set_name(test[0])], bits = score, score.place_bits
    counting = {"input_size": found and (int(found[1]), int(found[2])), "convention": convention, "patches": patches}
    costs = complexity(net, bits=bits, **counting)
    depths = trained_depths(net) if depth is None else ()
    by_depth = [complexity(slim(net, blocks), **counting) for blocks in depths]
    if sites:
        console.print(site_table(costs))
    console.print(summary_table(costs, scores))
    if by_depth:
        console.print(depth_table(by_depth))
    damage = None if sensitivity is None else sensitivity_cli.run(ranked, sensitivity, sensitivity_plot, console)
    if json is not None:
        details = {"depths": [one.to_dict() for one in by_depth]} if by_depth else {}
        details |= {} if damage is None else {"sensitivity": damage}
        _write_result(json, model, net, costs, scores, details)
        console.print(f"wrote {json}", highlight=False, markup=False, soft_wrap=True)


def _write_result(path: Path, model: Path, net: Any, costs: Any, scores: dict[str, Any], details: Any) -> None:
    """Everything as a result file."""
    from qsr_plugin.report.result_io import write_results
    from qsr_plugin.report.result_schema import FLOAT, Costs, Quality, Result, described, of_backbone, package_versions

    said = {"label": FLOAT} if (recipe := getattr(net, "recipe", None)) is None else described(recipe)
    said |= of_backbone(getattr(net, "backbone_options", None) or {"type": costs.network})
    quality = {name: Quality.of(score, costs.bitops) for name, score in scores.items()}
    made = {"quality": quality, "costs": Costs.of(costs), "versions": package_versions(), "details": details}
    write_results(Result(**said, model=str(model), **made), path)


def slim(
    model: Annotated[Path, typer.Argument(help="Quantized .safetensors of a network with depth.")],
    depth: Annotated[int, typer.Option(help="How many blocks to keep.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Smaller model to write, .safetensors.")],
) -> None:
    """Drop the blocks that do not run at a depth, for a smaller file with the same output."""
    compat.import_host()
    from qsr_plugin import complexity, load_quantized, save_quantized
    from qsr_plugin import slim as slimmed
    from qsr_plugin.quant.depth import trained_depths
    from qsr_plugin.report.tables import depth_table, size

    net = load_quantized(model)
    small = slimmed(net, depth)
    if (known := trained_depths(net)) and depth not in known:
        told = ", ".join(map(str, known))
        console.print(f"note: {depth} is no depth that was trained ({told}): look at its scores", highlight=False)
    save_quantized(small, out)
    console.print(depth_table([complexity(net), complexity(small)]))
    was, now = (size(8 * path.stat().st_size) for path in (model, out))
    console.print(f"wrote {out}: file of {now}, was {was}", highlight=False)


def set_name(hr: Path) -> str:
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
