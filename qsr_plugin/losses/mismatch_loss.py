"""Mismatch between activations and their quantization grid (Hong and Lee, ECCV 2024, arXiv 2307.13337v2, Sec. 3.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsr_plugin.losses.context import StepContext, StepLoss
from qsr_plugin.quant.ops import grad_scale
from qsr_plugin.quant.reduce import sum_over_ranks, world_size

#: LR pixels in a batch of the published training: 8 crops of 48 x 48.
PUBLISHED_PIXELS = 8 * 48 * 48


@LOSS_REGISTRY.register()
class MismatchLoss(StepLoss):
    """Sum over all quantized activations of the Euclidean distance to their quantized form, ``sum_i ||X_i - q(X_i)||``.

    The norm runs over the whole batch, in a distributed run over that of all processes, and so grows with the root of
    the number of pixels; it is scaled to the batch of the published training, which its weight belongs to.

    Args:
        loss_weight: Factor. Published is 1e-5 (1e-6 for networks with densely connected blocks) beside an L1 loss on
            pixels in 0..255. With pixels in 0..1 the same balance is 1e-5 / 255 where features have the published size:
            networks that compute on 0..255 or normalise by batch or layer. For others on 0..1, whose features are 255
            times smaller, it is 1e-5.
        gradient: ``detach`` pulls every element to its grid point and leaves the ranges alone; ``ste`` goes through
            the quantizer, so that only clipped elements are pulled, and the ranges with them.
        reference_pixels: Pixels (batch x height x width) that the weight belongs to; ``None`` takes the norm as it is.
    """

    needs_pairs = True
    regularizer = True

    def __init__(
        self,
        loss_weight: float = 1e-5 / 255,
        gradient: Literal["detach", "ste"] = "detach",
        reference_pixels: int | None = PUBLISHED_PIXELS,
    ) -> None:
        super().__init__()
        if gradient not in ("detach", "ste"):
            raise TypeError(f"gradient is '{gradient}'; allowed are detach and ste")
        self.loss_weight, self.gradient, self.reference_pixels = loss_weight, gradient, reference_pixels

    def forward(self, step: StepContext) -> Tensor:
        """The weighted loss of one training step."""
        pairs = [pair for place, pair in step.record.pairs.items() if not place.endswith(".weight")]
        if not pairs:  # activations are float
            return step.output.new_zeros(())
        pixels = step.record.pixels * world_size()
        scale = 1.0 if self.reference_pixels is None else math.sqrt(self.reference_pixels / pixels)
        return self.loss_weight * scale * self.distance(pairs)

    def distance(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Sum of the distances of ``(tensor, quantized tensor)`` pairs, a 0-d tensor."""
        detach = self.gradient == "detach"
        local = torch.stack([_SquaredDistance.apply(x, q.detach() if detach else q) for x, q in pairs])
        joint = local + (sum_over_ranks(local.detach()) - local.detach())
        # Gradients of the processes are averaged, but each has its own elements of the joint norm: they must add up.
        return grad_scale(joint.add(1e-12).sqrt().sum(), world_size())


class _SquaredDistance(torch.autograd.Function):
    """``||x - y||^2`` with one pass in the backward."""

    @staticmethod
    def forward(ctx, x, y):  # noqa: D102
        difference = torch.sub(x, y).float()
        ctx.save_for_backward(difference)
        ctx.dtype = x.dtype
        flat = difference.flatten()
        return torch.dot(flat, flat)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: D102
        (difference,) = ctx.saved_tensors
        toward = (difference * (2.0 * grad)).to(ctx.dtype)
        return toward, -toward if ctx.needs_input_grad[1] else None
