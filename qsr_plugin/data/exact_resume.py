"""Data order and augmentation that depend on seed and position only, so that a resumed run sees the same batches.

The host restarts the interrupted epoch from its first image and reseeds its workers. Here the sampler hands out each
index together with a seed of its own and can start anywhere in an epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from basicsr.data.data_sampler import EnlargedSampler
from torch.utils.data import Dataset


class SeededIndex(int):
    """A dataset index that carries the seed for the random choices made on it."""

    seed: int


class ResumableSampler(EnlargedSampler):
    """The host's sampler with seeded indices and a starting point.

    Attributes:
        manual_seed: Seed of the run.
        start: ``(epoch, samples)``: in that epoch, so many samples of this process are left out.
    """

    manual_seed: int = 0
    start: tuple[int, int] = (0, 0)

    def __iter__(self) -> Iterator[SeededIndex]:
        epoch, skipped = self.start
        indices = list(super().__iter__())
        for position in range(skipped if self.epoch == epoch else 0, len(indices)):
            index = SeededIndex(indices[position])
            place = position * self.num_replicas + self.rank
            seeds = np.random.SeedSequence([self.manual_seed, self.epoch, place]).generate_state(1)
            index.seed = int(seeds[0])
            yield index


class SeededDataset(Dataset):
    """A dataset whose random choices follow the seeds of :class:`SeededIndex`.

    Args:
        dataset: Any dataset of the host that draws from ``random``, ``numpy.random`` or torch's default generator.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.opt = dataset.opt

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        seed = getattr(index, "seed", None)
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        return self.dataset[int(index)]
