"""What the ranges of a network do during training: where they stand, and how much they clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.surgery import quantizers, sites


@dataclass(frozen=True)
class RangeStatistics:
    """One look at all uniform quantizers of a network.

    Attributes:
        places: Dotted names ``site.port``.
        lower: ``(P,)`` value of the lowest level.
        upper: ``(P,)`` value of the highest level.
        clipped: ``(P,)`` share of the elements that are more than half a step from their level.
    """

    places: tuple[str, ...]
    lower: Tensor
    upper: Tensor
    clipped: Tensor

    def scalars(self) -> dict[str, float]:
        """Name and value of each figure, as TensorBoard shows them."""
        rows = zip(self.places, *(figures.tolist() for figures in (self.lower, self.upper, self.clipped)))
        return {
            f"{kind}/{place}": value
            for place, *values in rows
            for kind, value in zip(("range_lower", "range_upper", "clipped"), values)
        }

    def lines(self) -> list[str]:
        """One readable line per place."""
        rows = zip(self.places, self.lower.tolist(), self.upper.tolist(), self.clipped.tolist())
        return [f"{place}: {low:.4g} to {high:.4g}, {share:.2%} clipped" for place, low, high, share in rows]


def range_statistics(net: nn.Module, record: ForwardRecord) -> RangeStatistics | None:
    """Look at the pairs of a record.

    Args:
        net: Bare quantized network.
        record: Record of a forward of it that kept pairs.

    Returns:
        The statistics, ``None`` if no quantizer is uniform per tensor.
    """
    weights = {f"{name}.weight": site.weight for name, site in sites(net) if site.quantizer("weight") is not None}
    found: list[tuple[str, Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for place, quantizer in quantizers(net):
            pair = record.pairs.get(place)
            if pair is None:
                continue
            try:
                grid = quantizer.qparams() if quantizer.role == "act" else _weight_grid(quantizer, weights[place])
            except NotImplementedError:
                continue
            scale = grid.scale.float()
            low, high = (grid.qmin - grid.zero_point) * scale, (grid.qmax - grid.zero_point) * scale
            outside = (pair[0] < low - scale / 2) | (pair[0] > high + scale / 2)
            found.append((place, low, high, outside.float().mean()))
    if not found:
        return None
    places, *figures = zip(*found)
    return RangeStatistics(places, *(torch.stack(column).float().cpu() for column in figures))


def _weight_grid(quantizer, weight: Tensor):
    return quantizer.qparams() if quantizer.needs_calibration else quantizer.qparams_of(weight)
