"""From a folder of photos to the pair of LMDBs that BasicSR's ``PairedImageDataset`` trains from.

Each photo is read as RGB, reduced to 8 bits if it has 16, freed of its border, shrunk by each factor, cropped to a
multiple of the scale and downscaled as a whole; both images are then cut at matching places. A journal beside the
databases records each photo once both databases hold it, so that a build that was stopped goes on where it ended.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console

from qsr_plugin.data import resize
from qsr_plugin.data.images import list_images, read_rgb, to_uint8
from qsr_plugin.data.store import COMPRESSION, META_NAME, Journal, LmdbWriter, write_meta_info
from qsr_plugin.progress import track

GT_NAME, LQ_NAME, JOURNAL_NAME = "GT.lmdb", "LQ.lmdb", "build.jsonl"
_MAX_STEM = 200  # an LMDB key has at most 511 bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildSettings:
    """What decides the content of the databases; a build is continued only with equal settings.

    Attributes:
        photos: Folder of the photos, absolute.
        photo_list: Number of photos and a digest of their names and sizes.
        scale: Factor between GT and LQ.
        sub_image: Side of a GT sub-image in pixels; 0 keeps photos whole.
        step: Distance of neighbouring sub-images in GT pixels.
        shrink: Factors of the shrunk copies of each photo.
        border: Pixels cut off each side of a photo before anything else.
        min_side: Copies whose shorter side is below this many pixels are left out.
        min_std: Sub-images whose standard deviation, in grey levels of 255, is below this are left out.
    """

    photos: str
    photo_list: str
    scale: int
    sub_image: int
    step: int
    shrink: tuple[float, ...]
    border: int
    min_side: int
    min_std: float

    def __post_init__(self) -> None:
        for name, lowest in (
            ("scale", 1),
            ("sub_image", 0),
            ("step", 1),
            ("border", 0),
            ("min_side", 1),
            ("min_std", 0),
        ):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {lowest} or more.")
        for name in ("sub_image", "step"):
            if getattr(self, name) % self.scale:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a multiple of scale = {self.scale}.")
        if not self.shrink or any(not 0 < factor <= 1 for factor in self.shrink):
            raise ValueError(f"shrink is {self.shrink}; give one or more factors above 0 and at most 1.")
        if len(set(self.shrink)) != len(self.shrink):
            raise ValueError(f"shrink is {self.shrink}; each factor may be given only once.")


@dataclass(frozen=True)
class BuildReport:
    """Outcome of a build.

    Attributes:
        gt: Folder of the high-resolution database.
        lq: Folder of the low-resolution database.
        photos: Photos that were read.
        bad: Names of unreadable photos that were skipped.
        unused: Photos that were read and gave no sub-image (too small or too flat).
        sub_images: Pairs in the databases.
        size: Bytes of both databases on disk.
        resumed: Photos that an earlier run had done.
    """

    gt: Path
    lq: Path
    photos: int
    bad: tuple[str, ...]
    unused: int
    sub_images: int
    size: int
    resumed: int

    @property
    def already_complete(self) -> bool:
        """Whether an earlier run had done everything."""
        return self.resumed == self.photos + len(self.bad)


def build_lmdb_pair(
    photos: str | Path,
    out: str | Path,
    scale: int,
    *,
    sub_image: int = 480,
    step: int = 240,
    shrink: tuple[float, ...] = (1.0,),
    border: int = 0,
    min_side: int = 192,
    min_std: float = 0.0,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> BuildReport:
    """Build ``out/GT.lmdb`` and ``out/LQ.lmdb`` from a folder of photos, or continue a build that was stopped.

    Args:
        photos: Folder of photos (PNG, JPEG, WebP, BMP); 16-bit ones are rounded to 8 bits.
        out: Folder for the two databases and the journal; created if needed.
        scale: Factor between GT and LQ.
        sub_image: Side of a GT sub-image in pixels, a multiple of ``scale``; 0 keeps photos whole. Along a side
            that is shorter, the whole side is taken.
        step: Distance of neighbouring sub-images in pixels, a multiple of ``scale``; the last one is moved to
            end at the photo's border.
        shrink: Factors in (0, 1]; every photo is used once per factor. Shrunk copies of JPEG photos have
            less block noise.
        border: Pixels cut off each side of a photo first.
        min_side: Copies whose shorter side is below this are left out; use at least the training's ``gt_size``.
        min_std: Sub-images with a standard deviation below this (grey levels, 0..255) are left out; 0 keeps all.
        skip_bad: Leave out photos that cannot be read, and count them, instead of stopping.
        overwrite: Delete databases that are already in ``out`` and start again.
        progress: Show how far it is.

    Returns:
        Counts and sizes.

    Raises:
        ValueError: A setting is out of range, a photo cannot be read, ``out`` holds something built with other
            settings, or no sub-image was left.
    """
    paths = list_images(photos)
    listing = "\n".join(f"{path.name}:{path.stat().st_size}" for path in paths)
    digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    settings = BuildSettings(
        photos=str(Path(photos).expanduser().resolve()),
        photo_list=f"{len(paths)} photos, {digest}",
        scale=scale,
        sub_image=sub_image,
        step=step,
        shrink=tuple(float(f) for f in shrink),
        border=border,
        min_side=min_side,
        min_std=float(min_std),
    )
    out = Path(out).expanduser()
    gt, lq, journal_path = out / GT_NAME, out / LQ_NAME, out / JOURNAL_NAME
    if overwrite:
        for folder in (gt, lq):
            shutil.rmtree(folder, ignore_errors=True)
        journal_path.unlink(missing_ok=True)
    elif not journal_path.exists() and (gt.exists() or lq.exists()):
        raise ValueError(
            f"{out} already holds {GT_NAME} or {LQ_NAME} that this command did not build; "
            "choose another folder or pass --overwrite to delete them."
        )
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal.open(journal_path, asdict(settings))
    resumed = len(journal.entries)
    if resumed and not all((folder / "data.mdb").is_file() for folder in (gt, lq)):
        raise ValueError(f"{journal_path} records {resumed} photos, but {gt} or {lq} is gone; pass --overwrite.")
    stems = _unique_stems(paths)
    _add_photos(
        [path for path in paths if path.name not in journal.entries],
        stems,
        settings,
        journal,
        (gt, lq),
        skip_bad,
        progress,
    )
    entries = [journal.entries[path.name] for path in paths]
    items = [item for entry in entries for item in entry.get("items", ())]
    bad = tuple(path.name for path, entry in zip(paths, entries) if "bad" in entry)
    if not items:
        raise ValueError(
            f"no sub-image was left of {len(paths)} photos in {photos} ({len(bad)} unreadable); "
            f"lower min_side = {min_side} or min_std = {min_std:g}, and pass --overwrite to start again."
        )
    if resumed < len(paths) or not all((folder / META_NAME).is_file() for folder in (gt, lq)):
        write_meta_info(lq, [(key, [side // scale for side in size]) for key, size in items])
        write_meta_info(gt, items)
    return BuildReport(
        gt=gt,
        lq=lq,
        photos=len(paths) - len(bad),
        bad=bad,
        unused=sum(1 for entry in entries if entry.get("items") == []),
        sub_images=len(items),
        size=sum((folder / "data.mdb").stat().st_size for folder in (gt, lq)),
        resumed=resumed,
    )


def _add_photos(
    paths: list[Path],
    stems: dict[str, str],
    settings: BuildSettings,
    journal: Journal,
    folders: tuple[Path, Path],
    skip_bad: bool,
    progress: bool,
) -> None:
    """Add photos one by one: GT, then LQ, then the journal, each safe on disk before the next."""
    if not paths:
        return
    with LmdbWriter(folders[0]) as gt, LmdbWriter(folders[1]) as lq:
        for path in track(paths, "photos", Console()) if progress else paths:
            try:
                image = to_uint8(read_rgb(path))
            except ValueError as error:
                if not skip_bad:
                    raise ValueError(f"{error} Or pass --skip-bad to leave such photos out.") from error
                logger.warning("skipped: %s", error)
                journal.add(path.name, {"bad": str(error)})
                continue
            pairs = [(stems[path.name] + suffix, high, low) for suffix, high, low in _pairs(image, settings)]
            gt.put([(key, _encode(high)) for key, high, _ in pairs])
            lq.put([(key, _encode(low)) for key, _, low in pairs])
            journal.add(path.name, {"items": [[key, list(high.shape[:2])] for key, high, _ in pairs]})


def _pairs(image: np.ndarray, settings: BuildSettings) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield key suffix, GT (h, w, 3) and LQ (h / scale, w / scale, 3) of every sub-image of a photo."""
    scale, border = settings.scale, settings.border
    image = image[border : image.shape[0] - border, border : image.shape[1] - border]
    if image.size == 0:
        return
    for factor in settings.shrink:
        high = resize.shrink(image, factor)
        high = high[: high.shape[0] // scale * scale, : high.shape[1] // scale * scale]
        if min(high.shape[:2]) < max(settings.min_side, scale):
            continue
        low = resize.downscale(high, scale)
        size = [min(settings.sub_image or side, side) for side in high.shape[:2]]
        starts = [_starts(side, length, settings.step) for side, length in zip(high.shape[:2], size)]
        copy = "" if factor == 1.0 else f"_r{factor:g}".replace(".", "p")
        for index, (top, left) in enumerate(product(*starts), start=1):
            part = high[top : top + size[0], left : left + size[1]]
            if part.std() < settings.min_std:
                continue
            area = slice(top // scale, (top + size[0]) // scale), slice(left // scale, (left + size[1]) // scale)
            yield f"{copy}_s{index:03d}", part, low[area]


def _starts(side: int, length: int, step: int) -> list[int]:
    starts = list(range(0, side - length + 1, step))
    return starts if starts[-1] == side - length else [*starts, side - length]


def _encode(image: np.ndarray) -> bytes:
    bgr = np.ascontiguousarray(image[:, :, ::-1])
    return cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, COMPRESSION])[1].tobytes()


def _unique_stems(paths: list[Path]) -> dict[str, str]:
    """File name -> key stem: ASCII without dots for the host; altered and shared stems get a digest of the name."""
    counts = Counter(path.stem for path in paths)
    stems = {}
    for path in paths:
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)[:_MAX_STEM]
        if stem != path.stem or counts[path.stem] > 1:
            stem += "-" + hashlib.sha256(path.name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        stems[path.name] = stem
    return stems
