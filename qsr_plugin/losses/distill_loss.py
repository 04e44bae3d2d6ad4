"""Distillation from the float teacher: structured knowledge transfer (PAMS, Li et al., ECCV 2020, Sec. 3.3)."""

from __future__ import annotations

from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor
from torch.nn import functional as F

from qsr_plugin.losses.context import StepContext, StepLoss


def energy_map(features: Tensor) -> Tensor:
    """Spatial energy of a feature tensor, of unit length per sample.

    Args:
        features: ``(N, C, H, W)``, any range.

    Returns:
        ``(N, H * W)``: the channel mean of the squares, divided by its Euclidean norm (at least 1e-12).
    """
    return F.normalize(features.square().mean(1).flatten(1), dim=1, eps=1e-12)


@LOSS_REGISTRY.register()
class SKTLoss(StepLoss):
    """Mean squared difference of the energy maps of student and teacher.

    Args:
        loss_weight: Factor. The published 1000 goes with an L1 loss on pixels in 0..255; with pixels in 0..1 the same
            balance is 1000 / 255.
        features: Role or ``module:port`` whose tensor is compared.
    """

    needs_teacher = True

    def __init__(self, loss_weight: float = 1000 / 255, features: str = "features") -> None:
        super().__init__()
        self.loss_weight, self.taps = loss_weight, (features,)

    def forward(self, step: StepContext) -> Tensor:
        """The weighted loss of one training step."""
        name = self.taps[0]
        return self.compare(step.record.taps[name], step.teacher_record.taps[name])

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The weighted loss between two ``(N, C, H, W)`` feature tensors; no gradient reaches the teacher's."""
        return self.loss_weight * F.mse_loss(energy_map(student), energy_map(teacher.detach()))
