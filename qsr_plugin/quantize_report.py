"""What ``qsr quantize`` tells of a quantized network: on the terminal, as JSON, and as one HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from qsr_plugin.progress import track
from qsr_plugin.quant.schema import Recipe
from qsr_plugin.quantize_page import examples_of_crops, examples_of_tests, packing_command, page_of
from qsr_plugin.quantize_settings import Scores, Settings, TestSets
from qsr_plugin.report.complexity import complexity
from qsr_plugin.report.complexity_types import ComplexityReport
from qsr_plugin.report.evaluate import evaluate
from qsr_plugin.report.layers import layer_groups, layer_lines
from qsr_plugin.report.page import Scored, write_page
from qsr_plugin.report.result_io import write_results
from qsr_plugin.report.result_schema import FLOAT, Costs, Quality, Result
from qsr_plugin.report.tables import results_table, size, summary_table
from qsr_plugin.report_cli import console

#: Crops on which the networks are compared, and the PSNR below which something is wrong, by the least bits of a recipe.
_COMPARED, _ALIKE = 8, ((8, 40.0), (0, 30.0))
#: Below this PSNR it makes something else, and the share of MACs from which on float layers are told.
_OTHER, _MUCH = 18.0, 0.25


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
    console.print(f"memory at its peak: {size(8 * settings.peak)}", highlight=False)
    costs = complexity(made.net)
    groups = layer_groups(costs, made.recipe)
    for line in layer_lines(groups):
        console.print(line, highlight=False, markup=False)
    if share := _float_share(costs, made.recipe):
        console.print(share, highlight=False)
    if count := len(made.fragile):
        places = "place" if count == 1 else "places"
        console.print(f"{settings.label}: the + is for more bits at {count} fragile {places}", highlight=False)
    likeness = _likeness(nets, crops[0][:_COMPARED].to(settings.device))
    console.print(
        f"PSNR of its output against the float network's, on calibration images: {likeness:.1f} dB", highlight=False
    )
    if warning := _warning(likeness, made.recipe):
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    json, html = settings.out.with_suffix(".json"), settings.out.with_suffix(".html")
    known, more = settings.result(), {"psnr_to_float": likeness, "layers": [group.to_dict() for group in groups]}
    more |= {"warning": warning} if warning else {}
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
    examples = examples_of_tests(tests, scores, nets, settings) if tests else examples_of_crops(crops, nets, settings)
    remarks = [told for told in (share, warning) if told]
    write_page(page_of(settings, groups, scores, costs, examples, likeness, remarks), html)
    console.print(f"wrote {settings.out}, {json} and {html}", highlight=False, markup=False, soft_wrap=True)
    told = f"{size(costs.storage_bits)} with packed weights (a file adds names and recipe)"
    console.print(f"{told}: {packing_command(settings.out)}", highlight=False, markup=False, soft_wrap=True)


def _likeness(nets: Mapping[str, Any], crops: Tensor) -> float:
    """PSNR in dB between the outputs of the two networks on some crops."""
    with torch.no_grad():
        plain, quantized = (net(crops).clamp(0, 1) for net in nets.values())
    return -10 * math.log10(max(float((plain - quantized).square().mean()), 1e-12))


def _warning(likeness: float, recipe: Recipe) -> str:
    """What to do if the network is too far from the float one, PSNR in dB; else nothing."""
    bits = _least_bits(recipe)
    usual = next(psnr for least, psnr in _ALIKE if bits >= least)
    if likeness >= usual:
        return ""
    told = "is another picture, so the network is of no use" if likeness < _OTHER else "is low"
    more = "" if bits >= 8 else "more bits (--bits W8A8, W4A8), "
    return (
        f"{likeness:.1f} dB against the float network's output {told}; {usual:.0f} dB and more are usual. Try {more}"
        "--method auto, or more images like those the network is for"
    )


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
