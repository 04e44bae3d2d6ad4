"""Tuning a calibrated network without ground truth: what learns when, from what, and that it can be repeated."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import compat
from qsr_plugin.models import tuning
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.surgery import quantize_model, quantizers
from tests.host import harness

compat.import_host()

from basicsr.models import build_model  # noqa: E402
from qsr_plugin.archs.quant_net_arch import build_backbone  # noqa: E402

from qsr_plugin.models.stages import parameter_groups  # noqa: E402
from qsr_plugin.models.tuning import tune  # noqa: E402

RATES = {"weight_ranges": 1e-2, "ranges": 1e-2, "bits": 1e-2, "thresholds": 1e-1}


def stages(*groups: list[str], iters: int = 3, scale: float = 1.0) -> list[dict[str, Any]]:
    return [
        {"train": train, "iters": iters, "freeze_batch_norm": True, "lr": {name: scale * RATES[name] for name in train}}
        for train in groups
    ]


ALL = stages(["weight_ranges"], ["ranges"], ["bits", "thresholds"])


def calibrated(float_net: nn.Module, images: list[Tensor], method: str = "adabm", **changes: Any) -> nn.Module:
    return calibrate(quantize_model(deepcopy(float_net), load_recipe(method, **{"stages": ALL, **changes})), images)


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("groups", [["weight_ranges"], ["ranges"], ["bits", "thresholds"]], ids="+".join)
@pytest.mark.parametrize("kind", ["EDSR", "SRResNet"])
def test_a_stage_moves_its_groups_and_nothing_else(tiny_net, images, kind: str, groups: list[str]) -> None:
    float_net = tiny_net(kind)
    net = calibrated(float_net, images, stages=stages(groups))
    before, float_before, keys = state_of(net), state_of(float_net), list(float_net.state_dict())
    chosen = {id(p) for name in groups for p in parameter_groups(net)[name]}
    names = {name for name, p in net.named_parameters() if id(p) in chosen}
    spent = tune(net, float_net, images)
    moved = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert moved and moved <= names, "neither weights, statistics of batch norms nor other groups"
    assert len(moved) > len(names) / 2
    assert same(state_of(float_net), float_before) and list(float_net.state_dict()) == keys
    assert set(spent) == {"teacher", ", ".join(groups)} and all(seconds > 0 for seconds in spent.values())


def test_steps_run_through_the_stages_and_batches_in_order(tiny_net, images, monkeypatch) -> None:
    seen: list[tuple[set[str], float, Tensor]] = []

    def look(where: str, net: nn.Module, losses: dict[str, float], lq: Tensor, gt: Tensor, paths: list[str]) -> None:
        learning = {name for name, ps in parameter_groups(net).items() if any(p.grad is not None for p in ps)}
        seen.append((learning, sum(losses.values()), lq))

    monkeypatch.setattr(tuning, "refuse_non_finite", look)
    float_net, steps = tiny_net(), []
    net = calibrated(float_net, images)
    tune(net, float_net, images, progress=lambda sequence: (steps.append(step) or step for step in sequence))
    assert steps == list(range(1, 10))
    assert [learning for learning, _, _ in seen] == (
        [{"weight_ranges"}] * 3 + [{"ranges"}] * 3 + [{"bits", "thresholds"}] * 3
    )
    order = [next(i for i, batch in enumerate(images) if torch.equal(batch, lq)) for _, _, lq in seen]
    assert order == [0, 1, 2] * 3


def test_batches_are_cut_and_the_last_may_be_smaller(tiny_net, images, monkeypatch) -> None:
    sizes = []
    monkeypatch.setattr(tuning, "refuse_non_finite", lambda *args: sizes.append(args[3].shape[0]))
    float_net = tiny_net()
    net = calibrated(float_net, images, stages=stages(["ranges"], iters=4), tuning={"batch": 2})
    tune(net, float_net, torch.cat(images)[:5])
    assert sizes == [2, 2, 1, 2]
    sizes.clear()
    tune(net, float_net, torch.cat(images)[:5].split(1))
    assert sizes == [2, 2, 1, 2]


def test_the_distance_to_the_float_network_falls(tiny_net, images) -> None:
    float_net = tiny_net()
    net = calibrated(float_net, images, "minmax_ft", stages=stages(["weight_ranges"], ["ranges"], iters=20))
    batch = torch.cat(images)
    with torch.no_grad():
        for parameter in (*parameter_groups(net)["ranges"], *parameter_groups(net)["weight_ranges"]):
            parameter.mul_(3)  # far too wide

    def distance() -> float:
        with torch.no_grad():
            return (net(batch) - float_net(batch)).abs().mean().item()

    before = distance()
    tune(net, float_net, images)
    assert distance() < 0.8 * before


def test_a_price_on_bits_lowers_them(tiny_net, images) -> None:
    float_net = tiny_net()
    price = [{"type": "TeacherLoss"}, {"type": "BitLoss", "loss_weight": 50.0, "target_bits": 2}]
    net = calibrated(float_net, images, losses=price, stages=stages(["bits", "thresholds"], iters=60, scale=5))

    def mean_bits() -> float:
        with torch.no_grad():
            net(torch.cat(images))
        return torch.stack(list(net.last_record().bits.values())).mean().item()

    before = mean_bits()
    tune(net, float_net, images)
    assert mean_bits() < before - 0.5


def test_two_tunings_are_equal_and_what_is_kept_of_the_teacher_does_not_matter(tiny_net, images, monkeypatch) -> None:
    float_net, states = tiny_net("SRResNet"), []
    for kept in (2**30, 2**30, 0, 20_000):
        monkeypatch.setattr(tuning, "free_memory", lambda device, free=2 * kept: free)
        net = calibrated(float_net, images)
        torch.manual_seed(len(states))
        tune(net, float_net, images)
        states.append(state_of(net))
    assert all(same(states[0], other) for other in states[1:])


def test_the_teacher_runs_once_for_each_batch_that_is_kept(tiny_net, images, monkeypatch) -> None:
    runs = []
    monkeypatch.setattr(tuning, "tap", _counting_runs(tuning.tap, runs))
    for kept, times in ((2**30, 3), (0, 9)):
        runs.clear()
        monkeypatch.setattr(tuning, "free_memory", lambda device, free=2 * kept: free)
        float_net = tiny_net()
        tune(calibrated(float_net, images), float_net, images)
        assert len(runs) == times


def _counting_runs(tap: Any, runs: list[int]) -> Any:
    """A tap that also counts the forwards of float networks."""

    def counting(net: nn.Module, place: str, name: str) -> nn.Module:
        if getattr(net, "recipe", None) is None:
            net.register_forward_hook(lambda *_: runs.append(1))
        return tap(net, place, name)

    return counting


def test_the_tuned_network_keeps_no_taps_and_its_modes(tiny_net, images) -> None:
    float_net = tiny_net()
    net = calibrated(float_net, images)
    tune(net, float_net, images)
    net(images[0])
    assert not net.last_record().taps and not net.training
    assert all(p.requires_grad for p in net.parameters()) and all(p.grad is None for p in net.parameters())


def test_what_cannot_be_tuned_is_told(tiny_net, images) -> None:
    float_net = tiny_net()
    with pytest.raises(RecipeError, match="method 'percentile' has no 'tuning'"):
        tune(calibrated(float_net, images, "percentile", stages=[{}]), float_net, images)
    with pytest.raises(RecipeError, match="a float network has no 'tuning'"):
        tune(float_net, float_net, images)
    net = calibrated(float_net, images, stages=[{"train": ["ranges", "bits"], "iters": 2, "lr": {"ranges": 1e-2}}])
    with pytest.raises(RecipeError, match=r"recipe.stages\[0\].lr.bits is missing"):
        tune(net, float_net, images)
    for changes, told in (
        ({"teacher": "start"}, "recipe.teacher: start is for trainings"),
        ({"cooperative": {}}, "recipe.cooperative is for trainings"),
    ):
        with pytest.raises(RecipeError, match=told):
            tune(calibrated(float_net, images, **changes), float_net, images)
    with pytest.raises(ValueError, match="no images to tune on"):
        tune(calibrated(float_net, images), float_net, [])
    with pytest.raises(RecipeError, match="needs 'iters' in every stage"):
        load_recipe("adabm", stages=[{"train": ["ranges"], "lr": {"ranges": 1e-2}}])


def test_a_number_that_is_not_finite_stops_it_and_changes_nothing(tiny_net, images) -> None:
    float_net = tiny_net()
    net = calibrated(float_net, images)
    with torch.no_grad():
        net.conv_last.bias[0] = float("nan")
    before = state_of(net)
    with pytest.raises(FloatingPointError, match="tuning step 1: .*first bad place: parameter conv_last.bias"):
        tune(net, float_net, images)
    assert all(torch.equal(value.nan_to_num(), before[key].nan_to_num()) for key, value in net.state_dict().items())


# -- the same stages in a training of the host ------------------------------------------------------------------------


def options(data: Path, root: Path, float_file: Path) -> dict[str, Any]:
    recipe = {
        "base": "adabm",
        "calibration": {"images": 4, "batch": 2, "fit": 2},
        "stages": stages(["weight_ranges"], ["ranges"], ["bits", "thresholds"]),
    }
    opt = harness.options(data, path={"pretrain_network_float": str(float_file)}, train={"pixel_opt": None})
    opt.pop("recipe")
    opt["network_g"]["recipe"] = recipe
    opt.update(is_train=True, dist=False, rank=0, world_size=1, auto_resume=False, root_path=str(root))
    for phase, dataset in opt["datasets"].items():
        dataset.update(phase=phase, scale=4)
    opt["path"].update(models=str(root / "models"), training_states=str(root / "states"), visualization=str(root))
    return opt


def test_a_training_resumes_inside_a_stage_of_bits(tmp_path: Path) -> None:
    data = harness.write_data(tmp_path / "data", count=4)
    torch.manual_seed(1)
    float_file = tmp_path / "float.pth"
    torch.save(build_backbone(harness.options(data)["network_g"]["backbone"]).state_dict(), float_file)

    def steps(model: Any, first: int, last: int) -> None:
        for iteration in range(first, last + 1):
            model.update_learning_rate(iteration)
            generator = torch.Generator().manual_seed(iteration)
            lq, gt = torch.rand(2, 3, 8, 8, generator=generator), torch.rand(2, 3, 32, 32, generator=generator)
            model.feed_data({"lq": lq, "gt": gt, "lq_path": ["a", "b"]})
            model.optimize_parameters(iteration)

    whole = build_model(options(data, tmp_path / "whole", float_file))
    steps(whole, 1, 7)
    start = whole.net.bit_policy.lower.item()
    whole.save(0, 7)
    steps(whole, 8, 9)
    opt = options(data, tmp_path / "again", float_file)
    opt["path"]["pretrain_network_g"] = str(tmp_path / "whole/models/net_g_7.pth")
    again = build_model(opt)
    again.resume_training(torch.load(tmp_path / "whole/states/7.state", weights_only=True))
    steps(again, 8, 9)
    assert same(state_of(whole.net), state_of(again.net)) and whole.net.bit_policy.lower.item() != start
    assert set(whole.log_dict) >= {"l_teacherloss", "l_blockfeatureloss", "l_bitloss"}


@pytest.mark.parametrize("method", ["ptq4sr", "2dquant"])
def test_tuning_brings_bounds_that_are_far_too_wide_back(tiny_net, images, method: str) -> None:
    plain, batch = tiny_net(num_feat=16), torch.cat(images)
    stage = load_recipe(method).stages[0].model_dump(exclude_none=True)
    rates = {"ranges": 2.0, "weight_ranges": 1e-3}  # features are a hundred times larger than weights here
    net = quantize_model(deepcopy(plain), load_recipe(method, stages=[{**stage, "iters": 80, "lr": rates}]))
    calibrate(net, images)
    with torch.no_grad():
        for parameter in (p for _, q in quantizers(net) if q.role == "act" for p in q.range_parameters()):
            parameter.mul_(3)
    starts = {place: [p.detach().clone() for p in q.range_parameters()] for place, q in quantizers(net)}

    def distance() -> float:
        with torch.no_grad():
            return (net(batch) - plain(batch)).abs().mean().item()

    before = distance()
    tune(net, plain, images)
    assert distance() < 0.8 * before
    for place, q in quantizers(net):
        assert all(not torch.equal(old, new) for old, new in zip(starts[place], q.range_parameters())), place
