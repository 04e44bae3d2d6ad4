"""Bit policies: the fixed one, and the value and gradient of a hard choice trained through the soft mixture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsr_plugin.methods.pams import PAMSQuantizer
from qsr_plugin.quant.policy import (
    BitDecision,
    FixedBits,
    choose,
    hard_soft,
    policy_class,
    quantize_with,
    register_policy,
)
from qsr_plugin.quant.quantizer import StrictOptions

CANDIDATES = (4, 6, 8)


def quantizer() -> PAMSQuantizer:
    made = PAMSQuantizer(PAMSQuantizer.Options(), CANDIDATES, "act", 1)
    with torch.no_grad():
        made.set_range(torch.tensor(-1.0), torch.tensor(1.0))
        made.alpha.copy_(torch.tensor([0.7, 0.9, 1.1]))
    made.mark_calibrated()
    return made


def sample(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).double()


def test_fixed_policy_answers_its_candidate_and_refuses_a_choice() -> None:
    decision = FixedBits(StrictOptions(), (4,)).decide(sample(), None)
    assert decision.bits == 4 and decision.probabilities is None
    with pytest.raises(ValueError, match=r"takes one bit width, got \[4, 8\]"):
        FixedBits(StrictOptions(), (4, 8))


def test_policies_are_found_by_name() -> None:
    assert policy_class("fixed") is FixedBits
    with pytest.raises(ValueError, match="Did you mean 'fixed'"):
        policy_class("fixd")
    with pytest.raises(ValueError, match="already registered"):
        register_policy("fixed")(FixedBits)


def test_value_of_the_best_and_gradient_of_the_mixture() -> None:
    outputs = torch.stack([sample(1), sample(2), sample(3)]).requires_grad_()
    logits = torch.tensor([[0.3, 1.0, 0.2], [2.0, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    p = logits.softmax(1)
    upstream = sample(4)
    out = hard_soft(outputs, p)
    assert torch.allclose(out, torch.stack([outputs[1, 0], outputs[0, 1]]), atol=1e-12)
    d_outputs, d_logits = torch.autograd.grad(out, (outputs, logits), upstream)
    assert torch.allclose(d_outputs, p.t()[:, :, None, None, None].detach() * upstream)
    soft = (p.t()[:, :, None, None, None] * outputs).sum(0)
    # d loss / d logit_j = p_j * sum(upstream * (Q_j(x) - soft)), per image.
    by_hand = p.t() * ((outputs - soft) * upstream).flatten(2).sum(2)
    assert torch.allclose(d_logits, by_hand.t())


def test_what_is_not_chosen_may_hold_anything() -> None:
    outputs = torch.stack([torch.tensor([[1.0], [float("inf")]]), torch.tensor([[float("nan")], [2.0]])])
    assert hard_soft(outputs, torch.tensor([[0.6, 0.4], [0.3, 0.7]])).flatten().tolist() == [1.0, 2.0]


def test_ties_choose_the_fewest_bits() -> None:
    outputs = torch.stack([torch.full((2, 1), float(k)) for k in range(3)])
    p = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4]])
    assert hard_soft(outputs, p).flatten().tolist() == [0.0, 1.0]


def test_training_a_selector_trains_every_candidates_range() -> None:
    q, x = quantizer(), sample().float().requires_grad_()
    p = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]])
    out = quantize_with(q, x, BitDecision(torch.tensor([6, 4]), p))
    assert torch.allclose(out, q(x, torch.tensor([6, 4])), atol=1e-6)
    dx, d_alpha = torch.autograd.grad(out, (x, q.alpha), torch.ones_like(out))
    inside = torch.stack([(x.abs() < alpha).float() for alpha in q.alpha])
    assert torch.allclose(dx, (p.t()[:, :, None, None, None] * inside).sum(0), atol=1e-6)
    for k, bits in enumerate(CANDIDATES):
        alone = q(x, bits)
        per_image = torch.stack([torch.autograd.grad(alone[n].sum(), q.alpha, retain_graph=True)[0][k] for n in (0, 1)])
        assert d_alpha[k].item() == pytest.approx((p[:, k] * per_image).sum().item(), abs=1e-4)


def test_probabilities_of_images_are_repeated_for_their_windows() -> None:
    q, x = quantizer(), sample().float()
    windows = torch.cat([x[:1], x[:1] * 0.5, x[1:], x[1:] * 0.5])
    p = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]])
    out = quantize_with(q, windows, BitDecision(torch.tensor([6, 4]), p))
    assert torch.allclose(out, q(windows, torch.tensor([6, 6, 4, 4])), atol=1e-6)


def test_without_gradients_only_the_chosen_candidate_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    q, calls = quantizer(), []
    forward = PAMSQuantizer.quantize
    monkeypatch.setattr(PAMSQuantizer, "quantize", lambda self, x, bits: calls.append(bits) or forward(self, x, bits))
    with torch.no_grad():
        quantize_with(q, sample().float(), BitDecision(6, torch.tensor([[0.1, 0.7, 0.2], [0.1, 0.7, 0.2]])))
    assert calls == [6]


def test_bits_with_a_gradient_may_be_floats_beside_their_candidate() -> None:
    q, x = quantizer(), sample().float()
    probabilities = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]])
    soft = probabilities @ torch.tensor([4.0, 6.0, 8.0])
    bits = torch.tensor([6.0, 4.0]) - soft + soft
    assert torch.allclose(q(x, bits), q(x, torch.tensor([6, 4])), atol=1e-5)


# -- learned choices -------------------------------------------------------------------------------------------------

PROBABILITIES = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]], dtype=torch.float64)
SOFT = [6.2, 5.4]


def test_a_choice_has_exact_widths_and_the_gradient_of_the_expectation() -> None:
    p = PROBABILITIES.clone().requires_grad_()
    decision = choose(p, CANDIDATES)
    assert decision.bits.tolist() == [6.0, 4.0] and decision.expected.tolist() == pytest.approx(SOFT)
    assert decision.probabilities is p and decision.branches is None and not decision.straight_through
    (slope,) = torch.autograd.grad(decision.bits, p, torch.tensor([1.0, 2.0], dtype=torch.float64), retain_graph=True)
    assert slope.tolist() == [[4, 6, 8], [8, 12, 16]]
    assert torch.equal(torch.autograd.grad(decision.expected.sum(), p)[0], slope / torch.tensor([[1.0], [2.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("candidates", [(4, 6, 8), (2, 3, 5), (3, 7, 16)])
def test_widths_stay_whole_in_any_precision(dtype: torch.dtype, candidates: tuple[int, ...]) -> None:
    p = torch.rand(64, 3, generator=torch.Generator().manual_seed(0)).softmax(1).to(dtype).requires_grad_()
    assert set(choose(p, candidates).bits.tolist()) == set(map(float, candidates))


def test_equal_probabilities_choose_the_fewest_bits() -> None:
    p = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [1 / 3, 1 / 3, 1 / 3]])
    assert choose(p, CANDIDATES).bits.tolist() == [4, 6, 4]


def test_branches_give_each_image_widths_of_its_own() -> None:
    q, x = quantizer(), sample().float().requires_grad_()
    p = PROBABILITIES.float().requires_grad_()
    branches = torch.tensor([[4.0, 8.0, 6.0], [6.0, 4.0, 8.0]])
    decision = choose(p, CANDIDATES, branches=branches)
    assert decision.bits.tolist() == [8.0, 6.0] and torch.equal(decision.branches, branches)
    assert decision.expected.tolist() == pytest.approx([0.4 + 5.6 + 1.2, 3.0 + 1.2 + 1.6])
    out = quantize_with(q, x, decision)
    assert torch.allclose(out, q(x, torch.tensor([8, 6])), atol=1e-6)
    parts = torch.stack([q(x, column) for column in branches.unbind(1)])
    soft = (p.detach().t()[:, :, None, None, None] * parts).sum(0)
    upstream = sample(3).float()
    got, want = (torch.autograd.grad(y, (x, q.alpha), upstream, retain_graph=True) for y in (out, soft))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want))
    (slope,) = torch.autograd.grad(out, p, upstream)
    assert torch.allclose(slope, (parts * upstream).flatten(2).sum(2).t(), atol=1e-4)


def test_straight_through_reaches_only_what_was_chosen_and_every_probability() -> None:
    q, x = quantizer(), sample().float().requires_grad_()
    p, upstream = PROBABILITIES.float().requires_grad_(), sample(3).float()
    decision = choose(p, CANDIDATES, straight_through=True)
    out = quantize_with(q, x, decision)
    alone = q(x, torch.tensor([6, 4]))
    assert torch.equal(out, alone)
    dx, d_alpha, dp = torch.autograd.grad(out, (x, q.alpha, p), upstream)
    want_x, want_alpha = torch.autograd.grad(alone, (x, q.alpha), upstream)
    assert torch.allclose(dx, want_x) and torch.allclose(d_alpha, want_alpha)
    assert d_alpha[2] == 0 and bool(d_alpha[:2].ne(0).all()), "8 bits were chosen by none"
    by_hand = torch.stack([(upstream * q(x, bits)).flatten(1).sum(1) for bits in CANDIDATES], 1)
    assert torch.allclose(dp, by_hand, atol=1e-5)


def test_straight_through_over_windows_adds_up_per_image() -> None:
    q, x = quantizer(), sample().float()
    windows = torch.cat([x[:1], x[:1] * 0.5, x[1:], x[1:] * 0.5])
    p = PROBABILITIES.float().requires_grad_()
    out = quantize_with(q, windows, choose(p, CANDIDATES, straight_through=True))
    assert torch.allclose(out, q(windows, torch.tensor([6, 6, 4, 4])))
    (dp,) = torch.autograd.grad(out.sum(), p)
    by_hand = torch.stack([q(windows, bits).flatten(1).sum(1).view(2, 2).sum(1) for bits in CANDIDATES], 1)
    assert torch.allclose(dp, by_hand, atol=1e-4)


@pytest.mark.parametrize("straight_through", [False, True])
def test_ranges_that_follow_the_batch_follow_it_once_for_all_branches(straight_through: bool, monkeypatch) -> None:
    q, x, calls = quantizer().train(), sample().float(), []
    q._tracking = 0.0
    track = PAMSQuantizer.track
    monkeypatch.setattr(PAMSQuantizer, "track", lambda self, *args: calls.append(1) or track(self, *args))
    p = PROBABILITIES.float().requires_grad_()
    out = quantize_with(q, x, choose(p, CANDIDATES, straight_through=straight_through))
    assert calls == [1]
    assert torch.allclose(out, q.quantize_tracked(x, torch.tensor([6, 4])), atol=1e-6)


def test_what_policies_may_leave_out_does_nothing() -> None:
    fixed = FixedBits(StrictOptions(), (5,))
    fixed.begin_calibration()
    fixed.observe(sample())
    fixed.end_calibration()
    fixed.project()
    assert fixed.threshold_parameters() == [] and fixed.usual_bits() == 5 and not fixed.adapts
