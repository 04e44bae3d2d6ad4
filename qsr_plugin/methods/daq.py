"""DAQ: channel-wise distribution-aware quantization (Hong et al., WACV 2022, arXiv 2012.11230).

The grid of an activation is made anew for every channel of every image: its step is a constant times the channel's
standard deviation sigma, and the sigmas of an image are quantized themselves. Nothing is learned, and every element has
gradient one. With ``t`` the optimal steps for a unit Gaussian, ``b`` bits and ``L = 2^(b-1)``::

    step = t[b-1] sigma,   T = (L - 1/2) step
    signed:  y = clamp((round((x - mu) / step + 1/2) - 1/2) step, -T, T) + mu     mean mu, unbiased sigma
    ReLU:    y = (round((x - T) / step + 1/2) - 1/2) step + T                     levels 0, step, 2 step, ...

Three things differ from the released code. It decides between the two formulas by ``min(x) == 0`` over each batch: an
image's result depends on what it is batched with, and a ReLU tensor without a zero changes the formula. Here the same
test is made once, at calibration (``branch: batch`` is the released rule). The ReLU formula has no upper clamp there,
and so more than ``2^b`` levels; here it has one (``clamp_relu``). And a quantized sigma at or below zero, which turns
the grid around, is replaced by the sigma itself.
"""

from __future__ import annotations

import math
from typing import Literal, Union

import torch
from torch import Tensor

from qsr_plugin.quant.observers import Observer, Range, minmax
from qsr_plugin.quant.ops import TINY_RANGE, Limits, fake_quantize
from qsr_plugin.quant.quantizer import QParams, Quantizer, StrictOptions, register_quantizer

#: Optimal uniform steps of a unit Gaussian as published; ``b`` bits use entry ``b - 1``.
STEPS = (2.0, 1.596, 0.996, 0.586, 0.335, 0.188, 0.104, 0.057, 0.031)
#: Value of ``sigma_bits`` that leaves sigma as it is.
OFF = 32


def _steps(bits: int | Tensor) -> float | Tensor:
    """The published step for a bit width, or for a tensor of them."""
    if not isinstance(bits, Tensor):
        return STEPS[bits - 1]
    return torch.tensor(STEPS, device=bits.device)[bits.detach().round().long() - 1]


def _codes(bits: int | Tensor) -> Limits:
    """Codes of a grid of ``2^b`` levels around its anchor, which lies half a step from the nearest two."""
    top = 2.0 ** (bits - 1)
    return 1.0 - top, top


