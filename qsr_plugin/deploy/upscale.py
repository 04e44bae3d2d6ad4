"""Enlarging files: which result goes where, what is checked before work, and what becomes of a run that was stopped.

Several processes (``torchrun``, environment variables ``RANK`` and ``WORLD_SIZE``) share the files, every n-th each;
they need no process group, because none asks another for anything.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qsr_plugin.atomic import check_writable
from qsr_plugin.data.images import IMAGE_SUFFIXES, list_images
from qsr_plugin.deploy.engine import Engine
from qsr_plugin.deploy.image_io import ENCODINGS, check_size, format_of, read_picture, size_of, write_picture
from qsr_plugin.deploy.tiles import check_tiles, default_tile, upscale_tiled
from qsr_plugin.errors import UserError, suggest
from qsr_plugin.progress import Progress, no_progress

logger = logging.getLogger("qsr_plugin")

_LEFT = 3600  # seconds after which a temporary file is one that nobody is writing any more


@dataclass(frozen=True)
class Job:
    """One image to enlarge, and the file its result goes to."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Tiling:
    """How images are cut.

    Attributes:
        tile: Side of a tile in input pixels; 0 for whole images, ``None`` to choose by image and memory.
        overlap: Pixels that neighbouring tiles share; measured if not given.
        batch: Tiles that run together.
    """

    tile: int | None = None
    overlap: int | None = None
    batch: int = 1


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        images: Number of images enlarged.
        pixels: Pixels of their results.
        seconds: Wall time, reading and writing included.
        there: Number of results that were there already.
        broken: Images that could not be read.
    """

    images: int
    pixels: int
    seconds: float
    there: int
    broken: tuple[Path, ...]

    def __str__(self) -> str:
        rate = self.pixels / 1e6 / max(self.seconds, 1e-9)
        made = f"{self.images} image(s) in {self.seconds:.1f} s, {rate:.2f} megapixels of results/s"
        parts = [made if self.images else "no image made"]
        if self.there:
            parts.append(f"{self.there} there already")
        if self.broken:
            parts.append(f"{len(self.broken)} skipped, not readable: {', '.join(map(str, self.broken))}")
        return "; ".join(parts)


def plan(inputs: Sequence[Path], out: Path, *, form: str | None = None, suffix: str = "") -> list[Job]:
    """Which file is made of which.

    Args:
        inputs: Images, and folders whose images are taken; sub-folders are not searched.
        out: A folder; or for a single image, a file that ends in ``.png``, ``.jpg`` or ``.webp``.
        form: Key of :data:`qsr_plugin.deploy.image_io.ENCODINGS`; PNG if neither this nor ``out`` says.
        suffix: Added to the names of results in a folder, before their ending.

    Raises:
        ValueError: For a missing input, or a folder without images.
        UserError: For results that would have one name, or replace an input; an unknown format; an ending that
            contradicts it.
    """
    if form is not None and form not in ENCODINGS:
        raise UserError(f"format is '{form}'. {suggest(form, ENCODINGS)}")
    sources = [image for path in inputs for image in _images_in(path)]
    single_file = len(inputs) == 1 and not inputs[0].is_dir() and not out.is_dir() and bool(out.suffix)
    if single_file and (form or format_of(out)) != format_of(out):
        raise UserError(f"--format is '{form}', but the output is '{out}': leave out one of them")
    targets = [out] if single_file else [out / f"{path.stem}{suffix}.{form or 'png'}" for path in sources]
    made_of: dict[Path, Path] = {}
    inputs_by_place = {path.resolve(): path for path in sources}
    for source, target in zip(sources, targets):
        if target in made_of:
            raise UserError(
                f"{made_of[target]} and {source} would both be written to {target}: rename one of them, or run them "
                "into different folders"
            )
        if target.resolve() in inputs_by_place:
            raise UserError(f"{target} is an input: choose another folder, or add --suffix _x4")
        made_of[target] = source
    return [Job(source, target) for source, target in zip(sources, targets)]


def share_of_process(jobs: Sequence[Job]) -> Sequence[Job]:
    """What this process has to do among those that ``torchrun`` started; everything without it."""
    rank, processes = (int(os.environ.get(key, default)) for key, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    return jobs[rank::processes]


def prepare(jobs: Sequence[Job], scale: int, *, resume: bool = False, overwrite: bool = False) -> tuple[list[Job], int]:
    """Check the places of results before work, remove what a killed run left half-written, leave out what is done.

    Args:
        jobs: From :func:`plan`.
        scale: Of the network.
        resume: Leave out results that are there, whole, and as large as this network makes them.
        overwrite: Replace those that are there.

    Returns:
        What is left to do, and the number of results that were there.

    Raises:
        UserError: If there are results, and neither ``resume`` nor ``overwrite`` says what becomes of them.
        OSError: If a folder cannot be made or written.
    """
    there = [job for job in jobs if job.target.exists()]
    if there and not (resume or overwrite):
        raise UserError(
            f"{there[0].target} exists already (and {len(there) - 1} more): --resume keeps finished results and makes "
            "the others, --overwrite makes all again"
        )
    for folder, job in {job.target.parent: job for job in jobs}.items():
        check_writable(job.target)
        _remove_leftovers(folder, {job.target.name for job in jobs if job.target.parent == folder})
    done = {job for job in there if resume and _is_done(job, scale)}
    return [job for job in jobs if job not in done], len(done)


def check_any_readable(jobs: Sequence[Job], own: Sequence[Job], broken: Sequence[Path]) -> None:
    """Refuse a run in which no image could be read; one process alone must not stop the others for its own share.

    Args:
        jobs: Of all processes.
        own: Of this one.
        broken: Those of ``own`` that could not be read.

    Raises:
        UserError: If none of ``own`` could be read, and the others are no images either.
    """
    if own and len(broken) == len(own) and all(size_of(job.source) is None for job in set(jobs) - set(own)):
        raise UserError(f"none of {len(jobs)} images could be read: give PNG, JPEG, WebP or BMP")


def upscale_files(
    engine: Engine,
    jobs: Sequence[Job],
    tiling: Tiling,
    *,
    there: int = 0,
    skip_broken: bool = True,
    progress: Progress = no_progress,
) -> Summary:
    """Enlarge images one after the other; every result is written atomically as soon as it is made.

    Args:
        engine: Any.
        jobs: From :func:`prepare`.
        tiling: How to cut.
        there: What :func:`prepare` left out, for the summary.
        skip_broken: Name an image that cannot be read and go on.
        progress: Wraps the list of images, or of the tiles where there is one image.

    Raises:
        UserError: For impossible tiles, too little memory, or output that is not finite.
        ValueError: For a broken image, unless they are skipped.
        OSError: If a result cannot be written.
    """
    check_tiles(engine, tiling.tile or None, tiling.overlap, tiling.batch)
    one = len(jobs) == 1
    begun, pixels, broken = time.perf_counter(), 0, []
    for job in jobs if one else progress(jobs, "upscaling"):
        try:
            picture = read_picture(job.source)
        except ValueError as error:
            if not skip_broken:
                raise
            logger.warning("skipped: %s", error)
            broken.append(job.source)
            continue
        tile = default_tile(engine, *picture.rgb.shape[:2]) if tiling.tile is None else tiling.tile or None
        check_size(job.target, *(engine.scale * side for side in picture.rgb.shape[:2]))
        how = {"dtype": picture.dtype, "progress": progress if one else no_progress}
        try:
            out = upscale_tiled(engine, picture.rgb, tile, tiling.overlap, tiling.batch, **how)
        except UserError as error:
            raise UserError(f"{job.source}: {error}") from None
        write_picture(job.target, out, picture)
        pixels += out.shape[0] * out.shape[1]
    return Summary(len(jobs) - len(broken), pixels, time.perf_counter() - begun, there, tuple(broken))


def _images_in(path: Path) -> list[Path]:
    if path.is_dir():
        return list_images(path)
    if not path.is_file():
        raise ValueError(f"{path}: is not there. Give images ({', '.join(IMAGE_SUFFIXES)}) or folders of them.")
    return [path]


def _remove_leftovers(folder: Path, names: set[str]) -> None:
    """Remove what a killed process was writing (``write_atomically``), but not what another one is writing now."""
    for path in folder.glob(".*.tmp"):
        if path.name[1 : -len(".tmp")].rpartition(".")[0] not in names:
            continue
        with suppress(FileNotFoundError):  # another process removes them as well
            if time.time() - path.stat().st_mtime > _LEFT:
                path.unlink()


def _is_done(job: Job, scale: int) -> bool:
    """Whether the result is there as a network of this scale makes it."""
    found, source = size_of(job.target, whole=True), size_of(job.source)
    if found is None:
        logger.warning("%s cannot be read: it is made again", job.target)
        return False
    if source is not None and found != (wanted := (scale * source[0], scale * source[1])):
        logger.warning(
            "%s is %dx%d, this network makes %dx%d of the image: it is made again",
            job.target, *reversed(found), *reversed(wanted),
        )  # fmt: skip
        return False
    return True
