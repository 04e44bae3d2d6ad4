"""FQSR: fully quantized super-resolution (Wang et al., ACM MM 2021, arXiv 2011.14265).

Inputs, weights and outputs of convolutions and the operands of the skip additions are quantized, each place within a
trainable interval ``c`` and ``n = 2^b - 1`` steps::

    half range:  y = c round(n clamp(x / c, 0, 1)) / n                       levels 0, c/n, ..., c
    full range:  y = c (2 round(n (clamp(x / c, -1, 1) + 1) / 2) / n - 1)    levels c (2k - n) / n, zero is not one

``d y / d c`` is ``(y - x) / c`` inside, +1 above and, in full range, -1 below. The released code uses ``|c|``; here the
projection after each step keeps ``c`` positive, which is the same without the jump of the gradient at zero.

In a stage that tracks ranges by mean, c follows the mean of ``max|x|`` over the calls of the training and nothing is
quantized. The released code counts calls in evaluation too, so that a validation would use up its 20 calls; here only
training counts, and the stage says how long. The loss that belongs to it is ``CalibrationLoss``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from qsr_plugin.quant.observers import Observer, Range, minmax
from qsr_plugin.quant.ops import TINY_RANGE, fake_quantize, int_limits
from qsr_plugin.quant.quantizer import QParams, Quantizer, StrictOptions, register_quantizer
from qsr_plugin.quant.reduce import max_over_ranks


def _magnitude(x: Tensor) -> Range:
    """Smallest value, at most 0, and largest magnitude."""
    low, high = minmax(x)
    return low.clamp_max(0.0), torch.maximum(low.abs(), high.abs())


@register_quantizer("fqsr")
class FQSRQuantizer(Quantizer):
    """Quantizer with a trainable interval, one per candidate bit width."""

    class Options(StrictOptions):
        """Options of :class:`FQSRQuantizer`.

        Attributes:
            range: ``half`` is [0, c], ``full`` is [-c, c]; ``auto`` is full for weights, and for activations half if
                calibration saw no negative value.
        """

        range: Literal["auto", "full", "half"] = "auto"

    tracking = "mean"
    decisions = ("non_negative",)
    non_negative: Tensor
    tracked: Tensor

    def __init__(self, options: Options, candidates: tuple[int, ...], role: str, channel_axis: int) -> None:
        super().__init__(options, candidates, role, channel_axis)
        self.interval = nn.Parameter(torch.zeros(() if len(candidates) == 1 else (len(candidates),)))
        self.register_buffer("tracked", torch.tensor(0))  # calls that the tracked mean is over
        self.register_buffer("non_negative", torch.tensor(False))
        self._non_negative = False  # the same for Python, so that no forward asks the device

    @property
    def _half(self) -> bool:
        if self.options.range == "auto":
            return self.role == "act" and self._non_negative
        return self.options.range == "half"

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize an activation (N, ...) or a weight of any shape; a value on a bound counts as inside."""
        c, bits = self.select(self.interval, bits, x)
        limits = int_limits(bits, signed=False)
        steps = limits[1]
        if self._half:
            return fake_quantize(x, c, steps, limits, bounds=(torch.zeros_like(c), c))
        # A shift by exactly n/2 puts zero on a rounding tie whatever c is, as the formula does.
        return fake_quantize(x, 2.0 * c, steps, limits, bounds=(-c, c), shift=steps / 2.0)

    def track(self, x: Tensor, momentum: float | str) -> None:
        """Take ``max|x|`` of the joint batch of all processes into the mean over all calls."""
        with torch.no_grad():
            latest = max_over_ranks(_magnitude(x)[1])
            self.tracked.add_(1)
            self.interval.lerp_(latest.expand_as(self.interval), 1.0 / self.tracked.to(latest.dtype))
            self.project()
            self.mark_calibrated()

    def quantize_tracked(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """``x`` itself: the network is float while intervals are measured."""
        return x

    def make_observer(self) -> Observer:
        """Mean over the batches of the largest magnitude, and whether there were negative values."""
        return Observer(_magnitude, momentum="mean")

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take ``high`` as the interval of every candidate; a tracked mean starts anew."""
        self.interval.copy_(high.expand_as(self.interval))
        self.tracked.zero_()
        self.non_negative.copy_(low >= 0)
        self._non_negative = bool(self.non_negative)
        self.project()

    def project(self) -> None:
        """Keep the interval positive."""
        with torch.no_grad():
            self.interval.clamp_(min=TINY_RANGE)

    def qparams(self, bits: int | None = None) -> QParams:
        """Grid at one bit width; in full range the zero point lies between two codes."""
        bits = bits or self.candidates[0]
        c = self.interval.detach() if self.interval.dim() == 0 else self.interval.detach()[self.candidates.index(bits)]
        _, steps = int_limits(bits, signed=False)
        if self._half:
            return QParams(c / steps, torch.zeros_like(c), 0, int(steps))
        return QParams(2.0 * c / steps, torch.full_like(c, steps / 2.0), 0, int(steps))

    def range_parameters(self) -> list[nn.Parameter]:
        """The interval."""
        return [self.interval]
