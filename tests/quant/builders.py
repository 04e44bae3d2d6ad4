"""Build and calibrate any registered quantizer, so that shared tests need no line per method."""

from __future__ import annotations

import torch
from torch import Tensor

from qsr_plugin.quant.quantizer import QUANTIZERS, Quantizer
from qsr_plugin.quant.recipe import register_parts

register_parts()

#: Every registered quantizer, with the role it plays in a test.
NAMES = sorted(QUANTIZERS)
ACT_NAMES = [name for name in NAMES if "act" in QUANTIZERS[name].roles]
SHAPES = {"NCHW": (3, 4, 5, 6), "NLC": (3, 30, 4)}


def data(layout: str = "NCHW", batch: int = 3, seed: int = 0) -> Tensor:
    """Normal values of unit variance, ``(batch, 4, 5, 6)`` or ``(batch, 30, 4)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *SHAPES[layout][1:], generator=generator)


def build(name: str, bits: int | tuple[int, ...] = 4, layout: str = "NCHW", seed: int = 0) -> Quantizer:
    """A quantizer calibrated on half of the spread of :func:`data`, so that some of it is clipped."""
    cls = QUANTIZERS[name]
    candidates = bits if isinstance(bits, tuple) else (bits,)
    role = "act" if "act" in cls.roles else "weight"
    axis = 0 if role == "weight" else {"NCHW": 1, "NLC": -1}[layout]
    quantizer = cls(cls.Options(), candidates, role, axis)
    quantizer.begin_calibration()
    quantizer.observe(data(layout, seed=seed) * 0.5)
    quantizer.end_calibration()
    return quantizer


def bounds(quantizer: Quantizer, x: Tensor, bits: int | None = None) -> tuple[float, float, float]:
    """Lowest level, highest level and step of a uniform quantizer (of ``x`` itself where it has no range)."""
    q = quantizer.qparams(bits) if quantizer.needs_calibration else quantizer.qparams_of(x, bits)
    scale, zero = q.scale.double().item(), q.zero_point.double().item()
    return (q.qmin - zero) * scale, (q.qmax - zero) * scale, scale
