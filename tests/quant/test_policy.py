"""Bit policies: the fixed one, and the value and gradient of a hard choice trained through the soft mixture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsr_plugin.methods.pams import PAMSQuantizer
from qsr_plugin.quant.policy import BitDecision, FixedBits, hard_soft, policy_class, quantize_with, register_policy
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
