"""Static ranges against published figures, gradients of values, bounds and bits included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qsr_plugin.methods.minmax_percentile import AsymmetricQuantizer, SymmetricQuantizer, ZeroLevelQuantizer
from tests.methods.asymmetric_examples import EXAMPLES, NAMES
from tests.quant.builders import observed

WEIGHT = torch.tensor([0.05, -0.1, 0.2, 0.3, -0.35, 0.9, -1.1, 0.12])


def close(got: Tensor, want: list | float, digits: int = 6) -> None:
    assert torch.allclose(got.detach().flatten(), torch.tensor(want).flatten(), atol=1.01 * 10**-digits, rtol=0), got


def asymmetric(
    low: float, high: float, bits: int = 4, kind: type[AsymmetricQuantizer] = AsymmetricQuantizer
) -> AsymmetricQuantizer:
    q = kind(kind.Options(), (bits,), "act", 1)
    with torch.no_grad():
        q.set_range(torch.tensor(low), torch.tensor(high))
    q.mark_calibrated()
    return q


def symmetric(bits: int = 4, **options: object) -> SymmetricQuantizer:
    return SymmetricQuantizer(SymmetricQuantizer.Options(**options), (bits,), "weight", 0)


@pytest.mark.parametrize(NAMES, EXAMPLES)
def test_activations_with_the_gradient_of_the_bits(low, high, bits, x, values, dx, dl, du, db) -> None:
    q = asymmetric(low, high, bits)
    x, width = torch.tensor(x, requires_grad=True), torch.tensor(float(bits), requires_grad=True)
    out = q(x, width)
    close(out, values)
    close(q(x), values)
    grads = torch.autograd.grad(out.sum(), (x, q.lower, q.upper, width))
    for got, want in zip(grads, (dx, dl, du, db)):
        close(got, [float(v) for v in want] if isinstance(want, list) else want)


def test_gradient_table_element_by_element() -> None:
    """Below: (0, 1, 0, 0); inside: (1, t - r, r - t, span (t - r) / n 2^b ln 2); above: (0, 0, 1, 0)."""
    low, high, bits, n = -0.6, 1.2, 3, 7
    q = asymmetric(low, high, bits)
    width = torch.tensor(float(bits), requires_grad=True)
    for value in (-2.0, -0.59, -0.1, 0.4, 0.77, 1.19, 1.3):
        x = torch.tensor([value], requires_grad=True)
        got = torch.autograd.grad(q(x, width).sum(), (x, q.lower, q.upper, width))
        t = (value - low) / (high - low)
        r = round(t * n) / n
        inside = (1.0, t - r, r - t, (high - low) * (t - r) / n * 2**bits * math.log(2))
        want = (0.0, 1.0, 0.0, 0.0) if value < low else (0.0, 0.0, 1.0, 0.0) if value > high else inside
        for a, b in zip(got, want):
            close(a, b, digits=5)


def test_gradient_of_the_bits_is_kept_apart_per_image() -> None:
    q = AsymmetricQuantizer(AsymmetricQuantizer.Options(), (3, 4, 5), "act", 1)
    with torch.no_grad():
        q.set_range(torch.tensor(-0.6), torch.tensor(1.2))
    q.mark_calibrated()
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    widths = torch.tensor([3.0, 5.0, 4.0], requires_grad=True)
    (together,) = torch.autograd.grad(q(x, widths).sum(), widths)
    for i, bits in enumerate((3.0, 5.0, 4.0)):
        one = torch.tensor([bits], requires_grad=True)
        close(torch.autograd.grad(q(x[i : i + 1], one).sum(), one)[0], together[i].item(), digits=5)
    windows = x.repeat_interleave(2, dim=0)
    close(torch.autograd.grad(q(windows, widths).sum(), widths)[0], (2 * together).tolist(), digits=4)


def test_exactly_on_a_bound_counts_as_inside() -> None:
    q, x = asymmetric(-0.5, 1.0), torch.tensor([-0.5, 1.0], requires_grad=True)
    dx, dl, du = torch.autograd.grad(q(x).sum(), (x, q.lower, q.upper))
    assert dx.tolist() == [1.0, 1.0]
    close(torch.stack([dl, du]), [0.0, 0.0])


@pytest.mark.parametrize(
    ("low", "high", "zero", "levels"),
    [
        (-0.6, 1.2, 2, [-0.514286, 1.285714]),  # step 1.8 / 7; -0.6 is 2.33 steps
        (0.2, 1.4, 0, [0.0, 1.4]),  # zero is taken in
        (-1.4, -0.7, 7, [-1.4, 0.0]),
        (0.0, 0.7, 0, [0.0, 0.7]),
    ],
)
def test_zero_is_a_level_of_its_grid(low: float, high: float, zero: int, levels: list[float]) -> None:
    q = asymmetric(low, high, 3, ZeroLevelQuantizer)
    grid = q.qparams()
    close(torch.stack([grid.zero_point, (q.upper - q.lower) / 7]), [zero, grid.scale.item()])
    close(q(torch.tensor([-9.0, 9.0])), levels)
    assert q(torch.zeros(1)).item() == 0
    x = 4 * torch.rand(401, generator=torch.Generator().manual_seed(0)) - 2  # none halfway between two levels
    codes = torch.clamp(torch.round(x / grid.scale), -zero, 7 - zero)
    close(q(x), (codes * grid.scale).tolist())


def test_gradients_between_the_moved_bounds() -> None:
    """Inside, with step s = (u - l) / 7: (1, (x - x_q) / (u - l), (x_q - x) / (u - l)); beyond a bound it alone gets 1."""
    q = asymmetric(-0.6, 1.2, 3, ZeroLevelQuantizer)
    for value, outside in ((-0.55, (0.0, 1.0, 0.0)), (-0.4, None), (1.25, None), (1.3, (0.0, 0.0, 1.0))):
        x = torch.tensor([value], requires_grad=True)
        out = q(x)
        slope = (out.item() - value) / 1.8
        grads = torch.autograd.grad(out.sum(), (x, q.lower, q.upper))
        close(torch.stack([grad.sum() for grad in grads]), list(outside or (1.0, -slope, slope)), 5)


def test_training_keeps_zero_between_the_bounds() -> None:
    q = asymmetric(-0.1, 0.1, 4, ZeroLevelQuantizer)
    with torch.no_grad():
        q.lower.fill_(0.3)
        q.upper.fill_(0.2)
    q.project()
    assert q.lower.item() == 0 and abs(q.upper.item() - 0.2) < 1e-6 and q(torch.zeros(1)).item() == 0


def test_weights() -> None:
    q = observed(symmetric(4), torch.tensor([0.5]))
    w = torch.tensor([-0.9, -0.1, 0.0, 0.25, 0.31, 0.8], requires_grad=True)
    out = q(w)
    close(out, [-0.5, -0.1, 0.033333, 0.233333, 0.3, 0.5])
    dw, du = torch.autograd.grad(out.sum(), (w, q.bound))
    assert dw.tolist() == [0, 1, 1, 1, 1, 0]
    close(du, 0.013333)


def test_gradient_of_the_weight_bound_element_by_element() -> None:
    q = observed(symmetric(4), torch.tensor([0.5]))
    for value in (-0.9, -0.44, -0.1, 0.25, 0.31, 0.8):
        t = (value + 0.5) / 1.0
        inside = 2 * (round(t * 15) / 15 - t)
        want = -1.0 if value < -0.5 else 1.0 if value > 0.5 else inside
        w = torch.tensor([value])
        close(torch.autograd.grad(q(w).sum(), q.bound)[0], want)


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"observer": "minmax"}, 1.10),
        ({"observer": "minmax", "reference": "signed"}, 1.10),
        ({"observer": "omse", "reference": "signed"}, 0.90),
        ({"observer": "percentile", "reference": "signed"}, 0.858),
        ({"observer": "percentile"}, 1.086),
    ],
)
def test_weight_bounds(options: dict, bound: float) -> None:
    close(observed(symmetric(4, **options), WEIGHT).bound, bound)


def test_omse_bound_is_never_worse_than_the_largest_magnitude() -> None:
    weight = torch.randn(200, generator=torch.Generator().manual_seed(0)) ** 3
    error = {}
    for observer in ("minmax", "omse"):
        error[observer] = (observed(symmetric(3, observer=observer), weight)(weight) - weight).square().mean().item()
    assert error["omse"] < error["minmax"]


@pytest.mark.parametrize(("observer", "bounds"), [("minmax", (-1.13, 4.46)), ("percentile", (-1.0975, 4.380699))])
def test_activation_bounds_over_three_batches(observer: str, bounds: tuple) -> None:
    q = AsymmetricQuantizer(AsymmetricQuantizer.Options(observer=observer), (4,), "act", 1)
    q.begin_calibration()
    for batch in ([-1.0, 0.0, 2.0, 5.0], [-3.0, 1.0, 4.0], [-0.5, 0.5]):
        q.observe(torch.tensor(batch))
    q.end_calibration()
    close(torch.stack([q.lower, q.upper]), list(bounds))


def test_integer_grid_describes_the_quantizer() -> None:
    q = asymmetric(-0.25, 1.5)
    p = q.qparams()
    assert (p.qmin, p.qmax) == (0, 15)
    x = torch.linspace(-1, 2, 50)
    codes = (x / p.scale + p.zero_point).round().clamp(p.qmin, p.qmax)
    close(q(x), ((codes - p.zero_point) * p.scale).tolist())


def test_upper_bound_stays_above_the_lower_one_wherever_they_are() -> None:
    for value in (0.0, 1e-9, 3.0, -3.0, 1e4, -1e4):
        q = asymmetric(value, value, bits=8)
        x = torch.full((4,), value, requires_grad=True)
        out = q(x)
        assert q.upper > q.lower
        assert torch.allclose(out, x, atol=1e-5 * max(1.0, abs(value)))
        grads = torch.autograd.grad(out.sum(), (x, q.lower, q.upper))
        assert all(bool(torch.isfinite(g).all()) for g in grads)
