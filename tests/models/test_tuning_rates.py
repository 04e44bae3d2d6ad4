"""Learning rates in quantization steps, pieces of images, a falling rate: what a tuning can say beside its stages."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import compat
from qsr_plugin.models import tuning
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.surgery import quantize_model

compat.import_host()

from qsr_plugin.models.tuning import tune  # noqa: E402

STAGE = {"train": ["weights", "weight_ranges", "ranges"], "iters": 1, "freeze_batch_norm": True}
RATES = {"weights": 0.01, "weight_ranges": 0.02, "ranges": 0.1}


def network(float_net: nn.Module, images: list[Tensor], **changes: object) -> nn.Module:
    recipe = load_recipe("auto", **{"stages": [{**STAGE, "lr": RATES}], **changes})
    return calibrate(quantize_model(deepcopy(float_net), recipe), images)


def moves(net: nn.Module, float_net: nn.Module, images: list[Tensor]) -> dict[str, Tensor]:
    before = {key: value.clone() for key, value in net.named_parameters()}
    tune(net, float_net, images)
    return {key: (value - before[key]).abs() for key, value in net.named_parameters()}


def test_the_first_step_is_the_rate_times_the_quantization_step(tiny_net, images) -> None:
    float_net = tiny_net("EDSR")
    net = network(float_net, images)
    site = net.body[0].conv1
    act, weight = site.quantizer("input"), site.quantizer("weight")
    act_step, weight_step = float(act.qparams().scale), float(weight.qparams().scale.mean())
    reach = act_step * float(site.weight.detach().flatten(1).norm(dim=1).mean())
    moved = moves(net, float_net, images)
    # The first step of Adam is the rate itself, for every number with a gradient.
    for name, expected in {
        "body.0.conv1.input_quantizer.upper": 0.1 * act_step,
        "body.0.conv1.weight_quantizer.bound": 0.02 * weight_step,
        "body.0.conv1.weight": 0.01 * weight_step,
        "body.0.conv1.bias": 0.01 * reach,
    }.items():
        assert moved[name].max().item() == pytest.approx(expected, rel=0.02), name
    assert moved["conv_first.weight"].max().item() == moved["conv_last.bias"].max().item() == 0, "not quantized"


def test_one_rate_fits_a_network_with_larger_features(tiny_net, images) -> None:
    def relative_moves(img_range: float) -> Tensor:
        float_net = tiny_net("EDSR", img_range=img_range)
        net = network(float_net, images)
        act = net.body[1].conv1.quantizer("input")
        step = float(act.qparams().scale)
        return moves(net, float_net, images)["body.1.conv1.input_quantizer.upper"] / step

    assert float(relative_moves(1.0)) == pytest.approx(float(relative_moves(255.0)), rel=0.05)


def test_adaptive_bits_have_no_step_to_count_in(tiny_net, images) -> None:
    stage = {**STAGE, "train": ["bits"], "lr": {"bits": 0.01}}
    recipe = load_recipe("adabm", stages=[stage], tuning={"relative": True})
    float_net = tiny_net("EDSR")
    net = calibrate(quantize_model(deepcopy(float_net), recipe), images)
    with pytest.raises(RecipeError, match="group 'bits' has no quantization step"):
        tune(net, float_net, images)


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [1.0, 1.0, 1.0, 1.0]), ("cosine", [1.0, 0.853553, 0.5, 0.146447])]
)
def test_rates_fall_along_half_a_cosine(tiny_net, images, monkeypatch, schedule: str, expected: list[float]) -> None:
    rates: list[float] = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *a, **k: rates.append(self.param_groups[0]["lr"]) or step(self, *a, **k)
    )
    float_net = tiny_net("EDSR")
    stages = [{**STAGE, "iters": 4, "lr": RATES}]
    tune(network(float_net, images, stages=stages, tuning={"schedule": schedule, "crop": None}), float_net, images)
    assert [rate / rates[0] for rate in rates] == pytest.approx(expected, abs=1e-6)


def test_images_are_cut_into_pieces(tiny_net, images, monkeypatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(tuning, "refuse_non_finite", lambda where, net, losses, lq, gt, paths: seen.append(lq.clone()))
    float_net = tiny_net("EDSR")
    large = torch.rand(1, 3, 20, 9, generator=torch.Generator().manual_seed(0))
    stages = [{**STAGE, "iters": 3, "lr": RATES}]
    net = network(float_net, images, stages=stages, tuning={"batch": 1, "crop": 8})
    tune(net, float_net, [large, torch.ones(1, 3, 5, 30)])
    assert torch.equal(seen[0], large[..., :8, :8]) and torch.equal(seen[2], large[..., 8:16, :8])
    assert seen[1].shape == (1, 3, 5, 30), "one piece of every image in turn; a small image stays whole"


def test_nothing_is_dropped_while_tuning(tiny_net, images) -> None:
    float_net = tiny_net("EDSR")
    float_net.body.append(nn.Dropout(0.5))
    one, other = network(float_net, images), network(float_net, images)
    tune(one, float_net, images), tune(other, float_net, images)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
