"""CARN and CARN-M (Ahn et al., ECCV 2018, arXiv 1803.08664): cascading residual networks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from qsr_plugin.archs.fixed import fixed
from torch import Tensor, nn

#: Mean of DIV2K in RGB, in [0, 1].
DIV2K_MEAN = (0.4488, 0.4371, 0.4040)
#: Residual blocks of a cascading block.
_CASCADE = 3
_SCALES = (2, 3, 4)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions plus the identity, and a ReLU after the sum.

    Args:
        num_feat: Channels.
        group: Groups of the 3x3 convolutions. With more than one, a 1x1 convolution comes last (CARN-M, Fig. 3 b).
    """

    never_left_out = "a ReLU follows its sum, so it does not compute x + branch(x)"

    def __init__(self, num_feat: int, group: int) -> None:
        super().__init__()
        layers = [_conv(num_feat, num_feat, group), nn.ReLU(), _conv(num_feat, num_feat, group)]
        if group > 1:
            layers += [nn.ReLU(), nn.Conv2d(num_feat, num_feat, 1)]
        self.body = nn.Sequential(*layers)
        self.act = nn.ReLU()

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the identity, (N, num_feat, H, W)."""
        return self.body(x)

    def after_sum(self, x: Tensor) -> Tensor:
        """The result, from the sum of identity and branch."""
        return self.act(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same shape."""
        return self.after_sum(x + self.branch(x))


class CascadingBlock(nn.Module):
    """Three residual blocks; a 1x1 convolution after each joins its result with the block's input and all before it.

    Args:
        num_feat: Channels.
        group: See :class:`ResidualBlock`.
        shared: One residual block is used three times.
    """

    def __init__(self, num_feat: int, group: int, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        for number in range(1, 2 if shared else _CASCADE + 1):
            self.add_module(f"b{number}", ResidualBlock(num_feat, group))
        for number in range(1, _CASCADE + 1):
            self.add_module(f"c{number}", _join(num_feat, number + 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same shape."""
        return _cascade(self, x, ["b1"] * _CASCADE if self.shared else [f"b{n}" for n in range(1, _CASCADE + 1)])


@ARCH_REGISTRY.register(suffix="qsr")
class CARN(nn.Module):
    """CARN, and with ``group`` 4 and ``shared`` CARN-M, for RGB images; keys are those of the published weights.

    Args:
        num_feat: Feature channels, a multiple of ``group``.
        num_block: Cascading blocks.
        upscale: 2, 3 or 4.
        group: Groups of all 3x3 convolutions but the first and the last; more than one makes the residual blocks
            those of CARN-M.
        shared: Every cascading block uses one residual block three times, as in CARN-M.
        multi_scale: Hold upsamplers for 2, 3 and 4, as the published weights do. The one of ``upscale`` runs and
            learns; the others are only stored.
        rgb_mean: Subtracted from the input and added to the output, in [0, 1]. Weights bring their own.

    Raises:
        ValueError: For another scale, or channels that the groups do not divide.
    """

    def __init__(
        self,
        num_feat: int = 64,
        num_block: int = 3,
        upscale: int = 4,
        group: int = 1,
        shared: bool = False,
        multi_scale: bool = False,
        rgb_mean: Sequence[float] = DIV2K_MEAN,
    ) -> None:
        super().__init__()
        if upscale not in _SCALES:
            raise ValueError(f"CARN: upscale is {upscale}; allowed are {', '.join(map(str, _SCALES))}")
        if group < 1 or num_feat % group:
            raise ValueError(f"CARN: group is {group}; allowed are divisors of num_feat, {num_feat}")
        self.num_block, self.group, self.multi_scale, self.upscale = num_block, group, multi_scale, upscale
        self.sub_mean = _mean_shift(rgb_mean, -1)
        self.add_mean = _mean_shift(rgb_mean, 1)
        self.entry = nn.Conv2d(3, num_feat, 3, padding=1)
        for number in range(1, num_block + 1):
            self.add_module(f"b{number}", CascadingBlock(num_feat, group, shared))
        for number in range(1, num_block + 1):
            self.add_module(f"c{number}", _join(num_feat, number + 1))
        self.upsample = nn.ModuleDict(
            {f"up{scale}": _upsampler(num_feat, scale, group) for scale in _SCALES}
            if multi_scale
            else {"up": _upsampler(num_feat, upscale, group)}
        )
        for name, upsampler in self.upsample.items():
            if name != self.upsampler:
                fixed(upsampler)
        self.exit = nn.Conv2d(num_feat, 3, 3, padding=1)

    @property
    def upsampler(self) -> str:
        """Name of the upsampler that runs, in ``upsample``."""
        return f"up{self.upscale}" if self.multi_scale else "up"

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), RGB in [0, 1], to (N, 3, upscale H, upscale W)."""
        features = self.entry(self.sub_mean(x))
        features = _cascade(self, features, [f"b{number}" for number in range(1, self.num_block + 1)])
        return self.add_mean(self.exit(self.upsample[self.upsampler](features)))


def _conv(num_in: int, num_out: int, group: int) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, 3, padding=1, groups=group)


def _body(layers: Iterable[nn.Module]) -> nn.Sequential:
    """Layers one after another; the name is part of the published keys."""
    sequence = nn.Sequential()
    sequence.add_module("body", nn.Sequential(*layers))
    return sequence


def _join(num_feat: int, tensors: int) -> nn.Sequential:
    return _body([nn.Conv2d(num_feat * tensors, num_feat, 1), nn.ReLU()])


def _upsampler(num_feat: int, scale: int, group: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for factor in (2, 2) if scale == 4 else (scale,):
        layers += [_conv(num_feat, num_feat * factor**2, group), nn.ReLU(), nn.PixelShuffle(factor)]
    return _body(layers)


def _mean_shift(mean: Sequence[float], sign: int) -> nn.Sequential:
    shift = nn.Sequential()
    shift.add_module("shifter", nn.Conv2d(3, 3, 1))
    with torch.no_grad():
        shift.shifter.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
        shift.shifter.bias.copy_(sign * torch.tensor(mean))
    return fixed(shift)


def _cascade(net: nn.Module, x: Tensor, blocks: Sequence[str]) -> Tensor:
    """Run blocks; the result of each is joined with everything before it by the layer ``c1``, ``c2``, ... in turn."""
    joined = x
    for number, name in enumerate(blocks, 1):
        joined = torch.cat((joined, net.get_submodule(name)(x)), 1)
        x = net.get_submodule(f"c{number}")(joined)
    return x
