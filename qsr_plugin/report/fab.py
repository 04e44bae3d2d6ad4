"""Feature average bit width (FAB): how many bits an activation takes on average, and how the widths are distributed.

Every mean is a plain one: over the counted places of a patch, over the patches of an image whatever their sizes, over
the images of a set (Hong et al., ECCV 2022). A whole image is one patch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import numpy as np
import torch
from torch import nn

from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.schema import FLOAT_BITS
from qsr_plugin.quant.surgery import quantizers


@dataclass(frozen=True)
class BitStatistics:
    """How the activation bits of one set of images are distributed.

    Attributes:
        fab: Mean over the images.
        lowest: Smallest FAB of an image.
        quartiles: 25 %, 50 % and 75 % quantile of the FABs of the images, interpolated.
        highest: Largest FAB of an image.
        shares: Bit width, as text, to its share of all (place, patch), each image weighted alike; adds up to 1, and the
            mean width is ``fab``. Empty where no activation is quantized.
        places: Counted place to its mean bits, in module order; their mean is ``fab``.
        others: The same of activation places that FAB does not count.
    """

    fab: float
    lowest: float
    quartiles: tuple[float, float, float]
    highest: float
    shares: dict[str, float]
    places: dict[str, float]
    others: dict[str, float]

    @property
    def varies(self) -> bool:
        """Whether more than one bit width was used at the counted places."""
        return len(self.shares) > 1

    def shares_text(self) -> str:
        """Like ``4: 31 %, 6: 50 %, 8: 19 %``."""
        return ", ".join(f"{bits}: {share:.0%}".replace("%", " %") for bits, share in self.shares.items())

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


class BitTally:
    """Collects the bits of images, one after the other."""

    def __init__(self) -> None:
        self._fabs: list[float] = []
        self._shares: dict[float, float] = defaultdict(float)
        self._places: dict[str, list[float]] = {}
        self._others: dict[str, list[float]] = {}

    def add(self, patches: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]] = ()) -> float:
        """Take one image into account.

        Args:
            patches: Counted place to bits, for each patch of the image.
            others: The same of places that FAB does not count.

        Returns:
            FAB of the image; 32 if no activation is quantized.
        """
        self._fabs.append(fmean(map(patch_average, patches)))
        for patch in patches:
            for width in patch.values():
                self._shares[width] += 1 / (len(patch) * len(patches))
        for total, own in ((self._places, patches), (self._others, others)):
            for place, width in mean_by_place(own).items():
                total.setdefault(place, []).append(width)
        return self._fabs[-1]

    def statistics(self) -> BitStatistics:
        """What was collected of at least one image."""
        lowest, *quartiles, highest = (float(value) for value in np.quantile(self._fabs, (0, 0.25, 0.5, 0.75, 1)))
        shares = {f"{width:g}": self._shares[width] / len(self._fabs) for width in sorted(self._shares)}
        places, others = ({name: fmean(means) for name, means in part.items()} for part in (self._places, self._others))
        return BitStatistics(fmean(self._fabs), lowest, tuple(quartiles), highest, shares, places, others)


def patch_average(bits: Mapping[str, float]) -> float:
    """Plain mean over the counted places of one patch; 32 if there are none."""
    return fmean(bits.values()) if bits else float(FLOAT_BITS)


def mean_by_place(patches: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean bits of each place over the patches."""
    found: dict[str, list[float]] = {}
    for patch in patches:
        for place, width in patch.items():
            found.setdefault(place, []).append(width)
    return {place: fmean(widths) for place, widths in found.items()}


def bits_of_images(net: nn.Module, record: ForwardRecord) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Bits of every image of one forward.

    Args:
        net: Quantized network.
        record: Record of its forward.

    Returns:
        For each image of the batch: place ``site.port`` to bits, of the places that FAB counts; and the same of the
        other activation places. Places that did not run are missing.
    """
    parts = {place: quantizer for place, quantizer in quantizers(net) if place in record.bits}
    chosen = {place: record.bits[place] for place in parts if isinstance(record.bits[place], torch.Tensor)}
    columns: dict[str, list[float]] = {}
    if chosen:  # one transfer for all places
        rows = [bits.detach().float().reshape(-1).expand(record.images) for bits in chosen.values()]
        columns = dict(zip(chosen, torch.stack(rows).tolist()))
    per_image = [
        {place: float(columns[place][index] if place in columns else record.bits[place]) for place in parts}
        for index in range(record.images)
    ]
    counted = [{place: bits[place] for place in parts if parts[place].counts_in_fab} for bits in per_image]
    others = [{place: bits[place] for place in parts if not parts[place].counts_in_fab} for bits in per_image]
    return counted, others


def feature_average_bits(net: nn.Module, record: ForwardRecord) -> float:
    """Plain mean over the counted activation places, then over the images of one forward.

    First and last layers at bits of their own are not counted, as in the papers. A network without quantized
    activations has 32.

    Args:
        net: Quantized network.
        record: Record of its forward.
    """
    return fmean(map(patch_average, bits_of_images(net, record)[0]))


def mean_bits(bits: int | torch.Tensor) -> float:
    """Mean over the images of one entry of a record: an int, or ``(N,)`` one per image."""
    return float(bits.detach().double().mean()) if isinstance(bits, torch.Tensor) else float(bits)
