"""Sites of window attention: the float result to the bit, both products by hand, windows of several images, costs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from basicsr.archs.swinir_arch import WindowAttention
from qsr_plugin.archs.attention_sites import AttentionSite, QuantWindowAttention
from torch import Tensor, nn

from qsr_plugin import calibrate, complexity, load_recipe, quantize_model
from qsr_plugin.quant.places import channels_at
from qsr_plugin.quant.policy import policy_class
from qsr_plugin.quant.quantizer import Quantizer, quantizer_class
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.schema import Recipe
from qsr_plugin.quant.surgery import quantizers
from tests.quant.choosers import bright_to_dark, trained

OPERANDS = ("query", "key", "attention", "value")


def recipe(*rules: dict, method: str = "minmax", act: int | tuple[int, ...] = 4, **changes: object) -> Recipe:
    """A recipe's quantizers at the places of these rules; at all operands without rules."""
    placement = {"placement": "mine", "placements": {"mine": list(rules) or [{"role": "block.attention"}]}}
    return load_recipe(method, act_bits=act, **placement, **changes)


def attentions(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, WindowAttention)]


def moved(net: nn.Module) -> nn.Module:
    """The network with weights large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


@pytest.fixture
def net(tiny_net: Callable[..., nn.Module]) -> nn.Module:
    """A small SwinIR, whose second blocks have shifted windows and so masks."""
    return moved(tiny_net("SwinIR"))


@pytest.mark.parametrize("size", [(8, 8), (12, 8), (5, 3)])
def test_without_quantizers_the_result_is_the_float_one_to_the_bit(net: nn.Module, size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    want, keys = net(x), list(net.state_dict())
    for name in attentions(net):
        QuantWindowAttention.from_float(net.get_submodule(name), name)
    assert list(net.state_dict()) == keys
    assert torch.equal(net(x), want) and torch.equal(copy.deepcopy(net)(x), want)


def test_sites_at_32_bits_leave_the_network_as_it_is(tiny_net, images) -> None:
    float_net = moved(tiny_net("SwinIR"))
    quantized = calibrate(quantize_model(moved(tiny_net("SwinIR")), recipe(act=32)), images)
    assert torch.equal(quantized(images[0]), float_net(images[0]))


def grid(x: list[float], low: float, high: float) -> list[float]:
    """Two bits: the nearest of four levels from low to high."""
    levels = [low + number * (high - low) / 3 for number in range(4)]
    return [min(levels, key=lambda level: abs(level - value)) for value in x]


def test_both_products_by_hand() -> None:
    """One head with one channel, two tokens, a bias and a mask."""
    site = QuantWindowAttention.from_float(WindowAttention(dim=1, window_size=(1, 2), num_heads=1), "attn")
    q, k, v, bias, mask = [0.9, -0.7], [0.5, 1.1], [2.2, -0.4], 0.3, -0.2
    ranges = {"query": (-1.0, 0.8), "key": (0.0, 1.5), "attention": (0.0, 1.0), "value": (-0.5, 2.5)}
    add(site, ranges)
    got = site.attend(
        *(torch.tensor(one).view(1, 1, 2, 1) for one in (q, k, v)), torch.tensor(bias), torch.tensor(mask)
    )
    rounded = {name: grid(one, *ranges[name]) for name, one in (("query", q), ("key", k), ("value", v))}
    want = []
    for one in rounded["query"]:
        weights = [math.exp(one * other + bias + mask) for other in rounded["key"]]
        shares = grid([weight / sum(weights) for weight in weights], *ranges["attention"])
        want.append(sum(share * value for share, value in zip(shares, rounded["value"])))
    assert got.flatten().tolist() == pytest.approx(want, abs=1e-6)
    assert want == pytest.approx([2 / 3 * -0.5 + 1 / 3 * 2.5, 2 / 3 * 2.5 + 1 / 3 * -0.5])


def add(site: AttentionSite, ranges: dict[str, tuple[float, float]]) -> None:
    """Asymmetric quantizers of 2 bits with these ranges."""
    kind, fixed = quantizer_class("asymmetric"), policy_class("fixed")
    for port, (low, high) in ranges.items():
        quantizer = kind(kind.Options(), (2,), "act", site.channel_axis)
        with torch.no_grad():
            quantizer.set_range(torch.tensor(low), torch.tensor(high))
        quantizer.mark_calibrated()
        site.add_quantizer(port, quantizer, fixed(fixed.Options(), (2,)))


def test_channels_of_the_operands(net: nn.Module) -> None:
    attention = net.get_submodule(attentions(net)[0])
    assert [channels_at(attention, port) for port in (*OPERANDS, "input", "output")] == [4, 4, 16, 4, 8, 8]
    QuantWindowAttention.from_float(attention, "attn")
    assert channels_at(attention, "query") == 4, "also of a site"


def test_all_ports_of_an_attention_work_together(net: nn.Module, images) -> None:
    rules = [{"match": "**.attn", "port": port} for port in (*OPERANDS, "input", "output")]
    found = {
        place.rpartition(".")[2] for place, _ in quantizers(calibrate(quantize_model(net, recipe(*rules)), images))
    }
    assert found == {*OPERANDS, "input", "output"} and bool(torch.isfinite(net(images[0])).all())


def test_a_port_that_is_not_there_names_those_that_are(net: nn.Module) -> None:
    with pytest.raises(RecipeError, match=r"has no port 'softmax'. Ports of .*query, key, attention, value"):
        quantize_model(net, recipe({"match": "**.attn", "port": "softmax"}))


# -- windows in the batch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cadyq", "granular_dq"])
def test_each_image_has_its_own_bits_in_all_its_windows(tiny_net, method: str) -> None:
    batch = bright_to_dark(6)
    chosen = load_recipe(method).act_widths
    mine = recipe({"role": "block.linear", "port": "input"}, {"role": "block.attention"}, method=method, act=chosen)
    quantized = trained(calibrate(quantize_model(moved(tiny_net("SwinIR")), mine), [batch]).eval(), batch)
    with torch.no_grad():
        together, bits = quantized(batch), dict(quantized.last_record().bits)
        assert len(bits) == 4 * 8 and all(found.shape == (6,) for found in bits.values())
        assert any(len(set(found.tolist())) > 1 for found in bits.values())
        for number, image in enumerate(batch.split(1)):
            alone = quantized(image)
            torch.testing.assert_close(alone[0], together[number], atol=1e-4, rtol=0)
            assert all(found.item() == bits[place][number] for place, found in quantized.last_record().bits.items())


def test_quantizers_see_all_windows_of_an_image_as_one(net: nn.Module, images, monkeypatch) -> None:
    """At calibration and later: axis 0 holds the images, so that a statistic of an image is one of all its windows."""
    linear = [{"match": "**.attn.qkv", "port": "input"}, {"match": "**.mlp.fc1", "port": "input"}]
    quantize_model(net, recipe({"role": "block.attention"}, *linear))
    seen: dict[str, tuple[int, ...]] = {}

    def watch(quantizer: Quantizer, x: Tensor, *_: object) -> None:
        assert seen.setdefault(quantizer.site.rpartition("blocks.1.")[2], tuple(x.shape)) == tuple(x.shape)

    observe, forward = Quantizer.observe, Quantizer.forward
    monkeypatch.setattr(Quantizer, "observe", lambda *args: [watch(*args), observe(*args)][1])
    monkeypatch.setattr(Quantizer, "forward", lambda *args: [watch(*args), forward(*args)][1])
    calibrate(net, images)
    out = net(images[0])
    assert seen["attn.query"] == seen["attn.key"] == seen["attn.value"] == (2, 4, 2, 16, 4)
    assert (seen["attn.attention"], seen["attn.qkv.input"]) == ((2, 4, 2, 16, 16), (2, 4, 16, 8))
    assert seen["mlp.fc1.input"] == (2, 64, 8) and out.shape == (2, 3, 16, 16)


def test_statistics_of_an_image_do_not_depend_on_the_windows(net: nn.Module, images) -> None:
    """DAQ's grids per image and channel: at most 2^b levels for all windows together."""
    calibrate(quantize_model(net, recipe({"match": "**.attn.qkv", "port": "input"}, method="daq", act=2)), images)
    net.keep_pairs = True
    net(images[0])
    for _, y in net.last_record().pairs.values():
        assert y.shape == (2, 4, 16, 8)
        assert max(channel.unique().numel() for image in y for channel in image.movedim(-1, 0)) <= 4


