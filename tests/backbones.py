"""Backbones with a role table, for tests that run all of them: small instances, and what they cannot do."""

from __future__ import annotations

from typing import Any

from qsr_plugin.archs.roles import list_backbones
from torch import nn

from qsr_plugin.quant.places import places_named, roles_of
from tests.recipes import METHODS

#: Constructor arguments that make a backbone small enough for tests.
TINY = {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 2, "upscale": 2}
#: The same for those that take others.
TINY_OWN = {
    "CARN": {"num_feat": 8, "num_block": 1, "upscale": 2},
    "RDN": {**TINY, "num_layer": 2, "num_grow_ch": 4},
    "IDN": {"num_feat": 16, "num_block": 1, "upscale": 2, "rgb": True},
    "SwinIR": {
        "img_size": 8,
        "window_size": 4,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "mlp_ratio": 2.0,
        "drop_path_rate": 0.0,
        "upscale": 2,
        "upsampler": "pixelshuffledirect",
    },
    "HAT": {
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "window_size": 4,
        "compress_ratio": 2,
        "squeeze_factor": 4,
        "overlap_ratio": 0.5,
        "drop_path_rate": 0.0,
        "upscale": 2,
    },
}
#: Backbones of linear layers and attention, whose blocks begin with a norm.
TRANSFORMERS = ("HAT", "SwinIR")
#: Backbones whose blocks cannot be left out, with the words in which they say so.
NO_DEPTH = {
    "CARN": "a ReLU follows its sum",
    "IDN": "a convolution follows its sum",
}
DEPTH = [backbone for backbone in list_backbones() if backbone not in NO_DEPTH]
#: Recipes that a backbone refuses, with the reason: the published network of several depths.
REFUSED = {("quantsr", backbone): reason for backbone, reason in NO_DEPTH.items()}
#: All other pairs of recipe and backbone.
FITTING = [(method, kind) for method in METHODS for kind in list_backbones() if (method, kind) not in REFUSED]


def tiny_options(kind: str, num_block: int | None = None, **changes: object) -> dict[str, Any]:
    """Options of a small backbone, with another number of blocks if told."""
    options = {"type": kind, **TINY_OWN.get(kind, TINY), **changes}
    if num_block is None:
        return options
    if kind in TRANSFORMERS:
        return {**options, "depths": [2] * num_block, "num_heads": [2] * num_block}
    return {**options, "num_block": num_block}


def names_of(net: nn.Module, role: str) -> list[str]:
    """Dotted names of the modules of a role, in module order; none for a role that is empty or not there."""
    return [name for name, _, _ in places_named(net, f"{role}:input")] if roles_of(net).get(role) else []
