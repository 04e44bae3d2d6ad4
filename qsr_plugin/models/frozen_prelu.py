"""PReLU whose slopes are not trained: the same values and gradients, with a backward that vectorises.

PyTorch's backward on a CPU computes the gradient of the slopes element by element, whether or not it is asked for. That
costs a tuning much of its time where many PReLUs are left alone (SRResNet).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _FixedSlopes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slopes):  # noqa: D102
        ctx.save_for_backward(x, slopes)
        return F.prelu(x, slopes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: D102
        x, slopes = ctx.saved_tensors
        above = torch.ops.aten.threshold_backward(grad, x, 0)
        per_channel = slopes.view(-1, *([1] * (x.dim() - 2))) if x.dim() > 2 else slopes
        return above.addcmul_(torch.sub(grad, above), per_channel), None  # one summand of each element is zero


class FrozenPReLU(nn.PReLU):
    """An ``nn.PReLU`` that trains none of its slopes."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (N, C, ...), below zero times the slope (of its channel)."""
        return _FixedSlopes.apply(x, self.weight)


def freeze_slopes(net: nn.Module) -> None:
    """Turn every PReLU that is no site into a :class:`FrozenPReLU`, in place; parameters and keys stay."""
    for module in net.modules():
        if type(module) is nn.PReLU:
            module.__class__ = FrozenPReLU
