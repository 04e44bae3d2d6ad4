"""Every shipped recipe in the host's model: resumes exactly, and runs on two processes that stay the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.quant.surgery import plugin_keys
from tests.host import every_method, harness
from tests.host.test_ddp import free_port
from tests.recipes import TRAINED


@pytest.mark.parametrize("backbone", every_method.BACKBONES)
@pytest.mark.parametrize(("method", "own"), every_method.RUNS)
def test_resumed_in_the_middle_of_a_stage_equals_uninterrupted(
    data: Path, tmp_path: Path, method: str, own: bool, backbone: str
) -> None:
    from basicsr.models import build_model

    last = 3 * every_method.STAGE + 1
    whole = build_model(every_method.options(data, tmp_path, method, backbone, own=own))
    start = {key: value.clone() for key, value in whole.net.state_dict().items()}
    every_method.iterate(whole, range(1, last + 1))
    assert harness.differences(start, whole.net.state_dict()), "nothing was learned"

    stop = every_method.STAGE + 1  # one iteration into the second stage
    first = build_model(every_method.options(data, tmp_path, method, backbone, own=own))
    every_method.iterate(first, range(1, stop + 1))
    first.save(0, stop)
    opt = every_method.options(data, tmp_path, method, backbone, own=own)
    state = tmp_path / f"states/{stop}.state"
    network = tmp_path / f"models/net_g_{stop}.pth"
    opt["path"].update(resume_state=str(state), pretrain_network_g=str(network), param_key_g="params")
    second = build_model(opt)
    second.resume_training(harness.read(state))
    every_method.iterate(second, range(stop + 1, last + 1))

    assert harness.differences(whole.net.state_dict(), second.net.state_dict()) == []
    assert harness.differences(whole.net_g_ema.state_dict(), second.net_g_ema.state_dict()) == []
    assert harness.differences(whole.optimizer_g.state_dict(), second.optimizer_g.state_dict()) == []
    assert whole.log_dict == second.log_dict


def test_two_processes_stay_the_same_with_every_method(data: Path, tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    root = str(Path(every_method.__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = harness.run(
        [*command, f"--master_port={free_port()}", "-m", "tests.host.every_method", str(data)],
        tmp_path,
        PYTHONPATH=path,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    said = {line.rpartition(": ")[2] for line in done.stdout.splitlines() if line.startswith("same on 2 processes")}
    assert said == {
        every_method.name_of(*run, backbone) for run in every_method.RUNS for backbone in every_method.BACKBONES
    }


QAT = [name for name in TRAINED if any("weights" in stage.train for stage in load_recipe(name).stages)]


@pytest.mark.parametrize("method", QAT)
def test_an_exploding_training_stops_at_its_first_bad_place(data: Path, tmp_path: Path, method: str) -> None:
    from basicsr.models import build_model

    opt = every_method.options(data, tmp_path, method, "EDSR")
    opt["network_g"]["recipe"] = load_recipe(opt["network_g"]["recipe"], weight_bits=2, act_bits=2).to_dict()
    for stage in opt["network_g"]["recipe"]["stages"]:
        stage["lr"] = {"weights": 1e37}
    model = build_model(opt)
    every_method.iterate(model, range(1, 2))  # the step after which weights are huge
    model.save(0, 1)
    kept = (tmp_path / "models/net_g_1.pth").read_bytes()
    before = {
        key: model.net.state_dict()[key].clone() for key in model.net.state_dict() if key not in plugin_keys(model.net)
    }
    with pytest.raises(FloatingPointError, match=r"iteration \d, process 0: .* not finite; first bad place: \w+"):
        every_method.iterate(model, range(2, 8))
    after = model.net.state_dict()
    assert harness.differences(before, {key: after[key] for key in before}) == [], "no weight was changed by that step"
    assert (tmp_path / "models/net_g_1.pth").read_bytes() == kept
