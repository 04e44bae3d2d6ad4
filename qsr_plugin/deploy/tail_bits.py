"""The one convolution of a collapsed tail in 8 bits, where that does no harm.

The tail is float in most recipes, and once the rest runs in integers it takes a good part of the time. Its input has
the whole image in it, so 8 bits are not always enough there: what they change is measured, and has to be small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qsr_plugin.deploy.collapsed import CollapsedTail, collapsed_tail
from qsr_plugin.deploy.grids import Grid, weight_codes
from qsr_plugin.deploy.lowering import lower_convolution
from qsr_plugin.errors import UserError
from qsr_plugin.quant.quantizer import QParams

#: How many images are enough; more make the export slower.
TAIL_IMAGES = 32
#: Least PSNR in dB, peak 1, between the images with and without.
LEAST_PSNR = 48.0
#: What a usual network for scale 4 reaches, in dB: how much of it is lost is told, at most 0.11 dB.
_USUAL = 32.0


@dataclass(frozen=True)
class TailBits:
    """What became of the convolution of a collapsed tail.

    Attributes:
        applied: Whether it computes in 8 bits; if not, that changed too much, and the network is as it was.
        reason: What was done, or what it would have changed.
    """

    applied: bool
    reason: str

    def __str__(self) -> str:
        return f"tail: {self.reason}"


@torch.no_grad()
def quantize_tail(
    net: nn.Module, images: Sequence[Tensor], *, least: float = LEAST_PSNR, signed: bool = False
) -> TailBits:
    """Let a collapsed tail compute in 8 bits, in place: input u8 per tensor, kernel s8 per output channel.

    The range of its input is the largest of every second batch; what changes is measured on the others.

    Args:
        net: Lowered, its tail collapsed.
        images: Two or more batches (N, 3, h, w), RGB in [0, 1].
        least: What is changed more than this PSNR in dB allows stays float.
        signed: Carry the input by signed bytes.

    Raises:
        UserError: For fewer than two batches, or a network without a collapsed tail.
    """
    if len(images) < 2:
        raise UserError(f"{len(images)} image(s) for the range of the tail: give two or more, half are to check it on")
    tail = collapsed_tail(net)
    if tail is None:
        raise UserError("this network has no collapsed tail that could compute in 8 bits: leave the images out")
    low, high = _range_of_input(net, tail, images[::2])
    wanted = [net(batch) for batch in images[1::2]]
    before = tail.conv
    tail.conv = _in_bytes(before, low, high, signed)
    found = _psnr(wanted, [net(batch) for batch in images[1::2]])
    where = f"{found:.1f} dB from float on {sum(map(len, images[1::2]))} image(s)"
    if found >= least:
        lost = 10 * math.log10(1 + 10 ** ((_USUAL - found) / 10))
        cost = f"a network at {_USUAL:g} dB would lose about {lost:.2f} dB"
        return TailBits(True, f"its convolution in 8 bits, {where}: {cost}")
    tail.conv = before
    return TailBits(False, f"its convolution stays float, 8 bits would be {where}, allowed {least:g}")


def _range_of_input(net: nn.Module, tail: CollapsedTail, images: Sequence[Tensor]) -> tuple[float, float]:
    found = [0.0, 0.0]

    def watch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[:] = min(found[0], float(args[0].min())), max(found[1], float(args[0].max()))

    handle = tail.register_forward_pre_hook(watch)
    try:
        for batch in images:
            net(batch)
    finally:
        handle.remove()
    return found[0], found[1]


def _in_bytes(conv: nn.Conv2d, low: float, high: float, signed: bool) -> nn.Conv2d:
    """A copy that computes with integers; zero is a level of its input, which is padded with it."""
    scale = torch.tensor(max(high - low, 1e-12) / 255)
    grid = Grid(QParams(scale, torch.round(-low / scale), 0, 255), signed=signed)
    own = conv.weight.abs().amax((1, 2, 3)).clamp(min=1e-12) / 127
    shaped = own.view(-1, 1, 1, 1)
    weight = torch.round(conv.weight / shaped) * shaped
    made = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding)
    made.bias = conv.bias
    made.add_module("input_grid", grid)
    lower_convolution(made, weight, weight_codes(weight, QParams(own, torch.zeros_like(own), -127, 127), 0))
    return made


def _psnr(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    error = sum(float((a - b).double().square().sum()) for a, b in zip(wanted, found))
    return -10 * math.log10(error / sum(batch.numel() for batch in wanted)) if error else math.inf
