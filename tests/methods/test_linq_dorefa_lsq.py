"""LinQ, affine, DoReFa and LSQ against worked figures, digit by digit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qsr_plugin.methods.linq_dorefa_lsq import (
    AffineQuantizer,
    DoReFaQuantizer,
    DoReFaWeightQuantizer,
    LinQQuantizer,
    LSQQuantizer,
)
from qsr_plugin.quant.quantizer import Quantizer
from qsr_plugin.quant.schema import Stage
from tests.quant.builders import calibrate_on

pytestmark = pytest.mark.usefixtures("both_uses")


def close(got: Tensor, want: list, digits: int = 7) -> None:
    wanted = torch.tensor(want, dtype=torch.float32).flatten()
    assert torch.allclose(got.detach().flatten(), wanted, atol=1.01 * 10**-digits, rtol=2e-7), got


def make(cls: type[Quantizer], bits: int | tuple[int, ...], role: str = "act", **options: object) -> Quantizer:
    return cls(cls.Options(**options), bits if isinstance(bits, tuple) else (bits,), role, 0 if role == "weight" else 1)


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, requires_grad=True)


# -- LinQ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["act", "weight"])
def test_linq(role: str) -> None:
    x = leaf(-1.6, -0.4, 0.0, 0.1, 0.36, 0.93, 1.0, 2.5)
    out = make(LinQQuantizer, 4, role)(x)
    close(out, [-1.4285715, -0.3571429, 0, 0, 0.3571429, 1.0714285, 1.0714285, 2.5])
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [1.0] * 8


def test_linq_couples_a_batch_unless_it_is_told_not_to() -> None:
    x = torch.tensor([[1.0, 0.3], [10.0, 3.0]])
    apart = make(LinQQuantizer, 4, per_sample=True)
    close(make(LinQQuantizer, 4)(x), [1.4285715, 0, 10, 2.8571429], digits=6)
    close(apart(x), [1, 0.2857143, 10, 2.8571429], digits=6)
    assert torch.equal(torch.cat([apart(one) for one in x.split(1)]), apart(x))
    close(apart(x, torch.tensor([4, 2])), [1, 0.2857143, 10, 0], digits=6)


@pytest.mark.parametrize("per_sample", [False, True])
def test_linq_of_zeros_is_zero(per_sample: bool) -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    out = make(LinQQuantizer, 4, per_sample=per_sample)(x)
    out.sum().backward()
    assert (out == 0).all() and (x.grad == 1).all()


def test_linq_stores_a_step_per_weight_and_searches_each_activation() -> None:
    weight, act = make(LinQQuantizer, 4, "weight"), make(LinQQuantizer, 4)
    assert (weight.extra_storage_bits(), act.extra_storage_bits()) == (32, 0)
    assert (weight.overhead_ops(100), act.overhead_ops(100)) == (0, 200)


@pytest.mark.parametrize(
    ("role", "mode", "per_sample", "want"),
    [
        ("act", "step", False, 8.0),
        ("act", "evaluation", False, 2.0),
        ("act", "alone", False, 2.0),
        ("act", "step", True, 2.0),
        ("weight", "step", False, 2.0),
    ],
)
def test_linq_takes_the_largest_of_all_processes_in_a_step_only(
    monkeypatch, role: str, mode: str, per_sample: bool, want: float
) -> None:
    monkeypatch.setattr("qsr_plugin.methods.linq_dorefa_lsq.max_over_ranks", lambda own: own * 4)
    q = make(LinQQuantizer, 4, role, per_sample=per_sample).train(mode != "evaluation")
    with torch.set_grad_enabled(mode != "alone"):
        assert q.largest(torch.tensor([[-2.0, 1.0]])).item() == pytest.approx(want)


# -- affine ----------------------------------------------------------------------------------------------------------


def test_affine_grid_has_an_integer_zero_point_and_an_exact_zero() -> None:
    q = calibrate_on(make(AffineQuantizer, 2), torch.tensor([[-0.5, 1.0]]))
    grid = q.qparams()
    assert (grid.scale.item(), grid.zero_point.item(), grid.qmin, grid.qmax) == (0.5, 1.0, 0, 3)
    x = leaf(-2.0, -0.5, -0.3, 0.0, 0.2, 0.3, 0.7, 1.0, 1.1)
    out = q(x)
    assert out.tolist() == [-0.5, -0.5, -0.5, 0, 0, 0.5, 0.5, 1, 1]
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0]


def test_affine_zero_point_is_rounded_and_moves_the_grid() -> None:
    """Range -0.4 .. 1.1 at 2 bits: step 0.5, zero point 0.8 becomes 1, so the grid is -0.5 .. 1."""
    q = calibrate_on(make(AffineQuantizer, 2), torch.tensor([[-0.4, 1.1]]))
    x = leaf(-0.6, -0.45, 0.04, 1.05)
    out = q(x)
    close(out, [-0.5, -0.5, 0, 1])
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(("values", "low", "high"), [([2.0, 3.0], 0.0, 3.0), ([-3.0, -1.0], -3.0, 0.0)])
def test_affine_range_is_extended_to_hold_zero(values: list[float], low: float, high: float) -> None:
    q = calibrate_on(make(AffineQuantizer, 4), torch.tensor([values]))
    assert (q.low.item(), q.high.item()) == (low, high)
    assert q(torch.zeros(1, 1)).item() == 0.0


def test_affine_range_is_a_moving_average_in_training_and_frozen_in_evaluation() -> None:
    q = make(AffineQuantizer, 4)
    q.enter_stage(Stage(track_ranges=0.75))
    q.train()(torch.tensor([[-1.0, 2.0]]))
    assert q.is_calibrated and (q.low.item(), q.high.item()) == (-1.0, 2.0)
    x = torch.tensor([[-3.0, 6.0]], requires_grad=True)
    out = q(x)
    assert (q.low.item(), q.high.item()) == (-1.5, 3.0)
    close(out, [-1.5, 3.0])
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [[0.0, 0.0]]
    q.eval()(x * 10)
    q.train().enter_stage(Stage())
    q(x * 10)
    assert (q.low.item(), q.high.item()) == (-1.5, 3.0)
    assert not list(q.parameters())


# -- DoReFa ----------------------------------------------------------------------------------------------------------

WEIGHTS = (-0.9, -0.25, 0.1, 0.3, 0.55, 0.7)
SLOPES = [1.1871563, 1.3123239, 1.3821992, 1.2775927, 1.0463238, 0.8861392]
LEVELS = {
    2: [-1, -0.3333333, 0.3333334, 0.3333334, 1, 1],
    4: [-1, -0.3333333, 0.2, 0.4666667, 0.7333333, 0.8666667],
}


@pytest.mark.parametrize("bits", LEVELS)
def test_dorefa_weights_as_published(bits: int) -> None:
    w = leaf(*WEIGHTS)
    out = make(DoReFaWeightQuantizer, bits, "weight", rescale=False)(w)
    close(out, LEVELS[bits])
    close(torch.autograd.grad(out.sum(), w)[0], SLOPES)


@pytest.mark.parametrize("bits", LEVELS)
def test_dorefa_weights_rescaled_by_their_largest_magnitude(bits: int) -> None:
    w = leaf(*WEIGHTS)
    out = make(DoReFaWeightQuantizer, bits, "weight")(w)
    close(out, [0.9 * level for level in LEVELS[bits]], digits=6)
    close(torch.autograd.grad(out.sum(), w)[0], [0.9 * slope for slope in SLOPES], digits=6)


def test_dorefa_normaliser_gives_the_largest_weight_a_gradient_of_its_own() -> None:
    """Without the normaliser's term the first slope would be (1 - tanh^2(0.9)) / tanh(0.9) = 0.6797."""
    alone = (1 - math.tanh(0.9) ** 2) / math.tanh(0.9)
    others = sum(math.tanh(w) for w in WEIGHTS) / math.tanh(0.9)
    assert alone + alone * others == pytest.approx(SLOPES[0], abs=1e-6)


