"""Plain files: the host's own architecture loads them, with weights that have few values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from safetensors.torch import load_file
from torch import Tensor, nn

from qsr_plugin import fold, quantize_model, set_depth
from qsr_plugin.checkpoint import CheckpointError, load_float_weights
from qsr_plugin.deploy.plain import save_plain
from qsr_plugin.errors import UserError
from qsr_plugin.quant.record import only_places
from qsr_plugin.quant.surgery import quantizers
from tests.backbones import TINY


def output(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def weights_only(net: nn.Module) -> list[str]:
    """Names of the places whose weights are quantized."""
    return [place for place, quantizer in quantizers(net) if quantizer.role == "weight"]


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_the_hosts_architecture_computes_with_the_quantized_weights(quantized, images, tmp_path, ending: str) -> None:
    net, path = quantized("minmax", bits=2), tmp_path / f"plain{ending}"
    report = save_plain(net, path)
    state = torch.load(path, weights_only=True)["params"] if ending == ".pth" else load_file(path)
    host = EDSR(**TINY).eval()
    host.load_state_dict(state, strict=True)
    assert len(host.body[0].conv1.weight.unique()) <= 4
    with only_places(weights_only(net)):
        assert torch.equal(output(host, images[0]), output(net, images[0]))
    assert not torch.equal(output(host, images[0]), output(net, images[0])), "activations are float now"
    again = EDSR(**TINY).eval()
    assert load_float_weights(again, path) == report.keys == len(host.state_dict())
    assert torch.equal(output(again, images[0]), output(host, images[0]))
    assert report.architecture == "EDSR" and report.weights == len(weights_only(net))
    assert report.file_bytes == path.stat().st_size


@pytest.mark.parametrize("backbone", ["SRResNet", "SwinIR", "HAT"])
def test_other_backbones_get_all_their_keys(quantized, tiny_net, images, tmp_path, backbone: str) -> None:
    net, float_net = quantized("2dquant", backbone), tiny_net(backbone)
    save_plain(net, tmp_path / "plain.safetensors")
    state = load_file(tmp_path / "plain.safetensors")
    assert state.keys() == float_net.state_dict().keys()
    float_net.load_state_dict(state)
    with only_places(weights_only(net)):
        assert torch.equal(output(float_net, images[0]), output(net, images[0]))


def test_a_folded_network_gives_the_same_file(quantized, tmp_path) -> None:
    net = quantized("dorefa")
    first, second = (tmp_path / f"{name}.safetensors" for name in ("first", "second"))
    save_plain(net, first), save_plain(fold(net), second)
    ours, theirs = load_file(first), load_file(second)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_report_says_what_is_lost(quantized, tmp_path) -> None:
    report = save_plain(quantized("pams"), tmp_path / "plain.pth")
    assert f"activations are not quantized in it ({len(report.lost)} places" in str(report) and report.lost
    assert report.added == () and "shift" not in str(report)
    net = quantized("quantsr")
    with torch.no_grad():
        next(quantizer for _, quantizer in quantizers(net) if quantizer.role == "act").tau.fill_(0.1)
    report = save_plain(net, tmp_path / "plain.pth")
    assert len(report.added) == 1 and "1 of these places shift their tensor" in str(report)


def test_what_the_architecture_cannot_compute_is_refused(quantized, tiny_net, tmp_path: Path) -> None:
    net, path = quantized("quantsr"), tmp_path / "plain.pth"
    with torch.no_grad():
        net.body[1].shortcut_scale.fill_(1.5)
    with pytest.raises(UserError, match="body.1 scales its identity path by 1.5, which plain weights cannot say"):
        save_plain(net, path)
    with torch.no_grad():
        net.body[1].shortcut_scale.fill_(1.0)
    with pytest.raises(UserError, match=r"body\.\d is left out of this network"):
        save_plain(set_depth(net, 1), path)
    with pytest.raises(CheckpointError, match="EDSR is not quantized: it is plain already"):
        save_plain(tiny_net(), path)
    with pytest.raises(CheckpointError, match=r"plain weights are saved as .pth or .safetensors; change the ending"):
        save_plain(net, tmp_path / "plain.onnx")
    with pytest.raises(UserError, match="not calibrated"):
        save_plain(quantize_model(tiny_net(), "minmax"), path)
    assert not list(tmp_path.iterdir())
