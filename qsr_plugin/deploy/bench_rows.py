"""Rows of ``qsr bench``: as tables for the terminal and for a README, and in the form of all results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from torch import nn

from qsr_plugin.deploy.bench_machine import engine_versions
from qsr_plugin.deploy.bench_names import INT8, INT8_TAIL, PASSES, QUANTIZED, REFERENCE, TORCH, VARIANTS
from qsr_plugin.deploy.bench_timing import Speed, clock_for
from qsr_plugin.report.result_schema import FLOAT, Quality, Result, described, of_backbone, package_versions
from qsr_plugin.report.tables import size as in_bytes

Size = tuple[int, int]

#: What a quantized network's speed is told beside.
_BESIDE = (REFERENCE, PASSES, TORCH)


@dataclass
class Row:
    """What was measured of one variant.

    Attributes:
        name: Key of :data:`~qsr_plugin.deploy.bench_names.VARIANTS`.
        speeds: By the size of the image.
        memory: The same: bytes at the peak, beyond those before the engine was opened.
        quality: Scores by test set.
        file_bytes: Size of its file; 0 if there is none.
        steps: What was done to the network on the way.
        note: Why figures are missing.
    """

    name: str
    speeds: dict[Size, Speed] = field(default_factory=dict)
    memory: dict[Size, int] = field(default_factory=dict)
    quality: dict[str, Quality] = field(default_factory=dict)
    file_bytes: int = 0
    steps: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Protocol:
    """How it was measured.

    Attributes:
        sizes: Height and width of the low-resolution images.
        threads: CPU threads of every engine.
        rounds: How often every variant was paired with the reference.
        seconds: Least time of one measurement, of four in a pair.
    """

    sizes: tuple[Size, ...]
    threads: int = 1
    rounds: int = 5
    seconds: float = 0.5

    def __str__(self) -> str:
        return (
            f"Speed: times as fast as {REFERENCE}, median of {self.rounds} round(s) [least, most], each an ABBA pair "
            f"of measurements of {self.seconds:g} s or more, in one process; {clock_for(self.threads)[1]}, "
            f"{threads_text(self.threads)}"
        )


def threads_text(number: int) -> str:
    """``1 thread``."""
    return f"{number} thread{'s' if number > 1 else ''}"


def speed_text(speed: Speed) -> str:
    """``1.56 [1.47, 1.63]``; without range where there is none."""
    spread = f" [{speed.least:.2f}, {speed.most:.2f}]" if len(speed.ratios) > 1 else ""
    return f"{speed.faster:.2f}{spread}"


def to_table(rows: Sequence[Row], size: Size, title: str) -> Table:
    """Rows of one size for the terminal; those without figures are dim."""
    tests = list(dict.fromkeys(test for row in rows for test in row.quality))
    with_memory = any(row.memory for row in rows)
    plain = next((row.speeds[size].faster for row in rows if row.name == TORCH and size in row.speeds), None)
    with_torch = plain is not None
    table = Table(title=Text(f"{title}, {size[0]}x{size[1]}"), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("Variant", no_wrap=True)
    headings = [f"Speed against\n{REFERENCE}", *[f"against\n{TORCH}"] * with_torch, "\nms", "\nFile"]
    for heading in (*headings, *["\nMemory"] * with_memory, *(f"PSNR\n{test}" for test in tests)):
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for row in rows:
        speed, memory = row.speeds.get(size), row.memory.get(size)
        if speed is None:
            table.add_row(row.name, "-", style="dim")
            continue
        beside = [f"{speed.faster / plain:.2f}"] if with_torch else []
        held = ["" if memory is None else in_bytes(8 * memory)] * with_memory
        scores = [f"{row.quality[test].psnr:.2f}" if test in row.quality else "" for test in tests]
        figures = Text(speed_text(speed)), *beside, _in_ms(speed.seconds), in_bytes(8 * row.file_bytes)
        table.add_row(row.name, *figures, *held, *scores)
    return table


def _in_ms(seconds: float) -> str:
    """Milliseconds with three figures or more."""
    time = 1000 * seconds
    return f"{time:.{2 if time < 10 else 1 if time < 100 else 0}f}"


def answers(rows: Sequence[Row], sizes: Sequence[Size]) -> list[str]:
    """Is it faster, and as good: a line for each size and quantized network in OpenVINO.

    Args:
        rows: Those without speeds are left out.
        sizes: Height and width.
    """
    by_name = {row.name: row for row in rows}
    lines = []
    for size in sizes:
        for name in (INT8, INT8_TAIL):
            if name not in by_name or size not in by_name[name].speeds:
                continue
            row, others = by_name[name], [by_name[one] for one in _BESIDE if one in by_name]
            own = row.speeds[size].faster
            against = [f"{own / one.speeds[size].faster:.2f} x {one.name}" for one in others if size in one.speeds]
            plain = next((one.quality for one in rows if one.name not in QUANTIZED and one.quality), {})
            losses = [
                f"{test} {quality.psnr - plain[test].psnr:+.2f} dB"
                for test, quality in row.quality.items()
                if test in plain
            ]
            lines.append(f"{name} at {size[0]}x{size[1]}: {'; '.join([', '.join(against), *losses])}")
    return lines


def legend(rows: Sequence[Row], protocol: Protocol) -> list[str]:
    """What the figures and the names of the rows mean, and why figures are missing."""
    memory = " Memory: peak of a process of its own, beyond Python and PyTorch."
    return [
        f"{protocol}. Against {TORCH}: quotient of two such medians. ms: median time of one image. MB: 10^6 bytes."
        f"{memory if any(row.memory for row in rows) else ''}",
        *(f"  {row.name}: {row.note or VARIANTS[row.name]}" for row in rows),
    ]


def result_of(row: Row, net: nn.Module, model: str, weights: str = "") -> Result:
    """A row in the form of all results: the times are its details.

    Args:
        row: What was measured.
        net: The quantized network.
        model: Its file.
        weights: The float checkpoint, if one was given.
    """
    told = {**described(net.recipe), "model": model} if row.name in QUANTIZED else {"method": FLOAT}
    sizes = [
        {"size": list(size), **speed.to_dict(), "peak_memory": row.memory.get(size)}
        for size, speed in row.speeds.items()
    ]
    about = {"variant": VARIANTS[row.name], "file_bytes": row.file_bytes, "steps": list(row.steps), "sizes": sizes}
    return Result(
        **{**told, **of_backbone(net.backbone_options), "label": row.name, "weights": weights},
        quality=row.quality,
        seconds={f"{height}x{width}": speed.seconds for (height, width), speed in row.speeds.items()},
        versions={**package_versions(), **engine_versions()},
        note=row.note,
        details=about,
    )
