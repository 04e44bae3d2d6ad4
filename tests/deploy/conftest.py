"""Quantized networks that are folded, packed and exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from qsr_plugin import calibrate, load_recipe, quantize_model, save_quantized
from tests.recipes import equal, shipped


@pytest.fixture
def quantized(tiny_net, images) -> Callable[..., nn.Module]:
    """A calibrated tiny network in evaluation mode: ``quantized("pams", "EDSR")``; with its own widths if no bits are given."""

    def build(method: str, backbone: str = "EDSR", bits: int | None = None, **changes: object) -> nn.Module:
        plain = tiny_net(backbone)
        recipe = shipped(method, plain, **changes) if bits is None else equal(method, bits, **changes)
        return calibrate(quantize_model(plain, recipe), images).eval()

    return build


@pytest.fixture
def model(tiny_net, images, tmp_path: Path) -> Path:
    """``net.safetensors``: a calibrated tiny EDSR of 4 bits."""
    path = tmp_path / "net.safetensors"
    save_quantized(calibrate(quantize_model(tiny_net(), equal("pams", 4)), images), path)
    return path


@pytest.fixture
def model_of_depths(tmp_path: Path, tiny_net, images) -> Path:
    """``net.safetensors``: a calibrated network of two blocks, either of which can be left out."""
    recipe = load_recipe({"base": "percentile", "depth": {"role": "block"}}, weight_bits=8, act_bits=8)
    net = calibrate(quantize_model(tiny_net("EDSR", num_block=2), recipe), images)
    for index, block in enumerate(module for module in net.modules() if hasattr(module, "shortcut_scale")):
        block.shortcut_scale.data.fill_(0.5 + index)
    save_quantized(net.eval(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"
