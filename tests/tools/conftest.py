"""Scripts as modules, and a tiny float network to run them on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import yaml
from qsr_plugin.archs.quant_net_arch import build_backbone
from safetensors.torch import save_file

TOOLS = Path(__file__).resolve().parents[2] / "tools"
BACKBONE = {
    "type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 2, "upscale": 4, "img_range": 255.0,
}  # fmt: skip


class TinyNetwork(NamedTuple):
    """A float network on disk.

    Attributes:
        backbone: YAML file with its ``network_g``.
        weights: Random float weights.
    """

    backbone: Path
    weights: Path


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """``script("demo")`` is ``tools/demo.py`` as a module."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{name}_script", TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> TinyNetwork:
    """A tiny EDSR with random weights."""
    folder = tmp_path_factory.mktemp("network")
    made = TinyNetwork(folder / "tiny_edsr.yml", folder / "tiny.safetensors")
    made.backbone.write_text(yaml.safe_dump({"network_g": BACKBONE}), "utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(build_backbone(BACKBONE).state_dict(), made.weights)
    return made
