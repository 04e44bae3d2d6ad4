"""``tools/bench_training.py``: the steps it times, and its table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qsr_plugin import load_recipe
from qsr_plugin.models import step_cost
from qsr_plugin.models.step_cost import Case, Workload
from qsr_plugin.report.comparison_options import static_methods
from qsr_plugin.report.result_io import read_table
from tests.tools.conftest import BACKBONE, TinyNetwork

WORK = Workload(BACKBONE, batch=1, lq_size=8, groups=2)


def test_cases_are_the_kinds_of_steps() -> None:
    """The first stage of PAMS only follows ranges; without losses no teacher runs."""
    (plain,), (full,) = step_cost.cases("pams", 4, 4), step_cost.cases("pams", 4, 4, with_losses=True)
    last = load_recipe("pams").stages[-1]
    for case in (plain, full):
        recipe = load_recipe(case.recipe)
        assert recipe.bits.weight == recipe.bits.act == 4 and recipe.stages == (last,)
    assert plain.recipe["losses"] == [] != full.recipe["losses"]
    assert (plain.label, full.label) == ("pams W4A4", "pams W4A4 + losses")


def test_gated_stages_and_depths_are_cases_of_their_own(tmp_path: Path) -> None:
    """A stage of several depths is also measured at full depth, to compare."""
    recipe = load_recipe("pams").to_dict()
    path, stages = tmp_path / "special.yml", [{"iters": 5}, {"gated": True, "iters": 5}, {"depths": [1.0, 0.5]}]
    path.write_text(json.dumps({"recipe": {**recipe, "depth": {"role": "block"}, "stages": stages}}))
    found = step_cost.cases(str(path), 4, 4)
    assert [case.label for case in found] == ["special W4A4", "special W4A4, gated", "special W4A4, 2 depths"]
    taken = [load_recipe(case.recipe).stages[0] for case in found]
    assert [(stage.gated, stage.depths) for stage in taken] == [(False, (1.0,)), (True, (1.0,)), (False, (1.0, 0.5))]


@pytest.mark.parametrize("method", static_methods())
def test_every_method_has_steps_that_train(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the recipe's losses; a step moves weights, with several depths on a batch as well."""
    built = []
    model_of = step_cost._quantized_model
    monkeypatch.setattr(step_cost, "_quantized_model", lambda *a: built.append(model_of(*a)) or built[-1])
    for case in step_cost.cases(method, 4, 4, with_losses=True):
        step = step_cost.training_step(WORK, case)
        before = [p.detach().clone() for p in built[-1].net.parameters()]
        step()
        assert any(not torch.equal(a, b) for a, b in zip(before, built[-1].net.parameters())), case.label


def test_times_come_in_groups() -> None:
    """One ratio per group, quantized over float of that group."""
    times = step_cost.measure_times(WORK, step_cost.cases("pams", 4, 4)[0])
    assert len(times.ratios) == len(times.quantized) == len(times.plain) == 2
    for ratio, quantized, plain in zip(times.ratios, times.quantized, times.plain):
        assert ratio == pytest.approx(quantized / plain)
    assert times.to_dict()["median_plain"] == pytest.approx(sum(times.plain) / 2)


def test_table_and_file(
    script: Callable[[str], ModuleType],
    network: TinyNetwork,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A measurement that fails is a row that says why; here everything runs in this process."""
    tool = script("bench_training")

    def direct(function: Callable[..., object], work: Workload, case: Case | None) -> object:
        if case is not None and case.label.startswith("minmax"):
            raise RuntimeError("no memory left")
        return function(work, case) if function is step_cost.measure_times else 50_000_000

    monkeypatch.setattr(tool, "isolated", direct)
    tool.main(
        methods="pams,minmax", bits="W4A4", backbone=str(network.backbone), losses=False, groups=1, batch=1, size=8,
        threads=1, compiled=False, json=tmp_path / "bench.json",
    )  # fmt: skip
    good, bad = (row.details for row in read_table(tmp_path / "bench.json").rows)
    assert good["label"] == "pams W4A4" and len(good["times"]["ratios"]) == 1 and good["memory"] == 50_000_000
    assert bad["failed"] == "RuntimeError: no memory left"
    told = capsys.readouterr().out
    assert f"{good['times']['ratios'][0]:.3f}" in told and "50 MB" in told and "no memory left" in told


def test_memory_is_that_of_one_process(script: Callable[[str], ModuleType]) -> None:
    """Measured in a fresh process; a batch of 64 takes more than one image."""
    tool = script("bench_training")
    large = Workload(BACKBONE, batch=64, lq_size=32)
    one, many = (tool.isolated(step_cost.measure_memory, work, None) for work in (WORK, large))
    assert 0 < one < many - 20e6
