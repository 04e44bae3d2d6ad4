"""A training that starts from what another option file trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qsr_plugin import chain, train
from qsr_plugin.options_file import OptionsError, load_options, options_folder
from tests.host import harness

NETWORK = Path("experiments/first/models/net_g_latest.safetensors")


def write_two(folder: Path, data: Path) -> Path:
    """Option files of an 8-bit training and of one that lowers bits from there; returns the second."""
    length = {"total_iter": 4, "ema_decay": 0}
    first = {"bits": {"weight": 8, "act": 8}}
    harness.write_options(harness.options(data, name="first", recipe=first, train=length), folder / "first.yml")
    second = harness.options(data, name="second", starts_from="first.yml", train=length)
    second["recipe"] = {"base": "cadyq", "stages": [{"lr": {"bits": 1e-4}}]}
    return harness.write_options(second, folder / "second.yml")


def test_the_first_training_runs_once_and_the_second_starts_from_it(tmp_path: Path) -> None:
    file = write_two(tmp_path, harness.write_data(tmp_path / "data", count=4))
    log = harness.train(file, tmp_path)
    assert f"second starts from {NETWORK}, which is trained first" in log
    assert f"Start from the weights and ranges of {NETWORK}" in log and "Stage 1 of 1" in log
    assert (tmp_path / "experiments/second/models/net_g_latest.safetensors").is_file()
    made = (tmp_path / NETWORK).stat().st_mtime_ns
    again = harness.train(file, tmp_path, "--auto_resume", "--force_yml", "train:total_iter=5")
    assert "trained first" not in again and "Resuming training from epoch" in again
    assert (tmp_path / NETWORK).stat().st_mtime_ns == made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Commands that would have been run, each of which makes the network."""
    made: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess:
        made.append(command)
        NETWORK.parent.mkdir(parents=True)
        NETWORK.touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(chain.subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    return made


def second(tmp_path: Path, **path: Any) -> dict[str, Any]:
    return {**load_options(write_two(tmp_path, tmp_path)), "path": path}


def start(options: dict[str, Any], **how: bool) -> Path | None:
    return chain.start_of(options, **{"resuming": False, "distributed": False, **how})


def test_command_and_result(calls: list[list[str]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qsr_plugin.train", "-opt", str(tmp_path / "first.yml"), "--auto_resume"]
    options = second(tmp_path, pretrain_network_float="weights.pth")
    assert start(options) == NETWORK and start(options) == NETWORK
    # The first file names no float weights, so it gets those of the second.
    assert calls == [[*command, "--force_yml", "path:pretrain_network_float=weights.pth"]]


def test_what_is_given_wins(calls: list[list[str]], tmp_path: Path) -> None:
    assert start(second(tmp_path, pretrain_network_quantized="mine.safetensors")) is None
    assert start(second(tmp_path, pretrain_network_g="mine.safetensors")) is None
    assert start({**second(tmp_path), "starts_from": None}) is None
    assert start(second(tmp_path), resuming=True) is None
    assert calls == []


def test_several_processes_are_told_what_to_run_first(calls: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"first run\n.* -m qsr_plugin.train -opt .*first.yml --auto_resume"):
        start(second(tmp_path), distributed=True)
    start(second(tmp_path))
    assert start(second(tmp_path), distributed=True) == NETWORK


def test_a_first_training_that_fails_ends_the_chain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chain.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 3))
    with pytest.raises(OptionsError, match="ended with code 3, see above"):
        start(second(tmp_path))


def test_the_start_reaches_the_hosts_file(calls: list[list[str]], tmp_path: Path) -> None:
    options, resolved = second(tmp_path), tmp_path / "resolved.yml"
    train.prepare_start(options, resolved, ["--launcher", "none"])
    assert load_options(resolved)["path"]["pretrain_network_quantized"] == str(NETWORK)
    with pytest.raises(OptionsError, match="first run"):
        NETWORK.unlink()
        train.prepare_start(second(tmp_path), resolved, ["--launcher", "pytorch"])


SHIPPED = [path for path in (options_folder() / "train").glob("*/*.yml") if "starts_from" in path.read_text("utf-8")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(options_folder())))
def test_shipped_chains_fit_together(path: Path) -> None:
    later = load_options(path)
    first = load_options(later["starts_from"])
    assert first["network_g"]["backbone"] == later["network_g"]["backbone"]
    recipes = [options["network_g"]["recipe"] for options in (first, later)]
    assert recipes[0]["bits"]["weight"] == recipes[1]["bits"]["weight"]
    assert recipes[0]["quantizers"] == recipes[1]["quantizers"]
    assert first["datasets"]["train"]["dataroot_gt"] == later["datasets"]["train"]["dataroot_gt"]
