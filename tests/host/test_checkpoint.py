"""Checkpoints of quantized networks come back bit for bit, and float weights are loaded strictly or not at all."""

from __future__ import annotations

import logging

import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from basicsr.archs.srresnet_arch import MSRResNet
from qsr_plugin.archs.describe import describe_backbone
from qsr_plugin.archs.quant_net_arch import QuantNet, build_backbone
from qsr_plugin.archs.roles import list_backbones
from qsr_plugin.archs.srresnet_arch import SRResNet
from safetensors.torch import load_file, save_file
from torch import nn

from qsr_plugin import checkpoint
from qsr_plugin.checkpoint import CheckpointError, load_float_weights, load_quantized, save_quantized, save_torch
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.quant.record import float_mode
from qsr_plugin.quant.surgery import plugin_keys, quantize_model, quantizers
from tests.backbones import FITTING
from tests.recipes import ADAPTIVE, equal, shipped

backbones = pytest.mark.parametrize("backbone", list_backbones())


def same_output(a: nn.Module, b: nn.Module, x: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(a.eval()(x), b.eval()(x))


# -- quantized networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "backbone", "own"),
    [(method, backbone, own) for method, backbone in FITTING for own in (False, True) if method in ADAPTIVE or not own],
)
def test_saved_and_loaded_networks_agree_bit_for_bit(
    tiny_net, images, tmp_path, method: str, backbone: str, own: bool
) -> None:
    plain = tiny_net(backbone)
    recipe = shipped(method, plain) if own else equal(method, 4)
    net = calibrate(quantize_model(plain, recipe), images)
    path = tmp_path / "net.safetensors"
    save_quantized(net, path)
    twin = load_quantized(path)
    assert same_output(net, twin, images[0]) and not twin.training
    assert twin.recipe == recipe and [p for p, _ in quantizers(twin)] == [p for p, _ in quantizers(net)]
    ours, theirs = net.state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


OWN = {
    "EDSR": lambda: EDSR(3, 3, num_feat=8, num_block=1, upscale=3, res_scale=0.1, img_range=1.0, rgb_mean=(0.123456789, 0.4, 0.3)),
    "EDSR x4": lambda: EDSR(3, 3, num_feat=8, num_block=1, upscale=4),
    "MSRResNet": lambda: MSRResNet(num_feat=8, num_block=1, upscale=2),
    "SRResNet": lambda: SRResNet(num_feat=8, num_block=1, upscale=2, bias=False, bn_eps=1e-3, output="tanh"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OWN)
def test_a_network_built_without_options_describes_itself(images, tmp_path, kind: str) -> None:
    torch.manual_seed(0)
    net = calibrate(quantize_model(OWN[kind]().eval(), "pams"), images)
    save_quantized(net, tmp_path / "net.safetensors")
    assert same_output(net, load_quantized(tmp_path / "net.safetensors"), images[0])


@backbones
def test_descriptions_equal_the_options_a_network_was_built_with(tiny_net, backbone: str) -> None:
    net = tiny_net(backbone)
    assert net.backbone_options.items() <= describe_backbone(net).items()


def test_networks_that_cannot_be_described_say_what_to_set(tmp_path, images) -> None:
    class Mine(nn.Sequential):
        """A user's class that no reader knows."""

    rules = [{"match": "0", "port": "input"}]
    recipe = load_recipe({"base": "pams", "placement": "mine", "placements": {"mine": rules}})
    net = calibrate(quantize_model(Mine(nn.Conv2d(3, 3, 1)), recipe), images)
    with pytest.raises(CheckpointError, match="arguments of Mine are not known.*set net.backbone_options"):
        save_quantized(net, tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_class_that_is_not_registered_is_told_when_its_file_is_written(tmp_path, caplog) -> None:
    parts = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)]
    net = nn.Sequential(*parts, nn.PixelShuffle(2))
    net.backbone_options = {"type": "Tiny", "upscale": 2}
    save_quantized(quantize_model(net, load_recipe("minmax", placement="full")), tmp_path / "net.safetensors")
    assert "can be read only where 'Tiny' is registered: put @ARCH_REGISTRY.register()" in caplog.text


def test_uncalibrated_networks_come_back_uncalibrated(tiny_net, tmp_path, images) -> None:
    save_quantized(quantize_model(tiny_net(), "pams"), tmp_path / "net.safetensors")
    net = load_quantized(tmp_path / "net.safetensors")
    assert not any(q.is_calibrated for _, q in quantizers(net) if q.needs_calibration)
    with pytest.raises(RuntimeError, match="not calibrated"):
        net(images[0])


def test_only_quantized_networks_and_only_safetensors(tiny_net, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="EDSR is not quantized: call quantize_model"):
        save_quantized(tiny_net(), tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match="change the ending"):
        save_quantized(quantize_model(tiny_net(), "pams"), tmp_path / "net.pth")


