"""Quantizers whose step is a trained parameter, and quantizers whose sign convention is read off the data.

The step is learned by the rule of Esser et al. (ICLR 2020): straight-through rounding, the codes' limits as the slope
of what is clipped, and a gradient scaled down by the number of elements and levels. Whether codes are signed is decided
by calibration, once: it changes the grid, so it can neither depend on a batch nor be asked of the device in a forward.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from qsr_plugin.quant.observers import Momentum, Observer, mean_magnitude
from qsr_plugin.quant.ops import TINY_RANGE, Ties, fake_quantize, grad_scale, int_limits, quantize_levels
from qsr_plugin.quant.quantizer import QParams, Quantizer, Role, StrictOptions


class SignedByData(Quantizer):
    """A quantizer that calibration makes signed or unsigned; weights are always signed.

    Attributes:
        signed: 0-d bool buffer, the decision as the state dict carries it.
    """

    decisions = ("signed",)
    signed: Tensor

    def __init__(self, options: StrictOptions, candidates: tuple[int, ...], role: Role, channel_axis: int) -> None:
        super().__init__(options, candidates, role, channel_axis)
        self.register_buffer("signed", torch.tensor(role == "weight"))
        self._signed = role == "weight"

    def decide_sign(self, low: Tensor) -> None:
        """Sign the codes if the observed range reaches below zero."""
        self._signed = self.role == "weight" or bool(low < 0)
        self.signed.fill_(self._signed)


class StepQuantizer(SignedByData):
    """``x_q = round(clip(x / s, -Q_N, Q_P)) s`` with a trained step ``s > 0`` per tensor, one per candidate bit width.

    Signed codes are ``-2^(b-1) .. 2^(b-1) - 1``, unsigned ones ``0 .. 2^b - 1``. The step starts at
    ``2 mean|x| / sqrt(Q_P)``. Its gradient is, summed over elements and times ``g = 1 / sqrt(N Q_P)``, with R' = 1 or
    the slope of the soft staircase: ``round(x/s) - R' x/s`` inside, ``-Q_N`` below and ``Q_P`` above.
    """

    class Options(StrictOptions):
        """Options of :class:`StepQuantizer`.

        Attributes:
            momentum: Weight of the past when several calibration batches are joined, or ``mean``.
        """

        momentum: Momentum = "mean"

    ties: ClassVar[Ties] = "inside"

    def __init__(self, options: Options, candidates: tuple[int, ...], role: Role, channel_axis: int) -> None:
        super().__init__(options, candidates, role, channel_axis)
        self.step = nn.Parameter(torch.zeros(() if len(candidates) == 1 else (len(candidates),)))

    def quantize_steps(self, x: Tensor, bits: int | Tensor, count: int, steepness: float = 0.0) -> Tensor:
        """Fake-quantize ``x``.

        Args:
            x: Float tensor of any shape.
            bits: Bit width, or one per image.
            count: The N of the gradient scale.
            steepness: See :func:`fake_quantize`.
        """
        step, bits = self.select(self.step, bits, x)
        qmin, qmax = int_limits(bits, signed=self._signed)
        step = grad_scale(step, (count * qmax) ** -0.5)
        if isinstance(bits, int) and self.only_read:
            return quantize_levels(x, step, 1.0, (qmin, qmax), ties=self.ties, steepness=steepness)
        ends = (qmin * (step if self._signed else step.detach()), qmax * step)
        return fake_quantize(
            x, step, 1.0, (qmin, qmax), bounds=ends, ties=self.ties, steepness=steepness, only_read=self.only_read
        )

    def make_observer(self) -> Observer:
        """Mean magnitude, and whether there are values below zero."""
        return Observer(mean_magnitude, self.options.momentum)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set the steps from the mean magnitude ``high``; a negative ``low`` signs the codes."""
        self.decide_sign(low)
        widths = torch.tensor(self.candidates, device=high.device)
        _, qmax = int_limits(widths, signed=self._signed)
        self.step.copy_((2.0 * high / qmax.sqrt()).reshape(self.step.shape))
        self.project()

    def project(self) -> None:
        """Keep the steps positive."""
        with torch.no_grad():
            self.step.clamp_(min=TINY_RANGE)

    def qparams(self, bits: int | None = None) -> QParams:
        """Grid at one bit width; zero is a level."""
        bits = bits or self.candidates[0]
        step = self.step.detach() if self.step.dim() == 0 else self.step.detach()[self.candidates.index(bits)]
        qmin, qmax = int_limits(bits, signed=self._signed)
        return QParams(step, torch.zeros_like(step), int(qmin), int(qmax))

    def range_parameters(self) -> list[nn.Parameter]:
        """The steps."""
        return [self.step]
