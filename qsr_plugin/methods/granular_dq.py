"""Granular-DQ: one bit width per patch, from granularity and entropy (Wang et al., AAAI 2025, arXiv 2409.14330).

All places of a network use the same width for an image. A gate, the *granularity-bit controller*, looks at the features
of the first convolution at three resolutions and chooses among a few widths. Images that get the widest are looked at
again: the entropy of their luminance, compared with quantiles of a data set, may lower the width (*entropy-to-bit*).
Which quantiles, follows the training batches for a while (*adaptive threshold calibration*). The loss is that of the
pixels alone. Quantizers and schedule are in the recipe.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from qsr_plugin.quant.image_stats import ENTROPY_OPS, entropies
from qsr_plugin.quant.policy import BitDecision, BitPolicy, NetworkPolicy, choose, register_policy
from qsr_plugin.quant.quantizer import StrictOptions
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.reduce import gather_over_ranks

if TYPE_CHECKING:
    from qsr_plugin.quant.schema import Stage

#: Place and name of the features that the gate looks at.
HEAD = "head:output"
#: Quantiles of the entropies are known in steps of half a percent.
STEPS = 200
#: Entropies (nats) that count as 0 and as 1 on the scale of the thresholds.
LOWEST, SPAN = 1.2, 2.2


class GranularityOptions(StrictOptions):
    """Options of the policy ``granularity``.

    Attributes:
        gate: Widths that the gate chooses from, ascending.
        entropy: Widths of images for which the gate chose its widest, by increasing entropy; the last one is that of
            the gate. Only that one: entropies are not looked at.
        thresholds: Shares of the data below each change of width, at the start; ascending, in (0, 1).
        gamma: Weight of the past when thresholds follow the batches, per image. The released code has 0.99997.
        noise_at_test: Gumbel noise in evaluation as well, as released: bits then differ from call to call.
        gate_gradient: Whether the gate learns. As released it does not: it stays as it starts.
    """

    gate: tuple[int, ...] = Field((4, 6, 8), min_length=2)
    entropy: tuple[int, ...] = Field((4, 5, 8), min_length=1)
    thresholds: tuple[float, ...] = (0.5, 0.9)
    gamma: float = Field(0.9997, gt=0, lt=1)
    noise_at_test: bool = False
    gate_gradient: bool = True

    @model_validator(mode="after")
    def _check(self) -> GranularityOptions:
        for name in ("gate", "entropy", "thresholds"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise ValueError(f"{name} is {list(values)}; give ascending values, each once")
        if self.gate[-1] != self.entropy[-1]:
            raise ValueError(f"entropy ends with {self.entropy[-1]}, gate with {self.gate[-1]}: give both the same end")
        if len(self.thresholds) != len(self.entropy) - 1 or not all(0 < t < 1 for t in self.thresholds):
            raise ValueError(
                f"thresholds is {list(self.thresholds)}; {len(self.entropy)} width(s) in entropy take "
                f"{len(self.entropy) - 1} between 0 and 1"
            )
        return self


class Gate(nn.Module):
    """``W [Z3, Z1, Z2] + b`` of features at full, half and a quarter of the resolution, one output per width.

    Each Z is normalised in groups of channels (with scale and shift; without it all three have the same means), pooled
    to the size of the smallest, and averaged over the positions. Sides of 1 are not halved.

    W starts at zero and b at 0 but for 1 at the widest, which makes construction reproducible: at first every image
    gets the most bits, and under Gumbel noise three widths have the probabilities 0.2119, 0.2119, 0.5761. The rows of W
    part with the first step, because the widths lead to different losses. Published is a linear layer's random start.

    Args:
        channels: Channels C of the features.
        choices: Number of widths.
    """

    GROUPS, SCALES = 8, 3

    def __init__(self, channels: int, choices: int) -> None:
        super().__init__()
        groups = math.gcd(self.GROUPS, channels)
        if groups == channels:  # a group of one channel has no mean left
            groups = max(groups // 2, 1)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in range(self.SCALES))
        self.linear = nn.Linear(self.SCALES * channels, choices)
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.zero_()[-1] = 1.0

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(N, K)`` from ``(N, C, H, W)`` of any size."""
        with torch.autocast(features.device.type, enabled=False):
            z = features.to(self.linear.weight.dtype)
            levels = []
            for number, norm in enumerate(self.norms):
                z = _halved(z) if number else z
                # The function itself: the module refuses a group of one number, which is an image of one pixel.
                levels.append(torch.group_norm(z, norm.num_groups, norm.weight, norm.bias, norm.eps))
            for number in range(self.SCALES - 1):
                for _ in range(self.SCALES - 1 - number):
                    levels[number] = _halved(levels[number])
            return self.linear(torch.cat([levels[-1], *levels[:-1]], 1).mean((2, 3)))


def _halved(x: Tensor) -> Tensor:
    """Average pooling of 2x2; of a side of 1 what is there."""
    return F.avg_pool2d(x, tuple(min(2, side) for side in x.shape[-2:]))


def followed(thresholds: Tensor, seen: Tensor, counted: Tensor, gamma: float) -> Tensor:
    """Thresholds after a batch: ``t <- gamma t + (1 - gamma) (E - 1.2) / 2.2`` for one counted image after the other.

    All thresholds move towards the same values, so their order stays.

    Args:
        thresholds: ``(T,)``, shares of the data.
        seen: ``(N,)`` entropies in nats.
        counted: ``(N,)`` bool, which images count.
        gamma: Weight of the past, per image.

    Returns:
        ``(T,)``, kept in the span of the table of quantiles, [0.005, 0.995].
    """
    counted = counted.to(thresholds.dtype)
    later = counted.sum() - counted.cumsum(0)
    weights = counted * (1.0 - gamma) * gamma**later
    aims = ((seen - LOWEST) / SPAN).to(thresholds.dtype)
    moved = thresholds + (weights * (aims - thresholds.unsqueeze(1))).sum(1)
    return moved.clamp(1.0 / STEPS, 1.0 - 1.0 / STEPS)


