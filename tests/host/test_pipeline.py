"""The entry points as a user runs them: YAML in, LMDB read, checkpoints and scores out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qsr_plugin import compat, load_quantized, train
from tests.host import harness

compat.import_host()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    root = tmp_path_factory.mktemp("pipeline")
    data = harness.write_data(root / "data")
    opt = harness.write_options(harness.options(data), root / "run.yml")
    return root, data, harness.train(opt, root, "--force_yml", "recipe:bits:act=3", "train:total_iter=12")


def test_training_logs_and_saves(trained: tuple[Path, Path, str]) -> None:
    root, _, log = trained
    assert list(harness.losses(log)) == list(range(1, 13))
    assert "quantizers on 4 image(s)" in log and "Stage 2 of 2" in log
    assert "FAB tinyval: 3.000" in log  # the forced value reached the recipe
    models = root / "experiments/run/models"
    assert {"net_g_12.pth", "net_g_12.safetensors", "net_g_latest.pth"} <= {path.name for path in models.iterdir()}
    resolved = (root / "experiments/run/run.yml").read_text()
    assert "placements:" in resolved  # the recipe is written out in full


def test_test_entry_scores_what_training_scored(trained: tuple[Path, Path, str]) -> None:
    root, data, log = trained
    opt = harness.options(data, recipe={"bits": {"act": 3}})
    for key in ("train", "logger"):
        del opt[key]
    opt["datasets"] = {"test_1": opt["datasets"]["val"]}
    opt["path"] = {"pretrain_network_g": str(root / "experiments/run/models/net_g_latest.safetensors")}
    opt["val"] = {**opt["val"], "save_img": True, "suffix": None}
    file = harness.write_options(opt, root / "test.yml")
    done = harness.run(["-m", "qsr_plugin.test", "-opt", str(file)], root)
    assert done.returncode == 0, done.stderr[-3000:]
    score = re.findall(r"# psnr: ([\d.]+)", done.stdout + done.stderr)[-1]
    assert score == re.findall(r"# psnr: ([\d.]+)", log)[-1]
    assert len(list((root / "results/run/visualization").rglob("*.png"))) == 6


def test_saved_network_runs_without_any_yaml(trained: tuple[Path, Path, str]) -> None:
    net = load_quantized(trained[0] / "experiments/run/models/net_g_latest.safetensors")
    with torch.no_grad():
        assert net(torch.rand(1, 3, 7, 5)).shape == (1, 3, 28, 20)
    assert set(net.last_record().bits.values()) == {3}
    assert net.recipe.method == "pams"


def test_nothing_is_written_when_the_data_cannot_be_used(trained: tuple[Path, Path, str], tmp_path: Path) -> None:
    _, data, _ = trained
    opt = harness.options(data, datasets={"val": {"dataroot_lq": str(data / "GT.lmdb")}})
    done = harness.run(
        ["-m", "qsr_plugin.train", "-opt", str(harness.write_options(opt, tmp_path / "a.yml"))], tmp_path
    )
    assert done.returncode != 0 and "the data cannot be used" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "experiments").exists()


def test_forced_values_come_before_the_check_of_the_data(trained: tuple[Path, Path, str], tmp_path: Path) -> None:
    _, data, _ = trained
    broken = harness.options(data, datasets={"train": {"dataroot_gt": "nowhere.lmdb"}}, train={"total_iter": 1})
    file = harness.write_options(broken, tmp_path / "a.yml")
    harness.train(file, tmp_path, "--force_yml", f"datasets:train:dataroot_gt={data / 'GT.lmdb'}")
    command = ["-m", "qsr_plugin.train", "-opt", str(file), "--force_yml", "recipe:bits:weigth=3"]
    done = harness.run(command, tmp_path)
    assert done.returncode != 0 and "Did you mean 'weight'" in done.stderr


def test_a_finished_experiment_is_left_alone_by_a_run_that_cannot_start(trained, tmp_path: Path) -> None:
    _, data, _ = trained
    done = tmp_path / "experiments/run"
    done.mkdir(parents=True)
    bad = [
        {"network_g": {"backbone": {"type": "EDRS"}}},
        {"network_g": {"backbone": {"num_blocks": 2}}},
        {"path": {"pretrain_network_float": "missing.pth"}},
        {"recipe": {"losses": [{"type": "SKTLos"}]}},
    ]
    for change in bad:
        file = harness.write_options(harness.options(data, **change), tmp_path / "a.yml")
        failed = harness.run(["-m", "qsr_plugin.train", "-opt", str(file)], tmp_path)
        assert failed.returncode != 0 and "Traceback" not in failed.stderr, change
        assert [path.name for path in done.parent.iterdir()] == ["run"]


def test_unknown_names_say_what_is_near(trained: tuple[Path, Path, str], tmp_path: Path) -> None:
    _, data, _ = trained
    opt = harness.options(data, model_type="QuantSRModle")
    done = harness.run(
        ["-m", "qsr_plugin.train", "-opt", str(harness.write_options(opt, tmp_path / "a.yml"))], tmp_path
    )
    assert done.returncode != 0 and "Did you mean 'QuantSRModel'" in done.stderr and "Traceback" not in done.stderr


def test_too_little_data_for_a_batch_is_an_error(trained: tuple[Path, Path, str], tmp_path: Path) -> None:
    _, data, _ = trained
    opt = harness.options(data, datasets={"train": {"batch_size_per_gpu": 16}})
    done = harness.run(
        ["-m", "qsr_plugin.train", "-opt", str(harness.write_options(opt, tmp_path / "a.yml"))], tmp_path
    )
    assert done.returncode != 0 and "raise dataset_enlarge_ratio" in done.stderr


def test_training_runs_to_its_last_iteration_when_batches_are_dropped(trained, tmp_path: Path) -> None:
    # 6 images x ratio 1 in batches of 4: the host counts 2 batches an epoch, its loader gives 1.
    _, data, _ = trained
    train = {"batch_size_per_gpu": 4, "dataset_enlarge_ratio": 1}
    opt = harness.options(data, datasets={"train": train}, train={"total_iter": 9})
    log = harness.train(harness.write_options(opt, tmp_path / "a.yml"), tmp_path)
    assert max(harness.losses(log)) == 9


def test_freed_memory_is_kept_where_the_c_library_can(run_python) -> None:
    code = """
