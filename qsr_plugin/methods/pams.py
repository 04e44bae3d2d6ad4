"""PAMS: parameterized max scale (Li et al., ECCV 2020, arXiv 2011.04212).

A symmetric uniform grid ``-Q .. Q`` with ``Q = 2^(b-1) - 1`` codes on each side of zero, signed even after a ReLU. The
largest magnitude of an activation is one trainable scalar per place, the *max scale* alpha; weights use their own
largest magnitude in every forward. The distillation loss is ``SKTLoss``; placement and schedule are in the recipe.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from qsr_plugin.quant.observers import Observer, build_observer, minmax
from qsr_plugin.quant.ops import TINY_RANGE, fake_quantize, int_limits, quantize_levels
from qsr_plugin.quant.quantizer import QParams, Quantizer, StrictOptions, register_quantizer
from qsr_plugin.quant.reduce import mean_over_ranks


@register_quantizer("maxabs")
class MaxAbsQuantizer(Quantizer):
    """Symmetric grid up to the tensor's largest magnitude, taken anew (and detached) in every forward.

    ``m = max|w| + 1e-8; w_q = round(w Q / m) m / Q``. Nothing is clipped, so the gradient is the identity. No state.
    """

    roles = ("weight",)
    needs_calibration = False

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize a tensor of any shape."""
        _, qmax = int_limits(self.expand(bits, x), narrow=True)
        return fake_quantize(x, self.largest(x), qmax)

    def largest(self, x: Tensor) -> Tensor:
        """``max|x| + 1e-8``, detached."""
        low, high = minmax(x)
        return torch.maximum(high, -low) + 1e-8

    def qparams_of(self, weight: Tensor, bits: int | None = None) -> QParams:
        """Grid of a given weight; this quantizer has no range of its own."""
        _, qmax = int_limits(bits or self.candidates[0], narrow=True)
        scale = self.largest(weight) / qmax
        return QParams(scale, torch.zeros_like(scale), -int(qmax), int(qmax))

    def extra_storage_bits(self) -> int:
        """One 32-bit step is stored with the codes."""
        return 32


@register_quantizer("pams")
class PAMSQuantizer(Quantizer):
    """Activation quantizer with a trainable max scale, one per candidate bit width.

    ``x_q = round(clip(x, -alpha, alpha) Q / alpha) alpha / Q``. The gradient of alpha is the sum over elements of +1
    above, -1 below and ``(x_q - x) / alpha`` inside; exactly on the bound all of them count half.

    While ranges are tracked (the first epoch of the published training), alpha follows the batch mean of each sample's
    largest magnitude, joined over processes, and nothing is clipped.
    """

    class Options(StrictOptions):
        """Options of :class:`PAMSQuantizer`.

        Attributes:
            floor: Smallest legal alpha as a share of the calibrated one; the published code has no such guard and can
                reach zero (NaN) or below (constant output).
            momentum: Weight of the past when several calibration batches are joined.
        """

        floor: float = Field(1e-4, gt=0, lt=1)
        momentum: float = Field(0.9, ge=0, lt=1)

    roles = ("act",)
    tracking = "momentum"

    def __init__(self, options: Options, candidates: tuple[int, ...], role: str, channel_axis: int) -> None:
        super().__init__(options, candidates, role, channel_axis)
        shape = () if len(candidates) == 1 else (len(candidates),)
        self.alpha = nn.Parameter(torch.zeros(shape))
        self.register_buffer("observed_max", torch.zeros(()))

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize an activation (N, ...)."""
        alpha, bits = self.select(self.alpha, bits, x)
        limits = int_limits(bits, narrow=True)
        if isinstance(bits, int) and self.only_read:
            return quantize_levels(x, alpha, limits[1], limits, ties="split")
        ends = (-alpha, alpha)
        return fake_quantize(x, alpha, limits[1], limits, bounds=ends, ties="split", only_read=self.only_read)

    def track(self, x: Tensor, momentum: float) -> None:
        """Set alpha from this batch."""
        with torch.no_grad():
            latest = mean_over_ranks(x.detach().float().abs().flatten(1).amax(1).mean())
            self.set_range(-latest, self.moving_average(self.observed_max, latest, momentum))
            self.mark_calibrated()

    def quantize_tracked(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize without clipping."""
        # A copy, because a module used twice in one forward sets alpha again before this gradient is taken.
        alpha, bits = self.select(self.alpha.clone(), bits, x)
        return fake_quantize(x, alpha, int_limits(bits, narrow=True)[1])

    def make_observer(self) -> Observer:
        """Mean over the batch of each sample's largest magnitude."""
        return build_observer("sample_max", momentum=self.options.momentum, alpha=1.0, bits=max(self.candidates))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take ``high`` as alpha of every candidate."""
        high = high.clamp_min(TINY_RANGE)
        self.alpha.copy_(high.expand_as(self.alpha))
        self.observed_max.copy_(high)

    def project(self) -> None:
        """Keep alpha at or above its floor."""
        with torch.no_grad():
            self.alpha.clamp_(min=(self.observed_max * self.options.floor).clamp_min(TINY_RANGE))

    def qparams(self, bits: int | None = None) -> QParams:
        """Grid at one bit width."""
        bits = bits or self.candidates[0]
        alpha = self.alpha.detach() if self.alpha.dim() == 0 else self.alpha.detach()[self.candidates.index(bits)]
        _, qmax = int_limits(bits, narrow=True)
        return QParams(alpha / qmax, torch.zeros_like(alpha), -int(qmax), int(qmax))

    def range_parameters(self) -> list[nn.Parameter]:
        """Alpha."""
        return [self.alpha]
