"""The page that ``qsr quantize`` writes about a quantized network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qsr_plugin.data.images import read_rgb, to_uint8
from qsr_plugin.own_modules import command
from qsr_plugin.quantize_settings import Scores, Settings, TestSets
from qsr_plugin.report.complexity import complexity
from qsr_plugin.report.complexity_types import ComplexityReport
from qsr_plugin.report.evaluate import find_pairs
from qsr_plugin.report.layers import LayerGroup
from qsr_plugin.report.page import Page, cost_figures, score_figures
from qsr_plugin.report.pictures import Example, example_of
from qsr_plugin.report.result_schema import package_versions
from qsr_plugin.report.tables import quantity, size

#: Images on the page, and the LR side below which one is too small to show.
_EXAMPLES, _SMALL = 3, 16


def packing_command(out: Path) -> str:
    """The command that makes the small file."""
    packed = out.with_name(f"{out.stem}_packed.safetensors")
    return f"{command()} export {out} --format packed -o {packed}"


def examples_of_tests(tests: TestSets, scores: Scores, nets: Mapping[str, Any], settings: Settings) -> list[Example]:
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


def examples_of_crops(crops: Sequence[Tensor], nets: Mapping[str, Any], settings: Settings) -> list[Example]:
    """The first calibration crops."""
    singles = [crop for batch in crops for crop in batch.split(1) if min(crop.shape[2:]) >= _SMALL][:_EXAMPLES]
    pictures = [(255 * crop[0].permute(1, 2, 0)).round().byte().numpy() for crop in singles]
    return [
        example_of(f"calibration image {number}", picture, nets, scale=settings.network.scale)
        for number, picture in enumerate(pictures, 1)
    ]


def page_of(
    settings: Settings,
    groups: list[LayerGroup],
    scores: Scores,
    costs: ComplexityReport,
    examples: list[Example],
    likeness: float,
    remarks: Sequence[str],
) -> Page:
    """The page about a quantized network.

    Args:
        settings: Of the run.
        groups: Its layers.
        scores: By test set and label.
        costs: Of the quantized network.
        examples: Pictures.
        likeness: PSNR between both networks' outputs in dB.
        remarks: What the user should know beside the figures.
    """
    made, network = settings.made, settings.network
    tuning = f"{sum(stage.iters for stage in made.recipe.stages)} steps of tuning" if settings.tuned else "not tuned"
    plain = complexity(network.net)
    lines = [f"Storage {size(plain.storage_bits)} \N{RIGHTWARDS ARROW} {size(costs.storage_bits)}"]
    if costs.bitops is not None:
        lines.append(f"BitOPs {quantity(plain.bitops)} \N{RIGHTWARDS ARROW} {quantity(costs.bitops)}")
    for name, rows in scores.items():
        before, after = (score.psnr for _, score in rows.values())
        lines.append(f"{name}: PSNR {before:.2f} dB \N{RIGHTWARDS ARROW} {after:.2f} dB")
    lines += remarks
    few = ", ".join(settings.images[:8]) + (", ..." if len(settings.images) > 8 else "")
    facts = {
        "Float weights": str(settings.weights),
        "Network": f"{network.label}, {network.source}",
        "Arguments": ", ".join(f"{key} {value}" for key, value in network.options.items() if key != "type"),
        "Method": f"{settings.label}, placement {made.recipe.placement}, {tuning}",
        "Calibrated on": f"{len(settings.images)} {'photos, reduced' if settings.photos else 'images'}, "
        f"from {settings.folder}: {few}",
        "Seed": str(settings.seed),
        "PSNR against the float network's output": f"{likeness:.1f} dB, on calibration images",
        "Versions": ", ".join(f"{name} {number}" for name, number in package_versions().items()),
        "Memory at its peak": size(8 * settings.peak),
        "Model": f"{settings.out}, {size(8 * settings.out.stat().st_size)} (float weights and ranges); "
        f"with packed weights: {packing_command(settings.out)}",
    }
    tables = [score_figures(name, rows) for name, rows in scores.items()]
    title = f"{network.label}, {settings.label}"
    return Page(title, lines, tables, cost_figures(plain, costs), examples, groups, facts, made.seconds)
