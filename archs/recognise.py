"""Backbone options from a float state dict: which architecture it belongs to, and its sizes.

Whatever :mod:`qsr_plugin.archs.option_readers` reads is then checked: the network is built without storage and must
have exactly the state dict's keys and shapes, up to index tables that building it makes anew, so no other architecture
can be taken for one of these.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from qsr_plugin.archs.option_readers import READERS, options_by_shape
from qsr_plugin.archs.quant_net_arch import build_backbone
from torch import Tensor, nn

from qsr_plugin.options_file import backbone_options, options_folder
from qsr_plugin.quant.surgery import rebuilt_buffers


def recognise(state: Mapping[str, Tensor], scale: int | None = None) -> dict[str, Any] | None:
    """Backbone options of a float state dict.

    What no shape shows is taken from the first shipped file in ``options/backbones`` (by name) that agrees with
    everything shapes do show, or else is the published default: ``img_range`` 255 (SwinIR, HAT: 1), the mean of DIV2K,
    ``res_scale`` 1 (0.1 for EDSR with 256 features); an IDN for luma is used on RGB. Note SRResNet: epsilon of the
    batch norms and the last activation leave no trace, and the shipped file for x4 stands for the public weights (1e-3,
    tanh). Other weights of the same sizes need an option file of their own.

    Args:
        state: Key names and tensors of any device, without outer level (:func:`qsr_plugin.checkpoint.state_dict_in`).
        scale: Upsampling factor, if it is known. Asked only where the shapes do not settle it: one convolution
            before one pixel shuffle whose images have other channels than the input; IDN, and CARN for several scales,
            which are not recognised without it.

    Returns:
        ``{"type": ..., and arguments}`` for :func:`~qsr_plugin.archs.quant_net_arch.build_backbone`; the network takes
        ``state`` strictly. ``None`` for an architecture that is not known here, or anything that is no state dict.
    """
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        return None
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    for kind in READERS:
        for known_scale in dict.fromkeys((None, scale)):
            try:
                options = _with_shipped({"type": kind, **options_by_shape(kind, shapes, known_scale)})
                if _shapes_of(options, shapes) == shapes:
                    return options
            except (LookupError, ArithmeticError, ValueError, TypeError, RuntimeError):
                continue  # a key or size that the architecture has is not there, or makes no network
    return None


def _with_shipped(options: dict[str, Any]) -> dict[str, Any]:
    for path in sorted((options_folder() / "backbones").glob("*.yml")):
        shipped = backbone_options(path.stem)
        if options.items() <= shipped.items():
            return shipped
    return options


def _shapes_of(options: Mapping[str, Any], found: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of a network, without those of index tables that are not among the keys ``found``: files may lack them."""
    net = _unfilled(options)
    lacking = rebuilt_buffers(net) - set(found)
    return {key: tuple(value.shape) for key, value in net.state_dict().items() if key not in lacking}


def _unfilled(options: Mapping[str, Any]) -> nn.Module:
    """A network for its shapes alone."""
    try:
        with torch.device("meta"):
            return build_backbone(options)
    except RuntimeError:  # SwinIR's constructor asks a tensor for its values
        with torch.random.fork_rng(devices=[]):
            return build_backbone(options)
