"""Grids of quantizers in the integers that engines compute with.

A grid ``value = (code - z) s`` with a real-valued zero point z is split as ``z = n + f``: n is the integer zero point
that engines know, and ``f s`` shifts the tensor before rounding and back afterwards, so that nothing is lost.
Activations are carried by unsigned bytes, weights by signed ones (Jacob et al., CVPR 2018), whatever their bit width:
narrower grids are clipped first. For engines that know only signed bytes around zero, n is 0 and f holds the rest of z.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qsr_plugin.quant.quantizer import QParams, Quantizer

#: Codes of a byte and of a 16-bit word.
_BYTE, _WORD = 255, 65535
#: A zero point nearer than this to an integer is one: ranges are float32.
_EXACT = 1e-5


@torch.library.custom_op("qsr_plugin::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clip to ``[low, high]`` and round to multiples of ``scale``, half to even.

    Args:
        x: Float tensor of any shape.
        scale: Distance between levels, 0-d.
        zero: Carrier's code of 0.0, 0-d; the carrier's type.
        low: Smallest level, 0-d.
        high: Largest level, 0-d.
    """
    return torch.round(torch.clamp(x, low, high) / scale) * scale


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qsr_plugin::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """``codes * scale`` along an axis.

    Args:
        codes: int8 tensor.
        scale: ``(C,)``, or 0-d for one scale.
        axis: The axis with C codes.
    """
    if scale.dim() == 0:
        return codes.float() * scale
    return codes.float() * scale.view([-1 if index == axis else 1 for index in range(codes.dim())])


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)


class Grid(nn.Module):
    """A constant grid in the place of an activation quantizer.

    Args:
        params: The quantizer's grid.
        signed: Carry it by signed bytes whose code 0 is 0.0. A grid of more than 8 bits then has no carrier and is
            rounded in floats.

    Attributes:
        scale: Distance between levels.
        zero: Code of 0.0 in the carrier: uint8, or uint16 above 8 bits; int8 if signed.
        low: Smallest level, before the shift back.
        high: Largest level.
        shift: What is added before rounding, and has to be taken off the result.
        shifted: Whether that is anything.
        carried: Whether there is a carrier.
        has_zero: Whether 0.0 is a level, before the shift and after its way back.
    """

    def __init__(self, params: QParams, *, signed: bool = False) -> None:
        super().__init__()
        span, zero = params.qmax - params.qmin, float(params.zero_point) - params.qmin
        whole = min(max(round(zero), 0), span)
        self.has_zero, self.carried = abs(zero - whole) < _EXACT, not signed or span <= _BYTE
        if signed and self.carried:
            whole = min(max(whole, span - 127), 128)
        scale = params.scale.detach().float()
        near = abs(zero - whole) < _EXACT
        self.shifted = not near
        carrier = torch.int8 if signed else torch.uint8 if span <= _BYTE else torch.uint16
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero", torch.tensor(0 if signed else whole, dtype=carrier))
        self.register_buffer("low", -whole * scale)
        self.register_buffer("high", (span - whole) * scale)
        self.register_buffer("shift", (0.0 if near else zero - whole) * scale)

    def unshifted(self, x: Tensor) -> Tensor:
        """The value on the grid plus ``shift``, which integer engines compute with."""
        x = x + self.shift if self.shifted else x
        if not self.carried:
            return torch.round(torch.clamp(x, self.low, self.high) / self.scale) * self.scale
        return torch.ops.qsr_plugin.quantize_dequantize(x, self.scale, self.zero, self.low, self.high)

    def forward(self, x: Tensor) -> Tensor:
        """The value on the grid; any shape."""
        y = self.unshifted(x)
        return y - self.shift if self.shifted else y


@dataclass(frozen=True)
class WeightCodes:
    """A quantized weight ``codes * scale + rest``, exact.

    Attributes:
        codes: int8, the shape of the weight.
        scale: ``(C,)`` float32 along the axis of the output channels.
        rest: ``(C,)`` that is added to each weight of a channel, or ``None`` where it is zero.
    """

    codes: Tensor
    scale: Tensor
    rest: Tensor | None


def grid_of(quantizer: Quantizer, tensor: Tensor | None, bits: int) -> QParams:
    """The grid of a quantizer, which for some follows from the weight itself.

    Raises:
        NotImplementedError: If there is none that serves all tensors.
    """
    told = getattr(quantizer, "qparams_of", None)
    return quantizer.qparams(bits) if told is None or tensor is None else told(tensor, bits)


def weight_codes(quantized: Tensor, params: QParams, axis: int) -> WeightCodes | None:
    """Signed bytes for a quantized weight.

    Codes around a zero point that lies halfway between two are doubled where they fit, so that zero is one of them.
    Else the zero point is rounded, and what is left of it is the same for all weights of a channel.

    Args:
        quantized: The weight as the layer uses it.
        params: Its grid; scale and zero point 0-d or ``(C,)``.
        axis: Axis of the output channels.

    Returns:
        ``None`` if the weight does not lie on the grid, or the codes need more than a byte.
    """
    channels, shape = quantized.shape[axis], [-1 if index == axis else 1 for index in range(quantized.dim())]
    scale, zero = (value.detach().double().expand(channels) for value in (params.scale, params.zero_point))
    parts = quantized.detach().double() / scale.view(shape) + zero.view(shape)
    codes = torch.round(parts)
    if bool((parts - codes).abs().max() > 1e-2) or params.qmax - params.qmin > _BYTE:
        return None
    for factor in (1, 2):
        whole = torch.round(zero * factor)
        values = codes * factor - whole.view(shape)
        exact = bool((zero * factor - whole).abs().max() < _EXACT)
        if exact and bool(values.min() >= -128) and bool(values.max() <= 127):
            return WeightCodes(values.to(torch.int8), (scale / factor).float(), None)
    for whole in (torch.round(zero), torch.full_like(zero, params.qmin + 128)):
        values = codes - whole.view(shape)
        if bool(values.min() >= -128) and bool(values.max() <= 127):
            return WeightCodes(values.to(torch.int8), scale.float(), ((whole - zero) * scale).float())
    return None
