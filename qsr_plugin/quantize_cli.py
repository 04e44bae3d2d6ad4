"""``qsr quantize``: a float checkpoint and a folder of pictures in, a quantized network with a report out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperCommand

from qsr_plugin import compat
from qsr_plugin.errors import UserError, first_line
from qsr_plugin.own_modules import command
from qsr_plugin.progress import track
from qsr_plugin.report_cli import console, set_name

#: Recipe of ``--method`` where none is given.
DEFAULT_METHOD = "auto"
_FEW = 16  # images below which the ranges may not fit others


class SeveralTests(TyperCommand):
    """A command whose ``--test HR LR`` may be repeated: typer has no lists of pairs, so it gets two single options."""

    #: Options that take two values, and what these are.
    pairs = {"--test": "two folders: --test HR_FOLDER LR_FOLDER"}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments in which each of :attr:`pairs` has two values."""
        spread, left = [], list(args)
        while left:
            spread.append(left.pop(0))
            name = spread[-1].partition("=")[0]
            if name in self.pairs:
                if "=" in spread[-1] or len(left) < 2 or any(value.startswith("-") for value in left[:2]):
                    raise typer.BadParameter(f"{name} takes {self.pairs[name]}")
                spread += [left.pop(0), name, left.pop(0)]
        return super().parse_args(ctx, spread)


Option = typer.Option


def quantize(
    weights: Annotated[Path, typer.Argument(help="Float weights: .pth (bare, params or params_ema) or .safetensors.")],
    images: Annotated[Optional[Path], Option(help="Folder of low-resolution images to calibrate on.")] = None,
    photos: Annotated[Optional[Path], Option(help="Or: folder of photos, reduced by the network's scale.")] = None,
    arch: Annotated[
        Optional[str],
        Option(help="If the weights are not recognised: a backbone of 'qsr list', or a YAML file with network_g."),
    ] = None,
    scale: Annotated[Optional[int], Option(min=1, help="Upsampling factor, to check against the weights.")] = None,
    method: Annotated[str, Option(help="Shipped recipe (see 'qsr list') or a recipe YAML.")] = DEFAULT_METHOD,
    bits: Annotated[
        str, Option(help="Weight and activation bits, e.g. W4A4; 32 is float. W4A4MP: a method that adapts them.")
    ] = "W4A4",
    placement: Annotated[
        Optional[str],
        Option(help="Which layers: a placement of the recipe, e.g. body or full.", show_default="the recipe's"),
    ] = None,
    tuned: Annotated[
        bool, Option("--tune/--no-tune", help="Tune after the calibration, as the recipe says, or only calibrate.")
    ] = True,
    steps: Annotated[
        Optional[int],
        Option(min=1, help="Steps of the tuning in all; more take longer.", show_default="the recipe's"),
    ] = None,
    test: Annotated[
        Optional[list[Path]], Option(metavar="HR LR", help="Folders of a test set; may be repeated.")
    ] = None,
    seed: Annotated[int, Option(help="Seed of the draw of calibration crops.")] = 0,
    device: Annotated[str, Option(help="Where the networks run: cpu, cuda, cuda:1.")] = "cpu",
    threads: Annotated[Optional[int], Option(min=1, help="CPU threads.", show_default="all")] = None,
    out: Annotated[
        Optional[Path],
        Option("-o", "--out", help="Quantized model to write, .safetensors, or a folder; else here, NAME_w4a4."),
    ] = None,
) -> None:
    """Quantize a float network without training: --images or --photos is all it needs.

    Writes OUT.safetensors, OUT.json (settings, scores, costs) and OUT.html (a page with pictures).
    """
    compat.import_host()
    from torch import OutOfMemoryError, set_num_threads

    from qsr_plugin.checkpoint import ENDING, check_quantized_path, save_quantized
    from qsr_plugin.data.images import list_images
    from qsr_plugin.device import usable_device
    from qsr_plugin.float_networks import check_enlarges, open_float_network
    from qsr_plugin.memory import keep_freed_memory, peak_memory
    from qsr_plugin.post_training import check_recipe, post_train
    from qsr_plugin.quant.recipe import with_steps
    from qsr_plugin.quantize_report import report_quantized
    from qsr_plugin.quantize_settings import Settings

    recipe = _recipe(method, bits, placement)
    if steps is not None:
        if not tuned:
            raise typer.BadParameter("--steps are those of the tuning, which --no-tune leaves out: give one of them")
        recipe = with_steps(recipe, steps)
    if (images is None) == (photos is None):
        raise typer.BadParameter("give one of --images (low resolution) and --photos (high resolution)")
    tuning = f"{steps}steps" if steps else "" if tuned else "untuned"
    named = _named(weights, method, bits, placement, tuning)
    out = named if out is None else out / named if out.is_dir() else out if out.suffix else out.with_suffix(ENDING)
    if out.resolve() == weights.resolve():
        raise typer.BadParameter(f"-o {out} is the file of the float weights: choose another name")
    list_images(images or photos)
    check_quantized_path(out)
    place = usable_device(device)
    if threads is not None:
        set_num_threads(threads)
    network = open_float_network(weights, arch, scale)
    told = f"{weights.name}: {network.label} ({network.source}): {_arguments(network.options)}"
    console.print(told, highlight=False, markup=False)
    check_recipe(network.net, recipe, tuned=tuned)
    _tell_guessed(network.net)
    tests = _test_sets(test or [], network.scale)
    if out.exists():
        told = f"note: {out} is there and will be replaced, with its .json and .html; -o gives another name"
        console.print(told, highlight=False, markup=False, soft_wrap=True)
    used: list[str] = []
    crops = _crops(images, photos, recipe, network.scale, seed, used)
    if len(used) < _FEW:
        console.print(f"note: only {len(used)} image(s) to calibrate on; {_FEW} or more are advised", highlight=False)
    console.print(f"to do: {_plan(recipe, tuned)}; each shows the time it has left", highlight=False)
    network.net.to(place)
    check_enlarges(network, crops[0])
    keep_freed_memory()
    try:
        made = post_train(network.net, recipe, crops, tuned=tuned, progress=_track)
    except KeyboardInterrupt:
        console.print(f"interrupted: {out} is not written", highlight=False, markup=False, soft_wrap=True)
        raise
    except OutOfMemoryError as error:
        raise UserError(
            f"{place} has too little memory: {first_line(error)} Free some, take --device cpu, or a recipe with a "
            f"smaller calibration.batch, here {recipe.calibration.batch}"
        ) from None
    peak = peak_memory(place)
    save_quantized(made.net, out)
    settings = Settings(weights, out, network, made, seed, str(images or photos), photos is not None, tuple(used), peak)
    try:
        report_quantized(settings, tests, crops)
    except KeyboardInterrupt:
        told = (
            f"interrupted: {out} is written, scores and page are not; {command()} report {out} --test HR LR scores it"
        )
        console.print(told, highlight=False, markup=False, soft_wrap=True)
        raise


