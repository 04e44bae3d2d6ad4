"""Bit policies: which bit width a site uses for each image.

A site asks its policy, which answers with a :class:`BitDecision`; :func:`quantize_with` applies it. What all sites of a
network share (statistics of the image, a table, a gate) is one :class:`NetworkPolicy` at its root, found through the
record of the forward. Learned policies choose hard in the forward and let a gradient through (Hong et al., ECCV 2022,
Sec. 3.2; Jang et al., ICLR 2017); both ways are written here once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qsr_plugin.quant.quantizer import Quantizer, StrictOptions
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.table import Table

if TYPE_CHECKING:
    from qsr_plugin.quant.schema import Stage

#: Kind of the record's signals that show the expected bits ``(N,)`` of a place, with graph, while a choice is trained.
EXPECTED_BITS = "expected_bits"


@dataclass(frozen=True)
class BitDecision:
    """What a policy decided for one site.

    Attributes:
        bits: One bit width for the batch, or ``(N,)`` one per image; a tensor may be real-valued and carry a gradient.
        probabilities: ``(N, K)`` over the branches while a choice is being trained, else ``None``.
        branches: ``(N, K)`` bit widths that the probabilities are of; the candidates if not given.
        expected: ``(N,)`` expected bits with graph, while a choice is being trained.
        straight_through: The chosen branch alone passes the gradient on to tensor and range, as a one-hot factor does;
            else every branch does, with its probability.
    """

    bits: int | Tensor
    probabilities: Tensor | None = None
    branches: Tensor | None = None
    expected: Tensor | None = None
    straight_through: bool = False


class PolicyPart(nn.Module):
    """What the two kinds of parts of a policy, of one place and of a network, may do in calibration and training.

    Attributes:
        adapts: Whether there are thresholds, no parameters, that follow the training batches in some stages.
    """

    adapts: ClassVar[bool] = False

    def begin_calibration(self) -> None:
        """Start observing."""

    def observe(self, x: Tensor) -> None:
        """Take a tensor of the float network into account if a calibration is going on."""

    def end_calibration(self, *, keep: bool = True) -> None:
        """Stop observing; ``keep=False`` forgets what was seen and leaves everything as it was."""

    def threshold_parameters(self) -> list[nn.Parameter]:
        """Parameters that take the learning rate of the ``thresholds`` group; all others that of ``bits``."""
        return []

    def idle_parameters(self) -> list[nn.Parameter]:
        """Parameters that no gradient reaches, and so must not be trained."""
        return []

    def project(self) -> None:
        """Bring parameters back into the legal set; called after each optimiser step."""

    def enter_stage(self, stage: Stage) -> None:
        """Take on what a stage of the training says about policies."""


class NetworkPolicy(PolicyPart):
    """The part of a policy that all sites of a network share; it is evaluated once per forward.

    Args:
        options: The options of the policy class that names it.
        candidates: Bit widths to choose from, ascending.
        places: Names ``site.port`` of the places that ask, in the order of the network's modules.
        channels: Channels of each tensor in :attr:`taps`.

    Attributes:
        taps: Places ``role:port`` of the tensors it wants in the record under these names.
        needs_calibration: Whether it compares images with those of a calibration.
        target_bits: Mean bits the network is to have, if the policy says so.
    """

    taps: ClassVar[tuple[str, ...]] = ()
    needs_calibration: ClassVar[bool] = False

    def __init__(
        self, options: StrictOptions, candidates: tuple[int, ...], places: tuple[str, ...], channels: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.options, self.candidates, self.places = options, candidates, places
        self.target_bits: float | None = None

    def settle(self, policies: Mapping[str, BitPolicy]) -> None:
        """Decide what needs the policies of all :attr:`places` (name to policy); called after each calibration."""


class BitPolicy(PolicyPart):
    """Base of all policies: the part that belongs to one place.

    Args:
        options: The class's own :class:`Options`.
        candidates: Bit widths to choose from, ascending.
        channels: Channels of the tensors at its place, ``None`` where the network does not say.
        channel_axis: Axis of the channels: 1 for NCHW, -1 for NLC.

    Attributes:
        place: ``site.port``; set when the network is quantized.
        seen: Record of the last forward that asked, for blocks that run again for their gradient. Of several forwards
            before one backward only the last is known.
        network: Class of the part that all places share, or ``None``.
        per_channel: Whether the number of channels must be known.
        reach: A policy that works on ``b - reach .. b + reach`` around one given bit width b; 0 for others.
    """

    Options: ClassVar[type[StrictOptions]] = StrictOptions
    network: ClassVar[type[NetworkPolicy] | None] = None
    per_channel: ClassVar[bool] = False
    reach: ClassVar[int] = 0

    def __init__(
        self, options: StrictOptions, candidates: tuple[int, ...], channels: int | None = None, channel_axis: int = 1
    ) -> None:
        super().__init__()
        self.options, self.candidates, self.channel_axis, self.place = options, candidates, channel_axis, ""
        self.seen: ForwardRecord | None = None

    @classmethod
    def with_files(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a recipe with the content of files that they name, so that the recipe needs these no more."""
        return dict(options)

    def decide(self, features: Tensor, record: ForwardRecord | None) -> BitDecision:
        """Choose bits.

        Args:
            features: ``(M, ...)`` tensor about to be quantized; M is the number of images or a multiple of it.
            record: Record of the running forward, ``None`` outside of a quantized network's forward.
        """
        raise NotImplementedError

    def usual_bits(self) -> int | Tensor:
        """Bits of this place that do not depend on the image, for ranges that are fitted to a bit width."""
        return max(self.candidates)

    def overhead_ops(self, shape: torch.Size) -> int:
        """Float operations to decide for a tensor of this shape, without those that all places share."""
        return 0

    def shared_ops(self, record: ForwardRecord) -> int:
        """Float operations that all places share in one forward; of image and taps there, only the shapes count."""
        return 0


