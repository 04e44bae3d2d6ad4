"""RFDN (Liu et al., ECCVW 2020, arXiv 2009.11551): residual feature distillation network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from qsr_plugin.archs.attention_blocks import DeepSpatialAttention
from torch import Tensor, nn


class FeatureDistillationBlock(nn.Module):
    """Three shallow residual blocks, each beside a 1x1 convolution that keeps half of the channels; spatial attention.

    Args:
        num_feat: Channels, even.
        conv: Makes the convolutions that are not 1x1: input and output channels, kernel size, stride, padding.
        act: Makes the activation of the block.
        attention_act: Makes the activation of the spatial attention.
    """

    never_left_out = "it has no identity path, so it does not compute x + branch(x)"

    def __init__(
        self,
        num_feat: int,
        conv: Callable[..., nn.Module] = nn.Conv2d,
        act: Callable[[], nn.Module] = lambda: nn.LeakyReLU(0.05),
        attention_act: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        kept = num_feat // 2
        self.c1_d = nn.Conv2d(num_feat, kept, 1)
        self.c1_r = conv(num_feat, num_feat, 3, 1, 1)
        self.c2_d = nn.Conv2d(num_feat, kept, 1)
        self.c2_r = conv(num_feat, num_feat, 3, 1, 1)
        self.c3_d = nn.Conv2d(num_feat, kept, 1)
        self.c3_r = conv(num_feat, num_feat, 3, 1, 1)
        self.c4 = conv(num_feat, kept, 3, 1, 1)
        self.act = act()
        self.c5 = nn.Conv2d(kept * 4, num_feat, 1)
        self.esa = DeepSpatialAttention(num_feat, conv, attention_act)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same shape."""
        kept1 = self.act(self.c1_d(x))
        x = self.act(self.c1_r(x) + x)
        kept2 = self.act(self.c2_d(x))
        x = self.act(self.c2_r(x) + x)
        kept3 = self.act(self.c3_d(x))
        x = self.act(self.c3_r(x) + x)
        return self.esa(self.c5(torch.cat((kept1, kept2, kept3, self.act(self.c4(x))), 1)))


@ARCH_REGISTRY.register(suffix="qsr")
class RFDN(nn.Module):
    """RFDN for any integer scale; keys and default sizes are those of the public weights of the AIM 2020 challenge.

    Args:
        num_in_ch: Input channels.
        num_out_ch: Output channels.
        num_feat: Feature channels, even and at least 4.
        num_block: Blocks.
        upscale: Scale.
        img_range: The network's own values are image values times this; the published weights expect 255.

    Raises:
        ValueError: For other feature channels.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 50,
        num_block: int = 4,
        upscale: int = 4,
        img_range: float = 255.0,
    ) -> None:
        super().__init__()
        if num_feat % 2 or num_feat < 4:
            raise ValueError(f"RFDN: num_feat is {num_feat}; allowed are even numbers from 4 on")
        self.num_block, self.img_range = num_block, img_range
        self.fea_conv = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        for number in range(1, num_block + 1):
            self.add_module(f"B{number}", FeatureDistillationBlock(num_feat))
        self.c = nn.Sequential(nn.Conv2d(num_feat * num_block, num_feat, 1), nn.LeakyReLU(0.05))
        self.LR_conv = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(num_feat, num_out_ch * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in_ch, H, W) in [0, 1] to (N, num_out_ch, upscale H, upscale W)."""
        first = features = self.fea_conv(x * self.img_range)
        outputs = []
        for number in range(1, self.num_block + 1):
            features = self.get_submodule(f"B{number}")(features)
            outputs.append(features)
        return self.upsampler(self.LR_conv(self.c(torch.cat(outputs, 1))) + first) / self.img_range
