"""Images of any size through an engine: cut into overlapping tiles, each output pixel taken from one of them.

Neighbouring tiles meet in the middle of what they share (:func:`qsr_plugin.data.spans.spans`), so that a result is
taken from the tile in whose interior it lies, and nothing is blended. The result is that of the whole image where the
overlap is at least the receptive field of the network; with less, values next to a seam differ by what the missing
surroundings matter. If no overlap is given, it is measured how far they do (:attr:`Engine.reach`). Networks that look
at the whole image (attention to channels, bits chosen by content, windows that start elsewhere) differ in any case, and
so do networks of several depths that share the tiles: where two of them meet, a seam may show.
"""

from __future__ import annotations

import logging
import os
from itertools import product

import numpy as np

from qsr_plugin.data.spans import Patch, spans
from qsr_plugin.deploy.context import WIDE
from qsr_plugin.deploy.engine import Engine
from qsr_plugin.deploy.routing import in_groups
from qsr_plugin.errors import UserError
from qsr_plugin.memory import free_memory
from qsr_plugin.progress import Progress, no_progress

#: Side of a tile in input pixels, where nothing else is said.
TILE = 192
#: Tiles are not made smaller than this when memory runs out.
SMALLEST = 32
_WHOLE = 512 * 512  # input pixels up to which an image is not cut
#: Bytes per pixel of the result where the network is not known: 64 channels, before and after a pixel shuffle.
_USUAL = 2 * 64 * 4
_EXHAUSTED = ("out of memory", "bad_alloc", "failed to allocate", "can't allocate", "not enough memory")

logger = logging.getLogger("qsr_plugin")


def default_tile(engine: Engine, height: int, width: int) -> int | None:
    """Side of the tiles an image is cut into if the user does not say: :data:`TILE`, or ``None`` for the whole image.

    An image stays whole up to 512 x 512 pixels, if input and output of the largest layer take at most half of the free
    memory; processes that ``torchrun`` started on this computer share what is free.
    """
    if engine.fixed is not None:
        return None
    needed = (engine.pixel_bytes or _USUAL * engine.scale**2) * height * width
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if engine.device == "cpu" else 1
    small = height * width <= _WHOLE and 2 * needed <= free_memory(engine.device) / processes
    return None if small else TILE


