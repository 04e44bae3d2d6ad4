"""The host's SwinIR: published sizes, places of every variant, image sizes, files, and a training from YAML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs.swinir_arch import SwinIR
from qsr_plugin.archs.describe import describe_backbone
from qsr_plugin.archs.quant_net_arch import build_backbone
from qsr_plugin.archs.recognise import recognise
from torch import nn

from qsr_plugin import calibrate, complexity, load_quantized, load_recipe, quantize_model, save_quantized, set_depth
from qsr_plugin.checkpoint import load_float_weights, save_torch, state_dict_in
from qsr_plugin.options_file import OptionsError, backbone_options
from qsr_plugin.quant.places import find_places, roles_of
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.surgery import quantizers
from tests.backbones import names_of, tiny_options
from tests.host import harness

LIGHT = "swinir_light_x4"
VARIANTS = [
    {"upsampler": "pixelshuffledirect", "upscale": 3},
    {"upsampler": "pixelshuffle", "upscale": 2},
    {"upsampler": "pixelshuffle", "upscale": 3, "resi_connection": "3conv"},
    {"upsampler": "nearest+conv", "upscale": 4},
    {"upsampler": "", "upscale": 1, "resi_connection": "3conv"},
]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda one: "-".join(map(str, one.values())))


def light(recipe: Any = None) -> nn.Module:
    """SwinIR-light x4, quantized if told how."""
    net = build_backbone(backbone_options(LIGHT))
    return net if recipe is None else quantize_model(net, recipe)


@pytest.mark.parametrize(("name", "count"), [(LIGHT, 929_628), ("swinir_light_x2", 910_152)])
def test_published_sizes(name: str, count: int) -> None:
    """929.6 K (QuantSR, Table 2; ODM, supplement) and 910 K, which are 0.93 M and 0.91 M."""
    assert sum(p.numel() for p in build_backbone(backbone_options(name)).parameters()) == count


def test_quantized_weights_are_those_of_published_storage() -> None:
    """ODM's supplement: 24 x 28,800 numbers of linear layers and 4 x 32,400 of convolutions."""
    net = light(load_recipe("odm"))
    weights = [module.weight.numel() for module in net.modules() if getattr(module, "weight_quantizer", None)]
    assert len(weights) == 24 * 4 + 4 and sum(weights) == 24 * 28_800 + 4 * 32_400 == 820_800
    stored = complexity(light(load_recipe("odm", weight_bits=2, act_bits=2)), (64, 64)).storage_bits
    assert stored / 32e3 == pytest.approx(160.4, abs=0.05), "thousands of 32-bit numbers, as published"


def test_published_placements() -> None:
    places = find_places(light(), load_recipe("granular_dq", placement="mlp"))
    assert len(places) == 24 * 2 * 2 and {place.name.rpartition(".")[2] for place in places} == {"fc1", "fc2"}
    places = find_places(light(), load_recipe("2dquant", placement="transformer"))
    ports = [place.port for place in places]
    assert [ports.count(port) for port in ("input", "weight")] == [24 * 4] * 2
    assert [ports.count(port) for port in ("query", "key", "attention", "value")] == [24] * 4
    assert not any(isinstance(place.module, nn.Conv2d) for place in places)


def test_networks_without_attention_refuse_such_placements(tiny_net) -> None:
    for method, placement in (("2dquant", "transformer"), ("granular_dq", "mlp")):
        with pytest.raises(RecipeError, match="EDSR has no role 'block.*To go on, take a placement .*body"):
            quantize_model(tiny_net(), load_recipe(method, placement=placement))


@variants
def test_every_layer_of_every_variant_has_one_role(variant: dict) -> None:
    net = build_backbone(tiny_options("SwinIR", **variant))
    layers = {name for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    found = [name for role in ("head", "block.conv", "body_end", "upsampler", "tail") for name in names_of(net, role)]
    assert set(found) == layers and len(found) == len(layers)
    lasts = names_of(net, "block.conv_last")
    assert len(lasts) == len(names_of(net, "block")) == 2
    assert [net.get_submodule(name).out_channels for name in lasts] == [8, 8]
    assert names_of(net, "block.conv_first") == [] and names_of(net, "block.conv_later") == names_of(net, "block.conv")


@variants
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 7), (16, 12)])
def test_any_size_grows_by_exactly_the_scale(variant: dict, size: tuple[int, int]) -> None:
    net = build_backbone(tiny_options("SwinIR", **variant)).eval()
    x, scale = torch.rand(2, 3, *size), variant["upscale"]
    out = net(x)
    assert out.shape == (2, 3, scale * size[0], scale * size[1]) and bool(torch.isfinite(out).all())
    if not size[0] % 4 and not size[1] % 4:
        plain = SwinIR(**{key: value for key, value in net.backbone_options.items() if key != "type"}).eval()
        plain.load_state_dict(net.state_dict())
        assert torch.equal(out, plain(x)), "whole windows are not padded"


@variants
def test_full_placements_work_on_every_variant(variant: dict, images) -> None:
    net = build_backbone(tiny_options("SwinIR", **variant))
    for method, placement in (("minmax", "full"), ("fqsr", "fully"), ("pams", "shortcut_only")):
        net = build_backbone(tiny_options("SwinIR", **variant))
        calibrate(quantize_model(net, load_recipe(method, placement=placement)), images)
        out = net.train()(images[0])
        out.square().sum().backward()
        ranges = [p for _, quantizer in quantizers(net) for p in quantizer.range_parameters()]
        assert all(p.grad is not None for p in ranges) and bool(torch.isfinite(out).all())


