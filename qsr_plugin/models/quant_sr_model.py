"""``QuantSRModel``: the host's SR model for quantized networks.

On top of ``SRModel``: float weights, calibration, stages with a learning rate per parameter group, a teacher,
losses on features and bits, EMA that carries buffers, checkpoints that survive a crash, and exact resume.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY
from torch import nn

from qsr_plugin.losses.build import build_step_losses
from qsr_plugin.losses.context import StepContext
from qsr_plugin.models import steps
from qsr_plugin.models.finite import refuse_non_finite
from qsr_plugin.models.loading import Loading
from qsr_plugin.models.range_log import RangeStatistics, range_statistics
from qsr_plugin.models.run_state import RunState
from qsr_plugin.models.stages import StageSchedule, check_stages, parameter_groups, project
from qsr_plugin.models.teaching import Teaching
from qsr_plugin.models.tuning_rates import refuse_relative
from qsr_plugin.models.validation import Validation
from qsr_plugin.options_file import OptionsError
from qsr_plugin.quant.depth import rank_blocks, set_depth
from qsr_plugin.quant.schema import Recipe
from qsr_plugin.quant.surgery import quantizers

logger = logging.getLogger("basicsr")


@MODEL_REGISTRY.register()
class QuantSRModel(Loading, Teaching, RunState, Validation, SRModel):
    """Trains, validates and saves a ``QuantNet``.

    Options beside the host's: ``path.pretrain_network_float`` (float weights for student and teacher, strict),
    ``path.pretrain_network_quantized`` (start from a network quantized otherwise), ``path.pretrain_network_teacher``,
    ``val.patches`` (``{size, overlap, last, batch}``: validate patch by patch), ``val.depth`` (blocks of a network with
    depth), ``calibration_folder`` (of LR images; the training set if not given) and the recipe in ``network_g``.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        if opt.get("find_unused_parameters"):
            raise OptionsError(
                "find_unused_parameters: true cannot be used with QuantSRModel: losses reach parameters through "
                "recorded features, which DDP then counts twice. Remove it; frozen stages need no such search."
            )
        if opt["num_gpu"] > 1 and not opt["dist"]:
            raise OptionsError(
                f"num_gpu is {opt['num_gpu']} without a launcher: set num_gpu: 1, or torchrun and --launcher pytorch"
            )
        if opt["network_g"]["type"] != "QuantNet":
            kind = opt["network_g"]["type"]
            raise OptionsError(
                f"network_g.type is '{kind}': QuantSRModel needs QuantNet, with '{kind}' as its backbone"
            )
        log_with_the_host()
        super().__init__(opt)
        if not self.is_train:
            self._prepare_network()
        if (self.opt.get("val") or {}).get("depth"):
            set_depth(set_depth(self.net, self.opt["val"]["depth"]), None)  # a wrong one is told now, not hours later

    # -- building ----------------------------------------------------------------------------------------------------

    @property
    def net(self) -> nn.Module:
        """The bare quantized network."""
        return self.get_bare_model(self.net_g)

    @property
    def recipe(self) -> Recipe:
        """The network's recipe."""
        return self.net.recipe

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Move to the device only; distributed wrapping waits until a stage says what is trainable."""
        return net.to(self.device)

    def init_training_settings(self) -> None:
        """Prepare the network, then EMA, losses, optimiser and schedulers as the host does, then the first stage."""
        refuse_relative(self.recipe)
        self.losses = build_step_losses(self.recipe.losses, self.device)
        self.regularizers = [name for name, loss in self.losses.items() if loss.regularizer]
        if self.recipe.cooperative is not None and not self.regularizers:
            logger.warning("recipe.cooperative weights gradients of regularizing losses, and recipe.losses has none.")
        self.range_statistics: RangeStatistics | None = None
        self.tap_features(self.net)
        self._prepare_network()
        check_stages(self.recipe.stages, self.net, total_iter=self.opt["train"]["total_iter"])
        self.schedule = StageSchedule(self.recipe.stages, self.opt["train"]["optim_g"]["lr"])
        self.stage_index = -1
        self.teacher = self.build_teacher()
        train = self.opt["train"]
        if self.losses and not train.get("pixel_opt") and not train.get("perceptual_opt"):
            train["pixel_opt"] = {"type": "L1Loss"}  # the host refuses to start without a loss of its own
            super().init_training_settings()
            train["pixel_opt"] = self.cri_pix = None
        else:
            super().init_training_settings()
        self._enter_stage(0)

    def setup_optimizers(self) -> None:
        """One optimiser, with a parameter group for each learning group that has parameters and is ever trained.

        Adam updates all parameters in one call (``fused``) unless ``train.optim_g`` says otherwise.
        """
        options = self.opt["train"]["optim_g"]
        kind = options.pop("type")
        if kind == "Adam" and "foreach" not in options:
            options.setdefault("fused", True)  # quantizers add a hundred parameters of one number each
        used = {group for stage in self.recipe.stages for group in stage.train}
        groups = [
            {"params": parameters, "lr": self.schedule.learning_rate(0, name), "name": name}
            for name, parameters in parameter_groups(self.net).items()
            if parameters and name in used
        ]
        self.optimizer_g = self.get_optimizer(kind, groups, **options)
        self.optimizers.append(self.optimizer_g)

    def setup_schedulers(self) -> None:
        """The host's schedulers.

        Raises:
            OptionsError: For arguments the scheduler does not take.
        """
        options = dict(self.opt["train"]["scheduler"])
        try:
            super().setup_schedulers()
        except TypeError as error:
            raise OptionsError(
                f"train.scheduler {options}: {error}. If a _base_ file names another scheduler, its arguments are "
                "merged in; write _delete_: true beside yours to drop them."
            ) from None

    # -- training ----------------------------------------------------------------------------------------------------

    def _enter_stage(self, index: int, *, set_learning_rates: bool = True) -> None:
        self.schedule.apply(index, self.net)
        if set_learning_rates and self.stage_index >= 0:
            self.schedule.set_learning_rates(index, self.optimizer_g, self.schedulers)
        self.stage_index = index
        self.net_g = super().model_to_device(self.net)  # DDP fixes the set of trainable parameters when it wraps
        stage = self.schedule.stages[index]
        logger.info("Stage %d of %d: train %s.", index + 1, len(self.schedule.stages), ", ".join(stage.train))

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        """Enter the iteration's stage if it is a new one, then do as the host."""
        index = self.schedule.index_at(current_iter)
        if index != self.stage_index:
            self._enter_stage(index)
        if self.schedule.ranks_at(current_iter):
            order = ", ".join(map(str, rank_blocks(self.net)))
            logger.info("Blocks by the factor of their identity path, the last is dropped first: %s.", order)
        super().update_learning_rate(current_iter, warmup_iter)

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take a batch and remember its file names for messages."""
        super().feed_data(data)
        self._paths = list(data.get("lq_path", []))

    def optimize_parameters(self, current_iter: int) -> None:
        """One training step.

        Raises:
            FloatingPointError: If a loss or a gradient is not finite, naming the file or the first site that caused
                it; the weights are not changed by that step.
        """
        # Random numbers of a step depend on seed and iteration only, so that a resumed run draws the same.
        torch.manual_seed((self.opt["manual_seed"] + self.opt["rank"]) * 1_000_003 + current_iter)
        self.optimizer_g.zero_grad()
        logged = current_iter % self.opt["logger"]["print_freq"] == 0
        self.net.keep_pairs = logged or any(loss.needs_pairs for loss in self.losses.values())
        self._iteration = current_iter
        loss_dict = self._gradients()
        self.log_dict = self.reduce_loss_dict(loss_dict)
        where = f"iteration {current_iter}, process {self.opt['rank']}"
        refuse_non_finite(where, self.net, self.log_dict, self.lq, self.gt, self._paths)
        if logged:
            self._look_at_ranges()
        self.optimizer_g.step()
        project(self.net)
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def _gradients(self) -> dict[str, torch.Tensor]:
        """Fill ``.grad`` as recipe and stage ask, and return the losses."""
        self._taught = self.ask_teacher()
        shares = self.schedule.stages[self.stage_index].depths
        together = self.recipe.cooperative is not None and self.regularizers
        if shares == (1.0,) and not together:
            losses = self._losses(self.net_g)
            steps.summed(losses)
            return losses
        if self.opt["dist"]:
            steps.share_buffers(self.net)
        if shares != (1.0,):  # the largest depth last, for it leaves the record that ranges are looked up in
            return steps.depths(self.net, sorted(shares), lambda: self._losses(self.net))
        losses = self._losses(self.net)
        steps.cooperative(losses, self.regularizers, self.net, self.recipe.cooperative)
        return losses

    def _losses(self, net: nn.Module) -> OrderedDict[str, torch.Tensor]:
        """Run the network (bare, or as DDP has wrapped it) and compute all losses."""
        self.output = net(self.lq)
        losses: OrderedDict[str, torch.Tensor] = OrderedDict()
        if self.cri_pix:
            losses["l_pix"] = self.cri_pix(self.output, self.gt)
        if self.cri_perceptual:
            for name, value in zip(("l_percep", "l_style"), self.cri_perceptual(self.output, self.gt)):
                if value is not None:
                    losses[name] = value
        step = StepContext(self.output, self.gt, self.net.last_record(), *self._taught, self._iteration)
        losses.update((name, loss(step)) for name, loss in self.losses.items())
        return losses

    def _look_at_ranges(self) -> None:
        """Note range and clipped share of every place for the log; the mean share goes beside the losses."""
        self.range_statistics = range_statistics(self.net, self.net.last_record())
        if self.range_statistics is not None:
            self.log_dict["clipped"] = self.range_statistics.mean_clipped()

    def save(self, epoch: int, current_iter: int) -> None:
        """Save network and training state; log the ranges if no validation did."""
        super().save(epoch, current_iter)
        if self.opt["rank"] == 0:
            self.log_ranges(current_iter, None)

    def model_ema(self, decay: float = 0.999) -> None:
        """Average parameters as the host does; copy buffers, which the host leaves behind."""
        super().model_ema(decay)
        source = dict(self.net.named_buffers())
        for name, buffer in self.net_g_ema.named_buffers():
            buffer.copy_(source[name])
        for (_, averaged), (_, quantizer) in zip(quantizers(self.net_g_ema), quantizers(self.net)):
            averaged.follow(quantizer)


def log_with_the_host() -> None:
    """Have this package's messages written where the host's go: its console and its log file."""
    own = logging.getLogger("qsr_plugin")
    own.handlers, own.propagate = logger.handlers, False
    own.setLevel(logger.level)
