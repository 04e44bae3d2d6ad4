"""A network with adaptive bits is captured as a program that goes on choosing them by the image."""

from __future__ import annotations

import pytest
import torch

from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.surgery import quantize_model
from tests.quant.choosers import bright_to_dark, quantized, trained
from tests.recipes import ADAPTIVE, shipped


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_captured_network_computes_the_same(tiny_net, images, method: str) -> None:
    net = calibrate(quantize_model(tiny_net(), shipped(method, tiny_net())), images).eval()
    batch = torch.cat(list(images))[:2]
    program = torch.export.export(net, (batch,)).module()
    for other in (batch, batch.flip(0), 0.1 * batch, batch.mean((2, 3), keepdim=True).expand_as(batch)):
        torch.testing.assert_close(program(other), net(other), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("choosers")
@pytest.mark.parametrize("policy", ["toy_brightness", "toy_gate", "toy_selector"])
def test_its_bits_are_those_of_the_image_it_is_given(images, policy: str) -> None:
    """Captured with bright images, run on dark ones, which have other bits."""
    batch = bright_to_dark(16)
    net = trained(quantized(policy, images), batch).eval()
    program = torch.export.export(net, (batch[:2],)).module()
    torch.testing.assert_close(program(batch[-2:]), net(batch[-2:]), rtol=0, atol=1e-6)
    dark = net.last_record().bits
    net(batch[:2])
    assert all(not torch.equal(bits, dark[place]) for place, bits in net.last_record().bits.items())
