"""RDN (Zhang et al., CVPR 2018, arXiv 1802.08797): residual dense network."""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """A convolution with ReLU whose result is appended to its input.

    Args:
        num_in: Input channels.
        num_grow_ch: Channels that are appended.
    """

    def __init__(self, num_in: int, num_grow_ch: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(num_in, num_grow_ch, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in, H, W) to (N, num_in + num_grow_ch, H, W)."""
        return torch.cat((x, self.conv(x)), 1)


class ResidualDenseBlock(nn.Module):
    """Dense layers, a 1x1 convolution on all of them (local feature fusion), plus the identity.

    Args:
        num_feat: Channels.
        num_grow_ch: Channels that a layer appends.
        num_layer: Dense layers.
    """

    def __init__(self, num_feat: int, num_grow_ch: int, num_layer: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(DenseLayer(num_feat + n * num_grow_ch, num_grow_ch) for n in range(num_layer)))
        self.LFF = nn.Conv2d(num_feat + num_layer * num_grow_ch, num_feat, 1)

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the identity, (N, num_feat, H, W)."""
        return self.LFF(self.convs(x))

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same shape."""
        return x + self.branch(x)


@ARCH_REGISTRY.register(suffix="qsr")
class RDN(nn.Module):
    """RDN for scale 2, 3 or 4; keys are those of the PyTorch release of EDSR's authors' code base.

    The defaults are the network of 16 blocks of 8 layers that quantization papers use (22.3 million parameters at x4).

    Args:
        num_in_ch: Input channels.
        num_out_ch: Output channels.
        num_feat: Feature channels.
        num_block: Residual dense blocks.
        num_layer: Dense layers in a block.
        num_grow_ch: Channels that a dense layer appends; also those of the upsampler.
        upscale: 2, 3 or 4.
        img_range: The network's own values are image values times this; that code base trains on 0 to 255.

    Raises:
        ValueError: For another scale.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        num_block: int = 16,
        num_layer: int = 8,
        num_grow_ch: int = 64,
        upscale: int = 4,
        img_range: float = 255.0,
    ) -> None:
        super().__init__()
        if upscale not in (2, 3, 4):
            raise ValueError(f"RDN: upscale is {upscale}; allowed are 2, 3 and 4")
        self.num_layer, self.upscale, self.img_range = num_layer, upscale, img_range
        self.SFENet1 = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        self.SFENet2 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.RDBs = nn.ModuleList(ResidualDenseBlock(num_feat, num_grow_ch, num_layer) for _ in range(num_block))
        self.GFF = nn.Sequential(
            nn.Conv2d(num_block * num_feat, num_feat, 1), nn.Conv2d(num_feat, num_feat, 3, padding=1)
        )
        layers: list[nn.Module] = []
        for factor in (2, 2) if upscale == 4 else (upscale,):
            num_in = num_grow_ch if layers else num_feat
            layers += [nn.Conv2d(num_in, num_grow_ch * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
        self.UPNet = nn.Sequential(*layers, nn.Conv2d(num_grow_ch, num_out_ch, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in_ch, H, W) in [0, 1] to (N, num_out_ch, upscale H, upscale W)."""
        first = self.SFENet1(x * self.img_range)
        features, outputs = self.SFENet2(first), []
        for block in self.RDBs:
            features = block(features)
            outputs.append(features)
        return self.UPNet(self.GFF(torch.cat(outputs, 1)) + first) / self.img_range
