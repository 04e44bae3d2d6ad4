"""DDTB against figures computed with the published code (float32), and what its gate does in which stage."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from qsr_plugin.losses.context import StepContext
from qsr_plugin.losses.gate_loss import GateLoss
from qsr_plugin.methods.ddtb import DDTBQuantizer, DDTBWeightQuantizer
from qsr_plugin.methods.ddtb_gate import GATE_LOGITS, Gate, apart, rescale
from qsr_plugin.methods.ddtb_grid import quantize_between
from qsr_plugin.models.stages import StageSchedule, parameter_groups
from qsr_plugin.options_file import load_options, options_folder
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.ops import fake_quantize
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.schema import Stage
from qsr_plugin.quant.surgery import quantize_model, quantizers
from tests.quant.test_quantizers import NoHostSync

pytestmark = pytest.mark.usefixtures("both_uses")

C = 4
variants = pytest.mark.parametrize("variant", ["per_sample", "released"])


def close(got: Tensor, want: list, digits: int = 7) -> None:
    wanted = torch.tensor(want, dtype=torch.float32).flatten()
    assert torch.allclose(got.detach().flatten(), wanted, atol=1.01 * 10**-digits, rtol=2e-7), got


def weight_quantizer(bits: int, **options: object) -> DDTBWeightQuantizer:
    return DDTBWeightQuantizer(DDTBWeightQuantizer.Options(**options), (bits,), "weight", 0)


def ddtb(bits: int | tuple = 2, lower: float = -0.7, upper: float = 1.5, axis: int = 1, **options) -> DDTBQuantizer:
    """Calibrated to given bounds; dynamic, so that its gate takes part as a stage says."""
    candidates = bits if isinstance(bits, tuple) else (bits,)
    q = DDTBQuantizer(DDTBQuantizer.Options(**options), candidates, "act", axis, channels=C)
    q.site = "body.0.input"
    with torch.no_grad():
        q.set_range(torch.tensor(lower), torch.tensor(upper))
    q.mark_calibrated()
    return q


def dynamic(q: DDTBQuantizer, *, gated: bool) -> DDTBQuantizer:
    """The same quantizer with its gate in use."""
    state = q.state_dict()
    state["dynamic"] = torch.tensor(True)
    q.load_state_dict(state)
    q.enter_stage(Stage(gated=gated))
    return q


def features(batch: int = 3, seed: int = 1) -> Tensor:
    """Images of different brightness and contrast, so that a gate tells them apart."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, C, 5, 6, generator=draw)
    return x * torch.linspace(0.4, 1.6, batch).view(-1, 1, 1, 1) + torch.randn(batch, C, 1, 1, generator=draw)


# -- grids of the published code --------------------------------------------------------------------------------------

THIRDS = [-2, -1, -1, -1, 0, 0, 0, 1, 1, 1, 2]
PERCENTILE_4 = [-1.0453334, -0.784, -0.6533334, -0.392, -0.2613333, 0, 0.2613333, 0.392, 0.6533334, 0.784, 1.0453334]


@pytest.mark.parametrize(
    ("bits", "kind", "want", "slope"),
    [
        (2, "percentile", [0.6533334 * code if abs(code) < 2 else 0.65333335 * code for code in THIRDS], [0, 1]),
        (4, "percentile", PERCENTILE_4, [0, 1]),
        (2, "minmax", [0.66666667 * code for code in THIRDS], [1, 1]),
    ],
)
def test_weights(bits: int, kind: str, want: list, slope: list) -> None:
    weight = torch.linspace(-1, 1, 11, requires_grad=True)
    step = {"percentile": 1.96, "minmax": 2.0}[kind] / (2**bits - 1)
    # S u is half way between two codes; clamped to 2^b - 1 steps, the largest weight falls to the lower one.
    strict = [*want[:-1], (2 ** (bits - 1) - 1) * step]
    for clamp, levels in ((False, want), (True, strict)):
        out = weight_quantizer(bits, range=kind, clamp_codes=clamp)(weight)
        close(out, levels)
        (grad,) = torch.autograd.grad(out.sum(), weight)
        assert grad.tolist() == [slope[0]] + [slope[1]] * 9 + [slope[0]]
    assert weight_quantizer(bits, range=kind)(weight)[-1] == out[-1], "clamped is the default"


