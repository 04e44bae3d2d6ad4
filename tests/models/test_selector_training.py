"""Selectors in the host's model: bits fall, the teacher stays at the start, and a run resumes in both stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qsr_plugin import compat
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.report.fab import feature_average_bits
from tests.host import every_method, harness

compat.import_host()

from basicsr.models import build_model  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.write_data(tmp_path_factory.mktemp("data"), count=4)


def options(data: Path, root: Path, backbone: str = "EDSR", **changes: Any) -> dict[str, Any]:
    """A first stage of two iterations with ranges that follow batches; bits are dear, so that they fall at once."""
    opt = every_method.options(data, root, "cadyq", backbone)
    rates = {"weights": 1e-4, "ranges": 1e-3, "bits": 3e-2}
    opt["network_g"]["recipe"] = load_recipe(
        "cadyq",
        calibration={"images": 4, "batch": 2},
        stages=[{"iters": 2, "track_ranges": 0.0, "lr": rates}, {"lr": rates}],
        losses=[{"type": "WeightedBitLoss", "start": 1e-2}, {"type": "SKTLoss"}, {"type": "BlockSKTLoss"}],
        **changes,
    ).to_dict()
    return opt


def bits_of(net: torch.nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        net(x)
    return feature_average_bits(net, net.last_record())


@pytest.mark.parametrize("backbone", every_method.BACKBONES)
def test_bits_fall_and_the_teacher_does_not_change(data: Path, tmp_path: Path, backbone: str) -> None:
    model, x = build_model(options(data, tmp_path, backbone)), every_method.batch(0)["lq"]
    with torch.no_grad():
        start, taught = model.net.eval()(x), model.teacher(x)
    assert torch.equal(start, taught) and bits_of(model.net, x) == bits_of(model.teacher, x) == 8.0
    model.net.train()
    rates = {group["name"]: group["lr"] for group in model.optimizer_g.param_groups}
    assert rates == {"weights": 1e-4, "ranges": 1e-3, "bits": 3e-2}
    every_method.iterate(model, range(1, 7))
    assert bits_of(model.net.eval(), x) < 8.0
    assert {"l_pix", "l_weightedbitloss", "l_sktloss", "l_blocksktloss"} <= set(model.log_dict)
    with torch.no_grad():
        assert torch.equal(model.teacher(x), taught)


@pytest.mark.parametrize("stop", [1, 4])
def test_resumed_in_either_stage_equals_uninterrupted(data: Path, tmp_path: Path, stop: int) -> None:
    whole = build_model(options(data, tmp_path))
    every_method.iterate(whole, range(1, 7))
    first = build_model(options(data, tmp_path))
    every_method.iterate(first, range(1, stop + 1))
    first.save(0, stop)
    opt = options(data, tmp_path)
    opt["path"].update(
        pretrain_network_g=str(tmp_path / f"models/net_g_{stop}.pth"),
        resume_state=str(tmp_path / f"states/{stop}.state"),
        param_key_g="params",
    )
    second = build_model(opt)
    assert harness.differences(first.teacher.state_dict(), second.teacher.state_dict()) == []
    second.resume_training(harness.read(tmp_path / f"states/{stop}.state"))
    every_method.iterate(second, range(stop + 1, 7))
    assert harness.differences(whole.net.state_dict(), second.net.state_dict()) == []
    assert harness.differences(whole.net_g_ema.state_dict(), second.net_g_ema.state_dict()) == []
    assert whole.log_dict == second.log_dict
