"""One bit width per image: equal, bit for bit, to quantizing image after image."""

from __future__ import annotations

import pytest
import torch

from tests.quant.builders import ACTS, build, data, over

pytestmark = pytest.mark.usefixtures("both_uses")

CANDIDATES = (2, 3, 4, 8)


@over(ACTS)
@pytest.mark.parametrize("layout", ["NCHW", "NLC"])
@pytest.mark.parametrize("windows", [1, 4])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_equals_the_loop_over_images(name: str, role: str, layout: str, windows: int, dtype: torch.dtype) -> None:
    q = build(name, CANDIDATES, layout, role=role)
    widths = [8, 2, 4, 3, 3, 8, 2, 4, 8]
    x = data(layout, batch=len(widths) * windows).requires_grad_()
    together = q(x, torch.tensor(widths, dtype=dtype))
    apart = torch.cat([q(part, bits) for part, bits in zip(x.split(windows), widths)])
    assert torch.equal(together, apart)
    upstream = torch.linspace(-1, 1, x.numel()).view_as(x)
    leaves = [x, *q.range_parameters()]
    for a, b in zip(torch.autograd.grad(together, leaves, upstream), torch.autograd.grad(apart, leaves, upstream)):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@over(ACTS)
def test_one_width_as_number_scalar_tensor_and_vector_agree(name: str, role: str) -> None:
    q, x = build(name, CANDIDATES, role=role), data()
    want = q(x, 4)
    assert torch.equal(q(x, torch.tensor(4)), want)
    assert torch.equal(q(x, torch.full((3,), 4)), want)


@over(ACTS)
def test_widths_that_do_not_fit_the_batch_are_refused(name: str, role: str) -> None:
    with pytest.raises(ValueError, match="do not fit a batch of 3"):
        build(name, CANDIDATES, role=role)(data(), torch.tensor([4, 8]))


@over(ACTS)
def test_all_widths_share_one_calibration(name: str, role: str) -> None:
    q, x = build(name, CANDIDATES, role=role), data() * 0.2  # well inside every range
    errors = [(q(x, bits) - x).abs().mean().item() for bits in CANDIDATES]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0