class SharedGranularity(NetworkPolicy):
    """Gate, quantiles of entropies and thresholds of a network.

    Attributes:
        table: Buffer ``(199,)``: entropies of the calibration images at the quantiles 0.5 %, 1 %, ..., 99.5 %.
        thresholds: Buffer ``(T,)``: the quantiles at which widths change.
    """

    taps = (HEAD,)
    needs_calibration = True
    adapts = True

    def __init__(
        self,
        options: GranularityOptions,
        candidates: tuple[int, ...],
        places: tuple[str, ...],
        channels: tuple[int, ...],
    ) -> None:
        super().__init__(options, candidates, places, channels)
        self.gate = Gate(channels[0], len(options.gate))
        self.register_buffer("table", torch.zeros(STEPS - 1))
        self.register_buffer("thresholds", torch.tensor(options.thresholds))
        self.register_buffer("gate_widths", torch.tensor(options.gate, dtype=torch.float), persistent=False)
        self.register_buffer("entropy_widths", torch.tensor(options.entropy, dtype=torch.float), persistent=False)
        self._adapting = False
        self._seen: list[Tensor] | None = None

    # -- calibration -------------------------------------------------------------------------------------------------

    def begin_calibration(self) -> None:
        """Start collecting entropies."""
        self._seen = []

    def observe(self, image: Tensor) -> None:
        """Collect the entropies of ``(N, 3, H, W)`` images."""
        if self._seen is not None:
            self._seen.append(entropies(image))

    def end_calibration(self, *, keep: bool = True) -> None:
        """Fill the table of quantiles; thresholds stay."""
        if keep and self._seen:
            found = torch.cat(self._seen)
            levels = torch.arange(1, STEPS, device=found.device, dtype=found.dtype) / STEPS
            self.table.copy_(found.quantile(levels))
        self._seen = None

    # -- deciding ----------------------------------------------------------------------------------------------------

    def decision(self, record: ForwardRecord) -> BitDecision:
        """Bits of all images, the same at every place."""
        logits = self.gate(record.tapped(HEAD)[0])
        if self.training or self.options.noise_at_test:
            spacing = torch.empty_like(logits).exponential_().clamp_min_(torch.finfo(logits.dtype).tiny)
            logits = logits - spacing.log()
        probabilities = logits.softmax(1)
        branches = self.gate_widths.expand_as(probabilities)
        if self.thresholds.numel():
            widest = probabilities.argmax(1) == branches.shape[1] - 1
            branches = torch.cat([branches[:, :-1], self._refined(record.image, widest).unsqueeze(1)], 1)
        chosen = choose(probabilities, self.candidates, branches=branches, straight_through=True)
        return chosen if self.options.gate_gradient else BitDecision(chosen.bits.detach())

    def _refined(self, image: Tensor, widest: Tensor) -> Tensor:
        """Widths ``(N,)`` by entropy; in a stage that says so, thresholds then follow the images with the widest."""
        seen = entropies(image)
        widths = self.entropy_widths[(seen.unsqueeze(1) > self.limits()).sum(1)]
        if self._adapting and self.training:
            joint = (gather_over_ranks(seen), gather_over_ranks(widest))
            self.thresholds.copy_(followed(self.thresholds, *joint, self.options.gamma))
        return widths

    def limits(self) -> Tensor:
        """Entropies ``(T,)`` in nats at the thresholds, interpolated between the quantiles of the table."""
        position = (self.thresholds * STEPS - 1).clamp(0, STEPS - 2)
        below = position.long().clamp(max=STEPS - 3)
        return torch.lerp(self.table[below], self.table[below + 1], position - below)

    # -- training ----------------------------------------------------------------------------------------------------

    def enter_stage(self, stage: Stage) -> None:
        """Let thresholds follow the batches if the stage says so."""
        self._adapting = stage.adapt_thresholds

    def idle_parameters(self) -> list[nn.Parameter]:
        """The gate, if it does not learn."""
        return [] if self.options.gate_gradient else list(self.gate.parameters())


@register_policy("granularity")
class GranularityBits(BitPolicy):
    """One width per image for all places; see the module docstring.

    Raises:
        RecipeError: If the options name a width that is no candidate.
    """

    Options = GranularityOptions
    network = SharedGranularity

    def __init__(
        self,
        options: GranularityOptions,
        candidates: tuple[int, ...],
        channels: int | None = None,
        channel_axis: int = 1,
    ) -> None:
        super().__init__(options, candidates, channels, channel_axis)
        for name in ("gate", "entropy"):
            unknown = [width for width in getattr(options, name) if width not in candidates]
            if unknown:
                raise RecipeError(
                    f"policy 'granularity': {name} asks for {unknown[0]} bits, the activation bits are "
                    f"{list(candidates)}: add it to bits.act, or change policy.{name}"
                )

    def decide(self, features: Tensor, record: ForwardRecord | None) -> BitDecision:
        """The decision of the network.

        Raises:
            RuntimeError: Outside of a quantized network's forward.
        """
        if record is None or record.policy is None:
            raise RuntimeError(f"{self.place}: bits follow the image: run the whole quantized network, not this part")
        return record.once(record.policy.decision)

    def shared_ops(self, record: ForwardRecord) -> int:
        """Entropy of the image and the gate: norms of the features at three scales, about 12 per element, and a linear
        layer."""
        gate = 12 * record.tapped(HEAD)[0].numel() + 2 * record.policy.gate.linear.weight.numel()
        return ENTROPY_OPS * record.pixels + gate
