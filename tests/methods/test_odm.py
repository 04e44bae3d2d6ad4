"""ODM against figures worked out from the paper's equations in float64, digit by digit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsr_plugin.losses.context import StepContext
from qsr_plugin.losses.cooperative import combine, similarity
from qsr_plugin.losses.mismatch_loss import PUBLISHED_PIXELS, MismatchLoss
from qsr_plugin.methods.minmax_percentile import AsymmetricQuantizer
from qsr_plugin.methods.odm import ClipCorrectedQuantizer
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.schema import Cooperative
from qsr_plugin.quant.surgery import quantize_model, quantizers

X = [-0.4, 0.1, 0.35, 0.8, 1.7]


def close(got: Tensor, want: list[float], digits: int = 6) -> None:
    assert got.detach().flatten().tolist() == pytest.approx(want, abs=0.51 * 10**-digits)


def activations(low: float, high: float, bits: int) -> AsymmetricQuantizer:
    q = AsymmetricQuantizer(AsymmetricQuantizer.Options(), (bits,), "act", 1).double()
    with torch.no_grad():
        q.set_range(torch.tensor(low), torch.tensor(high))
    q.mark_calibrated()
    q.double()
    with torch.no_grad():
        q.lower.fill_(low)
        q.upper.fill_(high)
    return q


@pytest.mark.parametrize(
    ("gradient", "dx", "dl", "du"),
    [
        ("detach", [-0.257663, -0.128831, 0.193247, 0.257663, 0.901819], None, None),
        ("ste", [-0.257663, 0, 0, 0, 0.901819], 0.179827, -0.823984),
    ],
)
def test_mismatch_and_both_readings_of_its_gradient(
    gradient: str, dx: list, dl: float | None, du: float | None
) -> None:
    q, x = activations(-0.2, 1.0, 2), torch.tensor(X, dtype=torch.float64, requires_grad=True)
    quantized = q(x)
    close(quantized, [-0.2, 0.2, 0.2, 0.6, 1.0])
    loss = MismatchLoss(loss_weight=1.0, gradient=gradient, reference_pixels=None).distance([(x, quantized)])
    close(loss, [0.776208735], digits=6)
    grads = torch.autograd.grad(loss, (x, q.lower, q.upper), allow_unused=True)
    close(grads[0], dx)
    for got, want in zip(grads[1:], (dl, du)):
        assert (got is None) if want is None else (got.item() == pytest.approx(want, abs=1e-6))


def step_with(pairs: dict, pixels: int) -> StepContext:
    image = torch.zeros(1, 3, 8, 8)
    return StepContext(image, image, ForwardRecord(1, pixels=pixels, keep_pairs=True, pairs=pairs))


def test_mismatch_sums_layers_and_is_scaled_to_the_published_batch() -> None:
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    fine = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(1))
    loss, scale = MismatchLoss(loss_weight=2.0), (PUBLISHED_PIXELS / (2 * 36)) ** 0.5
    one = loss(step_with({"a.input": (x, 0 * x), "a.weight": (fine, 0 * fine)}, 2 * 36))
    assert one.item() == pytest.approx(2 * x.norm().item() * scale, rel=1e-5), "weights are left out"
    both = loss(step_with({"a.input": (x, 0 * x), "up.input": (fine, 0 * fine)}, 2 * 36))
    assert both.item() == pytest.approx(2 * (x.norm() + fine.norm()).item() * scale, rel=1e-5), (
        "one scale for all layers"
    )
    twice = torch.cat([x, x])  # a larger batch of the same images weighs the same
    assert loss(step_with({"a.input": (twice, 0 * twice)}, 4 * 36)).item() == pytest.approx(one.item(), rel=1e-6)
    plain = MismatchLoss(loss_weight=2.0, reference_pixels=None)
    assert plain(step_with({"a.input": (x, 0 * x)}, 72)).item() == pytest.approx(2 * x.norm().item(), rel=1e-6)


def test_mismatch_of_float_activations_is_nothing() -> None:
    assert MismatchLoss()(step_with({}, 64)).item() == 0.0


def test_mismatch_of_a_layer_on_its_grid_has_a_finite_gradient() -> None:
    x = torch.zeros(1, 2, 3, 3, requires_grad=True)
    loss = MismatchLoss().distance([(x, torch.zeros_like(x))])
    loss.backward()
    assert bool(torch.isfinite(loss)) and bool((x.grad == 0).all())


def test_mismatch_refuses_another_reading() -> None:
    with pytest.raises(TypeError, match="'both'; allowed are detach and ste"):
        MismatchLoss(gradient="both")


G_R, G_M = torch.tensor([1.0, 2, -1]), torch.tensor([2.0, 1, 0])


def test_cooperative_combination() -> None:
    assert similarity([(G_R, G_M)], "cosine").item() == pytest.approx(0.730297, abs=1e-6)
    assert similarity([(G_R, G_M)]).item() == pytest.approx(0.865148, abs=1e-6)
    assert similarity([(G_R, 0.1 * G_M)]).item() == pytest.approx(0.865148, abs=1e-6)
    (got,) = combine(["conv.weight"], [G_R], [0.1 * G_M], Cooperative())
    close(got, [1.173030, 2.086515, -1.0])


@pytest.mark.parametrize(
    ("form", "parallel", "opposed", "none"),
    [("half_cosine", 1.0, 0.0, 0.5), ("cosine", 1.0, -1.0, 0.0), ("unit_step", 1.0, 0.0, 0.0)],
)
def test_gradients_that_agree_oppose_or_vanish(form: str, parallel: float, opposed: float, none: float) -> None:
    zero = torch.zeros(3)
    for a, b, want in ((G_R, 3 * G_R, parallel), (G_R, -2 * G_R, opposed), (G_R, zero, none), (zero, G_M, none)):
        factor = similarity([(a, b)], form)
        assert factor.item() == pytest.approx(want, abs=1e-6)
        (combined,) = combine(["w"], [a], [b], Cooperative(similarity=form))
        assert bool(torch.isfinite(combined).all())
        close(combined, (a + want * b).tolist(), digits=5)


def test_tiny_and_huge_gradients_keep_their_angle() -> None:
    assert similarity([(G_R * 1e-9, G_M * 1e9)]).item() == pytest.approx(0.865148, abs=1e-5)
    half = similarity([(G_R.half(), (G_M * 1e-4).half())])
    assert half.dtype == torch.float32 and half.item() == pytest.approx(0.865148, abs=1e-3)


def test_granularity_says_what_one_angle_is_taken_over() -> None:
    names = ["a.weight", "a.bias", "b.weight"]
    first = [torch.tensor([1.0, 0]), torch.tensor([1.0]), torch.tensor([0.0, 2])]
    second = [torch.tensor([0.0, 1]), torch.tensor([-1.0]), torch.tensor([0.0, 3])]
    factors = {
        granularity: [
            ((got - a)[b != 0] / b[b != 0]).unique().item()
            for got, a, b in zip(combine(names, first, second, Cooperative(granularity=granularity)), first, second)
        ]
        for granularity in ("tensor", "layer", "global")
    }
    assert factors["tensor"] == pytest.approx([0.5, 0.0, 1.0])
    layer = (1 - 1 / 2) / 2  # dot -1, norms sqrt(2) and sqrt(2)
    assert factors["layer"] == pytest.approx([layer, layer, 1.0])
    whole = (5 / (6**0.5 * 11**0.5) + 1) / 2
    assert factors["global"] == pytest.approx([whole] * 3)


def test_parameters_the_regularizer_does_not_reach_learn_from_the_reconstruction_alone() -> None:
    got = combine(["body.weight", "tail.weight"], [G_R, G_R], [G_M, None], Cooperative(granularity="global"))
    assert got[1] is G_R and not torch.equal(got[0], G_R)


W = [-0.5, -0.12, 0.03, 0.2, 0.31, 0.9]


def test_weight_clipping_correction() -> None:
    q = ClipCorrectedQuantizer(ClipCorrectedQuantizer.Options(), (2,), "weight", 0).double()
    with torch.no_grad():
        q.gamma.fill_(1.1)
    w = torch.tensor(W, dtype=torch.float64, requires_grad=True)
    out = q(w)
    close(out, [-0.322667, -0.322667, 0.322667, 0.322667, 0.322667, 0.968])
    (d_gamma,) = torch.autograd.grad(out.sum(), q.gamma)
    assert d_gamma.item() == pytest.approx(0.427879, abs=1e-6)
    grid = q.qparams_of(w)
    assert grid.scale.item() * 3 == pytest.approx(2 * 0.968, rel=1e-6) and (grid.qmin, grid.qmax) == (0, 3)


def test_the_bound_follows_the_weights_without_gradient() -> None:
    q = ClipCorrectedQuantizer(ClipCorrectedQuantizer.Options(), (4,), "weight", 0)
    w = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    bound = torch.quantile(w.detach().abs().flatten(), 0.99)
    assert q(w).max().item() == pytest.approx(bound.item(), rel=1e-6)
    assert q(2 * w).max().item() == pytest.approx(2 * bound.item(), rel=1e-6)
    (dw,) = torch.autograd.grad(q(w).sum(), w)
    assert torch.equal(dw, (w.abs() <= bound).float())


def test_gamma_stays_positive() -> None:
    q = ClipCorrectedQuantizer(ClipCorrectedQuantizer.Options(), (2,), "weight", 0)
    assert q.gamma.item() == 1.0
    with torch.no_grad():
        q.gamma.fill_(-3.0)
    q.project()
    assert q.gamma.item() == pytest.approx(1e-3)


def test_ranges_start_from_the_mean_percentiles_of_the_batches(tiny_net, images) -> None:
    net = calibrate(quantize_model(tiny_net("EDSR"), load_recipe("odm")), images)
    seen = []
    hook = net.body[0].conv1.quantizer("input").register_forward_hook(lambda module, args, out: seen.append(args[0]))
    float_net = tiny_net("EDSR")
    handle = float_net.body[0].conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in images:
        float_net(batch)
    hook.remove()
    handle.remove()
    q = net.body[0].conv1.quantizer("input")
    want = torch.stack([torch.quantile(x.flatten(), torch.tensor([0.01, 0.99])) for x in seen]).mean(0)
    assert torch.allclose(torch.stack([q.lower, q.upper]), want, atol=1e-6)


def test_extra_storage_is_one_scalar_per_layer(tiny_net) -> None:
    net = quantize_model(tiny_net("EDSR", num_block=16), load_recipe("odm"))
    weights = [q for _, q in quantizers(net) if q.role == "weight"]
    assert sum(q.extra_storage_bits() for q in weights) == 32 * 32
