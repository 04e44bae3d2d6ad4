"""What a quantized training step costs beside the float one: time in ABBA groups, and peak memory.

Both steps are the real ones, ``optimize_parameters`` of ``QuantSRModel`` and of the host's ``SRModel``, on one batch of
random pixels that stays on the device; reading data is not part of it.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from basicsr.models.sr_model import SRModel

from qsr_plugin.archs.quant_net_arch import QuantNet, build_backbone
from qsr_plugin.checkpoint import save_quantized, save_torch
from qsr_plugin.memory import keep_freed_memory, peak_memory
from qsr_plugin.models.quant_sr_model import QuantSRModel
from qsr_plugin.options_file import scale_of
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.recipe import load_recipe

_WARM_UP = 3  # steps before anything is timed
_MEMORY_STEPS = 3


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        backbone: Options of the float network.
        batch: Images per batch.
        lq_size: Side of the low-resolution crops.
        groups: ABBA groups that are counted.
        threads: CPU threads.
        compiled: Both networks through ``torch.compile``.
    """

    backbone: Mapping[str, Any]
    batch: int = 4
    lq_size: int = 48
    groups: int = 15
    threads: int = 1
    compiled: bool = False


@dataclass(frozen=True)
class Case:
    """One stage of a recipe.

    Attributes:
        label: Method, bits, and what is special about the stage.
        recipe: The recipe as plain data, with this stage alone.
    """

    label: str
    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class Times:
    """Times of steps, in the order they were taken.

    Attributes:
        ratios: Quantized step / float step, one per ABBA group.
        quantized: Mean seconds of the two quantized steps of each group.
        plain: Mean seconds of the two float steps.
    """

    ratios: tuple[float, ...]
    quantized: tuple[float, ...]
    plain: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the medians."""
        return {**asdict(self), **{f"median_{key}": statistics.median(value) for key, value in asdict(self).items()}}


def cases(source: str, weight_bits: int, act_bits: int, *, with_losses: bool = False) -> list[Case]:
    """The kinds of steps in a recipe: the last of its stages, gated ones, several depths on a batch.

    A stage with several depths is also given with the full depth alone. Stages that only follow ranges are left out.

    Args:
        source: Shipped recipe, or a recipe file.
        weight_bits: Bits of weights.
        act_bits: Bits of activations.
        with_losses: With the losses of the recipe and their teacher; else the pixel loss alone, which shows the
            quantizers' cost. A recipe with cooperative weighting keeps its losses: without them it is another method.
    """
    recipe = load_recipe(source, weight_bits=weight_bits, act_bits=act_bits)
    if not with_losses and recipe.cooperative is None:
        recipe = load_recipe(recipe, losses=[])
    stages = {}
    for stage in recipe.stages:
        if stage.track_ranges is None or stage == recipe.stages[-1]:
            if stage.depths != (1.0,):
                stages[stage.gated, (1.0,)] = stage.model_copy(update={"depths": (1.0,)})
            stages[stage.gated, stage.depths] = stage
    name = f"{Path(source).stem} W{weight_bits}A{act_bits}{' + losses' if with_losses else ''}"
    found = []
    for (gated, depths), stage in stages.items():
        alone = load_recipe(recipe, stages=[{**stage.model_dump(mode="json", exclude_none=True, exclude={"iters"})}])
        special = [text for text, here in (("gated", gated), (f"{len(depths)} depths", len(depths) > 1)) if here]
        found.append(Case(f"{name}{', ' + ', '.join(special) if special else ''}", alone.to_dict()))
    return found


def measure_times(work: Workload, case: Case) -> Times:
    """Time a quantized and the float step in turn: quantized, float, float, quantized, and so on.

    Args:
        work: What is trained.
        case: The quantized step.
    """
    _prepare(work)
    return time_in_groups(training_step(work, case), training_step(work, None), work.groups)


def time_in_groups(quantized: Callable[[], None], plain: Callable[[], None], groups: int) -> Times:
    """Time two steps in ABBA groups, after a few that are not counted.

    Args:
        quantized: The step in question.
        plain: The one it is compared with.
        groups: How many groups are counted.
    """
    for _ in range(_WARM_UP):
        quantized(), plain()
    ratios, times = [], ([], [])
    for _ in range(groups):
        first, second, third, fourth = (_timed(step) for step in (quantized, plain, plain, quantized))
        ratios.append((first + fourth) / (second + third))
        times[0].append((first + fourth) / 2)
        times[1].append((second + third) / 2)
    return Times(tuple(ratios), tuple(times[0]), tuple(times[1]))


def measure_memory(work: Workload, case: Case | None) -> int:
    """Bytes a training takes at its peak, beyond those of the process before it. Call it in a process of its own.

    On a GPU: the peak of the tensors allocated. On a CPU: the peak of resident memory, which also holds what the
    libraries keep for themselves.

    Args:
        work: What is trained.
        case: The quantized step; ``None`` for the float one.
    """
    _prepare(work)
    before = peak_memory()
    step = training_step(work, case)
    for _ in range(_MEMORY_STEPS):
        step()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory() - before


def training_step(work: Workload, case: Case | None) -> Callable[[], None]:
    """A model of the host with one batch, as a function that trains it for one step.

    Args:
        work: What is trained.
        case: The quantized step; ``None`` for the float one.
    """
    torch.manual_seed(0)
    side, scale = work.lq_size, scale_of(work.backbone)
    lq, gt = torch.rand(work.batch, 3, side, side), torch.rand(work.batch, 3, scale * side, scale * side)
    with tempfile.TemporaryDirectory(prefix="qsr_") as folder, _silence():
        model = _float_model(work) if case is None else _quantized_model(work, case, lq, Path(folder))
    model.feed_data({"lq": lq, "gt": gt})
    if work.compiled:
        model.net_g.compile()
    count = iter(range(1, 2**31))
    return lambda: model.optimize_parameters(next(count))


# -- parts ------------------------------------------------------------------------------------------------------------


@contextmanager
def _silence() -> Iterator[None]:
    """No lines about every model that is built."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _float_model(work: Workload) -> SRModel:
    return SRModel(_options(work, dict(work.backbone), {}))


