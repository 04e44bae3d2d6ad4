"""Properties that every registered quantizer has; a new one is tested by being registered."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qsr_plugin.quant.quantizer import (
    QUANTIZERS,
    NotCalibratedError,
    StrictOptions,
    quantizer_class,
    register_quantizer,
)
from tests.quant.builders import ACT_NAMES, NAMES, bounds, build, data

BITS = (2, 3, 4, 8)
every = pytest.mark.parametrize("name", NAMES)
layouts = pytest.mark.parametrize("layout", ["NCHW", "NLC"])
widths = pytest.mark.parametrize("bits", BITS)


@every
@layouts
@widths
@pytest.mark.parametrize("batch", [1, 3])
def test_values_lie_on_a_grid_of_at_most_two_to_the_bits_levels(name: str, layout: str, bits: int, batch: int) -> None:
    q, x = build(name, bits, layout), data(layout, batch)
    before = x.clone()
    y = q(x)
    low, high, step = bounds(q, x)
    assert torch.equal(x, before), "the input was changed in place"
    assert y.shape == x.shape and y.dtype == x.dtype
    assert y.unique().numel() <= 2**bits
    assert torch.allclose(((y.double() - low) / step).round() * step + low, y.double(), atol=1e-5)
    inside = (x >= low) & (x <= high)
    assert ((y - x).abs()[inside] <= step / 2 + 1e-5).all(), "off by more than half a step inside the range"
    assert torch.allclose(y[x < low].double(), torch.tensor(low).double(), atol=1e-5)
    assert torch.allclose(y[x > high].double(), torch.tensor(high).double(), atol=1e-5)
    if q.needs_calibration:
        assert not inside.all(), "the example clips something"


@every
@widths
def test_quantizing_twice_changes_nothing(name: str, bits: int) -> None:
    q = build(name, bits)
    once = q(data())
    assert torch.allclose(q(once), once, atol=1e-6)


@every
@layouts
@widths
def test_gradient_is_one_inside_and_zero_outside(name: str, layout: str, bits: int) -> None:
    q, x = build(name, bits, layout), data(layout).requires_grad_()
    low, high, _ = bounds(q, x)
    upstream = torch.linspace(0.5, 2, x.numel()).view_as(x)
    parameters = q.range_parameters()
    dx, *grads = torch.autograd.grad(q(x), [x, *parameters], upstream)
    inside = ((x >= low) & (x <= high)).float() if q.needs_calibration else torch.ones_like(x)
    assert torch.equal(dx, upstream * inside)
    for gradient in grads:
        assert bool(torch.isfinite(gradient).all()) and bool(gradient.abs().sum() > 0)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_the_float32_grid(name: str, dtype: torch.dtype) -> None:
    q, x = build(name), data().to(dtype)
    assert torch.equal(q(x), q(x.float()).to(dtype))


@every
def test_autocast_does_not_reach_the_arithmetic(name: str) -> None:
    q, x = build(name), data().requires_grad_()
    plain = torch.autograd.grad(q(x).square().sum(), [x, *q.range_parameters()])
    with torch.autocast("cpu", torch.bfloat16):
        y = q(x)
        inside = torch.autograd.grad(y.square().sum(), [x, *q.range_parameters()])
    assert y.dtype == torch.float32 and torch.equal(y, q(x))
    for a, b in zip(plain, inside):
        assert torch.equal(a, b)


@every
def test_state_dict_brings_range_and_calibration(name: str) -> None:
    q = build(name)
    cls = QUANTIZERS[name]
    fresh = cls(cls.Options(), (4,), q.role, q.channel_axis)
    if q.needs_calibration:
        assert not fresh.is_calibrated
        fresh.site = "body.0.input"
        with pytest.raises(NotCalibratedError, match=r"not calibrated: body\.0\.input.*calibrate"):
            fresh(data())
    state = {key: value.clone() for key, value in q.state_dict().items()}
    fresh.load_state_dict(state)
    assert fresh.is_calibrated and torch.equal(fresh(data()), q(data()))
    if q.needs_calibration:  # the flag travels in both directions
        empty = cls(cls.Options(), (4,), q.role, q.channel_axis)
        fresh.load_state_dict(empty.state_dict())
        assert not fresh.is_calibrated


@every
def test_copies_are_independent(name: str) -> None:
    q = build(name)
    twin, before = copy.deepcopy(q), q(data())
    twin.begin_calibration()
    twin.observe(data(seed=5) * 3)
    twin.end_calibration()
    assert torch.equal(q(data()), before)
    for parameter in twin.range_parameters():
        assert all(parameter is not own for own in q.range_parameters())
    if q.needs_calibration:
        assert not torch.equal(twin(data()), before)


@pytest.mark.parametrize("name", ACT_NAMES)
@layouts
def test_images_of_a_batch_do_not_see_each_other(name: str, layout: str) -> None:
    q, x = build(name, layout=layout), data(layout)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(q(x[order]), q(x)[order])
    assert torch.equal(torch.cat([q(one) for one in x.split(1)]), q(x))


class NoHostSync(TorchDispatchMode):
    """Fails where a value is copied to the host: ``.item()``, ``bool(tensor)``, data-dependent shapes."""

    FORBIDDEN = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not str(func).startswith(self.FORBIDDEN), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@every
def test_forward_and_backward_never_wait_for_the_device(name: str) -> None:
    q, x = build(name, (4, 8)), data().requires_grad_()
    with NoHostSync():
        q(x, 4).sum().backward()
        if q.role == "act":
            q(x, torch.tensor([4, 8, 4])).sum().backward()


def test_the_host_sync_guard_can_fail() -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
        bool(torch.ones(()) > 0)


@every
def test_projection_mends_any_range(name: str) -> None:
    q = build(name)
    for value in (-5.0, 0.0, 7.0):
        with torch.no_grad():
            for parameter in q.range_parameters():
                parameter.fill_(value)
        q.project()
        x = data().requires_grad_()
        y = q(x)
        gradients = torch.autograd.grad(y.sum(), [x, *q.range_parameters()])
        assert all(bool(torch.isfinite(t).all()) for t in (y, *gradients))
        if q.needs_calibration:
            low, high, step = bounds(q, x.detach())
            assert step > 0 and low < high


@every
def test_storage_counts_the_stored_numbers(name: str) -> None:
    q = build(name)
    numbers = sum(p.numel() for p in q.range_parameters()) or 1  # a range taken from the tensor is stored as one step
    assert q.extra_storage_bits() == 32 * numbers


def test_table_of_names() -> None:
    with pytest.raises(ValueError, match="Did you mean 'pams'"):
        quantizer_class("pam")
    with pytest.raises(ValueError, match="already registered by PAMSQuantizer"):
        register_quantizer("pams")(QUANTIZERS["maxabs"])
    with pytest.raises(ValueError, match="extra_forbidden|not permitted"):
        StrictOptions(something=1)
