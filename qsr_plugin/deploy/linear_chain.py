"""Modules that are linear, but for a constant, and treat all places of an image alike: what they do is one convolution.

Everything is decided by numbers, in float64, never by what a module is called. ``scale`` is the number of output pixels
per input pixel and side; lengths are in input pixels unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Farthest input pixel that a pixel of the result may depend on.
MAX_REACH = 15
#: Differences below this share of the largest value are rounding.
_ROUNDING = 1e-9
#: Weights below this share of the largest one are zero.
ZERO = 1e-12
#: A nonlinear function may look linear at one size of values.
_AMPLITUDES = (1.0, 1e4)
#: Impulses that run together.
_CHUNK = 16

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AffineMap:
    """``pixel_shuffle(conv2d(x, kernel, bias), scale)``, equal to a chain of modules except near borders.

    Attributes:
        kernel: (C' * scale**2, C, kh, kw) float64, kh and kw odd; the result is centred.
        bias: (C' * scale**2,) float64.
        scale: Output pixels per input pixel and side.
        ring: Width of the border where the two differ, in output pixels.
    """

    kernel: Tensor
    bias: Tensor
    scale: int
    ring: int


def in_float64(modules: Sequence[nn.Module]) -> nn.Sequential:
    """A copy of modules, one after the other, on the CPU and in float64."""
    return nn.Sequential(*deepcopy(list(modules))).cpu().double().eval().requires_grad_(False)


@torch.no_grad()
def nonlinearity(module: nn.Module, channels: int, scale: int) -> str | None:
    """Why a module is not linear with a constant, or does not treat all places alike; ``None`` if neither.

    Args:
        module: Takes (1, channels, h, w) and returns (1, C', scale h, scale w).
        channels: Of its input.
        scale: Its scale.
    """
    try:
        f = in_float64([module])
        if not _is_linear(f, channels):
            return "is not linear"
        radius = reach(f, channels, scale)
        if radius is None:
            return f"reads further than {MAX_REACH} pixels"
        return None if _is_equivariant(f, channels, scale, radius) else "does not treat all places of an image alike"
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
        return f"cannot be looked at in float64 ({type(error).__name__}: {error})".splitlines()[0]


def _is_linear(f: Function, channels: int) -> bool:
    shape, a, b = (1, channels, 9, 11), 1.7, -0.6
    constant = f(torch.zeros(shape, dtype=torch.float64))
    for amplitude in _AMPLITUDES:
        x, y = (random_map(shape, seed) * amplitude for seed in (1, 2))
        left, right = f(a * x + b * y) - constant, a * (f(x) - constant) + b * (f(y) - constant)
        if not equal(left, right):
            return False
    return True


def _is_equivariant(f: Function, channels: int, scale: int, radius: int) -> bool:
    """Whether a shift of the input shifts the result, away from the borders."""
    side, margin = 4 * radius + 8, radius + 1
    x = random_map((1, channels, side + 1, side + 2), 3)
    before, after = f(x[..., :-1, :-2]), f(x[..., 1:, 2:])
    low, high = scale * margin, scale * (side - margin)
    return equal(
        before[..., low + scale : high, low + 2 * scale : high], after[..., low : high - scale, low : high - 2 * scale]
    )


@torch.no_grad()
def reach(f: Function, channels: int, scale: int) -> int | None:
    """Distance to the farthest pixel of the result that an input pixel changes; ``None`` if above :data:`MAX_REACH`.

    Args:
        f: (N, channels, h, w) to (N, C', scale h, scale w), float64.
        channels: Of its input.
        scale: Its scale.
    """
    for radius in (2, 4, 8, MAX_REACH + 1):
        x = torch.zeros(1, channels, 2 * radius + 1, 2 * radius + 1, dtype=torch.float64)
        constant = f(x)
        x[..., radius, radius] = random_map((1, channels), 4)
        changed = F.pixel_unshuffle(f(x) - constant, scale).abs().amax((0, 1))
        rows, columns = torch.where(changed > ZERO * changed.max())
        farthest = int(torch.cat((rows - radius, columns - radius)).abs().max()) if len(rows) else 0
        if farthest < radius:
            return farthest
    return None


@torch.no_grad()
def affine_map(f: Function, channels: int, scale: int, radius: int) -> AffineMap | None:
    """The convolution that a chain is, from its response to an impulse in every channel.

    Args:
        f: (N, channels, h, w) to (N, C', scale h, scale w), float64, linear with a constant.
        channels: Of its input.
        scale: Its scale.
        radius: Its :func:`reach`.

    Returns:
        ``None`` if the two differ away from the borders.
    """
    blank = torch.zeros(1, channels, 2 * radius + 1, 2 * radius + 1, dtype=torch.float64)
    constant, responses = f(blank), []
    for start in range(0, channels, _CHUNK):
        chosen = torch.arange(start, min(start + _CHUNK, channels))
        x = blank.repeat(len(chosen), 1, 1, 1)
        x[torch.arange(len(chosen)), chosen, radius, radius] = 1
        responses.append(F.pixel_unshuffle(f(x) - constant, scale).flip(2, 3))
    bias = F.pixel_unshuffle(constant, scale)[0, :, radius, radius].clone()
    kernel = _trimmed(torch.cat(responses).transpose(0, 1))

    side = 4 * radius + 7
    x = random_map((1, channels, side, side), 5)
    padding = (kernel.shape[2] // 2, kernel.shape[3] // 2)
    want, got = f(x), F.pixel_shuffle(F.conv2d(x, kernel, bias, padding=padding), scale)
    ring = _ring(_differs(want, got))
    if ring > scale * (radius + 1):
        return None
    return AffineMap(kernel.contiguous(), bias, scale, ring)


def _trimmed(kernel: Tensor) -> Tensor:
    """Without outer rows and columns of zeros, still centred."""
    used = kernel.abs().amax((0, 1)) > ZERO * kernel.abs().max()
    for axis in (0, 1):
        middle = used.shape[axis] // 2
        lines = torch.where(used.any(1 - axis))[0]
        radius = int((lines - middle).abs().max()) if len(lines) else 0
        kernel = kernel.narrow(2 + axis, middle - radius, 2 * radius + 1)
    return kernel


def _ring(differs: Tensor) -> int:
    """Width of the border that holds every differing pixel."""
    side = differs.shape[-1]
    rows, columns = torch.where(differs[0].any(0))
    nearest = torch.stack((rows, columns, side - 1 - rows, side - 1 - columns)).amin(0)
    return int(nearest.max()) + 1 if len(rows) else 0


def _differs(left: Tensor, right: Tensor) -> Tensor:
    return ~((left - right).abs() <= _ROUNDING * left.abs().max())


def equal(left: Tensor, right: Tensor) -> bool:
    """Whether two results in float64 differ by rounding only."""
    return not bool(_differs(left, right).any())


def random_map(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal random numbers in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
