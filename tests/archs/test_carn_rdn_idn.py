"""CARN, RDN and IDN: sizes, formulas by hand, places, published costs; with QSR_DATA, the public weights' figures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from basicsr.utils.matlab_functions import imresize
from qsr_plugin.archs.bicubic import upsample_bicubic
from qsr_plugin.archs.carn_arch import CARN
from qsr_plugin.archs.describe import describe_backbone
from qsr_plugin.archs.idn_arch import IDN, luma
from qsr_plugin.archs.quant_net_arch import build_backbone
from qsr_plugin.archs.rdn_arch import RDN
from torch import nn

from qsr_plugin import calibrate, load_quantized, load_recipe, quantize_model, save_quantized
from qsr_plugin.checkpoint import load_float_weights
from qsr_plugin.data.images import read_rgb
from qsr_plugin.options_file import OptionsError, backbone_options
from qsr_plugin.quant.surgery import quantizers
from qsr_plugin.report.evaluate import evaluate
from tests.backbones import names_of

DATA = os.environ.get("QSR_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="needs Set5 and public weights: set QSR_DATA to their folder")

SMALL = {
    "CARN": lambda **more: CARN(**{"num_feat": 8, "num_block": 2, **more}),
    "CARN-M": lambda **more: CARN(**{"num_feat": 8, "num_block": 2, "group": 4, "shared": True, **more}),
    "RDN": lambda **more: RDN(**{"num_feat": 8, "num_block": 2, "num_layer": 3, "num_grow_ch": 4, **more}),
    "IDN": lambda **more: IDN(**{"num_feat": 16, "num_block": 2, "rgb": True, **more}),
}
every_kind = pytest.mark.parametrize("kind", SMALL)


def small(kind: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    return SMALL[kind](**more).eval()


@pytest.fixture(autouse=True)
def _no_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        ("carn_m_x4", {}, 414_811),
        ("carn_x4", {}, 1_591_963),
        ("rdn_x4", {}, 22_271_107),
        ("rdn_x4", {"upscale": 2}, 22_123_395),
        ("idn_x4", {}, 552_769),
        ("idn_x4", {"num_in_ch": 3, "rgb": False}, 590_915),  # that of CADyQ, without its selectors
    ],
)
def test_published_sizes(name: str, changes: dict, count: int) -> None:
    with torch.device("meta"):
        net = build_backbone({**backbone_options(name), **changes})
    assert sum(value.numel() for value in net.state_dict().values()) == count


@every_kind
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (13, 8)])
def test_any_size_grows_by_exactly_the_scale(kind: str, scale: int, size: tuple[int, int]) -> None:
    out = small(kind, upscale=scale)(torch.rand(2, 3, *size))
    assert out.shape == (2, 3, size[0] * scale, size[1] * scale) and bool(torch.isfinite(out).all())


@every_kind
@pytest.mark.parametrize("more", [{"upscale": 2}, {"upscale": 3}])
def test_networks_built_by_their_class_describe_themselves(kind: str, more: dict) -> None:
    unseen = {"CARN": {"multi_scale": True}, "RDN": {"img_range": 2.0}}
    net = small(kind, **more, **unseen.get(kind, {}))
    twin = build_backbone(describe_backbone(net)).eval()
    twin.load_state_dict(net.state_dict(), strict=True)
    x = torch.rand(1, 3, 7, 9)
    assert type(twin) is type(net) and torch.equal(net(x), twin(x))


@every_kind
def test_quantized_networks_are_rebuilt_from_their_file(kind: str, tmp_path: Path, images) -> None:
    net = calibrate(quantize_model(small(kind), load_recipe("minmax", placement="full")), images)
    save_quantized(net, tmp_path / "net.safetensors")
    assert torch.equal(net.eval()(images[0]), load_quantized(tmp_path / "net.safetensors")(images[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "CARN", "upscale": 5}, "CARN: upscale is 5; allowed are 2, 3, 4"),
        ({"type": "CARN", "group": 3}, "CARN: group is 3; allowed are divisors of num_feat, 64"),
        ({"type": "RDN", "upscale": 8}, "RDN: upscale is 8; allowed are 2, 3 and 4"),
        ({"type": "IDN", "num_feat": 40}, "IDN: num_feat is 40; allowed are multiples of 16"),
        ({"type": "IDN", "num_in_ch": 3, "rgb": True}, "IDN: rgb is for a luma network, num_in_ch 1; it is 3"),
    ],
)
def test_impossible_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        build_backbone(options)


# -- formulas --------------------------------------------------------------------------------------------------------


def test_carn_joins_everything_before_twice_over() -> None:
    """One cascading block, by hand: concatenations grow by the result of each residual block, then of the block."""
    net, x = small("CARN", num_block=1, upscale=2), torch.rand(1, 3, 6, 5)
    entered = net.entry(x - torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1))
    joined = now = entered
    for number in (1, 2, 3):
        block = net.b1.get_submodule(f"b{number}")
        joined = torch.cat((joined, torch.relu(now + block.body[2](torch.relu(block.body[0](now))))), 1)
        now = torch.relu(net.b1.get_submodule(f"c{number}").body[0](joined))
    now = torch.relu(net.c1.body[0](torch.cat((entered, now), 1)))
    up = net.upsample["up"].body
    want = net.exit(up[2](torch.relu(up[0](now)))) + torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)
    torch.testing.assert_close(net(x), want)


def test_blocks_of_carn_m_run_three_times() -> None:
    net, calls = small("CARN-M", num_block=1), []
    assert [len(list(block.body)) for name, block in net.named_modules() if name == "b1.b1"] == [5]
    net.b1.b1.register_forward_hook(lambda *_: calls.append(1))
    net(torch.rand(1, 3, 4, 4))
    assert len(calls) == 3 and not hasattr(net.b1, "b2")


def test_upsamplers_of_other_scales_are_stored_only() -> None:
    one, several, x = small("CARN-M", upscale=4), small("CARN-M", upscale=4, multi_scale=True), torch.rand(1, 3, 5, 4)
    state = {key.replace("upsample.up4.", "upsample.up."): value for key, value in several.state_dict().items()}
    one.load_state_dict({key: state[key] for key in one.state_dict()})
    assert torch.equal(one(x), several(x))
    learned = {name for name, _ in several.named_parameters()}
    assert learned == {name.replace("upsample.up.", "upsample.up4.") for name, _ in one.named_parameters()}
    assert not any(name.startswith(("sub_mean", "add_mean", "upsample.up2", "upsample.up3")) for name in learned)
    roles = {scale: names_of(small("CARN", upscale=scale, multi_scale=True), "upsampler") for scale in (2, 3)}
    assert all(name.startswith(f"upsample.up{scale}.") for scale, names in roles.items() for name in names)


def test_rdn_by_hand() -> None:
    net, x = small("RDN", upscale=2), torch.rand(1, 3, 6, 5)
    first = net.SFENet1(x * 255)
    now, outputs = net.SFENet2(first), []
    for block in net.RDBs:
        dense = now
        for layer in block.convs:
            dense = torch.cat((dense, torch.relu(layer.conv[0](dense))), 1)
        now = now + block.LFF(dense)
        outputs.append(now)
    fused = net.GFF[1](net.GFF[0](torch.cat(outputs, 1))) + first
    want = net.UPNet[2](nn.functional.pixel_shuffle(net.UPNet[0](fused), 2)) / 255
    torch.testing.assert_close(net(x), want)


def test_idn_on_rgb_enlarges_luma_and_keeps_bicubic_colour() -> None:
    """The usual chain, by hand: to YCbCr, the network on Y, Cb and Cr bicubic, and back."""
    net, x = small("IDN", upscale=3), torch.rand(2, 3, 6, 7)
    plain = small("IDN", upscale=3, rgb=False)
    to_ycc = torch.tensor([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]) / 255
    offset = torch.tensor([16.0, 128.0, 128.0]).view(3, 1, 1) / 255
    ycc = torch.einsum("ij,njhw->nihw", to_ycc, x) + offset
    torch.testing.assert_close(luma(x), ycc[:, :1])
    enlarged = torch.cat((plain(ycc[:, :1]), upsample_bicubic(ycc[:, 1:], 3)), 1)
    want = torch.einsum("ij,njhw->nihw", torch.linalg.inv(to_ycc), enlarged - offset)
    torch.testing.assert_close(net(x), want, atol=1e-5, rtol=1e-5)


def test_idn_stage_splits_off_a_quarter_of_its_channels() -> None:
    net, x = small("IDN", num_block=1), torch.rand(1, 16, 5, 4)
    act = nn.LeakyReLU(0.05)
    convs = [net.get_submodule(f"conv3_{number}") for number in range(1, 7)]
    middle = act(convs[2](act(convs[1](act(convs[0](x))))))
    rest = act(convs[5](act(convs[4](act(convs[3](middle[:, 4:]))))))
    want = act(net.down1(rest + torch.cat((x, middle[:, :4]), 1)))
    torch.testing.assert_close(net.stage1(x, convs, net.down1), want)


def test_idn_begins_its_residual_late() -> None:
    net, x = small("IDN", upscale=4, rgb=False), torch.rand(1, 1, 5, 6)
    residual = net(x) - upsample_bicubic(x, 4)
    assert bool((residual[..., :3, :] == 0).all()) and bool((residual[..., :3] == 0).all())
    assert bool((residual[..., 3:, 3:] != 0).all())


# -- bicubic ---------------------------------------------------------------------------------------------------------


def test_weights_of_a_pixel_at_scale_two() -> None:
    """Keys' kernel, a = -0.5, at distances 0.25 and 0.75 (weights 111/128, 29/128), 1.25 and 1.75 (-9/128, -3/128)."""
    x = torch.zeros(1, 1, 1, 7)
    x[..., 3] = 128.0
    want = [0, 0, -3, -9, 29, 111, 111, 29, -9, -3, 0, 0]
    assert upsample_bicubic(x, 2)[0, 0, 0, 1:13].tolist() == pytest.approx(want)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_bicubic_keeps_quadratics_and_mirrors_at_borders(scale: int) -> None:
    position = torch.arange(12, dtype=torch.float64)
    fine = (torch.arange(12 * scale, dtype=torch.float64) + 0.5) / scale - 0.5
    out = upsample_bicubic(position.square().view(1, 1, 12, 1), scale)[0, 0, :, 0]
    inner = slice(2 * scale, -2 * scale)
    torch.testing.assert_close(out[inner], fine.square()[inner])
    x = torch.rand(1, 2, 6, 5, dtype=torch.float64)
    mirrored = torch.cat((x.flip(2), x, x.flip(2)), 2)
    torch.testing.assert_close(
        upsample_bicubic(mirrored, scale)[:, :, 6 * scale : 12 * scale], upsample_bicubic(x, scale)
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 3)])
def test_bicubic_of_tiny_images_and_its_gradient(size: tuple[int, int]) -> None:
    flat = torch.full((1, 1, *size), 0.3)
    torch.testing.assert_close(upsample_bicubic(flat, 3), torch.full((1, 1, 3 * size[0], 3 * size[1]), 0.3))
    x = torch.rand(1, 1, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: upsample_bicubic(x, 2), (x,))


