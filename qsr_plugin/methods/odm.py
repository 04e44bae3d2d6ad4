"""ODM: overcoming distribution mismatch (Hong and Lee, ECCV 2024, arXiv 2307.13337v2).

Activations use the plain asymmetric grid between two trainable bounds (``asymmetric``), which start from the mean over
the calibration batches of the 1st and 99th percentile. Weights use the symmetric grid of this file, whose bound follows
the weights: a percentile of their magnitudes, recomputed in every forward, times one trainable factor per layer (weight
clipping correction). The pull of activations towards their grid is ``MismatchLoss``, how far it may act is the recipe's
``cooperative``; placement and schedule are in the recipe. Nothing of the method costs anything at test time.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from qsr_plugin.quant.observers import quantiles
from qsr_plugin.quant.ops import TINY_RANGE, fake_quantize, int_limits
from qsr_plugin.quant.quantizer import QParams, Quantizer, StrictOptions, register_quantizer


@register_quantizer("clip_corrected")
class ClipCorrectedQuantizer(Quantizer):
    """Weight quantizer with ``2^b`` levels from ``-u`` to ``u``, ``u = f(W) gamma``.

    ``f(W)`` is a percentile of ``|W|`` without gradient; ``gamma`` is trainable, 1 at the start. So
    ``dL/d gamma = f(W) sum dL/dw_q dw_q/du``. Zero is not a level.
    """

    class Options(StrictOptions):
        """Options of :class:`ClipCorrectedQuantizer`.

        Attributes:
            alpha: Quantile of the magnitudes.
            floor: Smallest legal gamma.
        """

        alpha: float = Field(0.99, gt=0.5, le=1)
        floor: float = Field(1e-3, gt=0, lt=1)

    roles = ("weight",)
    needs_calibration = False

    def __init__(self, options: Options, candidates: tuple[int, ...], role: str, channel_axis: int) -> None:
        super().__init__(options, candidates, role, channel_axis)
        self.gamma = nn.Parameter(torch.ones(()))

    def _bound(self, weight: Tensor) -> Tensor:
        (percentile,) = quantiles(weight.detach().abs(), self.options.alpha)
        return percentile.clamp_min(TINY_RANGE) * self.gamma

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize a weight of any shape."""
        bound, limits = self._bound(x), int_limits(bits, signed=False)
        return fake_quantize(x, 2 * bound, limits[1], limits, bounds=(-bound, bound), anchor=-bound.detach())

    def qparams_of(self, weight: Tensor, bits: int | None = None) -> QParams:
        """Grid of a given weight; the zero point is real-valued."""
        _, steps = int_limits(bits or self.candidates[0], signed=False)
        scale = 2 * self._bound(weight).detach() / steps
        return QParams(scale, torch.full_like(scale, steps / 2), 0, int(steps))

    def range_parameters(self) -> list[nn.Parameter]:
        """Gamma."""
        return [self.gamma]

    def project(self) -> None:
        """Keep gamma positive."""
        with torch.no_grad():
            self.gamma.clamp_(min=self.options.floor)
