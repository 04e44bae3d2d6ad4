"""Reads what ``qsr quantize``, ``qsr report --json`` and ``tools/compare_methods.py`` wrote, as points of a plot."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsr_plugin.errors import UserError, suggest
from qsr_plugin.report.complexity_types import DEFAULT_SIZE

FLOAT = "float"
#: Figures a point may have beside its PSNR: the key in the files.
FIGURES = ("fab", "bitops", "storage_bits")
_LONG = 3  # networks in a series from which on their labels are shortened
_WAY = ("macs-bits", DEFAULT_SIZE)  # how comparisons count, which do not say it


class ResultError(UserError, ValueError):
    """A result file that cannot be drawn; the message names the file and what is missing."""


@dataclass(frozen=True)
class Point:
    """Scores and costs of one network on one test set.

    Attributes:
        file: Where it was read.
        label: What to call the network.
        family: What networks have in common that differ in a setting only; the label but for its last word.
        test: Name of the test set; empty where the file does not say.
        figures: ``psnr`` (dB), and of :data:`FIGURES` what the file has.
        adaptive: Whether it used more than one bit width.
        way: BitOPs convention and (height, width) they were counted at.
    """

    file: Path
    label: str
    family: str
    test: str
    figures: Mapping[str, float]
    adaptive: bool
    way: tuple[str, tuple[int, int]]


def read_points(path: Path) -> list[Point]:
    """All networks on all test sets of one file; rows of trainings that failed are left out.

    Raises:
        ResultError: If the file is missing, no JSON, of another kind, or lacks a key.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ResultError(f"{path} cannot be read ({error.strerror}): give a JSON file with results") from None
    except ValueError as error:
        raise ResultError(f"{path} is no JSON ({error}): give a file that a command wrote with its results") from None
    readers = {"rows": _of_comparison, "complexity": _of_quantize, "scores": _of_report}
    kind = next((key for key in readers if isinstance(data, Mapping) and key in data), None)
    if kind is None:
        found = f"the keys {', '.join(list(data)[:8])}" if isinstance(data, Mapping) else type(data).__name__
        raise ResultError(
            f"{path}: expected 'rows' (of tools/compare_methods.py), 'complexity' (of qsr quantize) or 'scores' (of "
            f"qsr report --json), found {found}"
        )
    points = list(readers[kind](path, data))
    if not points:
        raise ResultError(f"{path} holds no scores on a test set: run the command with --test HR_FOLDER LR_FOLDER")
    return points


def _of_comparison(path: Path, data: Mapping[str, Any]) -> Iterator[Point]:
    for number, row in enumerate(data["rows"]):
        where = f"rows[{number}]"
        label, scores = _key(path, row, "label", where), _key(path, row, "end", where) or row.get("start")
        for test, score in (scores or {}).items():
            yield _point(path, label, test, score, row, f"{where}.{test}", _WAY)


def _of_quantize(path: Path, data: Mapping[str, Any]) -> Iterator[Point]:
    costs = data["complexity"]
    for label, entry in data.items():
        if label == "complexity" or not isinstance(entry, Mapping):
            continue
        scores = {entry.get("set", ""): entry} if "psnr" in entry else entry  # before, one set had no name
        for test, score in scores.items():
            if isinstance(score, Mapping) and "psnr" in score:
                yield _point(path, label, test, score, {} if label == FLOAT else costs, f"{label}.{test}", _way(costs))


def _of_report(path: Path, data: Mapping[str, Any]) -> Iterator[Point]:
    label = _key(path, data, "method", "the report")
    for test, score in data["scores"].items():
        yield _point(path, label, test, score, data, f"scores.{test}", _way(data))


def _point(
    path: Path, label: str, test: str, score: Mapping[str, Any], costs: Mapping[str, Any], where: str, way: tuple
) -> Point:
    figures = {"psnr": _key(path, score, "psnr", where.rstrip("."))}
    for name in FIGURES:  # those on this set, if the file has them
        value = score.get(name, costs.get(name))
        if value is not None:
            figures[name] = value
    for name, value in figures.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ResultError(f"{path}: {name} of {label} is {value!r}, expected a finite number")
    widths = (score.get("bits") or {}).get("shares", ())
    adaptive = label != FLOAT and (len(widths) > 1 or not float(figures.get("fab", 0)).is_integer())
    return Point(path, label, label.rpartition(" ")[0] or label, test, figures, adaptive, way)


def _way(costs: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
    return costs.get("convention", _WAY[0]), tuple(costs.get("input_size", DEFAULT_SIZE))


def _key(path: Path, data: Mapping[str, Any], key: str, where: str) -> Any:
    if not isinstance(data, Mapping) or key not in data:
        found = ", ".join(data) if isinstance(data, Mapping) else type(data).__name__
        raise ResultError(f"{path}: {where} has no '{key}', found {found or 'nothing'}")
    return data[key]


# -- choosing what to draw --------------------------------------------------------------------------------------------


def choose_set(points: Sequence[Point], wanted: str | None = None) -> list[Point]:
    """The points on one test set. Those of a file that names none are taken to be of any.

    Args:
        points: Of all files.
        wanted: Name of the set; by default the first that all files have.

    Raises:
        ResultError: If there is no such set, or none that all files have; the message says what there is.
    """
    by_file: dict[Path, list[str]] = {}
    for point in points:
        by_file.setdefault(point.file, []).append(point.test)
    named = [tests for tests in by_file.values() if any(tests)]
    if wanted is None and named:
        wanted = next((test for test in named[0] if all(test in tests for tests in named)), None)
        if wanted is None:
            have = "; ".join(f"{path}: {', '.join(dict.fromkeys(tests))}" for path, tests in by_file.items())
            raise ResultError(f"no test set is in all files; choose one with --set. They have: {have}")
    known = dict.fromkeys(test for tests in named for test in tests)
    if named and wanted not in known:
        raise ResultError(f"no result on '{wanted}'. {suggest(wanted, known)}")
    return [point for point in points if point.test in ("", wanted)]


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
            raise ResultError(f"{point.file}: {point.label} has no '{x}'; it has {', '.join(point.figures)}")
    ways = {point.way: point.file for point in networks}
    if x == "bitops" and len(ways) > 1:
        found = "; ".join(f"{path}: {name} at {h}x{w}" for (name, (h, w)), path in ways.items())
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
