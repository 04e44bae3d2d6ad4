"""BSRN (Li et al., CVPRW 2022, arXiv 2205.05996): blueprint separable residual network."""

from __future__ import annotations

from collections import OrderedDict

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from qsr_plugin.archs.attention_blocks import ContrastChannelAttention
from qsr_plugin.archs.rfdn_arch import FeatureDistillationBlock
from torch import Tensor, nn

#: How often the input image is repeated along the channels.
_COPIES = 4


class BlueprintConv(nn.Module):
    """Blueprint separable convolution: 1x1 without bias, then depthwise.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: Side of the depthwise kernel.
        stride: Of the depthwise convolution.
        padding: Of the depthwise convolution, with zeros.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, padding: int = 1
    ) -> None:
        super().__init__()
        self.pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.dw = nn.Conv2d(out_channels, out_channels, kernel_size, stride, padding, groups=out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H', W')."""
        return self.dw(self.pw(x))


class SeparableDistillationBlock(FeatureDistillationBlock):
    """RFDN's block with blueprint convolutions and GELU, then channel attention, plus the identity.

    Args:
        num_feat: Channels, even and at least 16.
    """

    never_left_out = ""  # unlike RFDN's, it has an identity path

    def __init__(self, num_feat: int) -> None:
        super().__init__(num_feat, BlueprintConv, nn.GELU, nn.GELU)
        self.cca = ContrastChannelAttention(num_feat)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same shape."""
        return self.cca(super().forward(x)) + x


@ARCH_REGISTRY.register(suffix="qsr")
class BSRN(nn.Module):
    """BSRN for any integer scale; keys are those of the published weights, inside their level ``params``.

    Args:
        num_in_ch: Input channels.
        num_out_ch: Output channels.
        num_feat: Feature channels, even and at least 16.
        num_block: Blocks.
        upscale: Scale.

    Raises:
        ValueError: For other feature channels.
    """

    def __init__(
        self, num_in_ch: int = 3, num_out_ch: int = 3, num_feat: int = 64, num_block: int = 8, upscale: int = 4
    ) -> None:
        super().__init__()
        if num_feat % 2 or num_feat < 16:
            raise ValueError(f"BSRN: num_feat is {num_feat}; allowed are even numbers from 16 on")
        self.num_block = num_block
        self.fea_conv = BlueprintConv(num_in_ch * _COPIES, num_feat)
        for number in range(1, num_block + 1):
            self.add_module(f"B{number}", SeparableDistillationBlock(num_feat))
        self.c1 = nn.Conv2d(num_feat * num_block, num_feat, 1)
        self.act = nn.GELU()
        self.c2 = BlueprintConv(num_feat, num_feat)
        one_step = nn.Sequential(nn.Conv2d(num_feat, num_out_ch * upscale**2, 3, padding=1), nn.PixelShuffle(upscale))
        self.upsampler = nn.Sequential(OrderedDict(upsampleOneStep=one_step))

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in_ch, H, W) in [0, 1] to (N, num_out_ch, upscale H, upscale W)."""
        first = features = self.fea_conv(torch.cat((x,) * _COPIES, 1))
        outputs = []
        for number in range(1, self.num_block + 1):
            features = self.get_submodule(f"B{number}")(features)
            outputs.append(features)
        return self.upsampler(self.c2(self.act(self.c1(torch.cat(outputs, 1)))) + first)
