"""A project with its own ``archs/``, ``options/`` and ``train.py`` gains quantization by one import."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.host import harness

TRAIN = """\
import qsr_plugin

import json
from importlib import resources
from pathlib import Path

import archs
import options
from basicsr.train import train_pipeline

if __name__ == "__main__":
    root = Path(__file__).resolve().parent
    train_pipeline(str(root))
    modules = {module.__name__: module.__file__ for module in (qsr_plugin, archs, options)}
    shipped = resources.files("qsr_plugin.options") / "recipes" / "pams.yml"
    (root / "modules.json").write_text(json.dumps({**modules, "pams": str(shipped)}))
"""

TOY_ARCH = """\
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn


@ARCH_REGISTRY.register()
class ToyNet(nn.Module):
    def __init__(self, width, scale):
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        conv1, conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.body = nn.Sequential(conv1, nn.ReLU(), conv2)
        self.tail = nn.Sequential(nn.Conv2d(width, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, x):
        x = self.head(x)
        return self.tail(x + self.body(x))
"""

#: Weights of the body only, so nothing has to be calibrated.
TOY_RECIPE = {
    "method": "pams",
    "bits": {"weight": 4, "act": 32},
    "quantizers": {"act": "pams", "weight": "maxabs"},
    "placement": "toy",
    "placements": {"toy": [{"match": "body.*", "type": "Conv2d", "port": "weight"}]},
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project's folder; training data lie beside it."""
    root = tmp_path / "project"
    for name, content in {"train.py": TRAIN, "archs/__init__.py": "from archs import toy_arch\n",
                          "archs/toy_arch.py": TOY_ARCH, "options/__init__.py": ""}.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, "utf-8")
    harness.write_data(tmp_path / "data")
    return root


def train(python: Path, project: Path, **changes: Any) -> str:
    """Run the project's own training with its own option file from another folder; returns the log."""
    short = {"train": {"total_iter": 4}, "val": {"val_freq": 4}, "logger": {"save_checkpoint_freq": 2}}
    opt = harness.options(project.parent / "data", **short)
    recipe = opt.pop("recipe")  # moving this block into network_g is the work of the package's own entry
    opt["network_g"] = changes.pop("network_g", {**opt["network_g"], "recipe": recipe})
    file = harness.write_options({**opt, **changes}, project / "options" / "toy.yml")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(python), str(project / "train.py"), "-opt", str(file)]
    done = subprocess.run(command, cwd=project.parent, env=env, text=True, capture_output=True, timeout=harness.TIMEOUT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def check_modules(python: Path, project: Path) -> None:
    """The project's folders are the project's, and the package is the one of the second environment."""
    seen = {name: Path(file) for name, file in json.loads((project / "modules.json").read_text("utf-8")).items()}
    assert seen["archs"] == project / "archs" / "__init__.py"
    assert seen["options"] == project / "options" / "__init__.py"
    assert seen["qsr_plugin"].is_relative_to(python.parents[1])
    assert seen["pams"].is_relative_to(python.parents[1]) and seen["pams"].is_file()


def test_arch_only(second_python: Path, project: Path) -> None:
    """The host's own model trains the project's network with quantized weights."""
    net = {"type": "QuantNet", "backbone": {"type": "ToyNet", "width": 8, "scale": 4}, "recipe": TOY_RECIPE}
    log = train(second_python, project, model_type="SRModel", network_g=net)
    check_modules(second_python, project)
    assert list(harness.losses(log)) == [1, 2, 3, 4]
    models = project / "experiments" / "run" / "models"
    first, last = (harness.read(models / f"net_g_{number}.pth")["params"] for number in (2, 4))
    assert set(first) >= {"head.weight", "body.0.weight", "body.2.weight", "tail.0.weight"}
    assert all(not first[name].equal(last[name]) for name in ("head.weight", "body.0.weight"))
    assert (project / "experiments" / "run" / "training_states" / "4.state").is_file()


def test_model(second_python: Path, project: Path) -> None:
    """The package's model calibrates and trains a network of the host, from a recipe named in ``network_g``."""
    log = train(second_python, project)
    check_modules(second_python, project)
    assert "quantizers on 4 image(s)" in log
    assert list(harness.losses(log)) == [1, 2, 3, 4]
    assert "# FAB tinyval: 4.000" in log
    models = project / "experiments" / "run" / "models"
    assert {path.name for path in models.iterdir()} >= {"net_g_4.pth", "net_g_4.safetensors", "net_g_latest.pth"}
    saved = harness.read(models / "net_g_4.pth")["params"]
    ranges = [value for name, value in saved.items() if "_quantizer." in name]
    assert ranges and all(value.isfinite().all() for value in ranges)
