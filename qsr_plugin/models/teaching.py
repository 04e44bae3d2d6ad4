"""The teacher of a run: the float network, or the quantized one as the training started."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsr_plugin import checkpoint
from qsr_plugin.archs.quant_net_arch import build_backbone
from qsr_plugin.losses.context import StepLoss
from qsr_plugin.options_file import OptionsError
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.reduce import copy_from_first
from qsr_plugin.quant.schema import Recipe
from qsr_plugin.quant.surgery import tap

logger = logging.getLogger("basicsr")

#: File in the folder of a run's models that holds a teacher which could not be made again when the run is resumed.
TEACHER_FILE = "teacher.safetensors"


def require_float_weights(opt: Mapping[str, Any], recipe: Recipe, losses: Iterable[StepLoss]) -> None:
    """Check that the options of a training give the weights of its teacher.

    Args:
        opt: Options of the training.
        recipe: Its recipe.
        losses: Those of the recipe, built.

    Raises:
        OptionsError: If a loss of the recipe compares with the float network, and there are no float weights.
    """
    names = [type(loss).__name__ for loss in losses if loss.needs_teacher]
    if names and recipe.teacher == "float" and not opt["path"].get("pretrain_network_float"):
        raise OptionsError(f"path.pretrain_network_float is needed: {', '.join(names)} compares with the float network")


class Teaching:
    """Mixin of the model: builds the teacher that the recipe asks for, and runs it on each batch."""

    def build_teacher(self) -> nn.Module | None:
        """The teacher in evaluation mode, or ``None`` if no loss wants one.

        Raises:
            OptionsError: If the files it is made of are not given, or one is given that it is not made of.
            CheckpointError: If the teacher of a resumed run is not there any more.
        """
        given = self.opt["path"].get("pretrain_network_teacher")
        if not any(loss.needs_teacher for loss in self.losses.values()):
            if given:
                logger.warning("path.pretrain_network_teacher has no effect: no loss of the recipe has a teacher.")
            return None
        if given and self.recipe.teacher == "float":
            raise OptionsError(
                f"path.pretrain_network_teacher is {given}, but recipe.teacher is float, and so the teacher is "
                "path.pretrain_network_float: set recipe.teacher: start, or leave path.pretrain_network_teacher out"
            )
        teacher = self._float_teacher() if self.recipe.teacher == "float" else self._quantized_teacher()
        self.tap_features(teacher)
        return teacher.to(self.device).eval().requires_grad_(False)

    def _float_teacher(self) -> nn.Module:
        require_float_weights(self.opt, self.recipe, self.losses.values())
        teacher = build_backbone(self.opt["network_g"]["backbone"])
        checkpoint.load_float_weights(teacher, self.opt["path"]["pretrain_network_float"])
        return teacher

    def _quantized_teacher(self) -> nn.Module:
        kept = Path(self.opt["path"]["models"]) / TEACHER_FILE
        given = self.opt["path"].get("pretrain_network_teacher")
        if not given and self.opt["path"].get("resume_state"):
            if not kept.is_file():
                raise checkpoint.CheckpointError(
                    f"{kept} does not exist, the teacher of the run that is resumed: bring it back, or give the "
                    "quantized network that run started from as path.pretrain_network_teacher"
                )
            given = kept
        if given:
            logger.info("The teacher is %s.", given)
            return checkpoint.load_quantized(given)
        if self.opt["rank"] == 0:
            checkpoint.save_quantized(self.net, kept)
        teacher = deepcopy(self.net)
        with torch.no_grad():  # random float weights differ between processes until DDP wraps the student
            copy_from_first([*teacher.parameters(), *teacher.buffers()])
        return teacher

    def tap_features(self, net: nn.Module) -> None:
        """Have a network record what the losses compare."""
        for place in {place: None for loss in self.losses.values() for place in loss.taps}:
            tap(net, place, place)

    def ask_teacher(self) -> tuple[Tensor, ForwardRecord] | tuple[None, None]:
        """The teacher's output for the current batch, and its record."""
        if self.teacher is None:
            return None, None
        with torch.no_grad():
            return self.teacher(self.lq), self.teacher.last_record()
