"""Stages: which parameters learn, for how long and how fast; the one mechanism behind every method's schedule."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from torch import nn
from torch.optim import Optimizer

from qsr_plugin.quant.policy import BitPolicy
from qsr_plugin.quant.quantizer import Quantizer
from qsr_plugin.quant.recipe import Stage
from qsr_plugin.quant.surgery import quantizers

GROUPS = ("weights", "ranges", "others")


def parameter_groups(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters of a quantized network by learning group; every parameter is in exactly one.

    Returns:
        ``weights``: those of the float network. ``ranges``: range parameters of the quantizers. ``others``: the rest
        of quantizers and bit policies. Groups may be empty.
    """
    parts = [module for module in net.modules() if isinstance(module, (Quantizer, BitPolicy))]
    ranges = {id(p): p for part in parts if isinstance(part, Quantizer) for p in part.range_parameters()}
    others = {id(p): p for part in parts for p in part.parameters() if id(p) not in ranges}
    weights = [p for p in net.parameters() if id(p) not in ranges and id(p) not in others]
    return {"weights": weights, "ranges": list(ranges.values()), "others": list(others.values())}


class StageSchedule:
    """Maps iterations to stages and applies a stage to a network and its optimiser.

    Args:
        stages: The recipe's stages.
        base_lr: Learning rate of groups a stage does not name.
    """

    def __init__(self, stages: Iterable[Stage], base_lr: float) -> None:
        self.stages = tuple(stages)
        self.base_lr = base_lr
        self._ends = list(accumulate(stage.iters or 0 for stage in self.stages[:-1]))

    def index_at(self, iteration: int) -> int:
        """Stage of an iteration, counted from 1. Iterations beyond the last stage's length stay in it."""
        return sum(iteration > end for end in self._ends)

    def learning_rate(self, index: int, group: str) -> float:
        """Learning rate of a group in a stage, before the scheduler's decay."""
        chosen = getattr(self.stages[index].lr, group)
        return self.base_lr if chosen is None else chosen

    def apply(self, index: int, net: nn.Module) -> None:
        """Freeze and unfreeze the groups and switch range tracking as the stage says."""
        stage = self.stages[index]
        for group, parameters in parameter_groups(net).items():
            for parameter in parameters:
                parameter.requires_grad_(group in stage.train)
        for _, quantizer in quantizers(net):
            tracks = stage.track_ranges is not None and quantizer.role == "act"
            quantizer.set_tracking(stage.track_ranges if tracks else None)

    def set_learning_rates(self, index: int, optimizer: Optimizer, schedulers: Iterable) -> None:
        """Change the learning rates to a stage's, keeping the decay that the scheduler has reached."""
        for position, group in enumerate(optimizer.param_groups):
            new, old = self.learning_rate(index, group["name"]), group["initial_lr"]
            group["lr"] *= new / old
            group["initial_lr"] = new
            for scheduler in schedulers:
                scheduler.base_lrs[position] = new
