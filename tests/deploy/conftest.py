"""Quantized networks that are folded, packed and exported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from qsr_plugin import calibrate, quantize_model
from tests.recipes import equal, shipped


@pytest.fixture
def quantized(tiny_net, images) -> Callable[..., nn.Module]:
    """A calibrated tiny network in evaluation mode: ``quantized("pams", "EDSR")``; with its own widths if no bits are given."""

    def build(method: str, backbone: str = "EDSR", bits: int | None = None, **changes: object) -> nn.Module:
        plain = tiny_net(backbone)
        recipe = shipped(method, plain, **changes) if bits is None else equal(method, bits, **changes)
        return calibrate(quantize_model(plain, recipe), images).eval()

    return build
