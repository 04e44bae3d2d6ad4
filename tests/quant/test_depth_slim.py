"""Networks of several depths made smaller for good, and what each depth costs."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from qsr_plugin import calibrate, complexity, load_quantized, load_recipe, quantize_model, save_quantized
from qsr_plugin.checkpoint import CheckpointError
from qsr_plugin.quant.depth import DepthError, depth_blocks, depth_of, rank_blocks, set_depth, slim, trained_depths
from qsr_plugin.quant.surgery import plugin_keys, quantizers, tap
from qsr_plugin.report.fab import feature_average_bits
from qsr_plugin.report.storage import storage_bits
from qsr_plugin.report.tables import depth_table, size, summary_table
from tests.backbones import DEPTH
from tests.quant.depths import FACTORS, ORDER, backbones, recipe, run

SIZE = (6, 10)


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
