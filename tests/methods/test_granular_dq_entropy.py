"""Granular-DQ: bits by entropy and the thresholds between them, against figures computed with the released code."""

from __future__ import annotations

import os
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qsr_plugin.methods import granular_dq
from qsr_plugin.methods.granular_dq import SharedGranularity, followed
from qsr_plugin.quant.recipe import load_recipe
from tests.host import harness
from tests.host.test_ddp import free_port
from tests.methods.granularity import close, forward_of, photos, prefer, shared

#: Quantile to entropy, out of the published table for LR patches of DIV2K.
PUBLISHED = {0.05: 1.55409, 0.1: 1.92721, 0.2: 2.3296, 0.5: 2.80094, 0.7: 2.99372, 0.9: 3.1828, 0.95: 3.25242}


# -- entropy to bits -------------------------------------------------------------------------------------------------


def with_published_table(**options: object) -> SharedGranularity:
    part = shared(**options)
    levels, knots = torch.arange(1, 200) / 200, list(PUBLISHED.items())
    with torch.no_grad():
        for (a, low), (b, high) in zip(knots, knots[1:]):
            inside = (levels >= a - 1e-6) & (levels <= b + 1e-6)
            part.table[inside] = low + (levels[inside] - a) / (b - a) * (high - low)
    return part


def test_thresholds_are_looked_up_between_the_quantiles() -> None:
    part = with_published_table()
    close(part.limits(), [2.80094, 3.18280])
    with torch.no_grad():
        part.table.copy_(torch.arange(199).float().square())
        for t, want in [(0.005, 0.0), (0.5025, 9900.5), (0.995, 198.0**2), (0.001, 0.0), (1.0, 198.0**2)]:
            part.thresholds.copy_(torch.tensor([0.5, t]))
            assert part.limits().tolist() == pytest.approx([99.0**2, want], rel=1e-4, abs=1e-2)


def test_thresholds_act_at_any_distance() -> None:
    """The released look-up rounds them to one decimal: 0.5 and 0.54999 are the same and 0.55 is another.

    Ours reads between quantiles, so that a threshold that is learned in small steps acts in small steps.
    """
    part, found = with_published_table(), []
    for t in (0.5, 0.54999, 0.55):
        part.thresholds.copy_(torch.tensor([t, 0.9]))
        found.append(part.limits()[0].item())
    assert found[0] < found[1] - 0.03 and found[2] - found[1] < 1e-4


def test_entropies_of_the_published_examples_get_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([1.317452, 2.833333, 3.045479, 3.19, 2.80093, 0.731509])
    monkeypatch.setattr(granular_dq, "entropies", lambda image: values)
    assert with_published_table().decision(forward_of(photos(6))).bits.tolist() == [4, 5, 5, 8, 4, 4]


def test_an_entropy_at_the_limit_is_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    part = with_published_table()
    monkeypatch.setattr(granular_dq, "entropies", lambda image: part.limits())
    assert part.decision(forward_of(photos(2))).bits.tolist() == [4, 5]


@pytest.mark.parametrize(("biases", "bits"), [((0.0, 9.0, 0.0), 6), ((9.0, 0.0, 0.0), 4)])
def test_entropy_only_matters_where_the_gate_says_the_most(biases, bits: int) -> None:
    part = prefer(shared(gamma=0.5), *biases)
    assert part.decision(forward_of(photos(32))).bits.tolist() == [bits] * 32
    before = part.thresholds.clone()
    part.enter_stage(load_recipe("granular_dq").stages[0])
    prefer(part, *(10 * b for b in biases)).train().decision(forward_of(photos(32)))
    assert torch.equal(part.thresholds, before)


def test_shares_of_the_calibration_images_are_the_thresholds() -> None:
    bits = shared().decision(forward_of(photos(64, seed=9))).bits
    assert [(bits == width).sum().item() for width in (4, 5, 8)] == [32, 25, 7]


# -- thresholds ------------------------------------------------------------------------------------------------------

START = torch.tensor([0.5, 0.9], dtype=torch.float64)


def test_thresholds_follow_the_released_example() -> None:
    """The figures are those of float32, whose spacing between 0.5 and 1 is 6e-8."""
    first = followed(START.float(), torch.tensor([2.0]), torch.tensor([True]), 0.99997)
    second = followed(first, torch.tensor([3.2]), torch.tensor([True]), 0.99997)
    assert first.tolist() == pytest.approx([0.499995917, 0.899983883], rel=0, abs=1e-9)
    assert second.tolist() == pytest.approx([0.500008225, 0.899984181], rel=0, abs=6e-8)


def test_a_batch_is_its_counted_images_one_after_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = 3.4 * torch.rand(16, generator=generator, dtype=torch.float64)
    counted = torch.rand(16, generator=generator) > 0.4
    want = START
    for entropy in seen[counted]:
        want = 0.97 * want + 0.03 * (entropy - 1.2) / 2.2
    assert torch.allclose(followed(START, seen, counted, 0.97), want, atol=1e-12)
    assert torch.equal(followed(START, seen, torch.zeros(16, dtype=torch.bool), 0.97), START)


@pytest.mark.parametrize(("entropy", "end"), [(0.0, 0.005), (3.4657, 0.995)])
def test_thresholds_stay_in_the_table_and_in_order(entropy: float, end: float) -> None:
    moved = START.float()
    for _ in range(40):
        moved = followed(moved, torch.full((16,), entropy), torch.ones(16, dtype=torch.bool), 0.97)
        assert 0.005 <= moved[0] <= moved[1] <= 0.995
    assert moved.tolist() == pytest.approx([end, end])


HALVES = """
import os
import torch
from torch import distributed as dist
from qsr_plugin.methods.granular_dq import GranularityOptions, SharedGranularity
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.schema import Stage
from qsr_plugin.train import leave_process_group

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
part = SharedGranularity(GranularityOptions(gamma=0.9), (4, 5, 6, 8), ("a.input",), (16,)).train()
part.table.copy_(torch.linspace(2, 3, 199))
part.enter_stage(Stage(adapt_thresholds=True))
bits = []
for step in range(3):
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(8, 1, 1, 1, generator=generator) * torch.rand(8, 3, 12, 12, generator=generator)
    image, widest = images.chunk(world)[rank], torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).roll(step).chunk(world)[rank]
    # So far apart that no noise matters.
    part.gate.forward = lambda features: torch.stack([200.0 * (1 - widest), 0.0 * widest, 200.0 * widest], 1)
    bits.append(part.decision(ForwardRecord(len(image), image=image, taps={"head:output": image})).bits)
torch.save({"thresholds": part.thresholds, "bits": torch.stack(bits)}, f"rank{rank}.pth")
leave_process_group()
"""


def test_two_processes_have_the_thresholds_of_one_on_the_joint_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "halves.py"
    script.write_text(HALVES)
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "PYTHONPATH": path}
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(harness.run, [str(script)], tmp_path, RANK=str(rank), **group) for rank in (0, 1)]
    for run in runs:
        assert run.result().returncode == 0, run.result().stderr[-3000:]
    first, second = (harness.read(tmp_path / f"rank{rank}.pth") for rank in (0, 1))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))
    joint = harness.read(tmp_path / "rank0.pth")
    assert torch.equal(first["thresholds"], second["thresholds"])
    assert torch.equal(first["thresholds"], joint["thresholds"])
    assert (joint["thresholds"] - START.float()).abs().min() > 0.01
    assert torch.equal(torch.cat([first["bits"], second["bits"]], 1), joint["bits"])
    assert len(joint["bits"].unique()) > 1
