"""Blocks that can be left out: the formula of a block with its gradient, and recipes whose depth does not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import calibrate, load_recipe, quantize_model
from qsr_plugin.quant.depth import depth_blocks, set_depth, slim
from qsr_plugin.quant.places import ROLE_TABLES
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.surgery import quantizers
from tests.backbones import NO_DEPTH, names_of
from tests.quant.depths import FACTORS, backbones, blocks_of, recipe, run

# -- the block -------------------------------------------------------------------------------------------------------


@backbones
def test_factors_of_one_change_nothing(tiny_net, images, deep, backbone: str) -> None:
    float_net = tiny_net(backbone, num_block=4)
    assert torch.equal(run(deep(backbone, bits=32), images[0]), run(float_net, images[0]))
    plain = calibrate(quantize_model(tiny_net(backbone, num_block=4), recipe(depth=None, stages=[{}])), images)
    assert torch.equal(run(deep(backbone), images[0]), run(plain.eval(), images[0]))


@backbones
def test_a_block_scales_its_identity_path_only(tiny_net, images, deep, backbone: str) -> None:
    float_net, seen = tiny_net(backbone, num_block=4), []
    original = float_net.get_submodule(names_of(float_net, "block")[1])
    original.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    run(float_net, images[0])
    (x, *more), out = seen[0]
    for factor in (-0.25, 2.0):
        block = blocks_of(deep(backbone, [1.0, factor], bits=32))[1]
        assert torch.allclose(block(x, *more), factor * x + (out - x), atol=1e-6)
        block.skipped = True
        assert torch.equal(block(x, *more), factor * x)


class Windows(nn.Module):
    """A block with more arguments than its tensor."""

    def forward(self, x: Tensor, size: tuple[int, int], *, gain: float = 1.0) -> Tensor:
        return x + gain * size[0] * x.square()


class Stack(nn.Module):
    """A backbone of such blocks."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers, self.conv = nn.ModuleList(blocks), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, (3, 5), gain=0.5)
        return self.conv(x)


@pytest.fixture
def stack(monkeypatch) -> Callable[..., nn.Module]:
    table = {
        "block": ("layers.*",),
        "block.conv": ("conv",),
        "empty": (),
        "far": ("blocks.*",),
        "out": ("conv:output",),
    }
    monkeypatch.setitem(ROLE_TABLES, "Stack", table)
    return lambda *blocks: Stack(*(blocks or (Windows(), Windows())))


def test_further_arguments_are_passed_on(stack, images) -> None:
    net = quantize_model(stack(), recipe(bits=32))
    first, second = blocks_of(net)
    first.shortcut_scale.data.fill_(0.5)
    x = images[0]
    want = 0.5 * x + 1.5 * x.square()
    assert torch.allclose(net(x), net.conv(want + 1.5 * want.square()), atol=1e-6)
    second.skipped = True
    assert torch.allclose(net(x), net.conv(want), atol=1e-6)


