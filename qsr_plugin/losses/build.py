"""Building the losses that a recipe names."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from basicsr.utils.registry import LOSS_REGISTRY

from qsr_plugin import compat
from qsr_plugin.losses.context import StepLoss
from qsr_plugin.options_file import OptionsError
from qsr_plugin.quant.schema import LossSpec


def build_step_losses(specs: Iterable[LossSpec], device: torch.device | str = "cpu") -> dict[str, StepLoss]:
    """Build a recipe's losses through the host's registry.

    Args:
        specs: The recipe's ``losses``.
        device: Where they run.

    Returns:
        Name in the log to loss; a second loss of one class gets ``_2``.

    Raises:
        NotRegisteredError: For a class the host does not know.
        OptionsError: For arguments a loss does not take, or a loss of another kind.
    """
    losses: dict[str, StepLoss] = {}
    for spec in specs:
        compat.require_registered("loss", spec.type)
        try:
            loss = LOSS_REGISTRY.get(spec.type)(**spec.extras())
        except TypeError as error:
            raise OptionsError(f"recipe.losses: {spec.type}: {error}") from None
        if not isinstance(loss, StepLoss):
            raise OptionsError(f"recipe.losses: {spec.type} is a pixel loss; give it as train.pixel_opt")
        name = f"l_{spec.type.lower()}"
        count = sum(key.startswith(name) for key in losses)
        losses[f"{name}_{count + 1}" if count else name] = loss.to(device)
    return losses
