"""A quantized network with constant grids: what every engine runs.

Classes of sites are swapped once more: quantizers, policies and records go, grids and integer weights come. Everything
else in the network stays as it is.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsr_plugin.deploy.folding import check_calibrated
from qsr_plugin.deploy.grids import Grid, WeightCodes, grid_of, weight_codes
from qsr_plugin.errors import UserError
from qsr_plugin.quant.quantizer import Quantizer
from qsr_plugin.quant.record import RecordingRoot
from qsr_plugin.quant.sites import QuantConv2d, QuantLinear, Site, derived_class
from qsr_plugin.quant.surgery import quantizers, sites


class LoweringError(UserError, ValueError):
    """A network that has no constant integer form; the message names the place, the reason and the alternative."""


class LoweredPorts:
    """Mixin before a site class: ports hold constant grids, and the weight is the quantized one."""

    def at_port(self, port: str, x: Tensor, operand: str = "") -> Tensor:
        """Pass a tensor through the grid of a port, if it has one."""
        grid = self._modules.get(f"{port}_grid")
        return x if grid is None else grid(x)

    def quantizer(self, port: str) -> None:
        """No port has a quantizer any more."""

    def quantized_weight(self) -> Tensor:
        """The weight, which is quantized already."""
        return self.weight


class LoweredConv2d(LoweredPorts, nn.Conv2d):
    """Convolution of integers; the shift of a grid goes into the bias, at borders beside it if zero is no level."""

    pad_first: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` (N, C, H, W)."""
        padding: tuple[int, ...] | int = self.padding
        if self.pad_first or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=mode), 0
        grid = self._modules.get("input_grid")
        x = x if grid is None else grid.unshifted(x)
        out = F.conv2d(x, self._modules["codes"](), self.bias, self.stride, padding, self.dilation, self.groups)
        if self.sums is not None:  # what all weights of a channel have in common, times the sum of what they see
            seen = F.conv2d(x, self.sums(), None, self.stride, padding, self.dilation, self.groups)
            out = out + seen.repeat_interleave(self.out_channels // self.groups, 1) * self.rest.view(-1, 1, 1)
        if self.outside is not None:
            inside = torch.ones_like(x[:, :1])
            out = out + F.conv2d(inside, self.outside, None, self.stride, padding, self.dilation)
        return self.at_port("output", out)


class LoweredLinear(LoweredPorts, nn.Linear):
    """Product with integers; channels are the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` (..., C)."""
        grid = self._modules.get("input_grid")
        x = x if grid is None else grid.unshifted(x)
        out = x @ self._modules["codes"]()
        if self.sums is not None:  # a product, because OpenVINO (2026.4) gives wrong sums of integer tensors
            out = out + (x @ self.sums()) * self.rest
        return self.at_port("output", out if self.bias is None else out + self.bias)


class _Codes(nn.Module):
    """Integers with a scale; called, they are the weight."""

    def __init__(self, codes: Tensor, scale: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale.contiguous())

    def forward(self) -> Tensor:
        return torch.ops.qsr_plugin.dequantize(self.codes, self.scale, self.axis)


class _Floats(nn.Module):
    """A weight that stays float."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())

    def forward(self) -> Tensor:
        return self.weight


def lower(net: nn.Module, *, bits: int | None = None, signed: bool = False) -> nn.Module:
    """A copy of a quantized network with constant grids, on the CPU, in evaluation mode; the same up to rounding.

    Args:
        net: Quantized and calibrated; or float, which is copied as it is. Not changed.
        bits: Width at the places whose bits depend on the image: one of their candidates for every image. Without it
            such a network is refused.
        signed: Carry activations by signed bytes, see :class:`~qsr_plugin.deploy.grids.Grid`.

    Returns:
        (N, 3, H, W) to (N, 3, scale H, scale W), RGB in [0, 1]. Attribute ``float_weights``: names of layers whose
        quantized weight does not fit into bytes and stays float.

    Raises:
        LoweringError: If a grid depends on the image, or is not uniform.
        UserError: If a range was never set.
    """
    check_calibrated(net)
    copy = deepcopy(net).cpu().float().eval()
    if not isinstance(copy, RecordingRoot):
        copy.float_weights = ()
        return copy.requires_grad_(False)
    choices = [part for _, part in quantizers(copy) if part.role == "act" and len(part.candidates) > 1]
    if bits is not None and not choices:
        raise LoweringError(
            f"bits={bits} (--bits {bits}) is for networks whose bits depend on the image, and this one has fixed bits: "
            "leave it out, or quantize with other bits"
        )
    copy.__class__, floats = copy.float_class, []
    copy._modules.pop("bit_policy", None)
    with torch.no_grad():
        for name, site in list(sites(copy)):
            if not _lowered(site, bits, signed):
                floats.append(name)
    copy.float_weights = tuple(floats)
    return copy.requires_grad_(False)


def _lowered(site: Site, bits: int | None, signed: bool) -> bool:
    """Lower one site in place; whether its quantized weight, if it has one, is made of integers."""
    weight, codes = None, None
    for port in list(site.ports):
        quantizer = site._modules.pop(f"{port}_quantizer", None)
        site._modules.pop(f"{port}_policy", None)
        if quantizer is None:
            continue
        if port == "weight":
            weight = quantizer(site.weight)
            codes = _codes(quantizer, site.weight, weight)
        else:
            site.add_module(f"{port}_grid", _grid(quantizer, bits, signed))
    site.__dict__.pop("_taps", None)
    quantized = weight is not None
    weight = (
        site.weight.detach() if weight is None and isinstance(site, nn.Module) and hasattr(site, "weight") else weight
    )
    if isinstance(site, QuantConv2d):
        lower_convolution(site, weight, codes)
    elif isinstance(site, QuantLinear):
        _lower_linear(site, weight, codes)
    else:
        if quantized:
            site.weight = nn.Parameter(weight)
        site.__class__ = derived_class(LoweredPorts, type(site))
        codes = None
    return codes is not None or not quantized


def _grid(quantizer: Quantizer, bits: int | None, signed: bool) -> nn.Module:
    """The grid in the place of an activation quantizer, with what it adds to the tensor before."""
    widths = quantizer.candidates
    if len(widths) > 1 and bits not in widths:
        given = "" if bits is None else f" (bits={bits} is none of them)"
        raise LoweringError(
            f"{quantizer.site}: its bits depend on the image, one of {list(widths)}{given}, and an integer engine runs "
            f"all of these at the same speed. Export it at one width, bits={max(widths)} (--bits {max(widths)}), which "
            "is another network, or quantize with a method of fixed bits, for example 'auto'"
        )
    width = widths[0] if len(widths) == 1 else bits
    try:
        grid = Grid(quantizer.qparams(width), signed=signed)
    except NotImplementedError as error:
        raise LoweringError(
            f"{quantizer.site}: {error}. Quantize with a method of constant ranges instead, for example 'auto'"
        ) from None
    return grid if (before := _added(quantizer)) is None else _Moved(before, grid)


def _added(quantizer: Quantizer) -> Tensor | None:
    """What a quantizer adds to the tensor before its grid, to broadcast; ``None`` if nothing.

    Raises:
        LoweringError: If it does something else with it.
    """
    zeros = torch.zeros([1] * (4 if quantizer.channel_axis == 1 else 3))
    added, other = quantizer.on_grid(zeros), quantizer.on_grid(zeros + 1)
    if not torch.allclose(other - added, torch.ones(())):
        raise LoweringError(
            f"{quantizer.site}: {type(quantizer).__name__} does more to its input than adding a constant"
        )
    return added.detach() if bool((added != 0).any()) else None


class _Moved(nn.Module):
    """A grid for ``x`` plus a constant per channel, which stays in the result."""

    def __init__(self, before: Tensor, grid: Grid) -> None:
        super().__init__()
        self.register_buffer("before", before)
        self.grid = grid
        self.shifted, self.shift, self.has_zero = grid.shifted, grid.shift, False

    def unshifted(self, x: Tensor) -> Tensor:
        """See :meth:`Grid.unshifted`."""
        return self.grid.unshifted(x + self.before)

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`Grid.forward`."""
        return self.grid(x + self.before)


def _codes(quantizer: Quantizer, weight: Tensor, quantized: Tensor) -> WeightCodes | None:
    """The integers of a weight, ``None`` if there are none that fit."""
    try:
        params = grid_of(quantizer, weight, quantizer.candidates[0])
    except NotImplementedError:
        return None
    return weight_codes(quantized, params, quantizer.channel_axis)


def lower_convolution(site: nn.Conv2d, weight: Tensor, codes: WeightCodes | None) -> None:
    """Swap a convolution's class, in place; everything constant goes into its bias.

    Args:
        site: With a module ``input_grid`` if its input is quantized.
        weight: As it shall convolve.
        codes: Its integers; ``None`` where it stays float.
    """
    if codes is not None and codes.rest is not None and site.groups not in (1, site.out_channels):
        codes = None  # sums over some of the channels are no gain
    del site.weight
    site.codes = _Floats(weight) if codes is None else _Codes(codes.codes, codes.scale, 0)
    site.sums, site.rest, site.outside = None, None, None
    if codes is not None and codes.rest is not None:
        ones = torch.ones(site.groups, *weight.shape[1:], dtype=torch.int8)
        site.sums = _Codes(ones, torch.ones(site.groups), 0)
        site.rest = codes.rest
    grid = site._modules.get("input_grid")
    if grid is not None and grid.shifted:
        missing = -grid.shift * weight.sum(1, keepdim=True)  # per tap what the shift makes of it
        borders = any(site.padding) if isinstance(site.padding, tuple) else site.padding != "valid"
        first = getattr(site, "pad_first", False) or grid.has_zero  # padded zeros stay what they are
        if borders and not first and site.padding_mode == "zeros":
            site.outside = missing
        else:
            bias = missing.sum((1, 2, 3))
            site.bias = nn.Parameter(bias if site.bias is None else site.bias + bias)
            site.pad_first = borders and first
    site.__class__ = LoweredConv2d


def _lower_linear(site: QuantLinear, weight: Tensor, codes: WeightCodes | None) -> None:
    """Swap a linear layer's class; its weight is stored as it multiplies, (in, out)."""
    del site.weight
    site.codes = _Floats(weight.t()) if codes is None else _Codes(codes.codes.t(), codes.scale, 1)
    site.rest = None if codes is None else codes.rest
    ones = torch.ones(weight.shape[1], 1, dtype=torch.int8)
    site.sums = None if site.rest is None else _Codes(ones, torch.ones(1), 1)
    grid = site._modules.get("input_grid")
    if grid is not None and grid.shifted:
        bias = -grid.shift * weight.sum(1)
        site.bias = nn.Parameter(bias if site.bias is None else site.bias + bias)
    site.__class__ = LoweredLinear
