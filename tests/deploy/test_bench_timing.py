"""Times of ``qsr bench``: the order of its measurements, what it makes of them, and their tables."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from qsr_plugin.deploy import bench as work
from qsr_plugin.deploy.bench_names import REFERENCE
from qsr_plugin.deploy.bench_rows import Protocol, Row, answers, legend, speed_text, to_table
from qsr_plugin.deploy.bench_timing import Pair, Speed, clock_for, measure_round, timed
from qsr_plugin.deploy.engine import Engine
from tests.deploy.engines import nearest_engine


class Clock:
    """Time passes only in what is run."""

    def __init__(self) -> None:
        self.now, self.ran = 0.0, ""

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """A function that takes these times in turn."""
        times = iter(seconds * 100)

        def run() -> None:
            self.ran += name
            self.now += next(times)

        return run


def test_rounds_are_abba_and_baab() -> None:
    """A drift that is the same in each step leaves no trace: the outer two cost what the inner two cost."""
    clock = Clock()
    reference, own = clock.work("A", 4.0), clock.work("B", 2.0)
    pairs = [measure_round(number, reference, own, 0.0, clock) for number in range(3)]
    assert clock.ran == "ABBA" + "BAAB" + "ABBA"
    assert pairs == [Pair(4.0, 2.0)] * 3 and pairs[0].faster == 2.0
    slower = Clock()
    steps = iter(range(100))  # every run takes a second longer than the one before

    def drifting(base: float) -> Callable[[], None]:
        def run() -> None:
            slower.now += base + next(steps)

        return run

    found = [measure_round(number, drifting(10), drifting(10), 0.0, slower) for number in range(2)]
    assert [pair.faster for pair in found] == [1.0, 1.0]


def test_a_measurement_is_repeated_until_it_is_long_enough() -> None:
    clock = Clock()
    assert timed(clock.work("A", 0.2), 0.5, clock) == pytest.approx(0.2) and clock.ran == "AAA"
    clock = Clock()
    assert timed(clock.work("A", 0.9), 0.5, clock) == pytest.approx(0.9) and clock.ran == "A"
    clock = Clock()
    assert timed(clock.work("A", 0.1, 0.3), 0.7, clock) == pytest.approx(0.2)


def test_median_and_range_of_the_rounds() -> None:
    pairs = [Pair(3.0, 1.0), Pair(4.0, 2.0), Pair(10.0, 1.0)]
    speed = Speed.of(pairs)
    assert (speed.seconds, speed.faster, speed.least, speed.most) == (1.0, 3.0, 2.0, 10.0)
    assert speed_text(speed) == "3.00 [2.00, 10.00]"
    reference = Speed.of_reference(pairs)
    assert (reference.seconds, reference.faster, reference.ratios) == (4.0, 1.0, ())
    assert speed_text(reference) == "1.00"


def test_every_variant_is_paired_with_the_reference_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ran = Clock(), []
    monkeypatch.setattr(work, "clock_for", lambda threads: (clock, ""))

    def engine(name: str, seconds: float) -> Engine:
        def watch(x: np.ndarray) -> None:
            ran.append(name)
            clock.now += seconds

        return nearest_engine(watch=watch)

    engines = {"torch": engine("t", 6.0), REFERENCE: engine("A", 3.0), "openvino-int8": engine("q", 1.0)}
    seen: list[str] = []

    def progress(items: list, what: str) -> list:
        seen.append(f"{what}: {len(items)}")
        return items

    speeds = work.measure(engines, (4, 6), Protocol(((4, 6),), rounds=2, seconds=0.0), progress)
    assert {name: speed.faster for name, speed in speeds.items()} == {
        REFERENCE: 1.0,
        "torch": 0.5,
        "openvino-int8": 3.0,
    }
    assert speeds[REFERENCE].seconds == 3.0
    assert "".join(ran) == "ttAAqq" + "AttA" + "AqqA" + "tAAt" + "qAAq"
    assert seen == ["measuring 4x6: 4"]


def test_the_clock() -> None:
    assert clock_for(1)[1] == "CPU time" and clock_for(2)[1] == "wall time"


def test_ratio_to_torch_is_a_quotient_of_medians(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    size = (4, 6)
    rows = [
        Row("torch", {size: Speed(2.0, (0.5, 0.5))}, file_bytes=2_000_000),
        Row(REFERENCE, {size: Speed(1.0)}, file_bytes=1_000_000),
        Row("openvino-int8", {size: Speed(0.25, (3.0, 5.0))}, file_bytes=500_000),
        Row("nncf", note="not installed: pip install nncf"),
    ]
    Console(width=200).print(to_table(rows, size, "net [x]"))
    said = capsys.readouterr().out
    assert "net [x], 4x6" in said and "[least, most]" in legend(rows, Protocol((size,)))[0]
    lines = [re.split(r"\s{2,}", line.strip()) for line in said.splitlines()]
    cells = {line[0]: line[1:] for line in lines if line}
    assert cells["openvino-int8"] == ["4.00 [3.00, 5.00]", "8.00", "250", "500 kB"]
    assert cells[REFERENCE][:3] == ["1.00", "2.00", "1000"] and cells["nncf"][0] == "-"


def test_answers_name_what_is_faster_and_what_is_lost() -> None:
    size, plain, own = (4, 6), {"Set5": SimpleNamespace(psnr=32.0)}, {"Set5": SimpleNamespace(psnr=31.9)}
    rows = [
        Row("torch", {size: Speed(2.0, (0.5,))}, quality=plain),
        Row(REFERENCE, {size: Speed(1.0)}, quality=plain),
        Row("openvino-float-passes", {size: Speed(0.5, (2.0,))}),
        Row("openvino-int8", {size: Speed(0.25, (4.0,))}, quality=own),
        Row("openvino-int8-tail", note="nothing is collapsed"),
    ]
    beside = "4.00 x openvino-float, 2.00 x openvino-float-passes, 8.00 x torch"
    assert answers(rows, [size]) == [f"openvino-int8 at 4x6: {beside}; Set5 -0.10 dB"]
    assert answers(rows[1:2] + rows[3:], [size]) == ["openvino-int8 at 4x6: 4.00 x openvino-float; Set5 -0.10 dB"]


def test_figures_are_whole_on_a_usual_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    size, quality = (540, 960), {"Urban100": SimpleNamespace(psnr=26.123)}
    figures = Speed(0.2345, (4.12, 5.34)), Speed(1.2345, (0.512, 0.634))
    names = ("openvino-int8-no-passes", "torch")
    rows = [Row(name, {size: speed}, quality=quality, file_bytes=1_234_567) for name, speed in zip(names, figures)]
    Console(width=80).print(to_table(rows, size, "EDSR x4, auto W8A8+"))
    said = capsys.readouterr().out
    assert "…" not in said and "4.73 [4.12, 5.34]" in said and "26.12" in said and "1.235 MB" in said
