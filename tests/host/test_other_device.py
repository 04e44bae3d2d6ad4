"""Recipes and ``qsr quantize`` on a device beside the CPU: every tensor is made where it is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

from qsr_plugin import load_quantized
from tests import recipes
from tests.host import harness

ROOT = Path(__file__).resolve().parents[2]
#: Of a transformer, those that look at single images, and the one with the most parts.
RUNS = {"EDSR": recipes.METHODS, "SwinIR": [*recipes.ADAPTIVE, "auto"]}

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no devices made of Python",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, float | str]]:
    """What became of each recipe, by backbone."""

    @cache
    def run(backbone: str) -> dict[str, float | str]:
        command = ["-m", "tests.pretend_device", "recipes", backbone, *RUNS[backbone]]
        done = harness.run(command, tmp_path_factory.mktemp("run"), PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize(("backbone", "method"), [(name, one) for name, methods in RUNS.items() for one in methods])
def test_every_recipe(found: Callable[[str], dict[str, float | str]], backbone: str, method: str) -> None:
    """Calibration, all stages and tuning run through; the output after the calibration is that of the CPU."""
    difference = found(backbone)[method]
    assert not isinstance(difference, str), difference
    assert difference < 1e-5


def test_what_mixes_devices_fails() -> None:
    """Else the other tests would show nothing."""
    code = "from tests.pretend_device import NAME, install; install(); import torch; torch.ones(2, device=NAME)"
    assert harness.run(["-c", code], ROOT).returncode == 0
    assert "pretend" in harness.run(["-c", f"{code} + torch.ones(2)"], ROOT).stderr


def test_quantize(tmp_path: Path) -> None:
    """From a file of float weights to the quantized file and its report, which says where it was made."""
    from qsr_plugin.archs.quant_net_arch import build_backbone

    from tests.backbones import tiny_options

    torch.save(build_backbone(tiny_options("EDSR")).state_dict(), tmp_path / "net.pth")
    photos, pair = harness.write_photos(tmp_path / "photos", 2, side=64), harness.write_pairs(tmp_path / "Set")
    command = ["quantize", "net.pth", "--photos", photos, "--steps", 2, "--device", "pretend", "--test", *pair]
    done = harness.run(["-m", "tests.pretend_device", "qsr", *map(str, command)], tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "net_w4a4_2steps.json").read_text())
    assert data["details"]["device"] == "pretend:0" and data["quality"]["Set"]["psnr"] > 0
    net = load_quantized(tmp_path / "net_w4a4_2steps.safetensors")
    assert net(torch.rand(1, 3, 8, 8)).shape == (1, 3, 16, 16)
