"""A method's published schedule within a small budget of iterations; one rule for all methods, so that they compare.

* Stages keep their share of the run: published length x iterations / published total, at least :data:`LEAST`.
* Ranges of activations must be able to travel as far as in the published run. Adam moves a parameter by at most about
  its learning rate per iteration, so theirs is multiplied by published total / iterations; but not so far that the
  whole run could take them further than :data:`FARTHEST` times the width that ranges typically have. That width is
  measured (:func:`median_span`), because neither the range of pixels nor the kind of network tells it: batch norm makes
  features small in networks of any pixel range.
* A run of that reach or more keeps the published rates, which are for networks that compute on pixels in 0..255: on
  pixels in 0..1 at least a 255th of them.
* Learning rates of weights, weight ranges and everything else stay as published: what they move has the same size in a
  short run. That of the weights may be set.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qsr_plugin.errors import UserError
from qsr_plugin.quant.calibrate import calibrating, image_batches
from qsr_plugin.quant.quantizer import Quantizer
from qsr_plugin.quant.schema import Stage

#: Fewest iterations of a stage.
LEAST = 10
#: How far ranges may travel in a shortened run, in widths of the median range.
FARTHEST = 1.0
_PUBLISHED_RANGE = 255.0  # of pixels inside the networks that published learning rates are for


class ShorteningError(UserError, ValueError):
    """A budget too small for a method's stages."""


@dataclass(frozen=True)
class Budget:
    """What a schedule is fitted to.

    Attributes:
        iters: Iterations there are.
        published: Iterations of the published run.
        base_lr: Learning rate of groups that a stage does not name.
        span: Median width of the activations' ranges, in the units of the features.
        pixel_range: Largest pixel value inside the network: 255, or 1.
        weights_lr: Learning rate of the weights in all stages; the published ones if ``None``.
    """

    iters: int
    published: int
    base_lr: float
    span: float
    pixel_range: float = 1.0
    weights_lr: float | None = None

    def range_lr(self, published: float) -> float:
        """Learning rate of the activations' ranges, from the published one."""
        reach = min(published * self.published, FARTHEST * self.span)
        return max(published * self.pixel_range / _PUBLISHED_RANGE, reach / self.iters)


def median_span(net: nn.Module, images: Iterable[Tensor]) -> float:
    """How wide the ranges of a network's activations typically are.

    Args:
        net: Quantized network; calibrated on the images afterwards. Its observers decide what a range is.
        images: Calibration batches (N, 3, H, W), RGB in [0, 1].

    Returns:
        Median over the activation quantizers of high - low, rounded to 4 digits: it ends up in recipes.
    """
    device = next(net.parameters()).device
    with calibrating(net):
        for batch in image_batches(images):
            net(batch.to(device))
        parts = [part for part in net.modules() if isinstance(part, Quantizer) and part.role == "act"]
        widths = [float(high - low) for low, high in (part.observed_range() for part in parts)]
    return float(f"{statistics.median(widths):.4g}")


def shortened(stages: Sequence[Stage], budget: Budget) -> list[dict[str, Any]]:
    """The stages of a recipe, fitted to a budget; the last one lasts until the end.

    Args:
        stages: As published.
        budget: What to fit them to.

    Returns:
        Stages as plain data for an option file.

    Raises:
        ShorteningError: If there are fewer than :data:`LEAST` iterations for some stage.
    """
    lengths = [max(LEAST, round((stage.iters or 0) * budget.iters / budget.published)) for stage in stages[:-1]]
    if sum(lengths) + LEAST > budget.iters:
        raise ShorteningError(
            f"{budget.iters} iterations are too few for {len(stages)} stage(s) that keep their share of the run, "
            f"{LEAST} or more each: give at least {fewest(stages, budget.published)}"
        )
    return [_fitted(stage, length, budget) for stage, length in zip(stages, [*lengths, None])]


def fewest(stages: Sequence[Stage], published: int) -> int:
    """The smallest budget that :func:`shortened` takes."""
    iters = LEAST * len(stages)
    while sum(max(LEAST, round((s.iters or 0) * iters / published)) for s in stages[:-1]) + LEAST > iters:
        if iters >= published:
            raise ShorteningError(f"the stages before the last take all of the published {published} iterations")
        iters += 1
    return iters


def _fitted(stage: Stage, length: int | None, budget: Budget) -> dict[str, Any]:
    rates = stage.lr.model_dump(exclude_none=True)
    if "ranges" in stage.train:
        rates["ranges"] = budget.range_lr(rates.get("ranges", budget.base_lr))
    if "weights" in stage.train and budget.weights_lr is not None:
        rates["weights"] = budget.weights_lr
    data = stage.model_dump(mode="json", exclude_none=True, exclude={"iters", "lr"})
    return {**data, "lr": rates, **({} if length is None else {"iters": length})}
