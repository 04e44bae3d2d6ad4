"""Layers that are stored with a network and never learn."""

from __future__ import annotations

from torch import nn


def fixed(module: nn.Module) -> nn.Module:
    """Turn the parameters of a module into buffers, in place; keys and values stay as they are.

    For constants that published weights hold as layers (mean shifts), and for parts of them that a network does not
    run: no optimizer sees them, and distributed training does not wait for their gradients.

    Args:
        module: Any module.

    Returns:
        ``module``.
    """
    for layer in module.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            delattr(layer, name)
            layer.register_buffer(name, parameter.detach())
    return module