# -- places and costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "roles", "count"),
    [
        ("carn_x4", ("block.conv",), 18),
        ("carn_m_x4", ("block.conv",), 9),  # three each of three blocks, used three times
        ("idn_x4", ("block.conv",), 24),
        ("rdn_x4", ("block.conv", "body_end"), 146),
    ],
)
def test_published_numbers_of_quantized_convolutions(name: str, roles: tuple[str, ...], count: int) -> None:
    with torch.device("meta"):
        net = build_backbone(backbone_options(name))
    assert sum(len(names_of(net, role)) for role in roles) == count


@every_kind
def test_ports_between_modules_leave_the_formula_alone(kind: str, images) -> None:
    """At 16 bits, quantizers on both paths, the operands of the sum and the result change next to nothing."""
    rules = [{"role": "block", "port": "input"}, {"role": "block.shortcut"}, {"role": "block.addition"}]
    rules += [{"role": "block", "port": "output"}]
    recipe = load_recipe("minmax", placement="all", placements={"all": rules}, act_bits=16, weight_bits=16)
    net, limit = calibrate(quantize_model(small(kind), recipe), images), torch.tensor(255.0 if kind == "RDN" else 4.0)
    for _, quantizer in quantizers(net):  # ranges follow several tensors each, and would clip some
        quantizer.set_range(-limit, limit)
    torch.testing.assert_close(net(images[0]), small(kind)(images[0]), atol=2e-4, rtol=0)
    ports = {place.rpartition(".")[2] for place in net.last_record().bits}
    assert ports == {"input", "shortcut", "addition", "output"}