def test_a_weight_on_a_percentile_bound_counts_half() -> None:
    weight = torch.linspace(-1, 1, 101, requires_grad=True)  # the quantiles 0.01 and 0.99 are elements
    weight_quantizer(4)(weight).sum().backward()
    assert weight.grad.tolist() == [0, 0.5] + [1] * 97 + [0.5, 0]


X = [-1.2, -0.7, -0.3, 0.0, 0.2, 0.8, 1.5, 2.2]
D_UPPER = [-0.0151516, -0.0151516, 0.1363636, 0, -0.0909091, -0.030303, 0.4848486, 0.9848486]
D_LOWER = [1.0151516, 0.5151516, -0.1363636, 0, 0.0909091, 0.030303, 0.0151515, 0.0151515]


@pytest.mark.parametrize("clamp", [True, False])
def test_activations(clamp: bool) -> None:
    q, x = ddtb(clamp_codes=clamp), torch.tensor(X, requires_grad=True)
    out = q(x)
    close(out, [-0.7333334, -0.7333334, 0, 0, 0, 0.7333334, 1.4666668, 1.4666668])
    dx, du, dl = torch.autograd.grad(out.sum(), (x, q.upper, q.lower))
    assert dx.tolist() == [0, 0.5, 1, 1, 1, 1, 0.5, 0]
    close(du, [1.4545455], digits=6)
    close(dl, [1.5454545], digits=6)
    for i, want in enumerate(zip(D_UPPER, D_LOWER)):
        close(torch.stack(torch.autograd.grad(q(x)[i], (q.upper, q.lower))), want)


@pytest.mark.parametrize(("bits", "released"), [(2, 5), (3, 9), (4, 17)])
def test_symmetric_bounds_have_one_level_more_unless_codes_are_clamped(bits: int, released: int) -> None:
    x = torch.linspace(-1.5, 1.5, 3001)
    assert ddtb(bits, -1.0, 1.0, clamp_codes=False)(x).unique().numel() == released
    assert ddtb(bits, -1.0, 1.0)(x).unique().numel() == 2**bits
    assert weight_quantizer(bits, range="minmax")(x).unique().numel() == 2**bits
    strict, free = (ddtb(bits, -1.0, 1.0, clamp_codes=clamp).qparams() for clamp in (True, False))
    assert (strict.qmax - strict.qmin, free.qmax - free.qmin) == (2**bits - 1, 2**bits)


@pytest.mark.parametrize(
    ("lower", "upper", "x", "want"),
    [(-1.0, 2.0, 0.5, 1.0), (-2.0, 1.0, 0.5, 0.0), (-3.0, 0.0, -0.5, -1.0), (-4.0, -1.0, -2.5, -2.0)],
)
def test_halves_round_as_codes_with_their_offset(lower: float, upper: float, x: float, want: float) -> None:
    """The step is 1. Halves go to the odd neighbour where z is odd (the first and the third)."""
    assert ddtb(2, lower, upper)(torch.tensor([x])).item() == want


def test_a_range_that_starts_at_zero_has_all_its_levels_above() -> None:
    close(ddtb(2, 0.0, 3.0)(torch.tensor([-1.0, 0.0, 0.9, 2.2, 9.0])), [0, 0, 1, 2, 3])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_grid_of_the_report_is_that_of_the_forward(bits: int) -> None:
    q, x = ddtb(bits, -0.37, 1.91), torch.linspace(-1, 3, 997)
    grid = q.qparams()
    codes = torch.arange(grid.qmin, grid.qmax + 1)
    assert torch.allclose(q(x).unique(), (codes - grid.zero_point) * grid.scale, atol=1e-6)
    weight, values = weight_quantizer(bits), torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    grid = weight.qparams_of(values)
    levels = ((weight(values) / grid.scale) + grid.zero_point).round()
    assert levels.min() == grid.qmin and levels.max() == grid.qmax
    assert torch.allclose((levels - grid.zero_point) * grid.scale, weight(values), atol=1e-6)