def test_state_dict_round_trip_through_the_registered_arch(tiny_net, images) -> None:
    options = dict(tiny_net().backbone_options)
    net, fresh = QuantNet(options, "minmax"), QuantNet(options, {"base": "minmax"})
    calibrate(net, images)
    fresh.load_state_dict(net.state_dict())
    assert same_output(net, fresh, images[0])
    assert net.backbone_options == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "EDRSNet"}, "no arch 'EDRSNet' is registered"),
        ({"type": "EDSR", "num_feats": 3}, r"network_g.backbone \(EDSR\): .*num_feats"),
        ({}, "no arch 'None' is registered"),
    ],
)
def test_backbones_that_cannot_be_built(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(options)


# -- float weights ---------------------------------------------------------------------------------------------------


def layouts(state: dict) -> dict[str, dict]:
    noise = {key: torch.zeros_like(value) for key, value in state.items()}
    return {
        "bare": state,
        "params": {"params": state},
        "params_ema": {"params": noise, "params_ema": state},
        "module prefix": {f"module.{key}": value for key, value in state.items()},
        "params with prefix": {"params": {f"module.{key}": value for key, value in state.items()}},
    }


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("layout", list(layouts({})))
@backbones
def test_float_weights_in_every_layout(tiny_net, images, tmp_path, caplog, quantized, layout, backbone) -> None:
    source = tiny_net(backbone)
    path = tmp_path / "float.pth"
    torch.save(layouts(source.state_dict())[layout], path)
    net = tiny_net(backbone)
    with torch.no_grad():
        [parameter.add_(1) for parameter in net.parameters()]
    if quantized:
        quantize_model(net, "pams")
    with caplog.at_level(logging.INFO, "qsr_plugin"):
        count = load_float_weights(net, path)
    assert count == len(source.state_dict())
    assert f"loaded {count} of {count} keys of the float network" in caplog.text
    with torch.no_grad(), float_mode():
        assert torch.equal(net(images[0]), source(images[0]))


def test_params_can_be_preferred_and_safetensors_are_read(tiny_net, tmp_path) -> None:
    state = tiny_net().state_dict()
    torch.save(layouts(state)["params_ema"], tmp_path / "both.pth")
    net = tiny_net()
    load_float_weights(net, tmp_path / "both.pth", prefer="params")
    assert not net.conv_first.weight.any()
    save_file(state, tmp_path / "float.safetensors")
    load_float_weights(net, tmp_path / "float.safetensors")
    assert torch.equal(net.conv_first.weight, state["conv_first.weight"])


def test_loading_float_weights_keeps_the_ranges(tiny_net, images, tmp_path) -> None:
    net = calibrate(quantize_model(tiny_net(), "minmax"), images)
    before = {key: net.state_dict()[key].clone() for key in plugin_keys(net)}
    torch.save(tiny_net().state_dict(), tmp_path / "float.pth")
    load_float_weights(net, tmp_path / "float.pth")
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert all(q.is_calibrated for _, q in quantizers(net))


def drop_tail(state: dict) -> dict:
    return {key: value for key, value in state.items() if not key.startswith("conv_last")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_tail, r"missing: conv_last.weight \(3, 8, 3, 3\)"),
        (lambda state: {**state, "extra.weight": torch.ones(2)}, r"unexpected: extra.weight \(2,\)"),
        (lambda state: {**state, "conv_first.bias": torch.ones(5)}, r"shape: conv_first.bias is \(5,\), the network wants \(8,\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("quantized", [False, True])
def test_weights_that_do_not_fit_change_nothing(tiny_net, tmp_path, change, message: str, quantized: bool) -> None:
    net = quantize_model(tiny_net(), "pams") if quantized else tiny_net()
    other = {key: value + 1 for key, value in tiny_net().state_dict().items()}
    torch.save(change(other), tmp_path / "float.pth")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(
        CheckpointError,
        match=r"(?s)does not fit EDSR \([12] differences, the network has \d+ keys\); nothing was loaded.*" + message,
    ):
        load_float_weights(net, tmp_path / "float.pth")
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


def test_the_wrong_scale_and_the_wrong_backbone_are_told_by_their_keys(tiny_net, tmp_path) -> None:
    torch.save(tiny_net(upscale=4).state_dict(), tmp_path / "x4.pth")
    with pytest.raises(
        CheckpointError, match="(?s)Check backbone type, sizes and scale.*unexpected: upsample.2.weight"
    ):
        load_float_weights(tiny_net(upscale=2), tmp_path / "x4.pth")
    with pytest.raises(CheckpointError, match="(?s)does not fit MSRResNet.*missing: upconv1.weight"):
        load_float_weights(tiny_net("MSRResNet"), tmp_path / "x4.pth")


def test_quantized_checkpoints_are_not_taken_for_float_ones_nor_the_reverse(tiny_net, images, tmp_path) -> None:
    net = calibrate(quantize_model(tiny_net(), "pams"), images)
    save_quantized(net, tmp_path / "q.safetensors")
    save_torch({"params": net.state_dict()}, tmp_path / "q.pth")
    for name in ("q.safetensors", "q.pth"):
        with pytest.raises(
            CheckpointError, match="is a quantized checkpoint, a float one is wanted.*pretrain_network_g"
        ):
            load_float_weights(tiny_net(), tmp_path / name)
    save_file(tiny_net().state_dict(), tmp_path / "f.safetensors")
    for name in ("f.safetensors", "q.pth"):
        with pytest.raises(CheckpointError, match="has no recipe in it.*net_g_.*needs its option file"):
            load_quantized(tmp_path / name)


def test_metadata_is_all_that_a_rebuild_needs(tiny_net, tmp_path) -> None:
    net = quantize_model(tiny_net(), "pams")
    save_quantized(net, tmp_path / "net.safetensors")
    tensors, metadata = checkpoint.read_file(tmp_path / "net.safetensors")
    assert set(metadata) == {"format", "qsr_plugin", "backbone", "recipe", "scale"} and metadata["scale"] == "2"
    assert tensors.keys() == net.state_dict().keys() == load_file(tmp_path / "net.safetensors").keys()
