"""RLFN (Kong et al., CVPRW 2022, arXiv 2205.07514): residual local feature network."""

from __future__ import annotations

from basicsr.utils.registry import ARCH_REGISTRY
from qsr_plugin.archs.attention_blocks import SpatialAttention
from torch import Tensor, nn


class ResidualLocalBlock(nn.Module):
    """Three convolutions with activations plus the identity, a 1x1 convolution, spatial attention.

    Args:
        num_feat: Channels.
        num_mid: Channels between the three convolutions.
        esa_channels: Channels inside the attention.
    """

    never_left_out = "a convolution follows its sum, so it does not compute x + branch(x)"

    def __init__(self, num_feat: int, num_mid: int, esa_channels: int) -> None:
        super().__init__()
        self.c1_r = nn.Conv2d(num_feat, num_mid, 3, padding=1)
        self.c2_r = nn.Conv2d(num_mid, num_mid, 3, padding=1)
        self.c3_r = nn.Conv2d(num_mid, num_feat, 3, padding=1)
        self.act = nn.LeakyReLU(0.05)
        self.c5 = nn.Conv2d(num_feat, num_feat, 1)
        self.esa = SpatialAttention(num_feat, esa_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same shape."""
        local = self.act(self.c1_r(x))
        local = self.act(self.c2_r(local))
        local = self.act(self.c3_r(local))
        return self.esa(self.c5(local + x))


@ARCH_REGISTRY.register(suffix="qsr")
class RLFN(nn.Module):
    """RLFN for any integer scale; keys are those of the published weights.

    The defaults are the paper's network for x4. The network of the NTIRE 2022 challenge has 46 features, 48 between the
    convolutions of a block, and 4 blocks.

    Args:
        num_in_ch: Input channels.
        num_out_ch: Output channels.
        num_feat: Feature channels.
        num_mid: Channels between the convolutions of a block; ``num_feat`` if not given.
        num_block: Residual blocks.
        esa_channels: Channels inside the spatial attention.
        upscale: Scale.
        img_range: The network's own values are image values times this; the published weights expect 255.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 52,
        num_mid: int | None = None,
        num_block: int = 6,
        esa_channels: int = 16,
        upscale: int = 4,
        img_range: float = 255.0,
    ) -> None:
        super().__init__()
        self.num_block, self.img_range = num_block, img_range
        self.conv_1 = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        for number in range(1, num_block + 1):
            self.add_module(f"block_{number}", ResidualLocalBlock(num_feat, num_mid or num_feat, esa_channels))
        self.conv_2 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(num_feat, num_out_ch * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in_ch, H, W) in [0, 1] to (N, num_out_ch, upscale H, upscale W)."""
        first = features = self.conv_1(x * self.img_range)
        for number in range(1, self.num_block + 1):
            features = self.get_submodule(f"block_{number}")(features)
        return self.upsampler(self.conv_2(features) + first) / self.img_range
