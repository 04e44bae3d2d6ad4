"""Networks of spandrel: recognised from their weights, rebuilt from options, quantized, saved and loaded."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import compat

compat.import_host()
pytest.importorskip("spandrel", reason="the optional package spandrel is not installed")

from qsr_plugin.archs.quant_net_arch import build_backbone  # noqa: E402
from qsr_plugin.archs.spandrel_arch import SpandrelError, SpandrelNet, recognise_with_spandrel  # noqa: E402

from qsr_plugin.checkpoint import (  # noqa: E402
    CheckpointError,
    float_state,
    load_float_weights,
    load_quantized,
    save_quantized,
)
from qsr_plugin.options_file import OptionsError  # noqa: E402
from qsr_plugin.quant.calibrate import calibrate  # noqa: E402
from qsr_plugin.quant.places import roles_of  # noqa: E402
from qsr_plugin.quant.recipe import load_recipe  # noqa: E402
from qsr_plugin.quant.surgery import quantize_model, quantizers  # noqa: E402
from qsr_plugin.report.evaluate import evaluate  # noqa: E402

#: Architecture -> hyperparameters of a small network, and buffers that files of it may lack.
SMALL = {
    "CRAFT": (
        {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "upscale": 2},
        {"biases_h", "biases_v", "relative_position_index_h", "relative_position_index_v"},
    ),
    "DAT": (
        {"embed_dim": 32, "split_size": [8, 32], "depth": [3], "num_heads": [2], "expansion_factor": 2.0, "upscale": 2}
        | {"resi_connection": "3conv", "upsampler": "pixelshuffledirect"},
        {"attn_mask_0", "attn_mask_1", "relative_position_index", "rpe_biases"},
    ),
    "SwinIR": (
        {"embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4, "mlp_ratio": 2.0, "upscale": 2}
        | {"upsampler": "pixelshuffledirect"},
        {"attn_mask", "relative_position_index"},
    ),
    "HAT": (
        {"embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4, "compress_ratio": 2, "squeeze_factor": 2}
        | {"upscale": 2, "upsampler": "pixelshuffle"},
        {"relative_position_index_SA", "relative_position_index_OCA"},
    ),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def small(kind: str) -> nn.Module:
    return SpandrelNet(kind, kind, SMALL[kind][0], upscale=2).eval()


def without_tables(net: nn.Module, kind: str) -> dict[str, Tensor]:
    return {key: value for key, value in net.state_dict().items() if key.rpartition(".")[2] not in SMALL[kind][1]}


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "without tables"])
def test_weights_lead_to_options_that_rebuild_the_network(kind: str, whole: bool, caplog) -> None:
    net = small(kind)
    state = dict(net.state_dict()) if whole else without_tables(net, kind)
    assert whole or len(state) < len(net.state_dict())
    keys = list(state)
    with caplog.at_level(logging.INFO, "qsr_plugin"):
        options = recognise_with_spandrel(state)
    assert list(state) == keys, "what was given is left as it is"
    assert options["type"] == "SpandrelNet" and options["architecture"] == kind and options["upscale"] == 2
    assert SMALL[kind][0].items() <= options["hyperparameters"].items()
    assert all(f"{name} (" in caplog.text for name in SMALL[kind][1]) != whole
    assert ("size of its windows" in caplog.text) == (not whole and kind in ("CRAFT", "DAT"))
    rebuilt = build_backbone(options).eval()
    rebuilt.load_state_dict({**rebuilt.state_dict(), **state})
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(rebuilt(image), net(image))


@pytest.mark.parametrize("kind", SMALL)
def test_constructors_do_not_warn_of_a_call_of_their_own(kind: str) -> None:
    """What a user of a network can do nothing about is not printed."""
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            small(kind)
    finally:
        torch.set_warn_always(False)
    assert not [str(one.message) for one in told if "meshgrid" in str(one.message)]


@pytest.mark.parametrize("kind", ["CRAFT", "DAT"])
def test_quantized_networks_are_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    net = build_backbone(recognise_with_spandrel(small(kind).state_dict())).eval()
    images = [torch.rand(1, 3, 19, 26, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    roles = roles_of(net)
    assert roles["head"] == ("conv_first",) and roles["tail"] == ("upsample.0",)
    net = calibrate(quantize_model(net, load_recipe("percentile", placement="body")), images)
    quantized = {place.rpartition(".")[0] for place, _ in quantizers(net)}
    assert quantized == set(roles["block.conv"]) and not any(".pos." in name for name in quantized)
    save_quantized(net, tmp_path / "net.safetensors")
    loaded = load_quantized(tmp_path / "net.safetensors")
    out = net.eval()(images[0])
    assert out.shape == (1, 3, 38, 52)
    assert torch.equal(loaded(images[0]), out)


def test_files_may_lack_tables_but_no_weights(tmp_path: Path) -> None:
    net, file = small("DAT"), tmp_path / "net.pth"
    state = without_tables(net, "DAT")
    torch.save(state, file)
    fresh = SpandrelNet("DAT", "DAT", SMALL["DAT"][0], upscale=2).eval()
    assert load_float_weights(fresh, file) == len(state)
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(fresh(image), net(image))
    quantized = quantize_model(fresh, load_recipe("minmax", placement="body"))
    assert load_float_weights(quantized, file) == len(state)
    torch.save({key: value for key, value in state.items() if not key.endswith("running_mean")}, file)
    with pytest.raises(CheckpointError, match="missing: .*running_mean"):
        load_float_weights(fresh, file)


def test_networks_that_need_a_multiple_pad_their_input() -> None:
    options = recognise_with_spandrel(small("CRAFT").state_dict())
    assert options["size"] == {"multiple": 16, "minimum": 16, "square": False}
    net = build_backbone(options).eval()
    assert net(torch.rand(1, 3, 5, 23)).shape == (1, 3, 10, 46)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_other_weights_are_not_recognised(tiny_net) -> None:
    assert recognise_with_spandrel({}) is None
    assert recognise_with_spandrel(nn.Conv2d(3, 3, 3).state_dict()) is None
    assert recognise_with_spandrel(tiny_net("SRResNet").state_dict()) is None


def test_networks_for_something_else_are_refused() -> None:
    compact = {"num_feat": 8, "num_conv": 1, "act_type": "prelu"}
    for channels, scale, message in ((1, 2, "1 channels in and 1 out"), (3, 1, "for Restoration")):
        net = SpandrelNet(
            "Compact", "Compact", {**compact, "num_in_ch": channels, "num_out_ch": channels, "upscale": scale}, scale
        )
        with pytest.raises(SpandrelError, match=message):
            recognise_with_spandrel(net.state_dict())


def test_damaged_weights_name_the_architecture() -> None:
    state = small("HAT").state_dict()
    del state["layers.0.residual_group.blocks.0.norm1.bias"]
    with pytest.raises(SpandrelError, match="takes these weights for HAT and cannot load them"):
        recognise_with_spandrel(state)


def test_renamed_keys_are_refused_with_a_way_out(tiny_net) -> None:
    net = build_backbone(
        {
            "type": "RRDBNet",
            "num_in_ch": 3,
            "num_out_ch": 3,
            "num_feat": 8,
            "num_block": 1,
            "num_grow_ch": 32,
            "scale": 4,
        }
    )
    with pytest.raises(SpandrelError, match="renames keys of these weights .* to fit its ESRGAN"):
        recognise_with_spandrel(net.state_dict())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("os", "system"), "has no architecture 'os'"),
        (("../DAT", "DAT"), "has no architecture '../DAT'"),
        (("DAT", "DATArch"), "DAT has no network 'DATArch'. Did you mean 'DAT'"),
        (("DAT", "math"), "DAT has no network 'math'"),
    ],
)
def test_only_what_spandrel_exports_is_built(names: tuple[str, str], message: str) -> None:
    with pytest.raises(SpandrelError, match=message):
        SpandrelNet(*names, {}, upscale=2)
    options = {
        "type": "SpandrelNet",
        "architecture": names[0],
        "network": names[1],
        "hyperparameters": {},
        "upscale": 2,
    }
    with pytest.raises(OptionsError, match=message):
        build_backbone(options)


def test_wrong_hyperparameters_are_named() -> None:
    with pytest.raises(OptionsError, match="embed_dmi"):
        build_backbone(
            {
                "type": "SpandrelNet",
                "architecture": "DAT",
                "network": "DAT",
                "hyperparameters": {"embed_dmi": 8},
                "upscale": 2,
            }
        )


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(SpandrelError, match="pip install 'spandrel>=0.4'"):
        recognise_with_spandrel({})
    with pytest.raises(OptionsError, match="pip install 'spandrel>=0.4'"):
        build_backbone(
            {"type": "SpandrelNet", "architecture": "DAT", "network": "DAT", "hyperparameters": {}, "upscale": 2}
        )


# -- published weights -----------------------------------------------------------------------------------------------


@pytest.mark.skipif("QSR_DATA" not in os.environ, reason="needs Set5 and public weights: set QSR_DATA to their folder")
@pytest.mark.parametrize(
    ("name", "hyperparameters", "psnr"),
    [
        # How the border is padded moves it by 0.01 dB.
        ("craft_x4", {"embed_dim": 48, "depths": [2, 2, 2, 2], "split_size_0": 4, "split_size_1": 16}, 32.40),
        ("dat_light_x4", {"embed_dim": 60, "depth": [18], "split_size": [8, 32], "expansion_factor": 2.0}, 32.57),
    ],
)
def test_public_weights_give_their_known_quality(name: str, hyperparameters: dict, psnr: float) -> None:
    data = Path(os.environ["QSR_DATA"])
    file = data / "weights" / f"{name}.pth"
    options = recognise_with_spandrel(float_state(file))
    assert hyperparameters.items() <= options["hyperparameters"].items()
    net = build_backbone(options)
    load_float_weights(net, file)
    result = evaluate(net, data / "Set5" / "HR", data / "Set5" / "LRbicx4", 4)
    assert result.psnr == pytest.approx(psnr, abs=0.015)
