"""A training that starts from what another option file trains."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qsr_plugin import chain, compat, train
from qsr_plugin.options_file import OptionsError, load_options, options_folder, read_yaml
from tests.host import harness

compat.import_host()

NETWORK = Path("experiments/first/models/net_g_latest.safetensors")


def write_two(folder: Path, data: Path) -> Path:
    """Option files of an 8-bit training and of one that lowers bits from there; returns the second."""
    length = {"total_iter": 4, "ema_decay": 0}
    first = harness.options(data, name="first", recipe={"bits": {"weight": 8, "act": 8}}, train=length)
    first["path"]["pretrain_network_float"] = None
    harness.write_options(first, folder / "first.yml")
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


def changed(folder: Path, file: str, **changes: Any) -> None:
    """Change top-level keys of one of the option files."""
    harness.write_options({**read_yaml(folder / file), **changes}, folder / file)


def start(options: dict[str, Any], **how: Any) -> Path | None:
    return chain.start_of(options, **{"resuming": False, "distributed": False, **how})


def test_command_and_result(calls: list[list[str]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qsr_plugin.train", "-opt", str(tmp_path / "first.yml"), "--auto_resume"]
    options = second(tmp_path, pretrain_network_float="weights.pth")
    assert start(options) == NETWORK and start(options) == NETWORK
    # The first file names no float weights, so it gets those of the second.
    assert calls == [[*command, "--force_yml", "path:pretrain_network_float=weights.pth"]]


def test_what_is_forced_for_data_and_devices_holds_for_both(calls: list[list[str]], tmp_path: Path) -> None:
    shared = ["datasets:train:batch_size_per_gpu=1", "num_gpu=0", "dist_params={backend: gloo, port: 1}"]
    own = ["train:total_iter=9", "name=third", "path:resume_state=~"]
    with pytest.raises(OptionsError) as told:
        start(second(tmp_path), distributed=True, forced=[*own, *shared])
    shown = shlex.split(str(told.value).splitlines()[-1])
    start(second(tmp_path), forced=[*own, *shared])
    assert calls == [shown], "what is shown can be run"
    assert shown[-4:] == ["--force_yml", *shared]


def test_a_first_file_that_cannot_take_what_is_passed_on(calls: list[list[str]], tmp_path: Path) -> None:
    options = second(tmp_path, pretrain_network_float="weights.pth")
    first = read_yaml(tmp_path / "first.yml")
    without = {key: value for key, value in first.items() if key != "path"}
    for content in (without, {**without, "path": None}):
        harness.write_options(content, tmp_path / "first.yml")
        with pytest.raises(OptionsError, match="first.yml cannot take over .*'path:pretrain_network_float'"):
            start(options)
    assert calls == []
    assert start({**options, "path": None}) == NETWORK and len(calls) == 1


@pytest.mark.parametrize("case", ["itself", "one another", "the same name"])
def test_a_training_cannot_start_from_itself(calls: list[list[str]], tmp_path: Path, case: str) -> None:
    options = second(tmp_path)
    if case == "itself":
        changed(tmp_path, "second.yml", starts_from="second.yml")
        options = load_options(tmp_path / "second.yml", ["name=third"])  # another name does not hide it
    elif case == "one another":
        changed(tmp_path, "first.yml", starts_from="second.yml")
    else:
        changed(tmp_path, "first.yml", name="second")
    with pytest.raises(OptionsError, match="second.* comes twice"):
        start(options)
    assert calls == []
    assert start({**options, "path": {"pretrain_network_quantized": "mine"}}) is None


def test_a_chain_may_have_more_than_two(calls: list[list[str]], tmp_path: Path) -> None:
    options = second(tmp_path)
    harness.write_options({**read_yaml(tmp_path / "first.yml"), "name": "zeroth"}, tmp_path / "zeroth.yml")
    changed(tmp_path, "first.yml", starts_from="zeroth.yml")
    assert start(options) == NETWORK and calls[0][4] == str(tmp_path / "first.yml")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"backbone": {"num_block": 3}}, "unexpected: body.2.conv1.weight"),
        ({"recipe": {"placement": "body"}}, "missing: body.0.input_quantizer.alpha"),
        ({"recipe": {"quantizers": {"act": {"type": "lsq"}}}}, "quantizers.act: it has 'lsq', the recipe wants 'pams'"),
        ({"type": "EDSR"}, "'first' trains a EDSR"),
    ],
)
def test_a_start_that_would_not_fit_is_not_trained(
    calls: list[list[str]], tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    options, first = second(tmp_path), read_yaml(tmp_path / "first.yml")
    first["recipe"].update(changes.get("recipe", {}))
    first["network_g"]["backbone"].update(changes.get("backbone", {}))
    if "type" in changes:
        del first["recipe"]
        first["network_g"] = first["network_g"]["backbone"]
    harness.write_options(first, tmp_path / "first.yml")
    with pytest.raises(OptionsError, match=told):
        start(options)
    assert calls == []


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
    NETWORK.unlink()
    for flags in (["--launcher", "pytorch"], ["--launcher=pytorch"], ["--launcher=slurm", "none"]):
        with pytest.raises(OptionsError, match="first run"):
            train.prepare_start(second(tmp_path), resolved, flags)


def test_any_state_file_says_that_a_training_goes_on(
    calls: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "newest_state", lambda *_: pytest.fail("states are read by the host's part, once"))
    states = Path("experiments/second/training_states")
    states.mkdir(parents=True)
    (states / "4.state").touch()
    train.prepare_start(second(tmp_path), tmp_path / "resolved.yml", ["--auto_resume"])
    assert calls == []
    train.prepare_start(second(tmp_path), tmp_path / "resolved.yml", [])
    assert len(calls) == 1


@pytest.mark.parametrize(("flag", "gpus"), [("--launcher=pytorch", "auto"), ("--launcher=none", 1)])
def test_the_launcher_may_be_written_as_one_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, gpus: int | str
) -> None:
    monkeypatch.setattr(train.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(train.sys, "argv", ["train"])
    write_two(tmp_path, tmp_path)
    changed(tmp_path, "first.yml", num_gpu="auto", path=None)
    (tmp_path / "resolved").mkdir()
    own, flags = train.own_arguments(["-opt", str(tmp_path / "first.yml"), flag])
    options = train.resolved_command(own, flags, tmp_path / "resolved")
    assert options["num_gpu"] == gpus and train.sys.argv[3:] == [flag]
    assert options["path"] == {}, "the host reads a mapping"


SHIPPED = [path for path in (options_folder() / "train").glob("*/*.yml") if "starts_from" in path.read_text("utf-8")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(options_folder())))
def test_shipped_chains_fit_together(path: Path) -> None:
    later = load_options(path)
    first = load_options(later["starts_from"])
    chain.refuse_misfit(first, later)
    recipes = [options["network_g"]["recipe"] for options in (first, later)]
    assert recipes[0]["bits"]["weight"] == recipes[1]["bits"]["weight"]
    assert recipes[0]["quantizers"] == recipes[1]["quantizers"]
    assert first["datasets"]["train"]["dataroot_gt"] == later["datasets"]["train"]["dataroot_gt"]