def test_dorefa_weights_have_no_zero() -> None:
    for bits in (2, 4):
        level = 1 / (2**bits - 1)
        plain = make(DoReFaWeightQuantizer, bits, "weight", rescale=False)
        assert plain(torch.zeros(3)).abs().tolist() == pytest.approx([level] * 3)
        assert plain(torch.tensor([0.0, 1.0])).abs().tolist() == pytest.approx([level, 1])
        w = torch.zeros(3, requires_grad=True)
        out = make(DoReFaWeightQuantizer, bits, "weight")(w)
        out.sum().backward()
        assert out.abs().max() < 1e-11 and w.grad.tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize(("rescale", "slope"), [(False, 1e3), (True, 1.0)])
def test_dorefa_gradient_of_zero_weights_is_moderate(rescale: bool, slope: float) -> None:
    w = torch.zeros(5, requires_grad=True)
    out = make(DoReFaWeightQuantizer, 4, "weight", rescale=rescale)(w)
    grad = torch.autograd.grad(out.sum(), w)[0]
    assert grad.tolist() == pytest.approx([slope] * 5)


@pytest.mark.parametrize("rescale", [False, True])
def test_dorefa_small_weights_reach_the_outermost_levels(rescale: bool) -> None:
    w = torch.tensor([-2e-3, 1e-3, 2e-3])
    out = make(DoReFaWeightQuantizer, 2, "weight", rescale=rescale)(w)
    close(out / (2e-3 if rescale else 1.0), [-1, 1 / 3, 1], digits=6)
    tiny = torch.tensor([-2e-6, 2e-6])
    close(make(DoReFaWeightQuantizer, 2, "weight")(tiny) / 2e-6, [-1, 1], digits=6)


def test_dorefa_activations_as_published() -> None:
    q, x = make(DoReFaQuantizer, 4, rescale=False), leaf(-1.6, -0.4, 0.1, 0.36, 0.93, 2.5)
    assert q.is_calibrated
    out = q(x)
    close(out, [0, 0, 0.1333333, 0.3333333, 0.9333333, 1])
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [0, 0, 1, 1, 1, 0]
    ends = leaf(0.0, 1.0)
    assert torch.autograd.grad(q(ends).sum(), ends)[0].tolist() == [1, 1]


