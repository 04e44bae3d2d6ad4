"""One convolution and a pixel shuffle in the place of a chain of modules, and what makes it exact at the borders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsr_plugin.deploy.linear_chain import AffineMap


class Correction(nn.Module):
    """What has to be added to the outermost lines at one end of an image, a convolution of the lines that matter.

    Args:
        kernel: (ry, rx, C', C, kh, kw): for each of the lines its own one; ry or rx is 1 along which it is the same.
        bias: (ry, rx, C').
        ends: For height and width: -1 at the first lines, 1 at the last, 0 along all of them.
    """

    def __init__(self, kernel: Tensor, bias: Tensor, ends: tuple[int, int]) -> None:
        super().__init__()
        self.lines, self.ends = (kernel.shape[0], kernel.shape[1]), ends
        padding = tuple(0 if end else side // 2 for end, side in zip(ends, kernel.shape[4:]))
        self.conv = convolution(kernel.flatten(0, 2), bias.flatten(), padding)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H or ry, W or rx)."""
        for axis, (end, size) in enumerate(zip(self.ends, self.conv.kernel_size), 2):
            if end:
                x = _lines(x, axis, slice(size) if end < 0 else slice(-size, None))
        out = self.conv(x)
        if self.lines == (1, 1):
            return out
        return out.unflatten(1, (*self.lines, -1)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class Border(nn.Module):
    """Corrections along the four sides, and further ones in the corners, where two sides meet.

    Args:
        lines: Width of the border.
    """

    def __init__(self, lines: int) -> None:
        super().__init__()
        self.lines = lines
        self.sides, self.corners = nn.ModuleDict(), nn.ModuleDict()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Correct ``y`` (N, C', H, W), which is a convolution of ``x`` (N, C, H, W)."""
        sides = {name: side(x) for name, side in self.sides.items()}
        for name in ("left", "right") if self.corners else ():
            ends = (self.corners[f"{end}_{name}"](x) for end in ("top", "bottom"))
            sides[name] = self._with_ends(sides[name], 2, *ends)
        return self._with_ends(self._with_ends(y, 2, sides["top"], sides["bottom"]), 3, sides["left"], sides["right"])

    def _with_ends(self, y: Tensor, axis: int, low: Tensor, high: Tensor) -> Tensor:
        """Add to the first and to the last lines along an axis."""
        n = self.lines
        first, middle, last = (_lines(y, axis, part) for part in (slice(n), slice(n, -n), slice(-n, None)))
        return torch.cat((first + low, middle, last + high), axis)


class CollapsedTail(nn.Module):
    """One convolution and a pixel shuffle.

    Args:
        found: The convolution.
        replaced: Dotted names of the modules that it stands for, in order.
        border: Makes the border exact; without it, the outermost ``ring`` pixels differ from what the modules made.
        original: Those modules, with a border: smaller feature maps than ``smallest`` on a side are their business.
        smallest: In pixels of the features.

    Attributes:
        minimum: The same in pixels of the image, which is what an exported network takes at least.
    """

    def __init__(
        self,
        found: AffineMap,
        replaced: tuple[str, ...] = (),
        border: Border | None = None,
        original: nn.Module | None = None,
        smallest: int = 1,
    ) -> None:
        super().__init__()
        self.conv = convolution(found.kernel, found.bias, tuple(side // 2 for side in found.kernel.shape[2:]))
        self.shuffle = nn.PixelShuffle(found.scale)
        self.ring, self.replaced, self.smallest, self.minimum = found.ring, replaced, smallest, smallest
        self.border, self.original = border, original

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C', scale h, scale w)."""
        if self.border is None:
            return self.shuffle(self.conv(x))
        if x.shape[2] < self.smallest or x.shape[3] < self.smallest:
            return self.original(x)
        return self.shuffle(self.border(x, self.conv(x)))


def collapsed_tail(net: nn.Module) -> CollapsedTail | None:
    """The collapsed tail of a network, if it has one."""
    return next((module for module in net.modules() if isinstance(module, CollapsedTail)), None)


def least_side(net: nn.Module) -> int:
    """Smallest height and width of an image that a network takes without the modules its collapsed tail stands for."""
    return max((module.minimum for module in net.modules() if isinstance(module, CollapsedTail)), default=1)


def convolution(kernel: Tensor, bias: Tensor, padding: tuple[int, ...]) -> nn.Conv2d:
    """A layer with these (C', C, kh, kw) and (C',), in their type and for inference only."""
    out_channels, in_channels, *size = kernel.shape
    conv = nn.Conv2d(in_channels, out_channels, tuple(size), padding=padding, dtype=kernel.dtype)
    conv.weight, conv.bias = (nn.Parameter(value.detach().clone(), requires_grad=False) for value in (kernel, bias))
    return conv


def _lines(x: Tensor, axis: int, part: slice) -> Tensor:
    return x[(slice(None),) * axis + (part,)]
