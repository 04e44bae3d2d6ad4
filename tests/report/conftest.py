"""Tiny networks and image folders for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import basicsr  # noqa: F401  (registers the backbones)
import numpy as np
import pytest
import torch
from PIL import Image
from qsr_plugin.archs.quant_net_arch import build_backbone
from torch import nn

from qsr_plugin import calibrate, load_recipe, quantize_model
from tests.backbones import tiny_options


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """``tiny(backbone)`` is a float network; ``tiny(backbone, recipe, **overrides)`` a quantized, calibrated one."""

    def build(backbone: str, recipe: str | None = None, *, calibrated: bool = True, **overrides: object) -> nn.Module:
        torch.manual_seed(0)
        net = build_backbone(tiny_options(backbone))
        if recipe is not None:
            quantize_model(net, load_recipe(recipe, **overrides))
            if calibrated:
                calibrate(net, [torch.rand(2, 3, 8, 8)])
        return net.eval()

    return build


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[[str, Mapping[str, np.ndarray]], Path]:
    """Write images by file name into a folder of ``tmp_path``."""

    def write(folder: str, images: Mapping[str, np.ndarray]) -> Path:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        for name, image in images.items():
            Image.fromarray(image).save(place / name)
        return place

    return write