def _quantized_model(work: Workload, case: Case, lq: torch.Tensor, folder: Path) -> QuantSRModel:
    """Random float weights, which are also the teacher's, calibrated on the batch."""
    weights, start = folder / "float.pth", folder / "start.safetensors"
    save_torch(build_backbone(work.backbone).state_dict(), weights)
    network = {"type": "QuantNet", "backbone": dict(work.backbone), "recipe": dict(case.recipe)}
    net = QuantNet(network["backbone"], network["recipe"])
    save_quantized(calibrate(net, [lq]), start)
    return QuantSRModel(
        _options(work, network, {"pretrain_network_g": str(start), "pretrain_network_float": str(weights)})
    )


def _options(work: Workload, network: dict[str, Any], path: dict[str, Any]) -> dict[str, Any]:
    pixel = {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"}
    scheduler = {"type": "MultiStepLR", "milestones": [2**31], "gamma": 0.5}
    training = {"ema_decay": 0, "optim_g": {"type": "Adam", "lr": 1e-5}, "scheduler": scheduler, "pixel_opt": pixel}
    return {
        "name": "step", "scale": scale_of(work.backbone), "num_gpu": min(torch.cuda.device_count(), 1), "dist": False,
        "rank": 0, "world_size": 1, "is_train": True, "manual_seed": 0, "network_g": network, "path": path,
        "train": {**training, "total_iter": 2**31}, "logger": {"print_freq": 2**31},
    }  # fmt: skip


def _prepare(work: Workload) -> None:
    torch.set_num_threads(work.threads)
    keep_freed_memory()  # as the training entry does


def _timed(step: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
