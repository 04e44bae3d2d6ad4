"""Static post-training ranges: min-max, percentile, OMSE, and the learned-range grids they feed.

Min-max: Jacob et al., CVPR 2018. Percentile: Li et al., CVPR 2019. OMSE follows the
comparison in AdaBM (Hong and Lee, CVPR 2024). Activations use an asymmetric grid between two bounds, both of them
levels; weights a symmetric one. Zero is a level of neither in general, but of the grid ``zero_level``.
Biases stay float.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qsr_plugin.quant.least_error import LeastErrorObserver
from qsr_plugin.quant.observers import Momentum, Observer, Range, build_observer, omse, quantiles
from qsr_plugin.quant.ops import TINY_RANGE, fake_quantize, int_limits
from qsr_plugin.quant.passes import Ties
from qsr_plugin.quant.quantizer import QParams, Quantizer, StrictOptions, register_quantizer

ObserverName = Literal["minmax", "percentile", "omse"]
#: For activations also the range of least mean logarithm of the images' errors.
ActObserverName = Literal[ObserverName, "least_error"]
#: Candidates of the OMSE search on weights.
WEIGHT_CANDIDATES = 50


class _BoundedQuantizer(Quantizer):
    """``2^b`` levels from ``l`` to ``u``: ``round((clip(x) - l) / s) s + l`` with ``s = (u - l) / (2^b - 1)``."""

    #: How a value exactly on a bound counts.
    ties: ClassVar[Ties] = "inside"

    def _bounds(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize ``x``."""
        lower, upper = self._bounds()
        limits, anchor = int_limits(self.expand(bits, x), signed=False), lower.detach()
        return fake_quantize(x, upper - lower, limits[1], limits, bounds=(lower, upper), anchor=anchor, ties=self.ties)

    def qparams(self, bits: int | None = None) -> QParams:
        """Grid at one bit width; the zero point is real-valued."""
        lower, upper = (bound.detach() for bound in self._bounds())
        _, steps = int_limits(bits or self.candidates[0], signed=False)
        scale = (upper - lower) / steps
        return QParams(scale, -lower / scale, 0, int(steps))

    def range_parameters(self) -> list[nn.Parameter]:
        """The bounds."""
        return list(self.parameters())


@register_quantizer("asymmetric")
class AsymmetricQuantizer(_BoundedQuantizer):
    """Trainable lower and upper bound, set by an observer."""

    class Options(StrictOptions):
        """Options of :class:`AsymmetricQuantizer`.

        Attributes:
            observer: How a batch proposes a range; ``least_error`` looks at all images together.
            alpha: Upper quantile of the percentile observer; the lower one is ``1 - alpha``.
            momentum: Weight of the past when batches are joined.
        """

        observer: ActObserverName = "minmax"
        alpha: float = Field(0.99, gt=0.5, le=1)
        momentum: Momentum = 0.9

    def __init__(self, options: Options, candidates: tuple[int, ...], role: str, channel_axis: int) -> None:
        super().__init__(options, candidates, role, channel_axis)
        self.lower = nn.Parameter(torch.zeros(()))
        self.upper = nn.Parameter(torch.zeros(()))

    def _bounds(self) -> tuple[Tensor, Tensor]:
        return self.lower, self.upper

    def make_observer(self) -> Observer:
        """The observer of the options."""
        o = self.options
        if o.observer == "least_error":
            return LeastErrorObserver(max(self.candidates))
        return build_observer(o.observer, momentum=o.momentum, alpha=o.alpha, bits=max(self.candidates))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the observed bounds."""
        self.lower.copy_(low)
        self.upper.copy_(high)
        self.project()

    def project(self) -> None:
        """Keep the upper bound above the lower one."""
        with torch.no_grad():
            width = TINY_RANGE + 1e-6 * self.lower.abs()
            self.upper.copy_(torch.maximum(self.upper, self.lower + width))


@register_quantizer("zero_level")
class ZeroLevelQuantizer(AsymmetricQuantizer):
    """As :class:`AsymmetricQuantizer` with an integer zero point, so that engines can pad with zeros (Jacob et al.).

    The range takes zero in, and both bounds move, by half a step at most, until zero is a level.
    """

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize ``x``."""
        _, steps = int_limits(self.expand(bits, x), signed=False)
        zero, moved = self._zero(steps)
        bounds = (self.lower + moved, self.upper + moved)
        return fake_quantize(x, self.upper - self.lower, steps, (-zero, steps - zero), bounds=bounds, ties=self.ties)

    def qparams(self, bits: int | None = None) -> QParams:
        """Grid at one bit width; the zero point is an integer."""
        found = super().qparams(bits)
        return replace(found, zero_point=self._zero(float(found.qmax))[0])

    def _zero(self, steps: float | Tensor) -> tuple[Tensor, Tensor]:
        """Code of zero, and how far the bounds move for it; no gradient."""
        lower = self.lower.detach()
        step = (self.upper.detach() - lower) / steps
        zero = torch.round(-lower / step)
        return zero, -zero * step - lower

    def project(self) -> None:
        """Keep the upper bound above the lower one, and zero between them."""
        with torch.no_grad():
            self.lower.clamp_(max=0)
            self.upper.clamp_(min=0)
        super().project()


@register_quantizer("symmetric")
class SymmetricQuantizer(_BoundedQuantizer):
    """One trainable bound ``u``: ``2^b`` levels from ``-u`` to ``u``, for weights."""

    class Options(StrictOptions):
        """Options of :class:`SymmetricQuantizer`.

        Attributes:
            observer: How the weight proposes its bound.
            alpha: Quantile of the percentile observer.
            reference: ``absolute`` looks at magnitudes; ``signed`` at signed values, as the published harness does.
        """

        observer: ObserverName = "minmax"
        alpha: float = Field(0.99, gt=0.5, le=1)
        reference: Literal["absolute", "signed"] = "absolute"

    roles = ("weight",)

    def __init__(self, options: Options, candidates: tuple[int, ...], role: str, channel_axis: int) -> None:
        super().__init__(options, candidates, role, channel_axis)
        self.bound = nn.Parameter(torch.zeros(()))

    def _bounds(self) -> tuple[Tensor, Tensor]:
        return -self.bound, self.bound

    def make_observer(self) -> Observer:
        """A weight is seen once, so nothing is averaged."""
        return Observer(self._statistic, momentum=0.0)

    def _statistic(self, weight: Tensor) -> Range:
        options = self.options
        values = weight.detach().float()
        values = values.abs() if options.reference == "absolute" else values
        if options.observer == "percentile":
            (high,) = quantiles(values, options.alpha)
        else:
            high = weight.detach().float().abs().amax() if options.observer == "minmax" else values.amax()
        if not bool(high > 0):  # no positive weight: the signed reference says nothing
            high = weight.detach().float().abs().amax()
        if options.observer == "omse":  # at the place's own bits; AdaBM's release uses one width for all places
            return omse(weight, -high, high, max(self.candidates), WEIGHT_CANDIDATES)
        return -high, high

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the upper bound."""
        self.bound.copy_(high)
        self.project()

    def project(self) -> None:
        """Keep the bound positive."""
        with torch.no_grad():
            self.bound.clamp_(min=TINY_RANGE)
