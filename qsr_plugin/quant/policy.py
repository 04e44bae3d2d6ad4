"""Bit policies: which bit width a site uses for each image.

A policy answers with a :class:`BitDecision`; :func:`quantize_with` applies it. Learned policies choose hard in the
forward and let the gradient of the soft mixture through (Hong et al., ECCV 2022, Sec. 3.2); that rule is written
here once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from qsr_plugin.quant.quantizer import Quantizer, StrictOptions
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.table import Table


@dataclass(frozen=True)
class BitDecision:
    """What a policy decided for one site.

    Attributes:
        bits: One bit width for the batch, or ``(N,)`` one per image; a tensor may be real-valued and carry a gradient.
        probabilities: ``(N, K)`` over the candidates while a selector is being trained, else ``None``.
    """

    bits: int | Tensor
    probabilities: Tensor | None = None


class BitPolicy(nn.Module):
    """Base of all policies.

    Args:
        options: The class's own :class:`Options`.
        candidates: Bit widths to choose from, ascending.
    """

    Options: ClassVar[type[StrictOptions]] = StrictOptions

    def __init__(self, options: StrictOptions, candidates: tuple[int, ...]) -> None:
        super().__init__()
        self.options, self.candidates = options, candidates

    def decide(self, features: Tensor, record: ForwardRecord | None) -> BitDecision:
        """Choose bits.

        Args:
            features: ``(N, ...)`` tensor about to be quantized.
            record: Record of the running forward, ``None`` outside of a quantized network's forward.
        """
        raise NotImplementedError


POLICIES: Table[BitPolicy] = Table("bit policy")
register_policy = POLICIES.register
policy_class = POLICIES.find


@register_policy("fixed")
class FixedBits(BitPolicy):
    """The same bit width for every image.

    Raises:
        ValueError: If there is more than one candidate to choose from.
    """

    def __init__(self, options: StrictOptions, candidates: tuple[int, ...]) -> None:
        super().__init__(options, candidates)
        if len(candidates) != 1:
            raise ValueError(f"policy 'fixed' takes one bit width, got {list(candidates)}: give one, or another policy")

    def decide(self, features: Tensor, record: ForwardRecord | None) -> BitDecision:
        """The only candidate."""
        return BitDecision(self.candidates[0])


def hard_soft(outputs: Tensor, probabilities: Tensor) -> Tensor:
    """Value of the most probable candidate, gradient of the mixture.

    Args:
        outputs: ``(K, N, ...)``, one fake-quantized tensor per candidate.
        probabilities: ``(N, K)``, rows summing to one. Equal maxima choose the lowest index (fewest bits).

    Returns:
        ``(N, ...)``: ``outputs[argmax]`` with the gradient of ``sum_k probabilities[:, k] * outputs[k]``.
    """
    candidates, images = outputs.shape[0], outputs.shape[1]
    weights = probabilities.t().reshape(candidates, images, *([1] * (outputs.dim() - 2)))
    soft = (weights * outputs).sum(0)
    best = probabilities.argmax(1)
    hard = outputs[best, torch.arange(images, device=outputs.device)]
    return hard.detach() - soft.detach() + soft


def quantize_with(quantizer: Quantizer, x: Tensor, decision: BitDecision) -> Tensor:
    """Fake-quantize ``x`` as decided: every candidate while a selector trains, else the chosen one only."""
    if decision.probabilities is None or not torch.is_grad_enabled():
        return quantizer(x, decision.bits)
    outputs = torch.stack([quantizer(x, bits) for bits in quantizer.candidates])
    probabilities = decision.probabilities
    if x.shape[0] != probabilities.shape[0]:  # windows folded into the batch
        probabilities = probabilities.repeat_interleave(x.shape[0] // probabilities.shape[0], dim=0)
    return hard_soft(outputs, probabilities)
