"""Generic uniform quantizers that published tables compare with: LinQ, the affine grid of a whitepaper, DoReFa, LSQ.

``linq``: the largest magnitude of the tensor itself, as used in CADyQ (Hong et al., ECCV 2022) and named there after
Krishnamoorthi (arXiv 1806.08342). ``affine``: that whitepaper's own activation quantizer, with a moving average of
minimum and maximum. ``dorefa``: Zhou et al., arXiv 1606.06160. ``lsq``: Esser et al., ICLR 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsr_plugin.methods.pams import MaxAbsQuantizer
from qsr_plugin.quant.observers import Momentum, Observer, Range, minmax
from qsr_plugin.quant.ops import TINY_RANGE, fake_quantize, int_limits, per_sample
from qsr_plugin.quant.quantizer import QParams, Quantizer, Role, StrictOptions, register_quantizer
from qsr_plugin.quant.reduce import max_over_ranks
from qsr_plugin.quant.step_quantizer import SignedByData, StepQuantizer


@register_quantizer("linq")
class LinQQuantizer(MaxAbsQuantizer):
    """The grid of :class:`MaxAbsQuantizer` for activations as well: symmetric, ``2^b - 1`` levels, nothing clipped.

    The range is taken over the whole batch as published, so an image's result depends on those it shares a batch with.
    In a step of a distributed training the batch is that of all processes, at the price of one small message per place.
    """

    class Options(StrictOptions):
        """Options of :class:`LinQQuantizer`.

        Attributes:
            per_sample: Give each sample of an activation a range of its own.
        """

        per_sample: bool = False

    roles = ("act", "weight")

    def largest(self, x: Tensor) -> Tensor:
        """``max|x| + 1e-8``, detached; of each sample if so asked."""
        if self.role == "weight" or not self.options.per_sample:
            largest = super().largest(x)
            # Without a gradient a process may be alone, looking for the place where numbers went bad.
            alone = self.role == "weight" or not (self.training and torch.is_grad_enabled())
            return largest if alone else max_over_ranks(largest)
        low, high = torch.aminmax(x.detach().float().flatten(1), dim=1)
        return per_sample(torch.maximum(high, -low) + 1e-8, x)

    def extra_storage_bits(self) -> int:
        """Nothing is stored for an activation."""
        return super().extra_storage_bits() if self.role == "weight" else 0

    def overhead_ops(self, numel: int) -> int:
        """The search for the largest magnitude of an activation: an absolute value and a comparison per element."""
        return 0 if self.role == "weight" else 2 * numel


def _minmax_with_zero(x: Tensor) -> Range:
    low, high = minmax(x)
    return low.clamp(max=0.0), high.clamp(min=0.0)


@register_quantizer("affine")
class AffineQuantizer(Quantizer):
    """``x_q = (clip(round(x / s) + z, 0, 2^b - 1) - z) s`` with ``s = (high - low) / (2^b - 1)`` and integer z.

    ``[low, high]`` holds zero, and ``z = round(-low / s)`` makes it a level. The range is a moving average of batch
    minimum and maximum, taken in calibration and, while ranges are tracked, in training; it has no gradient. Gradient
    one between the ends of the grid (which z moves by up to half a step from low and high), zero outside.
    """

    class Options(StrictOptions):
        """Options of :class:`AffineQuantizer`.

        Attributes:
            momentum: Weight of the past when calibration batches are joined.
        """

        momentum: Momentum = 0.99

    roles = ("act",)
    tracking = "momentum"

    def __init__(self, options: Options, candidates: tuple[int, ...], role: Role, channel_axis: int) -> None:
        super().__init__(options, candidates, role, channel_axis)
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize an activation of any shape."""
        span, steps, zero = self._grid(self.expand(bits, x))
        limits = (-zero, steps - zero)
        ends = tuple(code * span / steps for code in limits)
        return fake_quantize(x, span, steps, limits, bounds=ends)

    def _grid(self, bits: int | Tensor) -> tuple[Tensor, float | Tensor, Tensor]:
        _, steps = int_limits(bits, signed=False)
        span = self.high - self.low
        return span, steps, torch.round(-self.low * steps / span)

    def track(self, x: Tensor, momentum: float) -> None:
        """Move the range by this batch, joined over processes."""
        with torch.no_grad():
            low, high = _minmax_with_zero(x)
            latest = max_over_ranks(torch.stack((-low, high)))
            low, high = self.moving_average(torch.stack((-self.low, self.high)), latest, momentum)
            self.set_range(-low, high)
            self.mark_calibrated()

    def make_observer(self) -> Observer:
        """Minimum and maximum, zero included."""
        return Observer(_minmax_with_zero, self.options.momentum)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take a range, extended to hold zero."""
        self.low.copy_(low.clamp(max=0.0))
        self.high.copy_(torch.maximum(high, self.low + TINY_RANGE))

    def qparams(self, bits: int | None = None) -> QParams:
        """Grid at one bit width."""
        span, steps, zero = self._grid(bits or self.candidates[0])
        return QParams(span / steps, zero, 0, int(steps))

    def extra_storage_bits(self) -> int:
        """Minimum and maximum."""
        return 2 * 32


def _signed_magnitude(x: Tensor) -> Range:
    """Largest magnitude m as ``(-m, m)``, or ``(0, m)`` for a tensor without values below -1e-5."""
    low, high = minmax(x)
    largest = torch.maximum(high, -low)
    return torch.where(low < -1e-5, -largest, torch.zeros_like(largest)), largest


@register_quantizer("dorefa")
class DoReFaQuantizer(SignedByData):
    """``k(clip(x, 0, 1); b)`` with ``k(x; b) = round((2^b - 1) x) / (2^b - 1)``, for activations of any size.

    Published for activations in [0, 1]; those of super-resolution networks are neither that small nor all positive. So
    by default they are divided by a largest magnitude m that calibration sets, and multiplied back: 2^b levels from 0
    to m, or from -m to m where calibration saw values below zero (then without a level at zero). m is not trained.
    Gradient one inside, bounds included, and zero outside.
    """

    class Options(StrictOptions):
        """Options of :class:`DoReFaQuantizer`.

        Attributes:
            rescale: Divide by the calibrated magnitude; without it the published form, clipped to [0, 1].
            momentum: Weight of the past when calibration batches are joined.
        """

        rescale: bool = True
        momentum: Momentum = 0.9

    roles = ("act",)

    def __init__(self, options: Options, candidates: tuple[int, ...], role: Role, channel_axis: int) -> None:
        self.needs_calibration = options.rescale
        super().__init__(options, candidates, role, channel_axis)
        self.register_buffer("largest", torch.ones(()))

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize an activation of any shape."""
        limits, high = int_limits(self.expand(bits, x), signed=False), self.largest
        if not self._signed:
            return fake_quantize(x, high, limits[1], limits, bounds=(torch.zeros_like(high), high))
        return fake_quantize(x, 2.0 * high, limits[1], limits, bounds=(-high, high), anchor=-high)

    def make_observer(self) -> Observer:
        """Largest magnitude, and whether there are values below zero."""
        return Observer(_signed_magnitude, self.options.momentum)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the largest magnitude ``high``; a negative ``low`` signs the grid."""
        self.decide_sign(low)
        self.largest.copy_(high.clamp_min(TINY_RANGE))

    def qparams(self, bits: int | None = None) -> QParams:
        """Grid at one bit width; the zero point of a signed one lies between two codes."""
        _, steps = int_limits(bits or self.candidates[0], signed=False)
        width, zero = (2.0, steps / 2) if self._signed else (1.0, 0.0)
        return QParams(width * self.largest / steps, torch.full_like(self.largest, zero), 0, int(steps))

    def extra_storage_bits(self) -> int:
        """The magnitude."""
        return 32


#: The published form divides by no less: the gradient of weights that are all zero is one over it.
LEAST_NORMALISER = 1e-3


@register_quantizer("dorefa_weight")
class DoReFaWeightQuantizer(Quantizer):
    """``w_q = m (2 k(t / (2 max|t|) + 1/2; b) - 1)`` with ``t = tanh(w)``: 2^b levels from -m to m, none at zero.

    ``max|t|`` is not detached, so the largest element also gets the gradient of the normaliser. Published with m = 1,
    which loses the size of the weights; by default m is max|w|, detached. The published form takes ``max|t|`` as 0.001
    at least.
    """

    class Options(StrictOptions):
        """Options of :class:`DoReFaWeightQuantizer`.

        Attributes:
            rescale: Multiply by the largest magnitude of the weights; without it the published form.
        """

        rescale: bool = True

    roles = ("weight",)
    needs_calibration = False

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize a weight of any shape."""
        squashed = (x if x.dtype in (torch.float32, torch.float64) else x.float()).tanh()
        least = TINY_RANGE if self.options.rescale else LEAST_NORMALISER
        unit = squashed / squashed.abs().amax().clamp_min(least)
        _, steps = int_limits(bits, signed=False)
        one = unit.new_ones(())
        return (fake_quantize(unit, 2.0 * one, steps, anchor=-one) * self._magnitude(x)).to(x.dtype)

    def _magnitude(self, weight: Tensor) -> Tensor:
        largest = weight.detach().float().abs().amax().clamp_min(TINY_RANGE)
        return largest if self.options.rescale else torch.ones_like(largest)

    def qparams_of(self, weight: Tensor, bits: int | None = None) -> QParams:
        """Grid of a given weight; the zero point lies between two codes."""
        _, steps = int_limits(bits or self.candidates[0], signed=False)
        scale = 2.0 * self._magnitude(weight) / steps
        return QParams(scale, torch.full_like(scale, steps / 2), 0, int(steps))

    def extra_storage_bits(self) -> int:
        """One 32-bit step is stored with the codes."""
        return 32


@register_quantizer("lsq")
class LSQQuantizer(StepQuantizer):
    """A learned step; the gradient scale counts a weight's elements, or the features of one sample.

    A value exactly on a bound counts as outside, so the zeros after a ReLU pass no gradient on an unsigned grid.
    """

    ties = "outside"

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize a weight, or an activation (N, ...)."""
        return self.quantize_steps(x, bits, x.numel() if self.role == "weight" else x[0].numel())
