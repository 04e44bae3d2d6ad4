"""Quantized networks of several depths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from qsr_plugin import calibrate, quantize_model
from qsr_plugin.quant.depth import depth_blocks
from tests.quant.depths import recipe


@pytest.fixture
def deep(tiny_net, images) -> Callable[..., nn.Module]:
    """``deep(backbone)``: four blocks, calibrated, every factor at 1; ``deep(backbone, FACTORS)`` sets the factors."""

    def build(backbone: str = "EDSR", factors: list[float] | None = None, **changes: object) -> nn.Module:
        net = calibrate(quantize_model(tiny_net(backbone, num_block=4), recipe(**changes)), images)
        for (_, block), factor in zip(depth_blocks(net), factors or []):
            block.shortcut_scale.data.fill_(factor)
        return net.eval()

    return build
