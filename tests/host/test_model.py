"""QuantSRModel in one process: preparation, groups, stages, EMA, finite checks, losses, validation."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from basicsr.models import build_model

from qsr_plugin.models.stages import parameter_groups
from qsr_plugin.quant.surgery import quantizers
from tests.host import harness
from tests.host.model_steps import DEPTHS, batch, model_of, options, step


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


def test_a_bad_gradient_stops_before_the_step(data: Path, tmp_path: Path) -> None:
    model = model_of(data, tmp_path)
    step(model, 1)
    model.net.body[0].conv2.bias.register_hook(lambda gradient: gradient * float("inf"))
    before = deepcopy(dict(model.net.named_parameters()))
    with pytest.raises(FloatingPointError, match=r"the gradient of body\.0\.conv2\.bias is not finite"):
        step(model, 2)
    assert all(torch.equal(before[k], p) for k, p in model.net.named_parameters() if "quantizer" not in k)
    assert all(bool(torch.isfinite(p).all()) for p in model.net_g_ema.parameters())


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


def test_float_activations_leave_pair_losses_without_work(data: Path, tmp_path: Path) -> None:
    for base, loss in (("odm", "MismatchLoss"), ("fqsr", "CalibrationLoss")):
        recipe = {"base": base, "placement": "body", "bits": {"weight": 32, "act": 32}, "stages": [{}]}
        model = model_of(data, tmp_path, recipe={**recipe, "losses": [{"type": loss}]})
        step(model, 1)
        assert model.log_dict[f"l_{loss.lower()}"] == 0.0
