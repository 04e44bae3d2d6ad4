"""Two gloo processes on the CPU do what one process does on the joint batch."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from tests.host import harness

# Sums are taken in another order, and Adam divides by their root; weights are of the order 0.1, steps of 1e-3.
TOLERANCE = 1e-5

KEEP_EACH_RANK = """
import torch
from qsr_plugin import checkpoint, compat, train
compat.import_host()
from qsr_plugin.models.quant_sr_model import QuantSRModel as Model
save = Model.save
def keep(self, epoch, current_iter):
    torch.save(self.net.state_dict(), f"rank{self.opt['rank']}_{current_iter}.pth")
    save(self, epoch, current_iter)
Model.save = keep
train.main()
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.write_data(tmp_path_factory.mktemp("data"), count=8)


LR = {"weights": 1e-3, "ranges": 1e-2, "weight_ranges": 1e-3}
#: What a distributed step may do beside the plain backward of the host: a teacher and ranges joined over processes, two
#: gradient sets combined after each is averaged, several forwards.
RECIPES = {
    "tracking": {"losses": [{"type": "SKTLoss"}]},
    "cooperative": {
        "base": "odm",
        "bits": {"weight": 2, "act": 2},
        "stages": [{"iters": 8, "lr": LR, "train": ["weights"]}, {"lr": LR}],
        # So large that it would show if the norm or the angle were not those of the joint batch.
        "losses": [{"type": "MismatchLoss", "loss_weight": 1e-4}],
    },
    "depths": {
        "base": "percentile",
        "depth": {"role": "block"},
        "stages": [{"iters": 8, "lr": LR}, {"lr": LR, "depths": [1.0, 0.5]}],
    },
}


def options(data: Path, batch: int, recipe: dict) -> dict:
    return harness.options(
        data,
        datasets={"train": {"batch_size_per_gpu": batch}},
        # Adam divides by the gradient's size: without eps a rounding error of a zero gradient becomes a full step.
        train={"total_iter": 12, "optim_g": {"eps": 1e-4}},
        recipe=recipe,
        path={"pretrain_network_float": "float.pth"},
    )


def write_float(folder: Path) -> None:
    from qsr_plugin import compat

    compat.import_host()
    from qsr_plugin.archs.quant_net_arch import build_backbone

    torch.manual_seed(0)
    net = build_backbone(harness.options(folder)["network_g"]["backbone"])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"params": net.state_dict()}, folder / "float.pth")


def two_processes(script: Path, opt: Path, cwd: Path):
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
    ]
    return harness.run([*command, str(script), "-opt", str(opt), "--launcher", "pytorch"], cwd)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_two_processes_equal_one_on_the_joint_batch(data: Path, tmp_path: Path, recipe: dict) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    script = tmp_path / "keep.py"
    script.write_text(KEEP_EACH_RANK)
    for folder in (one, two):
        write_float(folder)
    single = harness.run(
        [str(script), "-opt", str(harness.write_options(options(data, 4, recipe), tmp_path / "one.yml"))], one
    )
    assert single.returncode == 0, single.stderr[-3000:]
    pair = two_processes(script, harness.write_options(options(data, 2, recipe), tmp_path / "two.yml"), two)
    assert pair.returncode == 0, pair.stdout[-2000:] + pair.stderr[-3000:]
    assert "Stage 2 of 2" in pair.stdout + pair.stderr

    for iteration in (4, 8, 12):
        joint = harness.read(one / f"rank0_{iteration}.pth")
        ranks = [harness.read(two / f"rank{rank}_{iteration}.pth") for rank in (0, 1)]
        assert harness.differences(*ranks) == []  # ranges, weights and buffers: identical on both
        for key, value in joint.items():
            torch.testing.assert_close(
                ranks[0][key], value, rtol=1e-4, atol=TOLERANCE, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_unused_parameter_search_is_refused(data: Path, tmp_path: Path) -> None:
    opt = harness.write_options(harness.options(data, find_unused_parameters=True), tmp_path / "run.yml")
    done = harness.run(["-m", "qsr_plugin.train", "-opt", str(opt)], tmp_path)
    assert done.returncode != 0 and "find_unused_parameters" in done.stderr and "Traceback" not in done.stderr
