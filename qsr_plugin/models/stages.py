"""Stages: which parameters learn, for how long and how fast; the one mechanism behind every method's schedule."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import accumulate

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.schema import Stage
from qsr_plugin.quant.surgery import plugin_keys, quantizers

logger = logging.getLogger("basicsr")


def parameter_groups(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters of a quantized network by learning group; every parameter that is in use is in exactly one.

    Returns:
        ``weights``: those of the float network. ``ranges``: range parameters of the activations' quantizers.
        ``weight_ranges``: those of the weights' quantizers. ``others``: what else was added to the float network.
        Groups may be empty.
    """
    quantizing = [quantizer for _, quantizer in quantizers(net)]
    idle = {id(p) for quantizer in quantizing for p in quantizer.idle_parameters()}
    group_of = {
        id(p): "ranges" if quantizer.role == "act" else "weight_ranges"
        for quantizer in quantizing
        for p in quantizer.range_parameters()
    }
    added = plugin_keys(net)
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "ranges": [], "weight_ranges": [], "others": []}
    for name, parameter in net.named_parameters():
        if id(parameter) not in idle:
            groups[group_of.get(id(parameter), "others" if name in added else "weights")].append(parameter)
    return groups


def check_stages(stages: Sequence[Stage], net: nn.Module) -> None:
    """Look at stages before any work is done: refuse those that cannot train, warn of what has no effect.

    Raises:
        RecipeError: Naming the stage and what to change.
    """
    groups = {name: parameters for name, parameters in parameter_groups(net).items() if parameters}
    kinds = {type(quantizer) for _, quantizer in quantizers(net) if quantizer.role == "act"}
    for index, stage in enumerate(stages):
        where = f"recipe.stages[{index}]"
        if not any(name in groups for name in stage.train):
            raise RecipeError(
                f"{where}.train is {list(stage.train)}: this network has no such parameters. "
                f"It has {', '.join(groups)}."
            )
        tracking = None if stage.track_ranges is None else "mean" if stage.track_ranges == "mean" else "momentum"
        trained = {name for name in stage.train if name.endswith("ranges")}
        if tracking == "mean" and trained and any(kind.tracking == "mean" for kind in kinds):
            raise RecipeError(
                f"{where}: ranges that follow the mean of the batches have no gradient: take "
                f"{', '.join(sorted(trained))} out of its train"
            )
        if tracking and kinds and not any(kind.tracking == tracking for kind in kinds):
            logger.warning("%s.track_ranges has no effect: no quantizer follows ranges by %s.", where, tracking)
        if stage.gated and kinds and not any(kind.gated for kind in kinds):
            logger.warning("%s.gated has no effect: no quantizer has a gate.", where)
    for name, parameters in groups.items():
        if not any(name in stage.train for stage in stages):
            logger.warning(
                "recipe.stages: no stage trains the %d parameters of the group '%s'; they keep their start.",
                len(parameters),
                name,
            )


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

    def ranks_at(self, iteration: int) -> bool:
        """Whether blocks are to be ranked before this iteration: the first of several depths after full depth."""
        index = self.index_at(iteration)
        full_before = index == 0 or self.stages[index - 1].depths == (1.0,)
        begins = iteration == (1 if index == 0 else self._ends[index - 1] + 1)
        return begins and full_before and self.stages[index].depths != (1.0,)

    def learning_rate(self, index: int, group: str) -> float:
        """Learning rate of a group in a stage, before the scheduler's decay."""
        chosen = getattr(self.stages[index].lr, group)
        return self.base_lr if chosen is None else chosen

    def apply(self, index: int, net: nn.Module) -> None:
        """Freeze and unfreeze the groups and tell the quantizers what the stage says about ranges."""
        stage = self.stages[index]
        net.requires_grad_(False)  # idle parameters are in no group
        for group, parameters in parameter_groups(net).items():
            for parameter in parameters:
                parameter.requires_grad_(group in stage.train)
        for _, quantizer in quantizers(net):
            quantizer.enter_stage(stage)
        inner = {part for _, quantizer in quantizers(net) for part in quantizer.modules()}
        for module in net.modules():
            if isinstance(module, _BatchNorm) and module not in inner:
                module.train(not stage.freeze_batch_norm)

    def set_learning_rates(self, index: int, optimizer: Optimizer, schedulers: Iterable) -> None:
        """Change the learning rates to a stage's, keeping the decay that the scheduler has reached."""
        for position, group in enumerate(optimizer.param_groups):
            new, old = self.learning_rate(index, group["name"]), group["initial_lr"]
            group["lr"] *= new / old
            group["initial_lr"] = new
            for scheduler in schedulers:
                scheduler.base_lrs[position] = new
