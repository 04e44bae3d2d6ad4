"""QuantSR: a redistribution-driven learned step (Qin et al., NeurIPS 2023), the ``rlq`` quantizer.

A learned step per tensor, a learned shift per input channel, and rounding whose gradient is that of a soft staircase:
stronger near rounding thresholds, weaker at the levels. The shift is not taken back after quantization; the convolution
absorbs it. The depth-dynamic training of the same paper is the recipe's ``depth`` and the ``depths`` of its stages.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from qsr_plugin.quant.quantizer import Role, register_quantizer
from qsr_plugin.quant.reduce import world_size
from qsr_plugin.quant.step_quantizer import StepQuantizer

#: Steepness of the soft staircase: tanh(f - 1/2) / tanh(1/2) in the released code, tanh(2f - 1) / tanh(1) as printed.
STEEPNESS = {"code": 1.0, "paper": 2.0}


@register_quantizer("rlq")
class RLQQuantizer(StepQuantizer):
    """``x_q = round(clip((x + tau_c) / s, Q_n, Q_p)) s``; weights have no shift and are always signed.

    With v = (x + tau)/s, ``d x_q / d x = d x_q / d tau = R'(v)`` inside (a value on a bound counts as inside) and 0
    outside. The gradient scale of the step counts every element of the tensor: for activations those of all images of a
    batch, joined over the processes of a distributed run.
    Signed or unsigned is decided by the calibration, on x + tau, and stays: if the shift of an unsigned place later
    turns values negative, they are clipped.
    """

    class Options(StepQuantizer.Options):
        """Options of :class:`RLQQuantizer`.

        Attributes:
            phi: Soft staircase of the released ``code`` or of the printed formula (``paper``).
        """

        phi: Literal["code", "paper"] = "code"

    per_channel = ("act",)

    def __init__(
        self,
        options: Options,
        candidates: tuple[int, ...],
        role: Role,
        channel_axis: int,
        channels: int | None = None,
    ) -> None:
        super().__init__(options, candidates, role, channel_axis)
        self.tau = nn.Parameter(torch.zeros(channels)) if role == "act" else None
        self._steepness = STEEPNESS[options.phi]

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize a weight, or an activation (N, C, H, W) or (N, L, C)."""
        count = x.numel() * (world_size() if self.role == "act" else 1)
        return self.quantize_steps(self.on_grid(x), bits, count, self._steepness).to(x.dtype)

    def observe(self, x: Tensor) -> None:
        """Take ``x + tau`` into account if a calibration is going on."""
        if self._observer is not None:
            super().observe(self.on_grid(x))

    def on_grid(self, x: Tensor) -> Tensor:
        """``x + tau``; a weight as it is."""
        if self.tau is None:
            return x
        shape = [1] * x.dim()
        shape[self.channel_axis] = -1
        return x + self.tau.view(shape)

    def extra_storage_bits(self) -> int:
        """Step and shifts."""
        return 32 * sum(p.numel() for p in self.parameters())
