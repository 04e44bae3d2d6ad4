"""DDTB: dynamic dual trainable bounds (Zhong et al., ECCV 2022, arXiv 2203.03844).

Weights and activations have the same affine grid between a lower bound l and an upper bound u::

    S = (2^b - 1) / (u - l);  z = round(S l) + 2^(b-1);  x_q = (round(S clip(x, l, u) - z) + z) / S

Zero is a level; the bounds in general are not. Rounding is straight-through, also in z, so z cancels in the gradient.
The published code does not limit codes: where the fraction of ``S l`` is one half, as for ``l = -u``, there are
``2^b + 1`` of them. Here they are clamped to ``2^b`` unless told otherwise.

Bounds of activations are trained. At the places whose extremes vary most between batches, a small gate network
rescales both for each image; it learns from ``GateLoss`` first and takes part in a later stage of the training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qsr_plugin.methods.ddtb_gate import GATE_LOGITS, BoundsObserver, Gate, apart, rescale
from qsr_plugin.methods.ddtb_grid import grid_between, quantize_between
from qsr_plugin.quant.observers import Observer, minmax, percentile
from qsr_plugin.quant.ops import at_bits
from qsr_plugin.quant.quantizer import QParams, Quantizer, StrictOptions, register_quantizer
from qsr_plugin.quant.record import current_record
from qsr_plugin.quant.reduce import mean_over_ranks

if TYPE_CHECKING:
    from qsr_plugin.quant.schema import Stage

logger = logging.getLogger("qsr_plugin")

#: Bounds before training, minus and plus, in the published 3- and 4-bit runs.
FIXED_BOUND = 10.0
_NO_VARIATION = (
    "the extremes of all %d places (first: %s) are the same in all calibration batches, so none gets a gated range: "
    "calibrate on two batches or more (recipe.calibration: images, batch)"
)
_GATES_OFF = (
    "calibrating again chose anew which ranges are gated, and switched all gates off: train from the recipe's first "
    "stage on, or load a trained checkpoint"
)


@register_quantizer("ddtb_weight")
class DDTBWeightQuantizer(Quantizer):
    """Affine grid between two bounds taken from the weight anew (and detached) in every forward. No state."""

    class Options(StrictOptions):
        """Options of :class:`DDTBWeightQuantizer`.

        Attributes:
            range: ``percentile`` clips at two quantiles; ``minmax`` clips nothing (published for dense blocks).
            alpha: Upper quantile; the lower one is ``1 - alpha``.
            clamp_codes: False gives up to ``2^b + 1`` levels, as the published code does.
        """

        range: Literal["percentile", "minmax"] = "percentile"
        alpha: float = Field(0.99, gt=0.5, le=1)
        clamp_codes: bool = True

    roles = ("weight",)
    needs_calibration = False

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize a weight of any shape; the gradient is one inside of the bounds."""
        clip = self.options.range == "percentile"
        return quantize_between(x, *self._bounds(x), bits, self.options.clamp_codes, clip=clip)

    def _bounds(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = percentile(weight, self.options.alpha) if self.options.range == "percentile" else minmax(weight)
        return lower, apart(lower, upper)

    def qparams_of(self, weight: Tensor, bits: int | None = None) -> QParams:
        """Grid of a given weight; this quantizer has no range of its own."""
        return grid_between(*self._bounds(weight), bits or self.candidates[0], self.options.clamp_codes)

    def extra_storage_bits(self) -> int:
        """A 32-bit step and a 32-bit zero point are stored with the codes."""
        return 64


@register_quantizer("ddtb")
class DDTBQuantizer(Quantizer):
    """Activation quantizer with two trainable bounds, one pair per candidate bit width, and a gate.

    With ``a = clip(x, l, u)``: ``d x_q / d u = (x_q - a) / (u - l) + [x > u]``, ``d x_q / d l = -(x_q - a) / (u - l) +
    [x < l]``, summed over elements. Calibration sets the bounds to the mean over its batches of two quantiles of each
    (the published code takes the first training batch), and makes the share ``dynamic_ratio`` of the places dynamic:
    those where the extremes vary most over its batches. Without variation (a single batch) no place is dynamic.

    A gate runs at dynamic places only: to show its logits while it is trained beside static bounds, and for
    ``u = 2 sigmoid(logit_0) upper``, ``l = 2 sigmoid(logit_1) lower`` of each image in gated stages and afterwards.
    """

    class Options(StrictOptions):
        """Options of :class:`DDTBQuantizer`.

        Attributes:
            alpha: Upper quantile of the start; the lower one is ``1 - alpha``.
            start: ``fixed`` starts at -10 and 10 whatever the data are, as the published code does above 2 bits.
            dynamic_ratio: Share of the places with this ratio that get a gated range.
            gate: ``released`` leaves most of the gate untrained and lets images of a batch see each other.
            clamp_codes: False gives up to ``2^b + 1`` levels, as the published code does.
        """

        alpha: float = Field(0.99, gt=0.5, le=1)
        start: Literal["percentile", "fixed"] = "percentile"
        dynamic_ratio: float = Field(0.3, ge=0, le=1)
        gate: Literal["per_sample", "released"] = "per_sample"
        clamp_codes: bool = True

    roles = ("act",)
    gated = True
    per_channel = ("act",)

    def __init__(
        self, options: Options, candidates: tuple[int, ...], role: str, channel_axis: int, channels: int
    ) -> None:
        super().__init__(options, candidates, role, channel_axis)
        shape = () if len(candidates) == 1 else (len(candidates),)
        self.lower = nn.Parameter(torch.zeros(shape))
        self.upper = nn.Parameter(torch.zeros(shape))
        self.gate = Gate(channels, options.gate == "released").requires_grad_(False)
        self.register_buffer("dynamic", torch.tensor(False))
        self.register_buffer("gate_on", torch.tensor(False))
        self._dynamic = self._gate_on = False
        self._score = 0.0

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize an activation (N, ...)."""
        lower, upper, bits = self._select(bits)
        if self._dynamic and (self._gate_on or torch.is_grad_enabled()):
            lower, upper = self._pass_gate(x, lower, upper)
        lower, upper, bits = (self.expand(value, x) for value in (lower, upper, bits))
        return quantize_between(x, lower, upper, bits, self.options.clamp_codes, only_read=self.only_read)

    def _pass_gate(self, x: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        record = current_record()
        logits = self.gate(x, self.channel_axis, x.shape[0] if record is None else record.images)
        if self._gate_on:
            return rescale(lower, upper, logits)
        if record is not None and self.training:
            record.signal(GATE_LOGITS, self.site, logits)
        silent = 0.0 * logits.sum()  # DDP waits for a gradient of the gate, also where no loss looks at its logits
        return lower + silent, upper + silent

    def _select(self, bits: int | Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
        if self.lower.dim() == 0:
            return self.lower, self.upper, bits
        self.check_candidate(bits)
        return *(at_bits(bound, self.candidates, bits) for bound in (self.lower, self.upper)), bits

    @classmethod
    def settle(cls, parts: Sequence[DDTBQuantizer]) -> None:
        """Make those places dynamic whose extremes varied most; the same ones in all processes of a distributed run.

        Calibrating again starts over: gates that took part are switched off, because others may be dynamic now and
        untrained. Gated stages switch them on again.
        """
        if any(part._dynamic and part._gate_on for part in parts):
            logger.warning(_GATES_OFF)
        scores = torch.tensor([part._score for part in parts], device=parts[0].lower.device)
        for part, score in zip(parts, mean_over_ranks(scores).tolist()):
            part._score = score
        chosen: set[int] = set()
        for ratio in {part.options.dynamic_ratio: None for part in parts}:
            peers = [part for part in parts if part.options.dynamic_ratio == ratio]
            count = math.floor(ratio * len(peers) + 1e-9)
            ranked = sorted((part for part in peers if part._score > 0), key=lambda part: -part._score)
            chosen.update(id(part) for part in ranked[:count])
            if count and not ranked:
                logger.warning(_NO_VARIATION, len(peers), peers[0].site)
        for part in parts:
            part.dynamic.fill_(id(part) in chosen)
            part.gate_on.fill_(False)
            part._take_flags()
        logger.info("%d of %d places get a gated range", len(chosen), len(parts))

    def enter_stage(self, stage: Stage) -> None:
        """Switch the gate on or off."""
        super().enter_stage(stage)
        self.gate_on.fill_(stage.gated)
        self._gate_on = stage.gated

    def _take_flags(self) -> None:
        before, self._dynamic, self._gate_on = self._dynamic, bool(self.dynamic), bool(self.gate_on)
        if self._dynamic != before:
            self.gate.requires_grad_(True)
            for parameter in self.idle_parameters():
                parameter.requires_grad_(False)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._take_flags()

    def follow(self, other: Quantizer) -> None:
        """Take over what ``other`` keeps beside its tensors."""
        super().follow(other)
        self._dynamic, self._gate_on = other._dynamic, other._gate_on

    def idle_parameters(self) -> list[nn.Parameter]:
        """The gate, unless the place is dynamic."""
        return self.gate.idle_parameters() if self._dynamic else list(self.gate.parameters())

    def make_observer(self) -> Observer:
        """Mean over the batches of two quantiles, and the variance of the extremes."""
        return BoundsObserver(self.options.alpha)

    def end_calibration(self, *, keep: bool = True) -> None:
        """Stop observing; keep the range and how much the extremes varied."""
        if keep and isinstance(self._observer, BoundsObserver):
            self._score = self._observer.score()
        super().end_calibration(keep=keep)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the observed bounds, or those of a fixed start, for every candidate."""
        self.lower.copy_(low)
        self.upper.copy_(high)
        if self.options.start == "fixed":
            self.lower.fill_(-FIXED_BOUND), self.upper.fill_(FIXED_BOUND)
        self.project()

    def project(self) -> None:
        """Keep the upper bound above the lower one."""
        with torch.no_grad():
            self.upper.copy_(apart(self.lower, self.upper))

    def qparams(self, bits: int | None = None) -> QParams:
        """Grid at one bit width.

        Raises:
            NotImplementedError: If a gate makes a grid for each image.
        """
        if self._dynamic and self._gate_on:
            raise NotImplementedError(f"{self.site}: its gate makes a grid for each image")
        lower, upper, bits = self._select(bits or self.candidates[0])
        return grid_between(lower.detach(), upper.detach(), bits, self.options.clamp_codes)

    def range_parameters(self) -> list[nn.Parameter]:
        """The bounds."""
        return [self.lower, self.upper]

    def overhead_ops(self, numel: int) -> int:
        """The channel means that a gate in use reads: one addition per element. The gate itself is left out."""
        return numel if self._dynamic and self._gate_on else 0

    def extra_storage_bits(self) -> int:
        """32 per bound, and the gate where it takes part."""
        return super().extra_storage_bits() + (self.gate.storage_bits() if self._dynamic else 0)
