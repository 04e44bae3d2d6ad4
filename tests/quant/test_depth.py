"""Networks of several depths: the formula of a block, leaving blocks out, ranking, slimming, and what it all costs."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from qsr_plugin import calibrate, complexity, load_quantized, load_recipe, quantize_model, save_quantized
from qsr_plugin.checkpoint import CheckpointError, load_float_weights, save_torch
from qsr_plugin.quant.depth import DepthError, depth_blocks, depth_of, rank_blocks, set_depth, slim, trained_depths
from qsr_plugin.quant.places import ROLE_TABLES
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.surgery import plugin_keys, quantizers, tap
from qsr_plugin.report.fab import feature_average_bits
from qsr_plugin.report.storage import storage_bits
from qsr_plugin.report.tables import depth_table, size, summary_table
from tests.backbones import DEPTH, NO_DEPTH, names_of

RECIPE = {"base": "percentile", "depth": {"role": "block"}, "stages": [{"depths": [1.0, 0.5, 0.25]}]}
FACTORS = [1.5, -0.25, 0.75, 1.25]
#: The factors above from the smallest absolute value to the largest.
ORDER = (1, 2, 3, 0)
SIZE = (6, 10)

backbones = pytest.mark.parametrize("backbone", DEPTH)


def recipe(bits: int = 4, **changes: object):
    return load_recipe({**RECIPE, **changes}, weight_bits=bits, act_bits=bits)


@pytest.fixture
def deep(tiny_net, images) -> Callable[..., nn.Module]:
    """``deep(backbone)``: four blocks, calibrated, every factor at 1; ``deep(backbone, FACTORS)`` sets the factors."""

    def build(backbone: str = "EDSR", factors: list[float] | None = None, **changes: object) -> nn.Module:
        net = calibrate(quantize_model(tiny_net(backbone, num_block=4), recipe(**changes)), images)
        for (_, block), factor in zip(depth_blocks(net), factors or []):
            block.shortcut_scale.data.fill_(factor)
        return net.eval()

    return build


def run(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def blocks_of(net: nn.Module) -> list[nn.Module]:
    return [block for _, block in depth_blocks(net)]


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


# -- slimming --------------------------------------------------------------------------------------------------------


@backbones
def test_three_depths_out_of_one_checkpoint(deep, images, tmp_path, backbone: str) -> None:
    net = deep(backbone, FACTORS)
    rank_blocks(net)
    save_quantized(set_depth(net, 2), tmp_path / "full.safetensors")
    loaded = load_quantized(tmp_path / "full.safetensors")
    assert torch.equal(run(loaded, images[0]), run(set_depth(net, None), images[0]))
    sizes = []
    for depth in (4, 2, 1):
        want = run(set_depth(net, depth), images[0])
        assert torch.equal(run(set_depth(loaded, depth), images[0]), want)
        small = slim(loaded, depth)
        assert torch.equal(run(small, images[0]), want)
        path = tmp_path / f"{depth}.safetensors"
        save_quantized(small, path)
        again = load_quantized(path)
        assert torch.equal(run(again, images[0]), want)
        assert again.recipe == small.recipe
        assert again.recipe.depth.kept == tuple(sorted(ORDER[:depth]))
        assert again.state_dict().keys() == small.state_dict().keys()
        sizes.append(path.stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]


def test_dropped_blocks_leave_their_factor_only(deep) -> None:
    net = deep(factors=FACTORS)
    rank_blocks(net)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    small = slim(net, 2)
    left = {key for key in before if not key.startswith(("body.0.", "body.3."))}
    assert set(small.state_dict()) == left | {"body.0.shortcut_scale", "body.3.shortcut_scale"}
    assert {key for key in plugin_keys(small) if "shortcut" in key or "order" in key} == {
        *(f"body.{number}.shortcut_scale" for number in range(4)), "block_order"
    }  # fmt: skip
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert net.recipe.depth.kept is None
    small.body[0].shortcut_scale.data.zero_()
    assert net.body[0].shortcut_scale.item() == FACTORS[0]


@backbones
def test_a_slimmed_network_can_be_set_and_slimmed_further(deep, images, backbone: str) -> None:
    net = deep(backbone, FACTORS)
    rank_blocks(net)
    small = slim(net, 3)
    assert small.recipe.depth.kept == (1, 2, 3)
    assert small.block_order.tolist() == [0, 1, 2]
    for depth in (3, 2, 1):
        want = run(set_depth(net, depth), images[0])
        assert torch.equal(run(set_depth(small, depth), images[0]), want)
        smaller = slim(set_depth(small, 1), depth)  # what runs now does not matter
        assert torch.equal(run(smaller, images[0]), want)
        assert smaller.recipe == slim(net, depth).recipe
    with pytest.raises(DepthError, match="has 3 blocks"):
        set_depth(small, 4)
    assert [depth_of(small, share) for share in (1.0, 0.5, 0.25)] == [3, 2, 1]
    assert trained_depths(small) == (3, 2, 1)
    assert trained_depths(slim(net, 2)) == (2, 1)
    assert depth_of(slim(net, 2), 0.5) == 2


def test_the_order_of_a_slimmed_network_counts_its_own_blocks(deep, images) -> None:
    net = deep(factors=[0.5, 3.0, 0.1, 2.0])
    assert rank_blocks(net) == (2, 0, 3, 1)
    small = slim(net, 3)
    assert small.recipe.depth.kept == (0, 2, 3)
    assert small.block_order.tolist() == [1, 0, 2]
    assert torch.equal(run(set_depth(small, 1), images[0]), run(set_depth(net, 1), images[0]))


def test_a_slimmed_network_learns_and_calibrates(deep, images) -> None:
    net = slim(deep(factors=FACTORS), 2)
    calibrate(net, images)(images[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_network_built_by_its_class_describes_itself_when_slimmed(deep, tmp_path, images) -> None:
    for kind in DEPTH:
        net = deep(kind, FACTORS)
        rank_blocks(net)  # drops block 0
        del net.backbone_options
        small = slim(net, 1)
        save_quantized(small, tmp_path / "net.safetensors")
        assert torch.equal(run(load_quantized(tmp_path / "net.safetensors"), images[0]), run(small, images[0]))


@pytest.mark.parametrize(
    ("kept", "message"),
    [((0, 9), r"cannot be rebuilt: recipe\.depth\.kept is \[0, 9\]"), ((0,), "does not hold the network it describes")],
)
def test_files_whose_kept_blocks_are_wrong(deep, tmp_path, kept: tuple[int, ...], message: str) -> None:
    small = slim(deep(), 2)
    small.recipe = load_recipe(small.recipe, depth={"kept": kept})
    save_quantized(small, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_quantized(tmp_path / "net.safetensors")


def test_slimming_a_copy_with_taps_and_records(deep, images) -> None:
    net = tap(deep(), "features", "f")
    net(images[0])
    small = slim(net, 2)
    run(small, images[0])
    assert "f" in small.last_record().taps


# -- costs -----------------------------------------------------------------------------------------------------------


@backbones
@pytest.mark.parametrize("depth", [4, 2, 1])
def test_costs_of_a_depth(deep, tiny_net, backbone: str, depth: int) -> None:
    net = deep(backbone, FACTORS)
    rank_blocks(net)
    full, at = complexity(net, SIZE), complexity(set_depth(net, depth), SIZE)
    names = [name for name, _ in depth_blocks(net)]
    float_block = tiny_net(backbone, num_block=4).get_submodule(names[0])
    block = [row for row in full.sites if row.name.startswith(f"{names[0]}.")]
    assert full.macs - at.macs == (4 - depth) * sum(row.macs for row in block)
    quantized, whole = (sum(r.macs for r in block if r.quantized is kind) for kind in (True, False))
    assert full.bitops_quantized - at.bitops_quantized == (4 - depth) * quantized * 4 * 4 > 0 or depth == 4
    assert full.bitops - at.bitops == (4 - depth) * (quantized * 4 * 4 + whole * 32 * 32)
    ran = {name for name in names if any(row.name.startswith(f"{name}.") for row in at.sites)}
    assert ran == {names[number] for number in ORDER[:depth]}
    assert (full.blocks, at.blocks) == ((4, 4), (depth, 4))
    assert (full.storage_bits, full.parameters) == (at.storage_bits, at.parameters)
    small = complexity(slim(net, depth), SIZE)
    assert (small.macs, small.bitops, small.sites, small.blocks) == (at.macs, at.bitops, at.sites, (depth, depth))
    assert at.parameters - small.parameters == (4 - depth) * sum(p.numel() for p in float_block.parameters())
    stored = storage_bits(net.get_submodule(names[0])) - 32  # without its factor, which stays
    assert at.storage_bits - small.storage_bits == (4 - depth) * stored
    assert at.float_storage_bits - small.float_storage_bits == (4 - depth) * storage_bits(float_block)


@backbones
def test_factors_are_stored_but_no_part_of_the_float_network(deep, tiny_net, backbone: str) -> None:
    net = deep(backbone)
    plain = quantize_model(tiny_net(backbone, num_block=4), recipe(depth=None, stages=[{}]))
    with_depth, without = complexity(net, SIZE), complexity(plain, SIZE)
    assert with_depth.storage_bits == without.storage_bits + 4 * 32
    assert with_depth.float_storage_bits == without.float_storage_bits
    assert (with_depth.parameters, with_depth.macs) == (without.parameters, without.macs)
    assert without.blocks is None


def test_average_bits_count_the_places_that_ran(tiny_net, images) -> None:
    """The first block at other bits: full depth (2 x 4 + 6 x 8) / 8 = 7; without it 8, with it alone 4."""
    net = quantize_model(tiny_net(num_block=4), recipe(bits=8))
    calibrate(net, images)
    for place, quantizer in quantizers(net):
        if place.startswith("body.0.") and quantizer.role == "act":
            quantizer.candidates = (4,)
            quantizer_site = net.get_submodule(place.rpartition(".")[0])
            quantizer_site.input_policy.candidates = (4,)
    for order, depth, want in (((0, 1, 2, 3), 4, 7), ((0, 1, 2, 3), 2, 6), ((0, 1, 2, 3), 1, 4), ((3, 2, 1, 0), 3, 8)):
        net.block_order.copy_(torch.tensor(order))
        report = complexity(set_depth(net, depth), SIZE)
        run(net, images[0])
        assert report.fab == report.weighted_fab == want
        assert feature_average_bits(net, net.last_record()) == want
        assert complexity(slim(net, depth), SIZE).fab == want


def test_tables_say_what_runs_and_what_is_stored(deep) -> None:
    def text(table: object) -> str:
        console = Console(width=200, file=io.StringIO())
        console.print(table)
        return console.file.getvalue()

    net = deep()
    assert "4 of 4 run" in text(summary_table(complexity(net, SIZE)))
    said = text(summary_table(complexity(set_depth(net, 2), SIZE)))
    assert "2 of 4 run" in said
    assert "Size of all 4 blocks" in said
    reports = [complexity(slim(net, depth), SIZE) for depth in (4, 1)]
    rows = [line.replace("│", " ").split() for line in text(depth_table(reports)).splitlines() if "4.00" in line]
    assert [row[0] for row in rows] == ["4", "1"]
    assert [" ".join(row[-2:]) for row in rows] == [size(report.storage_bits) for report in reports]


def test_chosen_bits_are_asked_for_only_where_blocks_run(tiny_net, images) -> None:
    net = calibrate(quantize_model(tiny_net(num_block=4), recipe()), images)
    for _, quantizer in quantizers(net):
        if quantizer.role == "act":
            quantizer.candidates = (4, 8)
    run(set_depth(net, 2), images[0])
    assert complexity(net, SIZE).fab == 4
    assert complexity(set_depth(net, 4), SIZE).fab is None, "nothing is known of two of the blocks"


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
