"""Density-based dual clipping: what is clipped where, by hand and against the published loop, and its tuning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qsr_plugin import compat
from qsr_plugin.methods.ptq4sr import DualClippingObserver, DualClippingQuantizer, dual_clip

compat.import_host()


def observed(*batches: Tensor, bins: int = 2048, ratio: float = 0.01) -> tuple[float, float]:
    observer = DualClippingObserver(bins, ratio)
    for batch in batches:
        observer.update(batch)
    return tuple(end.item() for end in observer.range())


def published(x: np.ndarray, bins: int, ratio: float) -> tuple[float, float]:
    """The loop over the outermost bins as it is written down."""
    h, edges = np.histogram(x, bins, (x.min(), x.max()))
    i, j, removed = 0, bins - 1, 0
    while removed < ratio * x.size:
        if h[i] < h[j]:
            removed, i = removed + h[i], i + 1
        elif h[j] < h[i]:
            removed, j = removed + h[j], j - 1
        else:
            removed, i, j = removed + h[i] + h[j], i + 1, j - 1
    return edges[i], edges[j + 1]


@pytest.mark.parametrize(
    ("counts", "ratio", "keep_first", "kept"),
    [
        # 1 = 1: both; 0 < 3: below; 3 < 5: above, and 5 of 100 are gone.
        ([1, 0, 5, 80, 10, 3, 1], 0.03, False, (2, 4)),
        ([1, 0, 5, 80, 10, 3, 1], 0.02, False, (1, 5)),
        ([1, 0, 5, 80, 10, 3, 1], 0.03, True, (0, 4)),
        ([1, 0, 5, 80, 10, 3, 1], 0.0, False, (0, 6)),
        ([99, 0, 0, 1], 0.01, False, (0, 2)),
        ([50, 50], 0.01, False, (0, 1)),
        ([7], 0.01, False, (0, 0)),
        ([1, 2, 90], 0.9, False, (2, 2)),
    ],
)
def test_the_emptier_end_goes_first_and_equal_ones_together(counts, ratio, keep_first, kept) -> None:
    assert dual_clip(torch.tensor(counts), ratio, keep_first=keep_first) == kept


def lopsided(seed: int) -> Tensor:
    """A dense middle, a long tail above and a short one below."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20000, generator=generator)
    return torch.where(x > 0, x.pow(3), x)


@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.1])
def test_bounds_are_those_of_the_published_loop(ratio: float) -> None:
    x = lopsided(0)
    assert observed(x, ratio=ratio) == pytest.approx(published(x.numpy(), 2048, ratio), abs=1e-5)


def test_each_bound_moves_by_itself() -> None:
    x = lopsided(0)
    low, high = observed(x)
    assert high < 0.3 * x.max() and 0.8 * x.min() < low < 0.6 * x.min(), "the long tail loses more"
    clipped = ((x < low) | (x > high)).float().mean().item()
    assert 0.01 <= clipped < 0.012


def test_all_batches_are_one_histogram() -> None:
    x = lopsided(1)
    want, width = observed(x), (x.max() - x.min()).item() / 2048
    for order in (x.split(2500), x.sort().values.split(2500), x.sort(descending=True).values.split(5000)):
        assert observed(*order) == pytest.approx(want, abs=12 * width)


def test_without_negative_values_the_lower_bound_is_zero() -> None:
    low, high = observed(lopsided(0).relu())
    assert low == 0 and 0 < high < lopsided(0).max()
    assert observed(torch.tensor([0.25, 0.5, 1.0])) == (0.0, pytest.approx(0.25 + 2047 / 2048 * 0.75))


@pytest.mark.parametrize(("bits", "share"), [(2, 0.01), (7, 0.01), (8, 0.001), (16, 0.001)])
def test_a_tenth_is_clipped_from_8_bits_on(bits: int, share: float) -> None:
    q, x = DualClippingQuantizer(DualClippingQuantizer.Options(), (bits,), "act", 1), lopsided(2)
    q.begin_calibration()
    q.observe(x)
    q.end_calibration()
    assert (q.lower.item(), q.upper.item()) == pytest.approx(observed(x, ratio=share), abs=1e-6)
    clipped = ((x < q.lower) | (x > q.upper)).float().mean().item()
    assert share <= clipped < 1.5 * share


@pytest.mark.parametrize(("batch", "message"), [([float("nan")], "non-finite"), ([], "empty")])
def test_unusable_batches_are_refused(batch: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DualClippingObserver(8, 0.01).update(torch.tensor(batch))
    with pytest.raises(RuntimeError, match="nothing was observed"):
        DualClippingObserver(8, 0.01).range()
