"""Networks and comparisons for the tests of exact rewrites."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Sizes of images, tiny ones among them.
SIZES = ((17, 23), (1, 1), (1, 30), (30, 1), (5, 5), (2, 3))


class Tail(nn.Module):
    """A convolution with a ReLU, then a tail of modules."""

    def __init__(self, *tail: nn.Module, channels: int = 12) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU())
        self.tail = nn.Sequential(*tail)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to what the tail makes."""
        return self.tail(self.head(x))


def lively(net: nn.Module) -> nn.Module:
    """Random biases and norms instead of zeros and ones, which would hide mistakes; in evaluation mode."""
    generator = torch.Generator().manual_seed(1)

    def fill(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            with torch.no_grad():
                tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            fill(module.bias, -0.3, 0.3)
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_var, module.weight):
                fill(tensor, 0.5, 2)
            for tensor in (module.running_mean, module.bias):
                fill(tensor, -0.5, 0.5)
    return net.eval()


@torch.no_grad()
def difference(left: nn.Module, right: nn.Module, size: tuple[int, int], border: int = 0) -> float:
    """Largest difference of two networks on a random image, away from a border of output pixels."""
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    a, b = left(image), right(image)
    assert a.shape == b.shape
    found = (a - b).abs()
    inner = found[..., border : found.shape[-2] - border, border : found.shape[-1] - border]
    return float(inner.max()) if inner.numel() else 0.0
