"""``tools/bench_mixed_bits.py``: what it compares, and its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qsr_plugin.quant.policy import POLICIES
from qsr_plugin.quant.recipe import register_parts
from qsr_plugin.report.result_io import read_table
from tests.quant.choosers import bright_to_dark, quantized
from tests.tools.conftest import TinyNetwork


@pytest.fixture
def tool(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script; its policy is gone afterwards."""
    register_parts()
    module = script("bench_mixed_bits")
    monkeypatch.setitem(POLICIES, "given", module.GivenBits)
    return module


def test_the_same_network_answers_in_three_ways(tool: ModuleType, choosers: None, images: list[torch.Tensor]) -> None:
    net, batch = quantized("toy_brightness", images), bright_to_dark(4)
    seen = {}
    for kind in ("policy", "fixed", "mixed", "policy"):
        tool.decide(net, 4, kind)
        with torch.no_grad():
            net(batch)
        seen.setdefault(kind, []).append(set(map(str, net.last_record().bits.values())))
    assert seen["fixed"] == [{"6"}] and seen["mixed"] == [{"tensor([4., 6., 8., 4.])"}]
    assert seen["policy"][0] == seen["policy"][1] and "6" not in seen["policy"][0]


def test_training_steps_move_weights(tool: ModuleType, choosers: None, images: list[torch.Tensor]) -> None:
    net, batch = quantized("toy_selector", images), bright_to_dark(4)
    for kind in ("fixed", "mixed", "policy"):
        before = net.head.weight.detach().clone()
        tool.runner(net, batch, kind, training=True)()
        assert net.training and not torch.equal(net.head.weight, before)
        before = net.head.weight.detach().clone()
        tool.runner(net, batch, kind, training=False)()
        assert not net.training and torch.equal(net.head.weight, before)


def test_table_and_file(
    tool: ModuleType, network: TinyNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network that cannot be built is a row that says why."""
    tool.main(
        quantizers="pams", methods="cadyq,cadyk", backbone=str(network.backbone), groups=1, batch=2, size=8, threads=1,
        json=tmp_path / "mixed.json",
    )  # fmt: skip
    *rows, bad = (row.details for row in read_table(tmp_path / "mixed.json").rows)
    kinds = [("pams", "mixed"), ("cadyq", "mixed"), ("cadyq", "policy")]
    assert {(row["network"], row["bits"], row["run"]) for row in rows} == {
        (*kind, run) for kind in kinds for run in ("inference", "training")
    }
    assert all(len(row["times"]["ratios"]) == 1 for row in rows)
    assert "Did you mean 'cadyq'" in bad["failed"]
    told = capsys.readouterr().out
    assert f"{rows[0]['times']['ratios'][0]:.3f}" in told and "failed" in told
