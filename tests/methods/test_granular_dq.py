"""Granular-DQ: gate, entropy-to-bit, thresholds and quantizer against figures computed with the released code."""

from __future__ import annotations

import copy
import os
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qsr_plugin.methods import granular_dq
from qsr_plugin.methods.granular_dq import Gate, GranularityOptions, SharedGranularity, followed
from qsr_plugin.methods.quantsr import RLQQuantizer
from qsr_plugin.models.stages import StageSchedule, check_stages, parameter_groups
from qsr_plugin.options_file import options_folder
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.image_stats import entropies
from qsr_plugin.quant.policy import quantize_with
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.surgery import policies, quantize_model, quantizers
from qsr_plugin.report.fab import feature_average_bits
from tests.host import every_method, harness
from tests.host.test_ddp import free_port
from tests.quant.builders import calibrate_on

CANDIDATES = (4, 5, 6, 8)
WIDTHS = (4, 6, 8)
#: Quantile to entropy, out of the published table for LR patches of DIV2K.
PUBLISHED = {0.05: 1.55409, 0.1: 1.92721, 0.2: 2.3296, 0.5: 2.80094, 0.7: 2.99372, 0.9: 3.1828, 0.95: 3.25242}


def photos(count: int, side: int = 12, seed: int = 0) -> Tensor:
    """Images from constant to noise, in an order that is no sorting."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(count, 1, 1, 1, generator=generator)
    return 0.5 + spread * (torch.rand(count, 3, side, side, generator=generator) - 0.5)


def shared(channels: int = 16, **options: object) -> SharedGranularity:
    """The part of a network, calibrated on 64 images, in evaluation mode."""
    made = SharedGranularity(GranularityOptions(**options), CANDIDATES, ("a.input",), (channels,))
    made.begin_calibration()
    made.observe(photos(64, seed=9))
    made.end_calibration()
    return made.eval()


def prefer(part: SharedGranularity, *biases: float) -> SharedGranularity:
    with torch.no_grad():
        part.gate.linear.bias.copy_(torch.tensor(biases))
    return part


def forward_of(image: Tensor, channels: int = 16, seed: int = 1) -> ForwardRecord:
    features = torch.randn(image.shape[0], channels, *image.shape[2:], generator=torch.Generator().manual_seed(seed))
    return ForwardRecord(image.shape[0], image=image, taps={"head:output": features})


@pytest.fixture
def quantized(tiny_net):
    """``quantized(kind, **recipe)``: a tiny calibrated network with the shipped recipe, in evaluation mode."""

    def build(kind: str = "EDSR", **changes: object) -> nn.Module:
        net = quantize_model(tiny_net(kind), load_recipe("granular_dq", **changes))
        return calibrate(net, photos(64, seed=9).split(16))

    return build


# -- quantizer -------------------------------------------------------------------------------------------------------


def close(got: Tensor, want: object, digits: int = 6) -> None:
    assert torch.allclose(got.detach().flatten(), torch.tensor(want), atol=1.01 * 10**-digits, rtol=2e-7), got


@pytest.mark.parametrize(
    ("x", "step", "quantized", "dx", "dstep"),
    [
        (
            [0.0, 0.1, 0.37, 1.9, 0.62],
            0.308805853,
            [0, 0, 0.308805853, 1.85283518, 0.617611706],
            [0.850918, 1.049079, 0.989095, 0.961312, 0.856982],
            -0.0184875,
        ),
        ([-0.3, 0.1, 0.37, 1.9, -0.62], 0.497401267, [-0.497401, 0, 0.497401, 1.989605, -0.497401], None, 0.0364819),
    ],
    ids=["unsigned", "signed"],
)
def test_one_step_for_each_width(x, step, quantized, dx, dstep) -> None:
    values = torch.tensor(x).view(1, 1, 1, 5).requires_grad_()
    q = RLQQuantizer(RLQQuantizer.Options(), CANDIDATES, "act", 1, channels=1)
    calibrate_on(q, values.detach())
    close(q.step[0], step, digits=8)
    out = q(values, torch.tensor([4.0]))
    close(out, quantized)
    got_dx, got_dstep = torch.autograd.grad(out.sum(), (values, q.step))
    if dx is not None:
        close(got_dx, dx)
    close(got_dstep, [dstep, 0.0, 0.0, 0.0], digits=7)


@pytest.mark.parametrize(("lowest", "signed"), [(-2e-5, True), (-0.5e-5, False), (0.0, False)])
def test_codes_are_signed_from_a_small_negative_value_on(lowest: float, signed: bool) -> None:
    q = RLQQuantizer(RLQQuantizer.Options(), CANDIDATES, "act", 1, channels=1)
    assert bool(calibrate_on(q, torch.tensor([[[[lowest, 0.5, 1.0]]]])).signed) is signed


# -- gate ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (13, 10), (4, 7)])
def test_gate_is_the_published_formula(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    gate = Gate(64, 3).double()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    z1 = torch.randn(2, 64, *size, generator=generator, dtype=torch.float64)
    z2 = F.avg_pool2d(z1, 2)
    z3 = F.avg_pool2d(z2, 2)
    n1, n2, n3 = (F.group_norm(z, 8, norm.weight, norm.bias) for z, norm in zip((z1, z2, z3), gate.norms))
    joint = torch.cat([n3, F.avg_pool2d(n1, 4), F.avg_pool2d(n2, 2)], 1)
    want = F.linear(joint.flatten(2).mean(2), gate.linear.weight, gate.linear.bias)
    assert torch.allclose(gate(z1), want)


def test_normalised_granularities_differ() -> None:
    """Without the normalisation each is the mean of the channels, three times."""
    gate = Gate(16, 16)
    seen = []
    with torch.no_grad():
        gate.linear.bias.zero_()
        for part in range(3):
            gate.linear.weight.copy_(torch.eye(48)[16 * part : 16 * (part + 1)])
            seen.append(gate(forward_of(photos(2)).taps["head:output"]))
    assert all((a - b).abs().max() > 0.05 for a, b in zip(seen, seen[1:]))


@pytest.mark.parametrize("channels", [1, 3, 8, 12, 60])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (2, 5)])
def test_gate_takes_images_of_any_size_and_any_number_of_channels(channels: int, size: tuple[int, int]) -> None:
    gate = Gate(channels, 3)
    with torch.no_grad():
        gate.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    out = gate(torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(1)))
    assert out.shape == (1, 3) and bool(out.isfinite().all())
    if channels > 3 and size == (2, 5):
        other = gate(torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(2)))
        assert (out - other).abs().max() > 1e-3, "it must be able to tell images apart"


def test_gate_starts_with_the_most_bits() -> None:
    part = shared()
    p = part.decision(forward_of(photos(2))).probabilities
    close(p, [0.211942, 0.211942, 0.576117] * 2)


@pytest.mark.parametrize("bits", WIDTHS)
def test_gradient_of_the_gate_is_that_of_a_one_hot_factor(bits: int) -> None:
    """``h = onehot - stopgrad(p) + p`` times the branches; the chosen one alone reaches tensor and step."""
    part = prefer(shared(), *(0.7 * (width == bits) for width in WIDTHS)).train()
    image, x = photos(6), torch.rand(6, 2, 5, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    q = calibrate_on(RLQQuantizer(RLQQuantizer.Options(), CANDIDATES, "act", 1, channels=2), x.detach() * 0.7)
    torch.manual_seed(5)
    decision = part.decision(forward_of(image))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    out = quantize_with(q, x, decision)
    p, widths = decision.probabilities, decision.branches
    chosen = p.argmax(1)
    assert len(set(chosen.tolist())) > 1
    plain = q(x, decision.bits.detach())
    assert torch.equal(out, plain)
    targets = (x, q.step, part.gate.linear.bias)
    dx, dstep, dbias = torch.autograd.grad(out, targets, upstream)
    want_dx, want_dstep = torch.autograd.grad(plain, (x, q.step), upstream)
    assert torch.equal(dx, want_dx) and torch.allclose(dstep, want_dstep, atol=1e-6)
    pull = torch.stack([(q(x, widths[:, k]) * upstream).flatten(1).sum(1) for k in range(3)], 1).detach()
    by_hand = (p * (pull - (p * pull).sum(1, keepdim=True))).sum(0)
    assert by_hand.abs().max() > 1e-3 and torch.allclose(dbias, by_hand, atol=1e-5)


def test_rows_of_the_gate_part_with_the_first_step(quantized) -> None:
    net = quantized().train()
    torch.manual_seed(0)
    net(photos(8)).square().mean().backward()
    rows = net.bit_policy.gate.linear.weight.grad
    assert all((rows[a] - rows[b]).abs().max() > 0.1 * rows.abs().max() for a, b in ((0, 1), (1, 2), (0, 2)))


# -- noise -----------------------------------------------------------------------------------------------------------


def test_noise_draws_widths_with_the_probabilities_of_the_gate() -> None:
    part = prefer(shared(entropy=(8,), thresholds=()), 1.0, 0.0, 0.5).train()
    torch.manual_seed(0)
    bits = part.decision(forward_of(photos(1, 4).expand(6000, -1, -1, -1))).bits
    shares = torch.stack([(bits == width).float().mean() for width in WIDTHS])
    assert torch.allclose(shares, torch.tensor([1.0, 0.0, 0.5]).softmax(0), atol=0.025)


def test_noise_is_for_training_unless_asked_for() -> None:
    def drawn(part: SharedGranularity) -> set[tuple[float, ...]]:
        return {tuple(part.decision(forward_of(photos(8))).bits.tolist()) for _ in range(6)}

    assert len(drawn(shared())) == 1 < len(drawn(shared().train()))
    assert len(drawn(shared(noise_at_test=True))) > 1


def test_noise_follows_the_seed() -> None:
    part, seen = shared().train(), []
    for _ in range(2):
        torch.manual_seed(7)
        seen.append(part.decision(forward_of(photos(8))).bits)
    assert torch.equal(*seen)


# -- entropy to bits -------------------------------------------------------------------------------------------------


def with_published_table(**options: object) -> SharedGranularity:
    part = shared(**options)
    levels, knots = torch.arange(1, 200) / 200, list(PUBLISHED.items())
    with torch.no_grad():
        for (a, low), (b, high) in zip(knots, knots[1:]):
            inside = (levels >= a - 1e-6) & (levels <= b + 1e-6)
            part.table[inside] = low + (levels[inside] - a) / (b - a) * (high - low)
    return part


def test_thresholds_are_looked_up_between_the_quantiles() -> None:
    part = with_published_table()
    close(part.limits(), [2.80094, 3.18280])
    with torch.no_grad():
        part.table.copy_(torch.arange(199).float().square())
        for t, want in [(0.005, 0.0), (0.5025, 9900.5), (0.995, 198.0**2), (0.001, 0.0), (1.0, 198.0**2)]:
            part.thresholds.copy_(torch.tensor([0.5, t]))
            assert part.limits().tolist() == pytest.approx([99.0**2, want], rel=1e-4, abs=1e-2)


def test_thresholds_act_at_any_distance() -> None:
    """The released look-up rounds them to one decimal: 0.5 and 0.54999 are the same and 0.55 is another.

    Ours reads between quantiles, so that a threshold that is learned in small steps acts in small steps.
    """
    part, found = with_published_table(), []
    for t in (0.5, 0.54999, 0.55):
        part.thresholds.copy_(torch.tensor([t, 0.9]))
        found.append(part.limits()[0].item())
    assert found[0] < found[1] - 0.03 and found[2] - found[1] < 1e-4


def test_entropies_of_the_published_examples_get_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([1.317452, 2.833333, 3.045479, 3.19, 2.80093, 0.731509])
    monkeypatch.setattr(granular_dq, "entropies", lambda image: values)
    assert with_published_table().decision(forward_of(photos(6))).bits.tolist() == [4, 5, 5, 8, 4, 4]


def test_an_entropy_at_the_limit_is_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    part = with_published_table()
    monkeypatch.setattr(granular_dq, "entropies", lambda image: part.limits())
    assert part.decision(forward_of(photos(2))).bits.tolist() == [4, 5]


@pytest.mark.parametrize("level", [0.0, 0.4, 1.0])
def test_a_constant_image_gets_the_fewest_bits(quantized, level: float) -> None:
    net = quantized()
    net(torch.full((1, 3, 12, 12), level))
    assert feature_average_bits(net, net.last_record()) == 4.0


@pytest.mark.parametrize(("biases", "bits"), [((0.0, 9.0, 0.0), 6), ((9.0, 0.0, 0.0), 4)])
def test_entropy_only_matters_where_the_gate_says_the_most(biases, bits: int) -> None:
    part = prefer(shared(gamma=0.5), *biases)
    assert part.decision(forward_of(photos(32))).bits.tolist() == [bits] * 32
    before = part.thresholds.clone()
    part.enter_stage(load_recipe("granular_dq").stages[0])
    prefer(part, *(10 * b for b in biases)).train().decision(forward_of(photos(32)))
    assert torch.equal(part.thresholds, before)


def test_shares_of_the_calibration_images_are_the_thresholds() -> None:
    bits = shared().decision(forward_of(photos(64, seed=9))).bits
    assert [(bits == width).sum().item() for width in (4, 5, 8)] == [32, 25, 7]


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


# -- thresholds ------------------------------------------------------------------------------------------------------

START = torch.tensor([0.5, 0.9], dtype=torch.float64)


def test_thresholds_follow_the_released_example() -> None:
    """The figures are those of float32, whose spacing between 0.5 and 1 is 6e-8."""
    first = followed(START.float(), torch.tensor([2.0]), torch.tensor([True]), 0.99997)
    second = followed(first, torch.tensor([3.2]), torch.tensor([True]), 0.99997)
    assert first.tolist() == pytest.approx([0.499995917, 0.899983883], rel=0, abs=1e-9)
    assert second.tolist() == pytest.approx([0.500008225, 0.899984181], rel=0, abs=6e-8)


def test_a_batch_is_its_counted_images_one_after_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = 3.4 * torch.rand(16, generator=generator, dtype=torch.float64)
    counted = torch.rand(16, generator=generator) > 0.4
    want = START
    for entropy in seen[counted]:
        want = 0.97 * want + 0.03 * (entropy - 1.2) / 2.2
    assert torch.allclose(followed(START, seen, counted, 0.97), want, atol=1e-12)
    assert torch.equal(followed(START, seen, torch.zeros(16, dtype=torch.bool), 0.97), START)


@pytest.mark.parametrize(("entropy", "end"), [(0.0, 0.005), (3.4657, 0.995)])
def test_thresholds_stay_in_the_table_and_in_order(entropy: float, end: float) -> None:
    moved = START.float()
    for _ in range(40):
        moved = followed(moved, torch.full((16,), entropy), torch.ones(16, dtype=torch.bool), 0.97)
        assert 0.005 <= moved[0] <= moved[1] <= 0.995
    assert moved.tolist() == pytest.approx([end, end])


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


HALVES = """
import os
import torch
from torch import distributed as dist
from qsr_plugin.methods.granular_dq import GranularityOptions, SharedGranularity
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.schema import Stage
from qsr_plugin.train import leave_process_group

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
part = SharedGranularity(GranularityOptions(gamma=0.9), (4, 5, 6, 8), ("a.input",), (16,)).train()
part.table.copy_(torch.linspace(2, 3, 199))
part.enter_stage(Stage(adapt_thresholds=True))
bits = []
for step in range(3):
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(8, 1, 1, 1, generator=generator) * torch.rand(8, 3, 12, 12, generator=generator)
    image, widest = images.chunk(world)[rank], torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).roll(step).chunk(world)[rank]
    # So far apart that no noise matters.
    part.gate.forward = lambda features: torch.stack([200.0 * (1 - widest), 0.0 * widest, 200.0 * widest], 1)
    bits.append(part.decision(ForwardRecord(len(image), image=image, taps={"head:output": image})).bits)
torch.save({"thresholds": part.thresholds, "bits": torch.stack(bits)}, f"rank{rank}.pth")
leave_process_group()
"""


def test_two_processes_have_the_thresholds_of_one_on_the_joint_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "halves.py"
    script.write_text(HALVES)
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "PYTHONPATH": path}
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(harness.run, [str(script)], tmp_path, RANK=str(rank), **group) for rank in (0, 1)]
    for run in runs:
        assert run.result().returncode == 0, run.result().stderr[-3000:]
    first, second = (harness.read(tmp_path / f"rank{rank}.pth") for rank in (0, 1))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))
    joint = harness.read(tmp_path / "rank0.pth")
    assert torch.equal(first["thresholds"], second["thresholds"])
    assert torch.equal(first["thresholds"], joint["thresholds"])
    assert (joint["thresholds"] - START.float()).abs().min() > 0.01
    assert torch.equal(torch.cat([first["bits"], second["bits"]], 1), joint["bits"])
    assert len(joint["bits"].unique()) > 1


# -- in a network ----------------------------------------------------------------------------------------------------


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
