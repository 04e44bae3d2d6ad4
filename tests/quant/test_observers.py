"""Observers against published figures, the library's own statistics and a brute-force search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsr_plugin.quant import observers
from qsr_plugin.quant.observers import Observer, build_observer, minmax, omse, percentile, quantiles, sample_max

BATCHES = [torch.tensor(b) for b in ([-1.0, 0.0, 2.0, 5.0], [-3.0, 1.0, 4.0], [-0.5, 0.5])]


def trajectory(name: str, alpha: float = 0.99) -> list[tuple[float, float]]:
    observer, seen = build_observer(name, momentum=0.9, alpha=alpha, bits=4), []
    for batch in BATCHES:
        observer.update(batch)
        seen.append(tuple(value.item() for value in observer.range()))
    return seen


def test_published_minmax_and_percentile_trajectories() -> None:
    assert np.allclose(trajectory("minmax"), [(-1, 5), (-1.2, 4.9), (-1.13, 4.46)], atol=1e-6)
    assert np.allclose(trajectory("percentile"), [(-0.97, 4.91), (-1.165, 4.813), (-1.0975, 4.380699)], atol=1e-6)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60), st.floats(0, 1))
def test_quantile_equals_torch(numbers: list[float], q: float) -> None:
    x = torch.tensor(numbers)
    assert quantiles(x, q)[0].item() == pytest.approx(torch.quantile(x.double(), q).item(), abs=1e-4, rel=1e-5)


def test_quantile_of_more_elements_than_torch_takes() -> None:
    count = 2**24 + 5
    x = torch.arange(count, dtype=torch.float64).mul_(0.3819660112501051).frac_().float()  # spread evenly, not sorted
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x, 0.99)
    position = 0.99 * (count - 1)
    ordered = np.partition(x.numpy(), [int(position), int(position) + 1])
    low, high = ordered[int(position)], ordered[int(position) + 1]
    assert float(low) <= quantiles(x, 0.99)[0].item() <= float(high)


def test_sample_max_is_the_mean_of_the_samples_not_the_batch_maximum() -> None:
    batch = torch.tensor([[[[1.0, -3.0], [0.5, 2.0]]], [[[0.2, -1.0], [0.4, 0.6]]]])
    low, high = sample_max(batch)
    assert (low.item(), high.item()) == (-2.0, 2.0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_omse_is_the_first_best_of_its_candidates(bits: int) -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(bits)) ** 3
    low, high = minmax(x)
    steps, errors = 2**bits - 1, []
    for i in range(90):
        lo, hi = low * (1 - 0.01 * i), high * (1 - 0.01 * i)
        s = (hi - lo) / steps
        errors.append(((((x.clamp(lo, hi) - lo) / s).round() * s + lo) - x).square().mean().item())
    found_low, found_high = omse(x, low, high, bits, 90)
    best = int(np.argmin(errors))
    assert best > 0, "an example on which the search has something to find"
    assert found_high.item() == pytest.approx(high.item() * (1 - 0.01 * best))
    assert found_low.item() == pytest.approx(low.item() * (1 - 0.01 * best))


def test_omse_in_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) ** 3
    whole = [omse(x, *minmax(x), bits, 90) for bits in (2, 3, 4, 6)]
    monkeypatch.setattr(observers, "CACHED", 192)
    assert [omse(x, *minmax(x), bits, 90) for bits in (2, 3, 4, 6)] == whole


def test_omse_of_equal_candidates_keeps_the_widest() -> None:
    # Zero is a level of every candidate, so all of them have no error at all.
    low, high = omse(torch.zeros(5), torch.tensor(0.0), torch.tensor(1.0), 2, 90)
    assert (low.item(), high.item()) == (0.0, 1.0)


def test_zero_momentum_keeps_the_latest_batch_only() -> None:
    observer = Observer(minmax, momentum=0.0)
    for batch in BATCHES:
        observer.update(batch)
    assert [value.item() for value in observer.range()] == [-0.5, 0.5]


@pytest.mark.parametrize("name", ["minmax", "percentile", "omse", "sample_max"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_single_non_finite_value_is_refused(name: str, bad: float) -> None:
    observer = build_observer(name, momentum=0.9, alpha=0.99, bits=4)
    batch = torch.zeros(1, 1000)
    batch[0, 500] = bad
    with pytest.raises(ValueError, match="non-finite"):
        observer.update(batch)


def test_what_cannot_be_observed_says_so() -> None:
    with pytest.raises(ValueError, match="empty tensor"):
        Observer(minmax, 0.9).update(torch.zeros(0, 3))
    with pytest.raises(RuntimeError, match="nothing was observed"):
        Observer(minmax, 0.9).range()
    with pytest.raises(ValueError, match="Did you mean 'minmax'"):
        build_observer("minmx", momentum=0.9, alpha=0.99, bits=4)


def test_constant_data_give_a_range_of_zero_width() -> None:
    assert [v.item() for v in percentile(torch.full((7,), 2.5))] == [2.5, 2.5]
    low, high = omse(torch.full((7,), 2.5), torch.tensor(2.5), torch.tensor(2.5), 4, 90)
    assert bool(torch.isfinite(low) & torch.isfinite(high))