def test_every_operand_learns(net: nn.Module, images) -> None:
    calibrate(quantize_model(net, recipe({"role": "block.attention"}, method="quantsr")), images)
    net.train()(images[0]).square().sum().backward()
    ranges = [parameter for _, quantizer in quantizers(net) for parameter in quantizer.range_parameters()]
    assert len(ranges) >= 16 and all(one.grad is not None and bool(one.grad.isfinite().all()) for one in ranges)


# -- costs -----------------------------------------------------------------------------------------------------------


def test_products_are_counted_once_with_the_bits_of_their_operands(tiny_net) -> None:
    size, windows, heads, tokens, channels = (8, 12), 6, 2, 16, 4
    product = windows * heads * tokens * tokens * channels
    before = complexity(tiny_net("SwinIR"), size)
    assert [row.macs for row in before.sites if row.name.endswith(".attn")] == [2 * product] * 4
    rules = [{"match": "**.attn", "port": "query", "bits": 3}, {"match": "**.attn", "port": "key", "bits": 5}]
    after = complexity(quantize_model(tiny_net("SwinIR"), recipe(*rules)), size)
    rows = {row.name: row for row in after.sites}
    name = "layers.0.residual_group.blocks.1.attn"
    assert after.macs == before.macs and name not in rows
    scores, mixture = rows[f"{name}.scores"], rows[f"{name}.mixture"]
    assert (scores.macs, scores.act_bits, scores.weight_bits, scores.quantized) == (product, 3, 5, True)
    assert (mixture.macs, mixture.act_bits, mixture.weight_bits, mixture.quantized) == (product, 32, 32, False)
    assert before.bitops - after.bitops == 4 * product * (32 * 32 - 3 * 5)
    assert after.storage_bits - after.float_storage_bits == 8 * 2 * 32, "two bounds for each of eight operands"
