"""A published schedule in a short run."""

from __future__ import annotations

import pytest

from qsr_plugin import load_recipe
from qsr_plugin.quant.schema import LearningRates, Stage
from qsr_plugin.report.shortening import Budget, ShorteningError, fewest, shortened

RATES = LearningRates(weights=1e-4, ranges=1e-3, weight_ranges=3e-3, others=2e-4)
STAGES = (
    Stage(iters=1000, lr=RATES, track_ranges=0.5),
    Stage(iters=14000, lr=RATES),
    Stage(lr=RATES, train=("weights", "ranges")),
)


def test_lengths_keep_their_share_and_are_never_tiny() -> None:
    """1000 and 14000 of 30000, in 600: 20 and 280; in 100 the first would have 3."""
    assert [stage.get("iters") for stage in shortened(STAGES, Budget(600, 30000, 1e-4))] == [20, 280, None]
    assert [stage.get("iters") for stage in shortened(STAGES, Budget(100, 30000, 1e-4))] == [10, 47, None]


def test_only_the_ranges_of_activations_learn_faster() -> None:
    """30000 iterations at 1e-3 reach as far as 600 at 0.05; on pixels in 0..1 everything is 255 times smaller."""
    wide, narrow = (shortened(STAGES, Budget(600, 30000, 1e-4, pixels))[1]["lr"] for pixels in (255.0, 1.0))
    assert wide == {"weights": 1e-4, "ranges": pytest.approx(0.05), "weight_ranges": 3e-3, "others": 2e-4}
    assert narrow == {**wide, "ranges": pytest.approx(0.05 / 255)}


def test_a_short_run_takes_ranges_no_further_than_a_quarter_of_the_pixels() -> None:
    """30000 iterations at 1e-2 reach 300, more than pixels have; a long run keeps the published rate."""
    for pixels in (255.0, 1.0):
        assert Budget(600, 30000, 1e-4, pixels).range_lr(1e-2) == pytest.approx(pixels / 4 / 600)
        assert Budget(30000, 30000, 1e-4, pixels).range_lr(1e-2) == pytest.approx(1e-2 * pixels / 255)


def test_weights_rate_replaces_that_of_every_stage_that_trains_them() -> None:
    """Ranges do not follow it; a stage without weights stays as it is."""
    stages = (Stage(iters=300, train=("ranges",), lr=LearningRates(ranges=1e-2)), Stage(lr=RATES))
    first, last = shortened(stages, Budget(600, 600, 1e-4, 255.0, weights_lr=5e-4))
    assert first["lr"] == {"ranges": pytest.approx(1e-2)}
    assert last["lr"]["weights"] == 5e-4 and last["lr"]["ranges"] == pytest.approx(1e-3)


def test_a_range_rate_that_is_not_named_is_the_base_one() -> None:
    """Ranges without a rate of their own learn at the optimiser's, which must be scaled as well."""
    (stage,) = shortened([Stage()], Budget(100, 1000, 1e-4, 255.0))
    assert stage["lr"] == {"ranges": pytest.approx(1e-3)}


def test_everything_else_of_a_stage_is_kept_and_read_back() -> None:
    """What the recipe reader makes of the result differs in length and rates only."""
    short = load_recipe("pams", stages=shortened(STAGES, Budget(600, 30000, 1e-4, 255.0))).stages
    for old, new in zip(STAGES, short):
        changed = {"iters": old.iters, "lr": old.lr}
        assert new.model_copy(update=changed) == old


def test_too_short_a_run_names_the_shortest() -> None:
    """With that length it works, with one less it does not."""
    least = fewest(STAGES, 30000)
    assert shortened(STAGES, Budget(least, 30000, 1e-4))
    with pytest.raises(ShorteningError, match=f"at least {least}"):
        shortened(STAGES, Budget(least - 1, 30000, 1e-4))
    with pytest.raises(ShorteningError, match="all of the published 15000"):
        shortened(STAGES, Budget(600, 15000, 1e-4))
