"""Feature average bit width (FAB): how many bits an activation takes on average."""

from __future__ import annotations

import torch
from torch import nn

from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.surgery import quantizers


def feature_average_bits(net: nn.Module, record: ForwardRecord) -> float:
    """Plain mean over the counted activation places, then over the images of one forward.

    First and last layers at bits of their own are not counted, as in the papers. A network without quantized
    activations has 32.

    Args:
        net: Quantized network.
        record: Record of its forward.
    """
    widths = []
    for place, quantizer in quantizers(net):
        if quantizer.counts_in_fab and place in record.bits:
            bits = record.bits[place]
            widths.append(bits.detach().float().mean().cpu() if isinstance(bits, torch.Tensor) else torch.tensor(float(bits)))
    return float(torch.stack(widths).mean()) if widths else 32.0
