"""IDN (Hui et al., CVPR 2018, arXiv 1803.09454): information distillation network, on luma."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from qsr_plugin.archs.bicubic import upsample_bicubic
from torch import Tensor, nn
from torch.nn import functional as F

#: BT.601: luma of RGB in [0, 1] is the sum of these shares, plus 16, over 255.
_LUMA = (65.481, 128.553, 24.966)
_BLACK, _LEVELS = 16.0, 255.0
_KERNEL = 17


class DistillationStage(nn.Module):
    """Enhancement and compression (Fig. 2): six convolutions, the sum with stage input and kept channels, one 1x1.

    The convolutions belong to the network, whose published keys are flat, and come with every call.

    Args:
        num_feat: Channels of input and output.
        kept: Channels of the third convolution that skip the last three.
    """

    never_left_out = "a convolution follows its sum, so it does not compute x + branch(x)"

    def __init__(self, num_feat: int, kept: int) -> None:
        super().__init__()
        self.sizes = (kept, num_feat - kept)
        self.act = nn.LeakyReLU(0.05)
        self.port_channels = {
            "input": num_feat, "shortcut": num_feat, "addition": num_feat + kept, "output": num_feat
        }  # fmt: skip

    def branch(self, x: Tensor, convs: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
        """Kept channels (N, kept, H, W), and what the sum adds, (N, num_feat + kept, H, W)."""
        for conv in convs[:3]:
            x = self.act(conv(x))
        kept, x = x.split(self.sizes, 1)
        for conv in convs[3:]:
            x = self.act(conv(x))
        return kept, x

    def compress(self, x: Tensor, down: nn.Module) -> Tensor:
        """The stage's result, from the sum."""
        return self.act(down(x))

    def forward(self, x: Tensor, convs: Sequence[nn.Module], down: nn.Module) -> Tensor:
        """(N, num_feat, H, W) to the same shape.

        Args:
            x: Input.
            convs: The six convolutions.
            down: The 1x1 convolution.
        """
        kept, enhanced = self.branch(x, convs)
        return self.compress(torch.cat((x, kept), 1) + enhanced, down)


@ARCH_REGISTRY.register(suffix="qsr")
class IDN(nn.Module):
    """IDN for any integer scale; keys are the layer names of the published weights.

    The result is a residual, from one transposed convolution, on the bicubic enlargement. The residual begins at row
    and column ``upscale - 1``, as published: the first ones are bicubic alone.

    Args:
        num_in_ch: Channels of input and output: 1 for luma, as published, 3 for RGB, as the papers on quantization
            have it.
        num_feat: Feature channels, a multiple of 16.
        num_block: Stages.
        upscale: Scale.
        rgb: Take and return RGB with ``num_in_ch`` 1: the network enlarges BT.601 luma, colour is enlarged bicubically.

    Raises:
        ValueError: For other channels, or ``rgb`` with more than one.
    """

    def __init__(
        self, num_in_ch: int = 1, num_feat: int = 64, num_block: int = 4, upscale: int = 4, rgb: bool = False
    ) -> None:
        super().__init__()
        if num_feat % 16 or num_feat < 16:
            raise ValueError(f"IDN: num_feat is {num_feat}; allowed are multiples of 16")
        if rgb and num_in_ch != 1:
            raise ValueError(f"IDN: rgb is for a luma network, num_in_ch 1; it is {num_in_ch}. Leave rgb out")
        self.num_block, self.upscale, self.rgb = num_block, upscale, rgb
        kept = num_feat // 4
        self.conv1 = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        self.conv2 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        for number in range(1, num_block + 1):
            sizes = [(4, 3, 1), (3, 2, 4), (2, 4, 1), (3, 4, 1), (4, 3, 4), (3, 5, 1)]  # in, out: times kept; groups
            for position, (before, after, groups) in enumerate(sizes, 1):
                conv = nn.Conv2d(before * kept, after * kept, 3, padding=1, groups=groups)
                self.add_module(f"conv{number + 2}_{position}", conv)
            self.add_module(f"down{number}", nn.Conv2d(num_feat + kept, num_feat, 1))
            self.add_module(f"stage{number}", DistillationStage(num_feat, kept))
        self.upsample = nn.ConvTranspose2d(num_feat, num_in_ch, _KERNEL, stride=upscale, padding=_KERNEL // 2)
        self.act = nn.LeakyReLU(0.05)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] to (N, C, upscale H, upscale W); C is 3 with ``rgb``, else ``num_in_ch``."""
        features = self.act(self.conv2(self.act(self.conv1(luma(x) if self.rgb else x))))
        for number in range(1, self.num_block + 1):
            convs = [self.get_submodule(f"conv{number + 2}_{position}") for position in range(1, 7)]
            stage, down = self.get_submodule(f"stage{number}"), self.get_submodule(f"down{number}")
            features = stage(features, convs, down)
        late = self.upscale - 1
        residual = F.pad(self.upsample(features), (late, 0, late, 0))
        if self.rgb:  # conversion and bicubic are linear: what is added to luma is added to R, G and B, stretched
            residual = residual * (_LEVELS / sum(_LUMA))
        return upsample_bicubic(x, self.upscale) + residual


def luma(x: Tensor) -> Tensor:
    """BT.601 luma, from 16/255 to 235/255: (N, 3, H, W), RGB in [0, 1], to (N, 1, H, W)."""
    red, green, blue = (share * x[:, channel] for channel, share in enumerate(_LUMA))
    return ((red + green + blue + _BLACK) / _LEVELS).unsqueeze(1)
