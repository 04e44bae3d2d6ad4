"""Small networks in the styles that role tables were not written for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(inside: int, outside: int, size: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, size, padding=size // 2, **options)


class PooledAttention(nn.Module):
    """Spatial attention from a small map, with a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shrink, self.down, self.back = conv(width, 4, 1), nn.Conv2d(4, 4, 3, stride=2), conv(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        small = F.max_pool2d(self.down(self.shrink(x)), 3, 2)
        return x * torch.sigmoid(self.back(F.interpolate(small, x.shape[-2:])))


class PlainBlock(nn.Module):
    """Three convolutions, a skip, a 1x1 and attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.mix, self.attention = (
            conv(width, width),
            conv(width, width),
            conv(width, width, 1),
            PooledAttention(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.mix(F.relu(self.second(F.relu(self.first(x)))) + x))


class ShuffleEnd(nn.Module):
    """As RLFN: blocks with names of their own, a long skip, one convolution and a PixelShuffle at the end."""

    def __init__(self, width: int = 8, scale: int = 2, channels: int = 3) -> None:
        super().__init__()
        self.enter = conv(channels, width)
        self.block_1, self.block_2 = PlainBlock(width), PlainBlock(width)
        self.after = conv(width, width)
        self.upsampler = nn.Sequential(conv(width, channels * scale**2), nn.PixelShuffle(scale))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.upsampler(self.after(self.block_2(self.block_1(x))) + x)


class Distillation(nn.Module):
    """As a block of IMDN: a part of the channels is kept at each step; channel attention from statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        rest = width - width // 4
        self.c1, self.c2, self.c3 = conv(width, width), conv(rest, width), conv(rest, width // 4)
        self.down, self.up, self.join = (
            conv(3 * width // 4, 2, 1),
            conv(2, 3 * width // 4, 1),
            conv(3 * width // 4, width, 1),
        )
        self.kept = width // 4

    def forward(self, x: Tensor) -> Tensor:
        parts, rest = [], x
        for layer in (self.c1, self.c2):
            rest = layer(rest)
            parts.append(rest[:, : self.kept])
            rest = F.leaky_relu(rest[:, self.kept :])
        out = torch.cat([*parts, self.c3(rest)], 1)
        weights = torch.sigmoid(self.up(F.relu(self.down(out.mean((2, 3), keepdim=True)))))
        return self.join(out * weights) + x


class MultiDistillation(nn.Module):
    """As IMDN: the results of all blocks are joined by a 1x1 convolution; the image enters repeated, as in BSRN."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter = conv(6, width)
        self.b1, self.b2, self.b3 = (Distillation(width) for _ in range(3))
        self.fuse, self.after = conv(3 * width, width, 1), conv(width, width)
        self.last = nn.Sequential(conv(width, 12), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x.repeat(1, 2, 1, 1))
        first = self.b1(x)
        second = self.b2(first)
        return self.last(self.after(self.fuse(torch.cat([first, second, self.b3(second)], 1))) + x)


class WindowLayer(nn.Module):
    """As a Swin layer: attention in windows of 8x8 tokens with a bias that a small network makes from a table."""

    side = 8

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.bias = nn.Linear(1, 1)
        self.register_buffer("table", torch.arange(self.side**4, dtype=torch.float32).view(self.side**2, -1, 1) / 4096)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        images, tokens, width = x.shape
        rows, columns = (side // self.side for side in size)
        windows = self.norm(x).view(images, rows, self.side, columns, self.side, width).transpose(2, 3)
        q, k, v = self.qkv(windows.reshape(-1, self.side**2, width)).chunk(3, -1)
        mixed = torch.softmax(q @ k.transpose(1, 2) + self.bias(self.table)[..., 0], -1) @ v
        mixed = self.proj(mixed).view(images, rows, columns, self.side, self.side, width).transpose(2, 3)
        x = x + mixed.reshape(images, tokens, width)
        return x + self.fc2(F.gelu(self.fc1(x)))


class Transformer(nn.Module):
    """Tokens in the body, features at the ends; takes multiples of 32 only."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter = conv(3, width)
        self.layers = nn.ModuleList(WindowLayer(width) for _ in range(3))
        self.after, self.before = conv(width, width), conv(width, width)
        self.upsample = nn.Sequential(conv(width, 4 * width), nn.PixelShuffle(2))
        self.last = conv(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 32 or x.shape[-2] % 32:
            raise ValueError(f"sides must be multiples of 32, not {tuple(x.shape[-2:])}")
        x = self.enter(x)
        tokens = x.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens, x.shape[-2:])
        x = self.after(tokens.transpose(1, 2).view_as(x)) + x
        return self.last(self.upsample(F.leaky_relu(self.before(x))))


class UNet(nn.Module):
    """Down and up again inside the body, then nearest-neighbour upsampling by two between convolutions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter = conv(3, width)
        self.high = nn.Sequential(PlainBlock(width), PlainBlock(width))
        self.down, self.up = nn.Conv2d(width, width, 2, stride=2), nn.ConvTranspose2d(width, width, 2, stride=2)
        self.low = nn.Sequential(PlainBlock(width), PlainBlock(width))
        self.enlarge_1, self.enlarge_2 = conv(width, width), conv(width, width)
        self.last = conv(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        high = self.high(self.enter(x))
        x = high + self.up(self.low(self.down(high)))
        for layer in (self.enlarge_1, self.enlarge_2):
            x = F.relu(layer(F.interpolate(x, scale_factor=2)))
        return self.last(x)


class Deconvolution(nn.Module):
    """As FSRCNN on grey images: plain layers, with a transposed convolution at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(1, 8, 5), nn.PReLU(), conv(8, 4, 1), conv(4, 4), conv(4, 8, 1))
        self.deconv = nn.ConvTranspose2d(8, 1, 9, stride=2, padding=4, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.deconv(self.layers(x))