# -- ranges ------------------------------------------------------------------------------------------------------------


def watch(q: DDTBQuantizer, *batches: Tensor) -> DDTBQuantizer:
    q.begin_calibration()
    for batch in batches:
        q.observe(batch)
    q.end_calibration()
    return q


def test_calibration_takes_the_mean_of_the_percentiles_of_each_batch() -> None:
    q = watch(ddtb(alpha=0.9), torch.arange(11.0), torch.arange(11.0) * 3)
    close(torch.stack([q.lower, q.upper]), [2.0, 18.0], digits=6)


def test_a_fixed_start_ignores_the_data() -> None:
    q = watch(ddtb(start="fixed"), torch.arange(11.0))
    assert (q.lower.item(), q.upper.item()) == (-10.0, 10.0)


@pytest.mark.parametrize(("lower", "upper"), [(1.0, -1.0), (0.0, 0.0), (-3.0, -3.0), (1e6, 1e6), (250.0, 249.99)])
@pytest.mark.parametrize("bits", [2, 8])
def test_bounds_that_met_or_crossed_are_mended(lower: float, upper: float, bits: int) -> None:
    q, x = ddtb(bits), features().requires_grad_()
    with torch.no_grad():
        q.lower.fill_(lower), q.upper.fill_(upper)
    q.project()
    assert q.upper > q.lower
    out = q(x)
    grads = torch.autograd.grad(out.sum(), (x, q.lower, q.upper))
    assert all(bool(torch.isfinite(t).all()) for t in (out, *grads))
    assert (grads[1] + grads[2] - (1 - grads[0]).sum()).abs() < 1, "what is clipped moves with the bounds together"


@pytest.mark.parametrize("value", [0.0, -2.5, 1e4])
def test_constant_features_and_weights_stay_as_they_are(value: float) -> None:
    x = torch.full((2, C, 3, 3), value)
    q = watch(ddtb(), x, x)
    assert torch.allclose(q(x), x, rtol=1e-5)
    assert torch.allclose(weight_quantizer(4)(x), x, rtol=1e-5)


def test_one_pair_of_bounds_per_candidate() -> None:
    q = ddtb((2, 4, 8))
    with torch.no_grad():
        q.lower.copy_(torch.tensor([-1.0, 0.0, -4.0])), q.upper.copy_(torch.tensor([2.0, 15.0, 4.0]))
    x = torch.full((3, 1), 100.0)
    assert q(x, torch.tensor([2, 8, 4])).flatten().tolist()[::2] == [2.0, 15.0]
    assert torch.equal(q(x, torch.tensor([8.0, 4.0, 2.0]))[0], q(x[:1], 8)[0])
    with pytest.raises(ValueError, match=r"body\.0\.input: 3 bits are not among its candidates \[2, 4, 8\]"):
        q(x, 3)


# -- the gate ----------------------------------------------------------------------------------------------------------


@variants
def test_parts_of_the_gate(variant: str) -> None:
    gate = Gate(C, variant == "released")
    close(gate.coarse(torch.tensor([[0, 0.5, 1.2, 2.0]])), [0, 0.6666667, 1.3333334, 2])
    weight = torch.tensor([-1, -0.4, 0.3, 0.8])
    assert fake_quantize(weight, weight.abs().amax(), 1.0).tolist() == [-1, 0, 0, 1]
    with torch.no_grad():
        gate.squeeze.zero_()
        gate.squeeze[0] = weight
        gate.norm.running_var.fill_(1 - gate.norm.eps)
        gate.decide.zero_()
        gate.decide[0, 0], gate.decide[1, 0] = 3.0, -2.9
    means = torch.tensor([-3.0, -3.0, 6.0, 2.9])  # steps of 3, so the last one becomes 3; then -1, 0, 0, 1 times them
    close(gate.eval()(means.view(1, C, 1, 1), 1, 1), [18, -18], digits=5)


def test_factors_of_the_bounds() -> None:
    lower, upper = torch.tensor(-0.7), torch.tensor(1.5)
    logits = torch.tensor([[0.0, 0.0], [math.log(3), -math.log(3)]])
    low, high = rescale(lower, upper, logits)
    close(high, [1.5, 2.25])
    close(low, [-0.7, -0.35])


