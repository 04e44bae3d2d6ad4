"""Granular-DQ: quantizer, gate and noise against figures computed with the released code."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qsr_plugin.methods.granular_dq import Gate, SharedGranularity
from qsr_plugin.methods.quantsr import RLQQuantizer
from qsr_plugin.quant.policy import quantize_with
from tests.methods.granularity import CANDIDATES, close, forward_of, photos, prefer, shared
from tests.quant.builders import calibrate_on

WIDTHS = (4, 6, 8)


# -- quantizer -------------------------------------------------------------------------------------------------------


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
