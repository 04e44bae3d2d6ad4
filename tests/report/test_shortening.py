"""A published schedule in a short run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qsr_plugin import load_recipe, quantize_model
from qsr_plugin.quant.observers import percentile
from qsr_plugin.quant.stage_schema import LearningRates, Stage
from qsr_plugin.report.shortening import Budget, ShorteningError, fewest, median_span, shortened

WIDE = 1e6  # ranges so wide that they limit no learning rate
RATES = LearningRates(weights=1e-4, ranges=1e-3, weight_ranges=3e-3, others=2e-4)
STAGES = (
    Stage(iters=1000, lr=RATES, track_ranges=0.5),
    Stage(iters=14000, lr=RATES),
    Stage(lr=RATES, train=("weights", "ranges")),
)


def test_lengths_keep_their_share_and_are_never_tiny() -> None:
    """1000 and 14000 of 30000, in 600: 20 and 280; in 100 the first would have 3."""
    assert [stage.get("iters") for stage in shortened(STAGES, Budget(600, 30000, 1e-4, WIDE))] == [20, 280, None]
    assert [stage.get("iters") for stage in shortened(STAGES, Budget(100, 30000, 1e-4, WIDE))] == [10, 47, None]


def test_only_the_ranges_of_activations_learn_faster() -> None:
    """30000 iterations at 1e-3 reach as far as 600 at 0.05, whatever the network computes on."""
    for pixels in (255.0, 1.0):
        rates = shortened(STAGES, Budget(600, 30000, 1e-4, WIDE, pixels))[1]["lr"]
        assert rates == {"weights": 1e-4, "ranges": pytest.approx(0.05), "weight_ranges": 3e-3, "others": 2e-4}


@pytest.mark.parametrize(
    ("iters", "pixels", "span", "rate"),
    [
        (600, 255.0, 40.0, 40 / 600),  # the published run reaches 300: the width of a range is enough
        (600, 255.0, 400.0, 300 / 600),  # and less is enough as well
        (600, 1.0, 3.0, 3 / 600),  # small features, by batch norm, on pixels in 0..1: the same reach
        (600, 255.0, 3.0, 1e-2),  # never below the published rate
        (30000, 255.0, 40.0, 1e-2),  # that of a run as long as the published one
        (30000, 1.0, 3.0, 3 / 30000),
        (10**6, 1.0, 3.0, 1e-2 / 255),
    ],
)
def test_reach_of_ranges_is_the_width_of_the_median_one(iters: int, pixels: float, span: float, rate: float) -> None:
    """Published are 30000 iterations at 1e-2."""
    assert Budget(iters, 30000, 1e-4, span, pixels).range_lr(1e-2) == pytest.approx(rate, rel=1e-12)


def test_median_span_is_what_the_observers_saw() -> None:
    """Quantiles of the float activations over all batches; weights are not asked, the network runs in float."""
    net = nn.Sequential(*(nn.Conv2d(3, 3, 1, bias=False) for _ in range(3)))
    for conv, gain in zip(net, (0.5, 10.0, 1.0)):
        conv.weight.data = gain * torch.eye(3)[:, :, None, None]
    act = {"type": "asymmetric", "observer": "percentile", "momentum": "mean"}
    rules = [{"match": "?", "port": port} for port in ("input", "weight")]
    recipe = {"method": "hand", "placement": "all", "placements": {"all": rules}, "bits": {"weight": 2, "act": 2}}
    quantize_model(net, load_recipe({**recipe, "quantizers": {"act": act, "weight": "symmetric"}}))
    images = [torch.rand(2, 3, 8, 8), 0.3 * torch.rand(1, 3, 8, 8)]
    widths = [float(high - low) for low, high in (percentile(image) for image in images)]
    # The three inputs are 1, 0.5 and 5 times the image.
    assert median_span(net, images) == pytest.approx(sum(widths) / 2, rel=1e-3)
    assert median_span(net, images[:1]) == float(f"{widths[0]:.4g}")


def test_weights_rate_replaces_that_of_every_stage_that_trains_them() -> None:
    """Ranges do not follow it; a stage without weights stays as it is."""
    stages = (Stage(iters=300, train=("ranges",), lr=LearningRates(ranges=1e-2)), Stage(lr=RATES))
    first, last = shortened(stages, Budget(600, 600, 1e-4, WIDE, 255.0, weights_lr=5e-4))
    assert first["lr"] == {"ranges": pytest.approx(1e-2)}
    assert last["lr"]["weights"] == 5e-4 and last["lr"]["ranges"] == pytest.approx(1e-3)


def test_a_range_rate_that_is_not_named_is_the_base_one() -> None:
    """Ranges without a rate of their own learn at the optimiser's, which must be scaled as well."""
    (stage,) = shortened([Stage()], Budget(100, 1000, 1e-4, WIDE, 255.0))
    assert stage["lr"] == {"ranges": pytest.approx(1e-3)}


def test_everything_else_of_a_stage_is_kept_and_read_back() -> None:
    """What the recipe reader makes of the result differs in length and rates only."""
    short = load_recipe("pams", stages=shortened(STAGES, Budget(600, 30000, 1e-4, WIDE, 255.0))).stages
    for old, new in zip(STAGES, short):
        changed = {"iters": old.iters, "lr": old.lr}
        assert new.model_copy(update=changed) == old


def test_too_short_a_run_names_the_shortest() -> None:
    """With that length it works, with one less it does not."""
    least = fewest(STAGES, 30000)
    assert shortened(STAGES, Budget(least, 30000, 1e-4, WIDE))
    with pytest.raises(ShorteningError, match=f"at least {least}"):
        shortened(STAGES, Budget(least - 1, 30000, 1e-4, WIDE))
    with pytest.raises(ShorteningError, match="all of the published 15000"):
        shortened(STAGES, Budget(600, 15000, 1e-4, WIDE))
