"""Weighted bit loss (Hong et al., ECCV 2022, CADyQ, Sec. 3.3; schedule from supplement S6)."""

from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor

from qsr_plugin.losses.context import StepContext, StepLoss
from qsr_plugin.quant.policy import EXPECTED_BITS
from qsr_plugin.quant.reduce import world_size


@LOSS_REGISTRY.register()
class WeightedBitLoss(StepLoss):
    """``w(e) * sum of bits / stop(expected bits)`` over the images of a batch and the places with a learned choice.

    With the gradient of the expected bits, a relative saving is worth the same everywhere, so places of few bits are
    pushed harder. The weight grows by epochs, ``w(e) = start + step * e`` with e = 1 in the first.

    The sum grows with the batch; it is scaled to the published batch, which the weights belong to. A distributed run
    equals one process on the joint batch.

    Args:
        start: Weight before the first epoch. The published 1e-4 goes with an L1 loss on pixels in 0..255; with pixels
            in 0..1 the same balance is 1e-4 / 255.
        step: What each epoch adds to it; published is 1e-6, so 1e-6 / 255.
        iterations_per_epoch: Length of an epoch in iterations; the authors' release has 1000, their supplement 100.
        reference_images: Images per batch that the weights belong to; ``None`` takes the sum as it is.
    """

    def __init__(
        self,
        start: float = 1e-4 / 255,
        step: float = 1e-6 / 255,
        iterations_per_epoch: int = 1000,
        reference_images: int | None = 16,
    ) -> None:
        super().__init__()
        if iterations_per_epoch < 1:
            raise TypeError(f"iterations_per_epoch is {iterations_per_epoch}; give 1 or more")
        self.start, self.step, self.reference_images = start, step, reference_images
        self.iterations_per_epoch = iterations_per_epoch

    def weight(self, iteration: int) -> float:
        """``w(e)`` of an iteration, counted from 1."""
        return self.start + self.step * (1 + (iteration - 1) // self.iterations_per_epoch)

    def forward(self, step: StepContext) -> Tensor:
        """The weighted loss of one training step; 0 where no choice is being learned."""
        record = step.record
        expected = record.signals.get(EXPECTED_BITS)
        if not expected:
            return step.output.new_zeros(())
        bits = torch.stack([record.bits[place] for place in expected])
        relative = (bits / torch.stack(list(expected.values())).detach()).sum()
        # Gradients of the processes are averaged: as they are for a mean over images, to be added up for a sum.
        scale = world_size() if self.reference_images is None else self.reference_images / record.images
        return self.weight(step.iteration) * scale * relative