def default_overlap(engine: Engine, side: int) -> int:
    """Overlap of tiles of a side if the user does not say: what the network sees to both sides, at most half a tile."""
    try:
        overlap = WIDE if engine.reach is None else 2 * engine.reach
    except Exception as error:  # each runtime has kinds of its own
        if not out_of_memory(error):
            raise
        overlap = WIDE
    return min(overlap, side // 2)


def check_tiles(engine: Engine, tile: int | None, overlap: int | None, batch: int = 1) -> None:
    """Refuse impossible tiles, before work is done.

    Raises:
        UserError: For a tile of another size than a model of fixed size takes, an overlap that is not less than the
            tile, or a batch below 1.
    """
    if engine.fixed is not None and tile is not None and engine.fixed != (tile, tile):
        raise UserError(
            f"tile is {tile}, but this model takes {engine.fixed[0]}x{engine.fixed[1]} pixels only: leave the tile "
            "out, or export the model with another --input-size"
        )
    if tile is not None and tile < engine.minimum:
        raise UserError(f"tile is {tile}; this model takes {engine.minimum} pixel(s) to a side or more")
    side = min(engine.fixed) if engine.fixed is not None else tile
    if overlap is not None and (overlap < 0 or (side is not None and overlap >= side)):
        allowed = "0 or more" if side is None else f"0 to {side - 1} with tiles of {side} pixels"
        raise UserError(f"overlap is {overlap}; it must be {allowed}")
    if batch < 1:
        raise UserError(f"batch is {batch}; it must be 1 or more")


def upscale_tiled(
    engine: Engine,
    image: np.ndarray,
    tile: int | None,
    overlap: int | None = None,
    batch: int = 1,
    *,
    dtype: type[np.unsignedinteger] = np.uint8,
    progress: Progress = no_progress,
) -> np.ndarray:
    """Enlarge one image tile by tile.

    In memory are the image, the result and one batch of tiles. If memory runs out, first the batches are halved, then
    the tiles, down to :data:`SMALLEST`; the image is then begun again.

    Args:
        engine: Any; one of fixed size has tiles of this size.
        image: (H, W, 3) float32, RGB in [0, 1].
        tile: Side of a tile in input pixels; ``None`` for the whole image. All tiles of an image have one size, the
            last ones are moved back to end at the border.
        overlap: Pixels that neighbouring tiles share, at least; :func:`default_overlap` if not given.
        batch: Tiles that run together.
        dtype: ``np.uint8`` or ``np.uint16``.
        progress: Wraps the list of batches.

    Returns:
        (scale H, scale W, 3) RGB of ``dtype``, clipped and rounded to its full range.

    Raises:
        UserError: For impossible tiles, if memory does not even suffice for the smallest ones, or if the output holds
            NaN or infinity.
    """
    check_tiles(engine, tile, overlap, batch)
    whole = max(image.shape[:2])
    while True:
        side = min(tile or whole, whole)
        size = engine.fixed or (side, side)
        cut = image.shape[0] > size[0] or image.shape[1] > size[1]
        shared = overlap if overlap is not None else default_overlap(engine, min(size)) if cut else 0
        try:
            return _run(engine, image, size, min(shared, min(size) - 1), batch, dtype, progress)
        except Exception as error:  # each runtime has kinds of its own
            if not out_of_memory(error):
                raise
            smaller = max(side // 2, SMALLEST)
            if batch > 1:
                batch //= 2
            elif engine.fixed is None and (overlap or 0) < smaller < side:
                tile = smaller
            else:
                raise UserError(
                    f"out of memory even with one tile of {size[0]}x{size[1]} pixels at a time and overlap {shared}: "
                    "free some memory, or take a smaller network, fewer threads or less overlap"
                ) from None
        logger.warning(
            "out of memory: going on with tiles of %d pixels, %d at a time", min(tile or whole, whole), batch
        )


def out_of_memory(error: Exception) -> bool:
    """Whether an error of any engine says that memory ran out."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _EXHAUSTED)


def _run(
    engine: Engine,
    image: np.ndarray,
    size: tuple[int, int],
    overlap: int,
    batch: int,
    dtype: type[np.unsignedinteger],
    progress: Progress,
) -> np.ndarray:
    height, width, channels = image.shape
    patches = [Patch(y, x) for y, x in product(spans(height, size[0], overlap), spans(width, size[1], overlap))]
    planes = image.transpose(2, 0, 1)
    out = np.empty((engine.scale * height, engine.scale * width, channels), dtype)
    told = f"tiles of {size[0]}x{size[1]}, {overlap} shared" if len(patches) > 1 else "tiles"
    for own, together in progress(in_groups(engine, patches, planes, batch), told):
        results = own(np.stack([patch.of(planes) for patch in together]))
        for patch, result in zip(together, results):
            _place(out, patch, result, engine.scale)
    return out


def _place(out: np.ndarray, patch: Patch, result: np.ndarray, scale: int) -> None:
    """Quantize what the image takes from the result of a tile, (3, h, w), into (H, W, 3)."""
    into, taken = [], []
    for span in patch:
        into.append(slice(scale * span.keep_from, scale * span.keep_to))
        taken.append(slice(scale * (span.keep_from - span.start), scale * (span.keep_to - span.start)))
    kept = result[:, taken[0], taken[1]]
    if not np.isfinite(kept).all():
        raise UserError("the output holds NaN or infinity: the model is damaged, or its ranges are; make it again")
    full = np.iinfo(out.dtype).max
    out[into[0], into[1]] = np.rint(kept.clip(0, 1) * np.float32(full)).transpose(1, 2, 0)