def test_misspelt_arguments_are_refused() -> None:
    """The host's constructor ignores what it does not know."""
    with pytest.raises(OptionsError, match="SwinIR.: there is no argument 'window_sise'. .*window_size"):
        build_backbone(tiny_options("SwinIR", window_sise=8))


def test_roles_are_those_of_the_host_class_only() -> None:
    class SwinIR(nn.Sequential):
        """Of the same name, from elsewhere."""

        upsampler = "pixelshuffledirect"

    roles = roles_of(
        SwinIR(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1))
    )
    assert roles["head"] == ("0",) and roles["tail"] == ("2",)


def test_networks_of_several_depths_leave_out_whole_blocks(tiny_net, images) -> None:
    """QuantSR-T: 4, 2 and 1 residual Swin Transformer blocks."""
    net = calibrate(quantize_model(tiny_net("SwinIR", num_block=4), "quantsr"), images).eval()
    assert net(images[0]).shape == (2, 3, 16, 16)
    linear = [
        sum(row.kind == "Linear" for row in complexity(set_depth(net, depth), (8, 8)).sites) for depth in (4, 2, 1)
    ]
    assert linear == [4 * 8, 2 * 8, 8]


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"img_size": (8, 16), "num_heads": [2, 4], "depths": [1, 3], "img_range": 255.0, "qk_scale": 0.3},
        {"qkv_bias": False, "patch_norm": False, "drop_path_rate": 0.3, "drop_rate": 0.1, "resi_connection": "3conv"},
    ],
)
def test_networks_built_by_their_class_describe_themselves(more: dict, images, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {key: value for key, value in tiny_options("SwinIR", **more).items() if key != "type"}
    net = SwinIR(**options).eval()
    twin = build_backbone(describe_backbone(net)).eval()
    twin.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(net(images[0]), twin(images[0]))
    calibrate(quantize_model(net, "pams"), images)
    save_quantized(net, tmp_path / "net.safetensors")
    assert torch.equal(load_quantized(tmp_path / "net.safetensors")(images[0]), net(images[0]))


def test_masks_and_index_tables_are_neither_counted_nor_needed(tiny_net, tmp_path: Path, images) -> None:
    net = tiny_net("SwinIR")
    masks = [key for key in net.state_dict() if key.endswith(("attn_mask", "relative_position_index"))]
    assert len(masks) == 2 + 4
    assert complexity(net, (8, 8)).storage_bits == 32 * sum(p.numel() for p in net.parameters())
    state = {key: value for key, value in net.state_dict().items() if key not in masks}
    save_torch({"params": state}, tmp_path / "float.pth")
    other = build_backbone(net.backbone_options).eval()
    load_float_weights(other, tmp_path / "float.pth")
    assert torch.equal(other(images[0]), net(images[0]))
    calibrate(quantize_model(other, "pams"), images)
    save_quantized(other, tmp_path / "net.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert not set(masks) & set(file.keys())


def test_official_files_are_recognised(tmp_path: Path) -> None:
    """They hold the state dict under ``params``, with masks for images of 64 pixels."""
    content = {"params": light().state_dict()}
    assert recognise(state_dict_in(content, "official.pth")) == backbone_options(LIGHT)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pams", "quantsr"])
def test_five_iterations_from_an_option_file(tmp_path: Path, method: str) -> None:
    data = harness.write_data(tmp_path / "data", count=2)
    lr = {"weights": 1e-4, "ranges": 1e-3, "weight_ranges": 1e-3, "others": 1e-4}
    depths = {"depths": [1.0, 0.5]} if method == "quantsr" else {}
    recipe = {"base": method, "calibration": {"images": 2, "batch": 2}, "stages": [{"lr": lr, **depths}]}
    opt = harness.options(data, train={"total_iter": 5}, val={"val_freq": 5})
    opt["recipe"] = recipe
    opt["network_g"]["backbone"] = tiny_options("SwinIR", upscale=4, drop_path_rate=0.1)
    opt["path"]["pretrain_network_float"] = str(tmp_path / "float.pth")
    save_torch({"params": build_backbone(opt["network_g"]["backbone"]).state_dict()}, tmp_path / "float.pth")
    output = harness.train(harness.write_options(opt, tmp_path / "run.yml"), tmp_path)
    found = harness.losses(output)
    assert sorted(found) == [1, 2, 3, 4, 5] and not any("nan" in line for line in found.values())
    saved = harness.read(tmp_path / "experiments/run/models/net_g_latest.pth")["params"]
    assert all(bool(torch.isfinite(value).all()) for value in saved.values() if value.is_floating_point())
    assert ("block_order" in saved) == (method == "quantsr")


@pytest.mark.skipif("QSR_DATA" not in os.environ, reason="needs Set5: set QSR_DATA to the folder above it")
def test_a_benchmark_image_of_odd_size_keeps_its_size() -> None:
    from qsr_plugin.data.images import read_rgb

    image = read_rgb(sorted((Path(os.environ["QSR_DATA"]) / "Set5/LRbicx4").glob("*.png"))[0])
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()[..., :37, :41] / 255
    assert light()(x).shape == (1, 3, 148, 164)
