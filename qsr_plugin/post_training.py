"""Post-training quantization in its order: a float network and some images in, a quantized network out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from time import perf_counter

from torch import Tensor, nn

from qsr_plugin.models.tuning import check_tuning, tune
from qsr_plugin.progress import Progress, no_progress
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.schema import Recipe
from qsr_plugin.quant.surgery import quantize_model

logger = logging.getLogger("qsr_plugin")


@dataclass(frozen=True)
class PostTrained:
    """What :func:`post_train` made.

    Attributes:
        net: The quantized network, in evaluation mode.
        recipe: Its recipe, with the places that were given more bits.
        seconds: By what they were spent on.
        fragile: Places ``module.port`` that were given more bits than the recipe says.
    """

    net: nn.Module
    recipe: Recipe
    seconds: dict[str, float]
    fragile: tuple[str, ...] = ()


def post_train(
    float_net: nn.Module,
    recipe: Recipe,
    crops: Sequence[Tensor],
    *,
    tuned: bool = True,
    progress: Progress = no_progress,
) -> PostTrained:
    """Quantize and calibrate a float network; then, where the recipe says so, raise bits of fragile places, and tune.

    Args:
        float_net: Not changed; also the teacher of the tuning.
        recipe: Its ``fragile`` and ``tuning`` say what follows the calibration.
        crops: ``(N, 3, H, W)`` tensors, RGB in [0, 1]: low-resolution images.
        tuned: ``False`` leaves out the tuning.
        progress: Wraps each sequence that is worked through.

    Raises:
        RecipeError, OptionsError, NotRegisteredError: See :func:`check_recipe`.
        ValueError: If there are no crops, or for one of a wrong shape.
        FloatingPointError: If the tuning meets a loss or a gradient that is not finite.
    """
    seconds: dict[str, float] = {}
    check_recipe(float_net, recipe, tuned=tuned)
    _tell_unnamed(float_net)
    net, fragile = _calibrated(float_net, recipe, crops, seconds, progress), ()
    if recipe.fragile is not None:
        from qsr_plugin.fragile_places import with_fragile_places

        begun = perf_counter()
        net = with_fragile_places(net, float_net, crops, progress=progress)
        seconds["fragile places"] = perf_counter() - begun
        fragile = tuple(f"{rule.match}.{rule.port}" for rule in net.recipe.rules[len(recipe.rules) :])
    if tuned and recipe.tuning is not None:
        seconds |= tune(net, float_net, crops, progress=lambda steps: progress(steps, "tuning"))
    net._last_record = None  # bits chosen on calibration crops are no figure of the network
    return PostTrained(net, net.recipe, seconds, fragile)


def check_recipe(float_net: nn.Module, recipe: Recipe, *, tuned: bool = True) -> None:
    """Find out before the work whether :func:`post_train` can follow a recipe.

    Args:
        float_net: Not changed.
        recipe: As for :func:`post_train`.
        tuned: Whether its tuning matters.

    Raises:
        RecipeError: If the recipe does not fit the network, or its stages cannot train it.
        OptionsError: For a loss with arguments it does not take.
        NotRegisteredError: For a loss that there is not.
    """
    net = quantize_model(deepcopy(float_net), recipe)
    if tuned and recipe.tuning is not None:
        check_tuning(net)


def _tell_unnamed(float_net: nn.Module) -> None:
    """Warn before the work of a network that cannot be saved as it is."""
    from qsr_plugin.checkpoint import CheckpointError, backbone_of

    try:
        backbone_of(float_net)
    except CheckpointError as error:
        logger.warning("save_quantized will not take this network: %s", error)


def _calibrated(
    float_net: nn.Module, recipe: Recipe, crops: Sequence[Tensor], seconds: dict[str, float], progress: Progress
) -> nn.Module:
    """A calibrated copy; ``seconds`` is given what that took."""
    net = quantize_model(deepcopy(float_net), recipe).eval()
    return calibrate(net, progress(crops, "calibrating"), spent=seconds)
