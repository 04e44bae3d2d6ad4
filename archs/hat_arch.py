"""HAT, the hybrid attention transformer (Chen et al., CVPR 2023, arXiv 2205.04437), with its small form HAT-S."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from basicsr.archs.arch_util import Upsample
from basicsr.utils.registry import ARCH_REGISTRY
from qsr_plugin.archs.hat_blocks import HAB, OCAB
from qsr_plugin.archs.hat_windows import (
    Windows,
    inner_index,
    overlap_index,
    overlapping_size,
    shift_masks,
    window_kinds,
)
from qsr_plugin.archs.padding import PaddedInput
from torch import Tensor, nn

#: Channels between body and image, as published.
_UPSAMPLER_FEATURES = 64
_DIV2K_MEAN = (0.4488, 0.4371, 0.4040)


def to_tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H*W, C)."""
    return x.flatten(2).transpose(1, 2)


def to_image(x: Tensor, x_size: tuple[int, int]) -> Tensor:
    """(N, H*W, C) to (N, C, H, W)."""
    return x.transpose(1, 2).unflatten(2, x_size)


class PatchEmbed(nn.Module):
    """Tokens of an image, normalized.

    Args:
        embed_dim: Channels.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, H*W, C)."""
        return self.norm(to_tokens(x))


class AttentionBlocks(nn.Module):
    """Hybrid attention blocks in a row, then the overlapping cross-attention.

    Args:
        blocks: The former.
        overlap_attn: The latter.
    """

    def __init__(self, blocks: Sequence[HAB], overlap_attn: OCAB) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.overlap_attn = overlap_attn

    def forward(self, x: Tensor, x_size: tuple[int, int], windows: Windows) -> Tensor:
        """(N, H*W, C) to the same shape."""
        for block in self.blocks:
            x = block(x, x_size, windows)
        return self.overlap_attn(x, x_size, windows)


class RHAG(nn.Module):
    """Residual hybrid attention group: :class:`AttentionBlocks` and a convolution, plus the identity.

    Args:
        residual_group: What the branch begins with.
        dim: Channels.
    """

    def __init__(self, residual_group: AttentionBlocks, dim: int) -> None:
        super().__init__()
        self.residual_group = residual_group
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def branch(self, x: Tensor, x_size: tuple[int, int], windows: Windows) -> Tensor:
        """What is added to the identity, (N, H*W, C)."""
        return to_tokens(self.conv(to_image(self.residual_group(x, x_size, windows), x_size)))

    def forward(self, x: Tensor, x_size: tuple[int, int], windows: Windows) -> Tensor:
        """(N, H*W, C) to the same shape."""
        return x + self.branch(x, x_size, windows)


