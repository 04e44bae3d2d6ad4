"""Losses on features at unit length, image by image: those of post-training methods that tune ranges alone.

They compare what residual blocks give, so only the direction of a feature counts, not its size; they say how far apart
two directions are, and the same in all networks.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor
from torch.nn import functional as F

from qsr_plugin.losses.context import StepContext, StepLoss


def unit_gaps(student: Tensor, teacher: Tensor) -> Tensor:
    """Differences of features after each image's are divided by their Euclidean norm (at least 1e-12).

    Args:
        student: ``(N, ...)``, any range.
        teacher: Of the same shape; gets no gradient.

    Returns:
        ``(N, D)``, rows of a length from 0 to 2.
    """
    return F.normalize(student.flatten(1), dim=1) - F.normalize(teacher.detach().flatten(1), dim=1)


@LOSS_REGISTRY.register()
class UnitFeatureLoss(StepLoss):
    """Distance of the features of student and teacher (PTQ4SR, Tu et al., CVPR 2023).

    ``loss_weight * sum_k | F_q^k / |F_q^k|_2 - F^k / |F^k|_2 |_2`` over the blocks k; the mean over the images.

    Args:
        loss_weight: Factor; 5 beside an L1 loss on pixels in 0..255 is 5 / 255 with pixels in 0..1.
        features: Role or ``module:port`` of the tensors that are compared; may be several modules.
    """

    needs_teacher = True

    def __init__(self, loss_weight: float = 5 / 255, features: str = "block:output") -> None:
        super().__init__()
        self.loss_weight, self.taps = loss_weight, (features,)

    def forward(self, step: StepContext) -> Tensor:
        """The weighted loss of one training step."""
        pairs = zip(step.record.tapped(self.taps[0]), step.teacher_record.tapped(self.taps[0]), strict=True)
        return self.loss_weight * sum(self.compare(student, teacher) for student, teacher in pairs)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss between two ``(N, ...)`` features without its weight; no gradient reaches the teacher's."""
        return torch.linalg.vector_norm(unit_gaps(student, teacher), dim=1).mean()


@LOSS_REGISTRY.register()
class UnitFeatureMSELoss(UnitFeatureLoss):
    """Mean squared difference of the features of student and teacher (2DQuant, Liu et al., NeurIPS 2024).

    ``loss_weight * sum_k (1 / CHW) | F_q^k / |F_q^k|_2 - F^k / |F^k|_2 |_2^2`` over the blocks k; the mean over the
    images. The norm is that of a whole image and has a gradient, as in the paper; in the authors' release it is that of
    each channel and has none, which makes the loss larger.

    Args:
        loss_weight: Factor; as published, beside a mean L1 loss on pixels in 0..1.
        features: Role or ``module:port`` of the tensors that are compared; may be several modules.
    """

    def __init__(self, loss_weight: float = 5.0, features: str = "block:output") -> None:
        super().__init__(loss_weight, features)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss between two ``(N, ...)`` features without its weight; no gradient reaches the teacher's."""
        return unit_gaps(student, teacher).square().mean()
