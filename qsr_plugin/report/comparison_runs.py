"""Trainings that compare methods: the same float network, data, length, seed and optimiser; only the recipe differs.

Every training is a process of its own through the host's pipeline, so that a crash costs one row. What they share and
how schedules are shortened is in :mod:`qsr_plugin.report.comparison_options`.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsr_plugin.archs.quant_net_arch import QuantNet, build_backbone
from qsr_plugin.checkpoint import load_float_weights, load_quantized
from qsr_plugin.data.calibration_set import calibration_batches
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.depth import slim, trained_depths
from qsr_plugin.report.comparison import Row
from qsr_plugin.report.comparison_options import ComparisonError, Settings, run_name, shared_options, training_options
from qsr_plugin.report.complexity import complexity
from qsr_plugin.report.evaluate import evaluate
from qsr_plugin.report.tables import write_json
from qsr_plugin.watched_run import Step, TrainingError, train

_FLOAT_ITERS = 40  # to time the float network

Watch = Callable[[Step], None]
Scores = dict[str, dict[str, float]]


def time_float(settings: Settings, folder: Path) -> float:
    """Seconds per iteration of the float network, trained by the host's own model on the same batches.

    Args:
        settings: What is shared.
        folder: Where to train.
    """
    options = shared_options(settings)
    options.update(name="float", model_type="SRModel", network_g=options["network_g"]["backbone"])
    options["path"] = {"pretrain_network_g": None, "resume_state": None}
    options["train"]["total_iter"] = min(settings.iters, _FLOAT_ITERS)
    return _timed(options, folder, lambda step: None)[1]


def _timed(options: dict[str, Any], folder: Path, watch: Watch) -> tuple[Path, float]:
    """Train; the network, and the median of the times that the log tells."""
    seconds: list[float] = []

    def listen(step: Step) -> None:
        if step.seconds is not None:
            seconds.append(step.seconds)
        watch(step)

    path = train(options, folder, listen)
    return path, statistics.median(seconds)


def float_row(settings: Settings, device: torch.device) -> Row:
    """Scores and cost of the float network."""
    options = shared_options(settings)
    net = build_backbone(options["network_g"]["backbone"])
    load_float_weights(net, settings.weights)
    costs = complexity(net)
    return Row(
        "float", "float", "float", end=_scores(net.to(device), settings, options["scale"]), fab=costs.fab,
        bitops=costs.bitops, storage_bits=costs.storage_bits,
    )  # fmt: skip


def run_method(settings: Settings, method: str, bits: str, out: Path, device: torch.device, watch: Watch) -> list[Row]:
    """Calibrate, score, train and score again.

    The float network is timed right before the training, because a busy machine does not stay as busy.

    Args:
        settings: What is shared.
        method: Shipped recipe, or a recipe file.
        bits: Like ``W4A4``.
        out: Folder of the comparison: the training runs in ``runs``, the network is kept in ``models``.
        device: Where the networks are scored.
        watch: See :func:`qsr_plugin.watched_run.train`.

    Returns:
        One row per depth, the whole network first. If anything fails, one row that says why.
    """
    name, slug = f"{Path(method).stem} {bits}", run_name(method, bits)
    row = Row(name, Path(method).stem, bits, iterations=settings.iters)
    try:
        options = training_options(settings, method, bits)
        row = replace(row, placement=options["network_g"]["recipe"]["placement"])
        start = _calibrated(options, settings.weights)
        before = [(label, _scores(one, settings, options["scale"])) for label, one in _depths(start.to(device))]
        row = replace(row, float_seconds=time_float(settings, out / "runs" / "float"))
        path, seconds = _timed(options, out / "runs" / slug, watch)
        kept = out / "models" / f"{slug}.safetensors"
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, kept)
        rows, net = [], load_quantized(kept).to(device)
        for (label, one), (_, scores) in zip(_depths(net), before):
            after, costs = _scores(one, settings, options["scale"]), complexity(one)
            figures = {"fab": costs.fab, "bitops": costs.bitops, "storage_bits": costs.storage_bits}
            rows.append(replace(row, label=name + label, start=scores, end=after, seconds=seconds, **figures))
        return rows
    except TrainingError as error:
        return [replace(row, note=error.reason)]
    except Exception as error:  # whatever it is, the other methods go on and the table says it
        return [replace(row, note=f"{type(error).__name__}: {error}")]


def _calibrated(options: dict[str, Any], weights: Path) -> nn.Module:
    """The network as the training starts with it: the same draw of calibration images."""
    net = QuantNet(options["network_g"]["backbone"], options["network_g"]["recipe"])
    load_float_weights(net, weights)
    data = dict(options["datasets"]["train"], phase="train", scale=options["scale"])
    return calibrate(net, calibration_batches({"datasets": {"train": data}}, net.recipe.calibration)).eval()


def _depths(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The whole network, then it at every smaller depth it is trained for, with what to add to its label."""
    yield "", net
    for blocks in trained_depths(net)[1:]:
        yield f", {blocks} blocks", slim(net, blocks)


def _scores(net: nn.Module, settings: Settings, scale: int) -> Scores:
    results = {name: evaluate(net, *folders, scale) for name, folders in settings.tests.items()}
    return {name: {"psnr": result.psnr, "ssim": result.ssim} for name, result in results.items()}


def result_path(out: Path, method: str, bits: str) -> Path:
    """Where the rows of one finished training are kept."""
    return out / "results" / f"{run_name(method, bits)}.json"


def save_rows(rows: list[Row], settings: Settings, path: Path) -> None:
    """Keep rows with the settings they were made with."""
    write_json({"settings": settings.to_dict(), "rows": [row.to_dict() for row in rows]}, path)


def kept_rows(settings: Settings, path: Path) -> list[Row] | None:
    """Rows of an earlier call, or ``None``.

    Raises:
        ComparisonError: If they were made with other settings.
    """
    if not path.is_file():
        return None
    data, own = json.loads(path.read_text("utf-8")), settings.to_dict()
    changed = [
        f"{key}: {data['settings'].get(key)}, now {own[key]}" for key in own if data["settings"].get(key) != own[key]
    ]
    if changed:
        raise ComparisonError(
            f"{path} was made with other settings ({'; '.join(changed)}). Give those, or another folder with -o."
        )
    return [Row(**row) for row in data["rows"]]
