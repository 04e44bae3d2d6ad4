"""Distillation from the recipe's teacher: its output, its features, and structured knowledge transfer.

Structured knowledge transfer is that of PAMS (Li et al., ECCV 2020, Sec. 3.3); the losses on the output and on blocks
are those of AdaBM (Hong and Lee, CVPR 2024) and need no ground truth.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor
from torch.nn import functional as F

from qsr_plugin.losses.context import StepContext, StepLoss
from qsr_plugin.quant.reduce import sum_over_ranks, world_size

#: Least squared norm that features are divided by.
LEAST_SQUARE = 1e-24


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


@LOSS_REGISTRY.register()
class BlockSKTLoss(SKTLoss):
    """Sum over the blocks of the mean squared difference of the energy maps (CADyQ, Hong et al., ECCV 2022).

    Args:
        loss_weight: Factor. The published 100 goes with an L1 loss on pixels in 0..255; with pixels in 0..1 the same
            balance is 100 / 255.
        features: Role or ``module:port`` of the tensors that are compared, one for each block; published is what the
            last convolution of a residual block gives, before it is scaled, normalised or quantized.
    """

    def __init__(self, loss_weight: float = 100 / 255, features: str = "block.conv_last:output") -> None:
        super().__init__(loss_weight, features)

    def forward(self, step: StepContext) -> Tensor:
        """The weighted loss of one training step."""
        pairs = zip(step.record.tapped(self.taps[0]), step.teacher_record.tapped(self.taps[0]), strict=True)
        return sum(self.compare(student, teacher) for student, teacher in pairs)


@LOSS_REGISTRY.register()
class TeacherLoss(StepLoss):
    """Mean absolute difference of the outputs of student and teacher.

    Args:
        loss_weight: Factor.
    """

    needs_teacher = True

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, step: StepContext) -> Tensor:
        """The weighted loss of one training step."""
        return self.loss_weight * F.l1_loss(step.output, step.teacher_output)


@LOSS_REGISTRY.register()
class BlockFeatureLoss(StepLoss):
    """Distance of the features of student and teacher behind each residual block.

    The features of a block are divided by their Euclidean norm over the whole batch. The loss is, with a distance over
    one image and the sum over N images and B blocks, ``loss_weight * (1 / N) * (1 / (N B)) * sum |F_q - F|_2``. The
    batch is that of all processes of a distributed run, each with the same number of images. (For RDN the authors'
    release divides by C H W as well, which leaves nothing of it; that is not done here.)

    Args:
        loss_weight: Factor. The published 10 goes with an L1 loss on pixels in 0..255; with pixels in 0..1 the same
            balance is 10 / 255.
        features: Role or ``module:port`` of the tensors that are compared; may be several modules.
    """

    needs_teacher = True

    def __init__(self, loss_weight: float = 10 / 255, features: str = "block:output") -> None:
        super().__init__()
        self.loss_weight, self.taps = loss_weight, (features,)

    def forward(self, step: StepContext) -> Tensor:
        """The weighted loss of one training step."""
        name = self.taps[0]
        return self.compare(step.record.tapped(name), step.teacher_record.tapped(name))

    def compare(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The weighted loss between the ``(N, C, H, W)`` features of B blocks; no gradient reaches the teacher's.

        Mean over processes of what it returns, and of its gradients, is the loss of the joint batch and its gradient.
        """
        teacher = [features.detach() for features in teacher]
        scales = _joint_norms(student, teacher)
        gaps = [one / a - other / b for one, other, a, b in zip(student, teacher, *scales)]
        distances = torch.stack([torch.linalg.vector_norm(gap.flatten(1), dim=1) for gap in gaps])
        total = distances.sum()
        if world_size() > 1:
            total = total + _pull_of_others(student, scales[0], gaps, distances)
        return self.loss_weight * total / distances.numel() / (distances.shape[1] * world_size())


def _joint_norms(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """``(2, B)`` Euclidean norms over the joint batch, with the gradient of this process's elements."""
    own = torch.stack([torch.linalg.vector_norm(features) for features in (*student, *teacher)]).view(2, -1)
    squares = own.detach().square()
    others = (sum_over_ranks(squares) - squares).clamp_min(LEAST_SQUARE)
    return torch.hypot(own, others.sqrt())


def _pull_of_others(student: list[Tensor], scales: Tensor, gaps: list[Tensor], distances: Tensor) -> Tensor:
    """A zero with the gradient that the distances of all other processes have through the student's joint norms.

    Args:
        student: Features of B blocks, ``(N, C, H, W)``.
        scales: ``(B,)`` joint norms of them.
        gaps: Their differences from the teacher's at unit length.
        distances: ``(B, N)`` norms of the gaps.
    """
    with torch.no_grad():
        products = torch.stack([(gap * one).flatten(1).sum(1) for gap, one in zip(gaps, student)])
        # What all distances of a block change by, per relative change of its norm.
        own = -(products / distances.clamp_min(LEAST_SQUARE**0.5)).sum(1) / scales
        slopes = sum_over_ranks(own) - own
    return (slopes * (scales / scales.detach() - 1)).sum()
