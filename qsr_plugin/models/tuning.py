"""Post-training tuning: ranges and bits of a calibrated network learn from the float one, without ground truth.

The recipe's stages run over the calibration images in the same order again and again (Hong and Lee, CVPR 2024; Tu et
al., CVPR 2023), with one Adam for all groups. A training of the host can do the same on freshly drawn crops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from time import perf_counter
from typing import Union

import torch
from torch import Tensor, nn

from qsr_plugin.losses.build import build_step_losses
from qsr_plugin.losses.context import StepContext, StepLoss
from qsr_plugin.memory import free_memory
from qsr_plugin.models.finite import refuse_non_finite
from qsr_plugin.models.frozen_prelu import freeze_slopes
from qsr_plugin.models.stages import StageSchedule, bit_policies, check_stages, parameter_groups, project, refuse_stages
from qsr_plugin.models.tuning_rates import equal_groups, relative_groups
from qsr_plugin.quant.calibrate import image_batches, joined
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.schema import Recipe
from qsr_plugin.quant.surgery import quantizers, tap

#: Share of the free memory for the teacher's outputs and features, kept for the next time a batch comes; what does not
#: fit is made again.
KEPT_SHARE = 0.5

#: Adam's epsilon where rates do not depend on the size of features: theirs can make gradients of 1e-9.
RELATIVE_EPS = 1e-16

Progress = Callable[[Sequence[int]], Iterable[int]]


def tune(
    net: nn.Module,
    float_net: nn.Module,
    images: Union[str, Path, Tensor, Iterable[Tensor]],
    *,
    progress: Progress = iter,
) -> dict[str, float]:
    """Run the stages of a network's recipe on images, with the float network as the teacher.

    Nothing is drawn at random: batches come in the order of the images, so that two calls give the same network.

    Args:
        net: Calibrated network whose recipe has ``tuning``; changed only if all steps succeed.
        float_net: The float network it was made from; not changed.
        images: As :func:`qsr_plugin.calibrate` takes them; best those it was calibrated on. All are in memory at once:
            of a folder of photos, give :func:`qsr_plugin.data.calibration_set.crops_from_folder`.
        progress: Wraps the sequence of steps, e.g. ``rich.progress.track``.

    Returns:
        Seconds by what they were spent on: ``teacher``, and the groups that a stage trains.

    Raises:
        RecipeError: If the recipe has no ``tuning``, or a stage that trains a group gives it no learning rate.
        ValueError: If there are no images, or for one of a wrong shape.
        FloatingPointError: If a loss or a gradient is not finite, naming where it starts.
    """
    recipe = _tunable(net)
    device = next(net.parameters()).device
    given = image_batches([images] if isinstance(images, Tensor) else images)
    batches = [
        batch.to(device).contiguous(memory_format=torch.channels_last)
        for batch in joined(_pieces(given, recipe.tuning.crop), recipe.tuning.batch)
    ]
    if not batches:
        raise ValueError("no images to tune on: give a folder with images, or a non-empty iterable of tensors")
    losses = build_step_losses(recipe.losses, device)
    student, teacher = _learning(deepcopy(net)), deepcopy(float_net).to(device).eval().requires_grad_(False)
    for one in (student, teacher):
        one.to(memory_format=torch.channels_last)  # the backward of wide kernels with few outputs is much faster
        _tap(one, losses)
    freeze_slopes(student)
    student.keep_pairs = any(loss.needs_pairs for loss in losses.values())
    check_stages(recipe.stages, student, kept=("weights", "others"))
    run = _Run(student, _Teacher(teacher, batches), losses, recipe)
    run.learn(batches, progress)
    net.load_state_dict(student.state_dict())
    return run.seconds


def check_tuning(net: nn.Module) -> None:
    """Find out before the work whether :func:`tune` can follow the recipe of a network.

    Args:
        net: Quantized, calibrated or not; not changed.

    Raises:
        RecipeError: As :func:`tune`; also for a loss, or a place of features, that there is not.
    """
    recipe, copied = _tunable(net), deepcopy(net)
    _tap(copied, build_step_losses(recipe.losses, next(net.parameters()).device))
    refuse_stages(recipe.stages, copied)


def _tap(net: nn.Module, losses: Mapping[str, StepLoss]) -> None:
    """Show the losses the features that they compare."""
    for place in {place: None for loss in losses.values() for place in loss.taps}:
        tap(net, place, place)


def _tunable(net: nn.Module) -> Recipe:
    """The network's recipe, if it says how to tune."""
    recipe = getattr(net, "recipe", None)
    if recipe is None or recipe.tuning is None:
        found = "a float network" if recipe is None else f"method '{recipe.method}'"
        raise RecipeError(f"{found} has no 'tuning': take a recipe with tuning: {{batch: 2}}, stages and losses")
    if recipe.cooperative is not None or recipe.teacher != "float":
        part = "cooperative" if recipe.cooperative is not None else f"teacher: {recipe.teacher}"
        raise RecipeError(f"recipe.{part} is for trainings: a tuning learns from the float network alone; leave it out")
    for index, stage in enumerate(recipe.stages):
        if stage.depths != (1.0,):
            raise RecipeError(f"recipe.stages[{index}].depths is for trainings: a tuning runs all blocks; leave it out")
        for group in stage.train:
            if getattr(stage.lr, group) is None:
                raise RecipeError(f"recipe.stages[{index}].lr.{group} is missing: a tuning has no other; give one")
    return recipe


