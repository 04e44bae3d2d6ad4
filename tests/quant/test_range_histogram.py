"""The streaming histogram: nothing gets lost, whatever the order and the ranges of the tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsr_plugin.quant.range_histogram import RangeHistogram


def of(*batches: Tensor, bins: int = 64) -> RangeHistogram:
    histogram = RangeHistogram(bins)
    for batch in batches:
        histogram.add(batch)
    return histogram


def test_one_tensor_has_the_bins_between_its_extremes() -> None:
    got = of(torch.tensor([[0.0, 0.5, 1.0], [1.5, 4.0, 3.9]]), bins=4)
    assert got.counts.tolist() == [2, 2, 0, 2]
    assert got.edges.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert got.centres.tolist() == [0.5, 1.5, 2.5, 3.5]


def test_bins_are_appended_on_the_side_that_is_exceeded_until_there_are_twice_as_many() -> None:
    got = of(torch.tensor([0.0, 0.5, 1.5, 4.0]), torch.tensor([-1.5, 5.5]), bins=4)
    assert got.counts.tolist() == [1, 0, 2, 1, 0, 1, 0, 1]
    assert got.edges.tolist() == [-1.5, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 5.5]
    got.add(torch.tensor([7.0]))
    assert got.counts.tolist() == [1, 3, 1, 1, 1] and got.edges.tolist() == [-1.5, 0.0, 2.0, 4.0, 6.0, 7.0]


@pytest.mark.parametrize("growth", [1.0, 1.3, 3.0, 1e6])
def test_many_tensors_agree_with_a_count_at_the_same_edges(growth: float) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(500, generator=generator) * growth**power for power in range(5)]
    got, everything = of(*batches), torch.cat(batches)
    assert 64 <= got.counts.numel() <= 128 and int(got.counts.sum()) == 2500
    assert torch.equal(got.low, everything.min()) and torch.equal(got.high, everything.max())
    inner = got.edges[1:-1]
    below = (everything < inner.unsqueeze(1)).sum(1)
    assert bool(((got.counts.cumsum(0)[:-1] - below).abs() <= 1).all())


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_values_next_to_each_other_far_from_zero_are_all_counted(scale: float) -> None:
    batches = [torch.tensor([1000.0, 1000.0001]) * scale, torch.linspace(999.9, 1000.3, 1000) * scale]
    got = of(*batches, bins=2048)
    assert int(got.counts.sum()) == 1002


def test_equal_values_are_one_bin_that_later_ones_divide() -> None:
    got = of(torch.full((3,), 2.0), torch.full((4,), 2.0), bins=4)
    assert got.counts.tolist() == [7] and got.edges.tolist() == [2.0, 2.0]
    got.add(torch.tensor([0.0, 4.0, 3.5]))
    assert got.counts.tolist() == [1, 0, 7, 2]
    only = of(torch.full((3,), 2.0), torch.full((2,), 5.0), bins=4)
    assert only.counts.tolist() == [3, 0, 0, 2]


def test_counts_beyond_the_integers_of_float32_are_exact() -> None:
    """2^24 + 1 is no float32."""
    got = of(torch.tensor([0.0, 1.0]), torch.zeros(2**24 + 1), bins=4)
    assert int(got.counts[0]) == 2**24 + 2
