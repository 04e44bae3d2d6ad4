"""Blocks of HAT: window attention beside channel attention, and attention to overlapping windows.

Source: Chen et al., "Activating More Pixels in Image Super-Resolution Transformer", CVPR 2023 (arXiv 2205.04437),
Sec. 3.2 and 3.3. Modules have the names of the authors' release, so that its weights fit. Tokens are (N, H*W, C), row
by row; H and W are multiples of the window size.
"""

from __future__ import annotations

import torch
from qsr_plugin.archs.hat_windows import Windows, from_windows, to_windows
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn import functional as F


class ChannelAttention(nn.Module):
    """Channel attention on the mean of every channel.

    Args:
        num_feat: Channels.
        squeeze_factor: Factor between them and the channels of the hidden layer.
    """

    def __init__(self, num_feat: int, squeeze_factor: int) -> None:
        super().__init__()
        hidden = num_feat // squeeze_factor
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(num_feat, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, num_feat, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape, every channel times a factor from 0 to 1."""
        return x * self.attention(x)


class CAB(nn.Module):
    """Channel attention block: two convolutions around a bottleneck, then :class:`ChannelAttention`.

    Args:
        num_feat: Channels.
        compress_ratio: Factor between them and the channels of the bottleneck.
        squeeze_factor: See :class:`ChannelAttention`.
    """

    def __init__(self, num_feat: int, compress_ratio: int, squeeze_factor: int) -> None:
        super().__init__()
        hidden = num_feat // compress_ratio
        self.cab = nn.Sequential(
            nn.Conv2d(num_feat, hidden, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(hidden, num_feat, 3, padding=1),
            ChannelAttention(num_feat, squeeze_factor),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return self.cab(x)


class Attention(nn.Module):
    """What the two kinds of window attention have in common.

    Args:
        dim: Channels.
        num_heads: Heads, a divisor of ``dim``.
        table_rows: Rows of the table of position biases.
        keys: Keys for each query.

    Attributes:
        port_channels: Channels of the operands of both matrix products, by port name.
    """

    def __init__(self, dim: int, num_heads: int, table_rows: int, keys: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.empty(table_rows, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        head = dim // num_heads
        self.port_channels = {"query": head, "key": head, "value": head, "attention": keys}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Mix values by the similarity of queries and keys.

        Args:
            q: (B, heads, N, d), scaled already; B windows of all images.
            k: (B, heads, M, d).
            v: (B, heads, M, d).
            bias: Added to the similarities, broadcastable to (B, heads, N, M).

        Returns:
            (B, heads, N, d).
        """
        return F.softmax(q @ k.transpose(-2, -1) + bias, dim=-1) @ v

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """:meth:`attend` for (B, heads, N, d) operands, all unscaled, with the heads joined: (B, N, C)."""
        return self.attend(q * self.scale, k, v, bias).transpose(1, 2).flatten(2)

    def position_bias(self, index: Tensor) -> Tensor:
        """Bias of each pair, (heads, N, M), from the (N, M) rows of the table."""
        return self.relative_position_bias_table[index].permute(2, 0, 1)


class WindowAttention(Attention):
    """Self-attention in every window.

    Args:
        dim: Channels.
        window_size: Side of a window.
        num_heads: Heads.
    """

    def __init__(self, dim: int, window_size: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, (2 * window_size - 1) ** 2, window_size**2)

    def forward(self, x: Tensor, windows: Windows, shifted: bool) -> Tensor:
        """(N * windows, T, C) to the same shape; ``shifted`` tells whether the windows are those of a shifted image."""
        batch, tokens, channels = x.shape
        parts = self.qkv(x).view(batch, tokens, 3, self.num_heads, channels // self.num_heads)
        bias = self.position_bias(windows.inner)
        if shifted:
            bias = (bias + windows.masks.to(bias.dtype))[windows.kinds]
        return self.proj(self.mixed(*parts.permute(2, 0, 3, 1, 4), bias))


class HAB(nn.Module):
    """Hybrid attention block: window attention and a channel attention block side by side, then an MLP (eq. 2).

    Args:
        dim: Channels.
        num_heads: Heads of the window attention.
        window_size: Side of a window.
        shift: Cyclic shift of the image before it is cut into windows.
        compress_ratio: See :class:`CAB`.
        squeeze_factor: See :class:`CAB`.
        conv_scale: Factor of the channel attention block.
        mlp_ratio: Channels of the MLP's hidden layer, per channel.
        drop_path: Probability that training leaves out a branch of an image.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift: int,
        compress_ratio: int,
        squeeze_factor: int,
        conv_scale: float,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.window_size, self.shift, self.conv_scale = window_size, shift, conv_scale
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window_size, num_heads)
        self.conv_block = CAB(dim, compress_ratio, squeeze_factor)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, x_size: tuple[int, int], windows: Windows) -> Tensor:
        """(N, H*W, C) to the same shape."""
        image = self.norm1(x).unflatten(1, x_size)
        channels = self.conv_block(image.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        if self.shift:
            image = image.roll((-self.shift, -self.shift), (1, 2))
        attended = self.attn(to_windows(image, self.window_size), windows, self.shift > 0)
        attended = from_windows(attended, self.window_size, x_size)
        if self.shift:
            attended = attended.roll((self.shift, self.shift), (1, 2))
        x = x + self.drop_path(attended.flatten(1, 2)) + channels * self.conv_scale
        return x + self.drop_path(self.mlp(self.norm2(x)))


class OCAB(Attention):
    """Overlapping cross-attention block: each window asks a larger one around it; then an MLP (Sec. 3.3).

    Args:
        dim: Channels.
        num_heads: Heads.
        window_size: Side of a window.
        outer_size: Side of the larger one, see :func:`overlapping_size`.
        mlp_ratio: Channels of the MLP's hidden layer, per channel.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, outer_size: int, mlp_ratio: float) -> None:
        super().__init__(dim, num_heads, (window_size + outer_size - 1) ** 2, outer_size**2)
        self.window_size, self.outer_size = window_size, outer_size
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, x_size: tuple[int, int], windows: Windows) -> Tensor:
        """(N, H*W, C) to the same shape."""
        q, keys_values = self.qkv(self.norm1(x)).tensor_split((x.shape[-1],), -1)
        q = to_windows(q.unflatten(1, x_size), self.window_size).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self._around(keys_values.transpose(1, 2).unflatten(2, x_size))
        mixed = self.mixed(q, k, v, self.position_bias(windows.overlap))
        x = x + self.proj(from_windows(mixed, self.window_size, x_size).flatten(1, 2))
        return x + self.mlp(self.norm2(x))

    def _around(self, keys_values: Tensor) -> Tensor:
        """(N, 2C, H, W) to (2, N * windows, heads, S, C / heads), zeros beyond the image."""
        padding = (self.outer_size - self.window_size) // 2
        parts = F.unfold(keys_values, self.outer_size, padding=padding, stride=self.window_size)
        parts = parts.view(parts.shape[0], 2, self.num_heads, -1, self.outer_size**2, parts.shape[-1])
        return parts.permute(1, 0, 5, 2, 4, 3).flatten(1, 2)
