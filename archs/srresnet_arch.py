"""SRResNet (Ledig et al., CVPR 2017, arXiv 1609.04802): the residual generator with batch norm and parametric ReLUs.

The host's ``MSRResNet`` drops the batch norm and the 9x9 ends; the quantization papers use this original form.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn


class ResidualBlockBN(nn.Module):
    """Conv - BN - PReLU - conv - BN plus the identity.

    Args:
        num_feat: Channels.
        bias: Whether the convolutions have a bias.
        bn_eps: Epsilon of the batch norms.
    """

    def __init__(self, num_feat: int, bias: bool, bn_eps: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_feat, num_feat, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(num_feat, eps=bn_eps)
        self.act = nn.PReLU(num_feat)
        self.conv2 = nn.Conv2d(num_feat, num_feat, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(num_feat, eps=bn_eps)

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the identity, (N, C, H, W)."""
        return self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return x + self.branch(x)


@ARCH_REGISTRY.register(suffix="qsr")
class SRResNet(nn.Module):
    """SRResNet for scale 2 or 4 with RGB in and out.

    Args:
        num_in_ch: Input channels.
        num_out_ch: Output channels.
        num_feat: Feature channels.
        num_block: Residual blocks.
        upscale: 2 or 4.
        bias: Whether the convolutions followed by a batch norm have a bias.
        bn_eps: Epsilon of the batch norms (1e-3 in networks trained with Keras, 1e-5 in PyTorch's default).
        output: ``tanh`` maps the last convolution to [0, 1] as ``(tanh(y) + 1) / 2``; ``linear`` returns it as it is.

    Raises:
        ValueError: For another scale or output.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        num_block: int = 16,
        upscale: int = 4,
        bias: bool = True,
        bn_eps: float = 1e-5,
        output: str = "linear",
    ) -> None:
        super().__init__()
        if upscale not in (2, 4):
            raise ValueError(f"SRResNet: upscale is {upscale}; allowed are 2 and 4")
        if output not in ("linear", "tanh"):
            raise ValueError(f"SRResNet: output is '{output}'; allowed are linear and tanh")
        self.upscale, self.output = upscale, output
        self.conv_first = nn.Conv2d(num_in_ch, num_feat, 9, padding=4)
        self.act_first = nn.PReLU(num_feat)
        self.body = nn.Sequential(*(ResidualBlockBN(num_feat, bias, bn_eps) for _ in range(num_block)))
        self.conv_body = nn.Conv2d(num_feat, num_feat, 3, padding=1, bias=bias)
        self.bn_body = nn.BatchNorm2d(num_feat, eps=bn_eps)
        self.upconv1 = nn.Conv2d(num_feat, num_feat * 4, 3, padding=1)
        self.up_act1 = nn.PReLU(num_feat)
        if upscale == 4:
            self.upconv2 = nn.Conv2d(num_feat, num_feat * 4, 3, padding=1)
            self.up_act2 = nn.PReLU(num_feat)
        self.pixel_shuffle = nn.PixelShuffle(2)
        self.conv_last = nn.Conv2d(num_feat, num_out_ch, 9, padding=4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in_ch, H, W) in [0, 1] to (N, num_out_ch, upscale H, upscale W)."""
        first = self.act_first(self.conv_first(x))
        features = self.bn_body(self.conv_body(self.body(first))) + first
        features = self.up_act1(self.pixel_shuffle(self.upconv1(features)))
        if self.upscale == 4:
            features = self.up_act2(self.pixel_shuffle(self.upconv2(features)))
        out = self.conv_last(features)
        return (torch.tanh(out) + 1) / 2 if self.output == "tanh" else out