# -- public weights --------------------------------------------------------------------------------------------------


def with_weights(name: str, weights: str, **changes: object) -> nn.Module:
    net = build_backbone({**backbone_options(name), **changes})
    assert load_float_weights(net, Path(DATA) / "weights" / weights) == len(net.state_dict())
    return net.eval()


@needs_data
@pytest.mark.parametrize(
    ("name", "weights", "psnr"),
    [
        ("carn_m_x2", "carn_m_x234.pth", 37.68),
        ("carn_m_x4", "carn_m_x234.pth", 31.88),
        ("idn_x2", "idn_x2.pth", 37.83),
        ("idn_x4", "idn_x4.pth", 31.81),
    ],
)
def test_public_weights_reach_their_psnr_on_set5(name: str, weights: str, psnr: float) -> None:
    net, scale = with_weights(name, weights), int(name[-1])
    result = evaluate(net, Path(DATA) / "Set5" / "HR", Path(DATA) / "Set5" / f"LRbicx{scale}", scale)
    assert result.psnr == pytest.approx(psnr, abs=0.02)


def uint8_luma(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB to (H, W, 1) uint8."""
    values = luma(torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255) * 255
    return values.round().to(torch.uint8)[0].permute(1, 2, 0).numpy()


@needs_data
@pytest.mark.parametrize(("scale", "psnr"), [(2, 37.83), (4, 31.81)])
def test_idn_on_luma_reaches_its_psnr_on_set5(scale: int, psnr: float) -> None:
    """The release's protocol: Y is rounded to uint8, reduced without rounding, enlarged, rounded, compared."""
    net, scores = with_weights(f"idn_x{scale}", f"idn_x{scale}.pth", rgb=False), []
    for path in sorted((Path(DATA) / "Set5" / "HR").glob("*.png")):
        want = uint8_luma(read_rgb(path))
        small_y = torch.from_numpy(imresize(want.astype(np.float32) / 255, 1 / scale))
        got = net(small_y.float().permute(2, 0, 1)[None]).clamp(0, 1).mul(255).round()[0, 0]
        error = (got - torch.from_numpy(want[..., 0]))[scale:-scale, scale:-scale].double().square().mean()
        scores.append(float(10 * torch.log10(255**2 / error)))
    assert len(scores) == 5 and sum(scores) / 5 == pytest.approx(psnr, abs=0.01)
