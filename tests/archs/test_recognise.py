"""Architecture and sizes from a state dict: every shipped backbone, the host's SwinIR, public weights, odd input."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from qsr_plugin.archs.quant_net_arch import build_backbone
from qsr_plugin.archs.recognise import recognise
from torch import Tensor

from qsr_plugin.checkpoint import read_file, state_dict_in
from qsr_plugin.options_file import backbone_options, options_folder

SHIPPED = sorted(path.stem for path in (options_folder() / "backbones").glob("*.yml"))
SWINIR = {"img_size": 16, "window_size": 4, "embed_dim": 12, "depths": [2, 1], "num_heads": [2, 3], "mlp_ratio": 2.0}
#: Networks of sizes that no shipped file has.
OTHERS = [
    {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 3, "upscale": 3, "res_scale": 1},
    {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 1, "upscale": 8, "res_scale": 1},
    {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 256, "num_block": 1, "upscale": 2, "res_scale": 0.1},
    {"type": "MSRResNet", "num_in_ch": 1, "num_out_ch": 3, "num_feat": 8, "num_block": 1, "upscale": 3},
    {"type": "MSRResNet", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 2, "upscale": 4},
    {"type": "SRResNet_qsr", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 2, "upscale": 2, "bias": False},
    {"type": "RLFN_qsr", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 46, "num_mid": 48, "num_block": 4, "esa_channels": 16, "upscale": 4},
    {"type": "IMDN_qsr", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 32, "num_block": 2, "upscale": 3},
    {"type": "RFDN_qsr", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 48, "num_block": 6, "upscale": 2},
    {"type": "BSRN_qsr", "num_in_ch": 1, "num_out_ch": 1, "num_feat": 48, "num_block": 5, "upscale": 3},
    {"type": "CARN_qsr", "num_feat": 8, "num_block": 2, "upscale": 4, "group": 1, "shared": False, "multi_scale": False},
    {"type": "CARN_qsr", "num_feat": 8, "num_block": 4, "upscale": 3, "group": 2, "shared": True, "multi_scale": False},
    {"type": "CARN_qsr", "num_feat": 8, "num_block": 1, "upscale": 3, "group": 4, "shared": False, "multi_scale": True},
    {"type": "RDN_qsr", "num_in_ch": 3, "num_out_ch": 1, "num_feat": 8, "num_block": 3, "num_layer": 2, "num_grow_ch": 4, "upscale": 3},
    {"type": "RDN_qsr", "num_in_ch": 1, "num_out_ch": 3, "num_feat": 8, "num_block": 1, "num_layer": 1, "num_grow_ch": 6, "upscale": 4},
    {"type": "IDN_qsr", "num_in_ch": 1, "num_feat": 32, "num_block": 3, "upscale": 3, "rgb": True},
    {"type": "IDN_qsr", "num_in_ch": 3, "num_feat": 16, "num_block": 1, "upscale": 2, "rgb": False},
    *(
        {"type": "SwinIR", "in_chans": 3, **SWINIR, "qkv_bias": True, "ape": False, "patch_norm": True, **head}
        for head in (
            {"upsampler": "pixelshuffle", "upscale": 3, "resi_connection": "1conv"},
            {"upsampler": "pixelshuffle", "upscale": 4, "resi_connection": "3conv", "patch_norm": False},
            {"upsampler": "pixelshuffledirect", "upscale": 2, "resi_connection": "1conv", "ape": True},
            {"upsampler": "nearest+conv", "upscale": 4, "resi_connection": "3conv", "qkv_bias": False},
            {"upsampler": "", "upscale": 1, "resi_connection": "1conv", "in_chans": 1},
        )
    ),
]  # fmt: skip


def scale_for(options: dict) -> int | None:
    """The scale, for networks that are not recognised without."""
    return options["upscale"] if options["type"] == "IDN_qsr" or options.get("multi_scale") else None


def state_of(options: dict) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return build_backbone(options).state_dict()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_backbone_is_recognised(name: str) -> None:
    options = backbone_options(name)
    assert recognise(state_of(options), scale_for(options)) == options


@pytest.mark.parametrize("options", OTHERS, ids=lambda o: f"{o['type']}-{o.get('upsampler', '')}-x{o['upscale']}")
def test_sizes_come_from_the_shapes(options: dict) -> None:
    assert recognise(state_of(options), scale_for(options)) == options


@pytest.mark.parametrize("name", ["idn_x2", "carn_m_x4"])
def test_shapes_that_serve_several_scales_need_one(name: str) -> None:
    state = state_of(backbone_options(name))
    assert recognise(state) is None
    assert [recognise(state, scale)["upscale"] for scale in (2, 3, 4)] == [2, 3, 4]


def test_other_values_of_the_random_generator_stay() -> None:
    state = state_of(OTHERS[-1])
    before = torch.random.get_rng_state()
    recognise(state)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_scale_settles_which_channels_come_out() -> None:
    """12 rows after the pixel shuffle's convolution: 3 channels at scale 2, of an input with one."""
    options = {"type": "IMDN_qsr", "num_in_ch": 1, "num_out_ch": 3, "num_feat": 16, "num_block": 1, "upscale": 2}
    state = state_of(options)
    assert recognise(state) is None
    assert recognise(state, 2) == options
    assert recognise(state, 5) is None


