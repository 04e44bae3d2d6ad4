"""Observers: what a range should be, from the tensors seen during calibration.

An observer is fed one batch at a time (``update``), keeps a few numbers and answers ``range() -> (low, high)``. Batch
statistics are plain functions; how batches are joined is the same moving average for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal, Union

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from qsr_plugin.errors import suggest
from qsr_plugin.quant.ops import TINY_RANGE
from qsr_plugin.quant.passes import quantized

Range = tuple[Tensor, Tensor]
#: Elements that stay in the cache of a CPU core while many ranges are tried on them.
CACHED = 2**18
#: How batches are joined: the weight of the past in [0, 1), or the plain mean of all.
Momentum = Union[Annotated[float, Field(ge=0, lt=1)], Literal["mean"]]


def minmax(x: Tensor) -> Range:
    """Smallest and largest value of a tensor (Jacob et al., CVPR 2018)."""
    return tuple(torch.aminmax(x.detach().float()))


def quantiles(x: Tensor, *qs: float) -> tuple[Tensor, ...]:
    """Linearly interpolated quantiles of all elements, exact for any number of them.

    ``torch.quantile`` refuses more than 2^24 elements.

    Args:
        x: Float tensor of any shape with at least one element.
        *qs: Quantiles in [0, 1].

    Returns:
        One 0-d tensor per quantile.
    """
    flat = x.detach().float().flatten()
    positions = [q * (flat.numel() - 1) for q in qs]
    ordered = _ascending(flat)
    return tuple(torch.lerp(ordered[math.floor(p)], ordered[math.ceil(p)], p - math.floor(p)) for p in positions)


def _ascending(flat: Tensor) -> Tensor:
    """All values in order, NaN last. NumPy's vectorised sort is faster than any partial order statistic on a CPU."""
    return torch.from_numpy(np.sort(flat.numpy())) if flat.device.type == "cpu" else flat.sort().values


def percentile(x: Tensor, alpha: float = 0.99) -> Range:
    """Quantiles ``1 - alpha`` and ``alpha`` of a tensor (Li et al., CVPR 2019)."""
    return quantiles(x, 1.0 - alpha, alpha)


def sample_max(x: Tensor) -> Range:
    """Mean over the batch of each sample's largest magnitude, as a symmetric range (Li et al., ECCV 2020)."""
    high = x.detach().float().abs().flatten(1).amax(1).mean()
    return -high, high


def mean_magnitude(x: Tensor, negative: float = -1e-5) -> Range:
    """Mean magnitude ``m`` as ``(-m, m)``, or ``(0, m)`` for a tensor without values below ``negative``.

    Learned-step quantizers start from it (Esser et al., ICLR 2020), and read from it whether codes are signed.
    """
    values = x.detach().float()
    mean = values.abs().mean()
    return torch.where(values.amin() < negative, -mean, torch.zeros_like(mean)), mean


def omse(x: Tensor, low: Tensor, high: Tensor, bits: int, candidates: int, shrink: float = 0.01) -> Range:
    """Range among shrunken copies of ``(low, high)`` with the least mean squared quantization error.

    Candidate ``i`` is ``(low, high) * (1 - shrink * i)``; the first of equal candidates wins. The grid has ``2^bits``
    levels, both ends included.

    Args:
        x: Float tensor of any shape.
        low: 0-d tensor, lower end of the widest range.
        high: 0-d tensor, upper end of the widest range.
        bits: Bit width of the grid.
        candidates: How many candidates are tried.
        shrink: How much each candidate is narrower, as a share of the widest range.

    Returns:
        ``(low, high)`` of the best candidate.
    """
    steps = 2.0**bits - 1.0
    ranges = [(low * (1.0 - shrink * index), high * (1.0 - shrink * index)) for index in range(candidates)]
    spans = [(hi - lo).clamp_min(TINY_RANGE) for lo, hi in ranges]
    errors = torch.zeros(candidates, dtype=torch.float64, device=x.device)
    for part in x.detach().float().flatten().split(CACHED):
        lost = []
        for (lo, _), span in zip(ranges, spans):
            error = quantized(part, steps / span, span / steps, 0.0, (0.0, steps), lo).sub_(part)
            lost.append(torch.dot(error, error))
        errors += torch.stack(lost)
    errors = errors.tolist()
    return ranges[min(range(candidates), key=errors.__getitem__)]


def refuse_non_finite(x: Tensor) -> None:
    """Refuse what no range can be taken from.

    Raises:
        ValueError: If a tensor holds a NaN or an infinity, or is empty.
    """
    if x.numel() == 0:
        raise ValueError("cannot observe an empty tensor: give images of at least one pixel")
    smallest, largest = minmax(x)  # a quantile alone would overlook a few of them
    if not bool(torch.isfinite(smallest) & torch.isfinite(largest)):
        raise ValueError(
            f"observed a non-finite value (range {smallest.item()} to {largest.item()}): check the calibration "
            "images and the float weights for NaN or infinity"
        )


class Observer:
    """Joins one statistic over the batches of a calibration.

    The first batch sets the range; each later one moves it: ``range = momentum * range + (1 - momentum) * batch``.

    Args:
        statistic: Function from a tensor to ``(low, high)``.
        momentum: Weight of the past in [0, 1). ``0`` keeps the latest batch only, ``mean`` is the mean of all.
    """

    def __init__(self, statistic: Callable[[Tensor], Range], momentum: Momentum) -> None:
        self._statistic = statistic
        self._momentum = momentum
        self._batches = 0
        self._range: Range | None = None

    def update(self, x: Tensor) -> None:
        """Take one batch into account.

        Raises:
            ValueError: If the batch holds a NaN or an infinity, or is empty.
        """
        refuse_non_finite(x)
        low, high = self._statistic(x)
        if self._range is None:
            self._range = (low, high)
        else:
            m = self._batches / (self._batches + 1.0) if self._momentum == "mean" else self._momentum
            self._range = tuple(m * old + (1.0 - m) * new for old, new in zip(self._range, (low, high)))
        self._batches += 1

    def range(self) -> Range:
        """``(low, high)`` as 0-d float32 tensors.

        Raises:
            RuntimeError: If no batch was observed.
        """
        if self._range is None:
            raise RuntimeError("nothing was observed: the forward pass of the calibration never reached this site")
        return self._range


ObserverName = Literal["minmax", "percentile", "omse", "sample_max"]
_NAMES = ("minmax", "percentile", "omse", "sample_max")
#: Candidates of the OMSE search on activations (Hong and Lee, CVPR 2024).
OMSE_CANDIDATES = 90


def build_observer(name: ObserverName, *, momentum: Momentum, alpha: float, bits: int) -> Observer:
    """Make an observer by name.

    Args:
        name: ``minmax``, ``percentile``, ``omse`` or ``sample_max``.
        momentum: See :class:`Observer`.
        alpha: Upper quantile of ``percentile``, in (0.5, 1].
        bits: Bit width the ``omse`` search minimises the error for.

    Raises:
        ValueError: For an unknown name.
    """
    if name == "minmax":
        return Observer(minmax, momentum)
    if name == "percentile":
        return Observer(lambda x: percentile(x, alpha), momentum)
    if name == "omse":
        return Observer(lambda x: omse(x, *minmax(x), bits, OMSE_CANDIDATES), momentum)
    if name == "sample_max":
        return Observer(sample_max, momentum)
    raise ValueError(f"unknown observer '{name}'. {suggest(name, _NAMES)}")
