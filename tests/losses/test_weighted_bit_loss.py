"""The price of bits relative to what a place expects, its growth over epochs, and its size in batches and processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsr_plugin import compat
from qsr_plugin.losses.context import StepContext
from qsr_plugin.quant.policy import EXPECTED_BITS, choose
from qsr_plugin.quant.record import ForwardRecord

compat.import_host()

from qsr_plugin.losses import weighted_bit_loss  # noqa: E402
from qsr_plugin.losses.weighted_bit_loss import WeightedBitLoss  # noqa: E402

LOGITS = [[[1.0595702, 0.5568276, 1.6163833], [0.0, 2.0, 0.0]], [[3.0, 0.0, 1.0], [0.1, 0.2, 0.3]]]


def step(logits: Tensor, iteration: int = 1) -> StepContext:
    """Two places with learned choices ``(2, N, 3)`` of 4, 6 and 8 bits, and one of fixed 8."""
    images = logits.shape[1]
    record, image = ForwardRecord(images, bits={"fixed": 8}), torch.zeros(images, 3, 4, 4)
    for number, one in enumerate(logits):
        decision = choose(one.softmax(1), (4, 6, 8))
        record.bits[f"site{number}"] = decision.bits
        record.signal(EXPECTED_BITS, f"site{number}", decision.expected)
    return StepContext(image, image, record, iteration=iteration)


def plain(**changes: float) -> WeightedBitLoss:
    return WeightedBitLoss(**{"start": 1.0, "step": 0.0, "reference_images": None, **changes})


def test_sum_of_chosen_over_expected_bits_with_the_gradient_of_the_expected() -> None:
    logits = torch.tensor(LOGITS, requires_grad=True)
    loss = plain()(step(logits))
    soft = (logits.softmax(2) * torch.tensor([4.0, 6.0, 8.0])).sum(2)
    hard = torch.tensor([[8.0, 6.0], [4.0, 8.0]])
    assert loss.item() == pytest.approx((hard / soft).sum().item(), rel=1e-6)
    got, want = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(soft.log().sum(), logits)[0]
    assert torch.allclose(got, want, atol=1e-7)
    assert got[0, 0].tolist() == pytest.approx([-0.1132393, -0.0124627, 0.1257020], abs=2e-7)


@pytest.mark.parametrize(
    ("iteration", "weight"), [(1, 1.01e-4), (1000, 1.01e-4), (1001, 1.02e-4), (150_000, 2.5e-4), (300_000, 4e-4)]
)
def test_the_weight_grows_by_epochs(iteration: int, weight: float) -> None:
    """Published figures are for pixels in 0..255."""
    assert WeightedBitLoss().weight(iteration) == pytest.approx(weight / 255, rel=1e-9)
    logits = torch.tensor(LOGITS)
    ratio = WeightedBitLoss(reference_images=2)(step(logits, iteration)) / plain()(step(logits))
    assert ratio.item() == pytest.approx(weight / 255, rel=1e-5)


def test_epochs_may_be_shorter() -> None:
    assert plain(step=1.0, iterations_per_epoch=100).weight(101) == 3.0
    with pytest.raises(TypeError, match="iterations_per_epoch is 0; give 1 or more"):
        plain(iterations_per_epoch=0)


def test_another_batch_keeps_the_balance() -> None:
    """Where the host's L1 loss is a mean, so that it does not grow with the batch."""
    once, twice = torch.tensor(LOGITS), torch.tensor(LOGITS).repeat(1, 2, 1)
    loss = plain(reference_images=16)
    assert loss(step(once)).item() == pytest.approx(loss(step(twice)).item(), rel=1e-6)
    assert loss(step(once)).item() == pytest.approx(8 * plain()(step(once)).item(), rel=1e-6)
    assert plain()(step(twice)).item() == pytest.approx(2 * plain()(step(once)).item(), rel=1e-6)


@pytest.mark.parametrize("reference", [None, 16])
def test_two_processes_equal_one_on_the_joint_batch(monkeypatch: pytest.MonkeyPatch, reference: int | None) -> None:
    """Gradients, and the value that is logged, are averaged over processes."""
    loss, logits = plain(reference_images=reference), torch.tensor(LOGITS).repeat(1, 2, 1).requires_grad_()
    joint = loss(step(logits))
    want = torch.autograd.grad(joint, logits)[0]
    monkeypatch.setattr(weighted_bit_loss, "world_size", lambda: 2)
    ranks = [loss(step(part)) for part in logits.split([1, 3] if reference is None else [2, 2], dim=1)]
    assert torch.allclose(torch.autograd.grad(sum(ranks) / 2, logits)[0], want, atol=1e-7)
    assert (sum(ranks) / 2).item() == pytest.approx(joint.item(), rel=1e-6)


def test_nothing_is_paid_where_no_choice_is_learned() -> None:
    image = torch.zeros(2, 3, 4, 4)
    for bits in ({}, {"site": 8}, {"site": torch.tensor([4, 8])}):
        assert plain()(StepContext(image, image, ForwardRecord(2, bits=bits))).item() == 0.0
