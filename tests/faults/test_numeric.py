"""Numbers that break naive quantizers: dead features, runaway ranges, NaN, flat images, rounding ties."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qsr_plugin.methods.minmax_percentile import AsymmetricQuantizer
from qsr_plugin.methods.pams import PAMSQuantizer
from qsr_plugin.models.finite import first_non_finite
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.quantizer import QUANTIZERS, Quantizer
from qsr_plugin.quant.recipe import list_methods, load_recipe
from qsr_plugin.quant.surgery import quantize_model, quantizers
from tests.backbones import FITTING, names_of
from tests.quant.builders import LEARNING, PAIRS, UNIFORM, bounds, build, data, over
from tests.recipes import equal


def finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


# -- ranges of no width ----------------------------------------------------------------------------------------------


def calibrated_on_constant(name: str, role: str, bits: int, value: float) -> tuple[Quantizer, Tensor]:
    bits = min(bits, QUANTIZERS[name].bits_span[1])
    q, constant = build(name, bits, role=role), torch.full((3, 4, 5, 5), value)
    q.site = "body.3.conv1.input"
    q.begin_calibration()
    q.observe(constant)
    q.end_calibration()
    return q, constant


@over()
@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_constant_data_give_a_finite_quantizer_that_can_learn(name: str, role: str, bits: int, value: float) -> None:
    q, constant = calibrated_on_constant(name, role, bits, value)
    for x in (constant, data(), constant + 1e-3):
        x = x.clone().requires_grad_()
        y = q(x)
        y.sum().backward()
        assert finite(y, x.grad, *(p.grad for p in q.range_parameters()))


@over()
@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_constant_data_are_kept(name: str, role: str, bits: int, value: float) -> None:
    q, constant = calibrated_on_constant(name, role, bits, value)
    assert torch.allclose(q(constant), constant, atol=max(1e-5, abs(value) * 1e-4))


@over([(name, role) for name, role in PAIRS if QUANTIZERS[name].needs_calibration])
def test_a_dead_place_is_reported(name: str, role: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qsr_plugin"):
        calibrated_on_constant(name, role, 4, 0.0)
    assert [record.message.split(":")[0] for record in caplog.records] == ["body.3.conv1.input"]


@pytest.mark.parametrize(("method", "backbone"), FITTING)
def test_a_network_with_dead_features_stays_finite(tiny_net, images, method, backbone, caplog) -> None:
    net = tiny_net(backbone)
    first, second = names_of(net, "block.conv")[:2]
    with torch.no_grad():  # the first block's first activation is zero everywhere
        net.get_submodule(first).weight.zero_()
        net.get_submodule(first).bias.zero_()
    quantize_model(net, equal(method, 4))
    with caplog.at_level(logging.WARNING, "qsr_plugin"):
        calibrate(net, images)
    dense = backbone == "RDN"  # a dense layer also reads what the one before it read
    needs_calibration = net.get_submodule(second).quantizer("input").needs_calibration and not dense
    assert (f"{second}.input: all observed values are 0" in caplog.text) == needs_calibration
    out = net(images[0])
    out.sum().backward()
    assert finite(out, *(p.grad for p in net.parameters() if p.grad is not None))
    assert all(p.grad is not None for _, q in quantizers(net) for p in q.range_parameters())


@pytest.mark.parametrize("method", list_methods())
@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_flat_images_of_any_size_are_super_resolved(tiny_net, images, method: str, value: float) -> None:
    net = calibrate(quantize_model(tiny_net(), equal(method, 4)), images)
    for size in ((1, 1), (1, 9), (5, 3)):
        with torch.no_grad():
            out = net(torch.full((1, 3, *size), value))
        assert out.shape[2:] == (2 * size[0], 2 * size[1]) and finite(out)
    calibrate(net, [torch.full((1, 3, 8, 8), value)])
    assert finite(net(images[0]))


# -- learned ranges --------------------------------------------------------------------------------------------------


@given(
    pair=st.sampled_from([pair for pair in LEARNING if pair in UNIFORM]),
    bits=st.sampled_from([2, 4, 8]),
    rate=st.floats(1e-3, 1e5),
    signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=1, max_size=5),
    adam=st.booleans(),
)
def test_no_learning_rate_turns_a_range_over(
    pair: tuple[str, str], bits: int, rate: float, signs: list[float], adam: bool
) -> None:
    q = build(pair[0], bits, role=pair[1])
    optimiser = (torch.optim.Adam if adam else torch.optim.SGD)(q.range_parameters(), lr=rate)
    for step, sign in enumerate(signs):
        optimiser.zero_grad()
        (sign * q(data(seed=step)).sum()).backward()
        optimiser.step()
        q.project()
        x = data(seed=step)
        low, high, width = bounds(q, x)
        assert low < high and width > 0 and finite(q(x), *q.range_parameters())
        ordered = q(torch.linspace(-4, 4, 64).view(16, 4, 1, 1)).flatten()
        assert (ordered.diff() >= 0).all(), "larger values never become smaller ones"


def learns_ranges(method: str) -> bool:
    quantizers = load_recipe(method).quantizers
    return (quantizers.act.type, "act") in LEARNING or (quantizers.weight.type, "weight") in LEARNING


@pytest.mark.parametrize("method", [method for method in list_methods() if learns_ranges(method)])
def test_training_with_an_absurd_learning_rate_keeps_all_ranges_legal(tiny_net, images, method: str) -> None:
    net = calibrate(quantize_model(tiny_net(), equal(method, 2)), images)
    ranges = [p for _, q in quantizers(net) for p in q.range_parameters()]
    optimiser = torch.optim.Adam(ranges, lr=100.0)
    for batch in images:
        optimiser.zero_grad()
        net(batch).mean().backward()
        optimiser.step()
        for _, q in quantizers(net):
            q.project()
        assert finite(net(batch))


# -- NaN and infinity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_stops_calibration_with_its_number(tiny_net, images, bad: float) -> None:
    net = quantize_model(tiny_net(), "percentile")
    images[1][0, 0, 3, 3] = bad
    with pytest.raises(ValueError, match="calibration batch 1 holds NaN or infinity"):
        calibrate(net, images)


def test_features_that_overflow_stop_calibration_with_their_place(tiny_net, images) -> None:
    net = quantize_model(tiny_net(), "percentile")
    with torch.no_grad():
        net.body[1].conv1.bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"body\.1\.conv2\.input: observed a non-finite value"):
        calibrate(net, images)


@over()
def test_nan_is_not_hidden_by_a_quantizer(name: str, role: str) -> None:
    x = data()
    x[1, 2, 3, 3] = float("nan")
    assert bool(torch.isnan(build(name, role=role)(x)).any())


def test_the_first_bad_place_of_a_training_step_is_named(tiny_net, images) -> None:
    net, gt = calibrate(quantize_model(tiny_net(), "pams"), images), torch.zeros(2, 3, 16, 16)
    assert "the loss itself" in first_non_finite(net, images[0], gt, [])
    with torch.no_grad():
        net.conv_after_body.weight.fill_(3e38)
    assert "output of conv_after_body" in first_non_finite(net, images[0], gt, [])
    with torch.no_grad():
        net.body[0].conv2.bias[0] = float("nan")
    assert first_non_finite(net, images[0], gt, []) == "parameter body.0.conv2.bias"
    bad = images[0].clone()
    bad[1, 0, 0, 0] = float("nan")
    assert first_non_finite(net, bad, gt, ["a.png", "b.png"]) == "LQ image b.png"
    assert first_non_finite(net, images[0], gt / 0, ["a.png"]) == "GT image a.png, number 1"


# -- rounding --------------------------------------------------------------------------------------------------------


def test_half_way_values_go_to_the_even_code() -> None:
    signed = PAMSQuantizer(PAMSQuantizer.Options(), (4,), "act", 1)
    unsigned = AsymmetricQuantizer(AsymmetricQuantizer.Options(), (4,), "act", 1)
    with torch.no_grad():
        signed.set_range(torch.tensor(-7.0), torch.tensor(7.0))
        unsigned.set_range(torch.tensor(0.0), torch.tensor(15.0))
    signed.mark_calibrated(), unsigned.mark_calibrated()
    halves = torch.arange(0.5, 7)
    assert signed(halves).tolist() == unsigned(halves).tolist() == [0.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0]
    assert signed(-halves).tolist() == [0.0, -2.0, -2.0, -4.0, -4.0, -6.0, -6.0]


def test_a_narrow_range_far_from_zero_keeps_its_order() -> None:
    x = torch.linspace(0, 1, 50) + 1000.0
    q = AsymmetricQuantizer(AsymmetricQuantizer.Options(), (8,), "act", 1)
    q.begin_calibration()
    q.observe(x)
    q.end_calibration()
    assert (q(x).diff() >= 0).all() and (q(x) - x).abs().max() < 1 / 255