def _learning(net: nn.Module) -> nn.Module:
    """Evaluation mode for the network, so that nothing is dropped, and training mode for what quantizes it."""
    net.eval()
    for part in (*(quantizer for _, quantizer in quantizers(net)), *bit_policies(net)):
        part.train()
    return net


def _pieces(batches: Iterable[Tensor], side: int | None) -> Iterator[Tensor]:
    """Images cut into squares with ``side`` pixels, one of every image in turn; smaller images stay whole."""
    by_image = [list(_squares(image, side)) for batch in batches for image in batch.split(1)]
    return (piece for turn in zip_longest(*by_image) for piece in turn if piece is not None)


def _squares(image: Tensor, side: int | None) -> Iterator[Tensor]:
    height, width = image.shape[-2:]
    if side is None or min(height, width) <= side:
        yield image
        return
    for top in range(0, height - side + 1, side):
        for left in range(0, width - side + 1, side):
            yield image[..., top : top + side, left : left + side]


class _Teacher:
    """What the float network makes of each batch, kept as far as :data:`KEPT_SHARE` of the free memory goes."""

    def __init__(self, net: nn.Module, batches: Sequence[Tensor]) -> None:
        self._net, self._batches, self._room = net, batches, KEPT_SHARE * free_memory(batches[0].device)
        self._kept: dict[int, tuple[Tensor, ForwardRecord | None]] = {}

    def ask(self, number: int) -> tuple[Tensor, ForwardRecord | None]:
        """Output and forward record for one of the batches."""
        if number in self._kept:
            return self._kept[number]
        with torch.no_grad():
            output = self._net(self._batches[number])
        record = getattr(self._net, "_last_record", None)
        if record is not None:
            record = replace(record, taps=dict(record.taps))  # its own are dropped by the next forward
        tensors = [output, *(() if record is None else record.taps.values())]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size <= self._room:
            self._room -= size
            self._kept[number] = output, record
        return output, record


class _Run:
    """One tuning.

    Args:
        net: Student, in training mode and tapped.
        teacher: Of the same batches, tapped in the same places.
        losses: By name.
        recipe: The student's.
    """

    def __init__(self, net: nn.Module, teacher: _Teacher, losses: dict[str, StepLoss], recipe: Recipe) -> None:
        self._net, self._teacher, self._losses = net, teacher, losses
        self._schedule = StageSchedule(recipe.stages, base_lr=0.0)
        used = {group for stage in recipe.stages for group in stage.train}
        groups = {name: parameters for name, parameters in parameter_groups(net).items() if parameters and name in used}
        self._cosine = recipe.tuning.schedule == "cosine"
        relative = recipe.tuning.relative
        self._optimizer = torch.optim.Adam(
            list(relative_groups(net, groups) if relative else equal_groups(groups)),
            eps=RELATIVE_EPS if relative else 1e-8,
            fused=True,
        )
        self.seconds: dict[str, float] = {}

    def learn(self, batches: Sequence[Tensor], progress: Progress) -> None:
        """Take all steps of all stages."""
        entered = -1
        total = sum(stage.iters for stage in self._schedule.stages)
        for step in progress(range(1, total + 1)):
            index, number = self._schedule.index_at(step), (step - 1) % len(batches)
            if index != entered:
                self._schedule.apply(index, self._net)
                entered = index
            self._set_rates(index, (1 + math.cos(math.pi * (step - 1) / total)) / 2 if self._cosine else 1.0)
            begun = perf_counter()
            output, record = self._teacher.ask(number)
            taught = perf_counter()
            self._step(step, batches[number], output, record)
            self._spend("teacher", taught - begun)
            self._spend(", ".join(self._schedule.stages[index].train), perf_counter() - taught)

    def _set_rates(self, index: int, decay: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = decay * group["unit"] * self._schedule.learning_rate(index, group["name"])

    def _step(self, step: int, images: Tensor, wanted: Tensor, record: ForwardRecord | None) -> None:
        self._optimizer.zero_grad()
        context = StepContext(self._net(images), wanted, self._net.last_record(), wanted, record, step)
        values = {name: loss(context) for name, loss in self._losses.items()}
        sum(values.values()).backward()
        found = {name: value.item() for name, value in values.items()}
        refuse_non_finite(f"tuning step {step}", self._net, found, images, wanted, [])
        self._optimizer.step()
        project(self._net)

    def _spend(self, on: str, seconds: float) -> None:
        self.seconds[on] = self.seconds.get(on, 0.0) + seconds
