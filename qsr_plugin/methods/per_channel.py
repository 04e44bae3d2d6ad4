"""Weights with a range per output channel: symmetric codes, zero a level, ranges of least squared error.

Per-channel weights are what integer engines run (Jacob et al., CVPR 2018; Krishnamoorthi, arXiv 1806.08342): the
step of a channel only scales its output. Ranges start as the best of some shrunken copies of the largest magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsr_plugin.quant.observers import Observer, Range
from qsr_plugin.quant.ops import TINY_RANGE, fake_quantize, int_limits
from qsr_plugin.quant.quantizer import QParams, Quantizer, StrictOptions, register_quantizer

#: Candidate ``i`` of a range is ``1 - 0.01 i`` times the one that clips nothing.
CANDIDATES = 80


@register_quantizer("per_channel")
class ChannelQuantizer(Quantizer):
    """Trained half-width ``u_c`` of each output channel: codes ``-2^(b-1) .. 2^(b-1) - 1`` of step ``u_c / 2^(b-1)``.

    Args:
        options: None.
        candidates: The bit width.
        role: ``weight``.
        channel_axis: Axis of the output channels in the weight.
        channels: Length of that axis; in a transposed convolution with groups, all groups share it.
    """

    roles = ("weight",)
    per_channel = ("weight",)

    def __init__(
        self, options: StrictOptions, candidates: tuple[int, ...], role: str, channel_axis: int, channels: int
    ) -> None:
        super().__init__(options, candidates, role, channel_axis)
        self.bound = nn.Parameter(torch.zeros(channels))

    def _along(self, values: Tensor, weight: Tensor) -> Tensor:
        """One number per channel, to broadcast over the weight."""
        return values.view(*([1] * self.channel_axis), -1, *([1] * (weight.dim() - 1 - self.channel_axis)))

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize a weight; a value exactly on a bound counts as inside."""
        return self._on_grid(x, self.bound, bits)

    def _on_grid(self, x: Tensor, bound: Tensor, bits: int) -> Tensor:
        limits, half = int_limits(bits), 2.0 ** (bits - 1)
        span = self._along(bound, x)
        return fake_quantize(x, span, half, limits, bounds=(-span, limits[1] / half * span))

    def make_observer(self) -> Observer:
        """A weight is seen once, so nothing is averaged."""
        return Observer(self._least_error, momentum=0.0)

    def _least_error(self, weight: Tensor) -> Range:
        """Half-width of each channel with the least squared error; the widest of equal ones."""
        bits, values = self.candidates[0], weight.detach().float()
        others = [axis for axis in range(values.dim()) if axis != self.channel_axis]
        widest = values.abs().amax(others) * (2.0 ** (bits - 1) / int_limits(bits)[1])
        best, least = widest, torch.full_like(widest, torch.inf)
        for index in range(CANDIDATES):
            bound = widest * (1.0 - 0.01 * index)
            safe = bound.clamp_min(TINY_RANGE)
            error = (self._on_grid(values, safe, bits) - values).square().sum(others)
            best, least = torch.where(error < least, bound, best), torch.minimum(error, least)
        return -best, best

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the half-widths, ``(C,)``."""
        self.bound.copy_(high)
        self.project()

    def project(self) -> None:
        """Keep the half-widths positive."""
        with torch.no_grad():
            self.bound.clamp_(min=TINY_RANGE)

    def qparams(self, bits: int | None = None) -> QParams:
        """Grid with a scale per channel; zero is a level."""
        bits = bits or self.candidates[0]
        scale = self.bound.detach() / 2.0 ** (bits - 1)
        qmin, qmax = int_limits(bits)
        return QParams(scale, torch.zeros_like(scale), int(qmin), int(qmax))

    def range_parameters(self) -> list[nn.Parameter]:
        """The half-widths."""
        return [self.bound]
