"""FQSR against figures computed with the published quantizer class (float32), digit by digit."""

from __future__ import annotations

import copy

import pytest
import torch
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR
from torch import Tensor

from qsr_plugin.losses.calibration_loss import CalibrationLoss
from qsr_plugin.losses.context import StepContext
from qsr_plugin.methods.fqsr import FQSRQuantizer
from qsr_plugin.models.stages import StageSchedule
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.schema import Stage
from qsr_plugin.quant.surgery import quantize_model, quantizers

X = [-1.6, -0.4, 0.1, 0.36, 0.93, 2.5]
WEIGHT = [-0.9, -0.25, 0.1, 0.3, 0.55, 0.7]
WARM_UP = Stage(track_ranges="mean")


def close(got: Tensor, want: list, digits: int = 7) -> None:
    wanted = torch.tensor(want, dtype=torch.float32).flatten()
    assert torch.allclose(got.detach().flatten(), wanted, atol=1.01 * 10**-digits, rtol=2e-7), got


def fqsr(bits: int | tuple[int, ...], c: float = 1.0, low: float = -1.0, role: str = "act", **options) -> FQSRQuantizer:
    candidates = bits if isinstance(bits, tuple) else (bits,)
    q = FQSRQuantizer(FQSRQuantizer.Options(**options), candidates, role, 1 if role == "act" else 0)
    with torch.no_grad():
        q.set_range(torch.tensor(low), torch.tensor(c))
    q.mark_calibrated()
    return q


@pytest.mark.parametrize(
    ("q", "values", "out", "dx", "dc", "total"),
    [
        pytest.param(
            fqsr(4, 1.5, range="half"),
            X,
            [0, 0, 0.1, 0.4, 0.9, 1.5],
            [0, 0, 1, 1, 1, 0],
            [0, 0, 0, 0.0266667, -0.02, 1],
            1.0066667,
            id="A",
        ),
        pytest.param(
            fqsr(4, 1.5, range="full"),
            X,
            [-1.5, -0.3, 0.1, 0.3, 0.9, 1.5],
            [0, 1, 1, 1, 1, 0],
            [-1, 0.0666667, 0, -0.04, -0.02, 1],
            0.0066668,
            id="B",
        ),
        pytest.param(
            fqsr(2, 0.6, role="weight"),
            WEIGHT,
            [-0.6, -0.2, 0.2, 0.2, 0.6, 0.6],
            [0, 1, 1, 1, 1, 0],
            [-1, 0.0833333, 0.1666667, -0.1666667, 0.0833333, 1],
            0.1666667,
            id="C",
        ),
    ],
)
def test_values_and_gradients(q: FQSRQuantizer, values: list, out: list, dx: list, dc: list, total: float) -> None:
    x = torch.tensor(values, requires_grad=True)
    y = q(x)
    close(y, out)
    found_dx, found_dc = torch.autograd.grad(y.sum(), (x, q.interval))
    assert found_dx.tolist() == dx
    close(found_dc, [total], digits=6)
    for i, want in enumerate(dc):
        close(torch.autograd.grad(q(x)[i], q.interval)[0], [want])


@pytest.mark.parametrize("range", ["half", "full"])
def test_a_value_on_a_bound_counts_as_inside(range: str) -> None:
    q, x = fqsr(4, 1.5, range=range), torch.tensor([-1.5, 0.0, 1.5], requires_grad=True)
    dx, dc = torch.autograd.grad(q(x).sum(), (x, q.interval))
    assert dx.tolist() == ([0, 1, 1] if range == "half" else [1, 1, 1])
    close(dc, [0.0 if range == "half" else 0.1 / 1.5])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_full_range_has_no_zero_and_rounds_it_upwards_for_any_interval(bits: int) -> None:
    for c in torch.logspace(-3, 3, 200).tolist():
        q = fqsr(bits, c, range="full")
        assert q(torch.zeros(1)).item() == pytest.approx(c / (2**bits - 1))
        assert fqsr(bits, c, range="half")(torch.zeros(1)).item() == 0


