"""The gate of DDTB (Zhong et al., ECCV 2022, Sec. 3.3): two factors per image for the bounds of an activation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsr_plugin.quant.observers import Observer, minmax, percentile
from qsr_plugin.quant.ops import TINY_RANGE, fake_quantize

#: Kind of the signal that gates show to :class:`~qsr_plugin.losses.gate_loss.GateLoss`.
GATE_LOGITS = "gate_logits"
#: A gated range is never narrower than this share of the trained one.
LEAST_SHARE = 1e-3


def apart(lower: Tensor, upper: Tensor) -> Tensor:
    """The upper bound, moved up where it is not far enough above the lower one for float32."""
    return torch.maximum(upper, lower + (TINY_RANGE + 1e-6 * lower.abs()))


def rescale(lower: Tensor, upper: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of each image from its logits ``(N, 2)``: ``2 sigmoid`` of them times the trained bounds.

    Bounds of one sign can change places (0.4 x 1.0 is below 1.5 x 0.5), which no projection of a parameter prevents;
    the upper one then stays a thousandth of the trained range above the lower one, and what float32 can tell apart.
    """
    factors = 2.0 * logits.sigmoid()
    low, high = factors[:, 1] * lower, factors[:, 0] * upper
    return low, apart(low, torch.maximum(high, low + LEAST_SHARE * (upper - lower).detach()))


class BoundsObserver(Observer):
    """Two quantiles, and how much the extremes vary from batch to batch: where a gate is worth it.

    Args:
        alpha: Upper quantile; the lower one is ``1 - alpha``.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__(lambda x: percentile(x, alpha), "mean")
        self._extremes: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Take one batch into account."""
        super().update(x)
        self._extremes.append(torch.stack(minmax(x)))

    def score(self) -> float:
        """Variance of the largest plus variance of the smallest values; 0 for a single batch."""
        return float(torch.stack(self._extremes).var(0).sum()) if len(self._extremes) > 1 else 0.0


class Gate(nn.Module):
    """Two linear layers of 2 bits that turn the channel means of an image into logits of its two range factors.

    ``quantize - C x 32 weights - batch norm - ReLU - quantize - 32 x 2 weights``. Weights are ternary. Activations are
    quantized between their smallest and largest value: those of each image, with a straight-through gradient; or, as
    released, those of the whole batch and without a gradient, so that only the last layer learns and images of a batch
    see each other. A layer is written as products and sums, which autocast and TF32 leave in full precision.

    Batch norm uses the statistics of the batch of its own process, and its running ones for a batch of one image, of
    which there is no variance.

    Args:
        channels: Channels C of the tensor at this place.
        released: As released instead of the default.
    """

    HIDDEN, BITS = 32, 2

    def __init__(self, channels: int, released: bool) -> None:
        super().__init__()
        self.released = released
        draw = torch.Generator().manual_seed(0)  # equal in every process and in the copy that averages
        self.squeeze = nn.Parameter(_uniform(self.HIDDEN, channels, draw))
        self.norm = nn.BatchNorm1d(self.HIDDEN)
        self.decide = nn.Parameter(_uniform(2, self.HIDDEN, draw))

    def forward(self, x: Tensor, channel_axis: int, images: int) -> Tensor:
        """Logits ``(N, 2)`` of an image's factors for the upper and the lower bound.

        Args:
            x: Activation with C channels; its first axis holds the N images, or the windows of one after the other. No
                gradient goes back to it.
            channel_axis: Axis of the channels.
            images: N.
        """
        features = x.detach().movedim(channel_axis, 1)
        means = features.reshape(*features.shape[:2], -1).mean(2, dtype=self.squeeze.dtype)
        context = means.reshape(images, -1, means.shape[1]).mean(1)
        hidden = self._layer(context, self.squeeze)
        norm = self.norm
        if self.training and images == 1:
            known = norm.running_mean, norm.running_var, norm.weight, norm.bias
            hidden = F.batch_norm(hidden, *known, training=False, eps=norm.eps)
        else:
            hidden = norm(hidden)
        return self._layer(hidden.relu(), self.decide)

    def _layer(self, x: Tensor, weight: Tensor) -> Tensor:
        weight = fake_quantize(weight, weight.detach().abs().amax().clamp_min(TINY_RANGE), 1.0)
        return (self.coarse(x).unsqueeze(1) * weight).sum(-1)

    def coarse(self, x: Tensor) -> Tensor:
        """``(N, C)`` quantized to 2 bits between its smallest and largest value; equal values stay as they are."""
        values = x.detach()
        lower, upper = values.aminmax() if self.released else values.aminmax(dim=1, keepdim=True)
        span, steps = apart(lower, upper) - lower, 2.0**self.BITS - 1.0
        shift = -((steps / span * lower).round() + 2.0 ** (self.BITS - 1))
        return fake_quantize(values if self.released else x, span, steps, shift=shift)

    def idle_parameters(self) -> list[nn.Parameter]:
        """Those that no gradient reaches."""
        return [self.squeeze, self.norm.weight, self.norm.bias] if self.released else []

    def storage_bits(self) -> int:
        """Weights of 2 bits in whole bytes with a 32-bit step each, and the four vectors of the batch norm."""
        packed = sum(math.ceil(w.numel() * self.BITS / 8) * 8 + 32 for w in (self.squeeze, self.decide))
        return packed + 4 * 32 * self.HIDDEN


def _uniform(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    """The usual start of a 1x1 convolution: uniform up to one over the root of its inputs."""
    return torch.empty(rows, columns).uniform_(-1, 1, generator=draw) / math.sqrt(columns)
