"""Trainings that compare methods: the same float network, data, length, seed and optimiser; only the recipe differs.

Every training is a process of its own through the host's pipeline, so that a crash costs one row. What they share and
how schedules are shortened is in :mod:`qsr_plugin.report.comparison_options`.
"""

from __future__ import annotations

import shutil
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsr_plugin.archs.quant_net_arch import QuantNet, build_backbone
from qsr_plugin.checkpoint import load_float_weights, load_quantized
from qsr_plugin.data.calibration_set import calibration_batches
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.depth import slim, trained_depths
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.report.comparison_options import (
    COMMON_PLACEMENT,
    ComparisonError,
    Settings,
    run_name,
    shared_options,
    training_options,
)
from qsr_plugin.report.complexity import complexity
from qsr_plugin.report.evaluate import evaluate
from qsr_plugin.report.result_io import ResultError, read_table, write_results
from qsr_plugin.report.result_schema import (
    FLOAT,
    Costs,
    Quality,
    Result,
    ResultTable,
    Training,
    of_backbone,
    package_versions,
)
from qsr_plugin.report.shortening import median_span
from qsr_plugin.watched_run import Step, TrainingError, train

_FLOAT_ITERS = 40  # to time the float network
_FLOAT_LINES = 8  # of its log, at least
_RANGES = "percentile"  # recipe that tells how wide ranges are: quantiles of 1 and 99 %

Watch = Callable[[Step], None]
Scores = dict[str, Quality]


