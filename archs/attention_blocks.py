"""Attention blocks that several lightweight networks share.

Sources: enhanced spatial attention, Liu et al., CVPR 2020 (arXiv 2009.11551), reduced in RLFN (Kong et al., CVPRW 2022,
arXiv 2205.07514); contrast-aware channel attention, Hui et al. (IMDN), ACM MM 2019 (arXiv 1909.11856).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Side in pixels from which the strided convolution leaves enough for one window of the pooling.
_LEAST_SIDE = 15


class SpatialAttention(nn.Module):
    """Enhanced spatial attention in RLFN's form: one convolution on the pooled features.

    Features with a side below 15 pixels are extended by repeating their last row or column before the pooling, so that
    inputs of any size work.

    Args:
        num_feat: Channels.
        num_mid: Channels of the attention branch.
        conv: Makes the convolutions of the pooled part: input and output channels, kernel size, stride, padding.
    """

    def __init__(self, num_feat: int, num_mid: int, conv: Callable[..., nn.Module] = nn.Conv2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_feat, num_mid, 1)
        self.conv_f = nn.Conv2d(num_mid, num_mid, 1)
        self.conv2 = conv(num_mid, num_mid, 3, 2, 0)
        self.max_pool = nn.MaxPool2d(7, 3)
        self.conv3 = conv(num_mid, num_mid, 3, 1, 1)
        self.conv4 = nn.Conv2d(num_mid, num_feat, 1)

    def pooled_branch(self, x: Tensor) -> Tensor:
        """What is computed at the low resolution, (N, num_mid, h, w) to the same shape."""
        return self.conv3(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same shape, every value times a factor from 0 to 1."""
        reduced = self.conv1(x)
        pooled = self.pooled_branch(self.max_pool(self.conv2(_extended(reduced))))
        pooled = F.interpolate(pooled, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return x * torch.sigmoid(self.conv4(pooled + self.conv_f(reduced)))


class DeepSpatialAttention(SpatialAttention):
    """Enhanced spatial attention in its first form (RFDN, BSRN): three convolutions on the pooled features.

    Args:
        num_feat: Channels; a quarter of them, rounded down, are those of the attention branch.
        conv: See :class:`SpatialAttention`.
        act: Makes the activation between the three convolutions.
    """

    def __init__(
        self,
        num_feat: int,
        conv: Callable[..., nn.Module] = nn.Conv2d,
        act: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        num_mid = num_feat // 4
        super().__init__(num_feat, num_mid, conv)
        self.conv_max = conv(num_mid, num_mid, 3, 1, 1)
        self.conv3_ = conv(num_mid, num_mid, 3, 1, 1)
        self.act = act()

    def pooled_branch(self, x: Tensor) -> Tensor:
        """What is computed at the low resolution, (N, num_mid, h, w) to the same shape."""
        return self.conv3_(self.act(self.conv3(self.act(self.conv_max(x)))))


class ContrastChannelAttention(nn.Module):
    """Channel attention on mean plus standard deviation of every channel (IMDN, eq. 3).

    Args:
        num_feat: Channels.
        reduction: Factor between them and the channels of the hidden layer.
    """

    def __init__(self, num_feat: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = num_feat // reduction
        self.conv_du = nn.Sequential(
            nn.Conv2d(num_feat, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, num_feat, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same shape, every channel times a factor from 0 to 1."""
        mean = x.mean((2, 3), keepdim=True)
        variance = (x - mean).square().mean((2, 3), keepdim=True)
        varies = variance > 0  # the slope of a square root at 0 is infinite
        deviation = torch.where(varies, variance, 1).sqrt() * varies
        return x * self.conv_du(deviation + mean)


def _extended(x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    if height >= _LEAST_SIDE and width >= _LEAST_SIDE:
        return x
    return F.pad(x, (0, max(0, _LEAST_SIDE - width), 0, max(0, _LEAST_SIDE - height)), mode="replicate")
