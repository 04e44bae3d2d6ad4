"""The gate of DDTB against figures computed with the published code (float32): parts, gradients, loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qsr_plugin.losses.context import StepContext
from qsr_plugin.losses.gate_loss import GateLoss
from qsr_plugin.methods.ddtb_gate import GATE_LOGITS, Gate, apart, rescale
from qsr_plugin.methods.ddtb_grid import quantize_between
from qsr_plugin.quant.ops import fake_quantize
from qsr_plugin.quant.record import ForwardRecord
from tests.methods.ddtb_builders import C, close, ddtb, dynamic, features, variants
from tests.quant.test_quantizers import NoHostSync

pytestmark = pytest.mark.usefixtures("both_uses")


@variants
def test_parts_of_the_gate(variant: str) -> None:
    gate = Gate(C, variant == "released")
    close(gate.coarse(torch.tensor([[0, 0.5, 1.2, 2.0]])), [0, 0.6666667, 1.3333334, 2])
    weight = torch.tensor([-1, -0.4, 0.3, 0.8])
    assert fake_quantize(weight, weight.abs().amax(), 1.0).tolist() == [-1, 0, 0, 1]
    with torch.no_grad():
        gate.squeeze.zero_()
        gate.squeeze[0] = weight
        gate.norm.running_var.fill_(1 - gate.norm.eps)
        gate.decide.zero_()
        gate.decide[0, 0], gate.decide[1, 0] = 3.0, -2.9
    means = torch.tensor([-3.0, -3.0, 6.0, 2.9])  # steps of 3, so the last one becomes 3; then -1, 0, 0, 1 times them
    close(gate.eval()(means.view(1, C, 1, 1), 1, 1), [18, -18], digits=5)


def test_factors_of_the_bounds() -> None:
    lower, upper = torch.tensor(-0.7), torch.tensor(1.5)
    logits = torch.tensor([[0.0, 0.0], [math.log(3), -math.log(3)]])
    low, high = rescale(lower, upper, logits)
    close(high, [1.5, 2.25])
    close(low, [-0.7, -0.35])


def test_gated_bounds_of_one_sign_do_not_cross() -> None:
    lower = torch.tensor(1.0, requires_grad=True)
    upper, logits = torch.tensor(2.0, requires_grad=True), torch.tensor([[-50.0, 50.0], [0.0, 0.0]], requires_grad=True)
    low, high = rescale(lower, upper, logits)
    assert (high - low).tolist() == pytest.approx([1e-3, 1.0], rel=1e-3)
    out = quantize_between(torch.linspace(-1, 4, 50), low.view(-1, 1), high.view(-1, 1), 2, True)
    grads = torch.autograd.grad(out.sum(), (lower, upper, logits))
    assert all(bool(torch.isfinite(g).all()) and g.abs().max() < 200 for g in grads)


def test_a_gated_batch_equals_its_images_with_their_own_bounds() -> None:
    q, x = dynamic(ddtb(4), gated=True).eval(), features().requires_grad_()
    low, high = rescale(q.lower, q.upper, q.gate(x, 1, 3))
    assert high.unique().numel() == 3 and low.unique().numel() == 3, "the gate tells the images apart"
    want = torch.cat([quantize_between(x[i : i + 1], low[i], high[i], 4, True) for i in range(3)])
    parameters = [q.lower, q.upper, *q.gate.parameters()]
    upstream = torch.linspace(-1, 2, x.numel()).view_as(x)
    got = torch.autograd.grad(q(x), [x, *parameters], upstream)
    for a, b in zip(got, torch.autograd.grad(want, [x, *parameters], upstream)):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert torch.equal(q(x), want)


def test_bits_and_bounds_of_each_image() -> None:
    q, x = dynamic(ddtb((2, 4)), gated=True).eval(), features()
    mixed = q(x, torch.tensor([4, 2, 4]))
    assert torch.equal(mixed[0], q(x, 4)[0]) and torch.equal(mixed[1], q(x, 2)[1])


@variants
def test_images_of_a_batch_see_each_other_only_as_released(variant: str) -> None:
    q, x = dynamic(ddtb(gate=variant), gated=True).eval(), features()
    apart = torch.cat([q(one) for one in x.split(1)])
    assert torch.equal(apart, q(x)) == (variant == "per_sample")


def test_layouts_and_windows_give_the_same_logits() -> None:
    gate, x = Gate(C, False).eval(), features(2)
    want = gate(x, 1, 2)
    tokens = x.flatten(2).transpose(1, 2)  # (2, 30, C)
    assert torch.allclose(gate(tokens, -1, 2), want, atol=1e-5)
    windows = tokens.reshape(2 * 3, 10, C)
    assert torch.allclose(gate(windows, -1, 2), want, atol=1e-5)
    assert torch.allclose(gate(x.mean((2, 3)), -1, 2), want, atol=1e-5)


def test_autocast_and_half_precision_do_not_reach_the_gate() -> None:
    gate, x = Gate(C, False).eval(), features().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = gate(x, 1, 3)
    assert logits.dtype == torch.float32 and torch.allclose(logits, gate(x.float(), 1, 3), atol=1e-5)


@variants
@pytest.mark.parametrize("gated", [True, False])
def test_a_step_with_a_gate_never_waits_for_the_device(variant: str, gated: bool) -> None:
    q, x = dynamic(ddtb(gate=variant), gated=gated).train(), features().requires_grad_()
    with NoHostSync():
        q(x).sum().backward()


@variants
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("batch", "scale"), [(1, 1.0), (1, 0.0), (3, 0.0)])
def test_one_image_and_dead_features_are_finite(variant: str, gated: bool, batch: int, scale: float) -> None:
    q = dynamic(ddtb(gate=variant), gated=gated).train()
    running = q.gate.norm.running_mean.clone()
    x = (features(batch) * scale).requires_grad_()
    out = q(x)
    used = [p for p in q.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.sum(), [x, *used])
    assert all(bool(torch.isfinite(t).all()) for t in (out, *grads))
    assert batch > 1 or torch.equal(q.gate.norm.running_mean, running), "one image has no variance to learn from"


@variants
@pytest.mark.parametrize("gated", [True, False])
def test_gradient_reaches_the_whole_gate_but_as_released_only_its_last_layer(variant: str, gated: bool) -> None:
    q = dynamic(ddtb(4, gate=variant), gated=gated).train()
    if gated:
        q(features()).square().sum().backward()
    else:
        GateLoss(1.0)(step({"a": q.gate(features(), 1, 3)})).backward()
    learning = {name for name, p in q.gate.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert learning == ({"decide"} if variant == "released" else {"squeeze", "norm.weight", "norm.bias", "decide"})
    assert {id(p) for p in q.gate.parameters() if not p.requires_grad} == {id(p) for p in q.idle_parameters()}


def step(logits: dict[str, Tensor]) -> StepContext:
    record = ForwardRecord(2)
    for site, value in logits.items():
        record.signal(GATE_LOGITS, site, value)
    return StepContext(torch.zeros(1), torch.zeros(1), record)


def test_gate_loss_is_the_mean_over_places_of_the_mean_square() -> None:
    shown = {"a": torch.tensor([[1.0, 3.0]]), "b": torch.tensor([[2.0, 0.0], [0.0, 0.0]])}
    assert GateLoss(2.0)(step(shown)).item() == pytest.approx(2.0 * (5.0 + 1.0) / 2)
    assert GateLoss()(step(shown)).item() == pytest.approx(3.0 / 255)
    silent = GateLoss()(step({}))
    assert silent.item() == 0 and not silent.requires_grad and silent.shape == ()


def test_a_gate_cannot_close_a_collapsed_range() -> None:
    """Bounds as close as float32 allows, far from zero, and factors that bring them closer."""
    lower = torch.tensor(15.0)
    upper = apart(lower, lower)
    low, high = rescale(lower, upper, torch.tensor([[0.0, 0.0], [-9.0, 9.0], [3.0, 3.0]]))
    assert bool((high > low).all()) and bool(torch.isfinite(1 / (high - low)).all())
