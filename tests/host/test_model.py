"""QuantSRModel in one process: preparation, groups, stages, EMA, finite checks, saving, messages."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr_plugin import checkpoint, compat, load_quantized
from qsr_plugin.quant.surgery import quantizers
from tests.host import harness

compat.import_host()

from basicsr.models import build_model  # noqa: E402
from qsr_plugin.archs.quant_net_arch import build_backbone  # noqa: E402

from qsr_plugin.models.stages import parameter_groups  # noqa: E402
from qsr_plugin.options_file import OptionsError  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.write_data(tmp_path_factory.mktemp("data"), count=4)


def options(data: Path, root: Path, **changes: Any) -> dict[str, Any]:
    """Options as the host's parser leaves them."""
    opt = harness.options(data, **changes)
    opt["network_g"] = {**opt["network_g"], "recipe": opt.pop("recipe")}
    opt.update(is_train=True, dist=False, rank=0, world_size=1, auto_resume=False, root_path=str(root))
    for phase, dataset in opt["datasets"].items():
        dataset.update(phase=phase, scale=4)
    opt["path"].update(models=str(root / "models"), training_states=str(root / "states"), visualization=str(root))
    return opt


@pytest.fixture
def float_file(data: Path, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    net = build_backbone(harness.options(data)["network_g"]["backbone"])
    torch.save({"params": net.state_dict()}, tmp_path / "float.pth")
    return tmp_path / "float.pth"


def model_of(data: Path, root: Path, **changes: Any):
    return build_model(options(data, root, **changes))


def batch(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    lq, gt = torch.rand(2, 3, 8, 8, generator=generator), torch.rand(2, 3, 32, 32, generator=generator)
    return {"lq": lq, "gt": gt, "lq_path": ["a.png", "b.png"], "gt_path": ["a.png", "b.png"]}


def step(model, iteration: int, data: dict[str, Any] | None = None) -> None:
    model.update_learning_rate(iteration)
    model.feed_data(data or batch(iteration))
    model.optimize_parameters(iteration)


def test_float_weights_ranges_and_groups(data: Path, tmp_path: Path, float_file: Path) -> None:
    model = model_of(data, tmp_path, path={"pretrain_network_float": str(float_file)})
    saved = harness.read(float_file)["params"]
    state = model.net.state_dict()
    assert all(torch.equal(state[key], value) for key, value in saved.items())
    assert all(q.is_calibrated for _, q in quantizers(model.net))
    rates = {group["name"]: group["lr"] for group in model.optimizer_g.param_groups}
    assert rates == {"weights": 1e-3, "ranges": 1e-2}
    groups = parameter_groups(model.net)
    assert sum(map(len, groups.values())) == len(list(model.net.parameters()))
    assert len(groups["ranges"]) == 6 and not groups["others"]


@pytest.mark.parametrize(("options", "fused"), [({}, True), ({"fused": False}, False), ({"foreach": True}, None)])
def test_adam_is_fused_unless_told_otherwise(data: Path, tmp_path: Path, options: dict, fused: bool | None) -> None:
    model = model_of(data, tmp_path, train={"optim_g": options})
    assert {group["fused"] for group in model.optimizer_g.param_groups} == {fused}
    step(model, 1)


def test_frozen_groups_do_not_move_and_stages_change(data: Path, tmp_path: Path) -> None:
    stages = [
        {"train": ["ranges"], "iters": 2, "lr": {"ranges": 1e-2}},
        {"train": ["weights"], "iters": 2, "lr": {"weights": 1e-3}},
        {"train": ["weights", "ranges"], "lr": {"weights": 2e-3, "ranges": 4e-2}},
    ]
    model = model_of(data, tmp_path, recipe={"stages": stages})

    def snapshot() -> dict[str, list[torch.Tensor]]:
        return {name: [p.detach().clone() for p in ps] for name, ps in parameter_groups(model.net).items()}

    moved = []
    for iteration in range(1, 7):
        before = snapshot()
        step(model, iteration)
        after = snapshot()
        moved.append({n for n in before if any(not torch.equal(a, b) for a, b in zip(before[n], after[n]))})
    assert moved == [{"ranges"}] * 2 + [{"weights"}] * 2 + [{"weights", "ranges"}] * 2
    assert [group["lr"] for group in model.optimizer_g.param_groups] == [2e-3, 4e-2]


def test_frozen_batch_norm_keeps_its_statistics_through_validation(data: Path, tmp_path: Path) -> None:
    lr = {"weights": 1e-3}
    stages = [{"iters": 2, "lr": lr, "freeze_batch_norm": True, "track_ranges": 0.0}, {"lr": lr}]
    backbone = {"type": "SRResNet_qsr", "num_feat": 8, "num_block": 1, "upscale": 4}
    opt = options(data, tmp_path, recipe={"stages": stages})
    opt["network_g"]["backbone"] = backbone
    model = build_model(opt)
    start = model.net.body[0].bn1.running_mean.clone()
    step(model, 1)
    model.test()
    step(model, 2)
    assert torch.equal(model.net.body[0].bn1.running_mean, start) and model.net.training
    assert model.net.body[0].bn1.weight.grad is not None, "scale and shift still learn"
    step(model, 3)
    assert not torch.equal(model.net.body[0].bn1.running_mean, start)


def test_stage_change_keeps_the_schedulers_decay(data: Path, tmp_path: Path) -> None:
    stages = [{"iters": 6, "lr": {"weights": 1e-3, "ranges": 1e-2}}, {"lr": {"weights": 1e-4, "ranges": 1e-2}}]
    scheduler = {"type": "MultiStepLR", "milestones": [3], "gamma": 0.5}
    model = model_of(data, tmp_path, recipe={"stages": stages}, train={"scheduler": scheduler})
    for iteration in range(1, 8):
        step(model, iteration)
    assert [group["lr"] for group in model.optimizer_g.param_groups] == pytest.approx([5e-5, 5e-3])


def test_ema_carries_buffers_and_calibration(data: Path, tmp_path: Path) -> None:
    model = model_of(data, tmp_path)
    x = batch()["lq"]
    with torch.no_grad():  # right after calibration
        assert torch.equal(model.net_g_ema(x), model.net.eval()(x))
    model.net.train()
    for iteration in (1, 2, 3):
        step(model, iteration)
    averaged, own = dict(model.net_g_ema.named_buffers()), dict(model.net.named_buffers())
    assert averaged.keys() == own.keys() and all(torch.equal(averaged[key], own[key]) for key in own)
    assert not torch.equal(next(model.net_g_ema.parameters()), next(model.net.parameters()))


def test_ranges_stay_legal_with_a_huge_learning_rate(data: Path, tmp_path: Path) -> None:
    stages = [{"train": ["ranges"], "lr": {"ranges": 1e4}}]
    model = model_of(data, tmp_path, recipe={"stages": stages}, train={"ema_decay": 0})
    for iteration in range(1, 5):
        step(model, iteration)
        assert all(
            bool(q.alpha >= q.observed_max * 0.99e-4) and bool(q.alpha > 0)
            for _, q in quantizers(model.net)
            if q.role == "act"
        )


def test_a_bad_image_is_named_and_no_weight_changes(data: Path, tmp_path: Path) -> None:
    model = model_of(data, tmp_path)
    before = deepcopy(model.net.state_dict())
    bad = batch()
    bad["lq"][1, 0, 2, 2] = float("nan")
    model.update_learning_rate(1)
    model.feed_data(bad)
    # Ranges follow the batch before the loss is known, so weights are what is promised here.
    with pytest.raises(
        FloatingPointError, match=r"iteration 1, process 0: loss l_pix is not finite; first bad place: LQ image b\.png"
    ):
        model.optimize_parameters(1)
    assert all(torch.equal(before[k], v) for k, v in model.net.state_dict().items() if "quantizer" not in k)


def test_the_first_bad_site_is_named(data: Path, tmp_path: Path) -> None:
    model = model_of(data, tmp_path)
    with torch.no_grad():
        model.net.body[1].conv1.weight.fill_(3e38)
    with pytest.raises(FloatingPointError, match=r"output of body\.1\.conv1"):
        step(model, 1)


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


def test_a_bad_gradient_stops_before_the_step(data: Path, tmp_path: Path) -> None:
    model = model_of(data, tmp_path)
    step(model, 1)
    model.net.body[0].conv2.bias.register_hook(lambda gradient: gradient * float("inf"))
    before = deepcopy(dict(model.net.named_parameters()))
    with pytest.raises(FloatingPointError, match=r"the gradient of body\.0\.conv2\.bias is not finite"):
        step(model, 2)
    assert all(torch.equal(before[k], p) for k, p in model.net.named_parameters() if "quantizer" not in k)
    assert all(bool(torch.isfinite(p).all()) for p in model.net_g_ema.parameters())


def test_a_checkpoint_of_another_recipe_is_refused_in_tests(data: Path, tmp_path: Path, caplog) -> None:
    model = model_of(data, tmp_path)
    model.save(0, 1)
    path = {"pretrain_network_g": str(tmp_path / "models/net_g_1.safetensors")}
    opt = options(data, tmp_path, path=path, recipe={"bits": {"weight": 8}})
    with pytest.raises(checkpoint.CheckpointError, match=r"recipe\.bits\.weight: saved 4, now 8"):
        build_model({**opt, "is_train": False})


def test_two_losses_of_one_kind_both_count(data: Path, tmp_path: Path, float_file: Path) -> None:
    losses = [{"type": "SKTLoss"}, {"type": "SKTLoss", "features": "body:output"}]
    model = model_of(data, tmp_path, path={"pretrain_network_float": str(float_file)}, recipe={"losses": losses})
    step(model, 1)
    assert list(model.log_dict) == ["l_pix", "l_sktloss", "l_sktloss_2", "clipped"]


def test_validation_in_patches_and_calibration_from_a_folder(data: Path, tmp_path: Path, caplog) -> None:
    folder = harness.write_photos(tmp_path / "lr", 3, side=24)
    changes = {"calibration_folder": str(folder), "val": {"patches": {"size": 12, "overlap": 4}}}
    model = model_of(data, tmp_path, **changes, recipe={"calibration": {"images": 2}})
    model.feed_data({"lq": torch.rand(1, 3, 20, 30)})
    model.test()
    assert model.output.shape == (1, 3, 80, 120)


def test_misspelt_loss_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(compat.NotRegisteredError, match="Did you mean 'SKTLoss'"):
        model_of(data, tmp_path, recipe={"losses": [{"type": "SKTLos"}]})


def test_distillation_compares_with_the_float_network(data: Path, tmp_path: Path, float_file: Path) -> None:
    path = {"pretrain_network_float": str(float_file)}
    model = model_of(data, tmp_path, path=path, recipe={"losses": [{"type": "SKTLoss", "loss_weight": 5.0}]})
    step(model, 1)
    assert model.log_dict["l_sktloss"] > 0
    assert all(not p.requires_grad and p.grad is None for p in model.teacher.parameters())
    # At 32 bits student and teacher agree, and so do their features.
    bits = {"weight": 32, "act": 32}
    same = model_of(data, tmp_path, path=path, recipe={"losses": [{"type": "SKTLoss"}], "bits": bits})
    step(same, 1)
    assert same.log_dict["l_sktloss"] == 0


DEPTHS = {"base": "percentile", "depth": {"role": "block"}, "losses": []}


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


def test_blocks_are_ranked_when_several_depths_begin(data: Path, tmp_path: Path) -> None:
    lr = {"weights": 1e-3, "others": 1e-3}
    recipe = {**DEPTHS, "stages": [{"iters": 1, "lr": lr}, {"depths": [1.0, 0.5], "lr": lr}]}
    model = model_of(data, tmp_path, recipe=recipe)
    with torch.no_grad():
        model.net.body[0].shortcut_scale.fill_(9.0)
    step(model, 1)
    assert model.net.block_order.tolist() == [0, 1]
    step(model, 2)
    assert model.net.block_order.tolist() == [1, 0]
    assert {"l_pix", "l_pix_1blocks"} <= set(model.log_dict)
    places = model.range_statistics.places
    assert any(place.startswith("body.0.") for place in places), "the record is that of the full depth"


def test_validation_holds_no_pairs(data: Path, tmp_path: Path) -> None:
    model = model_of(data, tmp_path, recipe={"base": "odm", "stages": [{}]}, train={"ema_decay": 0})
    step(model, 1)
    assert model.net.last_record().pairs and not hasattr(model, "net_g_ema")
    seen = []

    def tested() -> None:
        seen.append(dict(model.net.last_record().pairs))
        type(model).test(model)
        seen.append(dict(model.net.last_record().pairs))

    model.test = tested
    image = {"lq": torch.rand(1, 3, 8, 8), "gt": torch.rand(1, 3, 32, 32), "lq_path": ["a.png"], "gt_path": ["a.png"]}
    dataset = type("OneImage", (list,), {"opt": {"name": "tinyval"}})([image])
    model.validation(torch.utils.data.DataLoader(dataset, batch_size=None), 1, None)
    assert seen == [{}, {}]
    step(model, 2)
    assert model.net.last_record().pairs


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


def test_float_activations_leave_pair_losses_without_work(data: Path, tmp_path: Path) -> None:
    for base, loss in (("odm", "MismatchLoss"), ("fqsr", "CalibrationLoss")):
        recipe = {"base": base, "placement": "body", "bits": {"weight": 32, "act": 32}, "stages": [{}]}
        model = model_of(data, tmp_path, recipe={**recipe, "losses": [{"type": loss}]})
        step(model, 1)
        assert model.log_dict[f"l_{loss.lower()}"] == 0.0


def test_options_for_a_slimmed_file_are_told(data: Path, tmp_path: Path) -> None:
    from qsr_plugin import save_quantized, slim

    model = model_of(data, tmp_path, recipe={**DEPTHS, "stages": [{}]})
    save_quantized(slim(model.net, 1), tmp_path / "slim.safetensors")
    path = {"pretrain_network_g": str(tmp_path / "slim.safetensors")}
    with pytest.raises(checkpoint.CheckpointError, match=r"write recipe: \{depth: \{kept: \[0\]\}\}"):
        model_of(data, tmp_path, recipe={**DEPTHS, "stages": [{}]}, path=path)
    recipe = {**DEPTHS, "depth": {"role": "block", "kept": [0]}, "stages": [{}]}
    assert len(model_of(data, tmp_path, recipe=recipe, path=path).net.block_order) == 1
