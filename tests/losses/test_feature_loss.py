"""Features at unit length: both losses by hand, with their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qsr_plugin import compat
from qsr_plugin.losses.context import StepContext
from qsr_plugin.quant.record import ForwardRecord

compat.import_host()

from qsr_plugin.losses.build import build_step_losses  # noqa: E402
from qsr_plugin.losses.feature_loss import UnitFeatureLoss, UnitFeatureMSELoss  # noqa: E402
from qsr_plugin.quant.schema import LossSpec  # noqa: E402

#: Unit vectors (0.6, 0.8) and (1, 0): apart by (-0.4, 0.8), of length sqrt(0.8).
STUDENT, TEACHER = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), torch.tensor([5.0, 0.0]).view(1, 2, 1, 1)


def step(students: list[Tensor], teachers: list[Tensor], name: str = "block:output") -> StepContext:
    keys = [name] if len(students) == 1 else [f"{name}[{index}]" for index in range(len(students))]
    records = [ForwardRecord(1, taps=dict(zip(keys, features))) for features in (students, teachers)]
    image = torch.zeros(1, 3, 2, 2)
    return StepContext(image, image, records[0], image, records[1])


def test_values_by_hand() -> None:
    one = step([STUDENT], [TEACHER])
    assert UnitFeatureLoss(5.0)(one).item() == pytest.approx(5 * math.sqrt(0.8))
    assert UnitFeatureMSELoss(5.0)(one).item() == pytest.approx(5 * 0.8 / 2)
    assert UnitFeatureLoss()(one).item() == pytest.approx(5 / 255 * math.sqrt(0.8))
    assert UnitFeatureMSELoss()(one).item() == pytest.approx(2.0)


def test_blocks_add_up_and_images_are_averaged() -> None:
    same = torch.full((1, 2, 1, 1), 7.0)
    students, teachers = [torch.cat([STUDENT, same]), STUDENT], [torch.cat([TEACHER, same * 2]), TEACHER]
    one = step([*students[:1], students[1].expand(2, -1, -1, -1)], [teachers[0], teachers[1].expand(2, -1, -1, -1)])
    assert UnitFeatureLoss(1.0)(one).item() == pytest.approx(math.sqrt(0.8) / 2 + math.sqrt(0.8))
    assert UnitFeatureMSELoss(1.0)(one).item() == pytest.approx(0.4 / 2 + 0.4)


@pytest.mark.parametrize("kind", [UnitFeatureLoss, UnitFeatureMSELoss])
def test_only_the_direction_of_the_student_learns(kind: type) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 5, generator=generator).requires_grad_() for _ in range(2))
    loss = kind(1.0)
    value = loss.compare(student, teacher)
    assert loss.compare(student * 3, teacher / 7).item() == pytest.approx(value.item(), rel=1e-5)
    value.backward()
    assert teacher.grad is None and bool(student.grad.abs().max() > 1e-6)
    assert bool(((student.grad * student).flatten(1).sum(1).abs() < 1e-6).all())


@pytest.mark.parametrize("kind", [UnitFeatureLoss, UnitFeatureMSELoss])
def test_equal_features_and_zeros_are_at_rest(kind: type) -> None:
    for features in (torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)):
        student = features.clone().requires_grad_()
        value = kind(1.0).compare(student, features)
        value.backward()
        assert value.item() == 0 and bool((student.grad.abs() < 1e-6).all())


def test_a_recipe_can_name_them_and_their_place() -> None:
    specs = [LossSpec(type="UnitFeatureLoss", features="features"), LossSpec(type="UnitFeatureMSELoss")]
    losses = build_step_losses(specs)
    assert [loss.taps for loss in losses.values()] == [("features",), ("block:output",)]
    assert all(loss.needs_teacher for loss in losses.values())
