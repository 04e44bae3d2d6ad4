"""What ``qsr quantize`` tells of a quantized network: on the terminal, as JSON, and as one HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from qsr_plugin.data.images import read_rgb, to_uint8
from qsr_plugin.float_networks import FloatNetwork
from qsr_plugin.memory import peak_memory
from qsr_plugin.own_modules import command
from qsr_plugin.post_training import PostTrained
from qsr_plugin.progress import track
from qsr_plugin.quant.schema import Recipe
from qsr_plugin.report.complexity import complexity, method_label
from qsr_plugin.report.complexity_types import ComplexityReport
from qsr_plugin.report.evaluate import evaluate, find_pairs
from qsr_plugin.report.layers import LayerGroup, layer_groups, layer_lines
from qsr_plugin.report.page import Page, Scored, cost_figures, score_figures, write_page
from qsr_plugin.report.pictures import Example, example_of
from qsr_plugin.report.result_io import write_results
from qsr_plugin.report.result_schema import (
    FLOAT,
    CalibrationImages,
    Costs,
    Quality,
    Result,
    described,
    of_backbone,
    package_versions,
)
from qsr_plugin.report.tables import quantity, results_table, size, summary_table
from qsr_plugin.report_cli import console

#: Images on the page, and the LR side below which one is too small to show.
_EXAMPLES, _SMALL = 3, 16
#: Crops on which the networks are compared, and the PSNR below which something is wrong, by the least bits of a recipe.
_COMPARED, _ALIKE = 8, ((8, 40.0), (0, 30.0))
#: Below this PSNR it makes something else, and the share of MACs from which on float layers are told.
_OTHER, _MUCH = 18.0, 0.25

TestSets = Mapping[str, tuple[Path, Path]]
Scores = dict[str, dict[str, Scored]]


@dataclass(frozen=True)
class Settings:
    """What was asked for, and what came of it.

    Attributes:
        weights: Float checkpoint.
        out: Quantized network.
        network: The float one.
        made: The quantized one.
        seed: Of the draw of crops.
        folder: Of the calibration images.
        photos: Whether these were reduced.
        images: Names of those that were used.
    """

    weights: Path
    out: Path
    network: FloatNetwork
    made: PostTrained
    seed: int
    folder: str
    photos: bool
    images: tuple[str, ...]

    @property
    def label(self) -> str:
        """Method and bits."""
        return method_label(self.made.recipe)

    @property
    def tuned(self) -> bool:
        """Whether stages of the recipe ran after the calibration."""
        return "teacher" in self.made.seconds

    @property
    def device(self) -> torch.device:
        """Where the networks ran."""
        return next(self.made.net.parameters()).device

    def result(self) -> Result:
        """What is known before any test."""
        network = self.network
        backbone = {**of_backbone(network.options), "architecture": network.label, "scale": network.scale}
        backbone["weights"] = str(self.weights)
        shared = {"network": self.weights.stem, **backbone, "versions": package_versions()}
        images = {"reduced": network.scale if self.photos else 1, "images": len(self.images), "names": self.images}
        return Result(
            **described(self.made.recipe),
            **shared,
            model=str(self.out),
            tuned=self.tuned,
            seed=self.seed,
            calibration=CalibrationImages(folder=self.folder, seed=self.seed, **images),
            seconds=self.made.seconds,
            peak_memory=peak_memory(self.device),
            reference=Result(label=FLOAT, costs=Costs.of(complexity(network.net), sites=False), **shared),
            details={"source": network.source, "device": str(self.device), "fragile": list(self.made.fragile)},
        )


def report_quantized(settings: Settings, tests: TestSets, crops: Sequence[Tensor]) -> None:
    """Print layers, costs and scores, and write the JSON file and the page beside the model.

    Args:
        settings: Of the run.
        tests: Folders (HR, LR) by the name of the test set; may be empty.
        crops: Of the calibration, which the page shows where there is no test set.

    Raises:
        ValueError: For an output that is not finite, or images that do not fit.
        OSError: If a file cannot be written.
    """
    made, nets = settings.made, {FLOAT: settings.network.net, settings.label: settings.made.net}
    _print_seconds(made.seconds)
    costs = complexity(made.net)
    groups = layer_groups(costs, made.recipe)
    for line in layer_lines(groups):
        console.print(line, highlight=False, markup=False)
    if told := _float_share(costs, made.recipe):
        console.print(told, highlight=False)
    if count := len(made.fragile):
        places = "place" if count == 1 else "places"
        console.print(f"{settings.label}: the + is for more bits at {count} fragile {places}", highlight=False)
    likeness = _likeness(nets, crops[0][:_COMPARED].to(settings.device))
    console.print(
        f"PSNR of its output against the float network's, on calibration images: {likeness:.1f} dB", highlight=False
    )
    bits = _least_bits(made.recipe)
    usual = next(psnr for least, psnr in _ALIKE if bits >= least)
    if likeness < usual:
        more = "" if bits >= 8 else "more bits (--bits W8A8, W4A8), "
        told = "another picture, so the network is of no use" if likeness < _OTHER else "low"
        console.print(
            f"warning: that is {told}; {usual:.0f} dB and more are usual. Try {more}--method auto, or more images like "
            "those the network is for", style="yellow", highlight=False,
        )  # fmt: skip
    json, html = settings.out.with_suffix(".json"), settings.out.with_suffix(".html")
    known, more = settings.result(), {"psnr_to_float": likeness, "layers": [group.to_dict() for group in groups]}
    more["tests"] = {name: [str(folder) for folder in pair] for name, pair in tests.items()}
    known = known.model_copy(update={"costs": Costs.of(costs), "details": {**known.details, **more}})
    write_results(known, json)  # what ends a test later does not lose the settings
    scores: Scores = {}
    for name, folders in tests.items():
        scores[name] = _score(name, nets, folders, settings)
        costs = next(iter(scores.values()))[settings.label][0]
        write_results(_with_scores(known, scores, costs), json)
    if not tests:
        console.print(summary_table(costs))
        if costs.fab is None:
            console.print(f"'{made.recipe.method}' chooses bits by the image: for FAB and BitOPs, give --test HR LR")
    examples = _of_tests(tests, scores, nets, settings) if tests else _of_crops(crops, nets, settings)
    write_page(_page(settings, groups, scores, costs, examples, likeness), html)
    console.print(f"wrote {settings.out}, {json} and {html}", highlight=False, markup=False, soft_wrap=True)
    packed = settings.out.with_name(f"{settings.out.stem}_packed.safetensors")
    told = f"{command()} export {settings.out} --format packed -o {packed}"
    told = f"{size(costs.storage_bits)} with packed weights (a file adds names and recipe): {told}"
    console.print(told, highlight=False, markup=False, soft_wrap=True)


def _likeness(nets: Mapping[str, Any], crops: Tensor) -> float:
    """PSNR in dB between the outputs of the two networks on some crops."""
    with torch.no_grad():
        plain, quantized = (net(crops).clamp(0, 1) for net in nets.values())
    return -10 * math.log10(max(float((plain - quantized).square().mean()), 1e-12))


def _float_share(costs: ComplexityReport, recipe: Recipe) -> str:
    """What is left in float, if it does much of the work; else nothing."""
    left = 1 - costs.quantized_share
    if left < _MUCH:
        return ""
    more = "; --placement full quantizes them" if "full" in recipe.placements and recipe.placement != "full" else ""
    return f"the float layers do {left:.0%} of all MACs{more}"


def _least_bits(recipe: Recipe) -> int:
    """The fewest that any of its weights or activations can have."""
    widths = recipe.bits.weight, recipe.act_widths
    return min(min(one) if isinstance(one, tuple) else one for one in widths)


def _print_seconds(seconds: Mapping[str, float]) -> None:
    """What each phase took: first the calibration, then all of the tuning."""
    begin = [name for name in seconds if name in ("calibration", "clipping", "fragile places")]
    total = sum(seconds.values()) or 1.0
    for done, names in (("calibrated", begin), ("tuned", [name for name in seconds if name not in begin])):
        if names:
            console.print(f"{done} in {sum(seconds[name] for name in names):.0f} s", highlight=False)
        for name in names if len(names) > 1 else ():
            console.print(f"  {name}: {seconds[name]:.0f} s, {seconds[name] / total:.0%} of all", highlight=False)


def _score(name: str, nets: Mapping[str, Any], folders: tuple[Path, Path], settings: Settings) -> dict[str, Scored]:
    """Costs and scores of the networks on one test set, printed as well."""
    rows: dict[str, Scored] = {}
    for label, net in nets.items():
        told = f"testing {label} on {name}"
        score = evaluate(
            net, *folders, settings.network.scale, progress=lambda pairs, told=told: track(pairs, told, console)
        )
        rows[label] = complexity(net, bits=score.place_bits), score
    title = f"{name} ({folders[0]}), placement {settings.made.recipe.placement}"
    console.print(results_table(rows, title=escape(title)))
    return rows


def _with_scores(known: Result, scores: Scores, costs: ComplexityReport) -> Result:
    """The result with the quality of both networks on the sets there are, and the costs on the first."""
    plain, quantized = (
        {name: Quality.of(rows[label][1], rows[label][0].bitops) for name, rows in scores.items()}
        for label in (FLOAT, known.label)
    )
    reference = known.reference.model_copy(update={"quality": plain})
    return known.model_copy(update={"quality": quantized, "costs": Costs.of(costs), "reference": reference})


# -- the page ---------------------------------------------------------------------------------------------------------


def _of_tests(tests: TestSets, scores: Scores, nets: Mapping[str, Any], settings: Settings) -> list[Example]:
    """The test images that lost most, by PSNR."""
    loss: list[tuple[float, str, Path, Path]] = []
    for name, (hr, lr) in tests.items():
        plain, quantized = (scores[name][label][1].images for label in nets)
        pairs = find_pairs(hr, lr, settings.network.scale)
        loss += [(a.psnr - b.psnr, f"{name}: {pair[0].name}", *pair) for a, b, pair in zip(plain, quantized, pairs)]
    worst = sorted((one for one in loss if one[0] == one[0]), key=lambda one: (-one[0], one[1]))[:_EXAMPLES]
    return [
        example_of(
            f"{name} ({-lost:+.2f} dB)", read_rgb(lr), nets, hr=to_uint8(read_rgb(hr)), scale=settings.network.scale
        )
        for lost, name, hr, lr in worst
    ]


def _of_crops(crops: Sequence[Tensor], nets: Mapping[str, Any], settings: Settings) -> list[Example]:
    """The first calibration crops."""
    singles = [crop for batch in crops for crop in batch.split(1) if min(crop.shape[2:]) >= _SMALL][:_EXAMPLES]
    pictures = [(255 * crop[0].permute(1, 2, 0)).round().byte().numpy() for crop in singles]
    return [
        example_of(f"calibration image {number}", picture, nets, scale=settings.network.scale)
        for number, picture in enumerate(pictures, 1)
    ]


def _page(
    settings: Settings,
    groups: list[LayerGroup],
    scores: Scores,
    costs: ComplexityReport,
    examples: list[Example],
    likeness: float,
) -> Page:
    made, network = settings.made, settings.network
    plain = complexity(network.net)
    lines = [f"Storage {size(plain.storage_bits)} \N{RIGHTWARDS ARROW} {size(costs.storage_bits)}"]
    if costs.bitops is not None:
        lines.append(f"BitOPs {quantity(plain.bitops)} \N{RIGHTWARDS ARROW} {quantity(costs.bitops)}")
    for name, rows in scores.items():
        before, after = (score.psnr for _, score in rows.values())
        lines.append(f"{name}: PSNR {before:.2f} dB \N{RIGHTWARDS ARROW} {after:.2f} dB")
    if told := _float_share(costs, made.recipe):
        lines.append(told)
    few = ", ".join(settings.images[:8]) + (", ..." if len(settings.images) > 8 else "")
    facts = {
        "Float weights": str(settings.weights),
        "Network": f"{network.label}, {network.source}",
        "Arguments": ", ".join(f"{key} {value}" for key, value in network.options.items() if key != "type"),
        "Method": f"{settings.label}, placement {made.recipe.placement}, {'tuned' if settings.tuned else 'not tuned'}",
        "Calibrated on": f"{len(settings.images)} {'photos, reduced' if settings.photos else 'images'}, "
        f"from {settings.folder}: {few}",
        "Seed": str(settings.seed),
        "PSNR against the float network's output": f"{likeness:.1f} dB, on calibration images",
        "Versions": ", ".join(f"{name} {number}" for name, number in package_versions().items()),
        "Model": str(settings.out),
    }
    tables = [score_figures(name, rows) for name, rows in scores.items()]
    title = f"{network.label}, {settings.label}"
    return Page(title, lines, tables, cost_figures(plain, costs), examples, groups, facts, made.seconds)
