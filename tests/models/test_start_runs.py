"""Runs of the host's model that start from another quantized network, learn from a teacher, and go through stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import compat
from qsr_plugin.checkpoint import CheckpointError, save_quantized
from qsr_plugin.options_file import OptionsError
from qsr_plugin.quant import reduce
from qsr_plugin.quant.recipe import load_recipe
from tests.host import harness

compat.import_host()

from basicsr.models import build_model  # noqa: E402

from qsr_plugin.models import loading  # noqa: E402
from qsr_plugin.models.teaching import TEACHER_FILE  # noqa: E402
from tests.host import every_method  # noqa: E402

pytestmark = pytest.mark.usefixtures("choosers")

CANDIDATES = [4, 6, 8]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.write_data(tmp_path_factory.mktemp("data"), count=4)


def options(data: Path, root: Path, **changes: Any) -> dict[str, Any]:
    """Options of a run whose loss compares with the network at the start."""
    root.mkdir(exist_ok=True)
    opt = every_method.options(data, root, "pams", "EDSR")
    recipe = {
        "teacher": "start",
        "losses": [{"type": "SKTLoss"}],
        "stages": [{"lr": {"weights": 1e-2, "ranges": 1e-2}}],
    }
    opt["network_g"]["recipe"] = load_recipe("pams", **{**recipe, **changes}).to_dict()
    return opt


def outputs(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(every_method.batch(1)["lq"])


def test_the_network_at_the_start_teaches_and_does_not_change(data: Path, tmp_path: Path) -> None:
    model = build_model(options(data, tmp_path))
    start = outputs(model.net.eval())
    model.net.train()
    assert torch.equal(outputs(model.teacher), start) and model.teacher is not model.net
    every_method.iterate(model, range(1, 4))
    assert model.log_dict["l_sktloss"] > 0 and not torch.equal(outputs(model.net.eval()), start)
    assert torch.equal(outputs(model.teacher), start) and not any(p.requires_grad for p in model.teacher.parameters())
    assert (tmp_path / "models" / TEACHER_FILE).is_file()


def test_a_resumed_run_has_the_same_teacher(data: Path, tmp_path: Path) -> None:
    model = build_model(options(data, tmp_path))
    every_method.iterate(model, range(1, 3))
    model.save(0, 2)
    opt = options(data, tmp_path)
    opt["path"].update(
        resume_state=str(tmp_path / "states/2.state"), pretrain_network_g=str(tmp_path / "models/net_g_2.pth")
    )
    again = build_model(opt)
    assert torch.equal(outputs(again.teacher), outputs(model.teacher))
    assert not torch.equal(outputs(again.net), outputs(again.teacher))
    (tmp_path / "models" / TEACHER_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{TEACHER_FILE} does not exist.* path.pretrain_network_teacher"):
        build_model(opt)


def test_processes_have_one_teacher(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(options(data, tmp_path))
    before = {key: value.clone() for key, value in model.net.state_dict().items()}
    monkeypatch.setattr(reduce, "world_size", lambda: 2)
    monkeypatch.setattr(reduce.dist, "broadcast", lambda flat, src: flat.fill_(0.25))
    teacher = model.build_teacher()
    assert all((value == 0.25).all() for value in teacher.state_dict().values() if value.is_floating_point())
    assert harness.differences(before, model.net.state_dict()) == []


def test_a_teacher_that_would_not_be_asked_is_told(data: Path, tmp_path: Path, monkeypatch) -> None:
    opt = options(data, tmp_path, teacher="float")
    opt["path"]["pretrain_network_teacher"] = "given.safetensors"
    with pytest.raises(OptionsError, match="recipe.teacher is float.* set recipe.teacher: start"):
        build_model(opt)
    told: list[str] = []
    monkeypatch.setattr(loading.logger, "warning", lambda text, *values: told.append(text % values))
    opt = options(data, tmp_path, losses=[])
    opt["path"]["pretrain_network_teacher"] = "given.safetensors"
    assert build_model(opt).teacher is None
    assert "path.pretrain_network_teacher has no effect: no loss of the recipe has a teacher." in told


def test_a_teacher_can_be_given(data: Path, tmp_path: Path) -> None:
    first = build_model(options(data, tmp_path))
    every_method.iterate(first, range(1, 3))
    given = tmp_path / "given.safetensors"
    save_quantized(first.net, given)
    opt = options(data, tmp_path / "second")
    opt["path"]["pretrain_network_teacher"] = str(given)
    second = build_model(opt)
    assert torch.equal(outputs(second.teacher), outputs(first.net.eval()))
    assert not (tmp_path / "second/models" / TEACHER_FILE).exists()
    every_method.iterate(second, range(1, 2))
    assert second.log_dict["l_sktloss"] > 0


def test_a_run_may_live_from_the_losses_of_its_recipe(data: Path, tmp_path: Path) -> None:
    opt = options(data, tmp_path, teacher="float")
    del opt["train"]["pixel_opt"]
    model = build_model(opt)
    start = outputs(model.net)
    every_method.iterate(model, range(1, 3))
    assert set(model.log_dict) == {"l_sktloss", "clipped"} and model.log_dict["l_sktloss"] > 0
    assert not torch.equal(outputs(model.net), start)
    bare = options(data, tmp_path, losses=[])
    del bare["train"]["pixel_opt"]
    with pytest.raises(ValueError, match="pixel"):
        build_model(bare)


def test_a_run_starts_from_another_quantized_network(data: Path, tmp_path: Path) -> None:
    first = build_model(options(data, tmp_path))
    every_method.iterate(first, range(1, 3))
    save_quantized(first.net, tmp_path / "first.safetensors")
    opt = options(data, tmp_path / "second", policy={"type": "toy_selector"}, bits={"weight": 4, "act": CANDIDATES})
    opt["path"].update(pretrain_network_quantized=str(tmp_path / "first.safetensors"), pretrain_network_float=None)
    second = build_model(opt)
    state = second.net.state_dict()
    assert all(torch.equal(state[k], v.expand_as(state[k])) for k, v in first.net.state_dict().items())
    assert [group["name"] for group in second.optimizer_g.param_groups] == ["weights", "ranges", "bits"]


@pytest.mark.parametrize("method", ["adabm", "granular_dq"])
def test_policies_that_compare_images_are_calibrated_at_a_quantized_start(
    data: Path, tmp_path: Path, method: str
) -> None:
    opt = every_method.options(data, tmp_path, method, "EDSR", own=True)
    first = build_model(opt)
    save_quantized(first.net, tmp_path / "first.safetensors")
    opt = every_method.options(data, tmp_path, method, "EDSR", own=True)
    opt["path"]["pretrain_network_quantized"] = str(tmp_path / "first.safetensors")
    second = build_model(opt)
    # Same weights, ranges and images: what they are compared with is the same as well, though it was not copied.
    calibrated = {key for key in first.net.state_dict() if ".gate." not in key}
    state = second.net.state_dict()
    assert all(torch.equal(state[key], first.net.state_dict()[key]) for key in calibrated)


# -- groups and stages -----------------------------------------------------------------------------------------------


def test_stages_train_bits_and_thresholds_apart(data: Path, tmp_path: Path) -> None:
    stages = [
        {"train": ["bits"], "iters": 1, "lr": {"bits": 1e-2}},
        {"train": ["thresholds"], "iters": 1, "lr": {"thresholds": 1e-1}, "adapt_thresholds": True},
        {"train": ["weights"], "lr": {"weights": 1e-3}},
    ]
    bits = {"weight": 4, "act": CANDIDATES}
    model = build_model(options(data, tmp_path, policy={"type": "toy_gate"}, bits=bits, stages=stages, losses=[]))
    shared, moved = model.net.bit_policy, []
    with torch.no_grad():
        shared.limit.fill_(0.5)
    for iteration in (1, 2, 3):
        before = [shared.linear.weight.clone(), shared.limit.clone(), model.net.conv_first.weight.clone()]
        every_method.iterate(model, range(iteration, iteration + 1))
        after = [shared.linear.weight, shared.limit, model.net.conv_first.weight]
        moved.append([not torch.equal(a, b) for a, b in zip(before, after)])
    assert moved == [[True, False, False], [False, True, False], [False, False, True]]
    with torch.no_grad():
        shared.limit.fill_(9.0)
    every_method.iterate(model, range(4, 5))
    assert shared.limit.item() == 1.0, "brought back after every step"
    assert {g["name"]: g["initial_lr"] for g in model.optimizer_g.param_groups}.keys() == {
        "weights",
        "bits",
        "thresholds",
    }


def test_policies_hear_of_every_stage(data: Path, tmp_path: Path) -> None:
    bits, stages = {"weight": 4, "act": CANDIDATES}, [{"iters": 1, "adapt_thresholds": True}, {}]
    model = build_model(options(data, tmp_path, policy={"type": "toy_brightness"}, bits=bits, stages=stages, losses=[]))
    policy = model.net.body[0].get_submodule("input_policy")
    heard = []
    for iteration in (1, 2):
        every_method.iterate(model, range(iteration, iteration + 1))
        heard.append(policy.stage.adapt_thresholds)
    assert heard == [True, False]