def time_float(settings: Settings, folder: Path) -> float:
    """Seconds per iteration of the float network, trained by the host's own model on the same batches.

    Args:
        settings: What is shared.
        folder: Where to train.
    """
    options = shared_options(settings)
    options.update(name="float", model_type="SRModel", network_g=options["network_g"]["backbone"])
    options["path"] = {"pretrain_network_g": None, "resume_state": None}
    iters = min(settings.iters, _FLOAT_ITERS)
    options["train"]["total_iter"] = iters
    options["logger"]["print_freq"] = max(1, min(options["logger"]["print_freq"], iters // _FLOAT_LINES))
    return _timed(options, folder, lambda step: None)[1]


def _timed(options: dict[str, Any], folder: Path, watch: Watch) -> tuple[Path, float]:
    """Train; the network, and the median over the log's lines of the time an iteration took since the line before.

    The first line only starts the clock: the first iterations are several times slower. The host's own figures cannot
    be used, they are means since the start.

    Raises:
        TrainingError: If the training fails, or logs fewer than two iterations.
    """
    told: list[tuple[int, float]] = []

    def listen(step: Step) -> None:
        if step.iteration is not None:
            told.append((step.iteration, time.perf_counter()))
        watch(step)

    path = train(options, folder, listen)
    seconds = [(end - start) / (last - first) for (first, start), (last, end) in pairwise(told)]
    if not seconds:
        reason = f"logged {len(told)} iteration(s), too few to tell how long one takes"
        raise TrainingError(f"{folder / 'train.log'}: {reason}; train longer, or set a smaller print_freq", reason)
    return path, statistics.median(seconds)


def float_row(settings: Settings, device: torch.device) -> Result:
    """Scores and cost of the float network."""
    options = shared_options(settings)
    net = build_backbone(options["network_g"]["backbone"])
    load_float_weights(net, settings.weights)
    costs = complexity(net)
    scores = _scores(net.to(device), settings, options["scale"])
    return Result(label=FLOAT, quality=scores, costs=Costs.of(costs, sites=False), **_shared(settings, options))


def _shared(settings: Settings, options: Mapping[str, Any]) -> dict[str, Any]:
    """What all rows have in common, as keywords of a result."""
    told = {"network": Path(settings.backbone).stem, "weights": str(settings.weights), "seed": settings.seed}
    return {**told, **of_backbone(options["network_g"]["backbone"]), "versions": package_versions()}


def reference(settings: Settings, out: Path, device: torch.device) -> tuple[list[Result], float]:
    """Row and span of the float network, see :func:`float_span`; made once in a comparison, then kept in ``results``.

    Args:
        settings: What is shared.
        out: Folder of the comparison.
        device: Where the network runs.

    Raises:
        ComparisonError: If ``out`` holds a comparison with other settings.
    """
    path = out / "results" / "float.json"
    rows = kept_rows(settings.to_dict(), path)
    span = None if rows is None else read_table(path).details.get("span")
    if span is None:
        rows, span = [float_row(settings, device)], float_span(settings, device)
        save_rows(rows, settings.to_dict(), path, span=span)
    return rows, span


def float_span(settings: Settings, device: torch.device) -> float:
    """Median width of the ranges that the float network's activations have; what ranges of all methods are held to.

    Measured at one set of places with one observer, whatever the methods do, so that all get the same reach.
    """
    options = shared_options(settings)
    recipe = load_recipe(_RANGES, placement=COMMON_PLACEMENT)
    net = QuantNet(options["network_g"]["backbone"], recipe)
    load_float_weights(net, settings.weights)
    return median_span(net.to(device), _calibration_images(options, net))


def run_method(
    settings: Settings, method: str, bits: str, span: float, out: Path, device: torch.device, watch: Watch
) -> list[Result]:
    """Calibrate, score, train and score again.

    The float network is timed right before the training, because a busy machine does not stay as busy.

    Args:
        settings: What is shared.
        method: Shipped recipe, or a recipe file.
        bits: Like ``W4A4``.
        span: See :func:`float_span`.
        out: Folder of the comparison: the training runs in ``runs``, the network is kept in ``models``.
        device: Where the networks are scored.
        watch: See :func:`qsr_plugin.watched_run.train`.

    Returns:
        One row per depth, the whole network first; they are kept in ``results``. If anything fails, one row that says
        why, which is not kept.
    """
    name, slug = f"{Path(method).stem} {bits}", run_name(method, bits)
    row = Result(label=name, method=Path(method).stem, bits=bits, training=Training(iterations=settings.iters))
    try:
        options = training_options(settings, method, bits, span)
        recipe = options["network_g"]["recipe"]
        known = {"placement": recipe["placement"], "recipe": recipe, **_shared(settings, options)}
        row = _with(row, **known)
        start = _calibrated(options, settings.weights)
        before = [(label, _scores(one, settings, options["scale"])) for label, one in _depths(start.to(device))]
        plain = time_float(settings, out / "runs" / "float")
        row = _with(row, training=Training(iterations=settings.iters, float_seconds=plain))
        path, seconds = _timed(options, out / "runs" / slug, watch)
        row = _with(row, training=Training(iterations=settings.iters, float_seconds=plain, seconds=seconds))
        kept = out / "models" / f"{slug}.safetensors"
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, kept)
        rows, net = [], load_quantized(kept).to(device)
        for (label, one), (_, scores) in zip(_depths(net), before):
            after, costs = _scores(one, settings, options["scale"]), complexity(one)
            figures = {"before": scores, "quality": after, "costs": Costs.of(costs, sites=False)}
            rows.append(_with(row, label=name + label, model=str(kept), **figures))
        save_rows(rows, _origin(settings, options), result_path(out, method, bits))
        return rows
    except TrainingError as error:
        return [_with(row, note=error.reason)]
    except Exception as error:  # whatever it is, the other methods go on and the table says it
        return [_with(row, note=f"{type(error).__name__}: {error}")]


def _with(row: Result, **changes: Any) -> Result:
    return row.model_copy(update=changes)


def _calibrated(options: dict[str, Any], weights: Path) -> nn.Module:
    """The network as the training starts with it: the same draw of calibration images."""
    net = QuantNet(options["network_g"]["backbone"], options["network_g"]["recipe"])
    load_float_weights(net, weights)
    return calibrate(net, _calibration_images(options, net)).eval()


def _calibration_images(options: dict[str, Any], net: nn.Module) -> Iterator[Tensor]:
    data = dict(options["datasets"]["train"], phase="train", scale=options["scale"])
    return calibration_batches({"datasets": {"train": data}}, net.recipe.calibration)


def _depths(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The whole network, then it at every smaller depth it is trained for, with what to add to its label."""
    yield "", net
    for blocks in trained_depths(net)[1:]:
        yield f", {blocks} blocks", slim(net, blocks)


def _scores(net: nn.Module, settings: Settings, scale: int) -> Scores:
    results = {name: evaluate(net, *folders, scale) for name, folders in settings.tests.items()}
    return {name: Quality.of(result, by_image=False) for name, result in results.items()}


# -- what earlier calls left ------------------------------------------------------------------------------------------


def result_path(out: Path, method: str, bits: str) -> Path:
    """Where the rows of one finished training are kept."""
    return out / "results" / f"{run_name(method, bits)}.json"


def save_rows(rows: list[Result], origin: Mapping[str, Any], path: Path, **more: Any) -> None:
    """Keep rows with what they were made from, and more that belongs to them."""
    write_results(ResultTable(rows=tuple(rows), settings=dict(origin), details=more), path)


def kept_method(settings: Settings, method: str, bits: str, span: float, out: Path) -> list[Result] | None:
    """Rows of a training of an earlier call, or ``None``; arguments as for :func:`run_method`.

    Raises:
        ComparisonError: If the settings, or the recipe as it resolves now, are not those of that training.
    """
    path = result_path(out, method, bits)
    if not path.is_file():
        return None
    return kept_rows(_origin(settings, training_options(settings, method, bits, span)), path)


def kept_rows(origin: Mapping[str, Any], path: Path) -> list[Result] | None:
    """Rows of an earlier call, or ``None``.

    Args:
        origin: Settings as plain data; of a method also its ``recipe``, as it was resolved.
        path: Where they would be.

    Raises:
        ComparisonError: If they were made from anything else, or the file holds no results.
    """
    if not path.is_file():
        return None
    try:
        table = read_table(path)
    except ResultError as error:
        raise ComparisonError(f"{error}. Give another folder with -o, or remove the file.") from None
    if changed := list(_differences(table.settings, dict(origin))):
        raise ComparisonError(
            f"{path} was made with other settings ({'; '.join(changed)}). Give those, or another folder with -o."
        )
    return list(table.rows)


def _origin(settings: Settings, options: dict[str, Any]) -> dict[str, Any]:
    return {**settings.to_dict(), "recipe": options["network_g"]["recipe"]}


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """What differs in plain data, by dotted name."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new)):
            yield from _differences(*pair, f"{name}[{index}]")
    elif old != new:
        yield f"{name}: {textwrap.shorten(str(old), 80)}, now {textwrap.shorten(str(new), 80)}"
