"""``QuantNet``: the registered arch that turns any registered float arch into a quantized network."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from inspect import Parameter, signature
from typing import Any, Optional, Union

import basicsr.archs  # noqa: F401 - registers the host's networks
from basicsr.utils.registry import ARCH_REGISTRY
from qsr_plugin.archs.padding import pad_to_windows
from torch import nn

from qsr_plugin.errors import suggest
from qsr_plugin.options_file import OptionsError
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.quant.schema import Recipe
from qsr_plugin.quant.surgery import quantize_model

_FOREIGN = {"basicsr", "qsr"}


def build_backbone(options: Mapping[str, Any]) -> nn.Module:
    """Build a float network from the host's registry.

    Args:
        options: ``type`` and the constructor's arguments. A class of this package is found with or without its
            registry suffix ``_qsr``.

    Returns:
        The network, with the attribute ``backbone_options`` (a plain copy of ``options``). It takes images of any
        size: one with windows pads them.

    Raises:
        OptionsError: For an unknown type, with the closest registered one, or arguments the class does not take.
    """
    options = deepcopy(dict(options))
    kind = str(options.get("type"))
    name = registered_name(kind)
    if name is None:
        known = ARCH_REGISTRY.keys()
        names = {key.rsplit("_", 1)[0] if key.rsplit("_", 1)[-1] in _FOREIGN else key for key in known}
        raise OptionsError(
            f"network_g.backbone.type: no arch '{kind}' is registered. If a file of yours defines it, import that file "
            "first (with @ARCH_REGISTRY.register() above the class); on the command line: qsr --import FILE.py ... "
            f"{suggest(kind, names)}"
        )
    build, arguments = ARCH_REGISTRY.get(name), {key: value for key, value in options.items() if key != "type"}
    named = [key for key, one in signature(build).parameters.items() if one.kind is not Parameter.VAR_KEYWORD]
    unknown = next((key for key in arguments if key not in named), None)
    if unknown and build.__module__.startswith("basicsr."):  # the host's SwinIR would ignore it
        raise OptionsError(f"network_g.backbone ({kind}): there is no argument '{unknown}'. {suggest(unknown, named)}")
    try:
        net = pad_to_windows(build(**arguments))
    except (TypeError, ValueError, AssertionError) as error:
        raise OptionsError(f"network_g.backbone ({kind}): {error}") from None
    net.backbone_options = {**options, "type": kind}
    return net


def registered_name(kind: str) -> Optional[str]:
    """Name of a backbone in the host's registry, with the suffix of this package where it has one; else ``None``."""
    return next((name for name in (kind, f"{kind}_qsr") if name in ARCH_REGISTRY), None)


@ARCH_REGISTRY.register()
def QuantNet(backbone: Mapping[str, Any], recipe: Union[str, Mapping[str, Any], Recipe]) -> nn.Module:
    """Build a quantized network; it behaves like the float one and its parameters keep their names.

    Args:
        backbone: Options of the float arch: ``type`` and its arguments.
        recipe: Name of a shipped recipe, or a mapping (see :func:`qsr_plugin.load_recipe`).

    Returns:
        The quantized network, not calibrated yet.
    """
    return quantize_model(build_backbone(backbone), load_recipe(recipe))