def test_auto_is_half_where_calibration_saw_no_negative_value_and_full_for_weights() -> None:
    x = torch.tensor(X)
    for role, batches, want in (
        ("act", [x.relu(), x.abs()], "half"),
        ("act", [x.relu(), x], "full"),
        ("weight", [x.abs()], "full"),
    ):
        q = FQSRQuantizer(FQSRQuantizer.Options(), (4,), role, 0)
        q.begin_calibration()
        for batch in batches:
            q.observe(batch)
        q.end_calibration()
        assert q.interval.item() == 2.5 and q.tracked == 0
        assert torch.equal(q(x), fqsr(4, 2.5, range=want)(x))
        grid = q.qparams()
        level = (torch.tensor([grid.qmin, grid.qmax]) - grid.zero_point) * grid.scale
        close(level, [0.0 if want == "half" else -2.5, 2.5])


def test_calibration_takes_the_mean_of_the_largest_magnitudes() -> None:
    q = FQSRQuantizer(FQSRQuantizer.Options(), (4,), "act", 1)
    q.begin_calibration()
    for factor in (1.0, -2.0, 3.0):
        q.observe(torch.tensor(X) * factor)
    q.end_calibration()
    assert q.interval.item() == pytest.approx(5.0)


@pytest.mark.parametrize("role", ["act", "weight"])
def test_warm_up(role: str) -> None:
    """Twenty calls that change nothing but the interval; it starts from the first call, not from calibration."""
    q, x = fqsr(4, 7.0, role=role).train(), torch.tensor(X)
    q.enter_stage(WARM_UP)
    for call in range(1, 21):
        batch = x * call
        assert torch.equal(q(batch), batch)
        assert q.interval.item() == pytest.approx(2.5 * (call + 1) / 2, rel=1e-6)
    assert q.interval.item() == pytest.approx(26.25, rel=1e-6)
    q.enter_stage(Stage())
    assert torch.equal(q(x * 21), fqsr(4, q.interval.item())(x * 21)) and not torch.equal(q(x * 21), x * 21)


def test_an_interrupted_warm_up_goes_on_where_it_was() -> None:
    x, straight = torch.tensor(X), fqsr(4).train()
    straight.enter_stage(WARM_UP)
    for call in range(1, 4):
        straight(x * call)
    resumed = fqsr(4, 99.0, low=0.0).train()
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    resumed.enter_stage(WARM_UP)
    for q in (straight, resumed):
        q(x * 4)
    assert torch.equal(straight.interval, resumed.interval) and resumed.tracked == 4
    assert torch.equal(straight.eval()(x), resumed.eval()(x))


def test_evaluation_does_not_use_up_the_warm_up() -> None:
    q, x = fqsr(4, 1.5).eval(), torch.tensor(X)
    q.enter_stage(WARM_UP)
    close(q(x), [-1.5, -0.3, 0.1, 0.3, 0.9, 1.5])
    assert q.tracked == 0 and q.interval.item() == 1.5


def test_one_interval_per_candidate() -> None:
    q = fqsr((4, 6, 8))
    with torch.no_grad():
        q.interval.copy_(torch.tensor([1.0, 2.0, 4.0]))
    assert q(torch.full((3, 1), 100.0), torch.tensor([4, 8, 6])).flatten().tolist() == [1.0, 4.0, 2.0]
    low = q(torch.zeros(3, 1), torch.tensor([4, 8, 6])).flatten()
    close(low, [1 / 15, 4 / 255, 2 / 63])
    q.train().enter_stage(WARM_UP)
    q(torch.tensor([[3.0], [-5.0]]), torch.tensor([4, 8]))
    assert q.interval.tolist() == [5.0, 5.0, 5.0]


def test_calibration_loss() -> None:
    """Example E, and a sum over quantizers of means."""
    q, x = fqsr(4, 1.5, range="half"), torch.tensor(X, requires_grad=True)
    loss = CalibrationLoss(loss_weight=0.3)
    value = loss.error([(x, q(x))])
    close(value, [0.1535])
    dx, dc = torch.autograd.grad(value, (x, q.interval))
    close(dx, [-0.05, -0.05, 0, 0, 0, 0.05])
    close(dc, [-0.0476667])
    more = loss.error([(x, q(x)), (torch.ones(5), torch.zeros(5))])
    close(more, [0.1535 + 0.3])
    assert CalibrationLoss().loss_weight == pytest.approx(0.3 / 255)


def test_calibration_loss_needs_recorded_pairs() -> None:
    with pytest.raises(RuntimeError, match="keep_pairs"):
        CalibrationLoss()(StepContext(torch.zeros(1), torch.zeros(1), ForwardRecord(1)))


