"""The arithmetic: every result and gradient against a plain autograd reference written with element-wise operations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qsr_plugin.quant.ops import (
    at_bits,
    fake_quantize,
    grad_scale,
    int_limits,
    per_sample,
    quantize_levels,
    round_ste,
)

values = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=24)
widths = st.integers(2, 16)


def reference(x: Tensor, lower: Tensor, upper: Tensor, steps: Tensor | float) -> Tensor:
    """The textbook form, differentiated by autograd; minimum and maximum split the gradient on a bound."""
    clipped = torch.minimum(torch.maximum(x, lower), upper)
    t = (clipped - lower) / (upper - lower) * steps
    return (t + (torch.round(t) - t).detach()) / steps * (upper - lower) + lower


def gradients(out: Tensor, upstream: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, leaves, upstream))


@given(values)
def test_round_ste_rounds_half_to_even_and_passes_the_gradient(numbers: list[float]) -> None:
    x = torch.tensor(numbers, requires_grad=True)
    y = round_ste(x)
    assert y.tolist() == pytest.approx(np.rint(np.array(numbers, np.float32)).tolist(), abs=1e-6)
    assert gradients(y, torch.arange(1.0, x.numel() + 1), x)[0].tolist() == list(range(1, x.numel() + 1))


def test_grad_scale_is_the_identity_with_a_scaled_gradient() -> None:
    x = torch.tensor([1.0, -2.5], requires_grad=True)
    y = grad_scale(x, 0.125)
    assert torch.equal(y, x)
    assert gradients(y, torch.ones(2), x)[0].tolist() == [0.125, 0.125]


@pytest.mark.parametrize(
    ("bits", "signed", "narrow", "limits"),
    [(4, True, False, (-8, 7)), (4, True, True, (-7, 7)), (4, False, False, (0, 15)), (2, True, True, (-1, 1))],
)
def test_int_limits_of_a_number_and_of_a_tensor(bits: int, signed: bool, narrow: bool, limits: tuple) -> None:
    assert int_limits(bits, signed=signed, narrow=narrow) == limits
    for tensor in (torch.tensor([bits]), torch.tensor([float(bits)])):
        low, high = int_limits(tensor, signed=signed, narrow=narrow)
        assert (float(low), float(high)) == limits


@given(widths, st.integers(1, 40))
def test_int_limits_of_tensors_are_exact(bits: int, count: int) -> None:
    """A power of two that is off by one rounding error would break equality with the loop over samples."""
    for dtype in (torch.int64, torch.float32):
        low, high = int_limits(torch.full((count,), bits, dtype=dtype))
        assert (low == -(2.0 ** (bits - 1))).all() and (high == 2.0 ** (bits - 1) - 1).all()


def test_int_limits_of_a_real_width_carry_a_gradient() -> None:
    bits = torch.tensor(4.0, requires_grad=True)
    _, steps = int_limits(bits, signed=False)
    assert gradients(steps, torch.tensor(1.0), bits)[0].item() == pytest.approx(16 * math.log(2))


@given(values, st.floats(-2, -0.1), st.floats(0.1, 2), st.sampled_from([2, 3, 4, 8]))
def test_asymmetric_grid_equals_the_reference_with_all_gradients(
    numbers: list[float], low: float, high: float, bits: int
) -> None:
    x = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
    lower = torch.tensor(low, dtype=torch.float64, requires_grad=True)
    upper = torch.tensor(high, dtype=torch.float64, requires_grad=True)
    width = torch.tensor(float(bits), dtype=torch.float64, requires_grad=True)
    limits = int_limits(width, signed=False)
    got = fake_quantize(x, upper - lower, limits[1], limits, bounds=(lower, upper), anchor=lower.detach(), ties="split")
    want = reference(x, lower, upper, 2.0**width - 1)
    near_tie = ((((x - lower) / (upper - lower)) * (2**bits - 1)) % 1 - 0.5).abs() < 1e-6
    if bool(near_tie.any()):
        return  # the two orders of multiplication may fall on different sides of a rounding tie
    upstream = torch.linspace(-1, 2, x.numel(), dtype=torch.float64)
    assert torch.allclose(got, want, atol=1e-9)
    for a, b in zip(
        gradients(got, upstream, x, lower, upper, width), gradients(want, upstream, x, lower, upper, width)
    ):
        assert torch.allclose(a, b, atol=1e-7)


@given(values, st.floats(0.05, 3), st.sampled_from([2, 4, 8]))
def test_symmetric_grid_equals_the_reference_with_all_gradients(numbers: list[float], scale: float, bits: int) -> None:
    qmax = 2.0 ** (bits - 1) - 1
    x = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    if bool(((x * qmax / alpha) % 1 - 0.5).abs().lt(1e-6).any()):
        return
    got = fake_quantize(x, alpha, qmax, (-qmax, qmax), bounds=(-alpha, alpha), ties="split")
    clipped = torch.minimum(torch.maximum(x, -alpha), alpha)
    code = clipped * qmax / alpha
    want = (code + (torch.round(code) - code).detach()) * alpha / qmax
    upstream = torch.linspace(-1, 2, x.numel(), dtype=torch.float64)
    assert torch.allclose(got, want, atol=1e-9)
    for a, b in zip(gradients(got, upstream, x, alpha), gradients(want, upstream, x, alpha)):
        assert torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize(
    ("ties", "share", "clipped"), [("inside", 1, 0), ("split", 0.5, 0.5), ("outside", 0, 1), ("both", 1, 1)]
)
def test_elements_on_a_bound_count_as_asked(ties: str, share: float, clipped: float) -> None:
    x = torch.tensor([-1.0, 1.0], requires_grad=True)
    lower, upper = torch.tensor(-1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    y = fake_quantize(x, upper - lower, 3.0, (0.0, 3.0), bounds=(lower, upper), anchor=lower.detach(), ties=ties)
    dx, dl, du = gradients(y, torch.ones(2), x, lower, upper)
    assert dx.tolist() == [share, share]
    assert (dl.item(), du.item()) == (clipped, clipped)


@pytest.mark.parametrize("ties", ["inside", "split", "outside", "both"])
@pytest.mark.parametrize("width", [1.0, 1e-4, 1e-8, 1e-12])
@pytest.mark.parametrize("centre", [0.0, 1000.0])
def test_gradients_of_the_bounds_stay_exact_when_the_range_is_tiny_beside_the_data(
    width: float, centre: float, ties: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, generator=generator).mul(3).add(centre)
    upstream = torch.randint(-8, 9, (500,), generator=generator).float()
    lower = torch.tensor(centre, requires_grad=True)
    upper = torch.tensor(centre + width, requires_grad=True)
    grid = {"bounds": (lower, upper), "anchor": lower.detach(), "ties": ties}
    y = fake_quantize(x, torch.tensor(max(width, 1e-3)), 15.0, (0.0, 15.0), **grid)
    dl, du = gradients(y, upstream, lower, upper)
    assert du.item() == upstream[x > upper].sum().item()
    assert dl.item() == upstream[x < lower].sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steepness", [0.0, 1.0])
@pytest.mark.parametrize("ties", ["inside", "split", "outside", "both"])
@given(st.lists(st.sampled_from([-2.0, -1.25, -0.3, 0.0, 0.4, 0.7, 0.70000005, 0.69999995, 3.0]), min_size=1), values)
def test_bounds_of_one_number_and_bounds_of_every_element_agree(
    ties: str, steepness: float, dtype: torch.dtype, numbers: list[float], more: list[float]
) -> None:
    """The first have gradients of their own; elements lie on the bounds and one rounding error beside them."""
    x = torch.tensor(numbers + more, dtype=dtype, requires_grad=True)
    upstream = torch.arange(1.0, x.numel() + 1, dtype=dtype)
    found = []
    for shape in ((), x.shape):
        lower = torch.full(shape, -1.25, dtype=dtype, requires_grad=True)
        upper = torch.full(shape, 0.7, dtype=dtype, requires_grad=True)
        y = fake_quantize(x, upper - lower, 7.0, (-4.0, 3.0), bounds=(lower, upper), ties=ties, steepness=steepness)
        dx, *of_bounds = gradients(y, upstream, x, lower, upper)
        found.append((y, dx, *(grad.sum() for grad in of_bounds)))
    for one, every in zip(*found):
        assert torch.allclose(one, every, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steepness", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("ties", ["inside", "split", "outside"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("steps", [1.0, 7.0])
@settings(max_examples=30)
@given(st.lists(st.sampled_from([-2.0, -1.0, -0.3, 0.0, 0.4, 0.875, 0.875001, 0.874999, 3.0]), min_size=1), values)
def test_levels_are_a_grid_between_bounds_that_move_with_the_step(
    steps: float, signed: bool, ties: str, steepness: float, dtype: torch.dtype, numbers: list[float], more: list[float]
) -> None:
    x = torch.tensor(numbers + more, dtype=dtype, requires_grad=True)
    span = torch.tensor(0.125 * steps, dtype=dtype, requires_grad=True)
    upstream = torch.arange(1.0, x.numel() + 1, dtype=dtype)
    limits = int_limits(4, signed=signed)
    ends = tuple(limit / steps * span for limit in limits)
    levels = quantize_levels(x, span, steps, limits, ties=ties, steepness=steepness)
    grid = fake_quantize(x, span, steps, limits, bounds=ends, ties=ties, steepness=steepness)
    assert torch.equal(levels, grid)
    found, wanted = (gradients(out, upstream, x, span) for out in (levels, grid))
    assert torch.equal(found[0], wanted[0])
    size = (upstream * (x.detach().abs() + 2.0)).sum() / 0.125
    assert (found[1] - wanted[1]).abs() <= 1e-6 * size


@given(st.floats(2**-10, 1000.0, width=32))
def test_a_value_on_a_bound_that_is_the_span_counts_half(bound: float) -> None:
    """A largest magnitude that was taken from the data lies on its own bound."""
    x = torch.tensor([bound, -bound], requires_grad=True)
    levels = quantize_levels(x, torch.tensor(bound), 7.0, (-7.0, 7.0), ties="split")
    assert gradients(levels, torch.ones(2), x)[0].tolist() == [0.5, 0.5]


def test_the_step_of_dead_data_learns_from_what_comes_later() -> None:
    """Outliers a billion steps away still pull with the full slope of the bound."""
    step = torch.tensor(1e-9, requires_grad=True)
    x = torch.tensor([5.0, -3.0])
    levels = quantize_levels(x, step, 1.0, (-8.0, 7.0), ties="inside")
    assert gradients(levels, torch.tensor([1.0, 1.0]), step)[0].item() == pytest.approx(-1.0, rel=1e-5)


@pytest.mark.parametrize("shape", [(), (5, 1)])
def test_keeping_the_result_or_the_rounding_error_gives_the_same_to_the_last_bit(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 200, generator=generator, requires_grad=True)
    lower, upper = (torch.full(shape, bound, requires_grad=True) for bound in (-0.8, 1.1))
    upstream, found = torch.randn(5, 200, generator=generator), []
    for only_read in (False, True):
        y = fake_quantize(x, upper - lower, 15.0, (-8.0, 7.0), bounds=(lower, upper), shift=-1.0, only_read=only_read)
        found.append((y, *gradients(y, upstream, x, lower, upper)))
    assert all(torch.equal(*pair) for pair in zip(*found))


def test_changed_levels_are_refused_by_the_backward_pass() -> None:
    levels = quantize_levels(torch.rand(8, requires_grad=True), torch.tensor(0.1), 1.0, (0.0, 15.0), ties="inside")
    levels.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        levels.sum().backward()


def test_without_bounds_nothing_is_clipped() -> None:
    x = torch.tensor([5.0, -5.2], requires_grad=True)
    for limits, want in ((None, [5.0, -36 / 7]), ((-7.0, 7.0), [1.0, -1.0])):  # limited codes pass the gradient as well
        y = fake_quantize(x, torch.tensor(1.0), 7.0, limits)
        assert y.tolist() == pytest.approx(want)
        assert gradients(y, torch.ones(2), x)[0].tolist() == [1.0, 1.0]


def test_gradients_of_ranges_per_channel_and_per_sample_sum_over_the_broadcast_axes() -> None:
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    for shape in ((1, 2, 1, 1), (3, 1, 1, 1), (2, 1, 1), ()):
        alpha = torch.full(shape, 0.8, dtype=torch.float64, requires_grad=True)
        together = fake_quantize(x, alpha, 7.0, (-7.0, 7.0), bounds=(-alpha, alpha))
        (grad,) = gradients(together, torch.ones_like(x), alpha)
        each = alpha.detach().expand_as(x).clone().requires_grad_()
        apart = fake_quantize(x, each, 7.0, (-7.0, 7.0), bounds=(-each, each))
        assert grad.shape == alpha.shape
        assert torch.allclose(grad, gradients(apart, torch.ones_like(x), each)[0].sum_to_size(shape))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_memory_layout_does_not_matter(layout: str) -> None:
    plain = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    x = plain.clone()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        x = plain.transpose(2, 3).contiguous().transpose(2, 3)
    results = []
    for tensor in (plain.requires_grad_(), x.requires_grad_()):
        alpha = torch.tensor(0.9, requires_grad=True)
        y = fake_quantize(tensor, alpha, 7.0, (-7.0, 7.0), bounds=(-alpha, alpha))
        results.append([y, *gradients(y, torch.arange(y.numel()).view_as(y).float(), tensor, alpha)])
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-5)


def test_result_may_be_changed_in_place_before_the_backward_pass() -> None:
    """An in-place ReLU or ``+=`` after a quantizer is ordinary code in a backbone."""
    grads = []
    for act in (torch.relu, torch.relu_):
        x = torch.linspace(-2, 2, 9, requires_grad=True)
        alpha = torch.tensor(1.0, requires_grad=True)
        act(fake_quantize(x, alpha, 7.0, (-7.0, 7.0), bounds=(-alpha, alpha))).sum().backward()
        grads.append((x.grad, alpha.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_rounded_in_float32(dtype: torch.dtype) -> None:
    x = torch.linspace(-2, 2, 41).to(dtype)
    alpha = torch.tensor(1.3)
    y = fake_quantize(x, alpha, 127.0, (-127.0, 127.0), bounds=(-alpha, alpha))
    wide = fake_quantize(x.float(), alpha, 127.0, (-127.0, 127.0), bounds=(-alpha, alpha))
    assert y.dtype == dtype and torch.equal(y, wide.to(dtype))


def test_per_sample_repeats_for_folded_windows_and_refuses_what_does_not_fit() -> None:
    shaped = per_sample(torch.tensor([4, 8]), torch.zeros(6, 5, 3))
    assert shaped.shape == (6, 1, 1) and shaped.flatten().tolist() == [4, 4, 4, 8, 8, 8]
    with pytest.raises(ValueError, match="2 image.s. do not fit a batch of 5"):
        per_sample(torch.tensor([4, 8]), torch.zeros(5, 3))


def test_numbers_per_candidate_are_found_by_bit_width() -> None:
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    assert at_bits(values, (4, 6, 8), 6).item() == 2.0
    for bits in (torch.tensor([8, 4, 8]), torch.tensor([8 - 1e-6, 4 + 1e-6, 8])):
        found = at_bits(values, (4, 6, 8), bits)
        assert found.tolist() == [4.0, 1.0, 4.0]
        assert gradients(found, torch.ones(3), values)[0].tolist() == [1.0, 0.0, 2.0]
