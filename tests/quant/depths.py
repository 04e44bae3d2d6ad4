"""Networks of several depths: their recipe, factors for four blocks, and what runs in them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import load_recipe
from qsr_plugin.quant.depth import depth_blocks
from tests.backbones import DEPTH

RECIPE = {"base": "percentile", "depth": {"role": "block"}, "stages": [{"depths": [1.0, 0.5, 0.25]}]}
FACTORS = [1.5, -0.25, 0.75, 1.25]
#: The factors above from the smallest absolute value to the largest.
ORDER = (1, 2, 3, 0)

backbones = pytest.mark.parametrize("backbone", DEPTH)


def recipe(bits: int = 4, **changes: object):
    """The recipe with these bits for weights and activations."""
    return load_recipe({**RECIPE, **changes}, weight_bits=bits, act_bits=bits)


def run(net: nn.Module, x: Tensor) -> Tensor:
    """The output, without gradients."""
    with torch.no_grad():
        return net(x)


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """Blocks that can be left out."""
    return [block for _, block in depth_blocks(net)]
