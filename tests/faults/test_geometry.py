"""Odd and tiny sizes on every backbone, and scales a network does not have. Patches are in tests/data/test_patches.py."""

from __future__ import annotations

import pytest
import torch

from qsr_plugin import calibrate, compat, list_methods, quantize_model
from tests.backbones import FITTING
from tests.recipes import shipped

compat.import_host()

from qsr_plugin.archs.quant_net_arch import build_backbone  # noqa: E402


@pytest.mark.parametrize(("method", "backbone"), FITTING)
def test_output_is_scale_times_any_input(tiny_net, backbone: str, method: str) -> None:
    net = tiny_net(backbone)
    scale = net.backbone_options["upscale"]
    calibrate(quantize_model(net, shipped(method, net)), [torch.rand(2, 3, 16, 16)])
    with torch.no_grad():
        for height, width in [(17, 23), (1, 1), (1, 100), (8, 3)]:
            out = net(torch.rand(1, 3, height, width))
            assert out.shape == (1, 3, scale * height, scale * width)
            assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("method", list_methods())
def test_flat_images_stay_finite(tiny_net, method: str) -> None:
    plain = tiny_net("EDSR")
    net = calibrate(quantize_model(plain, shipped(method, plain)), [torch.rand(2, 3, 16, 16)])
    with torch.no_grad():
        for value in (0.0, 0.5, 1.0):
            assert bool(torch.isfinite(net(torch.full((1, 3, 12, 12), value))).all())


@pytest.mark.parametrize(("kind", "scale"), [("SRResNet", 3), ("SRResNet", 8), ("EDSR", 5)])
def test_unsupported_scale_is_an_error_that_names_it(kind: str, scale: int) -> None:
    with pytest.raises(ValueError, match=f"{scale}"):
        build_backbone({"type": kind, "num_in_ch": 3, "num_out_ch": 3, "upscale": scale})