def built(tiny_net, images, kind: str, placement: str):
    recipe = load_recipe("fqsr", placement=placement, weight_bits=4, act_bits=4)
    return calibrate(quantize_model(tiny_net(kind, num_block=1), recipe), images)


@pytest.mark.parametrize("kind", ["EDSR", "SRResNet"])
def test_warm_up_and_training_of_a_network(tiny_net, images, kind: str) -> None:
    net = built(tiny_net, images, kind, "fully").train()
    stages = net.recipe.stages
    net.keep_pairs = True
    loss, schedule = CalibrationLoss(loss_weight=1.0), StageSchedule(stages, 1e-4)
    schedule.apply(0, net)
    out = net(images[0])
    assert torch.equal(out, tiny_net(kind, num_block=1).train()(images[0]))
    step = StepContext(out, out, net.last_record())
    assert loss(step) == 0
    assert set(net.last_record().pairs) >= {place for place, _ in quantizers(net)}, "additions have two pairs"
    assert all(q.tracked == (2 if place.endswith("addition") else 1) for place, q in quantizers(net))
    (loss(step) + out.mean()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    assert not any(q.interval.requires_grad for _, q in quantizers(net)), "a tracked interval has no gradient"
    schedule.apply(1, net)
    out = net(images[0])
    loss(StepContext(out, out, net.last_record())).backward()
    assert all(bool(torch.isfinite(q.interval.grad)) and q.interval.grad != 0 for _, q in quantizers(net))


def test_the_loss_sees_the_tensors_as_they_left_the_quantizer(tiny_net, images) -> None:
    """The activation after a convolution works in place on its quantized output."""
    net = built(tiny_net, images, "EDSR", "fully")
    net.keep_pairs = True
    net(images[0])
    pairs = net.last_record().pairs
    x, quantized = pairs["body.0.conv1.output"]
    assert torch.equal(quantized, net.body[0].conv1.quantizer("output")(x)) and bool((quantized < 0).any())


def test_additions_and_everything_else_in_one_block(tiny_net, images) -> None:
    net, x = (
        built(tiny_net, images, "EDSR", "fully"),
        torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(1)),
    )
    block, pad = net.body[0], torch.nn.functional.pad

    def convolve(conv, x: Tensor) -> Tensor:
        padded = conv.quantizer("input")(pad(x, (1, 1, 1, 1)))
        return conv.quantizer("output")(torch.nn.functional.conv2d(padded, conv.quantized_weight(), conv.bias))

    shared = block.quantizer("addition")
    branch = convolve(block.conv2, convolve(block.conv1, x).relu())
    assert torch.equal(block(x), shared(x) + shared(branch))
    assert [bool(conv.quantizer("input").non_negative) for conv in (block.conv1, block.conv2)] == [False, True]


@pytest.mark.parametrize("kind", ["EDSR", "MSRResNet", "SRResNet"])
def test_what_each_placement_leaves_in_float(tiny_net, images, kind: str) -> None:
    net = built(tiny_net, images, kind, "fully")
    convs = {name for name, module in net.named_modules() if isinstance(module, torch.nn.Conv2d)}
    places = {place for place, _ in quantizers(net)}
    tail = {"conv_hr", "conv_last"} & convs
    assert {place.rpartition(".")[0] for place in places if place.endswith(".weight")} == convs
    assert {place.rpartition(".")[0] for place in places if place.endswith(".input")} == convs - {"conv_first"}
    assert {place.rpartition(".")[0] for place in places if place.endswith(".output")} == convs - tail
    assert ("body.0.addition" in places) == (kind != "SRResNet")
    eight = {place for place, q in quantizers(net) if q.candidates == (8,)}
    assert eight == {place for place in places if place.endswith((".output", ".addition"))}
    released = built(tiny_net, images, kind, "released")
    assert {place for place, _ in quantizers(released)} == places
    assert all(q.options.range == "full" for _, q in quantizers(released) if q.role == "act")


def test_cosine_of_the_option_files_reaches_zero_with_the_last_iteration() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=1e-4)
    schedule = CosineAnnealingRestartLR(optimiser, periods=[10], restart_weights=[1], eta_min=0)
    rates = []
    for _ in range(10):
        optimiser.step()
        schedule.step()
        rates.append(optimiser.param_groups[0]["lr"])
    assert rates == sorted(rates, reverse=True) and rates[4] == pytest.approx(5e-5) and rates[-1] == pytest.approx(0)
