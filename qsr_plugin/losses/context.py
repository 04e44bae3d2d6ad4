"""What a quantization loss may look at in one training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from qsr_plugin.quant.record import ForwardRecord


@dataclass(frozen=True)
class StepContext:
    """One training step.

    Attributes:
        output: Super-resolved batch (N, 3, sH, sW), with graph.
        gt: Ground truth of the same shape.
        record: The quantized network's forward record.
        teacher_output: The teacher's result, or ``None`` if no loss asks for a teacher.
        teacher_record: The teacher's forward record, or ``None``.
        iteration: Which one it is, counted from 1.
    """

    output: Tensor
    gt: Tensor
    record: ForwardRecord
    teacher_output: Tensor | None = None
    teacher_record: ForwardRecord | None = None
    iteration: int = 1


class StepLoss(nn.Module):
    """Base of losses that need more than output and ground truth.

    Attributes:
        needs_teacher: The recipe's teacher is run on each batch as well.
        needs_pairs: The record keeps every tensor beside its quantized form.
        regularizer: In a recipe with ``cooperative``, one of the losses whose gradient is weighted.
        taps: Roles or ``module:port`` places whose tensors are wanted in the records.
    """

    needs_teacher: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = False
    regularizer: ClassVar[bool] = False
    taps: tuple[str, ...] = ()

    def forward(self, step: StepContext) -> Tensor:
        """The weighted loss, a 0-d tensor."""
        raise NotImplementedError
