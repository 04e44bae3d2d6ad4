"""Networks of several depths: leaving blocks out, ranking them, copies and state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import quantize_model
from qsr_plugin.checkpoint import load_float_weights, save_torch
from qsr_plugin.quant.depth import DepthError, depth_blocks, depth_of, rank_blocks, set_depth, slim, trained_depths
from qsr_plugin.quant.surgery import plugin_keys, tap
from tests.backbones import names_of
from tests.quant.depths import FACTORS, ORDER, backbones, blocks_of, recipe, run


def calls_of(net: nn.Module, x: Tensor) -> list[str]:
    """Names of all modules that ran, block by block."""
    names: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: names.append(name)) for name, module in net.named_modules()
    ]
    run(net, x)
    for handle in handles:
        handle.remove()
    return names


# -- choosing a depth ------------------------------------------------------------------------------------------------


@backbones
@pytest.mark.parametrize("depth", [1, 2, 3, 4, None])
def test_blocks_left_out_do_not_run(deep, images, backbone: str, depth: int | None) -> None:
    net = set_depth(deep(backbone), depth)
    names, blocks = calls_of(net, images[0]), [name for name, _ in depth_blocks(net)]
    kept = tuple(f"{block}." for block in blocks[:depth])
    ran = {name for name in names if name.startswith(tuple(f"{block}." for block in blocks))}
    assert ran and all(any(name.startswith(block) for name in ran) for block in kept)
    assert all(name.startswith(kept) for name in ran)
    assert [name for name in names if name in blocks] == blocks
    assert set(net.last_record().bits) == {
        f"{name}.input" for name in names_of(net, "block.conv") if name.startswith(kept)
    }


@backbones
def test_ranking_keeps_small_factors_and_drops_large_ones_first(deep, images, backbone: str) -> None:
    net = deep(backbone, FACTORS)
    assert net.block_order.tolist() == [0, 1, 2, 3]
    assert rank_blocks(net) == ORDER
    assert net.block_order.tolist() == list(ORDER)
    assert net.block_order.dtype == torch.int64
    for depth in (1, 2, 3, 4):
        set_depth(net, depth)
        assert {number for number, block in enumerate(blocks_of(net)) if not block.skipped} == set(ORDER[:depth])


def test_equal_factors_keep_their_order(deep) -> None:
    assert rank_blocks(deep(factors=[1.0, -1.0, 0.5, 1.0])) == (2, 0, 1, 3)


def test_ranking_keeps_the_depth_and_changes_who_runs(deep) -> None:
    net = set_depth(deep(factors=FACTORS), 2)
    rank_blocks(net)
    assert [block.skipped for block in blocks_of(net)] == [True, False, False, True]


def test_every_depth_gives_another_image_and_full_depth_comes_back(deep, images) -> None:
    net = deep(factors=FACTORS)
    full = run(net, images[0])
    outputs = [run(set_depth(net, depth), images[0]) for depth in (4, 2, 1)]
    assert torch.equal(outputs[0], full)
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    assert torch.equal(run(set_depth(net, None), images[0]), full)


@pytest.mark.parametrize("wrong", [0, 5, -1, 2.0, True, "2"])
def test_depths_that_are_not_there(deep, wrong: object) -> None:
    net = deep()
    for change in (set_depth, slim):
        with pytest.raises(DepthError, match=rf"depth is {wrong!r}; this EDSR has 4 blocks: give 1 to 4"):
            change(net, wrong)
    assert not any(block.skipped for block in blocks_of(net))


def test_networks_of_one_depth_say_so(tiny_net) -> None:
    net = quantize_model(tiny_net(), "percentile")
    for change in (set_depth, slim):
        with pytest.raises(DepthError, match="this EDSR has one depth only: its recipe needs depth: {role: block}"):
            change(net, 1)
    with pytest.raises(DepthError, match="one depth only"):
        rank_blocks(net)
    assert set_depth(net, None) is net
    assert trained_depths(net) == ()


def test_shares_of_the_blocks(deep, tiny_net) -> None:
    net = deep()
    assert [depth_of(net, share) for share in (1.0, 0.5, 0.25, 0.01)] == [4, 2, 1, 1]
    assert trained_depths(net) == (4, 2, 1)
    large = quantize_model(tiny_net(num_block=32), recipe())
    assert [depth_of(large, share) for share in (1.0, 0.5, 0.25)] == [32, 16, 8]


# -- copies and state ------------------------------------------------------------------------------------------------


def test_copies_choose_their_own_depth(deep, images) -> None:
    net = set_depth(deep(factors=FACTORS), 2)
    twin = copy.deepcopy(net)
    assert torch.equal(run(twin, images[0]), run(net, images[0]))
    want = run(net, images[0])
    set_depth(twin, 4)
    rank_blocks(twin)
    twin.body[0].shortcut_scale.data.zero_()
    assert torch.equal(run(net, images[0]), want)
    assert not torch.equal(run(twin, images[0]), want)
    assert net.block_order.tolist() == [0, 1, 2, 3]


def test_an_average_of_weights_needs_only_the_tensors(deep, images) -> None:
    """What the host's moving average does: parameters and buffers are copied, nothing else."""
    net, average = deep(factors=FACTORS), deep()
    rank_blocks(net)
    for own, other in zip((*average.parameters(), *average.buffers()), (*net.parameters(), *net.buffers())):
        own.data.copy_(other)
    assert torch.equal(run(set_depth(average, 2), images[0]), run(set_depth(net, 2), images[0]))


@backbones
def test_state_dict_holds_factors_and_order_and_no_choice(tiny_net, deep, backbone: str) -> None:
    plain = quantize_model(tiny_net(backbone, num_block=4), recipe(depth=None, stages=[{}])).state_dict()
    net = deep(backbone, FACTORS)
    added = {*(f"{name}.shortcut_scale" for name, _ in depth_blocks(net)), "block_order"}
    assert set(net.state_dict()) - set(plain) == added
    assert added <= plugin_keys(net)
    rank_blocks(net)
    other = deep(backbone)
    other.load_state_dict(set_depth(net, 1).state_dict())
    assert other.block_order.tolist() == list(ORDER)
    assert [block.shortcut_scale.item() for block in blocks_of(other)] == FACTORS
    assert not any(block.skipped for block in blocks_of(other))


@backbones
def test_float_checkpoints_load(tiny_net, deep, images, tmp_path, backbone: str) -> None:
    float_net = tiny_net(backbone, num_block=4)
    with torch.no_grad():
        float_net.get_submodule(names_of(float_net, "block.conv")[2]).weight.mul_(2)
    save_torch(float_net.state_dict(), tmp_path / "float.pth")
    net = deep(backbone, bits=32)
    before = run(net, images[0])
    assert load_float_weights(net, tmp_path / "float.pth") == len(float_net.state_dict())
    assert torch.equal(run(net, images[0]), run(float_net, images[0]))
    assert not torch.equal(run(net, images[0]), before)


def test_outputs_of_blocks_can_be_tapped(deep, images) -> None:
    net = tap(deep(factors=FACTORS), "body.3:output", "last")
    set_depth(net, 3)
    inputs: list[Tensor] = []
    net.body[3].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    run(net, images[0])
    assert torch.equal(net.last_record().taps["last"], FACTORS[3] * inputs[0])
    assert len(blocks_of(net)) == 4
