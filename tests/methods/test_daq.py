"""DAQ against figures computed with the published code (float32), digit by digit, and where that code breaks down."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsr_plugin.methods.daq import STEPS, DAQQuantizer, DAQWeightQuantizer
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.quant.surgery import quantize_model, quantizers

SIGNED = torch.tensor([[-1.0, 0, 1, 2, -2, 0.5], [0.1, 0.3, -0.1, 0.2, 0.6, -0.4]]).view(1, 2, 2, 3)
RELU = torch.tensor([[0, 0, 1.0, 2, 0, 0.5], [0.1, 0.3, 0, 0.2, 0.6, 0]]).view(1, 2, 2, 3)
OUTLIER = torch.tensor([0.0, 50.0, *[0.5] * 62]).view(1, 1, 8, 8)
WEIGHT = torch.tensor([0.3, -0.2, 0.05, 0.6])


def daq(bits: int | tuple[int, ...], axis: int = 1, seen: Tensor = SIGNED, **options: object) -> DAQQuantizer:
    candidates = bits if isinstance(bits, tuple) else (bits,)
    q = DAQQuantizer(DAQQuantizer.Options(**options), candidates, "act", axis)
    q.begin_calibration()
    q.observe(seen)
    q.end_calibration()
    return q


def close(got: Tensor, want: list[float], digits: int = 7) -> None:
    wanted = torch.tensor(want, dtype=torch.float32)
    assert torch.allclose(got.detach().flatten(), wanted, atol=1.01 * 10**-digits, rtol=2e-7), got


A = [-1.0569041, -1.0569041, 1.2235708, 1.2235708, -1.0569041, 1.2235708]
A += [-0.1570679, 0.3904012, -0.1570679, 0.3904012, 0.3904012, -0.1570679]
B = [-1.1622248, -1.1622248, 1.3288915, 1.3288915, -1.1622248, 1.3288915]
B += [-0.0517472, 0.2850805, -0.0517472, 0.2850805, 0.6219082, -0.3885748]
C = [-1.2886539, -0.3739957, 1.4553204, 2.3699784, -2.2033119, 0.5406623]
C += [0.0548305, 0.3021752, -0.0688418, 0.1785028, 0.5495198, -0.4398588]
D2 = [0, 0, 1.180258, 2.3605156, 0, 0, 0, 0.3286365, 0, 0.3286365, 0.6572729, 0]
D4 = [0, 0, 0.9427183, 1.8854365, 0, 0.471359, 0.0826585, 0.3306341, 0, 0.165317, 0.5786096, 0]
EXAMPLES = [
    pytest.param(SIGNED, 2, 32, A, id="A"),
    pytest.param(SIGNED, 2, 4, B, id="B"),
    pytest.param(SIGNED, 4, 4, C, id="C"),
    pytest.param(RELU, 2, 32, D2, id="D-2"),
    pytest.param(RELU, 4, 4, D4, id="D-4"),
]


@pytest.mark.parametrize(("values", "bits", "sigma_bits", "want"), EXAMPLES)
def test_activations(values: Tensor, bits: int, sigma_bits: int, want: list[float]) -> None:
    x = values.clone().requires_grad_()
    out = daq(bits, seen=values, sigma_bits=sigma_bits)(x)
    close(out, want)
    assert (torch.autograd.grad(out.sum(), x)[0] == 1).all(), "also where a value is clamped"


@pytest.mark.parametrize(("values", "bits", "sigma_bits", "want"), EXAMPLES)
def test_channels_last_give_the_same(values: Tensor, bits: int, sigma_bits: int, want: list[float]) -> None:
    tokens = values.flatten(2).transpose(1, 2).contiguous()
    out = daq(bits, axis=-1, seen=tokens, sigma_bits=sigma_bits)(tokens)
    close(out.transpose(1, 2), want)


@pytest.mark.parametrize("branch", ["calibrated", "batch"])
@pytest.mark.parametrize(("clamp", "largest"), [(False, 48.9993), (True, 29.3996)])
def test_a_large_value_of_a_relu_is_clamped_to_the_grid(branch: str, clamp: bool, largest: float) -> None:
    out = daq(2, seen=OUTLIER, sigma_bits=32, clamp_relu=clamp, branch=branch)(OUTLIER).flatten()
    close(out[1:2], [largest], digits=4)
    assert out[0] == 0 and (out[2:] == 0).all()
    bits = torch.tensor([2])
    several = daq((2, 4), seen=OUTLIER, sigma_bits=32, clamp_relu=clamp, branch=branch)
    assert torch.equal(several(OUTLIER, bits).flatten(), out)


def test_weights() -> None:
    q, weight = DAQWeightQuantizer(DAQWeightQuantizer.Options(), (2,), "weight", 0), WEIGHT.clone().requires_grad_()
    out = q(weight)
    close(out, [0.2732980, -0.2732980, 0.2732980, 0.8198940])
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(torch.autograd.grad(out, weight, upstream)[0], upstream)
    grid = q.qparams_of(WEIGHT)
    close(grid.scale, [0.5465960])
    codes = out / grid.scale + grid.zero_point
    assert torch.allclose(codes, codes.round()) and grid.qmin <= codes.min() and codes.max() <= grid.qmax
    assert grid.qmax - grid.qmin + 1 == 4


def test_the_formula_is_the_one_of_the_calibration() -> None:
    """Rule of the published code: the smallest value is exactly zero."""
    for seen, formula in ((SIGNED, "signed"), (RELU, "relu"), (RELU + 0.1, "signed"), (RELU * 0, "relu")):
        for x in (SIGNED, RELU, RELU + 0.1):
            assert torch.equal(daq(3, seen=seen)(x), daq(3, branch=formula)(x))
    q = daq(3)
    q.begin_calibration()
    for batch in (RELU + 0.1, RELU, RELU + 0.2):
        q.observe(batch)
    q.end_calibration()
    assert torch.equal(q(SIGNED), daq(3, branch="relu")(SIGNED)), "the smallest value of all batches counts"


@pytest.mark.parametrize("bits", [4, torch.tensor([4, 2])])
def test_the_released_rule_decides_for_each_batch(bits: int | Tensor) -> None:
    both, batch = torch.cat([RELU, SIGNED]), daq((2, 4), branch="batch")
    assert torch.equal(batch(both, bits), daq((2, 4), branch="signed")(both, bits))
    zeros = torch.cat([RELU, RELU.flip(1)])
    assert torch.equal(batch(zeros, bits), daq((2, 4), branch="relu")(zeros, bits))


@pytest.mark.parametrize("branch", ["signed", "relu", "batch"])
def test_bits_per_image_equal_the_images_one_by_one(branch: str) -> None:
    q, x = daq((2, 4, 8), branch=branch), torch.cat([RELU, RELU * 3, RELU.flip(3)])
    together = q(x, torch.tensor([8, 2, 4]))
    for image, bits in enumerate((8, 2, 4)):
        assert torch.allclose(together[image : image + 1], q(x[image : image + 1], bits), atol=1e-6)


@pytest.mark.parametrize(
    ("sigmas", "sigma_bits"), [([0.01, 1.0, 1.0, 1.0, 1.0], 4), ([0.0086, 0.09, 0.94, 0.13, 6.2], 2)]
)
def test_a_quantized_sigma_below_zero_gives_way_to_the_sigma_itself(sigmas: list[float], sigma_bits: int) -> None:
    """The grid of the sigmas puts the first one at -0.1 (or -0.66), which would make its channel one constant."""
    noise = torch.randn(1, 5, 20, 20, generator=torch.Generator().manual_seed(0))
    noise = (noise - noise.mean((2, 3), keepdim=True)) / noise.std((2, 3), keepdim=True)
    x = noise * torch.tensor(sigmas).view(1, 5, 1, 1)
    out, exact = daq(4, sigma_bits=sigma_bits)(x), daq(4, sigma_bits=32)(x)
    assert torch.equal(out[:, :1], exact[:, :1]) and out[:, :1].unique().numel() > 8
    assert not torch.equal(out[:, -1], exact[:, -1]), "the others have their quantized sigma"


@pytest.mark.parametrize("branch", ["signed", "relu", "batch"])
@pytest.mark.parametrize("sigma_bits", [4, 32])
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 1, 5, 5), (1, 1, 1, 1), (2, 3), (2, 1)])
def test_statistics_of_hardly_any_values_are_finite(branch: str, sigma_bits: int, shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = daq(2, branch=branch, sigma_bits=sigma_bits)(x)
    assert out.shape == x.shape and bool(torch.isfinite(out).all())
    assert (torch.autograd.grad(out.sum(), x)[0] == 1).all()
    if branch == "signed" and x[0, 0].numel() == 1:
        assert torch.allclose(out, x), "a single value is its own mean"


@pytest.mark.parametrize("branch", ["signed", "relu", "batch"])
@pytest.mark.parametrize("sigma_bits", [4, 32])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1000.0])
def test_constant_channels_are_finite(branch: str, sigma_bits: int, value: float) -> None:
    out = daq(2, branch=branch, sigma_bits=sigma_bits)(torch.full((1, 3, 8, 8), value))
    assert bool(torch.isfinite(out).all())
    if value == 0 or branch == "signed":
        assert torch.allclose(out, torch.full_like(out, value), atol=1e-6)


def test_the_variance_of_a_relu_never_falls_below_zero() -> None:
    """In float32 the difference of the two means is rounding noise for large values in large images."""
    x = torch.full((1, 8, 300, 300), 3.0e3) * torch.linspace(0.9, 1.1, 8).view(1, 8, 1, 1)
    out = daq(4, branch="relu", sigma_bits=32)(x)
    assert bool(torch.isfinite(out).all())


def test_a_weight_of_one_number_or_of_equal_numbers_is_finite() -> None:
    q = DAQWeightQuantizer(DAQWeightQuantizer.Options(), (2,), "weight", 0)
    for weight in (torch.tensor([0.7]), torch.zeros(1), torch.full((4, 2, 3, 3), -0.2)):
        assert bool(torch.isfinite(q(weight)).all())


def test_statistics_keep_their_precision_in_large_images() -> None:
    x = torch.randn(1, 2, 1000, 1000, generator=torch.Generator().manual_seed(1)) + 100
    q, wide = daq(8, sigma_bits=32), x.double()
    for grid, want in zip(q._signed_grid(x, 8), (wide.mean((2, 3)), STEPS[7] * wide.std((2, 3)))):
        assert torch.allclose(grid.flatten().double(), want.flatten(), rtol=2e-6)


def test_what_is_stored_and_what_is_computed_at_run_time() -> None:
    assert daq(4).extra_storage_bits() == 0
    assert (daq(4).overhead_ops(100), daq(4, seen=RELU).overhead_ops(100)) == (700, 600)
    assert DAQQuantizer(DAQQuantizer.Options(), (4,), "act", 1).overhead_ops(100) == 700, "before calibration"
    assert DAQWeightQuantizer(DAQWeightQuantizer.Options(), (4,), "weight", 0).overhead_ops(100) == 0


@pytest.mark.parametrize(("kind", "formulas"), [("EDSR", [False, True]), ("SRResNet", [False, False])])
def test_the_second_convolution_of_a_block_sees_values_from_zero_on(tiny_net, images, kind: str, formulas) -> None:
    net = calibrate(quantize_model(tiny_net(kind, num_block=1), load_recipe("daq")), images)
    assert [bool(q.starts_at_zero) for _, q in quantizers(net) if q.role == "act"] == formulas
