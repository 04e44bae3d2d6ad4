"""Results as tables like those of the papers: networks below each other, in groups of equal bits, the best marked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsr_plugin.errors import suggest
from qsr_plugin.report.paper_columns import MORE, Column, ColumnError, Layout, Way, columns_of, layout_of, ways_of
from qsr_plugin.report.result_io import NoResultFile, ResultError, read_results
from qsr_plugin.report.result_schema import FLOAT, Quality, Result

#: What stands for a figure that there is none of.
MISSING = "-"
BEST, SECOND = 1, 2
_BITS = re.compile(r" (W\d+A[\d/]+(?:MP)?\+?)")


@dataclass(frozen=True)
class Cell:
    """A text, and whether it is the :data:`BEST` or :data:`SECOND` of its group (0: neither)."""

    text: str
    rank: int = 0


Line = tuple[Cell, ...]


@dataclass(frozen=True)
class PaperTable:
    """A table, whatever it is written as.

    Attributes:
        head: Test set (may be empty) and heading of every column.
        texts: How many of the first columns hold names.
        groups: Lines that belong together.
        notes: Lines below the table.
    """

    head: tuple[tuple[str, str], ...]
    texts: int
    groups: tuple[tuple[Line, ...], ...]
    notes: tuple[str, ...]


# -- what there is ----------------------------------------------------------------------------------------------------


def collect(paths: Sequence[Path]) -> list[tuple[Path, Result]]:
    """All results of files and folders with their files; what stands in two files is there once.

    In folders, JSON files that are no result files are passed over.

    Raises:
        ResultError: For a file that cannot be used, or a folder without any.
    """
    found: list[tuple[Path, Result]] = []
    seen: list[Result] = []
    for path in paths:
        for file, result in _of_folder(path) if path.is_dir() else ((path, one) for one in read_results(path)):
            if result not in seen:
                seen.append(result)
                found.append((file, result))
    return found


def _of_folder(folder: Path) -> list[tuple[Path, Result]]:
    found = []
    for file in sorted(folder.rglob("*.json")):
        try:
            found += [(file, result) for result in read_results(file)]
        except NoResultFile:
            continue
    if not found:
        raise ResultError(f"{folder} holds no result files: give a folder where a command wrote its results as JSON")
    return found


# -- the table --------------------------------------------------------------------------------------------------------


def paper_table(
    found: Sequence[tuple[Path, Result]], columns: str = "all", sets: Sequence[str] | None = None
) -> PaperTable:
    """The table of results.

    Args:
        found: From :func:`collect`.
        columns: Name of a layout.
        sets: Test sets in their order; all by default.

    Raises:
        ColumnError: For an unknown layout or test set.
        ResultError: If no result has scores or costs.
    """
    layout = layout_of(columns)
    shown = [(file, result) for file, result in found if result.scores or result.costs]
    if not shown:
        raise ResultError("there are no results: none of the files has scores on a test set, or costs of a network")
    results = [result for _, result in shown]
    known = list(dict.fromkeys(test for result in results for test in result.scores))
    for name in sets or ():
        if name not in known:
            raise ColumnError(f"no result on '{name}'. {suggest(name, known)}")
    numbers = columns_of(layout, known if sets is None else sets, ways_of(results))
    if columns == "all":
        numbers = [column for column in numbers if any(column.value(result) is not None for result in results)]
    networks = _by_network(shown)
    several, groups = len(networks) > 1, []
    for name, own in networks.items():
        for group in _groups(own):
            lead = [(*([name] if several else []), *texts) for texts in _names(group, own, layout)]
            groups.append(_lines(lead, [result for _, result in group], numbers))
    texts = (*(("Network",) if several else ()), "Method", *(("Bits",) if layout.bits else ()))
    head = (*(("", text) for text in texts), *((column.test, column.heading) for column in numbers))
    return PaperTable(head, len(texts), tuple(groups), tuple(_notes(found, results)))


Found = list[tuple[Path, Result]]
#: Architecture and arguments of a network without a name.
Kind = tuple[str, dict[str, Any]]


def _by_network(found: Sequence[tuple[Path, Result]]) -> dict[str, Found]:
    """Results by what the float network is called.

    Those that do not say join one of the same arguments, else they are one network if architecture and arguments agree.
    """
    given = [result.network or _name_of_alike(result, found) for _, result in found]
    kinds: list[Kind] = []
    for name, (_, result) in zip(given, found):
        if not name and _kind(result) not in kinds:
            kinds.append(_kind(result))
    made = list(_names_of(kinds))
    networks: dict[str, Found] = {}
    for name, (file, result) in zip(given, found):
        networks.setdefault(name or made[kinds.index(_kind(result))], []).append((file, result))
    return networks


def _name_of_alike(result: Result, found: Sequence[tuple[Path, Result]]) -> str:
    """What the first network of the same arguments is called; empty if none has a name."""
    alike = (one.network for _, one in found if one.network and one.backbone == result.backbone)
    return next(alike, "") if result.backbone else ""


def _kind(result: Result) -> Kind:
    return result.architecture, result.backbone


def _names_of(kinds: Sequence[Kind]) -> Iterator[str]:
    """Architectures, with those of their arguments in which equal ones differ."""
    for name, backbone in kinds:
        others = [other for same, other in kinds if same == name]
        own = [key for key, value in backbone.items() if any(key not in one or one[key] != value for one in others)]
        apart = ", ".join(f"{key} {backbone[key]}" for key in own)
        yield f"{name or MISSING} ({apart})" if apart else name or MISSING


def _groups(own: Found) -> Iterator[Found]:
    """The float network, then results of equal bits, most bits first; where methods have several, of one placement."""
    floats = [(file, result) for file, result in own if result.method == FLOAT]
    if floats:
        yield _merged(floats)
    quantized = [(file, result) for file, result in own if result.method != FLOAT]
    placements = {(result.label, result.placement) for _, result in quantized}
    apart = any(times > 1 for times in Counter(label for label, _ in placements).values())
    groups: dict[tuple[str, str], Found] = {}
    for file, result in quantized:
        bits = result.bits.upper().removesuffix("MP")
        groups.setdefault((bits, result.placement if apart else ""), []).append((file, result))
    yield from (groups[key] for key in sorted(groups, key=_width))


def _width(key: tuple[str, str]) -> tuple[int, ...]:
    """Sorts the most bits first; of equal bits, the first that came."""
    return tuple(-int(number) for number in re.findall(r"\d+", key[0])) or (1,)


def _merged(floats: Found) -> Found:
    """Float networks with the same scores as one: several files have it, each with its test sets.

    Without a common test set they are one only if they have the same arguments.
    """
    kept: Found = []
    for file, result in floats:
        for place, (first, other) in enumerate(kept):
            shared = set(other.scores) & set(result.scores)
            same = all(abs(other.scores[test].psnr - result.scores[test].psnr) < 0.005 for test in shared)
            if same and (shared or other.backbone == result.backbone):
                update = {"quality": {**result.scores, **other.scores}, "costs": other.costs or result.costs}
                kept[place] = (first, other.model_copy(update=update))
                break
        else:
            kept.append((file, result))
    return kept


def _names(group: Found, own: Found, layout: Layout) -> Iterator[tuple[str, ...]]:
    """Method and bits of every line; with placement or file where that tells them from others."""
    placements = {result.placement for _, result in own if result.method != FLOAT}
    often = Counter((result.label, result.placement) for _, result in group)
    for file, result in group:
        quantized = result.method != FLOAT
        bits = _BITS.search(result.label)
        method = _BITS.sub("", result.label) if layout.bits else result.label
        if quantized and len(placements) > 1 and result.placement not in method:
            method += f", {result.placement}"
        if often[result.label, result.placement] > 1:
            method += f" ({file.stem})"
        yield (method, *([bits[1] if bits else result.bits or ("32" if not quantized else MISSING)] * layout.bits))


def _lines(names: Sequence[tuple[str, ...]], results: Sequence[Result], columns: Sequence[Column]) -> tuple[Line, ...]:
    """The lines of a group with the best and the second of every column marked, as far as it is shown."""
    numbers = [_ranked(column, [column.value(result) for result in results]) for column in columns]
    return tuple(
        (*map(Cell, lead), *(column[place] for column in numbers)) for place, lead in enumerate(names)
    )  # fmt: skip


def _ranked(column: Column, values: Sequence[float | None]) -> list[Cell]:
    texts = [MISSING if value is None else column.form(value) for value in values]
    order = sorted((value, text) for value, text in zip(values, texts) if value is not None and value == value)
    distinct = list(dict.fromkeys(text for _, text in (reversed(order) if column.better == MORE else order)))
    ranks: Mapping[str, int] = dict(zip(distinct, (BEST, SECOND))) if len(distinct) > 1 else {}
    return [Cell(text, ranks.get(text, 0)) for text in texts]


def _notes(found: Sequence[tuple[Path, Result]], results: Sequence[Result]) -> Iterator[str]:
    """How scores and costs came about, and what has no figures."""
    told = [_protocol(score) for result in results for score in result.scores.values()]
    if told:
        yield f"PSNR in dB and SSIM {'; or '.join(dict.fromkeys(told))}."
    texts = {Way.of(costs): costs.convention_text for costs in (result.costs for result in results) if costs}
    for way, text in texts.items():
        yield f"{way.unit} ({way}){f': {text}' if text else ''}."
    yield "Bold: the best of a group; underlined: the second."
    for file, result in found:
        if result.note and not result.scores:
            name = " ".join(filter(None, (result.network, result.label)))
            yield f"{name} of {file.name}: {' '.join(result.note.split())}"


def _protocol(score: Quality) -> str:
    border = "" if score.border is None else f", {score.border} border pixels left out"
    return f"on {score.colour}{border}, {score.protocol}"
