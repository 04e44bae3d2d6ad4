"""IMDN (Hui et al., ACM MM 2019, arXiv 1909.11856): information multi-distillation network."""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from qsr_plugin.archs.attention_blocks import ContrastChannelAttention
from torch import Tensor, nn


class MultiDistillationBlock(nn.Module):
    """Four convolutions; each of the first three keeps a quarter of its channels and passes on the others.

    Args:
        num_feat: Channels, a multiple of 4.
    """

    def __init__(self, num_feat: int) -> None:
        super().__init__()
        kept = num_feat // 4
        self.sizes = (kept, num_feat - kept)
        self.c1 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.c2 = nn.Conv2d(num_feat - kept, num_feat, 3, padding=1)
        self.c3 = nn.Conv2d(num_feat - kept, num_feat, 3, padding=1)
        self.c4 = nn.Conv2d(num_feat - kept, kept, 3, padding=1)
        self.act = nn.LeakyReLU(0.05)
        self.c5 = nn.Conv2d(kept * 4, num_feat, 1)
        self.cca = ContrastChannelAttention(kept * 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same shape."""
        kept1, rest = self.act(self.c1(x)).split(self.sizes, 1)
        kept2, rest = self.act(self.c2(rest)).split(self.sizes, 1)
        kept3, rest = self.act(self.c3(rest)).split(self.sizes, 1)
        joined = torch.cat((kept1, kept2, kept3, self.c4(rest)), 1)
        return self.c5(self.cca(joined)) + x


@ARCH_REGISTRY.register(suffix="qsr")
class IMDN(nn.Module):
    """IMDN for any integer scale; keys are those of the published weights.

    Args:
        num_in_ch: Input channels.
        num_out_ch: Output channels.
        num_feat: Feature channels, a multiple of 4 and at least 16.
        num_block: Blocks.
        upscale: Scale.

    Raises:
        ValueError: For other feature channels.
    """

    def __init__(
        self, num_in_ch: int = 3, num_out_ch: int = 3, num_feat: int = 64, num_block: int = 6, upscale: int = 4
    ) -> None:
        super().__init__()
        if num_feat % 4 or num_feat < 16:
            raise ValueError(f"IMDN: num_feat is {num_feat}; allowed are multiples of 4 from 16 on")
        self.num_block = num_block
        self.fea_conv = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        for number in range(1, num_block + 1):
            self.add_module(f"IMDB{number}", MultiDistillationBlock(num_feat))
        self.c = nn.Sequential(nn.Conv2d(num_feat * num_block, num_feat, 1), nn.LeakyReLU(0.05))
        self.LR_conv = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(num_feat, num_out_ch * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in_ch, H, W) in [0, 1] to (N, num_out_ch, upscale H, upscale W)."""
        first = features = self.fea_conv(x)
        outputs = []
        for number in range(1, self.num_block + 1):
            features = self.get_submodule(f"IMDB{number}")(features)
            outputs.append(features)
        return self.upsampler(self.LR_conv(self.c(torch.cat(outputs, 1))) + first)