def test_gated_bounds_of_one_sign_do_not_cross() -> None:
    lower = torch.tensor(1.0, requires_grad=True)
    upper, logits = torch.tensor(2.0, requires_grad=True), torch.tensor([[-50.0, 50.0], [0.0, 0.0]], requires_grad=True)
    low, high = rescale(lower, upper, logits)
    assert (high - low).tolist() == pytest.approx([1e-3, 1.0], rel=1e-3)
    out = quantize_between(torch.linspace(-1, 4, 50), low.view(-1, 1), high.view(-1, 1), 2, True)
    grads = torch.autograd.grad(out.sum(), (lower, upper, logits))
    assert all(bool(torch.isfinite(g).all()) and g.abs().max() < 200 for g in grads)


def test_a_gated_batch_equals_its_images_with_their_own_bounds() -> None:
    q, x = dynamic(ddtb(4), gated=True).eval(), features().requires_grad_()
    low, high = rescale(q.lower, q.upper, q.gate(x, 1, 3))
    assert high.unique().numel() == 3 and low.unique().numel() == 3, "the gate tells the images apart"
    want = torch.cat([quantize_between(x[i : i + 1], low[i], high[i], 4, True) for i in range(3)])
    parameters = [q.lower, q.upper, *q.gate.parameters()]
    upstream = torch.linspace(-1, 2, x.numel()).view_as(x)
    got = torch.autograd.grad(q(x), [x, *parameters], upstream)
    for a, b in zip(got, torch.autograd.grad(want, [x, *parameters], upstream)):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert torch.equal(q(x), want)


def test_bits_and_bounds_of_each_image() -> None:
    q, x = dynamic(ddtb((2, 4)), gated=True).eval(), features()
    mixed = q(x, torch.tensor([4, 2, 4]))
    assert torch.equal(mixed[0], q(x, 4)[0]) and torch.equal(mixed[1], q(x, 2)[1])


@variants
def test_images_of_a_batch_see_each_other_only_as_released(variant: str) -> None:
    q, x = dynamic(ddtb(gate=variant), gated=True).eval(), features()
    apart = torch.cat([q(one) for one in x.split(1)])
    assert torch.equal(apart, q(x)) == (variant == "per_sample")


def test_layouts_and_windows_give_the_same_logits() -> None:
    gate, x = Gate(C, False).eval(), features(2)
    want = gate(x, 1, 2)
    tokens = x.flatten(2).transpose(1, 2)  # (2, 30, C)
    assert torch.allclose(gate(tokens, -1, 2), want, atol=1e-5)
    windows = tokens.reshape(2 * 3, 10, C)
    assert torch.allclose(gate(windows, -1, 2), want, atol=1e-5)
    assert torch.allclose(gate(x.mean((2, 3)), -1, 2), want, atol=1e-5)


def test_autocast_and_half_precision_do_not_reach_the_gate() -> None:
    gate, x = Gate(C, False).eval(), features().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = gate(x, 1, 3)
    assert logits.dtype == torch.float32 and torch.allclose(logits, gate(x.float(), 1, 3), atol=1e-5)


@variants
@pytest.mark.parametrize("gated", [True, False])
def test_a_step_with_a_gate_never_waits_for_the_device(variant: str, gated: bool) -> None:
    q, x = dynamic(ddtb(gate=variant), gated=gated).train(), features().requires_grad_()
    with NoHostSync():
        q(x).sum().backward()


@variants
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("batch", "scale"), [(1, 1.0), (1, 0.0), (3, 0.0)])
def test_one_image_and_dead_features_are_finite(variant: str, gated: bool, batch: int, scale: float) -> None:
    q = dynamic(ddtb(gate=variant), gated=gated).train()
    running = q.gate.norm.running_mean.clone()
    x = (features(batch) * scale).requires_grad_()
    out = q(x)
    used = [p for p in q.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.sum(), [x, *used])
    assert all(bool(torch.isfinite(t).all()) for t in (out, *grads))
    assert batch > 1 or torch.equal(q.gate.norm.running_mean, running), "one image has no variance to learn from"


