"""DDTB against figures computed with the published code (float32): grids, ranges, places, option files."""

from __future__ import annotations

import pytest
import torch

from qsr_plugin.methods.ddtb import DDTBWeightQuantizer
from qsr_plugin.options_file import load_options, options_folder
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.quant.surgery import quantize_model, quantizers
from tests.methods.ddtb_builders import C, close, ddtb, features
from tests.quant.builders import observed

pytestmark = pytest.mark.usefixtures("both_uses")


def weight_quantizer(bits: int, **options: object) -> DDTBWeightQuantizer:
    return DDTBWeightQuantizer(DDTBWeightQuantizer.Options(**options), (bits,), "weight", 0)


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


def test_calibration_takes_the_mean_of_the_percentiles_of_each_batch() -> None:
    q = observed(ddtb(alpha=0.9), torch.arange(11.0), torch.arange(11.0) * 3)
    close(torch.stack([q.lower, q.upper]), [2.0, 18.0], digits=6)


def test_a_fixed_start_ignores_the_data() -> None:
    q = observed(ddtb(start="fixed"), torch.arange(11.0))
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
    q = observed(ddtb(), x, x)
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
