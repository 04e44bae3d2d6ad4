"""Files of QuantSRModel: what it saves, what it starts or resumes from, and what is told of files that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.models import build_model

from qsr_plugin import checkpoint, load_quantized
from qsr_plugin.options_file import OptionsError
from tests.host import harness
from tests.host.model_steps import DEPTHS, batch, model_of, options, step


def test_saved_files_hold_the_network_and_failures_raise(data: Path, tmp_path: Path, monkeypatch) -> None:
    model = model_of(data, tmp_path)
    step(model, 1)
    model.save(0, 1)
    saved = harness.read(tmp_path / "models/net_g_1.pth")
    assert set(saved) == {"params", "params_ema"}
    x = batch()["lq"]
    again = load_quantized(tmp_path / "models/net_g_1.safetensors")
    with torch.no_grad():
        assert torch.equal(again(x), model.net_g_ema(x))

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    content = (tmp_path / "models/net_g_1.pth").read_bytes()
    with pytest.raises(OSError, match="Free some space"):
        model.save(0, 1)
    assert (tmp_path / "models/net_g_1.pth").read_bytes() == content
    assert not list((tmp_path / "models").glob("*.tmp"))


@pytest.mark.parametrize("key", ["pretrain_network_g", "pretrain_network_float"])
def test_wrong_kind_of_checkpoint_is_told_apart(data: Path, tmp_path: Path, float_file: Path, key: str) -> None:
    model = model_of(data, tmp_path)
    model.save(0, 1)
    wrong = float_file if key == "pretrain_network_g" else tmp_path / "models/net_g_1.pth"
    other = "pretrain_network_float" if key == "pretrain_network_g" else "pretrain_network_g"
    with pytest.raises(checkpoint.CheckpointError, match=other):
        model_of(data, tmp_path, path={key: str(wrong)})


def test_trained_network_is_not_calibrated_again(data: Path, tmp_path: Path) -> None:
    model = model_of(data, tmp_path)
    for iteration in (1, 2):
        step(model, iteration)
    model.save(0, 2)
    path = {"pretrain_network_g": str(tmp_path / "models/net_g_2.pth")}
    again = model_of(data, tmp_path, path=path)
    assert harness.differences(dict(again.net.state_dict()), dict(model.net.state_dict())) == []
    assert harness.differences(dict(again.net_g_ema.state_dict()), dict(model.net_g_ema.state_dict())) == []


def test_a_checkpoint_of_another_recipe_is_refused_in_tests(data: Path, tmp_path: Path, caplog) -> None:
    model = model_of(data, tmp_path)
    model.save(0, 1)
    path = {"pretrain_network_g": str(tmp_path / "models/net_g_1.safetensors")}
    opt = options(data, tmp_path, path=path, recipe={"bits": {"weight": 8}})
    with pytest.raises(checkpoint.CheckpointError, match=r"recipe\.bits\.weight: saved 4, now 8"):
        build_model({**opt, "is_train": False})


def test_resumed_run_that_starts_with_several_depths_keeps_its_ranking(data: Path, tmp_path: Path) -> None:
    recipe = {**DEPTHS, "stages": [{"depths": [1.0, 0.5], "lr": {"weights": 1e-3, "others": 1e-1}}]}
    model = model_of(data, tmp_path, recipe=recipe)
    step(model, 1)
    with torch.no_grad():  # another order by size than the one in use
        model.net.body[0].shortcut_scale.fill_(9.0)
    order = model.net.block_order.tolist()
    model.save(0, 1)
    path = {"pretrain_network_g": str(tmp_path / "models/net_g_1.pth"), "param_key_g": "params"}
    again = model_of(data, tmp_path, recipe=recipe, path=path)
    again.resume_training(harness.read(tmp_path / "states/1.state"))
    step(again, 2)
    assert again.net.block_order.tolist() == order


def test_a_recipe_saved_before_an_option_existed_is_the_same_recipe(data: Path, tmp_path: Path) -> None:
    model = model_of(data, tmp_path)
    step(model, 1)
    model.save(0, 1)
    state = harness.read(tmp_path / "states/1.state")
    for rules in state["recipe"]["placements"].values():
        for rule in rules:
            del rule["pad_first"]
    for stage in state["recipe"]["stages"]:
        del stage["gated"], stage["depths"]
    model.resume_training(state)
    state["recipe"]["bits"]["act"] = 3
    with pytest.raises(OptionsError, match="recipe.bits.act: saved 3, now 4"):
        model.resume_training(state)


def test_options_for_a_slimmed_file_are_told(data: Path, tmp_path: Path) -> None:
    from qsr_plugin import save_quantized, slim

    model = model_of(data, tmp_path, recipe={**DEPTHS, "stages": [{}]})
    save_quantized(slim(model.net, 1), tmp_path / "slim.safetensors")
    path = {"pretrain_network_g": str(tmp_path / "slim.safetensors")}
    with pytest.raises(checkpoint.CheckpointError, match=r"write recipe: \{depth: \{kept: \[0\]\}\}"):
        model_of(data, tmp_path, recipe={**DEPTHS, "stages": [{}]}, path=path)
    recipe = {**DEPTHS, "depth": {"role": "block", "kept": [0]}, "stages": [{}]}
    assert len(model_of(data, tmp_path, recipe=recipe, path=path).net.block_order) == 1