@variants
@pytest.mark.parametrize("gated", [True, False])
def test_gradient_reaches_the_whole_gate_but_as_released_only_its_last_layer(variant: str, gated: bool) -> None:
    q = dynamic(ddtb(4, gate=variant), gated=gated).train()
    if gated:
        q(features()).square().sum().backward()
    else:
        GateLoss(1.0)(step({"a": q.gate(features(), 1, 3)})).backward()
    learning = {name for name, p in q.gate.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert learning == ({"decide"} if variant == "released" else {"squeeze", "norm.weight", "norm.bias", "decide"})
    assert {id(p) for p in q.gate.parameters() if not p.requires_grad} == {id(p) for p in q.idle_parameters()}


def step(logits: dict[str, Tensor]) -> StepContext:
    record = ForwardRecord(2)
    for site, value in logits.items():
        record.signal(GATE_LOGITS, site, value)
    return StepContext(torch.zeros(1), torch.zeros(1), record)


def test_gate_loss_is_the_mean_over_places_of_the_mean_square() -> None:
    shown = {"a": torch.tensor([[1.0, 3.0]]), "b": torch.tensor([[2.0, 0.0], [0.0, 0.0]])}
    assert GateLoss(2.0)(step(shown)).item() == pytest.approx(2.0 * (5.0 + 1.0) / 2)
    assert GateLoss()(step(shown)).item() == pytest.approx(3.0 / 255)
    silent = GateLoss()(step({}))
    assert silent.item() == 0 and not silent.requires_grad and silent.shape == ()


# -- which places are dynamic, and when -----------------------------------------------------------------------------


def place(name: str, *scales: float, **options: object) -> DDTBQuantizer:
    q = ddtb(**options)
    q.site = name
    return watch(q, *(features() * scale for scale in scales))


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
        watch(part, x, x * scale)
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


# -- recipe and option files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "placement", "places"),
    [
        ("EDSR", "quantized_input", {"body.0.input", "body.0.conv2.input", "body.0.conv2.output"}),
        ("EDSR", "shortcut_only", {"body.0.shortcut", "body.0.conv2.input", "body.0.conv2.output"}),
        ("SRResNet", "body", {"body.0.conv1.input", "body.0.conv2.input"}),
    ],
)
def test_published_places(tiny_net, kind: str, placement: str, places: set) -> None:
    net = quantize_model(tiny_net(kind, num_block=1), load_recipe("ddtb", placement=placement))
    found = {name: q for name, q in quantizers(net)}
    weights = {"body.0.conv1.weight", "body.0.conv2.weight"}
    assert set(found) == places | weights
    assert all(isinstance(found[name], DDTBWeightQuantizer) for name in weights)
    assert {q.gate.squeeze.shape for name, q in found.items() if name in places} == {(32, 8)}


@pytest.mark.parametrize("path", sorted((options_folder() / "train/ddtb").glob("*.yml")), ids=lambda p: p.stem)
def test_option_files_have_the_published_schedule_and_ratio(path) -> None:
    options = load_options(path)
    recipe, with_norm = load_recipe(options["network_g"]["recipe"]), path.stem.startswith("srresnet")
    assert recipe.placement == ("body" if with_norm else "quantized_input")
    assert recipe.quantizers.act.extras() == {"dynamic_ratio": 0.1 if with_norm else 0.3}
    assert f"w{recipe.bits.weight}a{recipe.bits.act}" in path.stem
    assert options["train"]["total_iter"] == 59000
    assert options["train"]["scheduler"] == {
        "type": "MultiStepLR",
        "milestones": [9000, 19000, 29000, 39000, 49000],
        "gamma": 0.5,
    }


def test_a_gate_cannot_close_a_collapsed_range() -> None:
    """Bounds as close as float32 allows, far from zero, and factors that bring them closer."""
    lower = torch.tensor(15.0)
    upper = apart(lower, lower)
    low, high = rescale(lower, upper, torch.tensor([[0.0, 0.0], [-9.0, 9.0], [3.0, 3.0]]))
    assert bool((high > low).all()) and bool(torch.isfinite(1 / (high - low)).all())