def _total(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.sum(dims, keepdim=True) if dims else x  # an empty tuple would mean every axis to torch


@register_quantizer("daq")
class DAQQuantizer(Quantizer):
    """Activation quantizer with a grid of its own for each channel of each image.

    Calibration decides the formula and nothing else.
    """

    class Options(StrictOptions):
        """Options of :class:`DAQQuantizer`.

        Attributes:
            sigma_bits: Bits of the quantized standard deviations, 2 to 9; 32 leaves them as they are. The authors
                advise 4, and 8 for very wide networks.
            branch: ``calibrated`` takes the ReLU formula where the smallest value seen at calibration was exactly 0;
                ``signed`` and ``relu`` fix it; ``batch`` decides anew for each batch.
            clamp_relu: Clamp large values of the ReLU formula to its ``2^b`` levels.
        """

        sigma_bits: Literal[2, 3, 4, 5, 6, 7, 8, 9, 32] = 4
        branch: Literal["calibrated", "signed", "relu", "batch"] = "calibrated"
        clamp_relu: bool = True

    bits_span = (2, 9)
    roles = ("act",)
    decisions = ("starts_at_zero",)
    starts_at_zero: Tensor

    def __init__(self, options: Options, candidates: tuple[int, ...], role: str, channel_axis: int) -> None:
        super().__init__(options, candidates, role, channel_axis)
        self.register_buffer("starts_at_zero", torch.tensor(False))
        self._starts_at_zero = False  # the same for Python, so that no forward asks the device

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize an activation, (N, C, H, W) or (N, ..., C) as the channel axis says; any range."""
        bits = self.expand(bits, x)
        values = x.detach()
        values = values if values.dtype in (torch.float32, torch.float64) else values.float()
        low, top = _codes(bits)
        if self.options.branch == "batch":
            rectified = values.amin() == 0
            grids = zip(self._relu_grid(values, bits), self._signed_grid(values, bits))
            anchor, step = (torch.where(rectified, relu, signed) for relu, signed in grids)
            high = top if self.options.clamp_relu else torch.where(rectified, math.inf, top)
        elif self._rectified:
            anchor, step = self._relu_grid(values, bits)
            high = top if self.options.clamp_relu else top * math.inf
        else:
            anchor, step = self._signed_grid(values, bits)
            high = top
        return fake_quantize(x, step, 1.0, (low, high), anchor=anchor, shift=0.5)

    @property
    def _rectified(self) -> bool:
        """Whether the ReLU formula holds."""
        return self.options.branch == "relu" or (self.options.branch == "calibrated" and self._starts_at_zero)

    def _signed_grid(self, x: Tensor, bits: int | Tensor) -> Range:
        """Anchor and step from mean and unbiased standard deviation; of a single element, sigma is 0."""
        dims = self._places(x)
        total = _total(x, dims)
        count = x.numel() // total.numel()
        mean = total / count
        variance = _total((x - mean).square_(), dims) / max(count - 1, 1)
        return mean, self._step(variance.sqrt_(), bits)

    def _relu_grid(self, x: Tensor, bits: int | Tensor) -> Range:
        """Anchor and step from the positive part, with one element more in the count than there are."""
        dims = self._places(x)
        positive = x.relu()
        count = _total(positive.sign(), dims) + 1.0
        mean = _total(positive, dims) / count
        # A difference of two rounded numbers can fall below zero.
        variance = (_total(positive.square_(), dims) / count - mean.square()).clamp_min_(0.0)
        step = self._step(variance.sqrt_(), bits)
        return (_codes(bits)[1] - 0.5) * step, step

    def _places(self, x: Tensor) -> tuple[int, ...]:
        """Axes that a channel's statistics run over: all but those of images and channels."""
        channels = self.channel_axis % x.dim()
        return tuple(axis for axis in range(1, x.dim()) if axis != channels)

    def _step(self, sigma: Tensor, bits: int | Tensor) -> Tensor:
        """Step from the standard deviations, which are quantized across the channels of each image first."""
        q, axis = self.options.sigma_bits, self.channel_axis
        if q != OFF and sigma.shape[axis] > 1:  # a single channel has no spread to quantize with
            spread, mean = torch.std_mean(sigma, axis, keepdim=True)
            grid = (STEPS[q - 1] * spread).clamp_min_(TINY_RANGE)
            quantized = fake_quantize(sigma, grid, 1.0, _codes(q), anchor=mean, shift=0.5)
            sigma = torch.where(quantized > 0, quantized, sigma)
        return (_steps(bits) * sigma).clamp_min(TINY_RANGE)

    def make_observer(self) -> Observer:
        """Smallest and largest value of all batches."""
        seen: list[Range] = []

        def extremes(x: Tensor) -> Range:
            lows, highs = zip(*seen, minmax(x))
            seen[:] = [(torch.stack(lows).amin(), torch.stack(highs).amax())]
            return seen[0]

        return Observer(extremes, momentum=0.0)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Decide the formula."""
        self.starts_at_zero.copy_(low == 0)
        self._starts_at_zero = bool(self.starts_at_zero)

    def overhead_ops(self, numel: int) -> int:
        """Additions, multiplications and comparisons that a range known beforehand would not need, per element.

        Signed: mean 1, variance 3 (subtract, square, add), removal of the mean 1, and 2 to give step and mean back.
        ReLU: count 2, sum 1, sum of squares 2, and 1 to give the step back, which belongs to an input channel and so
        cannot wait until after the convolution. What is done once per channel is left out. Where calibration chooses
        the formula, the figure is that of the signed one until it has.
        """
        return (6 if self._rectified else 7) * numel


@register_quantizer("daq_weight")
class DAQWeightQuantizer(Quantizer):
    """Weight quantizer: one grid per tensor, ``2^b`` levels ``+-(k + 1/2) t[b-1] sigma``, anew in every forward.

    ``sigma`` is the unbiased standard deviation of the whole tensor (detached). Zero is no level. Every element has
    gradient one, clamped ones too. No state.
    """

    bits_span = (2, 9)
    roles = ("weight",)
    needs_calibration = False

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize a weight of any shape."""
        return fake_quantize(x, self._step(x, bits), 1.0, _codes(bits), shift=0.5)

    @staticmethod
    def _step(weight: Tensor, bits: int | Tensor) -> Tensor:
        values = weight.detach().float()
        sigma = values.std() if values.numel() > 1 else values.abs().mean()
        return (_steps(bits) * sigma).clamp_min(TINY_RANGE)

    def qparams_of(self, weight: Tensor, bits: Union[int, None] = None) -> QParams:
        """Grid of a given weight; this quantizer has no range of its own."""
        bits = bits or self.candidates[0]
        scale = self._step(weight, bits)
        low, high = _codes(bits)
        return QParams(scale, torch.full_like(scale, 0.5), int(low), int(high))

    def extra_storage_bits(self) -> int:
        """One 32-bit step is stored with the codes."""
        return 32
