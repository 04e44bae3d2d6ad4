"""Learning rates of a tuning in units of what they change.

Adam moves every number by about its learning rate, whatever the size of the gradient. What a good rate is depends on
the size of the numbers then: features of one network are a hundred times larger than those of another. Counted in
quantization steps, one rate fits all tensors of all networks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.schema import Recipe
from qsr_plugin.quant.surgery import quantizers, sites


def refuse_relative(recipe: Recipe) -> None:
    """Refuse a recipe whose learning rates count in quantization steps, for a training by the host.

    Raises:
        RecipeError: If its tuning has ``relative``.
    """
    if recipe.tuning is not None and recipe.tuning.relative:
        raise RecipeError(
            f"recipe '{recipe.method}' is tuned with rates in quantization steps (tuning.relative), which the host's "
            "optimiser does not know: use 'qsr quantize', or give stages with rates of your own and tuning: null"
        )


def equal_groups(groups: Mapping[str, Sequence[nn.Parameter]]) -> Iterator[dict[str, Any]]:
    """Groups of an optimiser whose learning rates are what the recipe's stages say.

    Args:
        groups: Learning group to its parameters.

    Yields:
        ``params``, ``name`` (the learning group) and ``unit``, the factor of its rates.
    """
    return ({"params": list(parameters), "name": name, "unit": 1.0} for name, parameters in groups.items())


def relative_groups(net: nn.Module, groups: Mapping[str, Sequence[nn.Parameter]]) -> Iterator[dict[str, Any]]:
    """Groups of an optimiser whose learning rates count in quantization steps, one group for each tensor.

    Ranges and quantized weights count in the step of their quantizer. The bias of a layer counts in what one step of
    its input makes of its output: the input's step times the mean norm of the rows of the weight. Parameters of layers
    that are not quantized keep their values.

    Args:
        net: Calibrated network.
        groups: Learning group to its parameters.

    Yields:
        As :func:`equal_groups`.

    Raises:
        RecipeError: If a quantizer has no uniform grid, or a bit policy has parameters to train.
    """
    units = _units(net)
    for name, parameters in groups.items():
        if name in ("bits", "thresholds"):
            raise RecipeError(
                f"recipe.tuning.relative: the group '{name}' has no quantization step to count in; leave 'relative' out"
            )
        for parameter in parameters:
            if id(parameter) in units:
                yield {"params": [parameter], "name": name, "unit": units[id(parameter)]}


def _units(net: nn.Module) -> dict[int, float]:
    """Parameter by identity to the size that its learning rate is a share of."""
    steps = {name: _step(quantizer) for name, quantizer in quantizers(net)}
    units = {id(p): steps[name] for name, quantizer in quantizers(net) for p in quantizer.range_parameters()}
    for name, site in sites(net):
        weight, bias = getattr(site, "weight", None), getattr(site, "bias", None)
        if f"{name}.weight" in steps:
            units[id(weight)] = steps[f"{name}.weight"]
        if isinstance(weight, Tensor) and isinstance(bias, Tensor) and f"{name}.input" in steps:
            units[id(bias)] = steps[f"{name}.input"] * float(weight.detach().flatten(1).norm(dim=1).mean())
    return units


@torch.no_grad()
def _step(quantizer: nn.Module) -> float:
    try:
        return float(quantizer.qparams(max(quantizer.candidates)).scale.mean())
    except NotImplementedError as error:
        raise RecipeError(f"recipe.tuning.relative: {error}; leave 'relative' out") from None
