"""The price of bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsr_plugin import compat
from qsr_plugin.losses.context import StepContext
from qsr_plugin.quant.record import ForwardRecord

compat.import_host()

from qsr_plugin.losses.bit_loss import BitLoss  # noqa: E402


def step(*bits: int | Tensor) -> StepContext:
    image = torch.zeros(2, 3, 4, 4)
    return StepContext(image, image, ForwardRecord(2, bits={f"site{i}": width for i, width in enumerate(bits)}))


def test_bits_beyond_the_target_cost_in_proportion() -> None:
    first = torch.tensor([4.0, 8.0], requires_grad=True)
    second = torch.tensor([6.0, 6.0], requires_grad=True)
    loss = BitLoss(target_bits=5, loss_weight=2.0)(step(first, second, 8))
    assert loss.item() == pytest.approx(2 * (6 - 5))  # the place with fixed 8 bits does not count
    assert [g.tolist() for g in torch.autograd.grad(loss, (first, second))] == [[0.5, 0.5], [0.5, 0.5]]


def test_at_the_target_and_below_nothing_is_paid() -> None:
    for bits in (torch.tensor([4.0, 6.0]), torch.tensor([4, 4])):
        assert BitLoss(target_bits=5)(step(bits)).item() == 0.0
    assert BitLoss(target_bits=5)(step(8)).item() == 0.0
