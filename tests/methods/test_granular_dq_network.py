"""Granular-DQ in networks: one decision for all places, what learns in which stage, recipes, and a run that resumes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qsr_plugin.methods import granular_dq
from qsr_plugin.methods.granular_dq import followed
from qsr_plugin.models.stages import StageSchedule, check_stages, parameter_groups
from qsr_plugin.options_file import options_folder
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.image_stats import entropies
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.surgery import policies, quantize_model, quantizers
from qsr_plugin.report.fab import feature_average_bits
from tests.host import every_method, harness
from tests.methods.granularity import photos, prefer


@pytest.fixture
def quantized(tiny_net):
    """``quantized(kind, **recipe)``: a tiny calibrated network with the shipped recipe, in evaluation mode."""

    def build(kind: str = "EDSR", **changes: object) -> nn.Module:
        net = quantize_model(tiny_net(kind), load_recipe("granular_dq", **changes))
        return calibrate(net, photos(64, seed=9).split(16))

    return build


def test_rows_of_the_gate_part_with_the_first_step(quantized) -> None:
    net = quantized().train()
    torch.manual_seed(0)
    net(photos(8)).square().mean().backward()
    rows = net.bit_policy.gate.linear.weight.grad
    assert all((rows[a] - rows[b]).abs().max() > 0.1 * rows.abs().max() for a, b in ((0, 1), (1, 2), (0, 2)))


@pytest.mark.parametrize("level", [0.0, 0.4, 1.0])
def test_a_constant_image_gets_the_fewest_bits(quantized, level: float) -> None:
    net = quantized()
    net(torch.full((1, 3, 12, 12), level))
    assert feature_average_bits(net, net.last_record()) == 4.0


def test_calibration_fills_the_table_and_a_second_one_replaces_it(quantized) -> None:
    net = quantized()
    want = entropies(photos(64, seed=9)).quantile(torch.arange(1, 200) / 200)
    assert torch.allclose(net.bit_policy.table, want)
    calibrate(net, photos(8, seed=2))
    assert not torch.allclose(net.bit_policy.table, want)
    kept = net.bit_policy.table.clone()
    with pytest.raises(ValueError, match="NaN"):
        calibrate(net, [photos(8, seed=3), torch.full((1, 3, 8, 8), torch.nan)])
    assert torch.equal(net.bit_policy.table, kept)


def test_thresholds_follow_only_in_training_and_in_stages_that_say_so(quantized) -> None:
    net, x = quantized(policy={"gamma": 0.9}), photos(8)
    part, (first, second) = net.bit_policy, net.recipe.stages
    prefer(part, 0.0, 0.0, 50.0)
    start = part.thresholds.clone()
    part.enter_stage(first)
    net(x)
    assert torch.equal(part.thresholds, start), "not in evaluation"
    net.train()(x)
    want = followed(start, entropies(x), torch.ones(8, dtype=torch.bool), 0.9)
    assert torch.allclose(part.thresholds, want) and not torch.allclose(want, start, atol=1e-2)
    part.enter_stage(second)
    net(x)
    assert torch.allclose(part.thresholds, want), "not in the second stage"


@pytest.mark.parametrize("kind", ["EDSR", "MSRResNet", "SRResNet"])
def test_all_places_have_the_bits_of_one_decision(quantized, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    net, calls = quantized(kind), []
    monkeypatch.setattr(granular_dq, "entropies", lambda image: calls.append(0) or entropies(image))
    net(photos(64))
    bits = list(net.last_record().bits.values())
    assert len(calls) == 1 and len(bits) == 4 and all(torch.equal(b, bits[0]) for b in bits)
    assert set(bits[0].tolist()) == {4.0, 5.0, 8.0}


def test_a_batch_gets_the_bits_of_its_images_one_by_one(quantized) -> None:
    net, x = quantized(), photos(16)
    gate = net.bit_policy.gate
    with torch.no_grad():
        gate.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
        net(x)
        gate.linear.bias.sub_(gate(net.last_record().taps["head:output"]).mean(0))
        together = net(x)
        joint = net.last_record().bits["body.0.conv1.input"]
        alone = []
        for image, out in zip(x.split(1), together):
            assert torch.allclose(net(image)[0], out, atol=1e-5)
            alone.append(net.last_record().bits["body.0.conv1.input"])
    assert torch.equal(torch.cat(alone), joint) and len(set(joint.tolist())) > 2


def test_blocks_that_run_again_for_their_gradient_use_the_first_decision(quantized) -> None:
    net, results = quantized(policy={"gamma": 0.9}).train(), []
    net.bit_policy.enter_stage(net.recipe.stages[0])
    for checkpointing in (False, True):
        copied = copy.deepcopy(net)
        for block in copied.body if checkpointing else ():
            forward = block.forward
            block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
        torch.manual_seed(1)
        copied(photos(8)).square().mean().backward()
        results.append([copied.bit_policy.thresholds, *(p.grad for p in copied.parameters())])
    assert results[0][0][0] != 0.5
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_copy_from_the_state_dict_computes_the_same(quantized, tiny_net) -> None:
    net, x = quantized(), photos(8)
    with torch.no_grad():
        net.bit_policy.thresholds.copy_(torch.tensor([0.3, 0.6]))
        net.bit_policy.gate.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    other = quantize_model(tiny_net(), load_recipe("granular_dq"))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))


def test_parameters_of_the_gate_are_in_the_group_of_bits(quantized) -> None:
    net = quantized()
    groups = parameter_groups(net)
    assert {id(p) for p in groups["bits"]} == {id(p) for p in net.bit_policy.gate.parameters()}
    assert not groups["thresholds"]


def test_released_gate_does_not_learn(quantized) -> None:
    net = quantized(policy={"gate_gradient": False, "noise_at_test": True})
    assert not parameter_groups(net)["bits"]
    StageSchedule(net.recipe.stages, 1e-4).apply(0, net)
    net.train()(photos(8)).square().mean().backward()
    trained = [p for p in net.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained) and not net.last_record().signals
    assert not {id(p) for p in trained} & {id(p) for p in net.bit_policy.parameters()}


def test_places_ask_for_the_whole_network(quantized) -> None:
    _, policy = next(policies(quantized()))
    with pytest.raises(RuntimeError, match=r"body\.0\.conv1\.input: bits follow the image: run the whole"):
        policy.decide(torch.zeros(1, 8, 4, 4), None)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"gate": [4, 8, 6]}, r"gate is \[4, 8, 6\]; give ascending"),
        ({"entropy": [4, 5, 6]}, "entropy ends with 6, gate with 8"),
        ({"thresholds": [0.5]}, r"thresholds is \[0.5\]; 3 width\(s\) in entropy take 2"),
        ({"thresholds": [0.5, 1.0]}, "between 0 and 1"),
        ({"thresholds": [0.9, 0.5]}, r"thresholds is \[0.9, 0.5\]; give ascending"),
        ({"gamma": 1.0}, "gamma"),
        ({"entropi": [4, 8]}, "entropi"),
    ],
)
def test_options_that_cannot_be_are_refused(policy: dict, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe("granular_dq", policy=policy)


def test_widths_that_are_no_candidates_are_refused(tiny_net) -> None:
    net = tiny_net()
    with pytest.raises(RecipeError, match=r"entropy asks for 5 bits, the activation bits are \[4, 6, 8\]: add it"):
        quantize_model(net, load_recipe("granular_dq", act_bits=(4, 6, 8)))
    assert getattr(net, "recipe", None) is None and not list(quantizers(net))


ABLATIONS = sorted((options_folder() / "ablations").glob("granular_dq_*.yml"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_ablations_train(tiny_net, path: Path) -> None:
    net = calibrate(quantize_model(tiny_net(), load_recipe(path)), photos(32, seed=9).split(16))
    check_stages(net.recipe.stages, net)
    StageSchedule(net.recipe.stages, 1e-4).apply(0, net)
    net(photos(64))
    bits = set(net.last_record().bits["body.0.conv1.input"].tolist())
    assert bits == ({8.0} if path.stem == "granular_dq_gate" else {4.0, 5.0, 8.0})
    net.train()(photos(4)).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_there_are_ablations() -> None:
    assert len(ABLATIONS) == 3


def train(data: Path, root: Path, iterations: range, **path: str):
    """A tiny network in the host's model with four iterations of the first stage."""
    from basicsr.models import build_model

    opt = every_method.options(data, root, "pams", "EDSR")
    opt["path"].update(path)
    recipe = load_recipe("granular_dq", calibration={"images": 4, "batch": 2}, policy={"gamma": 0.9}).to_dict()
    recipe["stages"][0]["iters"] = 4
    opt["network_g"]["recipe"] = recipe
    model = build_model(opt)
    if path:
        model.resume_training(harness.read(root / f"states/{iterations[0] - 1}.state"))
    every_method.iterate(model, iterations)
    return model


def test_a_run_learns_and_resumes_inside_the_stage_of_the_thresholds(tmp_path: Path) -> None:
    data = harness.write_data(tmp_path / "data", count=4)
    whole = train(data, tmp_path, range(1, 7))
    part = whole.net.bit_policy
    assert part.thresholds.tolist() != pytest.approx([0.5, 0.9], abs=1e-3)
    assert part.gate.linear.weight.abs().max() > 0 and torch.equal(
        whole.net_g_ema.bit_policy.thresholds, part.thresholds
    )
    halfway = train(data, tmp_path, range(1, 3))
    halfway.save(0, 2)
    resumed = train(
        data, tmp_path, range(3, 7), pretrain_network_g=str(tmp_path / "models/net_g_2.pth"), param_key_g="params"
    )
    assert harness.differences(whole.net.state_dict(), resumed.net.state_dict()) == []
    assert harness.differences(whole.net_g_ema.state_dict(), resumed.net_g_ema.state_dict()) == []
