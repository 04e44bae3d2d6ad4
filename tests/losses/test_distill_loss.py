"""Distillation from the teacher's output and from the features of blocks."""

from __future__ import annotations

import pytest
import torch

from qsr_plugin import compat
from qsr_plugin.losses.context import StepContext
from qsr_plugin.quant.record import ForwardRecord

compat.import_host()

from qsr_plugin.losses.distill_loss import BlockFeatureLoss, TeacherLoss  # noqa: E402


def test_features_of_blocks_are_compared_at_unit_length() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        [torch.randn(2, 3, 4, 5, generator=generator).requires_grad_() for _ in range(3)] for _ in range(2)
    )
    loss = BlockFeatureLoss(loss_weight=10)
    units = [[f / f.detach().double().square().sum().sqrt() for f in features] for features in (student, teacher)]
    distances = [(a[i] - b[i]).norm() for a, b in zip(*units) for i in range(2)]
    value = loss.compare(student, teacher)
    assert value.item() == pytest.approx(10 / 2 / 6 * sum(distances).item(), rel=1e-6)
    value.backward()
    assert all(f.grad is None for f in teacher)
    # Features of unit length do not see their own scale, so the gradient is orthogonal to them.
    assert all(abs((f.grad * f).sum().item()) < 1e-6 and bool(f.grad.abs().max() > 1e-4) for f in student)
    same = loss.compare(teacher, [f.detach().clone() * 3 for f in teacher])
    same.backward()
    assert same.item() < 1e-6 and all(bool(torch.isfinite(f.grad).all()) for f in teacher)


def test_distance_to_the_output_of_the_teacher() -> None:
    a, b = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    assert TeacherLoss(2.0)(StepContext(a, a, ForwardRecord(2), b)).item() == pytest.approx(
        2 * (a - b).abs().mean().item()
    )


def test_features_of_nothing_but_zeros_are_at_rest() -> None:
    zero = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = BlockFeatureLoss().compare([zero], [torch.zeros(2, 3, 4, 4)])
    loss.backward()
    assert loss.item() == 0 and not zero.grad.any()