def _plan(recipe: Any, tuned: bool) -> str:
    """What takes time."""
    parts = ["calibration"]
    if recipe.fragile is not None:
        parts += ["search for fragile places, each measured alone"]
    if tuned and recipe.tuning is not None:
        parts += [f"{sum(stage.iters for stage in recipe.stages)} steps of tuning"]
    return ", ".join(parts)


def _track(items: Sequence[Any], description: str) -> Iterable[Any]:
    return track(items, description, console)


def _named(weights: Path, method: str, bits: str, placement: Optional[str], tuning: str) -> Path:
    """File for the result: what was chosen beside the defaults is in its name, so that variants do not replace it."""
    chosen = "" if method == DEFAULT_METHOD else Path(method).stem
    parts = (weights.stem, chosen, bits.lower(), placement, tuning)
    return Path(f"{'_'.join(filter(None, parts))}.safetensors")


def _recipe(method: str, bits: str, placement: Optional[str]) -> Any:
    """The recipe asked for, if it can be made without a training."""
    from qsr_plugin import load_recipe
    from qsr_plugin.options_file import parse_bits
    from qsr_plugin.quant.policy import policy_class

    weight_bits, act_bits = parse_bits(bits)
    changes = {"placement": placement} if placement else {}
    recipe = load_recipe(method, weight_bits=weight_bits, act_bits=act_bits, **changes)
    reach = policy_class(recipe.policy.type).reach
    if recipe.policy.type != "fixed" and not reach:
        raise typer.BadParameter(
            f"'{recipe.method}' chooses among several widths and learns how in a training: qsr train, with an option "
            "file like those in options/train. Methods for qsr quantize have one width, or adapt around one (adabm)"
        )
    if bits.upper().endswith("MP") and recipe.policy.type == "fixed":
        raise typer.BadParameter(f"--bits {bits} asks for adaptive bits, which '{recipe.method}' has not: leave out MP")
    if reach and not bits.upper().endswith("MP"):
        console.print(
            f"'{recipe.method}' adapts activations around {act_bits} bits, {act_bits - reach} to {act_bits + reach}: "
            f"{bits.upper()} is {bits.upper()}MP",
            highlight=False,
        )
    if recipe.tuning is None and any("weights" in stage.train for stage in recipe.stages):
        console.print(f"note: '{recipe.method}' is made for a training (qsr train); here it is only calibrated")
    return recipe


def _arguments(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items() if key != "type") or "no arguments"


def _tell_guessed(net: Any) -> None:
    """Which layers are taken for head, upsampler and tail, where no role table says it."""
    from qsr_plugin.quant.places import guessed_roles
    from qsr_plugin.report.layers import brief_names

    if not (roles := guessed_roles(net)):
        return
    named = {role: ", ".join(brief_names(roles.get(role, ()))) for role in ("head", "upsampler", "tail")}
    ends = "; ".join(f"{role} {names}" for role, names in named.items() if names)
    body = len(roles.get("block.conv", ()))
    console.print(
        f"{type(net).__name__} has no role table. Guessed from a run: {ends}; the body is the other {body} layers, "
        "with any behind the blocks", highlight=False, markup=False,
    )  # fmt: skip


def _test_sets(folders: list[Path], scale: int) -> dict[str, tuple[Path, Path]]:
    """Folders (HR, LR) by a name of each test set, their images read and checked."""
    from qsr_plugin.report.evaluate import check_pairs, find_pairs

    tests: dict[str, tuple[Path, Path]] = {}
    for hr, lr in zip(folders[::2], folders[1::2]):
        name = set_name(hr)
        number = sum(one == name or one.startswith(f"{name} (") for one in tests) + 1
        tests[name if number == 1 else f"{name} ({number})"] = hr, lr
        check_pairs(track(find_pairs(hr, lr, scale), f"checking {name}", console), scale)
    return tests


def _crops(images: Optional[Path], photos: Optional[Path], recipe: Any, scale: int, seed: int, used: list[str]) -> list:
    from qsr_plugin.data.calibration_set import CROP, crops_from_folder

    count, batch = recipe.calibration.images, recipe.calibration.batch
    cut = {"scale": 1 if images else scale, "side": CROP // scale, "seed": seed}
    reading = partial(_track, description="reading images")
    return list(crops_from_folder(images or photos, images=count, batch=batch, used=used, progress=reading, **cut))
