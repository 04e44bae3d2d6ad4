"""Bicubic upsampling by the rule that made the benchmarks' images, on tensors of any device and with gradients."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

#: Pixels that a result may depend on, to either side of the one it lies in.
_REACH = 2


def upsample_bicubic(x: Tensor, scale: int) -> Tensor:
    """Enlarge images as MATLAB's ``imresize(x, scale, 'bicubic')`` does, without rounding.

    Cubic convolution kernel with a = -0.5 (Keys, 1981), pixels as areas, borders extended symmetrically with the last
    pixel repeated. PyTorch's own bicubic interpolation has a = -0.75.

    Args:
        x: (N, C, H, W), any float type.
        scale: Whole number from 1.

    Returns:
        (N, C, scale H, scale W), of the type of ``x``.
    """
    for dim in (2, 3):
        size = x.shape[dim]
        index = torch.arange(-_REACH, size + _REACH, device=x.device)
        mirrored = torch.minimum(torch.maximum(index, -1 - index), 2 * size - 1 - index)
        padded = x.index_select(dim, mirrored.clamp(0, size - 1))  # of one or two pixels, mirror images leave it
        taps = [padded.narrow(dim, start, size) for start in range(2 * _REACH + 1)]
        phases = [sum(w * tap for w, tap in zip(weights, taps) if w) for weights in _weights(scale)]
        x = torch.stack(phases, dim + 1).flatten(dim, dim + 1)
    return x


@lru_cache
def _weights(scale: int) -> tuple[tuple[float, ...], ...]:
    """For each of the ``scale`` new pixels of a pixel, the weights of the pixels from 2 before to 2 after it."""
    shifts = [(phase + 0.5) / scale - 0.5 for phase in range(scale)]
    return tuple(tuple(_cubic(shift - offset) for offset in range(-_REACH, _REACH + 1)) for shift in shifts)


def _cubic(distance: float) -> float:
    """Keys' kernel with a = -0.5."""
    d = math.fabs(distance)
    if d <= 1:
        return 1.5 * d**3 - 2.5 * d**2 + 1
    return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0
