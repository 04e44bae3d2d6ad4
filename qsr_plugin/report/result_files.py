"""Networks of result files as points of a plot: quality over cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsr_plugin.errors import suggest
from qsr_plugin.report.paper_columns import Way, same_bits
from qsr_plugin.report.result_io import ResultError, read_results
from qsr_plugin.report.result_schema import FLOAT, Result

#: Figures a point may have beside its PSNR: the key in the costs.
FIGURES = ("fab", "bitops", "storage_bits")
#: Why a network with costs may have no BitOPs on a set.
_OTHER_BITS = ". Its costs were counted with other bits: choose their test set, or test on this one with 'qsr report'"
_LONG = 3  # networks in a series from which on their labels are shortened


@dataclass(frozen=True)
class Point:
    """Scores and costs of one network on one test set.

    Attributes:
        file: Where it was read.
        label: What to call the network.
        family: What networks have in common that differ in a setting only; the label but for its last word.
        test: Name of the test set.
        figures: ``psnr`` (dB), and of :data:`FIGURES` what the file has; no BitOPs that were counted with other bits
            than those on the set.
        adaptive: Whether it used more than one bit width.
        way: How the BitOPs were counted; ``None`` without costs.
    """

    file: Path
    label: str
    family: str
    test: str
    figures: Mapping[str, float]
    adaptive: bool
    way: Way | None


def read_points(path: Path) -> list[Point]:
    """All networks on all test sets of one file; rows without scores are left out.

    A file with several float networks, or several placements, has them in its labels.

    Raises:
        ResultError: If :func:`~qsr_plugin.report.result_io.read_results` cannot use the file, or it has no score.
    """
    results = [result for result in read_results(path) if result.scores]
    points = [point for result, label in zip(results, _labels(results)) for point in _points(path, result, label)]
    if not points:
        raise ResultError(f"{path} holds no scores on a test set: run the command with --test HR_FOLDER LR_FOLDER")
    return points


def _labels(results: Sequence[Result]) -> Iterator[str]:
    """Labels with what else tells the networks of one file apart, before the bits, which are their last word."""
    quantized = [result for result in results if result.method != FLOAT]
    several = [name for name in ("network", "placement") if len({getattr(one, name) for one in quantized}) > 1]
    often = Counter(result.label for result in quantized)
    for result in results:
        apart = [getattr(result, name) for name in several] if often[result.label] > 1 else []
        yield " ".join(filter(None, [*apart, result.label]))


def _points(path: Path, result: Result, label: str) -> Iterator[Point]:
    for test, quality in result.scores.items():
        costs = {} if result.costs is None else {name: getattr(result.costs, name) for name in FIGURES}
        if costs and not same_bits(quality, result.costs):
            costs["bitops"] = None
        own = {"psnr": quality.psnr, "fab": quality.fab, "bitops": quality.bitops}  # those on this set go first
        figures = {name: value for part in (costs, own) for name, value in part.items() if value is not None}
        for name, value in figures.items():
            if not math.isfinite(value):
                raise ResultError(f"{path}: {name} of {label} is {value}, expected a finite number")
        mixed = quality.bits is not None and quality.bits.varies
        adaptive = result.method != FLOAT and (mixed or not float(figures.get("fab", 0)).is_integer())
        way = None if result.costs is None else Way.of(result.costs)
        yield Point(path, label, label.rpartition(" ")[0] or label, test, figures, adaptive, way)


# -- choosing what to draw --------------------------------------------------------------------------------------------


def choose_set(points: Sequence[Point], wanted: str | None = None) -> list[Point]:
    """The points on one test set.

    Args:
        points: Of all files.
        wanted: Name of the set; by default the first that all files have.

    Raises:
        ResultError: If there is no such set, or none that all files have; the message says what there is.
    """
    by_file: dict[Path, list[str]] = {}
    for point in points:
        by_file.setdefault(point.file, []).append(point.test)
    first = next(iter(by_file.values()))
    if wanted is None:
        wanted = next((test for test in first if all(test in tests for tests in by_file.values())), None)
        if wanted is None:
            have = "; ".join(f"{path}: {', '.join(dict.fromkeys(tests))}" for path, tests in by_file.items())
            raise ResultError(f"no test set is in all files; choose one with --set. They have: {have}")
    known = dict.fromkeys(point.test for point in points)
    if wanted not in known:
        raise ResultError(f"no result on '{wanted}'. {suggest(wanted, known)}")
    return [point for point in points if point.test == wanted]


def rename(points: Sequence[Point], label: str) -> list[Point]:
    """Points of one file under a label of the user's: as it is for one network, before the own label for several."""
    own = dict.fromkeys(point.label for point in points if point.label != FLOAT)
    renamed = []
    for point in points:
        text = label if len(own) == 1 else f"{label} {point.label}"
        family = text.rpartition(" ")[0] or text
        renamed.append(point if point.label == FLOAT else replace(point, label=text, family=family))
    return renamed


def rows_of(points: Sequence[Point], x: str) -> list[dict[str, Any]]:
    """Rows for :func:`qsr_plugin.report.plots.tradeoff_plot`; networks of one family become a series.

    A label that several files have gets the file's name behind it. In a series of three or more only the network with
    the highest ``x`` has its full label, the others the last word of theirs. Equal float networks become one line.

    Args:
        points: On one test set.
        x: One of :data:`FIGURES`.

    Raises:
        ResultError: If a network has no ``x``, or BitOPs were counted in several ways.
    """
    networks = [point for point in points if point.label != FLOAT]
    for point in networks:
        if x not in point.figures:
            has = f"{point.label} has no '{x}' on '{point.test}'; it has {', '.join(point.figures)}"
            raise ResultError(f"{point.file}: {has}{_OTHER_BITS if x == 'bitops' and point.way else ''}")
    ways = {point.way: point.file for point in networks}
    if x == "bitops" and len(ways) > 1:
        found = "; ".join(f"{path}: {way or 'not told'}" for way, path in ways.items())
        raise ResultError(f"BitOPs that are counted in different ways cannot share an axis. {found}")
    often = Counter(point.label for point in networks)
    named = [
        replace(p, label=f"{p.label} ({p.file.stem})", family=p.label) if often[p.label] > 1 else p for p in networks
    ]
    rows = []
    for point in named:
        series = [other for other in named if other.family == point.family]
        full = len(series) < _LONG or point is max(series, key=lambda other: other.figures[x])
        label = point.label if full else point.label.removeprefix(point.family).strip()
        joined = {"method": point.family, "series": point.family if len(series) > 1 else ""}
        rows.append({"label": label, **joined, "adaptive": point.adaptive, **point.figures})
    levels = {round(point.figures["psnr"], 2): point for point in points if point.label == FLOAT}
    return [*rows, *({"label": FLOAT, "method": FLOAT, "psnr": p.figures["psnr"]} for p in levels.values())]