def test_dorefa_activations_are_normalised_by_the_calibrated_magnitude() -> None:
    positive = calibrate_on(make(DoReFaQuantizer, 4), torch.tensor([[0.0, 100.0]]))
    x = leaf(-160.0, -40.0, 11.0, 36.0, 93.0, 250.0)
    out = positive(x)
    close(out, [0, 0, 13.33333, 33.33333, 93.33333, 100], digits=4)
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [0, 0, 1, 1, 1, 0]
    both = calibrate_on(make(DoReFaQuantizer, 2), torch.tensor([[-3.0, 1.0]]))
    x = leaf(-4.0, -3.0, -0.5, 0.5, 2.5, 3.0)
    out = both(x)
    close(out, [-3, -3, -1, 1, 3, 3], digits=6)
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [0, 1, 1, 1, 1, 1]
    assert both.qparams().zero_point.item() == 1.5 and positive.qparams().zero_point.item() == 0


# -- LSQ -------------------------------------------------------------------------------------------------------------


def lsq(bits: int, step: float, values: tuple[float, ...], role: str = "weight") -> tuple[LSQQuantizer, Tensor]:
    q = make(LSQQuantizer, bits, role)
    x = torch.tensor([values], requires_grad=True)
    calibrate_on(q, x.detach() if role == "weight" else x.detach().abs())
    with torch.no_grad():
        q.step.fill_(step)
    return q, x


SIGNED = (-1.3, -0.6, -0.2, 0.1, 0.3, 0.9)


def test_lsq_signed() -> None:
    q, v = lsq(2, 0.5, SIGNED)
    out = q(v)
    close(out, [-1, -0.5, 0, 0, 0.5, 0.5])
    dv, ds = torch.autograd.grad(out.sum(), (v, q.step))
    assert dv.flatten().tolist() == [0, 1, 1, 1, 1, 0]
    close(ds, [-0.0816497])
    scale = 0.4082483
    for i, want in enumerate([-2, 0.2, 0.4, -0.2, 0.4, 1]):
        close(torch.autograd.grad(q(v)[0, i], q.step)[0], [want * scale], digits=6)


def test_lsq_unsigned() -> None:
    q, v = lsq(2, 0.4, (-0.3, 0.1, 0.5, 1.5), "act")
    out = q(v)
    close(out, [0, 0, 0.4, 1.2])
    dv = torch.autograd.grad(out.sum(), v)[0]
    assert dv.flatten().tolist() == [0, 1, 1, 0]
    scale = 1 / math.sqrt(4 * 3)
    for i, want in enumerate([0, -0.25, -0.25, 3]):
        close(torch.autograd.grad(q(v)[0, i], q.step)[0], [want * scale], digits=6)


def test_lsq_starts_from_the_mean_magnitude() -> None:
    q = calibrate_on(make(LSQQuantizer, 2, "weight"), torch.tensor(SIGNED))
    close(q.step, [1.1333333])
    several = calibrate_on(make(LSQQuantizer, (2, 4, 8)), torch.tensor([SIGNED]))
    close(several.step, [1.1333333 / math.sqrt(qmax) for qmax in (1, 7, 127)], digits=6)
    unsigned = calibrate_on(make(LSQQuantizer, (2, 4)), torch.tensor([SIGNED]).abs())
    close(unsigned.step, [1.1333333 / math.sqrt(qmax) for qmax in (3, 15)], digits=6)


def test_lsq_counts_a_value_on_a_bound_as_clipped() -> None:
    q, v = lsq(2, 0.5, (-1.0, 0.5, 0.0))
    dv, ds = torch.autograd.grad(q(v).sum(), (v, q.step))
    assert dv.tolist() == [[0, 0, 1]]
    assert ds.item() == pytest.approx((-2 + 1 + 0) / math.sqrt(3 * 1))
    relu, x = lsq(2, 0.4, (0.0, 0.0, 0.3), "act")
    assert torch.autograd.grad(relu(x).sum(), x)[0].tolist() == [[0, 0, 1]]


def test_lsq_gradient_scale_counts_one_sample_of_activations_and_all_of_a_weight() -> None:
    for role, count in (("act", 2), ("weight", 6)):
        q = make(LSQQuantizer, 2, role)
        calibrate_on(q, torch.full((3, 2), -5.0))
        (ds,) = torch.autograd.grad(q(torch.full((3, 2), -50.0)).sum(), q.step)
        assert ds.item() == pytest.approx(-2 * 6 / math.sqrt(count * 1))


def test_lsq_is_signed_where_calibration_saw_values_below_zero() -> None:
    x = torch.tensor([[-0.4, 0.8]])
    assert calibrate_on(make(LSQQuantizer, 4), x)(x)[0, 0] < 0
    relu = calibrate_on(make(LSQQuantizer, 4), x.relu())
    assert relu(x)[0, 0] == 0 and relu.qparams().qmax == 15
    assert calibrate_on(make(LSQQuantizer, 4, "weight"), x.abs()).qparams().qmin == -8
