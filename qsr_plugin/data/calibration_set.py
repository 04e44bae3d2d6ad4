"""Calibration images of a training: a fixed random draw from the training set, or a folder."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsr_plugin.quant.calibrate import image_batches
from qsr_plugin.quant.recipe import Calibration


def calibration_batches(opt: dict[str, Any], calibration: Calibration) -> Iterator[Tensor]:
    """LR batches for calibration; the same on every process and in every start of a run.

    Args:
        opt: The run's options: ``calibration_folder`` names a folder of LR images; else images are drawn from
            ``datasets.train`` with its own cropping and augmentation.
        calibration: How many images, and how many per batch.

    Yields:
        ``(N, 3, H, W)`` tensors, RGB in [0, 1].

    Raises:
        ValueError: If there is neither a folder nor a training set.
    """
    folder = opt.get("calibration_folder")
    if folder:
        yield from _limited(image_batches(folder), calibration.images)
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


def _limited(batches: Iterator[Tensor], images: int) -> Iterator[Tensor]:
    """The first ``images`` batches of one image each."""
    for _, batch in zip(range(images), batches):
        yield batch
