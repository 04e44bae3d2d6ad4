"""What the ranges of a network do during training: where they stand, and how much they clip."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qsr_plugin.quant.quantizer import QParams, Quantizer
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.surgery import quantizers, sites


@dataclass(frozen=True)
class RangeStatistics:
    """One look at all quantizers of a network that took part in a forward.

    Attributes:
        places: Dotted names ``site.port``; a port that two tensors pass is there twice.
        lower: ``(P,)`` value of the lowest level; of the lowest result where a place has a grid per image or channel.
        upper: ``(P,)`` value of the highest level or result.
        clipped: ``(P,)`` share of the elements more than half a step outside; NaN where there is no one grid.
    """

    places: tuple[str, ...]
    lower: Tensor
    upper: Tensor
    clipped: Tensor

    def mean_clipped(self) -> float:
        """Mean clipped share over the places that have one."""
        return float(self.clipped.nanmean())

    def scalars(self) -> dict[str, float]:
        """Name and value of each figure, as TensorBoard shows them."""
        rows = zip(self.places, *(figures.tolist() for figures in (self.lower, self.upper, self.clipped)))
        named = {
            f"{kind}/{place}": value
            for place, *values in rows
            for kind, value in zip(("range_lower", "range_upper", "clipped"), values)
        }
        return {name: value for name, value in named.items() if not math.isnan(value)}

    def lines(self) -> list[str]:
        """One readable line per place."""
        rows = zip(self.places, self.lower.tolist(), self.upper.tolist(), self.clipped.tolist())
        return [
            f"{place}: {low:.4g} to {high:.4g}, "
            + ("with a grid per image" if math.isnan(share) else f"{share:.2%} clipped")
            for place, low, high, share in rows
        ]


def range_statistics(net: nn.Module, record: ForwardRecord) -> RangeStatistics | None:
    """Look at the pairs of a record.

    Args:
        net: Bare quantized network.
        record: Record of a forward of it that kept pairs.

    Returns:
        The statistics, ``None`` if the record has no pairs.
    """
    if not record.pairs:
        return None
    parts = dict(quantizers(net))
    weights = {f"{name}.weight": site.weight for name, site in sites(net) if site.quantizer("weight") is not None}
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for place, (x, quantized) in record.pairs.items():
            site = place if place in parts else place.rpartition(".")[0]
            found.append(_look(parts[site], x, quantized, weights.get(site)))
    figures = (torch.stack(column).float().cpu() for column in zip(*found))
    return RangeStatistics(tuple(record.pairs), *figures)


def _look(quantizer: Quantizer, x: Tensor, quantized: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    try:
        grid = _grid(quantizer, weight)
    except NotImplementedError:
        return *quantized.float().aminmax(), quantized.new_tensor(math.nan)
    scale, x = grid.scale.float(), quantizer.on_grid(x)
    low, high = (grid.qmin - grid.zero_point) * scale, (grid.qmax - grid.zero_point) * scale
    outside = (x < low - scale / 2) | (x > high + scale / 2)
    return low, high, outside.float().mean()


def _grid(quantizer: Quantizer, weight: Tensor | None) -> QParams:
    if weight is not None and not quantizer.needs_calibration:
        return quantizer.qparams_of(weight)
    return quantizer.qparams()
