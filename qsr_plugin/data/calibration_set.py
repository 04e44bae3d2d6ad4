"""Calibration images of a training: a fixed random draw from the training set, or a folder."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import Tensor

from qsr_plugin.data.images import list_images, read_rgb, to_tensor, to_uint8
from qsr_plugin.data.resize import downscale
from qsr_plugin.quant.calibrate import image_batches, joined
from qsr_plugin.quant.schema import Calibration

logger = logging.getLogger("qsr_plugin")

#: Side in HR pixels of the crops that post-training methods calibrate on (Hong and Lee, CVPR 2024; 288 for RDN).
CROP = 384
#: Smaller images, in LR pixels, say nothing of the features of larger ones.
LEAST = 8
#: LR pixels on each side that the reducing kernel reaches, and one more.
_REACH = 3

Progress = Callable[[Sequence[Path]], Iterable[Path]]


def calibration_batches(opt: dict[str, Any], calibration: Calibration) -> Iterator[Tensor]:
    """LR batches for calibration; the same on every process and in every start of a run.

    Args:
        opt: The run's options: ``calibration_folder`` names a folder of LR images, of which the first are taken whole
            (only those of equal size share a batch); else images are drawn from ``datasets.train`` with its own
            cropping and augmentation.
        calibration: How many images, and how many per batch.

    Yields:
        ``(N, 3, H, W)`` tensors, RGB in [0, 1].

    Raises:
        ValueError: If there is neither a folder nor a training set.
    """
    folder = opt.get("calibration_folder")
    if folder:
        yield from joined(_limited(image_batches(folder), calibration.images), calibration.batch)
        return
    options = opt["datasets"].get("train")
    if options is None:
        raise ValueError(
            "calibration needs images: set calibration_folder to a folder of low-resolution images, or "
            "path.pretrain_network_g to a quantized checkpoint"
        )
    from basicsr.data import build_dataset

    states = random.getstate(), np.random.get_state()
    random.seed(0), np.random.seed(0)
    try:
        dataset = build_dataset(deepcopy(options))
        count = min(calibration.images, len(dataset))
        chosen = random.sample(range(len(dataset)), count)
        for start in range(0, count, calibration.batch):
            yield torch.stack([dataset[i]["lq"] for i in chosen[start : start + calibration.batch]])
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def crops_from_folder(
    folder: Union[str, Path],
    *,
    images: int,
    batch: int,
    scale: int = 1,
    side: int = 96,
    seed: int = 0,
    used: Optional[list[str]] = None,
    progress: Progress = iter,
) -> Iterator[Tensor]:
    """Random crops of a folder's images in batches, as post-training methods calibrate on.

    They are neither flipped nor turned, where Hong and Lee (CVPR 2024) do both. Files are read one at a time, and only
    their crops are kept. Where a side is shorter than a crop, all of it is used; crops of equal size share a batch. A
    file that cannot be used, or has less than :data:`LEAST` LR pixels, is told in a warning, and another one takes its
    place as long as there are more.

    Args:
        folder: Images of any sizes.
        images: How many files are drawn; all if there are fewer.
        batch: Crops per batch.
        scale: 1 for LR images; for HR photos the factor they are reduced by first.
        side: Side of a crop in LR pixels.
        seed: Seed of the draw of files and places.
        used: Is given the names of the files the crops are from.
        progress: Wraps the list of files, e.g. ``rich.progress.track``.

    Returns:
        ``(N, 3, h, w)`` tensors, RGB in [0, 1], made as they are asked for.

    Raises:
        ValueError: For a folder without images, or where none can be used.
    """
    return joined(
        _crops(folder, images, scale, side, random.Random(seed), [] if used is None else used, progress), batch
    )


def _crops(
    folder: Union[str, Path],
    images: int,
    scale: int,
    side: int,
    rng: random.Random,
    used: list[str],
    progress: Progress,
) -> Iterator[Tensor]:
    paths = list_images(folder)
    chosen = rng.sample(paths, min(images, len(paths)))
    spare = [path for path in paths if path not in set(chosen)] if len(chosen) < len(paths) else []
    bad: list[str] = []
    for path in chain(progress(chosen), _drawn(spare, rng)):
        if len(used) == len(chosen):
            break
        try:
            crop = _crop(path, scale, side, rng)
        except ValueError as error:
            bad.append(str(error))
            logger.warning("left out of the calibration: %s", error)
            continue
        used.append(path.name)
        yield crop
    if not used:
        raise ValueError(f"none of the {len(bad)} image(s) of {folder} can be used. The first: {bad[0]}")
    if bad:
        logger.warning("%d image(s) of %s left out, %d used", len(bad), folder, len(used))


def _drawn(paths: list[Path], rng: random.Random) -> Iterator[Path]:
    """All paths in random order, drawn when they are asked for."""
    while paths:
        yield paths.pop(rng.randrange(len(paths)))


def _crop(path: Path, scale: int, side: int, rng: random.Random) -> Tensor:
    """One crop ``(1, 3, h, w)`` of an image, or of what it is when reduced.

    Raises:
        ValueError: If the file cannot be read, or has sides of less than :data:`LEAST` LR pixels.
    """
    image = read_rgb(path)
    lengths = [length // scale for length in image.shape[:2]]
    if min(lengths) < LEAST:
        reduced = f", and {lengths[1]}x{lengths[0]} when reduced {scale} times" if scale > 1 else ""
        size = f"{image.shape[1]}x{image.shape[0]}{reduced}"
        raise ValueError(f"{path}: is {size}: too small to calibrate on, {LEAST}x{LEAST} are needed")
    height, width = (min(side, length) for length in lengths)
    top, left = rng.randint(0, lengths[0] - height), rng.randint(0, lengths[1] - width)
    if scale == 1:
        return to_tensor(image[top : top + height, left : left + width]).unsqueeze(0)
    # Pixels beyond the crop count as far as the kernel reaches; the rest of a large photo need not be reduced.
    first = [max(0, start - _REACH) for start in (top, left)]
    last = [min(length, start + size + _REACH) for length, start, size in zip(lengths, (top, left), (height, width))]
    part = image[first[0] * scale : last[0] * scale, first[1] * scale : last[1] * scale]
    top, left = top - first[0], left - first[1]
    reduced = downscale(to_uint8(part), scale)[top : top + height, left : left + width]
    return to_tensor(np.ascontiguousarray(reduced)).unsqueeze(0)


def _limited(batches: Iterator[Tensor], images: int) -> Iterator[Tensor]:
    """The first ``images`` batches of one image each."""
    for _, batch in zip(range(images), batches):
        yield batch
