"""Properties that every registered quantizer has in every role; a new one is tested by being registered."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qsr_plugin.quant import passes
from qsr_plugin.quant.quantizer import (
    QUANTIZERS,
    NotCalibratedError,
    StrictOptions,
    quantizer_class,
    register_quantizer,
)
from tests.quant import builders
from tests.quant.builders import (
    ACTS,
    CLIPPING,
    LEARNING,
    PAIRS,
    SLOPES,
    STORED,
    UNIFORM,
    bounds,
    build,
    calibrate_on,
    data,
    make,
    over,
    ranges,
)

pytestmark = pytest.mark.usefixtures("both_uses")

BITS = (2, 3, 4, 8)
layouts = pytest.mark.parametrize("layout", ["NCHW", "NLC"])
widths = pytest.mark.parametrize("bits", BITS)


def spread(layout: str, batch: int = 3) -> Tensor:
    """Data with two values that no calibrated range reaches."""
    x = data(layout, batch)
    x.view(-1)[:2] = torch.tensor([-60.0, 60.0])
    return x


def within(x: Tensor, low: float, high: float) -> Tensor:
    """Elements inside the range, up to the rounding of its ends."""
    room = 1e-6 * max(abs(low), abs(high))
    return (x >= low - room) & (x <= high + room)


@over()
@layouts
@widths
@pytest.mark.parametrize("batch", [1, 3])
def test_shape_and_number_of_levels(name: str, role: str, layout: str, bits: int, batch: int) -> None:
    batch = batch if role == "act" else 3  # the first axis of a weight counts channels
    q, x = build(name, bits, layout, role=role), data(layout, batch)
    before = x.clone()
    y = q(x)
    assert torch.equal(x, before), "the input was changed in place"
    assert y.shape == x.shape and y.dtype == x.dtype and bool(torch.isfinite(y).all())
    assert all(part.unique().numel() <= 2**bits for part in ranges(q, y))
    assert y.unique().numel() > 2, "the example uses the grid"


@over(UNIFORM)
@layouts
@widths
def test_values_are_on_the_grid(name: str, role: str, layout: str, bits: int) -> None:
    """Half a step off at most inside the range, at its ends outside."""
    q, x = build(name, bits, layout, role=role), spread(layout)
    y = q(x)
    low, high, step = bounds(q, x)
    assert torch.allclose(((y.double() - low) / step).round() * step + low, y.double(), atol=1e-5)
    inside = within(x, low, high)
    assert ((y - x).abs()[inside] <= step / 2 + 1e-5).all(), "off by more than half a step inside the range"
    assert torch.allclose(y[~inside & (x < 0)].double(), torch.tensor(low).double(), atol=1e-5)
    assert torch.allclose(y[~inside & (x > 0)].double(), torch.tensor(high).double(), atol=1e-5)
    if (name, role) in CLIPPING:
        assert not inside.all(), "the example clips something"


@over(UNIFORM)
@widths
def test_quantizing_twice_changes_nothing(name: str, role: str, bits: int) -> None:
    q = build(name, bits, role=role)
    once = q(data())
    assert torch.allclose(q(once), once, atol=1e-6)


@over(UNIFORM)
@layouts
@widths
def test_gradient_is_one_inside_and_zero_outside(name: str, role: str, layout: str, bits: int) -> None:
    q, x = build(name, bits, layout, role=role), spread(layout).requires_grad_()
    low, high, step = bounds(q, x)
    upstream = torch.linspace(0.5, 2, x.numel()).view_as(x)
    (dx,) = torch.autograd.grad(q(x), x, upstream)
    slope = SLOPES[name](x.detach(), low, high, step) if name in SLOPES else within(x, low, high).float()
    assert torch.allclose(dx, upstream * slope, rtol=1e-4, atol=1e-5)


@over()
@layouts
@widths
def test_every_parameter_gets_a_finite_gradient(name: str, role: str, layout: str, bits: int) -> None:
    q, x = build(name, bits, layout, role=role), data(layout).requires_grad_()
    idle = {id(p) for p in q.idle_parameters()}
    parameters = [p for p in q.parameters() if id(p) not in idle]
    upstream = torch.linspace(0.5, 2, x.numel()).view_as(x)
    for gradient in torch.autograd.grad(q(x), [x, *parameters], upstream):
        assert bool(torch.isfinite(gradient).all()) and bool(gradient.abs().sum() > 0)


@over()
@layouts
@widths
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_the_float32_grid(name, role, layout, bits, dtype: torch.dtype) -> None:
    q, x = build(name, bits, layout, role=role), data(layout).to(dtype)
    with torch.autocast("cpu", dtype):
        y = q(x)
    assert y.dtype == dtype and torch.equal(y, q(x.float()).to(dtype))


@over()
def test_autocast_does_not_reach_the_arithmetic(name: str, role: str) -> None:
    q, x = build(name, role=role), data().requires_grad_()
    plain = torch.autograd.grad(q(x).square().sum(), [x, *q.range_parameters()])
    with torch.autocast("cpu", torch.bfloat16):
        y = q(x)
        inside = torch.autograd.grad(y.square().sum(), [x, *q.range_parameters()])
    assert y.dtype == torch.float32 and torch.equal(y, q(x))
    for a, b in zip(plain, inside):
        assert torch.equal(a, b)


@over()
def test_state_dict_brings_range_and_calibration(name: str, role: str) -> None:
    q, fresh = build(name, role=role), make(name, role)
    if q.needs_calibration:
        assert not fresh.is_calibrated
        fresh.site = "body.0.input"
        with pytest.raises(NotCalibratedError, match=r"not calibrated: body\.0\.input.*calibrate"):
            fresh(data())
    state = {key: value.clone() for key, value in q.state_dict().items()}
    fresh.load_state_dict(state)
    assert fresh.is_calibrated and torch.equal(fresh(data()), q(data()))
    if q.needs_calibration:  # the flag travels in both directions
        fresh.load_state_dict(make(name, role).state_dict())
        assert not fresh.is_calibrated


@over(ACTS)
def test_state_dict_brings_what_calibration_decided(name: str, role: str) -> None:
    """A quantizer calibrated on values of one sign, loaded into one that saw both signs, and the reverse."""
    for first, second in ((data(), data().abs()), (data().abs(), data())):
        q, other = calibrate_on(make(name, role), first), calibrate_on(make(name, role), second)
        want = q(data())
        other.load_state_dict(q.state_dict())
        assert torch.equal(other(data()), want)
        follower = copy.deepcopy(calibrate_on(make(name, role), second))
        for mine, theirs in zip([*follower.parameters(), *follower.buffers()], [*q.parameters(), *q.buffers()]):
            mine.data.copy_(theirs)
        follower.follow(q)
        assert torch.equal(follower(data()), want)


@over()
def test_copies_are_independent(name: str, role: str) -> None:
    q = build(name, role=role)
    twin, before = copy.deepcopy(q), q(data())
    calibrate_on(twin, data(seed=5) * 3)
    assert torch.equal(q(data()), before)
    for parameter in twin.parameters():
        assert all(parameter is not own for own in q.parameters())
    if q.needs_calibration:
        assert not torch.equal(twin(data()), before)


@over(ACTS)
@layouts
def test_permuting_the_batch_permutes_the_result(name: str, role: str, layout: str) -> None:
    q, x = build(name, layout=layout, role=role), data(layout)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(q(x[order]), q(x)[order])


@over(ACTS)
@layouts
def test_a_batch_equals_its_images_one_by_one(name: str, role: str, layout: str) -> None:
    q, x = build(name, layout=layout, role=role), data(layout)
    assert torch.equal(torch.cat([q(one) for one in x.split(1)]), q(x))


class NoHostSync(TorchDispatchMode):
    """Fails where a value is copied to the host: ``.item()``, ``bool(tensor)``, data-dependent shapes.

    What the arithmetic does on a CPU alone, where such copies are free, is replaced by what it does on a device.
    """

    FORBIDDEN = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select")

    def __enter__(self):
        self.as_on_a_device = mock.patch.object(passes, "_reads_are_free", lambda x: False)
        self.as_on_a_device.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.as_on_a_device.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not str(func).startswith(self.FORBIDDEN), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@over()
def test_forward_and_backward_never_wait_for_the_device(name: str, role: str) -> None:
    q, x = build(name, (4, 8), role=role), data().requires_grad_()
    with NoHostSync():
        q(x, 4).sum().backward()
        if role == "act":
            q(x, torch.tensor([4, 8, 4])).sum().backward()


def test_the_host_sync_guard_can_fail() -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
        bool(torch.ones(()) > 0)


def assert_legal(q, name: str, role: str) -> None:
    x = data().requires_grad_()
    y = q(x)
    gradients = torch.autograd.grad(y.sum(), [x, *q.range_parameters()])
    assert all(bool(torch.isfinite(t).all()) for t in (y, *gradients))
    if (name, role) in UNIFORM:
        low, high, step = bounds(q, x.detach())
        assert step > 0 and low < high


@over(LEARNING)
@pytest.mark.parametrize("value", [-5.0, 0.0, 7.0])
def test_projection_mends_any_range(name: str, role: str, value: float) -> None:
    q = build(name, role=role)
    with torch.no_grad():
        for parameter in q.range_parameters():
            parameter.fill_(value)
    q.project()
    assert_legal(q, name, role)


@over(LEARNING)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_huge_learning_rate_leaves_a_legal_range(name: str, role: str, sign: float) -> None:
    q = build(name, role=role)
    optimiser = torch.optim.SGD(q.range_parameters(), lr=1e6)
    for step in range(3):
        optimiser.zero_grad()
        (sign * q(data(seed=step)).square().sum()).backward()
        optimiser.step()
        q.project()
        assert_legal(q, name, role)


@over()
def test_storage_counts_the_stored_numbers(name: str, role: str) -> None:
    q = build(name, role=role)
    numbers = STORED.get((name, role), sum(p.numel() for p in q.parameters()) or 1)
    assert q.extra_storage_bits() == 32 * numbers


def test_exceptions_name_what_exists() -> None:
    from tests.faults import test_numeric
    from tests.quant import test_per_sample_bits

    known = {*globals(), *vars(test_per_sample_bits), *vars(test_numeric)}
    for name, role, test in builders.EXCEPTIONS:
        assert (name, role) in PAIRS and test in known, f"stale exception {name}, {role}, {test}"
    assert set(SLOPES) <= set(QUANTIZERS) and set(STORED) <= set(PAIRS)


def test_table_of_names() -> None:
    with pytest.raises(ValueError, match="Did you mean 'pams'"):
        quantizer_class("pam")
    with pytest.raises(ValueError, match="already registered by PAMSQuantizer"):
        register_quantizer("pams")(QUANTIZERS["maxabs"])
    with pytest.raises(ValueError, match="extra_forbidden|not permitted"):
        StrictOptions(something=1)
