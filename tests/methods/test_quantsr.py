"""RLQ against figures computed with the released operators (float32), digit by digit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsr_plugin.methods.quantsr import RLQQuantizer
from qsr_plugin.models.stages import parameter_groups
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.places import channels_at
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.surgery import quantize_model, quantizers
from tests.backbones import DEPTH, names_of
from tests.quant.builders import calibrate_on

pytestmark = pytest.mark.usefixtures("both_uses")


def close(got: Tensor, want: list, digits: int = 6) -> None:
    wanted = torch.tensor(want, dtype=torch.float32).flatten()
    assert torch.allclose(got.detach().flatten(), wanted, atol=1.01 * 10**-digits, rtol=2e-7), got


def act(bits: int, channels: int = 1, axis: int = 1, **options: object) -> RLQQuantizer:
    return RLQQuantizer(RLQQuantizer.Options(**options), (bits,), "act", axis, channels=channels)


def weight(bits: int, **options: object) -> RLQQuantizer:
    return RLQQuantizer(RLQQuantizer.Options(**options), (bits,), "weight", 0)


# -- the soft staircase ----------------------------------------------------------------------------------------------

V = (-1.5, -0.3, 0.0, 0.2, 0.5, 0.75, 1.0, 2.49)


def staircase(q: RLQQuantizer, values: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        q.step.fill_(1.0)
    q.mark_calibrated()
    v = torch.tensor(values, requires_grad=True)
    out = q(v)
    return out, torch.autograd.grad(out.sum(), v)[0]


def test_rounding_and_its_slope() -> None:
    out, slope = staircase(weight(4), V)
    assert out.tolist() == [-2, 0, 0, 0, 0, 1, 1, 2]
    close(slope, [1.081977, 1.039826, 0.850918, 0.990157, 1.081977, 1.017074, 0.850918, 1.081868])


def test_slope_of_the_printed_formula() -> None:
    out, slope = staircase(weight(4, phi="paper"), (0.0, 0.5, 1.0, 0.2))
    assert out.tolist() == [0, 0, 1, 0]
    by_hand = 1 / math.cosh(2 * 0.2 - 1) ** 2 / math.tanh(1)
    close(slope, [0.5514, 1.3130, 0.5514, round(by_hand, 4)], digits=4)


@pytest.mark.parametrize(("phi", "k"), [("code", 1.0), ("paper", 2.0)])
def test_slope_is_that_of_the_soft_staircase(phi: str, k: float) -> None:
    """Differentiating floor(v) + (tanh(k (f - 1/2)) / tanh(k/2) + 1) / 2 gives the same numbers."""
    v = torch.linspace(-3.9, 3.9, 41, requires_grad=True)
    f = v - v.detach().floor()
    soft = v.detach().floor() + ((k * (f - 0.5)).tanh() / math.tanh(k / 2) + 1) / 2
    _, slope = staircase(weight(4, phi=phi), tuple(v.tolist()))
    assert torch.allclose(slope, torch.autograd.grad(soft.sum(), v)[0], atol=1e-5)


def test_slope_is_zero_outside_and_counts_bounds_as_inside() -> None:
    _, slope = staircase(weight(2), (-2.01, -2.0, 1.0, 1.01))
    close(slope, [0, 0.850918, 0.850918, 0])


# -- activations -----------------------------------------------------------------------------------------------------


def test_unsigned_activation() -> None:
    x = torch.tensor([[[[0.0, 0.2, 0.5, 0.9, 1.6]]]], requires_grad=True)
    q = calibrate_on(act(2), x.detach())
    close(q.step, [0.739008427], digits=7)
    out = q(x)
    close(out, [0, 0, 0.739008, 0.739008, 1.478017])
    dx, dtau, dstep = torch.autograd.grad(out.sum(), (x, q.tau, q.step))
    close(dx, [0.850918, 1.026993, 1.048928, 1.000214, 0.969130])
    close(dtau, [4.896184])
    close(dstep, [-0.0784826], digits=7)


def test_signed_activation() -> None:
    x = torch.tensor([[[[-0.9, -0.2, 0.1, 0.6, 1.6]]]], requires_grad=True)
    q = calibrate_on(act(2), x.detach())
    close(q.step, [1.36])
    out = q(x)
    close(out, [-1.36, 0, 0, 0, 1.36])
    dx, dstep = torch.autograd.grad(out.sum(), (x, q.step))
    close(dx, [1.054150, 0.957649, 0.906805, 1.078241, 0])
    close(dstep, [0.1324014], digits=7)


@pytest.mark.parametrize("axis", [1, -1])
def test_shift_per_channel(axis: int) -> None:
    x = torch.tensor([[[[-0.9, -0.2, 0.1]], [[0.6, 1.6, 0.3]]]])
    if axis == -1:
        x = x.flatten(2).transpose(1, 2).contiguous()
    q = act(4, channels=2, axis=axis)
    with torch.no_grad():
        q.tau.copy_(torch.tensor([0.1, -0.2]))
    calibrate_on(q, x)
    close(q.step, [0.377964467], digits=7)
    out = q(x)
    by_channel = out if axis == 1 else out.transpose(1, 2)
    close(by_channel, [-0.755929, 0, 0.377964, 0.377964, 1.511858, 0])
    dtau, dstep = torch.autograd.grad(out.sum(), (q.tau, q.step))
    close(dtau, [3.042526, 2.957891])
    close(dstep, [0.0954706], digits=7)


def test_convolution() -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1)
    values = [[0.2646, 0.06, 0.1468], [0.3361, 0.2801, -0.1466], [0.1425, -0.0227, -0.0155]]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[values]]))
        layer.bias.fill_(0.0411)
    rules = [{"match": "0", "port": port} for port in ("input", "weight")]
    recipe = {
        "method": "test",
        "bits": {"weight": 4, "act": 4},
        "placement": "all",
        "placements": {"all": rules},
        "quantizers": {"act": "rlq", "weight": "rlq"},
    }
    net = quantize_model(nn.Sequential(layer), recipe)
    x = torch.tensor([[[[0.144, 1.4543], [0.761, 0.1217]]]])
    q_act, q_weight = layer.quantizer("input"), layer.quantizer("weight")
    for quantizer, tensor in ((q_act, x), (q_weight, layer.weight)):
        calibrate_on(quantizer, tensor)
    close(q_act.step, [0.320295721], digits=7)
    close(q_weight.step, [0.118840441], digits=7)
    close(q_act(x), [0, 1.601479, 0.640591, 0])
    y = net(x)
    close(y, [-0.149220, 0.497869, 0.383677, 0.459805])
    upstream = torch.cos(0.7 * torch.arange(4.0)).view_as(y)
    d_act, d_weight, d_tau = torch.autograd.grad(y, (q_act.step, q_weight.step, q_act.tau), upstream)
    close(d_act, [-0.0147572], digits=7)
    close(d_weight, [-0.0956099], digits=7)
    close(d_tau, [0.2667035], digits=7)


def test_shift_stays_in_the_result() -> None:
    q = calibrate_on(act(8), torch.tensor([[[[1.0, -1.0]]]]))
    with torch.no_grad():
        q.tau.fill_(0.25)
    assert q(torch.zeros(1, 1, 1, 1)).item() == pytest.approx(0.25, abs=q.step.item() / 2)


def test_a_place_without_negative_values_stays_unsigned_when_its_shift_turns_negative() -> None:
    x = torch.tensor([[[[0.1, 0.5, 2.0]]]])
    q = calibrate_on(act(4), x)
    with torch.no_grad():
        q.tau.fill_(-0.4)
    x.requires_grad_()
    out = q(x)
    assert out[..., 0].item() == 0 and out[..., 2].item() > 1
    assert torch.autograd.grad(out.sum(), x)[0][..., 0].item() == 0
    copied = act(4)
    copied.load_state_dict(q.state_dict())
    assert torch.equal(copied(x), out) and not copied.signed
    calibrate_on(q, x.detach())  # only a new calibration looks again, at the shifted values
    assert q.signed and q(x)[..., 0].item() < 0


def test_gradient_scale_counts_the_whole_batch() -> None:
    x = torch.full((3, 1, 1, 2), -50.0)
    q = calibrate_on(act(2), x * 0.1)
    (dstep,) = torch.autograd.grad(q(x).sum(), q.step)
    assert dstep.item() == pytest.approx(-2 * 6 / math.sqrt(6 * 1))


def test_bits_per_image_equal_the_loop_but_for_the_gradient_scale() -> None:
    q = RLQQuantizer(RLQQuantizer.Options(), (2, 4, 8), "act", 1, channels=2)
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    calibrate_on(q, x * 0.5)
    with torch.no_grad():
        q.tau.copy_(torch.tensor([0.3, -0.2]))
    x.requires_grad_()
    widths = [4, 2, 8, 2]
    together = q(x, torch.tensor(widths))
    apart = torch.cat([q(one, bits) for one, bits in zip(x.split(1), widths)])
    assert torch.equal(together, apart)
    leaves, upstream = (x, q.tau, q.step), torch.linspace(-1, 2, x.numel()).view_as(x)
    joint, single = torch.autograd.grad(together, leaves, upstream), torch.autograd.grad(apart, leaves, upstream)
    assert torch.allclose(joint[0], single[0]) and torch.allclose(joint[1], single[1], atol=1e-5)
    assert torch.allclose(joint[2], single[2] / math.sqrt(4), rtol=1e-4, atol=1e-6)


def test_two_bit_weights_clip_high_values_before_low_ones() -> None:
    w = torch.tensor([-3.0, -0.1, 0.1, 3.0])
    q = calibrate_on(weight(2), w)
    assert q.step.item() == pytest.approx(2 * 1.55) and q.qparams().qmin == -2 and q.qparams().qmax == 1
    with torch.no_grad():
        q.step.fill_(1.0)
    assert q(w).tolist() == [-2, 0, 0, 1]


def test_bfloat16_is_shifted_in_float32() -> None:
    q = calibrate_on(act(8), torch.tensor([[[[1.0, -1.0]]]]))
    with torch.no_grad():
        q.tau.fill_(0.003)  # bfloat16 cannot tell 1.003 from 1
    x = torch.tensor([[[[1.0]]]], dtype=torch.bfloat16)
    assert q(x).dtype == torch.bfloat16 and torch.equal(q(x), q(x.float()).bfloat16())


def test_the_grid_applies_to_the_shifted_activation() -> None:
    q, x = calibrate_on(act(4, channels=2), torch.rand(1, 2, 3, 3)), torch.rand(1, 2, 3, 3)
    with torch.no_grad():
        q.tau.copy_(torch.tensor([0.5, -0.25]))
    shifted = q.on_grid(x)
    assert torch.equal(shifted, x + q.tau.view(1, 2, 1, 1))
    grid = q.qparams()
    codes = (shifted / grid.scale).round().clamp(grid.qmin, grid.qmax)
    assert torch.equal(q(x), codes * grid.scale)
    weights = torch.rand(3)
    assert weight(4).on_grid(weights) is weights


def test_gradient_scale_counts_the_activations_of_all_processes_but_a_weight_once(monkeypatch) -> None:
    x, slopes = torch.rand(2, 1, 3, 3) + 0.1, {}
    for count in (1, 4):
        monkeypatch.setattr("qsr_plugin.methods.quantsr.world_size", lambda n=count: n)
        for q in (calibrate_on(act(4), x), calibrate_on(weight(4), x)):
            slopes[q.role, count] = torch.autograd.grad(q(x).sum(), q.step)[0].item()
    assert slopes["act", 4] == pytest.approx(slopes["act", 1] / 2) and slopes["act", 1] != 0
    assert slopes["weight", 4] == slopes["weight", 1]


# -- in a network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", DEPTH)
def test_shifts_learn_with_the_other_parameters_and_steps_with_the_ranges(tiny_net, images, backbone: str) -> None:
    net = calibrate(quantize_model(tiny_net(backbone), load_recipe("quantsr", weight_bits=4, act_bits=4)), images)
    acts = [q for _, q in quantizers(net) if q.role == "act"]
    convs = [net.get_submodule(name) for name in names_of(net, "block.conv")]
    assert [tuple(q.tau.shape) for q in acts] == [(channels_at(conv, "input"),) for conv in convs] and len(convs) >= 4
    groups = {name: {id(p) for p in parameters} for name, parameters in parameter_groups(net).items()}
    assert all(id(q.tau) in groups["others"] and id(q.step) in groups["ranges"] for q in acts)
    twin = copy.deepcopy(net)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(images[0]), net(images[0]))


@pytest.mark.parametrize(("port", "channels"), [("input", 3), ("output", 8)])
def test_one_shift_per_channel_of_the_port(tiny_net, images, port: str, channels: int) -> None:
    rules = {"body": [{"match": "conv_first", "port": port}]}
    net = calibrate(quantize_model(tiny_net(), load_recipe("quantsr", placements=rules)), images)
    assert net.conv_first.quantizer(port).tau.shape == (channels,)
    assert net(images[0]).shape == (2, 3, 16, 16)


def test_a_place_that_does_not_tell_its_channels_is_refused(tiny_net) -> None:
    rules = [{"match": "body.*.relu", "port": "input"}]
    with pytest.raises(RecipeError, match=r"'rlq' has a number per channel, and body\.0\.relu \(ReLU\) does not say"):
        quantize_model(tiny_net(), load_recipe("quantsr", placements={"body": rules}))


def test_padding_zeros_are_not_shifted(tiny_net, images) -> None:
    net = calibrate(quantize_model(tiny_net(num_block=1), "quantsr"), images)
    layer = net.body[0].conv1
    with torch.no_grad():
        layer.quantizer("input").tau.fill_(0.7)
    x = torch.rand(1, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    want = F.conv2d(layer.quantizer("input")(x), layer.quantized_weight(), layer.bias, padding=1)
    assert torch.equal(layer(x), want)
