"""Bit regularization: what a network pays for bits beyond its target (Hong and Lee, CVPR 2024, AdaBM, Sec. 3.3)."""

from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor

from qsr_plugin.losses.context import StepContext, StepLoss
from qsr_plugin.quant.reduce import mean_over_ranks


@LOSS_REGISTRY.register()
class BitLoss(StepLoss):
    """``loss_weight * max(b - target_bits, 0)`` with ``b`` the mean bit width of a batch.

    The mean runs over the places whose bits a policy chooses, then over the images; places of fixed bits do not count.
    Without such places the loss is 0. The images are those of all processes of a distributed run, which so equals one
    process on the joint batch.

    Args:
        target_bits: Bit width above which bits cost; that of the bit policy if not given. A recipe refuses one below
            its smallest candidate, which no network could reach.
        loss_weight: Factor. The published 50 goes with losses of pixels in 0..255; with pixels in 0..1 the same balance
            is 50 / 255.
    """

    def __init__(self, target_bits: float | None = None, loss_weight: float = 50 / 255) -> None:
        super().__init__()
        self.target_bits, self.loss_weight = target_bits, loss_weight

    def forward(self, step: StepContext) -> Tensor:
        """The weighted loss of one training step."""
        record = step.record
        chosen = [bits.to(step.output.dtype) for bits in record.bits.values() if isinstance(bits, Tensor)]
        target = self.target_bits
        if target is None and record.policy is not None:
            target = record.policy.target_bits
        if not chosen:
            return step.output.new_zeros(())
        if target is None:
            raise RuntimeError("BitLoss: the bit policy of this network has no target: give the loss target_bits")
        bits = torch.stack(chosen)
        own = bits.sum()  # a sum of whole numbers is exact, so that a joint mean at the target is found there
        joint = own + (mean_over_ranks(own.detach()) - own.detach())
        excess = joint / bits.numel() - target
        return self.loss_weight * torch.maximum(excess, torch.zeros_like(excess))  # at the target, half of the slope
