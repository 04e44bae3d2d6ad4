"""How fast a quantized network really is: float and quantized, in several engines, side by side in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qsr_plugin.deploy.bench_memory import memory_of
from qsr_plugin.deploy.bench_names import REFERENCE, VARIANTS
from qsr_plugin.deploy.bench_rows import Protocol, Row, Size
from qsr_plugin.deploy.bench_timing import Pair, Speed, clock_for, measure_round, warm_up
from qsr_plugin.deploy.bench_variants import Models, Opened
from qsr_plugin.deploy.comparison import synthetic_images
from qsr_plugin.deploy.engine import Engine
from qsr_plugin.deploy.tiles import out_of_memory
from qsr_plugin.deploy.torch_engine import largest_layer
from qsr_plugin.errors import UserError, suggest
from qsr_plugin.memory import free_memory
from qsr_plugin.progress import Progress, no_progress
from qsr_plugin.report.result_schema import Quality

#: Side of the image on which the memory of a network is counted.
_TRIED = 32


def check_variants(names: Sequence[str]) -> list[str]:
    """The variants to measure, in the order of the table; the reference is always one of them.

    Raises:
        UserError: For another name, or the reference alone.
    """
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"no variant '{name}'. {suggest(name, VARIANTS)}")
    wanted = [name for name in VARIANTS if name in (*names, REFERENCE)]
    if wanted == [REFERENCE]:
        raise UserError(f"'{REFERENCE}' alone has nothing to be compared with: name another of {', '.join(VARIANTS)}")
    return wanted


def bench(
    models: Models,
    names: Sequence[str],
    protocol: Protocol,
    *,
    memory: bool = False,
    tests: Mapping[str, tuple[Path, Path]] | None = None,
    progress: Progress = no_progress,
) -> list[Row]:
    """Measure variants of one network.

    Args:
        models: The network.
        names: From :func:`check_variants`.
        protocol: What is measured, and how.
        memory: Also the peak memory of each, in processes of their own.
        tests: Folders (HR, LR) by the name of a test set, to score each on.
        progress: Wraps what is worked through.

    Returns:
        One row for each name. A variant that cannot be made or run has no figures and a note why.

    Raises:
        UserError: If the reference cannot be made, or memory does not suffice.
        ValueError: For test images that do not fit.
    """
    for size in protocol.sizes:
        check_fits(models.float_net, size)
    rows, before = {name: Row(name) for name in names}, torch.get_num_threads()
    torch.set_num_threads(protocol.threads)
    try:
        _fill(rows, models, protocol, memory, tests or {}, progress)
    finally:
        torch.set_num_threads(before)
    return list(rows.values())


def _fill(
    rows: dict[str, Row],
    models: Models,
    protocol: Protocol,
    memory: bool,
    tests: Mapping[str, tuple[Path, Path]],
    progress: Progress,
) -> None:
    """Measure everything that is asked for."""
    opened = _open_all(models, rows, protocol.sizes, progress)
    for size in protocol.sizes:
        engines = {name: found[size].engine for name, found in opened.items()}
        for name, speed in measure(engines, size, protocol, progress).items():
            rows[name].speeds[size] = speed
    for size in protocol.sizes if memory else ():
        image = synthetic_images(1, size).numpy()
        for name in progress(list(opened), f"memory at {size[0]}x{size[1]}"):
            try:
                rows[name].memory[size] = memory_of(opened[name][size].open_run, image)
            except UserError as error:
                rows[name].note = f"memory at {size[0]}x{size[1]} is not known: {error}"
    for test, folders in tests.items():
        for name in progress(list(opened), f"scoring on {test}"):
            try:
                rows[name].quality[test] = score(opened[name][protocol.sizes[-1]].engine, *folders)
            except UserError as error:
                rows[name].note = f"not scored on {test}: {error}"


def measure(engines: Mapping[str, Engine], size: Size, protocol: Protocol, progress: Progress) -> dict[str, Speed]:
    """Time engines at one size, after a warm-up; in each round every one is paired with the reference.

    Raises:
        UserError: If memory runs out.
    """
    image = synthetic_images(1, size).numpy()
    runs = {name: partial(engine, image) for name, engine in engines.items()}
    clock, _ = clock_for(protocol.threads)
    pairs: dict[str, list[Pair]] = {name: [] for name in runs if name != REFERENCE}
    try:
        for run in runs.values():
            warm_up(run)
        steps = [(number, name) for number in range(protocol.rounds) for name in pairs]
        for number, name in progress(steps, f"measuring {size[0]}x{size[1]}"):
            pairs[name].append(measure_round(number, runs[REFERENCE], runs[name], protocol.seconds, clock))
    except Exception as error:  # each engine has kinds of its own
        if not out_of_memory(error):
            raise
        raise UserError(f"out of memory at {size[0]}x{size[1]}: give a smaller --size, or free some") from None
    everything = [pair for own in pairs.values() for pair in own]
    return {REFERENCE: Speed.of_reference(everything), **{name: Speed.of(own) for name, own in pairs.items()}}


def score(engine: Engine, hr: Path, lr: Path) -> Quality:
    """PSNR and SSIM of an engine on a test set, as :func:`qsr_plugin.report.evaluate.evaluate` has them.

    Raises:
        UserError: If an image is larger than an engine of fixed size takes.
        ValueError: For images that do not fit.
    """
    from qsr_plugin.report.evaluate import evaluate

    found = Quality.of(evaluate(_AsModule(engine), hr, lr, engine.scale), by_image=False)
    return found.model_copy(update={"fab": None, "bits": None})


def check_fits(net: nn.Module, size: Size) -> None:
    """Refuse an image for which memory will not suffice, before work is done.

    Raises:
        UserError: With what is needed and free.
    """
    needed = bytes_per_pixel(net) * size[0] * size[1]
    if needed > (free := free_memory(torch.device("cpu"))):
        raise UserError(
            f"--size {size[0]} {size[1]}: one layer of {type(net).__name__} alone needs {needed / 1e9:.1f} GB for its "
            f"input and output, {free / 1e9:.1f} GB are free. Give a smaller size"
        )


def bytes_per_pixel(net: nn.Module) -> float:
    """Bytes for input and output of the largest module without parts, per pixel of the low-resolution image."""
    with largest_layer(net) as layer, torch.inference_mode():
        net(torch.zeros(1, 3, _TRIED, _TRIED))
    return layer[0] / _TRIED**2


def _open_all(
    models: Models, rows: Mapping[str, Row], sizes: Sequence[Size], progress: Progress
) -> dict[str, dict[Size, Opened]]:
    """Every variant that can be made, by size; the rows of the others are told why."""
    opened: dict[str, dict[Size, Opened]] = {}
    for name in progress(list(rows), "exporting"):
        try:
            opened[name] = {size: models.open(name, size) for size in sizes}
        except UserError as error:
            if name == REFERENCE:
                raise
            rows[name].note = str(error)
            continue
        last = opened[name][sizes[-1]]
        rows[name].file_bytes, rows[name].steps = last.file_bytes, last.notes
    return opened


class _AsModule(nn.Module):
    """An engine as a network of PyTorch."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 3, scale H, scale W)."""
        return torch.from_numpy(self.engine(x.numpy()))
