"""No tensor has more levels than its bits allow: counted in every shipped recipe, before and after ranges have moved.

A quantizer whose integer code is not limited looks like a better one of fewer bits; nothing but counting tells.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin.methods.minmax_percentile import AsymmetricQuantizer
from qsr_plugin.models.stages import project
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.ops import fake_quantize
from qsr_plugin.quant.quantizer import QUANTIZERS, Quantizer
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.quant.surgery import quantize_model, quantizers
from tests.recipes import ADAPTIVE, METHODS, by_role, equal, shipped

#: Quantizers with a grid for each channel, and why; all others have one for each weight or each image.
PER_CHANNEL = {
    "daq": "mean and deviation of every channel of every image make its grid",
    "per_channel": "every output channel of a weight has a step of its own, which scales its output",
}
CASES = [(method, bits) for method in METHODS for bits in range(2, 9)]


def grids(quantizer: Quantizer, y: Tensor, bits: int | Tensor) -> Iterator[tuple[Tensor, int]]:
    """The parts of a quantized tensor that share one grid, with the bits of each."""
    name = next(name for name, kind in QUANTIZERS.items() if kind is type(quantizer))
    if quantizer.role == "weight":
        parts = y.movedim(quantizer.channel_axis, 0) if name in PER_CHANNEL else [y]
        yield from ((part, quantizer.candidates[0]) for part in parts)
        return
    widths = bits.flatten().tolist() if isinstance(bits, Tensor) and bits.dim() else [bits] * len(y)
    for image, width in zip(y, widths, strict=True):
        axis = quantizer.channel_axis if quantizer.channel_axis < 0 else quantizer.channel_axis - 1
        parts = image.movedim(axis, 0) if name in PER_CHANNEL else [image]
        yield from ((part, int(width)) for part in parts)


def excess(net: nn.Module, images: Tensor) -> dict[str, int]:
    """Place of a quantized network to the number of levels that its tensors have there beyond what its bits allow."""
    net.keep_pairs = True
    with torch.no_grad():
        net.eval()(images)
    record, parts = net.last_record(), dict(quantizers(net))
    found = {}
    for key, (_, y) in record.pairs.items():
        place = max((place for place in parts if key.startswith(place)), key=len)  # operands have a suffix
        for part, width in grids(parts[place], y, record.bits.get(place)):
            more = part.unique().numel() - 2**width
            if more > 0:
                found[key] = max(found.get(key, 0), more)
    assert {key.removesuffix(".residual") for key in record.pairs} == set(parts), "every quantizer is looked at"
    return found


@pytest.fixture
def large_images() -> list[Tensor]:
    """Two batches with more values in a feature map than 8 bits have levels."""
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(2, 3, 12, 12, generator=generator) for _ in range(2)]


def disturb(net: nn.Module) -> None:
    """Move all ranges as far as a tuning that went wrong would."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, quantizer in quantizers(net):
            for parameter in quantizer.range_parameters():
                parameter.add_(parameter.abs() * torch.randn(parameter.shape, generator=generator))
    project(net)


@pytest.mark.parametrize(("method", "bits"), CASES)
def test_no_tensor_has_more_levels_than_its_bits_allow(tiny_net, large_images, method: str, bits: int) -> None:
    placement = max(by_role(method), key=lambda name: len(load_recipe(method).placements[name]))
    recipe = equal(method, bits, placement=placement)
    net = calibrate(quantize_model(tiny_net(num_block=1), recipe), large_images)
    assert not excess(net, large_images[0])
    disturb(net)
    assert not excess(net, large_images[0])


@pytest.mark.parametrize("bits", [2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_nor_in_linear_layers_and_products_of_attention(tiny_net, large_images, method: str, bits: int) -> None:
    """Windows of an image share its grid: the batch of an attention is one of windows."""
    rules = [*load_recipe(method).to_dict()["placements"]["body"], {"role": "block.attention"}]
    recipe = equal(method, bits, placement="all", placements={"all": rules})
    net = calibrate(quantize_model(tiny_net("SwinIR", num_block=1), recipe), large_images)
    assert not excess(net, large_images[0])
    disturb(net)
    assert not excess(net, large_images[0])


@pytest.mark.parametrize("method", ADAPTIVE)
def test_no_image_has_more_levels_than_the_bits_chosen_for_it(tiny_net, large_images, method: str) -> None:
    plain = tiny_net(num_block=1)
    net = calibrate(quantize_model(plain, shipped(method, plain)), large_images)
    assert not excess(net, large_images[0])


class Unclamped(AsymmetricQuantizer):
    """A learned addition to the step, and a code that is not limited to those of its bits."""

    addition = 0.0

    def quantize(self, x: Tensor, bits: int) -> Tensor:
        clipped = torch.minimum(torch.maximum(x, self.lower), self.upper)
        step = (self.upper - self.lower) * ((1 + self.addition) / (2**bits - 1))
        return fake_quantize(clipped, step, 1.0, None, anchor=self.lower.detach())


def test_a_code_without_limits_is_caught(tiny_net, large_images, monkeypatch) -> None:
    monkeypatch.setitem(QUANTIZERS, "unclamped", Unclamped)
    q = Unclamped(Unclamped.Options(), (2,), "act", 1)
    q.begin_calibration()
    q.observe(torch.tensor([0.0, 3.0]))
    q.end_calibration()
    everything = torch.linspace(0, 3, 301)
    assert q(everything).unique().tolist() == [0, 1, 2, 3]
    q.addition = -0.5
    assert q(everything).unique().tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3], "seven levels of two bits"

    recipe = load_recipe("minmax", weight_bits=2, act_bits=2, quantizers={"act": {"type": "unclamped"}})
    net = calibrate(quantize_model(tiny_net(num_block=1), recipe), large_images)
    assert not excess(net, large_images[0])
    learned = [place for place, quantizer in quantizers(net) if quantizer.role == "act"]
    monkeypatch.setattr(Unclamped, "addition", -0.5)
    assert excess(net, large_images[0]) == dict.fromkeys(learned, 3)