def test_a_scale_that_the_shapes_contradict_changes_nothing() -> None:
    assert recognise(state_of(backbone_options("imdn_x4")), 2) == backbone_options("imdn_x4")


@pytest.mark.parametrize("options", OTHERS, ids=lambda o: f"{o['type']}-{o.get('upsampler', '')}-x{o['upscale']}")
def test_every_key_and_shape_counts(options: dict) -> None:
    state = state_of(options)
    last = list(state)[-1]
    scale = scale_for(options)
    assert recognise({**state, "another.weight": torch.zeros(1)}, scale) is None
    assert recognise({key: value for key, value in state.items() if key != last}, scale) is None
    assert recognise({**state, last: torch.zeros(7, 7, 7)}, scale) is None


ODD = {
    "empty": {},
    "no tensors": {"conv_first.weight": "text", "body.0.conv1.weight": None},
    "keys that are no text": {1: torch.zeros(1)},
    "scalars": dict.fromkeys(("conv_first.weight", "conv_last.weight", "upsample.0.weight"), torch.tensor(1.0)),
    "no channels": {key: value[:0] for key, value in state_of(OTHERS[7]).items()},
    "no input channels": {"fea_conv.weight": torch.zeros(8, 0, 3, 3), "upsampler.0.weight": torch.zeros(12, 8, 3, 3)},
    "training state": {"params": {"conv_first.weight": torch.zeros(1)}, "iter": 3},
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("scale", [None, 0, 4])
def test_odd_input_is_not_recognised(name: str, scale: int | None) -> None:
    assert recognise(ODD[name], scale) is None


@pytest.mark.skipif("QSR_DATA" not in os.environ, reason="needs public weights: set QSR_DATA to the folder above them")
@pytest.mark.parametrize(
    ("name", "scale", "shipped"),
    [(name, None, name if name in SHIPPED else None) for name in (
        "srresnet_x4", "rlfn_x2", "rlfn_x4", "imdn_x2", "imdn_x4", "rfdn_x4", "bsrn_x2", "bsrn_x4",
        "pan_x4", "dat_light_x4", "craft_x4",
    )] + [
        ("carn_m_x234", 2, "carn_m_x2"), ("carn_m_x234", 4, "carn_m_x4"), ("idn_x2", 2, "idn_x2"), ("idn_x4", 4, "idn_x4")
    ],
)  # fmt: skip
def test_public_weights(name: str, scale: int | None, shipped: str | None) -> None:
    path = Path(os.environ["QSR_DATA"]) / "weights" / f"{name}.pth"
    options = recognise(state_dict_in(read_file(path)[0], path), scale)
    assert options == (None if shipped is None else backbone_options(shipped))
