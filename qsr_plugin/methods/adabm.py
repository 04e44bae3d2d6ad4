"""AdaBM: on-the-fly adaptive bit mapping (Hong and Lee, CVPR 2024, arXiv 2404.03296).

The bit width of a place for an image is that of the recipe plus two terms of -1, 0 or +1: one of the image, by its
gradients, the same at all places; and one of the place, by how much its input spreads. Both start from a calibration on
unlabelled images and are then trained, in turn with the ranges; no weight of the network is. Activations have learned
bounds, which are fitted once to the bits of their place; schedule, losses and placements are in the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from qsr_plugin.methods.minmax_percentile import AsymmetricQuantizer
from qsr_plugin.quant.image_stats import GRADIENT_OPS, gradient_magnitudes
from qsr_plugin.quant.observers import Observer, omse, quantiles
from qsr_plugin.quant.policy import BitDecision, BitPolicy, NetworkPolicy, register_policy
from qsr_plugin.quant.quantizer import StrictOptions, register_quantizer
from qsr_plugin.quant.record import ForwardRecord

#: How many shrunken ranges bit-aware clipping tries.
CLIP_CANDIDATES = 100
#: Least distance of the image thresholds, below which the slope of the image term would explode.
LEAST_GAP = 1e-3
_PLACEHOLDER = 128.0  # of the image thresholds before a calibration
#: Images whose complexities are compared at once, the published batch; smaller batches are joined.
COMPARED = 16


@register_quantizer("bit_aware")
class BitAwareQuantizer(AsymmetricQuantizer):
    """Trainable lower and upper bound for all bit widths, clipped to suit the bits of its place."""

    class Options(AsymmetricQuantizer.Options):
        """Options of :class:`BitAwareQuantizer`.

        Attributes:
            mix: How far clipping goes from the observed bounds (0) to those of the least error (1).
        """

        mix: float = Field(0.5, ge=0, le=1)

    def fit(self, x: Tensor, bits: int | Tensor) -> None:
        """Move the bounds towards those with the least squared error on ``x``; places with bits of their own stay."""
        if not self.counts_in_fab:
            return
        best, mix = omse(x, self.lower.detach(), self.upper.detach(), bits, CLIP_CANDIDATES), self.options.mix
        with torch.no_grad():
            self.set_range(*(old + mix * (new - old) for old, new in zip((self.lower, self.upper), best)))


class AdaBMOptions(StrictOptions):
    """Options of the policy.

    Attributes:
        p_image: Share of the calibration images, in percent, that start with one bit less, and with one bit more.
        p_layer: The same for places.
        momentum: Weight of the past when the image thresholds of calibration batches are joined.
    """

    p_image: float = Field(10.0, gt=0, lt=50)
    p_layer: float = Field(30.0, gt=0, lt=50)
    momentum: float = Field(0.9, ge=0, lt=1)


class ImageBits(NetworkPolicy):
    """The term of the image: two trainable thresholds on its complexity, which all places share."""

    needs_calibration = True

    def __init__(
        self, options: AdaBMOptions, candidates: tuple[int, ...], places: tuple[str, ...], channels: tuple[int, ...]
    ) -> None:
        super().__init__(options, candidates, places, channels)
        self.target_bits = float(_base_of(candidates))
        self.lower = nn.Parameter(torch.tensor(_PLACEHOLDER))
        self.upper = nn.Parameter(torch.tensor(_PLACEHOLDER + LEAST_GAP))
        self._observer: Observer | None = None
        self._waiting: list[Tensor] = []

    def term(self, record: ForwardRecord) -> Tensor:
        """-1, 0 or +1 for each image of a forward, ``(N,)``, with the gradient of the soft term."""
        return self.of_complexity(complexity(record.image))

    def of_complexity(self, c: Tensor) -> Tensor:
        """``-1`` below the lower threshold, ``+1`` above the upper one, else 0; both thresholds count as between.

        The gradient is that of ``tanh((c - m) / h)`` with m the middle and h half of the distance of the thresholds.

        Args:
            c: ``(N,)`` complexities, 0 or more.
        """
        lower, upper = self.lower.to(c.dtype), self.upper.to(c.dtype)
        soft = torch.tanh((c - (upper + lower) / 2) * 2 / (upper - lower))
        hard = (c > upper).to(c.dtype) - (c < lower).to(c.dtype)
        return hard + (soft - soft.detach())

    def begin_calibration(self) -> None:
        """Start to collect percentiles."""
        share = self.options.p_image / 100
        self._observer = Observer(lambda c: quantiles(c, share, 1 - share), self.options.momentum)
        self._waiting = []

    def observe(self, x: Tensor) -> None:
        """Take images ``(N, 3, H, W)``, RGB in 0..1, into account; a batch of few waits for the next ones."""
        if self._observer is not None:
            self._waiting.append(complexity(x))
            if sum(map(len, self._waiting)) >= COMPARED:
                self._compare()

    def _compare(self) -> None:
        self._observer.update(torch.cat(self._waiting))
        self._waiting = []

    def end_calibration(self, *, keep: bool = True) -> None:
        """Set the thresholds, or forget what was seen."""
        if self._observer is not None and keep:
            if self._waiting:
                self._compare()
            with torch.no_grad():
                for threshold, value in zip((self.lower, self.upper), self._observer.range()):
                    threshold.copy_(value)
            self.project()
        self._observer, self._waiting = None, []

    def settle(self, policies: Mapping[str, BitPolicy]) -> None:
        """Set the terms of all places from how their sensitivities compare."""
        asking = [policies[place] for place in self.places]
        sensitivity, share = torch.stack([policy.sensitivity for policy in asking]), self.options.p_layer / 100
        low, high = quantiles(sensitivity, share, 1 - share)
        terms = (sensitivity > high).float() - (sensitivity < low).float()
        with torch.no_grad():
            for policy, term in zip(asking, terms):
                policy.offset.copy_(term)

    def threshold_parameters(self) -> list[nn.Parameter]:
        """Both thresholds."""
        return [self.lower, self.upper]

    def project(self) -> None:
        """Keep the upper threshold above the lower one, as far as their type resolves."""
        with torch.no_grad():
            gap = LEAST_GAP + 2 * torch.finfo(self.lower.dtype).eps * self.lower.abs()
            self.upper.copy_(torch.maximum(self.upper, self.lower + gap))


@register_policy("adabm")
class AdaBMPolicy(BitPolicy):
    """Bits of the recipe plus the image's term plus the place's own, one trainable number.

    Calibration measures the sensitivity of a place: the standard deviation of what arrives there in the float network,
    over all axes of an image, as mean over images and then over batches. The :class:`ImageBits` compare them.
    """

    Options = AdaBMOptions
    network = ImageBits
    reach = 2

    def __init__(
        self, options: AdaBMOptions, candidates: tuple[int, ...], channels: int | None = None, channel_axis: int = 1
    ) -> None:
        super().__init__(options, candidates, channels, channel_axis)
        self.base = _base_of(candidates)
        self.offset = nn.Parameter(torch.zeros(()))
        self.sensitivity: Tensor | None = None
        self._deviations: list[Tensor] | None = None

    def decide(self, features: Tensor, record: ForwardRecord | None) -> BitDecision:
        """Bits ``(N,)``; outside of a network's forward there is no image, and the place's term stands alone."""
        term = 0 if record is None else record.once(record.policy.term)
        return BitDecision(self.base + term + self.own_term())

    def shared_ops(self, record: ForwardRecord) -> int:
        """The gradients of the image."""
        return GRADIENT_OPS * record.pixels

    def own_term(self) -> Tensor:
        """-1, 0 or +1: the offset, clipped and rounded, with the gradient of its hyperbolic tangent."""
        soft = torch.tanh(self.offset)
        return self.offset.detach().clamp(-1, 1).round() + (soft - soft.detach())

    def usual_bits(self) -> int:
        """Bits of an image that is neither simple nor complex."""
        return self.base + int(self.own_term())

    def begin_calibration(self) -> None:
        """Start to collect deviations."""
        self._deviations = []

    def observe(self, x: Tensor) -> None:
        """Take a tensor ``(M, ...)`` of the float network into account."""
        if self._deviations is not None:
            values = x.detach().float().flatten(1)
            self._deviations.append(values.std(1, correction=min(1, values.shape[1] - 1)).mean())

    def end_calibration(self, *, keep: bool = True) -> None:
        """Set the sensitivity, or forget what was seen."""
        deviations, self._deviations = self._deviations, None
        if deviations and keep:
            self.sensitivity = torch.stack(deviations).mean()


def complexity(image: Tensor) -> Tensor:
    """1000 times the mean magnitude of both derivatives of the luminance, ``(N,)`` for RGB ``(N, 3, H, W)`` in 0..1."""
    return 1000 * gradient_magnitudes(image).mean(1)


def _base_of(candidates: tuple[int, ...]) -> int:
    """The bit width in the middle.

    Raises:
        ValueError: If the candidates are not all widths from two below to two above it.
    """
    base = candidates[len(candidates) // 2]
    if candidates != tuple(range(base - AdaBMPolicy.reach, base + AdaBMPolicy.reach + 1)):
        raise ValueError(
            f"policy 'adabm' goes {AdaBMPolicy.reach} bits below and above one bit width, got {list(candidates)}: give "
            "bits.act as that one number"
        )
    return base
