"""Which places of DDTB are dynamic, and what their gates do in which stage."""

from __future__ import annotations

import copy

import pytest
import torch

from qsr_plugin.losses.context import StepContext
from qsr_plugin.losses.gate_loss import GateLoss
from qsr_plugin.methods.ddtb import DDTBQuantizer
from qsr_plugin.methods.ddtb_gate import GATE_LOGITS
from qsr_plugin.methods.ddtb_grid import quantize_between
from qsr_plugin.models.stages import StageSchedule, parameter_groups
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.schema import Stage
from qsr_plugin.quant.surgery import quantize_model, quantizers
from tests.methods.ddtb_builders import C, close, ddtb, dynamic, features, variants
from tests.quant.builders import observed

pytestmark = pytest.mark.usefixtures("both_uses")


def place(name: str, *scales: float, **options: object) -> DDTBQuantizer:
    q = ddtb(**options)
    q.site = name
    return observed(q, *(features() * scale for scale in scales))


def test_the_places_that_vary_most_become_dynamic() -> None:
    parts = [place(f"p{i}", 1.0, 1.0 + 0.1 * i) for i in (3, 0, 9, 5, 1)]
    for ratio, want in ((0.2, {"p9"}), (0.5, {"p9", "p5"}), (0.6, {"p9", "p5", "p3"}), (1.0, {"p9", "p5", "p3", "p1"})):
        for part in parts:
            part.options = part.options.model_copy(update={"dynamic_ratio": ratio})
        DDTBQuantizer.settle(parts)
        assert {part.site for part in parts if part.dynamic} == want, "a place that never varies stays static"
    close(
        torch.tensor(parts[2]._score), [(features().amax() ** 2 + features().amin() ** 2).item() * 0.81 / 2], digits=4
    )


def test_places_compete_with_those_of_the_same_ratio() -> None:
    wild = [place(f"w{i}", 1.0, 5.0 + i, dynamic_ratio=0.5) for i in range(2)]
    calm = [place(f"c{i}", 1.0, 1.1 + i * 0.1, dynamic_ratio=0.25) for i in range(4)]
    DDTBQuantizer.settle([*wild, *calm])
    assert [part.site for part in (*wild, *calm) if part.dynamic] == ["w1", "c3"]


def test_all_processes_choose_the_same_places(monkeypatch) -> None:
    parts = [place(f"p{i}", 1.0, 1.1 + i) for i in range(4)]
    joint = torch.tensor([3.0, 5.0, 1.0, 2.0])  # what the mean over processes may be
    monkeypatch.setattr("qsr_plugin.methods.ddtb.mean_over_ranks", lambda own: joint)
    DDTBQuantizer.settle(parts)
    assert [part.site for part in parts if part.dynamic] == ["p1"]


def test_calibrating_again_switches_the_gates_off(caplog) -> None:
    """Other places may be dynamic then, with gates that never learned."""
    parts, x = [place(f"p{i}", 1.0, 1.0 + i, dynamic_ratio=0.5) for i in range(4)], features()
    DDTBQuantizer.settle(parts)
    assert not caplog.records
    for part in parts:
        part.enter_stage(Stage(gated=True))
    for part, scale in zip(parts, (9.0, 5.0, 2.0, 1.0)):
        observed(part, x, x * scale)
    DDTBQuantizer.settle(parts)
    assert [part.site for part in parts if part.dynamic] == ["p0", "p1"]
    assert len(caplog.records) == 1 and "switched all gates off" in caplog.text
    loud = 9 * x
    for part in parts:
        assert not part.gate_on and part.qparams().qmax == 1, "a grid without a gate"
        assert torch.equal(part(loud), quantize_between(loud, part.lower, part.upper, 2, True))
    parts[0].enter_stage(Stage(gated=True))
    assert not torch.equal(parts[0](loud), quantize_between(loud, parts[0].lower, parts[0].upper, 2, True))


