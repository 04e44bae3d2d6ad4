"""RLFN, IMDN, RFDN and BSRN: sizes, keys, formulas by hand, descriptions; with QSR_DATA, their published figures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from qsr_plugin.archs.attention_blocks import ContrastChannelAttention, DeepSpatialAttention, SpatialAttention
from qsr_plugin.archs.bsrn_arch import BSRN
from qsr_plugin.archs.describe import describe_backbone
from qsr_plugin.archs.imdn_arch import IMDN
from qsr_plugin.archs.quant_net_arch import build_backbone
from qsr_plugin.archs.rfdn_arch import RFDN
from qsr_plugin.archs.rlfn_arch import RLFN
from torch import nn

from qsr_plugin import calibrate, load_quantized, load_recipe, quantize_model, save_quantized
from qsr_plugin.checkpoint import load_float_weights
from qsr_plugin.options_file import OptionsError, backbone_options
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.record import float_mode
from qsr_plugin.report.evaluate import evaluate

DATA = os.environ.get("QSR_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="needs Set5 and public weights: set QSR_DATA to their folder")

#: Parameters of the public weights, and their PSNR on Set5 in dB, by shipped backbone.
PUBLISHED = {
    "rlfn_x2": (526856, 38.07),
    "rlfn_x4": (543740, 32.24),
    "imdn_x2": (694404, 38.00),
    "imdn_x4": (715176, 32.21),
    "rfdn_x4": (433448, 32.16),
    "bsrn_x2": (331628, 38.08),
    "bsrn_x4": (352400, 32.35),
}
SMALL = {
    "RLFN": lambda **more: RLFN(num_feat=8, num_mid=6, num_block=2, esa_channels=4, **more),
    "IMDN": lambda **more: IMDN(num_feat=16, num_block=2, **more),
    "RFDN": lambda **more: RFDN(num_feat=8, num_block=2, **more),
    "BSRN": lambda **more: BSRN(num_feat=16, num_block=2, **more),
}
every_kind = pytest.mark.parametrize("kind", SMALL)


def small(kind: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    return SMALL[kind](**more).eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_those_of_the_public_weights(name: str) -> None:
    net = build_backbone(backbone_options(name))
    assert sum(parameter.numel() for parameter in net.parameters()) == PUBLISHED[name][0]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@every_kind
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (4, 4), (14, 33), (15, 15), (23, 31)])
def test_any_size_grows_by_exactly_the_scale(kind: str, scale: int, size: tuple[int, int]) -> None:
    out = small(kind, upscale=scale)(torch.rand(2, 3, *size))
    assert out.shape == (2, 3, size[0] * scale, size[1] * scale) and bool(torch.isfinite(out).all())


@every_kind
def test_state_dict_round_trip(kind: str) -> None:
    net, twin, x = small(kind), SMALL[kind]().eval(), torch.rand(1, 3, 17, 20)
    assert not torch.equal(net(x), twin(x))
    twin.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(net(x), twin(x))


@pytest.mark.parametrize("kind", ["RLFN", "RFDN"])
def test_image_range_scales_input_and_output(kind: str) -> None:
    wide, unit, x = small(kind), small(kind, img_range=1.0), torch.rand(1, 3, 17, 20)
    assert wide.img_range == 255
    torch.testing.assert_close(wide(x), unit(x * 255) / 255)


@every_kind
def test_another_image_of_a_batch_changes_nothing(kind: str) -> None:
    net, x = small(kind), torch.rand(2, 3, 17, 20)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))


@every_kind
@pytest.mark.parametrize("more", [{}, {"num_in_ch": 1, "num_out_ch": 4, "upscale": 2}], ids=["rgb", "one to four"])
def test_networks_built_by_their_class_describe_themselves(kind: str, more: dict) -> None:
    unseen = {"img_range": 2.0} if kind in ("RLFN", "RFDN") else {}
    net = small(kind, **more, **unseen)
    twin = build_backbone(describe_backbone(net)).eval()
    twin.load_state_dict(net.state_dict(), strict=True)
    x = torch.rand(1, more.get("num_in_ch", 3), 17, 20)
    assert type(twin) is type(net) and torch.equal(net(x), twin(x))


@every_kind
def test_quantized_networks_are_rebuilt_from_their_file(kind: str, tmp_path: Path, images) -> None:
    rules = [{"match": "**", "type": "Conv2d", "port": port} for port in ("input", "weight")]
    recipe = load_recipe({"base": "minmax", "placement": "all", "placements": {"all": rules}})
    net = calibrate(quantize_model(small(kind), recipe), images)
    save_quantized(net, tmp_path / "net.safetensors")
    assert torch.equal(net.eval()(images[0]), load_quantized(tmp_path / "net.safetensors")(images[0]))


@pytest.mark.parametrize(("kind", "num_feat"), [("IMDN", 30), ("IMDN", 12), ("RFDN", 25), ("BSRN", 8), ("BSRN", 17)])
def test_impossible_channels_are_named(kind: str, num_feat: int) -> None:
    with pytest.raises(OptionsError, match=f"{kind}: num_feat is {num_feat}; allowed are"):
        build_backbone({"type": kind, "num_feat": num_feat})


@every_kind
def test_blocks_are_left_out_only_where_they_add_to_their_input(kind: str) -> None:
    net = small(kind)
    if kind in ("RLFN", "RFDN"):
        with pytest.raises(RecipeError, match=r"cannot be left out: .* does not compute x \+ branch\(x\)"):
            quantize_model(net, "quantsr")
        return
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    want = net(x)
    quantize_model(net, "quantsr")
    assert len(net.block_order) == 2
    with float_mode():
        torch.testing.assert_close(net(x), want)


def test_contrast_is_mean_plus_standard_deviation() -> None:
    """Values 1 and 3: mean 2, deviation 1. With unit weights the factor is sigmoid(3)."""
    attention = ContrastChannelAttention(1, reduction=1)
    for layer in (attention.conv_du[0], attention.conv_du[2]):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = torch.tensor([1.0, 3.0, 3.0, 1.0]).view(1, 1, 2, 2)
    torch.testing.assert_close(attention(x), x * torch.sigmoid(torch.tensor(3.0)))


def test_equal_values_of_a_channel_have_a_gradient() -> None:
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0.0
    x[0, 2] = 5.0
    with torch.enable_grad():
        ContrastChannelAttention(4, reduction=1)(x.requires_grad_()).sum().backward()
    assert bool(torch.isfinite(x.grad).all()) and bool((x.grad[:, 0] != 0).any())


def test_spatial_attention_pools_windows_of_seven_every_three() -> None:
    """On 21 x 15 pixels the strided convolution leaves 10 x 7, of which the pooling makes 2 x 1."""
    seen = []
    attention = SpatialAttention(4, 2)
    attention.conv3.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    attention(torch.rand(1, 4, 21, 15))
    assert seen == [(1, 2, 2, 1)]


@pytest.mark.parametrize("attention", [SpatialAttention(4, 2), DeepSpatialAttention(8)], ids=["RLFN", "RFDN"])
def test_small_features_count_as_repeated_at_the_border(attention: SpatialAttention) -> None:
    """A column that stays the same downwards gets the same factors at 3 and at 15 pixels of height."""
    column = torch.rand(1, attention.conv1.in_channels, 1, 17)
    low, high = (attention(column.expand(-1, -1, height, -1)) for height in (3, 15))
    torch.testing.assert_close(low, high[:, :, :3])


@needs_data
@pytest.mark.parametrize("name", PUBLISHED)
def test_public_weights_load_strictly(name: str) -> None:
    net = build_backbone(backbone_options(name))
    assert load_float_weights(net, Path(DATA) / "weights" / f"{name}.pth") == len(net.state_dict())


@needs_data
@pytest.mark.parametrize("name", ["rlfn_x4", "imdn_x4", "rfdn_x4", "bsrn_x4"])
def test_public_weights_reach_their_psnr_on_set5(name: str) -> None:
    data, net = Path(DATA), build_backbone(backbone_options(name))
    load_float_weights(net, data / "weights" / f"{name}.pth")
    result = evaluate(net, data / "Set5" / "HR", data / "Set5" / "LRbicx4", 4)
    assert result.psnr == pytest.approx(PUBLISHED[name][1], abs=0.02)