class WholeWindowHAT(nn.Module):
    """:class:`HAT` without its padding: both sides of an image are multiples of ``window_size``.

    Attributes:
        rebuilt_buffers: Buffers that a file of weights may lack.
    """

    rebuilt_buffers = frozenset({"relative_position_index_SA", "relative_position_index_OCA"})

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        num_heads: Sequence[int] = (6, 6, 6, 6, 6, 6),
        window_size: int = 16,
        compress_ratio: int = 3,
        squeeze_factor: int = 30,
        conv_scale: float = 0.01,
        overlap_ratio: float = 0.5,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.1,
        upscale: int = 4,
        img_range: float = 1.0,
    ) -> None:
        super().__init__()
        if len(depths) != len(num_heads) or any(embed_dim % heads for heads in num_heads):
            raise ValueError(
                f"HAT: num_heads is {list(num_heads)}; allowed are divisors of embed_dim ({embed_dim}), one for each "
                f"of the {len(depths)} groups of depths"
            )
        for name, factor in (("compress_ratio", compress_ratio), ("squeeze_factor", squeeze_factor)):
            if not 1 <= factor <= embed_dim:
                raise ValueError(f"HAT: {name} is {factor}; allowed is 1 to embed_dim ({embed_dim})")
        self.window_size, self.upscale, self.img_range = window_size, upscale, img_range
        self.pad_multiple, self.pad_minimum, self.pad_square, self.pad_scale = window_size, 1, False, upscale
        self.conv_scale, self.drop_path_rate = conv_scale, drop_path_rate
        outer_size, shift = overlapping_size(window_size, overlap_ratio), window_size // 2
        mean = torch.tensor(_DIV2K_MEAN) if in_chans == 3 else torch.zeros(in_chans)
        self.register_buffer("mean", mean.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("relative_position_index_SA", inner_index(window_size))
        self.register_buffer("relative_position_index_OCA", overlap_index(window_size, outer_size))
        self.register_buffer("shift_masks", shift_masks(window_size, shift), persistent=False)
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1)
        self.patch_embed = PatchEmbed(embed_dim)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList()
        for depth, heads in zip(depths, num_heads, strict=True):
            blocks = [
                HAB(
                    embed_dim,
                    heads,
                    window_size,
                    shift if number % 2 else 0,
                    compress_ratio,
                    squeeze_factor,
                    conv_scale,
                    mlp_ratio,
                    next(rates),
                )
                for number in range(depth)
            ]
            overlap_attn = OCAB(embed_dim, heads, window_size, outer_size, mlp_ratio)
            self.layers.append(RHAG(AttentionBlocks(blocks, overlap_attn), embed_dim))
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.conv_before_upsample = nn.Sequential(
            nn.Conv2d(embed_dim, _UPSAMPLER_FEATURES, 3, padding=1), nn.LeakyReLU(inplace=True)
        )
        self.upsample = Upsample(upscale, _UPSAMPLER_FEATURES)
        self.conv_last = nn.Conv2d(_UPSAMPLER_FEATURES, in_chans, 3, padding=1)
        self.apply(_init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) in [0, 1] to (N, in_chans, upscale H, upscale W); H and W are whole windows."""
        first = self.conv_first((x - self.mean) * self.img_range)
        features = self.conv_after_body(self.body(first)) + first
        out = self.conv_last(self.upsample(self.conv_before_upsample(features)))
        return out / self.img_range + self.mean

    def body(self, x: Tensor) -> Tensor:
        """Deep features of whole windows, (N, embed_dim, H, W) to the same shape."""
        x_size = (x.shape[2], x.shape[3])
        rows, columns = (side // self.window_size for side in x_size)
        kinds = window_kinds(rows, columns, x.device).repeat(x.shape[0])
        windows = Windows(self.relative_position_index_SA, self.relative_position_index_OCA, self.shift_masks, kinds)
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x, x_size, windows)
        return to_image(self.norm(x), x_size)


@ARCH_REGISTRY.register(suffix="qsr")
class HAT(PaddedInput, WholeWindowHAT):
    """HAT for any scale that is a power of 2, or 3; any image size works.

    Images are extended at the right and at the bottom to whole windows. Masks hold for every size: they are those of
    the four kinds of windows that a shifted image has, and no part of the state dict.

    Args:
        in_chans: Channels of the image, in and out.
        embed_dim: Channels of the body, a multiple of the heads.
        depths: Hybrid attention blocks in each group.
        num_heads: Attention heads in each group.
        window_size: Side of the attention windows in pixels.
        compress_ratio: Factor between ``embed_dim`` and the bottleneck of the channel attention blocks.
        squeeze_factor: The same for the hidden layer of their channel attention.
        conv_scale: Factor of the channel attention blocks.
        overlap_ratio: How much longer the windows of keys and values in the overlapping attention are.
        mlp_ratio: Channels of the hidden layers of MLPs, per channel of the body.
        drop_path_rate: Probability that training leaves out a branch of the last block; from 0 in the first one it
            grows evenly.
        upscale: Upsampling factor.
        img_range: The network computes on pixels times this.

    Raises:
        ValueError: For sizes that do not fit together, or another scale.
    """


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
