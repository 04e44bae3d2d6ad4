"""HAT and EDSR in full: published sizes, every image size, windows by hand, spandrel's HAT, places, files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from basicsr.models import build_model
from qsr_plugin.archs.attention_sites import AttentionSite
from qsr_plugin.archs.describe import describe_backbone
from qsr_plugin.archs.hat_arch import HAT
from qsr_plugin.archs.hat_windows import (
    from_windows,
    inner_index,
    overlap_index,
    shift_masks,
    to_windows,
    window_kinds,
)
from qsr_plugin.archs.quant_net_arch import build_backbone
from qsr_plugin.archs.recognise import recognise
from qsr_plugin.archs.residual_sites import ShortcutSite
from torch import nn

from qsr_plugin import calibrate, load_quantized, load_recipe, quantize_model, save_quantized
from qsr_plugin.checkpoint import load_float_weights, save_torch
from qsr_plugin.options_file import OptionsError, backbone_options, load_options, options_folder
from qsr_plugin.quant.depth import slim
from qsr_plugin.quant.places import roles_of
from qsr_plugin.quant.sites import Site, site_class_for
from qsr_plugin.quant.surgery import quantizers
from tests.backbones import names_of, tiny_options
from tests.host import every_method, harness
from tests.methods.test_levels import excess
from tests.quant.choosers import bright_to_dark, trained
from tests.recipes import METHODS, equal

SHIPPED = sorted((options_folder() / "train").glob("*/hat_*.yml"))
SIZES = {
    "embed_dim": 12,
    "depths": [2, 3],
    "num_heads": [2, 3],
    "window_size": 4,
    "compress_ratio": 3,
    "squeeze_factor": 4,
}


def small(**more: object) -> HAT:
    torch.manual_seed(0)
    return HAT(**{**SIZES, **more}).eval()


@pytest.fixture(autouse=True)
def _no_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("training" in request.node.name):
        yield


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "printed"),
    [
        ("hat_s_x4", 9_621_183, "9.6M"),  # HAT (CVPR 2023), table of model complexity at x4
        ("hat_s_x2", 9_473_471, None),
        ("hat_x4", 20_772_507, "20.8M"),  # the same table
        ("hat_x2", 20_624_795, None),
        ("edsr_x4", 43_089_923, "43.1M"),  # EDSR (CVPRW 2017), table 1, prints 43M; without the 24 of its mean shifts
        ("edsr_baseline_x4", 1_517_571, "1.5M"),  # the same table
    ],
)
def test_published_sizes(name: str, count: int, printed: str | None) -> None:
    with torch.device("meta"):
        net = build_backbone(backbone_options(name))
    assert sum(parameter.numel() for parameter in net.parameters()) == count
    assert printed is None or f"{count / 1e6:.1f}M" == printed


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (13, 1), (3, 5), (8, 11)])
def test_any_size_grows_by_exactly_the_scale(scale: int, size: tuple[int, int]) -> None:
    out = small(upscale=scale)(torch.rand(2, 3, *size))
    assert out.shape == (2, 3, size[0] * scale, size[1] * scale) and bool(torch.isfinite(out).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": [2, 5]}, r"num_heads is \[2, 5\]; allowed are divisors of embed_dim \(12\)"),
        ({"num_heads": [2]}, "one for each of the 2 groups"),
        ({"squeeze_factor": 13}, r"squeeze_factor is 13; allowed is 1 to embed_dim \(12\)"),
        ({"overlap_ratio": 0.25}, "extends windows of 4 by 1; allowed is an even number"),
        ({"upscale": 5}, "scale 5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        build_backbone({"type": "HAT_qsr", **SIZES, **changes})


# -- windows ---------------------------------------------------------------------------------------------------------


def test_windows_are_cut_row_by_row_and_joined_again() -> None:
    image = torch.arange(2 * 8 * 12 * 3).view(2, 8, 12, 3)
    windows = to_windows(image, 4)
    assert windows.shape == (2 * 6, 16, 3)
    assert torch.equal(windows[6 + 4].view(4, 4, 3), image[1, 4:8, 4:8]), "second image, second row, second column"
    assert torch.equal(from_windows(windows, 4, (8, 12)), image)


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (12, 8), (12, 16)])
def test_masks_join_only_what_the_shift_has_not_torn_apart(size: tuple[int, int]) -> None:
    """Two positions of a shifted window see each other where they are as near in the image itself."""
    window, shift = 4, 2
    place = torch.stack(torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij"), -1)
    shifted = to_windows(place.unsqueeze(0).roll((-shift, -shift), (1, 2)), window)
    near = ((shifted[:, :, None] - shifted[:, None]).abs() < window).all(-1)
    masks = shift_masks(window, shift)[:, 0][window_kinds(size[0] // window, size[1] // window, torch.device("cpu"))]
    assert torch.equal(masks, torch.where(near, 0.0, -100.0))


def test_position_tables_have_one_row_for_each_offset() -> None:
    own, outer = (torch.cartesian_prod(torch.arange(side), torch.arange(side)) for side in (4, 6))
    for index, offsets, rows in (
        (inner_index(4), own[:, None] - own, 7**2),
        (overlap_index(4, 6), outer - own[:, None], 9**2),
    ):
        assert index.shape == offsets.shape[:2] and -rows <= int(index.min()) and int(index.max()) < rows
        pairs = {
            (tuple(offset.tolist()), int(row) % rows) for offset, row in zip(offsets.flatten(0, 1), index.flatten())
        }
        assert len(pairs) == rows == len({row for _, row in pairs}), "each offset has one row, each row one offset"


def test_what_a_shifted_image_joins_at_its_ends_stays_apart() -> None:
    """A group of two blocks reaches no further than two windows, so the last row does not reach the first."""
    net = small(depths=[2], num_heads=[2], overlap_ratio=0.0)
    for layer in net.layers:
        nn.init.zeros_(layer.residual_group.blocks[0].conv_block.cab[2].weight)  # its mean sees all of the image
        nn.init.zeros_(layer.residual_group.blocks[1].conv_block.cab[2].weight)
    image = torch.rand(1, 3, 32, 8)
    changed = image.clone()
    changed[:, :, -1] = 0
    moved = (net(changed) - net(image)).abs().amax((0, 1, 3))
    assert float(moved[:32].max()) == 0 and float(moved[-4:].min()) > 0


# -- the same network elsewhere --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "size"),
    [({}, (8, 8)), ({"upscale": 2}, (13, 22)), ({"window_size": 8}, (9, 30)), ({"overlap_ratio": 1.0}, (20, 8))],
)
def test_it_computes_what_spandrel_computes(changes: dict, size: tuple[int, int]) -> None:
    spandrel_hat = pytest.importorskip("spandrel.architectures.HAT", reason="needs spandrel: pip install spandrel")
    net = small(**changes).double()
    other = (
        spandrel_hat.HAT(**{**SIZES, "mlp_ratio": 2.0, "overlap_ratio": 0.5, "upscale": 4, **changes}).double().eval()
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    other.load_state_dict(net.state_dict(), strict=True)
    image = torch.rand(2, 3, *size, generator=generator).double()
    want = other(image)
    assert want.std() > 0.1
    torch.testing.assert_close(net(image), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tables", [True, False], ids=["whole", "without tables"])
def test_files_of_the_release_are_recognised_and_loaded(tables: bool, tmp_path: Path) -> None:
    net = small(mlp_ratio=1.5, overlap_ratio=1.0, upscale=2)
    state = {key: value for key, value in net.state_dict().items() if tables or key not in net.rebuilt_buffers}
    file = tmp_path / "net.pth"
    torch.save({"params_ema": state}, file)
    options = recognise(state)
    assert options == {"type": "HAT_qsr", "in_chans": 3, **SIZES, "mlp_ratio": 1.5, "overlap_ratio": 1.0, "upscale": 2}
    rebuilt = build_backbone(options).eval()
    assert load_float_weights(rebuilt, file) == len(state)
    image = torch.rand(1, 3, 9, 7)
    assert torch.equal(rebuilt(image), net(image))


# -- quantized -------------------------------------------------------------------------------------------------------


def test_roles_name_every_layer_once() -> None:
    net = small()
    roles = ("head", "block.conv", "block.channel_attention", "body_end", "upsampler", "tail")
    named = [name for role in roles for name in names_of(net, role)]
    layers = [name for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert sorted(named) == sorted(layers)
    assert len(names_of(net, "block.conv")) == 5 * 4 + 2 * 4 + 2, "of five blocks, two overlapping attentions, two ends"
    assert len(names_of(net, "block.mlp")) == 2 * 7
    assert names_of(net, "block.mlp_last") == [name for name in names_of(net, "block.mlp") if name.endswith("fc2")]


def test_a_class_of_this_name_from_elsewhere_has_roles_from_what_it_executes() -> None:
    spandrel_hat = pytest.importorskip("spandrel.architectures.HAT", reason="needs spandrel: pip install spandrel")
    roles = roles_of(spandrel_hat.HAT(**SIZES, upscale=2).eval())
    assert "block.shortcut" not in roles and roles["head"] == ("conv_first",)


def test_operands_of_both_products_are_quantized_in_both_attentions(images) -> None:
    recipe = {"placement": "mine", "placements": {"mine": [{"role": "block.attention"}]}}
    errors = []
    for bits in (4, 8, 16):
        net = small(upscale=2)
        keys, want = set(net.state_dict()), net(images[0])
        net = calibrate(quantize_model(net, load_recipe("minmax", act_bits=bits, **recipe)), images)
        assert keys <= set(net.state_dict())
        places = [place for place, _ in quantizers(net)]
        assert len(places) == 4 * (5 + 2) and places[-1] == "layers.1.residual_group.overlap_attn.value"
        net.keep_pairs = True
        errors.append((net(images[0]) - want).abs().max().item())
    pairs, group = net.last_record().pairs, "layers.0.residual_group"
    near, far = (pairs[f"{group}.{part}.attention"][0].flatten(0, -4) for part in ("blocks.1.attn", "overlap_attn"))
    assert near.shape == (2 * 4, 2, 16, 16) and far.shape == (2 * 4, 2, 16, 36), "windows of all images, heads, pairs"
    torch.testing.assert_close(far.sum(-1), torch.ones(8, 2, 16))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4


def test_sites_without_quantizers_leave_the_network_as_it_is(images) -> None:
    net = small(upscale=2)
    want, keys = net(images[0]), list(net.state_dict())
    for role, port in (("block", "addition"), *(("block.attention", port) for port in ("query", "attention"))):
        for name in names_of(net, role):
            module = net.get_submodule(name)
            if not isinstance(module, Site):
                site_class_for(module, {port}).from_float(module, name)
    assert sum(isinstance(module, AttentionSite) for module in net.modules()) == 5 + 2
    assert sum(isinstance(module, ShortcutSite) for module in net.modules()) == 2
    assert list(net.state_dict()) == keys and torch.equal(net(images[0]), want)


def test_each_image_has_its_own_bits_in_all_its_windows() -> None:
    batch, rules = bright_to_dark(6), [{"role": "block.attention"}, {"role": "block.linear", "port": "input"}]
    recipe = load_recipe("cadyq", placement="mine", placements={"mine": rules})
    net = small(depths=[2], num_heads=[2], upscale=2)
    net = trained(calibrate(quantize_model(net, recipe), [batch]).eval(), batch)
    together, bits = net(batch), dict(net.last_record().bits)
    assert len(bits) == 3 * (4 + 4) and all(found.shape == (6,) for found in bits.values())
    assert any(len(set(found.tolist())) > 1 for found in bits.values())
    for number, image in enumerate(batch.split(1)):
        torch.testing.assert_close(net(image)[0], together[number], atol=1e-4, rtol=0)
        assert all(found.item() == bits[place][number] for place, found in net.last_record().bits.items())


@pytest.mark.parametrize("method", METHODS)
def test_no_tensor_has_more_levels_than_two_bits_allow(method: str) -> None:
    """With the operands of attention, whose windows share the grid of their image."""
    rules = [{"role": "block.attention"}, *({"role": "block.conv", "port": port} for port in ("input", "weight"))]
    batches = [torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    recipe = equal(method, 2, placement="mine", placements={"mine": rules})
    net = calibrate(quantize_model(small(depths=[2], num_heads=[2], upscale=2), recipe), batches)
    assert not excess(net, batches[0])


def test_channel_attention_is_quantized_only_where_an_option_asks(images) -> None:
    recipe = load_recipe("minmax", placement="body")
    float_ones = {place for place, _ in quantizers(quantize_model(small(), recipe))}
    assert not any("conv_block" in place for place in float_ones)
    rules = [{"role": "block.channel_attention", "port": port} for port in ("input", "weight")]
    net = quantize_model(small(), load_recipe("minmax", placement="mine", placements={"mine": rules}))
    places = [place for place, _ in quantizers(net)]
    assert len(places) == 5 * 4 * 2 and all(".conv_block.cab." in place for place in places)
    assert bool(torch.isfinite(calibrate(net, images)(images[0])).all())


def test_a_slimmed_network_is_described_and_saved(images, tmp_path: Path) -> None:
    net = small(upscale=2, conv_scale=0.02, drop_path_rate=0.0)
    net = slim(calibrate(quantize_model(net, load_recipe("quantsr")), images), 1).eval()
    options = describe_backbone(net)
    assert options == {
        **{"type": "HAT", "in_chans": 3, **SIZES, "depths": options["depths"], "num_heads": options["num_heads"]},
        **{"overlap_ratio": 0.5, "mlp_ratio": 2.0, "upscale": 2},
        **{"conv_scale": 0.02, "drop_path_rate": 0.0, "img_range": 1.0},
    }
    save_quantized(net, tmp_path / "net.safetensors")
    assert torch.equal(load_quantized(tmp_path / "net.safetensors").eval()(images[0]), net(images[0]))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_training_leaves_out_branches_of_single_images(rate: float, images) -> None:
    net = small(drop_path_rate=rate, upscale=2).train()
    torch.manual_seed(1)
    one, other = net(images[0]), net(images[0])
    assert torch.equal(one, other) == (rate == 0)
    other.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    net.eval()
    assert torch.equal(net(images[0]), net(images[0]))


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_training_from_every_option_file(path: Path, tmp_path: Path) -> None:
    """A small network in the place of HAT-S, three steps of which one is in the second stage: all stays finite."""
    options = load_options(path)
    assert options["network_g"]["backbone"] == backbone_options("hat_s_x4")
    kind = {**tiny_options("HAT", upscale=4, drop_path_rate=0.1), "type": "HAT_qsr"}
    recipe = {**options["network_g"]["recipe"], "calibration": {"images": 4, "batch": 2}}
    for stage in recipe["stages"][:-1]:
        stage["iters"] = 2
    opt = every_method.options(harness.write_data(tmp_path / "data", count=2), tmp_path, "pams", "EDSR")
    opt["network_g"] = {"type": "QuantNet", "backbone": kind, "recipe": recipe}
    opt["train"].update(options["train"])
    torch.manual_seed(0)
    save_torch({"params": build_backbone(kind).state_dict()}, opt["path"]["pretrain_network_float"])
    model = build_model(opt)
    for iteration in (1, 2, 3):
        every_method.iterate(model, range(iteration, iteration + 1))
        assert all(math.isfinite(value) for value in model.log_dict.values())
    assert all(p.grad is not None for p in model.net.parameters() if p.requires_grad)
    assert all(bool(value.isfinite().all()) for value in model.net.state_dict().values())
    names = {place.rpartition(".")[0] for place, _ in quantizers(model.net)}
    only_mlps = options["network_g"]["recipe"]["method"] == "granular_dq"
    assert names == set(names_of(model.net, "block.mlp" if only_mlps else "block.conv"))
