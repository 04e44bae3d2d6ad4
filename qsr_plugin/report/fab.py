"""Feature average bit width (FAB): how many bits an activation takes on average."""

from __future__ import annotations

from statistics import fmean

import torch
from torch import nn

from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.schema import FLOAT_BITS
from qsr_plugin.quant.surgery import quantizers


def feature_average_bits(net: nn.Module, record: ForwardRecord) -> float:
    """Plain mean over the counted activation places, then over the images of one forward.

    First and last layers at bits of their own are not counted, as in the papers. A network without quantized
    activations has 32.

    Args:
        net: Quantized network.
        record: Record of its forward.
    """
    counted = (place for place, quantizer in quantizers(net) if quantizer.counts_in_fab)
    widths = [mean_bits(record.bits[place]) for place in counted if place in record.bits]
    return fmean(widths) if widths else float(FLOAT_BITS)


def mean_bits(bits: int | torch.Tensor) -> float:
    """Mean over the images of one entry of a record: an int, or ``(N,)`` one per image."""
    return float(bits.detach().double().mean()) if isinstance(bits, torch.Tensor) else float(bits)
