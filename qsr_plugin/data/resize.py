"""Bicubic downscaling by the rule that made the low-resolution images of the usual benchmarks.

The rule is MATLAB's ``imresize(image, 1 / scale, 'bicubic')`` for ``uint8`` images: cubic convolution kernel with a =
-0.5 (R. G. Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981), stretched by the scale so
that it low-passes, weights normalised per output pixel, borders extended symmetrically, rows first. The result is
rounded and clipped to ``uint8`` between the two passes and again at the end; an implementation that rounds only once
differs from the published images by up to two grey levels.
"""

from __future__ import annotations

import math

import numpy as np

_SUPPORT = 4.0  # width of the cubic kernel at scale one, in input pixels
_CEIL_SLACK = 1e-9  # 0.07 * 100 is 7.000000000000001 and must not become eight pixels


def downscale(image: np.ndarray, scale: int) -> np.ndarray:
    """Downscale by an integer factor, bit for bit as the benchmarks' low-resolution images.

    Args:
        image: (H, W, C) uint8, any number of channels in any order.
        scale: Integer factor, 1 or larger; 1 returns a copy.

    Returns:
        (ceil(H / scale), ceil(W / scale), C) uint8.

    Raises:
        ValueError: ``image`` is not (H, W, C) uint8 or is empty, or ``scale`` is not a positive integer.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, np.integer)) or scale < 1:
        raise ValueError(f"scale is {scale!r}; it must be an integer of 1 or more (use shrink() for other factors).")
    return _resize(image, 1.0 / scale)


def shrink(image: np.ndarray, factor: float) -> np.ndarray:
    """Make an image smaller by any factor with the same kernel.

    Shrinking hides the block noise of JPEG photos, so that they can serve as clean high-resolution images.

    Args:
        image: (H, W, C) uint8.
        factor: Output size over input size, 0 < factor <= 1; 1 returns a copy.

    Returns:
        (ceil(H * factor), ceil(W * factor), C) uint8.

    Raises:
        ValueError: ``image`` is not (H, W, C) uint8 or is empty, or ``factor`` is outside (0, 1].
    """
    if not 0.0 < factor <= 1.0:
        raise ValueError(f"factor is {factor!r}; it must be larger than 0 and at most 1.")
    return _resize(image, float(factor))


def _resize(image: np.ndarray, factor: float) -> np.ndarray:
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.dtype != np.uint8 or image.size == 0:
        found = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(
            f"expected a non-empty uint8 array of shape (H, W, C), found {found}; "
            "qsr_plugin.data.images.to_uint8 converts 16-bit images."
        )
    if factor == 1.0:
        return image.copy()
    rows = _resize_rows(image, factor)
    return np.ascontiguousarray(_resize_rows(rows.transpose(1, 0, 2), factor).transpose(1, 0, 2))


def _resize_rows(image: np.ndarray, factor: float) -> np.ndarray:
    """One pass along the first axis: (H, W, C) uint8 -> (ceil(H * factor), W, C) uint8."""
    weights, indices = _taps(image.shape[0], factor)
    source = np.ascontiguousarray(image).astype(np.float64)
    total = np.zeros((len(weights), *image.shape[1:]))
    for tap in range(weights.shape[1]):
        total += weights[:, tap, None, None] * source[indices[:, tap]]
    return np.clip(np.floor(total + 0.5), 0, 255).astype(np.uint8)


def _taps(length: int, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (L', P) float64, normalised to one per row, and the input indices (L', P) they apply to."""
    out_length = max(1, math.ceil(length * factor - _CEIL_SLACK))
    width = _SUPPORT / factor
    centre = (np.arange(out_length) + 0.5) / factor - 0.5
    first = np.floor(centre - width / 2).astype(np.int64)
    positions = first[:, None] + np.arange(math.ceil(width) + 2)
    weights = _cubic((centre[:, None] - positions) * factor)
    weights /= weights.sum(axis=1, keepdims=True)
    used = weights.any(axis=0)
    mirrored = np.concatenate([np.arange(length), np.arange(length)[::-1]])
    return weights[:, used], mirrored[positions[:, used] % (2 * length)]


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel, a = -0.5, at distances in output pixels."""
    x = np.abs(distance)
    inner = (1.5 * x - 2.5) * x * x + 1.0
    outer = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x <= 1.0, inner, np.where(x <= 2.0, outer, 0.0))