@pytest.mark.parametrize("skipped", [False, True])
def test_gradient_of_the_factor(tiny_net, skipped: bool) -> None:
    block = quantize_model(tiny_net(num_block=1), recipe(bits=32)).body[0].double()
    block.shortcut_scale.data.fill_(0.7)
    block.skipped = skipped
    x = torch.randn(2, 8, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 8, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    block(x).backward(upstream)
    assert torch.allclose(block.shortcut_scale.grad, (upstream * x).sum())
    if skipped:
        assert torch.allclose(x.grad, 0.7 * upstream)
        assert block.conv1.weight.grad is None
    else:
        assert torch.autograd.gradcheck(block, (x[:1, :, :2, :2].detach().requires_grad_(),))


@backbones
def test_factors_learn_at_every_depth_and_belong_to_others(deep, images, backbone: str) -> None:
    from qsr_plugin.models.stages import parameter_groups

    net = deep(backbone)
    factors = [block.shortcut_scale for block in blocks_of(net)]
    others = {id(parameter) for parameter in parameter_groups(net)["others"]}
    assert others >= {id(factor) for factor in factors}
    set_depth(net, 1)(images[0]).sum().backward()
    assert all(factor.grad is not None and factor.grad != 0 for factor in factors)


def test_low_precision_keeps_its_type(deep, images) -> None:
    net, seen = deep("EDSR", FACTORS, bits=32), []
    set_depth(net, 3)
    for block in blocks_of(net):
        block.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        net(images[0])
    assert seen == [torch.bfloat16] * 4


# -- recipes that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        ({"role": "blok"}, r"recipe\.depth\.role is 'blok': no modules of Stack have that role\. Did you mean 'block'"),
        ({"role": "empty"}, "no modules of Stack have that role"),
        ({"role": "out"}, "no modules of Stack have that role"),
        ({"role": "far"}, r"'blocks\.\*' matches no module of Stack"),
        ({"kept": []}, r"recipe\.depth\.kept is \[\]; Stack has 2 blocks: give different positions from 0 to 1"),
        ({"kept": [0, 2]}, r"kept is \[0, 2\]"),
        ({"kept": [-1]}, r"kept is \[-1\]"),
        ({"kept": [1, 1]}, r"kept is \[1, 1\]"),
    ],
)
def test_recipes_whose_depth_does_not_fit(stack, depth: dict, message: str) -> None:
    net = stack()
    with pytest.raises(RecipeError, match=message):
        quantize_model(net, recipe(depth=depth))
    assert not blocks_of(net)
    assert set(net.state_dict()) == {"conv.weight", "conv.bias"}


def test_backbones_without_a_role_table(stack) -> None:
    rules = {"mine": [{"match": "0", "port": "input"}]}
    with pytest.raises(RecipeError, match="no modules of Sequential have that role"):
        quantize_model(nn.Sequential(nn.Conv2d(3, 3, 1)), recipe(placement="mine", placements=rules))


def test_shared_blocks_cannot_be_left_out_alone(stack) -> None:
    block = Windows()
    with pytest.raises(RecipeError, match=r"one block is used as layers\.0 and layers\.2"):
        quantize_model(stack(block, Windows(), block), recipe())


@pytest.mark.parametrize("backbone", NO_DEPTH)
def test_blocks_that_do_more_than_add_cannot_be_left_out(tiny_net, backbone: str) -> None:
    with pytest.raises(RecipeError, match=f"{NO_DEPTH[backbone]}.*Set 'depth' of the recipe to null"):
        quantize_model(tiny_net(backbone), recipe())
    one_depth = load_recipe("quantsr", depth=None, stages=[{}])
    assert quantize_model(tiny_net(backbone), one_depth).recipe.depth is None


@pytest.mark.parametrize("port", ["input", "shortcut", "output"])
def test_blocks_must_not_be_quantized_themselves(tiny_net, port: str) -> None:
    rules = {"mine": [{"role": "block.conv", "port": "weight"}, {"role": "block", "port": port}]}
    with pytest.raises(RecipeError, match=rf"quantizes body\.0\.{port}.*needs a float identity path"):
        quantize_model(tiny_net(), recipe(placement="mine", placements=rules))


def test_kept_blocks_of_a_recipe(tiny_net, images, caplog: pytest.LogCaptureFixture) -> None:
    rules = {"mine": [{"match": "body.0.conv1", "port": "weight"}, {"role": "block.conv", "port": "input"}]}
    with caplog.at_level(logging.WARNING, "qsr_plugin"):
        net = quantize_model(
            tiny_net(num_block=4), recipe(placement="mine", placements=rules, depth={"role": "block", "kept": [3, 1]})
        )
    assert [name for name, _ in depth_blocks(net)] == ["body.1", "body.3"]
    assert net.block_order.tolist() == [0, 1]
    assert {place for place, _ in quantizers(net)} == {f"body.{b}.conv{c}.input" for b in (1, 3) for c in (1, 2)}
    assert calibrate(net, images)(images[0]).shape == (2, 3, 16, 16)
    assert slim(net, 1).recipe.depth.kept == (1,)
    assert not caplog.records


def test_depth_follows_the_network_to_its_device(tiny_net) -> None:
    net = quantize_model(tiny_net().to("meta"), recipe())
    assert {value.device.type for value in net.state_dict().values()} == {"meta"}