POLICIES: Table[BitPolicy] = Table("bit policy")
register_policy = POLICIES.register
policy_class = POLICIES.find


@register_policy("fixed")
class FixedBits(BitPolicy):
    """The same bit width for every image.

    Raises:
        ValueError: If there is more than one candidate to choose from.
    """

    def __init__(
        self, options: StrictOptions, candidates: tuple[int, ...], channels: int | None = None, channel_axis: int = 1
    ) -> None:
        super().__init__(options, candidates, channels, channel_axis)
        if len(candidates) != 1:
            raise ValueError(f"policy 'fixed' takes one bit width, got {list(candidates)}: give one, or another policy")

    def decide(self, features: Tensor, record: ForwardRecord | None) -> BitDecision:
        """The only candidate."""
        return BitDecision(self.candidates[0])


def choose(
    probabilities: Tensor,
    candidates: tuple[int, ...],
    *,
    branches: Tensor | None = None,
    straight_through: bool = False,
) -> BitDecision:
    """The most probable branch of each image, with the gradient of the expected bits.

    Args:
        probabilities: ``(N, K)``, rows summing to one. Equal maxima choose the lowest index (fewest bits).
        candidates: The K bit widths; not looked at if there are ``branches``.
        branches: See :class:`BitDecision`.
        straight_through: See :class:`BitDecision`.

    Returns:
        Bits ``(N,)``, exactly a width of a branch, with the gradient of ``sum_k probabilities[:, k] * widths[:, k]``.
    """
    widths = branches
    if widths is None:
        widths = torch.stack([torch.full_like(probabilities[:, 0], width) for width in candidates], 1)
    widths = widths.to(probabilities.dtype)
    hard = widths.gather(1, probabilities.argmax(1, keepdim=True)).squeeze(1)
    soft = (probabilities * widths).sum(1)
    return BitDecision(hard + (soft - soft.detach()), probabilities, branches, soft, straight_through)


def hard_soft(outputs: Sequence[Tensor], probabilities: Tensor) -> Tensor:
    """Value of the most probable branch, gradient of the mixture.

    Args:
        outputs: One fake-quantized tensor ``(N, ...)`` for each of the K branches; those not chosen may hold anything.
        probabilities: ``(N, K)``, rows summing to one. Equal maxima choose the lowest index (fewest bits).

    Returns:
        ``(N, ...)``: ``outputs[argmax]`` with the gradient of ``sum_k probabilities[:, k] * outputs[k]``.
    """
    return _HardSoft.apply(probabilities, *outputs)


def quantize_with(quantizer: Quantizer, x: Tensor, decision: BitDecision) -> Tensor:
    """Fake-quantize ``x`` as decided: every branch while a choice is trained, else the chosen one only."""
    probabilities = decision.probabilities
    if probabilities is None or not torch.is_grad_enabled():
        return quantizer(x, decision.bits)
    if x.shape[0] != probabilities.shape[0]:  # windows folded into the batch
        probabilities = probabilities.repeat_interleave(x.shape[0] // probabilities.shape[0], dim=0)
    widths = quantizer.candidates if decision.branches is None else decision.branches.unbind(1)
    rule = quantizer.prepare(x)
    if not decision.straight_through:
        return hard_soft([rule(x, bits) for bits in widths], probabilities)
    with torch.no_grad():
        outputs = [rule(x, bits) for bits in widths]
    return _OneHot.apply(probabilities, rule(x, decision.bits.detach()), *outputs)


class _HardSoft(torch.autograd.Function):
    """:func:`hard_soft` without the sum of the mixture, whose value nobody asks for."""

    @staticmethod
    def forward(ctx, probabilities, *outputs):  # noqa: D102
        ctx.save_for_backward(probabilities, *outputs)
        best, hard = probabilities.argmax(1), outputs[0]
        for index, output in enumerate(outputs[1:], 1):
            hard = torch.where(_per_image(best == index, output), output, hard)
        return hard

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: D102
        probabilities, *outputs = ctx.saved_tensors
        shares = probabilities.to(grad.dtype).unbind(1)
        return _products(grad, outputs, probabilities), *(grad * _per_image(share, grad) for share in shares)


class _OneHot(torch.autograd.Function):
    """The chosen branch times a one-hot factor of value one, whose gradient goes to the probabilities."""

    @staticmethod
    def forward(ctx, probabilities, chosen, *outputs):  # noqa: D102
        ctx.save_for_backward(probabilities, *outputs)
        return chosen.view_as(chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: D102
        probabilities, *outputs = ctx.saved_tensors
        return _products(grad, outputs, probabilities), grad, *(None for _ in outputs)


def _per_image(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *([1] * (x.dim() - 1)))


def _products(grad: Tensor, outputs: Sequence[Tensor], probabilities: Tensor) -> Tensor:
    """``(N, K)`` inner products of the gradient with every branch, the gradient of the probabilities."""
    flat = grad.flatten(1).unsqueeze(1).to(probabilities.dtype)
    columns = [torch.bmm(flat, output.flatten(1).unsqueeze(2).to(flat.dtype)).view(-1) for output in outputs]
    return torch.stack(columns, 1)
