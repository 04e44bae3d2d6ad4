"""Checks of training and test data that cost seconds before a run instead of a crash, or a hang, inside it.

The host stops with a message about ``NoneType`` when an LMDB key is missing, and with a size error that names one
file of two. Here every fault is found first, and reported with the place, the item and the next step.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from qsr_plugin.data.images import read_rgb
from qsr_plugin.data.sources import FolderSource, LmdbSource, Source, open_source, some
from qsr_plugin.data.store import META_NAME
from qsr_plugin.progress import track

DATASET_TYPE = "PairedImageDataset"


@dataclass(frozen=True)
class Problem:
    """One fault of the data.

    Attributes:
        where: Folder, database or option the fault is in; several are joined by " / ".
        item: File, key or option name; empty if the whole place is meant.
        message: What is wrong and what to do.
        dataset: Name of the data set in the option file, such as ``val_1``; empty outside option files.
    """

    where: str
    item: str
    message: str
    dataset: str = ""

    def __str__(self) -> str:
        """Return all of it in one line."""
        return ": ".join(part for part in (self.dataset, self.where, self.item, self.message) if part)


def check_pair(
    gt: str | Path,
    lq: str | Path,
    scale: int,
    *,
    as_lmdb: bool | None = None,
    filename_tmpl: str = "{}",
    meta_info_file: str | Path | None = None,
    gt_size: int | None = None,
    exact: bool = True,
    sample: int | None = None,
    progress: bool = False,
) -> list[Problem]:
    """Check a pair of folders, or of LMDBs, as ``PairedImageDataset`` will read them.

    Args:
        gt: Folder or LMDB of high-resolution images.
        lq: Folder or LMDB of low-resolution images.
        scale: Factor between them.
        as_lmdb: Whether they are LMDBs; by default they are if the name of ``gt`` ends in ``.lmdb``.
        filename_tmpl: Folders only: name of the LQ file, without extension, from that of the GT file (``{}x4``).
        meta_info_file: Folders only: text file with the GT file names to use, first word of each line.
        gt_size: Side of the training crop in GT pixels; None if there is no crop.
        exact: GT must be exactly ``scale`` times LQ, as in training. Otherwise GT may be larger by less than ``scale``
            pixels a side, which the host cuts off in validation.
        sample: Decode only this many pairs, spread evenly; None decodes all. Names and keys are always checked in full.
        progress: Show how far the decoding is.

    Returns:
        The problems found; empty if the pair can be used.
    """
    as_lmdb = Path(gt).suffix == ".lmdb" if as_lmdb is None else as_lmdb
    if as_lmdb and Path(gt).expanduser().resolve() == Path(lq).expanduser().resolve():
        return [Problem(str(gt), "", "is given as GT and as LQ; they must be two databases.")]
    problems: list[Problem] = []
    if gt_size is not None and gt_size % scale:
        problems.append(
            Problem("gt_size", str(gt_size), f"is not a multiple of scale = {scale}; the crops would not match.")
        )
    with ExitStack() as stack:
        sources: list[FolderSource | LmdbSource] = []
        for path in (gt, lq):
            try:
                sources.append(stack.enter_context(open_source(Path(path), as_lmdb)))
            except ValueError as error:
                problems.append(Problem(str(path), "", str(error)))
        if len(sources) < 2:
            return problems
        if as_lmdb:
            pairs = _lmdb_pairs(*sources, problems)
        else:
            pairs = _folder_pairs(*sources, filename_tmpl, meta_info_file, problems)
        if sample is not None and sample < len(pairs):
            pairs = [pairs[index * len(pairs) // sample] for index in range(sample)]
        for gt_name, lq_name in track(pairs, "decoding", Console()) if progress else pairs:
            problems += _check_images((sources[0], gt_name), (sources[1], lq_name), scale, gt_size, exact)
    return problems


def check_options(opt: Mapping[str, object], *, sample: int | None = 16, progress: bool = False) -> list[Problem]:
    """Check every ``PairedImageDataset`` of a BasicSR option file, for training and for testing alike.

    Args:
        opt: The options as read from YAML, before or after the host has parsed them.
        sample: Decode only this many pairs of each data set; None decodes all.
        progress: Show how far the decoding is.

    Returns:
        The problems of all data sets; empty if the run can start. Data sets of other types are not looked at.
    """
    problems: list[Problem] = []
    for name, dataset in (opt.get("datasets") or {}).items():
        if not isinstance(dataset, Mapping) or dataset.get("type") != DATASET_TYPE:
            continue
        scale = dataset.get("scale", opt.get("scale"))
        missing = [key for key in ("dataroot_gt", "dataroot_lq", "io_backend") if not dataset.get(key)]
        missing += [] if isinstance(scale, int) and scale >= 1 else ["scale (an integer of 1 or more)"]
        training = name.split("_")[0] == "train"
        missing += ["gt_size"] if training and not dataset.get("gt_size") else []
        if missing:
            problems.append(Problem(f"datasets.{name}", "", f"lacks {', '.join(missing)}; add it.", name))
            continue
        found = check_pair(
            dataset["dataroot_gt"],
            dataset["dataroot_lq"],
            scale,
            as_lmdb=dataset["io_backend"].get("type") == "lmdb",
            filename_tmpl=dataset.get("filename_tmpl", "{}"),
            meta_info_file=dataset.get("meta_info_file"),
            gt_size=dataset["gt_size"] if training else None,
            exact=training,
            sample=sample,
            progress=progress,
        )
        problems += [replace(problem, dataset=name) for problem in found]
    return problems


def _lmdb_pairs(gt: LmdbSource, lq: LmdbSource, problems: list[Problem]) -> list[tuple[str, str]]:
    """Compare both key lists with the databases and with each other; return the keys that can be read."""
    for source, other in ((gt, lq), (lq, gt)):
        listed = set(source.names)
        for keys, message in (
            (listed - source.stored, f"are listed in {META_NAME} but not stored; the file is stale, build again"),
            (source.stored - listed, f"are stored but not listed in {META_NAME}; the file is stale, build again"),
            (set(other.names) - listed, f"are missing here but listed in {other.path}; build both databases together"),
        ):
            if keys:
                problems.append(Problem(str(source.path), f"keys ({some(sorted(keys))})", f"{message}."))
    return [(key, key) for key in sorted({*gt.names} & {*lq.names} & gt.stored & lq.stored)]


def _folder_pairs(
    gt: FolderSource, lq: FolderSource, template: str, meta_info_file: str | Path | None, problems: list[Problem]
) -> list[tuple[str, str]]:
    """Pair files by name as the host does; return the pairs of which both files exist."""
    names = gt.names
    if meta_info_file is not None:
        try:
            lines = Path(meta_info_file).expanduser().read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(Problem(str(meta_info_file), "", f"the meta_info_file cannot be read ({error})."))
            return []
        names = [line.strip().split(" ")[0] for line in lines]
        absent = [name for name in names if not (gt.path / name).is_file()]
        if absent:
            problems.append(
                Problem(str(gt.path), f"files ({some(absent)})", f"are listed in {meta_info_file}, not found.")
            )
    wanted = {name: template.format(Path(name).stem) + Path(name).suffix for name in names}
    absent = [lq_name for lq_name in wanted.values() if not (lq.path / lq_name).is_file()]
    if absent:
        message = f"looked for by filename_tmpl '{template}', found {some(lq.names)}.{_template_hint(gt, lq)}"
        problems.append(Problem(str(lq.path), f"files ({some(absent)})", message))
    extra = sorted({*lq.names} - {*wanted.values()})
    if extra and not absent and meta_info_file is None:
        problems.append(Problem(str(lq.path), f"files ({some(extra)})", f"have no partner in {gt.path}; remove them."))
    return [
        (name, lq_name)
        for name, lq_name in wanted.items()
        if (gt.path / name).is_file() and (lq.path / lq_name).is_file()
    ]


def _template_hint(gt: FolderSource, lq: FolderSource) -> str:
    """Guess the template from the first GT file that some LQ file's name contains."""
    for name in gt.names:
        stem = Path(name).stem
        for lq_name in lq.names:
            if stem in Path(lq_name).stem and Path(lq_name).suffix == Path(name).suffix:
                return f" Try filename_tmpl: '{Path(lq_name).stem.replace(stem, '{}', 1)}'."
    return ""


