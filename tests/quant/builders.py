"""Build and calibrate any registered quantizer, so that shared tests need no line per method.

A class may serve activations, weights or both, so the unit of the shared tests is a pair (name, role). A test that a
published formula cannot pass is named in :data:`EXCEPTIONS` with the reason; a formula that has a gradient or a storage
of its own is written in :data:`SLOPES` and :data:`STORED`, and tested against that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from qsr_plugin.quant.quantizer import QUANTIZERS, Quantizer
from qsr_plugin.quant.recipe import register_parts

Observed = TypeVar("Observed", bound=Quantizer)

register_parts()

#: (quantizer, role, test) -> why the published formula does not have this property.
EXCEPTIONS: dict[tuple[str, str, str], str] = {
    ("daq", "act", "test_copies_are_independent"): "calibration only chooses between two formulas",
    ("daq_weight", "weight", "test_quantizing_twice_changes_nothing"): "the deviation is that of the tensor it gets",
    ("clip_corrected", "weight", "test_quantizing_twice_changes_nothing"): "its percentile follows the tensor it gets",
    ("linq", "act", "test_a_batch_equals_its_images_one_by_one"): "one range over the whole batch, as published",
    ("linq", "act", "test_equals_the_loop_over_images"): "one range over the whole batch, as published",
    ("dorefa_weight", "weight", "test_quantizing_twice_changes_nothing"): "the hyperbolic tangent is taken anew",
    ("dorefa_weight", "weight", "test_values_are_on_the_grid"): "the hyperbolic tangent moves values",
    ("ddtb", "act", "test_gradient_is_one_inside_and_zero_outside"): "it ends at the bounds, which are no levels",
    ("ddtb_weight", "weight", "test_quantizing_twice_changes_nothing"): "its percentile follows the tensor it gets",
    ("lsq", "act", "test_constant_data_are_kept"): "its step starts from the mean magnitude, of which it is no divisor",
    ("lsq", "weight", "test_constant_data_are_kept"): "as for activations",
    ("rlq", "act", "test_constant_data_are_kept"): "as lsq",
    ("rlq", "weight", "test_constant_data_are_kept"): "as lsq",
    ("daq_weight", "weight", "test_constant_data_are_kept"): "a constant has no deviation, from which the step follows",
    ("rlq", "act", "test_equals_the_loop_over_images"): "the step's gradient scale counts the batch, so it is another",
}

#: Quantizer -> d x_q / d x from (x, lowest level, highest level, step), where it is not one inside and zero outside.
SLOPES: dict[str, Callable[[Tensor, float, float, float], Tensor]] = {
    "daq_weight": lambda x, low, high, step: torch.ones_like(x),
    "rlq": lambda x, low, high, step: ((x >= low) & (x <= high)) * soft_slope(x / step, 1.0),
    # The largest element, which also has the gradient of the normaliser, is so large that its hyperbolic tangent is flat.
    "dorefa_weight": lambda x, low, high, step: high * (1 - x.tanh().square()),
    "ddtb_weight": lambda x, low, high, step: ((x > x.quantile(0.01)) & (x < x.quantile(0.99))).float(),
}

#: (quantizer, role) -> how many 32-bit numbers are stored, where it is not its parameters, or one step without any.
STORED: dict[tuple[str, str], int] = {
    ("daq", "act"): 0,
    ("linq", "act"): 0,
    ("affine", "act"): 2,
    ("ddtb", "act"): 2,
    ("ddtb_weight", "weight"): 2,
}

NAMES = sorted(QUANTIZERS)
#: Every registered quantizer with every role it can play.
PAIRS = [(name, role) for name in NAMES for role in QUANTIZERS[name].roles]
CHANNELS = 4
SHAPES = {"NCHW": (3, CHANNELS, 5, 6), "NLC": (3, 30, CHANNELS)}


def soft_slope(v: Tensor, k: float) -> Tensor:
    """Slope ``k sech^2(k (f - 1/2)) / (2 tanh(k/2))`` of a soft staircase at ``v = x / s``."""
    f = v - v.floor()
    return k / (k * (f - 0.5)).cosh().square() / (2 * math.tanh(k / 2))


def data(layout: str = "NCHW", batch: int = 3, seed: int = 0) -> Tensor:
    """Normal values of unit variance, ``(batch, 4, 5, 6)`` or ``(batch, 30, 4)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *SHAPES[layout][1:], generator=generator)


