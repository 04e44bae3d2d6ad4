"""Stages: which parameters learn, for how long and how fast; the one mechanism behind every method's schedule."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate
from typing import Optional, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from qsr_plugin.quant.policy import PolicyPart
from qsr_plugin.quant.quantizer import Quantizer
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.stage_schema import Group, Stage
from qsr_plugin.quant.surgery import plugin_keys, quantizers

logger = logging.getLogger("basicsr")


def parameter_groups(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters of a quantized network by learning group; every parameter that is in use is in exactly one.

    Returns:
        ``weights``: those of the float network. ``ranges``: range parameters of the activations' quantizers.
        ``weight_ranges``: those of the weights' quantizers. ``bits`` and ``thresholds``: those of bit policies.
        ``others``: what else was added to the float network. Groups may be empty.
    """
    quantizing = [quantizer for _, quantizer in quantizers(net)]
    idle = {id(p) for part in (*quantizing, *bit_policies(net)) for p in part.idle_parameters()}
    group_of = {
        id(p): "ranges" if quantizer.role == "act" else "weight_ranges"
        for quantizer in quantizing
        for p in quantizer.range_parameters()
    }
    for policy in bit_policies(net):
        group_of.update((id(p), "bits") for p in policy.parameters())
        group_of.update((id(p), "thresholds") for p in policy.threshold_parameters())
    added = plugin_keys(net)
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in get_args(Group)}
    for name, parameter in net.named_parameters():
        if id(parameter) not in idle:
            groups[group_of.get(id(parameter), "others" if name in added else "weights")].append(parameter)
    return groups


def bit_policies(net: nn.Module) -> list[PolicyPart]:
    """All bit policies of a network, and what they share."""
    return [module for module in net.modules() if isinstance(module, PolicyPart)]


def project(net: nn.Module) -> None:
    """Bring all range and policy parameters back into their legal sets, after an optimiser step."""
    for part in (*(quantizer for _, quantizer in quantizers(net)), *bit_policies(net)):
        part.project()


def check_stages(
    stages: Sequence[Stage], net: nn.Module, *, kept: Collection[str] = (), total_iter: int | None = None
) -> None:
    """Look at stages before a training: refuse those that cannot train, warn of what has no effect.

    Args:
        stages: The recipe's stages.
        net: Quantized network.
        kept: Groups that are not meant to be trained by any stage.
        total_iter: Length of the whole training, if it is not that of the stages.

    Raises:
        RecipeError: Naming the stage and what to change.
    """
    begins = [0, *accumulate(stage.iters or 0 for stage in stages[:-1])]
    missed = [index for index, begin in enumerate(begins) if total_iter is not None and begin >= total_iter]
    if missed:
        logger.warning(
            "train.total_iter is %d, but stage %d of the recipe begins after iteration %d: stages from there on are "
            "never reached. Give fewer iters to the stages before it (recipe.stages), or a longer training.",
            total_iter,
            missed[0] + 1,
            begins[missed[0]],
        )
    refuse_stages(stages, net)
    kinds = _kinds(net)
    for index, stage in enumerate(stages):
        where, tracking = f"recipe.stages[{index}]", _tracking(stage)
        if tracking and kinds and not any(kind.tracking == tracking for kind in kinds):
            logger.warning("%s.track_ranges has no effect: no quantizer follows ranges by %s.", where, tracking)
        if stage.adapt_thresholds and not any(policy.adapts for policy in bit_policies(net)):
            logger.warning(
                "%s.adapt_thresholds has no effect: no bit policy has thresholds that follow batches.", where
            )
        if stage.gated and kinds and not any(kind.gated for kind in kinds):
            logger.warning("%s.gated has no effect: no quantizer has a gate.", where)
    for name, parameters in _groups(net).items():
        if name not in kept and not any(name in stage.train for stage in stages):
            logger.warning(
                "recipe.stages: no stage trains the %d parameters of the group '%s'; they keep their start.",
                len(parameters),
                name,
            )


def refuse_stages(stages: Sequence[Stage], net: nn.Module) -> None:
    """Refuse stages that cannot train a network.

    Args:
        stages: The recipe's stages.
        net: Quantized network.

    Raises:
        RecipeError: Naming the stage and what to change.
    """
    groups, kinds = _groups(net), _kinds(net)
    for index, stage in enumerate(stages):
        where = f"recipe.stages[{index}]"
        if not any(name in groups for name in stage.train):
            raise RecipeError(
                f"{where}.train is {list(stage.train)}: this network has no such parameters. "
                f"It has {', '.join(groups)}."
            )
        trained = {name for name in stage.train if name.endswith("ranges")}
        if _tracking(stage) == "mean" and trained and any(kind.tracking == "mean" for kind in kinds):
            raise RecipeError(
                f"{where}: ranges that follow the mean of the batches have no gradient: take "
                f"{', '.join(sorted(trained))} out of its train"
            )


def _groups(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    return {name: parameters for name, parameters in parameter_groups(net).items() if parameters}


def _kinds(net: nn.Module) -> set[type[Quantizer]]:
    return {type(quantizer) for _, quantizer in quantizers(net) if quantizer.role == "act"}


def _tracking(stage: Stage) -> Optional[str]:
    if stage.track_ranges is None:
        return None
    return "mean" if stage.track_ranges == "mean" else "momentum"


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
        """Freeze and unfreeze the groups, and tell quantizers, bit policies and batch norm layers of the stage."""
        stage = self.stages[index]
        net.requires_grad_(False)  # idle parameters are in no group
        for group, parameters in parameter_groups(net).items():
            for parameter in parameters:
                parameter.requires_grad_(group in stage.train)
        for part in (*(quantizer for _, quantizer in quantizers(net)), *bit_policies(net)):
            part.enter_stage(stage)
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