import platform
from qsr_plugin.memory import keep_freed_memory
print(keep_freed_memory() or platform.libc_ver()[0] != "glibc")
"""
    assert run_python(code).strip() == "True"


@pytest.mark.parametrize(
    ("states", "says"),
    [
        ((), "interrupted; no state is saved yet, so it starts anew (logger.save_checkpoint_freq is 50)"),
        ((50, 2000), "interrupted; --auto_resume goes on from iteration 2,000, the newest saved state"),
    ],
)
def test_an_interrupted_training_says_how_to_go_on(
    states: tuple[int, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "experiments" / "run" / "training_states"
    folder.mkdir(parents=True)
    for iteration in states:
        (folder / f"{iteration}.state").touch()
    monkeypatch.chdir(tmp_path)
    options = {"name": "run", "logger": {"save_checkpoint_freq": 50}}
    monkeypatch.setattr(train, "resolved_command", lambda *_: options)
    monkeypatch.setattr(train, "check_before_start", interrupted)
    with pytest.raises(SystemExit) as caught:
        train.main(["-opt", "any.yml"])
    assert caught.value.code == 130
    assert says in capsys.readouterr().err


def test_missing_float_weights_of_a_teacher_are_found_before_anything_is_written(
    trained: tuple[Path, Path, str], tmp_path: Path
) -> None:
    opt = harness.options(trained[1], recipe={"losses": [{"type": "SKTLoss"}]})
    done = harness.run(
        ["-m", "qsr_plugin.train", "-opt", str(harness.write_options(opt, tmp_path / "a.yml"))], tmp_path
    )
    assert done.returncode == 1
    assert "error: path.pretrain_network_float is needed: SKTLoss compares with the float network" in done.stderr
    assert not (tmp_path / "experiments").exists()
