"""What QuantSRModel refuses, and what it tells, of its options before the training."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsr_plugin import compat
from qsr_plugin.options_file import OptionsError
from tests.host.model_steps import DEPTHS, model_of


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"find_unused_parameters": True}, "find_unused_parameters"),
        ({"network_g": {"type": "EDSR"}}, "needs QuantNet"),
        ({"recipe": {"losses": [{"type": "SKTLoss"}]}}, "pretrain_network_float is needed"),
        ({"num_gpu": 2}, "torchrun"),
        ({"recipe": {"losses": [{"type": "L1Loss"}]}}, "train.pixel_opt"),
        ({"recipe": {"losses": [{"type": "SKTLoss", "wieght": 1}]}}, "wieght"),
        ({"train": {"scheduler": {"periods": [3]}}}, "_delete_: true"),
    ],
)
def test_options_that_cannot_work_are_refused(data: Path, tmp_path: Path, changes: dict, says: str) -> None:
    with pytest.raises(OptionsError, match=says):
        model_of(data, tmp_path, **changes)


def test_misspelt_loss_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(compat.NotRegisteredError, match="Did you mean 'SKTLoss'"):
        model_of(data, tmp_path, recipe={"losses": [{"type": "SKTLos"}]})


def test_an_impossible_depth_is_told_before_the_training(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="depth is 9; this EDSR has 2 blocks"):
        model_of(data, tmp_path, recipe={**DEPTHS, "stages": [{}]}, val={"depth": 9})


def test_parts_of_a_recipe_without_effect_are_told(data: Path, tmp_path: Path, caplog) -> None:
    model_of(data, tmp_path, recipe={"base": "odm", "losses": [], "stages": [{"train": ["weights"], "gated": True}]})
    told = caplog.text
    assert "recipe.losses has none" in told and "stages[0].gated has no effect" in told
    assert "no stage trains the 8 parameters of the group 'ranges'" in told


def test_a_stage_that_the_training_never_reaches_is_told(data: Path, tmp_path: Path, caplog) -> None:
    model_of(data, tmp_path, recipe={"stages": [{"iters": 2}, {"iters": 3}, {}]}, train={"total_iter": 6})
    assert "total_iter" not in caplog.text
    model_of(data, tmp_path, recipe={"stages": [{"iters": 2}, {"iters": 3}, {}]}, train={"total_iter": 5})
    assert "total_iter is 5, but stage 3 of the recipe begins after iteration 5" in caplog.text


@pytest.mark.parametrize(
    ("stage", "says"),
    [({"train": ["others"]}, "this network has no such parameters. It has weights, ranges"), ({"train": []}, "train")],
)
def test_a_stage_that_trains_nothing_is_refused(data: Path, tmp_path: Path, stage: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model_of(data, tmp_path, recipe={"stages": [stage]})


def test_a_mean_has_no_gradient(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stages\[0\]: ranges that follow the mean .* take ranges, weight_ranges out"):
        model_of(data, tmp_path, recipe={"base": "fqsr", "losses": [], "stages": [{"track_ranges": "mean"}]})
