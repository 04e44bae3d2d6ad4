"""Loss that keeps gates neutral before they take part (DDTB, Zhong et al., ECCV 2022)."""

from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor

from qsr_plugin.losses.context import StepContext, StepLoss
from qsr_plugin.methods.ddtb_gate import GATE_LOGITS


@LOSS_REGISTRY.register()
class GateLoss(StepLoss):
    """Mean over gates of the mean square of their logits, which draws the factors of all bounds to one.

    Gates show their logits while they are trained beside static bounds. Where they rescale the bounds, and in networks
    without gates, the loss is 0 and has no gradient.

    Args:
        loss_weight: Factor. The published 1 goes with an L1 loss on pixels in 0..255; with pixels in 0..1 the same
            balance is 1 / 255.
    """

    def __init__(self, loss_weight: float = 1 / 255) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, step: StepContext) -> Tensor:
        """The weighted loss of one training step."""
        shown = step.record.signals.get(GATE_LOGITS)
        if not shown:
            return torch.zeros((), device=step.output.device)
        return self.loss_weight * torch.stack([logits.square().mean() for logits in shown.values()]).mean()
