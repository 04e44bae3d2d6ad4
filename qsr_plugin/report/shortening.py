"""A method's published schedule within a small budget of iterations; one rule for all methods, so that they compare.

* Stages keep their share of the run: published length x iterations / published total, at least :data:`LEAST`.
* Ranges of activations must be able to travel as far as in the published run. Adam moves a parameter by at most about
  its learning rate per iteration, so theirs is multiplied by published total / iterations; but not so far that the
  whole run could take them further than :data:`FARTHEST` of the pixel range, which no range needs.
* Published learning rates of ranges are for networks that compute on pixels in 0..255. A network that computes on 0..1
  has ranges 255 times smaller, so there they are divided by 255.
* Learning rates of weights, weight ranges and everything else stay as published: what they move has the same size in a
  short run. That of the weights may be set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qsr_plugin.errors import UserError
from qsr_plugin.quant.schema import Stage

#: Fewest iterations of a stage.
LEAST = 10
#: How far ranges may travel in a shortened run, as a share of the pixel range inside the network.
FARTHEST = 0.25
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
        pixel_range: Largest pixel value inside the network: 255, or 1.
        weights_lr: Learning rate of the weights in all stages; the published ones if ``None``.
    """

    iters: int
    published: int
    base_lr: float
    pixel_range: float = 1.0
    weights_lr: float | None = None

    def range_lr(self, published: float) -> float:
        """Learning rate of the activations' ranges, from the published one."""
        unit = self.pixel_range / _PUBLISHED_RANGE
        farthest = FARTHEST * self.pixel_range / self.iters
        return max(published * unit, min(published * unit * self.published / self.iters, farthest))


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
