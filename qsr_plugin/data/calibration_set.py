"""Calibration images of a training: a fixed random draw from the training set, or a folder."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

from qsr_plugin.data.images import list_images, read_rgb, to_tensor, to_uint8
from qsr_plugin.data.resize import downscale
from qsr_plugin.quant.calibrate import image_batches, joined
from qsr_plugin.quant.schema import Calibration

#: Side in HR pixels of the crops that post-training methods calibrate on (Hong and Lee, CVPR 2024).
CROP = 384


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
    folder: Union[str, Path], *, images: int, batch: int, scale: int = 1, side: int = 96, seed: int = 0
) -> Iterator[Tensor]:
    """Random crops of a folder's images in batches, as post-training methods calibrate on.

    They are neither flipped nor turned, where Hong and Lee (CVPR 2024) do both. Files are read one at a time. Where a
    side is shorter than a crop, all of it is used; only crops of equal size share a batch.

    Args:
        folder: Images of any sizes.
        images: How many files are drawn; all if there are fewer.
        batch: Crops per batch.
        scale: 1 for LR images; for HR photos the factor they are reduced by first.
        side: Side of a crop in LR pixels.
        seed: Seed of the draw of files and places.

    Returns:
        ``(N, 3, h, w)`` tensors, RGB in [0, 1], made as they are asked for.

    Raises:
        ValueError: For an empty folder or an unreadable image.
    """
    return joined(_crops(folder, images, scale, side, random.Random(seed)), batch)


def _crops(folder: Union[str, Path], images: int, scale: int, side: int, rng: random.Random) -> Iterator[Tensor]:
    paths = list_images(folder)
    for path in rng.sample(paths, min(images, len(paths))):
        image = read_rgb(path)
        if scale > 1:
            height, width = (length - length % scale for length in image.shape[:2])
            image = downscale(to_uint8(image[:height, :width]), scale)
        height, width = (min(side, length) for length in image.shape[:2])
        top, left = rng.randint(0, image.shape[0] - height), rng.randint(0, image.shape[1] - width)
        yield to_tensor(np.ascontiguousarray(image[top : top + height, left : left + width])).unsqueeze(0)


def _limited(batches: Iterator[Tensor], images: int) -> Iterator[Tensor]:
    """The first ``images`` batches of one image each."""
    for _, batch in zip(range(images), batches):
        yield batch
