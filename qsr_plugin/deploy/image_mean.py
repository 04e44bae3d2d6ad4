"""The mean colour that networks take off the image and put back, moved into the convolutions at both ends.

Engines then need no pass over the enlarged image for it. At the input it is still subtracted, before the padding, so
that borders see what they saw.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsr_plugin.deploy.affine import FoldReport, image_maker, image_readers
from qsr_plugin.deploy.calls import quantizes, record_calls
from qsr_plugin.deploy.tail import TOLERANCE, replace_modules, restore_modules
from qsr_plugin.quant.layer_trace import LayerTraceError


class Centred(nn.Module):
    """A convolution of an image less its mean colour."""

    def __init__(self, conv: nn.Conv2d, mean: Tensor) -> None:
        super().__init__()
        self.conv = conv
        self.register_buffer("mean", mean)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x - mean``, (N, 3, H, W)."""
        return self.conv(x - self.mean)


@torch.no_grad()
def fold_mean(net: nn.Module) -> list[FoldReport]:
    """Move the attribute ``mean`` of networks that compute ``(x - mean) ... + mean``, in place.

    Call it after the scaling of the image range was folded, and before the tail is collapsed.

    Args:
        net: Float or lowered network in evaluation mode, (N, 3, H, W) in [0, 1] to (N, 3, scale H, scale W).

    Returns:
        One report, or none for a network without such a mean. The step is undone if it makes a difference of more than
        1e-4 in the image.
    """
    mean = getattr(net, "mean", None)
    if not isinstance(mean, Tensor) or mean.numel() != 3 or not bool(mean.any()) or getattr(net, "img_range", 1) != 1:
        return []
    try:
        record = record_calls(net)
    except LayerTraceError as error:
        return [FoldReport("image mean", False, str(error), ())]
    readers, last = image_readers(record), image_maker(record)
    ends = [call.module for call in (*readers, *([last] if last else []))]
    names = tuple(call.name for call in (*readers, *([last] if last else [])))
    if len(ends) != 2 or not all(isinstance(end, nn.Conv2d) and record.times(end) == 1 for end in ends):
        return [FoldReport("image mean", False, "no single convolution at one of the two ends", names)]
    if quantizes(ends[1]) or "weight" not in ends[1]._parameters or ends[1].out_channels % 3:
        return [FoldReport("image mean", False, f"{last.label} is not a float convolution", names)]
    before, bias = net(record.image), ends[1].bias
    offset = mean.flatten().repeat_interleave(ends[1].out_channels // 3).to(ends[1].weight)
    places = replace_modules(net, {ends[0]: Centred(ends[0], mean)})
    ends[1].bias = nn.Parameter(offset if bias is None else bias + offset, requires_grad=False)
    net.mean = torch.zeros_like(mean)
    difference = float((net(record.image) - before).abs().max())
    if difference <= TOLERANCE:
        return [FoldReport("image mean", True, f"mean is a part of {' and '.join(names)}", names, difference)]
    restore_modules(places)
    ends[1].bias, net.mean = bias, mean
    reason = f"a difference of {difference:.1e}; allowed is {TOLERANCE:.0e}"
    return [FoldReport("image mean", False, reason, names, difference)]
