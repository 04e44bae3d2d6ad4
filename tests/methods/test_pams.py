"""PAMS against figures computed with the published code (float32), digit by digit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsr_plugin.losses.distill_loss import SKTLoss, energy_map
from qsr_plugin.methods.pams import MaxAbsQuantizer, PAMSQuantizer
from qsr_plugin.quant.schema import Stage

pytestmark = pytest.mark.usefixtures("both_uses")

X = [-1.6, -0.4, 0.0, 0.1, 0.36, 0.93, 1.0, 2.5]
WEIGHT = [0.7, -0.35, 0.05, -0.02, 0.49]


def close(got: Tensor, want: list, digits: int = 7) -> None:
    wanted = torch.tensor(want, dtype=torch.float32).flatten()
    assert torch.allclose(got.detach().flatten(), wanted, atol=1.01 * 10**-digits, rtol=2e-7), got


def pams(bits: int, alpha: float | None = None) -> PAMSQuantizer:
    q = PAMSQuantizer(PAMSQuantizer.Options(), (bits,), "act", 1)
    if alpha is not None:
        with torch.no_grad():
            q.set_range(torch.tensor(-alpha), torch.tensor(alpha))
        q.mark_calibrated()
    return q


@pytest.mark.parametrize(
    ("bits", "want"),
    [
        (4, [0.7, -0.4, 0.0, 0.0, 0.5]),
        (2, [0.7, 0.0, 0.0, 0.0, 0.7]),
        (8, [0.7, -0.3527559, 0.0496063, -0.0220472, 0.4905512]),
    ],
)
def test_weights(bits: int, want: list[float]) -> None:
    weight = torch.tensor(WEIGHT, requires_grad=True)
    out = MaxAbsQuantizer(MaxAbsQuantizer.Options(), (bits,), "weight", 0)(weight)
    close(out, want)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert torch.autograd.grad(out, weight, upstream)[0].tolist() == upstream.tolist()


@pytest.mark.parametrize(
    ("bits", "alpha", "values", "d_alpha", "total"),
    [
        (
            4,
            1.0,
            [-1, -0.4285714, 0, 0.1428571, 0.4285714, 1, 1, 1],
            [-1, -0.0285714, 0, 0.0428571, 0.0685714, 0.07, 0.5, 1],
            0.6528570,
        ),
        (
            4,
            2.0,
            [-1.7142857, -0.2857143, 0, 0, 0.2857143, 0.8571429, 1.1428572, 2],
            [-0.0571429, 0.0571429, 0, -0.05, -0.0371429, -0.0364286, 0.0714286, 1],
            0.9478571,
        ),
        (2, 1.0, [-1, 0, 0, 0, 0, 1, 1, 1], [-1, 0.4, 0, -0.1, -0.36, 0.07, 0.5, 1], 0.51),
    ],
)
def test_activations(bits: int, alpha: float, values: list, d_alpha: list, total: float) -> None:
    q, x = pams(bits, alpha), torch.tensor(X, requires_grad=True)
    out = q(x)
    close(out, values)
    dx, da = torch.autograd.grad(out.sum(), (x, q.alpha))
    assert dx.tolist() == [0.5 if abs(v) == alpha else float(abs(v) < alpha) for v in X]
    close(da, [total], digits=6)
    for i, want in enumerate(d_alpha):
        close(torch.autograd.grad(q(x)[i], q.alpha)[0], [want])


BATCH = torch.tensor([[[[1.0, -3.0], [0.5, 2.0]]], [[[0.2, -1.0], [0.4, 0.6]]]])


def test_tracked_ranges_follow_the_batch_and_clip_nothing() -> None:
    q = pams(4).train()
    q.enter_stage(Stage(track_ranges=0.0))
    x = BATCH.clone().requires_grad_()
    out = q(x)
    assert q.alpha.item() == 2.0 and q.is_calibrated
    close(out, [1.1428572, -2.8571429, 0.5714286, 2, 0.2857143, -1.1428572, 0.2857143, 0.5714286])
    dx, da = torch.autograd.grad(out.sum(), (x, q.alpha))
    assert (dx == 1).all()
    close(da, [((out - x) / 2).sum().item()], digits=6)


def test_tracked_ranges_average_after_the_first_batch() -> None:
    q = pams(4).train()
    q.enter_stage(Stage(track_ranges=0.9997))
    q(BATCH)
    assert q.alpha.item() == 2.0
    q(BATCH * 2)
    assert q.alpha.item() == pytest.approx(2.0006, abs=1e-6)


def test_tracking_stops_in_evaluation_and_when_switched_off() -> None:
    q = pams(4, 1.0)
    q.enter_stage(Stage(track_ranges=0.0))
    assert q.eval()(BATCH).max().item() == 1.0 and q.alpha.item() == 1.0
    q.train().enter_stage(Stage())
    assert q(BATCH).max().item() == 1.0 and q.alpha.item() == 1.0


def test_calibration_joins_batches_of_the_mean_sample_maximum() -> None:
    q = pams(4)
    q.begin_calibration()
    q.observe(BATCH)
    q.observe(BATCH * 2)
    q.end_calibration()
    assert q.alpha.item() == pytest.approx(0.9 * 2 + 0.1 * 4)
    assert q.observed_max.item() == pytest.approx(q.alpha.item())


def test_alpha_keeps_its_shape_and_never_falls_below_its_floor() -> None:
    q = pams(4, 2.0)
    assert q.alpha.shape == q.observed_max.shape == ()
    optimiser = torch.optim.Adam(q.range_parameters(), lr=1000.0)
    for _ in range(3):
        optimiser.zero_grad()
        q(BATCH).sum().mul(-1 if q.alpha > 1 else 1).backward()
        optimiser.step()
        q.project()
        assert q.alpha >= 0.99e-4 * q.observed_max and bool(torch.isfinite(q(BATCH)).all())


def test_after_a_relu_half_of_the_codes_stay_unused() -> None:
    assert pams(4, 1.0)(torch.linspace(0, 1, 500)).unique().numel() == 8


def test_one_max_scale_per_candidate() -> None:
    q = PAMSQuantizer(PAMSQuantizer.Options(), (4, 6, 8), "act", 1)
    with torch.no_grad():
        q.set_range(torch.tensor(-1.0), torch.tensor(1.0))
        q.alpha.copy_(torch.tensor([1.0, 2.0, 4.0]))
    q.mark_calibrated()
    x = torch.full((3, 1), 100.0)
    assert q(x, torch.tensor([4, 8, 6])).flatten().tolist() == [1.0, 4.0, 2.0]
    assert q.qparams(6).scale.item() == pytest.approx(2 / 31)


FS = torch.tensor([[[[1.0, 2], [3, 4]], [[0, 1], [1, 2]]]])
FT = torch.tensor([[[[1.0, 1], [2, 4]], [[1, 1], [0, 2]]]])


def test_structured_knowledge_transfer() -> None:
    close(energy_map(FS), [0.0436021, 0.2180104, 0.4360207, 0.8720414])
    close(energy_map(FT), [0.0971286, 0.0971286, 0.1942572, 0.9712858])
    student, teacher = FS.clone().requires_grad_(), FT.clone().requires_grad_()
    loss = SKTLoss(loss_weight=1.0).compare(student, teacher)
    close(loss, [0.0214441])
    loss.backward()
    want = [-0.0024154, 0.0097260, 0.0291781, -0.0238320, 0, 0.0048630, 0.0097260, -0.0119160]
    close(student.grad, want)
    assert teacher.grad is None


def test_distillation_of_a_batch_is_the_mean_over_samples_and_dead_features_are_finite() -> None:
    loss = SKTLoss(loss_weight=2.0)
    one, two = loss.compare(FS, FT), loss.compare(FT * 3, FS)
    both = loss.compare(torch.cat([FS, FT * 3]), torch.cat([FT, FS]))
    assert both.item() == pytest.approx((one.item() + two.item()) / 2)
    dead = torch.zeros_like(FS).requires_grad_()
    loss.compare(dead, FT).backward()
    assert bool(torch.isfinite(dead.grad).all())


@pytest.mark.parametrize("placement", ["quantized_input", "shortcut_only"])
@pytest.mark.parametrize("kind", ["EDSR", "SRResNet"])
def test_placements_are_those_of_the_two_published_forms(tiny_net, images, placement: str, kind: str) -> None:
    from qsr_plugin.quant.calibrate import calibrate
    from qsr_plugin.quant.recipe import load_recipe
    from qsr_plugin.quant.surgery import quantize_model

    net = quantize_model(tiny_net(kind, num_block=1), load_recipe("pams", placement=placement))
    calibrate(net, images)
    block, x = net.body[0], torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    convolve = torch.nn.functional.conv2d
    s = (block.quantizer("input") or block.quantizer("shortcut"))(x)
    c1, c2 = block.conv1, block.conv2
    r = convolve(s if placement == "quantized_input" else x, c1.quantized_weight(), c1.bias, padding=1)
    r = block.relu(r) if kind == "EDSR" else block.act(block.bn1(r))
    r = convolve(c2.quantizer("input")(r), c2.quantized_weight(), c2.bias, padding=1)
    r = c2.quantizer("output")(r) if kind == "EDSR" else block.bn2(r)
    assert torch.equal(block(x), s + r)
