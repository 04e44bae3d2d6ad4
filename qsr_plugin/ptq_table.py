"""A table of post-training methods: networks x bits x placements x methods, on the same crops with the same seed.

Every row is made in a process of its own (:mod:`qsr_plugin.ptq_process`) and kept as soon as it is there, with what it
was made from, so that no row is made twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsr_plugin.checkpoint import write_atomically
from qsr_plugin.errors import UserError, suggest
from qsr_plugin.options_file import parse_bits
from qsr_plugin.ptq_process import rows_of
from qsr_plugin.ptq_row import Crops, Job, key_of
from qsr_plugin.quant.policy import policy_class
from qsr_plugin.quant.recipe import list_methods, load_recipe
from qsr_plugin.quant.schema import Recipe
from qsr_plugin.report.ptq_rows import PtqRow, to_csv, to_markdown
from qsr_plugin.report.result_io import ResultError, read_table, write_results
from qsr_plugin.report.result_schema import FLOAT, Result, ResultTable

#: Name of a network whose type is found out from its weights.
AUTO = "auto"

Progress = Callable[[Sequence[Job]], Iterable[Job]]


class PtqTableError(UserError, ValueError):
    """A table that cannot be made as asked for."""


@dataclass(frozen=True)
class Network:
    """A float network of the table.

    Attributes:
        name: What to call it.
        backbone: Type and arguments.
        weights: File of its float weights.
        scale: Up-sampling factor.
    """

    name: str
    backbone: Mapping[str, Any]
    weights: Path
    scale: int


def read_network(entry: str) -> Network:
    """``NAME:WEIGHTS[:SCALE]`` as a network; NAME is a shipped backbone, a YAML file with a network_g block, or auto.

    Raises:
        PtqTableError: For anything else, weights that cannot be read, or a network that is not recognised.
    """
    from qsr_plugin.float_networks import open_float_network

    found = re.fullmatch(r"([^:]+):(.+?)(?::(\d+))?", entry)
    if not found:
        raise PtqTableError(f"network is '{entry}'; expected NAME:WEIGHTS[:SCALE], e.g. auto:weights/net.pth:4")
    name, weights, scale = found[1], Path(found[2]).expanduser().resolve(), found[3] and int(found[3])
    try:
        opened = open_float_network(weights, None if name == AUTO else name, scale)
    except UserError as error:
        raise PtqTableError(f"network '{entry}': {error}") from None
    return Network(weights.stem if name == AUTO else Path(name).stem, opened.options, weights, opened.scale)


def post_training_methods() -> list[str]:
    """Shipped recipes that need no training: those that only calibrate, then those that are tuned."""
    recipes = {name: load_recipe(name) for name in list_methods()}
    found = [name for name, recipe in recipes.items() if _needs_no_training(recipe)]
    return sorted(found, key=lambda name: recipes[name].tuning is not None)


def _needs_no_training(recipe: Recipe) -> bool:
    trains = any("weights" in stage.train for stage in recipe.stages)
    chooses = recipe.policy.type != "fixed" and not policy_class(recipe.policy.type).reach
    return not chooses and (recipe.tuning is not None or not trains)


def read_methods(sources: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Shipped recipes and recipe files by what to call them, as plain data.

    Raises:
        RecipeError: For one that cannot be used.
        PtqTableError: For one that needs a training, or two of one name.
    """
    recipes: dict[str, dict[str, Any]] = {}
    for source in sources:
        recipe, name = load_recipe(source), Path(source).stem
        if not _needs_no_training(recipe):
            allowed = ", ".join(post_training_methods())
            raise PtqTableError(f"'{source}' needs a training, see 'qsr train'. Without one: {allowed}")
        if name in recipes:
            raise PtqTableError(f"two methods are called '{name}': give one recipe file another name")
        recipes[name] = recipe.to_dict()
    return recipes


def sets_in(folder: Path, names: Sequence[str], scale: int) -> dict[str, tuple[Path, Path]]:
    """Folders ``NAME/HR`` and ``NAME/LRbicxSCALE`` by name; sets that have none for the scale are left out.

    Raises:
        PtqTableError: For an unknown set, or if none has images for the scale.
    """
    known = sorted(path.parent.name for path in folder.glob("*/HR"))
    for name in names:
        if name not in known:
            raise PtqTableError(f"{folder} holds no test set '{name}', a folder with HR. {suggest(name, known)}")
    sets = {name: (folder / name / "HR", folder / name / f"LRbicx{scale}") for name in names}
    found = {name: pair for name, pair in sets.items() if pair[1].is_dir()}
    if not found:
        raise PtqTableError(f"none of {', '.join(names)} in {folder} has a folder LRbicx{scale}")
    return found