def _check_images(
    gt: tuple[Source, str], lq: tuple[Source, str], scale: int, gt_size: int | None, exact: bool
) -> list[Problem]:
    """Decode both images of a pair and compare their sizes."""
    problems, sizes = [], []
    for source, name in (gt, lq):
        data = source.read(name)
        try:
            sizes.append(read_rgb(data or b"", name).shape[:2])
        except ValueError as error:
            problems.append(Problem(str(source.path), name, str(error).removeprefix(f"{name}: ")))
    if problems:
        return problems
    both = f"{gt[0].path} / {lq[0].path}", gt[1] if gt[1] == lq[1] else f"{gt[1]} / {lq[1]}"
    (height, width), low = sizes
    spare = [side - scale * small for side, small in zip(sizes[0], low)]
    if any(not 0 <= pixels <= (0 if exact else scale - 1) for pixels in spare):
        problems.append(
            Problem(
                *both,
                f"GT is {height}x{width}, LQ is {low[0]}x{low[1]}; GT must be "
                f"{scale * low[0]}x{scale * low[1]} at scale {scale}. Make the LQ image again.",
            )
        )
    if gt_size is not None and min(height, width) < gt_size:
        problems.append(
            Problem(
                str(gt[0].path),
                gt[1],
                f"is {height}x{width}, smaller than the training crop gt_size = "
                f"{gt_size}; lower gt_size or leave the image out.",
            )
        )
    return problems
