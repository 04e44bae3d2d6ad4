"""Statistics of low-resolution images that bit policies look at: gradients, edge scores and entropies.

All take a batch of RGB images with values in 0..1, treat each image by itself, carry no gradient and ask the device for
nothing. Sums run along one image only and convolutions are written as differences of shifted images, so the number for
an image does not depend on the batch around it, and a constant image has gradients and edges of exactly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Pixels per step of :func:`entropies`; bounds the memory by 32 numbers for each of them.
_CHUNK = 4096
_BINS, _SIGMA, _FLOOR = 32, 0.0255, 1e-12

#: Float operations per pixel, for reports. Gradients: luminance 5, two derivatives 10, their magnitudes and means 4.
#: Edge score: luminance 5, response 6, magnitude, limit and mean 3. Entropy: luminance 5, and 5 for each centre.
GRADIENT_OPS, EDGE_OPS, ENTROPY_OPS = 19, 14, 5 + 5 * _BINS


@torch.no_grad()
def gradient_magnitudes(image: Tensor) -> Tensor:
    """Mean absolute horizontal and vertical derivative of the luminance (Hong et al., ECCV 2022, Sec. 3.2).

    Args:
        image: ``(N, 3, H, W)``, RGB in 0..1, of any size from 1x1.

    Returns:
        ``(N, 2)``: means over the pixels of ``|d/dx|`` and ``|d/dy|`` by the 3x3 Sobel kernels divided by 8, with
        replicated borders, in luminance (0..1) per pixel. In float32, or float64 if ``image`` is.
    """
    gray = F.pad(_weighted(_precise(image), (0.299, 0.587, 0.114)).unsqueeze(1), (1, 1, 1, 1), mode="replicate")
    across = gray[..., 2:] - gray[..., :-2]
    down = gray[..., 2:, :] - gray[..., :-2, :]
    dx = (across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]) / 8
    dy = (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]) / 8
    return torch.stack([dx.abs().flatten(1).mean(1), dy.abs().flatten(1).mean(1)], 1)


@torch.no_grad()
def edge_scores(image: Tensor, *, saturated: bool = False) -> Tensor:
    """Mean strength of edges (Tian et al., CVPR 2023), with the integer arithmetic of OpenCV.

    The luminance is rounded to 8 bits and convolved with ``[[2, 0, 2], [0, -8, 0], [2, 0, 2]]``; borders are mirrored
    without repeating the outermost pixel (repeated where an axis has only one), magnitudes saturate at 255.

    Args:
        image: ``(N, 3, H, W)``, RGB in 0..1, of any size from 1x1; taken to the nearest of 256 levels.
        saturated: The score of the authors' release: every channel value from 1/255 on counts as 1, so that most
            images score 0. Only for comparison with it.

    Returns:
        ``(N,)``, mean over the pixels, 0..255, not rounded to decimals. In float32, or float64 if ``image`` is.
    """
    levels = (_precise(image) * 255).round().clamp(0, 255)
    if saturated:
        levels = levels.clamp(max=1) * 255
    red, green, blue = levels.to(torch.int32).unbind(1)
    gray = ((red * 9798 + green * 19235 + blue * 3735 + (1 << 14)) >> 15).to(levels.dtype).unsqueeze(1)
    gray = F.pad(gray, (1, 1, 0, 0), mode="reflect" if gray.shape[-1] > 1 else "replicate")
    gray = F.pad(gray, (0, 0, 1, 1), mode="reflect" if gray.shape[-2] > 1 else "replicate")
    sides = gray[..., :-2] + gray[..., 2:]
    response = 2 * (sides[..., :-2, :] + sides[..., 2:, :]) - 8 * gray[..., 1:-1, 1:-1]
    strength = response.abs().clamp(max=255).flatten(1)  # whole numbers: their sum is exact
    return strength.to(torch.int64).sum(1).to(levels.dtype) / strength.shape[1]


@torch.no_grad()
def entropies(image: Tensor) -> Tensor:
    """Entropy of the distribution of luminances, estimated with Gaussian kernels (Wang et al., AAAI 2025).

    Args:
        image: ``(N, 3, H, W)``, RGB in 0..1, of any size from 1x1; all pixels count.

    Returns:
        ``(N,)`` in nats, at most ``ln 32``: ``-sum_j P_j ln P_j`` with P the normalised means over the pixels of
        ``exp(-((y - c_j) / sigma)^2 / 2)`` at 32 centres c from 0 to 1, sigma 0.0255. In float32, or float64 if
        ``image`` is.
    """
    gray = _weighted(_precise(image), (0.2989, 0.5870, 0.1140)).flatten(1)
    centres = torch.arange(_BINS, device=gray.device, dtype=gray.dtype).unsqueeze(1) / (_BINS - 1)
    total = gray.new_zeros(gray.shape[0], _BINS)
    for pixels in gray.split(_CHUNK, dim=1):
        kernels = ((pixels.unsqueeze(1) - centres) / _SIGMA).square_().mul_(-0.5).exp_().clamp_(min=_FLOOR)
        total += kernels.sum(2)
    share = total / gray.shape[1]
    share = share / (share.sum(1, keepdim=True) + _FLOOR) + _FLOOR
    return -(share * share.log()).sum(1)


def _precise(image: Tensor) -> Tensor:
    """At least float32."""
    return image if image.dtype == torch.float64 else image.float()


def _weighted(image: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """``(N, H, W)``: weighted sum of the channels, one term after the other."""
    red, green, blue = image.unbind(1)
    return weights[0] * red + weights[1] * green + weights[2] * blue
