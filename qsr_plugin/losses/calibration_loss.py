"""Calibration loss of fully quantized networks (Wang et al., ACM MM 2021, arXiv 2011.14265)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsr_plugin.losses.context import StepContext, StepLoss


@LOSS_REGISTRY.register()
class CalibrationLoss(StepLoss):
    """Sum over all quantizers, those of weights included, of the mean absolute quantization error ``mean|x - x_q|``.

    It is taken through the quantizers: an element inside its interval gets no gradient (that of ``x`` and that of
    ``x_q`` cancel), a clipped one is pulled towards the interval, and the interval towards what it clips.

    Args:
        loss_weight: Factor. The published 0.3 goes with an L1 loss on pixels in 0..255; with pixels in 0..1 the same
            balance is 0.3 / 255 where features have the published size: networks that compute on 0..255 or normalise
            by batch. For others on 0..1, whose features are 255 times smaller, it is 0.3.
    """

    needs_pairs = True

    def __init__(self, loss_weight: float = 0.3 / 255) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, step: StepContext) -> Tensor:
        """The weighted loss of one training step.

        Raises:
            RuntimeError: If the record did not keep pairs.
        """
        if not step.record.keep_pairs:
            raise RuntimeError("CalibrationLoss: no quantized tensor was recorded: set net.keep_pairs = True first")
        return self.error(step.record.pairs.values()) if step.record.pairs else step.output.new_zeros(())

    def error(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """The weighted loss of ``(tensor, quantized tensor)`` pairs of any shapes, a 0-d tensor."""
        return self.loss_weight * sum(_MeanDistance.apply(x.float(), quantized.float()) for x, quantized in pairs)


class _MeanDistance(torch.autograd.Function):
    """``mean|a - b|`` in half of the passes over memory that the composed form takes; the pairs are a network's all."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        distance = a - b
        total = torch.linalg.vector_norm(distance, 1)
        ctx.save_for_backward(distance.sign_())
        return total / a.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        (sign,) = ctx.saved_tensors
        slope = sign * (grad / sign.numel())
        return slope, -slope