def plan(
    networks: Sequence[Network],
    methods: Mapping[str, Mapping[str, Any]],
    bits: Sequence[str],
    placements: Sequence[str],
    *,
    crops: Callable[[Network], Crops],
    tests: Callable[[Network], Mapping[str, tuple[Path, Path]]],
    threads: int,
    device: str = "cpu",
    imports: Sequence[str] = (),
) -> list[Job]:
    """All rows of a table in their order: by network, the float one first, then by bits, placement and method.

    Args:
        networks: Float networks.
        methods: From :func:`read_methods`.
        bits: Like ``W4A4``.
        placements: Keys of the recipes' placements.
        crops: Calibration crops of a network.
        tests: Test sets of a network: name to folders, high and low resolution.
        threads: CPU threads of every row.
        device: Where networks run.
        imports: Files or modules of the user that register networks, for the processes that make the rows.

    Raises:
        UserError: For impossible bits, or networks of one name.
    """
    for width in bits:
        parse_bits(width)
    if twice := {one.name for one in networks if [other.name for other in networks].count(one.name) > 1}:
        raise PtqTableError(f"two networks are called '{min(twice)}': copy one's file to another name")
    jobs = []
    for network in networks:
        folders = {name: (str(hr), str(lr)) for name, (hr, lr) in tests(network).items()}
        shared = (network.name, network.backbone, str(network.weights), network.scale, folders, threads, device)
        jobs.append(Job(*shared, imports=imports))
        for width in bits:
            for placement in placements:
                for name, recipe in methods.items():
                    jobs.append(Job(*shared, name, recipe, width, placement, crops(network), imports=imports))
    return jobs


# -- rows that are kept -----------------------------------------------------------------------------------------------


def kept_rows(out: Path) -> dict[str, Result]:
    """All rows of earlier calls by the key of their job, with what they were made from; failed ones as well.

    Raises:
        PtqTableError: If the file in the folder is none of these tables, or has rows of another command.
    """
    path = out / "ptq.json"
    if not path.is_file():
        return {}
    try:
        rows = read_table(path).rows
    except ResultError as error:
        why = f"{path} is no table of post-training methods: give another folder with -o"
        raise PtqTableError(f"{why}. {error}") from None
    for row in rows:
        if row.origin is None:
            why = f"{path}: row '{row.label}' does not say what it was made from, so another command wrote it"
            raise PtqTableError(f"{why}. Give another folder with -o, or move the file away")
    return {key_of(row.origin): row for row in rows}


def make_table(
    jobs: Sequence[Job],
    out: Path,
    *,
    about: Sequence[str] = (),
    retry: bool = False,
    at_once: int = 1,
    progress: Progress = iter,
    told: Callable[[PtqRow], None] = lambda row: None,
) -> list[PtqRow]:
    """Make the rows that are not there yet. ``ptq.json``, ``ptq.md`` and ``ptq.csv`` are written after each.

    Rows of other calls stay in ``ptq.json``; the other files hold those of these jobs. What a row printed is in
    ``logs``.

    Args:
        jobs: From :func:`plan`.
        out: Folder for everything that is written.
        about: Lines above the tables.
        retry: Also make those again that failed.
        at_once: How many rows are made side by side.
        progress: Wraps the jobs that are to be done, e.g. ``rich.progress.track``.
        told: Called for each row that was made.

    Returns:
        Rows in the order of the jobs.
    """
    keys = {job.key(): job for job in jobs}
    rows = {key: row for key, row in kept_rows(out).items() if key in keys}
    todo = [job for key, job in keys.items() if key not in rows or (retry and not rows[key].quality)]
    with closing(rows_of(todo, out / "logs", at_once)) as ready:
        for _, (job, result) in zip(progress(todo), ready):
            row = result.model_copy(update={"origin": job.origin()})
            rows[job.key()] = row
            # Read again: another table may be made in this folder at the same time.
            kept = {**kept_rows(out), job.key(): row}
            write_results(ResultTable(rows=tuple(kept.values())), out / "ptq.json")
            _write_texts(list(_named(keys, rows)), about, out)
            told(PtqRow.of(row))
    made = list(_named(keys, rows))
    _write_texts(made, about, out)
    return made


def _named(jobs: Mapping[str, Job], rows: Mapping[str, Result]) -> Iterator[PtqRow]:
    """The rows there are, in the order of the jobs and under their names: equal contents may be called otherwise."""
    for key, job in jobs.items():
        if key in rows:
            yield replace(PtqRow.of(rows[key]), network=job.network, method=job.method or FLOAT)


def _write_texts(rows: Sequence[PtqRow], about: Sequence[str], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("md", to_markdown(rows, about)), ("csv", to_csv(rows))):
        write_atomically(out / f"ptq.{name}", lambda path, text=text: path.write_text(text, "utf-8"))