def test_a_single_calibration_batch_makes_nothing_dynamic_and_says_so(caplog) -> None:
    parts = [place(f"p{i}", 1.0) for i in range(4)]
    DDTBQuantizer.settle(parts)
    assert not any(part.dynamic for part in parts)
    assert "first: p0" in caplog.text and "two batches or more" in caplog.text
    caplog.clear()
    DDTBQuantizer.settle([place("p", 1.0, dynamic_ratio=0.0)])
    assert not caplog.records


def test_state_dict_and_average_bring_the_stage_and_the_dynamic_places() -> None:
    q, x = dynamic(ddtb(4), gated=True).eval(), features()
    resumed, averaged = (DDTBQuantizer(q.options, (4,), "act", 1, channels=C).eval() for _ in range(2))
    resumed.load_state_dict(q.state_dict())
    with torch.no_grad():
        for own, other in zip((*averaged.parameters(), *averaged.buffers()), (*q.parameters(), *q.buffers())):
            own.copy_(other)
    averaged.follow(q)
    static = copy.deepcopy(q)
    static.enter_stage(Stage())
    assert torch.equal(resumed(x), q(x)) and torch.equal(averaged(x), q(x)) and torch.equal(copy.deepcopy(q)(x), q(x))
    assert not torch.equal(static(x), q(x))
    resumed.load_state_dict(ddtb(4).state_dict())  # and back: nothing dynamic, nothing to train
    assert not any(p.requires_grad for p in resumed.gate.parameters())


def test_grid_and_storage_of_a_gated_place() -> None:
    q = ddtb(4)
    assert q.extra_storage_bits() == 2 * 32 and q.overhead_ops(100) == 0
    q = dynamic(q, gated=False)
    assert q.extra_storage_bits() == 2 * 32 + (2 * 32 * C + 32) + (2 * 2 * 32 + 32) + 4 * 32 * 32
    assert q.qparams().qmax == 7 and q.overhead_ops(100) == 0
    q = dynamic(q, gated=True)
    assert q.overhead_ops(100) == 100, "the mean that the gate reads"
    with pytest.raises(NotImplementedError, match=r"body\.0\.input: its gate makes a grid for each image"):
        q.qparams()


@variants
@pytest.mark.parametrize("with_gate_loss", [True, False])
def test_stages_of_a_network(tiny_net, images, variant: str, with_gate_loss: bool) -> None:
    act = {"type": "ddtb", "gate": variant, "dynamic_ratio": 0.5}
    net = quantize_model(tiny_net(), load_recipe("ddtb", quantizers={"act": act}))
    calibrate(net, images).train()
    chosen = {name for name, q in quantizers(net) if isinstance(q, DDTBQuantizer) and q.dynamic}
    assert len(chosen) == 3
    schedule = StageSchedule(net.recipe.stages, 1e-4)
    assert [schedule.index_at(i) for i in (4000, 4001)] == [0, 1]
    assert len(parameter_groups(net)["others"]) == 3 * (1 if variant == "released" else 4)
    outputs = []
    for index in range(2):
        schedule.apply(index, net)
        out = net(images[0])
        loss = out.square().mean()
        shown = net.last_record().signals.get(GATE_LOGITS, {})
        assert set(shown) == (chosen if index == 0 else set())
        assert all(logits.shape == (2, 2) for logits in shown.values())
        if with_gate_loss:
            loss = loss + GateLoss()(StepContext(out, out, net.last_record()))
        net.zero_grad()
        loss.backward()
        silent = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
        assert not silent, "distributed training needs a gradient for all that learns"
        outputs.append(net.eval()(images[0]))
        assert not net.last_record().signals
        net.train()
    assert not torch.equal(*outputs)


def test_the_gate_needs_to_know_its_channels(tiny_net) -> None:
    rules = [{"match": "body.*.relu", "port": "output"}]
    recipe = load_recipe("ddtb", placement="mine", placements={"mine": rules}, stages=[{}], losses=[])
    with pytest.raises(RecipeError, match=r"body\.0\.relu"):
        quantize_model(tiny_net(), recipe)
