"""A killed and resumed training is the uninterrupted one, bit for bit; broken checkpoints are passed over."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.host import harness

DIE = """
import os, signal
from qsr_plugin import compat, train
compat.import_host()
from qsr_plugin.models.quant_sr_model import QuantSRModel as Model
step = Model.optimize_parameters
def dying(self, iteration):
    if iteration == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, iteration)
Model.optimize_parameters = dying
train.main()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("whole")
    opt = harness.write_options(harness.options(data), folder / "run.yml")
    return folder, opt, harness.train(opt, folder)


def test_killed_three_times_equals_uninterrupted(data: Path, tmp_path: Path) -> None:
    """With statistics of batch norm, and workers that load ahead of the training."""
    # Saved every 4 iterations; 6 batches make an epoch; the first stage ends after 8.
    # So the run goes on from 4 (mid-epoch, mid-stage), 8 (stage border) and 12 (epoch border).
    opt, whole = harness.options(data), tmp_path / "whole"
    opt["network_g"]["backbone"] = {"type": "SRResNet_qsr", "num_feat": 8, "num_block": 1, "upscale": 4}
    opt["datasets"]["train"]["num_worker_per_gpu"] = 2
    file = harness.write_options(opt, tmp_path / "run.yml")
    log = harness.train(file, whole)
    for at in (7, 9, 14):
        done = harness.run(["-c", DIE.format(at=at), "-opt", str(file), "--auto_resume"], tmp_path)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    resumed = harness.train(file, tmp_path, "--auto_resume")

    for name in ("models/net_g_latest.pth", "models/net_g_20.pth", "training_states/20.state"):
        a, b = (harness.read(root / "experiments/run" / name) for root in (whole, tmp_path))
        assert harness.differences(a, b) == [], name
        assert name.endswith(".state") or set(a) == {"params", "params_ema"}
    assert list(harness.losses(resumed)) == list(range(13, 21))
    assert harness.losses(resumed).items() <= harness.losses(log).items()
    assert resumed.count("Stage 2 of 2") == 1


def test_truncated_checkpoints_are_passed_over_with_a_warning(uninterrupted, tmp_path: Path) -> None:
    whole, file, log = uninterrupted
    shutil.copytree(whole / "experiments", tmp_path / "experiments")
    run = tmp_path / "experiments/run"
    for name in ("training_states/20.state", "models/net_g_16.pth"):  # a broken state; a good state, broken network
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])
    resumed = harness.train(file, tmp_path, "--auto_resume")
    assert resumed.count("passing over a broken checkpoint") == 2
    assert "20.state" in resumed and "net_g_16.pth" in resumed
    assert min(harness.losses(resumed)) == 13
    again, before = (harness.read(r / "experiments/run/models/net_g_20.pth") for r in (tmp_path, whole))
    assert harness.differences(again, before) == []


def test_changed_recipe_is_refused_unless_allowed(uninterrupted, data: Path, tmp_path: Path) -> None:
    whole, _, _ = uninterrupted
    shutil.copytree(whole / "experiments", tmp_path / "experiments")
    changed = harness.options(data, recipe={"bits": {"weight": 3}}, train={"total_iter": 21})
    file = harness.write_options(changed, tmp_path / "run.yml")
    refused = harness.run(["-m", "qsr_plugin.train", "-opt", str(file), "--auto_resume"], tmp_path)
    assert refused.returncode != 0
    assert "recipe.bits.weight: saved 4, now 3" in refused.stderr
    assert "--allow-recipe-change" in refused.stderr
    assert "iter:      21" in harness.train(file, tmp_path, "--auto_resume", "--allow-recipe-change")