def make(name: str, role: str, bits: int | tuple[int, ...] = 4, layout: str = "NCHW") -> Quantizer:
    """A quantizer with its default options, not calibrated."""
    cls = QUANTIZERS[name]
    axis = 0 if role == "weight" else {"NCHW": 1, "NLC": -1}[layout]
    candidates = bits if isinstance(bits, tuple) else (bits,)
    if role in cls.per_channel:
        return cls(cls.Options(), candidates, role, axis, channels=CHANNELS if role == "act" else SHAPES[layout][0])
    return cls(cls.Options(), candidates, role, axis)


def observed(quantizer: Observed, *batches: Tensor) -> Observed:
    """The same quantizer after it has seen these batches, before what it settles with others."""
    quantizer.begin_calibration()
    for batch in batches:
        quantizer.observe(batch)
    quantizer.end_calibration()
    return quantizer


def calibrate_on(quantizer: Quantizer, x: Tensor) -> Quantizer:
    """Calibrate a quantizer outside of any network."""
    type(quantizer).settle([observed(quantizer, x)])
    return quantizer


def build(
    name: str, bits: int | tuple[int, ...] = 4, layout: str = "NCHW", seed: int = 0, role: str | None = None
) -> Quantizer:
    """A quantizer calibrated on half of the spread of :func:`data`; in the first of its roles if none is given."""
    quantizer = make(name, role or QUANTIZERS[name].roles[0], bits, layout)
    return calibrate_on(quantizer, data(layout, seed=seed) * 0.5)


def bounds(quantizer: Quantizer, x: Tensor, bits: int | None = None) -> tuple[float, float, float]:
    """Lowest level, highest level and step of a uniform quantizer (of ``x`` itself where it has no range)."""
    q = quantizer.qparams_of(x, bits) if hasattr(quantizer, "qparams_of") else quantizer.qparams(bits)
    if q.scale.dim():
        raise NotImplementedError("a grid for each channel has no two ends")
    scale, zero = q.scale.double().item(), q.zero_point.double().item()
    return (q.qmin - zero) * scale, (q.qmax - zero) * scale, scale


def _is_uniform(name: str, role: str) -> bool:
    try:
        bounds(build(name, role=role), data())
    except NotImplementedError:
        return False
    return True


ACTS = [pair for pair in PAIRS if pair[1] == "act"]
#: Those with one grid per tensor; the others have one per sample and channel, or per output channel of a weight.
UNIFORM = [pair for pair in PAIRS if _is_uniform(*pair)]
LEARNING = [pair for pair in PAIRS if build(pair[0], role=pair[1]).range_parameters()]
#: Those whose range is set by data or learned, so that a value can lie outside of it.
CLIPPING = [pair for pair in UNIFORM if QUANTIZERS[pair[0]].needs_calibration or pair in LEARNING]


def ranges(quantizer: Quantizer, y: Tensor) -> Iterable[Tensor]:
    """The parts of a quantized tensor that share one grid."""
    if any(QUANTIZERS[name] is type(quantizer) and role == quantizer.role for name, role in UNIFORM):
        return [y]
    if quantizer.role == "weight":
        return y.movedim(quantizer.channel_axis, 0).flatten(1)
    return y.movedim(quantizer.channel_axis, 1).flatten(2).flatten(0, 1)


def over(pairs: list[tuple[str, str]] = PAIRS) -> Callable[[Callable], Callable]:
    """Run a test with arguments ``name`` and ``role`` on pairs, but for those :data:`EXCEPTIONS` names it for."""

    def mark(test: Callable) -> Callable:
        kept = [pair for pair in pairs if (*pair, test.__name__) not in EXCEPTIONS]
        return pytest.mark.parametrize(("name", "role"), kept, ids=["-".join(pair) for pair in kept])(test)

    return mark
