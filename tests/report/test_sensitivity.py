"""Damage of one layer at a time: what is measured, how it is ranked, and how it is shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from qsr_plugin import calibrate, cli, load_quantized, load_recipe, quantize_model, report_cli, save_quantized
from qsr_plugin.checkpoint import save_torch
from qsr_plugin.quant.quantizer import NotCalibratedError
from qsr_plugin.quant.record import only_places
from qsr_plugin.quant.surgery import quantizers
from qsr_plugin.report import sensitivity as measuring
from qsr_plugin.report.sensitivity import Sensitivity, SiteDamage, output_errors, psnr, sensitivity
from qsr_plugin.report.sensitivity_views import sensitivity_plot, sensitivity_table

SIDES = [(8, 8), (6, 10), (8, 8), (8, 8)]


@pytest.fixture
def net(tiny: Callable[..., nn.Module]) -> nn.Module:
    return tiny("EDSR", "percentile", weight_bits=4, act_bits=4, placement="full")


@pytest.fixture
def shots() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(1, 3, *side, generator=generator) for side in SIDES]


def test_errors_are_means_over_images_of_different_sizes(tiny, net: nn.Module, shots) -> None:
    """The same network with one layer quantized, image by image, against the float one."""
    float_net = tiny("EDSR")
    found = sensitivity(net, shots)
    assert found.images == 4 and len(found.sites) == 8 and found.seconds > 0
    for row in found.sites:
        with torch.no_grad(), only_places([f"{row.name}.input", f"{row.name}.weight"]):
            errors = [(net(shot) - float_net(shot)).double().square().mean().item() for shot in shots]
        assert row.error == pytest.approx(sum(errors) / 4, rel=1e-4) and row.error > 0
        assert row.psnr == pytest.approx(-10 * math.log10(row.error))
        assert set(row.parts) == {"input", "weight"}
    with torch.no_grad():
        whole = sum((net(shot) - float_net(shot)).double().square().mean().item() for shot in shots) / 4
    assert found.psnr == pytest.approx(psnr(whole), abs=1e-3)


def test_a_lost_image_counts_as_no_more_than_lost(net: nn.Module, shots) -> None:
    """A layer that makes features explode comes first, with 10 dB, and leaves the others their shares."""
    usual = sensitivity(net, shots, parts=False)
    dict(quantizers(net))["conv_last.input"].upper.data.fill_(1e9)
    dict(quantizers(net))["conv_last.input"].lower.data.fill_(1e8)
    found = sensitivity(net, shots, parts=False)
    worst, *others = found.sites
    assert (worst.name, worst.error, worst.psnr) == ("conv_last", pytest.approx(0.1), pytest.approx(10))
    assert found.psnr == worst.psnr
    shown = list(sensitivity_table(found).columns[3].cells)
    assert shown[0] == "<= 10.0" and not any("<" in value for value in shown[1:])
    assert {row.name: row.error for row in others} == {
        row.name: row.error for row in usual.sites if row.name != "conv_last"
    }


def test_ranked_with_shares_that_add_up(net: nn.Module, shots) -> None:
    found = sensitivity(net, shots, parts=False)
    errors = [row.error for row in found.sites]
    assert errors == sorted(errors, reverse=True) and sum(row.share for row in found.sites) == pytest.approx(1)
    assert found.sites[0].share == pytest.approx(errors[0] / sum(errors)) and not found.sites[0].parts
    bits = {row.name: row.bits for row in found.sites}
    assert bits["conv_first"] == {"input": (8,), "weight": (8,)} and bits["body.0.conv1"]["weight"] == (4,)
    assert json.loads(json.dumps(found.to_dict()))["sites"][0]["error"] == errors[0]


def test_one_broken_layer_comes_first(net: nn.Module, shots) -> None:
    quantizer = net.conv_first.quantizer("weight")
    with torch.no_grad():
        for parameter in quantizer.range_parameters():
            parameter.mul_(0.01)
    first = sensitivity(net, shots).sites[0]
    assert first.name == "conv_first" and first.parts["weight"] < first.parts["input"] - 10


def test_the_float_pass_runs_once_for_a_batch_and_equal_images_share_one(net: nn.Module, shots, monkeypatch) -> None:
    ran, steps = [], []
    net.register_forward_hook(lambda module, args, out: ran.append(len(args[0])))
    groups = [frozenset(["body.0.conv1.input"]), frozenset(["body.0.conv2.weight"])]
    shown = lambda items, text: (steps.append(step) or step for step in items)  # noqa: E731
    output_errors(net, shots, groups, progress=shown)
    assert ran == [1] * 3 + [1] * 3 + [2] * 3, "of sizes that follow each other, equal ones run together"
    assert steps == list(range(4 * 2))
    ran.clear()
    monkeypatch.setattr(measuring, "PIXELS", 64)
    output_errors(net, torch.cat([shots[0], shots[2]]), groups)
    assert ran == [1] * 6, "no batch has more pixels than that"


def test_batches_do_not_change_the_result(net: nn.Module, shots, monkeypatch) -> None:
    together = sensitivity(net, shots)
    monkeypatch.setattr(measuring, "PIXELS", 1)
    for one, other in zip(together.sites, sensitivity(net, shots).sites):
        assert one.name == other.name and one.error == pytest.approx(other.error, rel=1e-4)


def test_the_network_is_left_as_it_was(net: nn.Module, shots) -> None:
    net.train()
    net(shots[0])
    record, state = net.last_record(), deepcopy(net.state_dict())
    before = dict(record.bits)
    sensitivity(net, shots)
    assert net.training and net.last_record() is record and record.bits == before
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_bits_by_the_image_and_ports_of_blocks(tiny, shots) -> None:
    """Adaptive widths are those that the image asks for; a block with quantizers of its own is a site as well."""
    adaptive = sensitivity(tiny("EDSR", "adabm"), shots)
    assert any(len(widths) > 1 for row in adaptive.sites for widths in row.bits.values())
    blocks = sensitivity(tiny("EDSR", "ddtb"), shots)
    assert all(math.isfinite(row.error) for row in (*adaptive.sites, *blocks.sites))


def test_what_cannot_be_measured(tiny, net: nn.Module, shots) -> None:
    with pytest.raises(RuntimeError, match="not quantized"):
        sensitivity(tiny("EDSR"), shots)
    with pytest.raises(NotCalibratedError):
        sensitivity(tiny("EDSR", "percentile", calibrated=False), shots)
    with pytest.raises(ValueError, match="no images"):
        sensitivity(net, [])
    before = net.last_record()
    with torch.no_grad():
        net.body[0].conv1.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        sensitivity(net, shots)
    assert net.last_record() is before


def test_a_network_without_damage(tiny, shots) -> None:
    """Zero weights and no bias: nothing that is quantized changes anything."""
    net = tiny("EDSR")
    for parameter in net.parameters():
        parameter.data.zero_()
    rules = [{"match": "conv_last", "port": "weight"}]
    recipe = load_recipe("percentile", weight_bits=4, act_bits=4, placement="x", placements={"x": rules})
    found = sensitivity(calibrate(quantize_model(net, recipe), shots), shots)
    assert found.sites[0].share == 0 and found.sites[0].psnr == found.psnr == math.inf
    assert "same" in text_of(found)
    with pytest.raises(ValueError, match="nothing to draw"):
        sensitivity_plot(found, "x.png")


def text_of(found: Sensitivity) -> str:
    console = Console(width=160)
    with console.capture() as said:
        console.print(sensitivity_table(found))
    return said.get()


def many(count: int) -> Sensitivity:
    """Layers with long names, from 20 dB down by half a dB each; the first has no share that can be missed."""
    errors = [10 ** (-2 - 0.05 * number) for number in range(count)]
    rows = (
        SiteDamage(
            f"layers.{number}.residual_group.blocks.0.attn.qkv", {"input": (4,), "weight": (3,)}, error, psnr(error),
            error / sum(errors), {"input": psnr(error / 2), "weight": math.inf if number % 5 == 0 else psnr(error / 3)},
        )
        for number, error in enumerate(errors)
    )  # fmt: skip
    return Sensitivity("SwinIR", "percentile W3A4", tuple(rows), 18.0, 3, 12.0)


def test_table() -> None:
    said = text_of(many(3))
    assert "20.0 │ 37.2 % │   same │  23.0" in said and "W3 A4" in said
    assert "18.0 dB" in said and "3 images" in said and "Measured in 12 s" in said


@pytest.mark.parametrize("count", [1, 3, 40, 100])
def test_picture_shows_every_label_apart(count: int, tmp_path: Path, monkeypatch) -> None:
    """The forty worst, and one line for the others; no text leaves the picture or lies on another."""
    figures = []
    monkeypatch.setattr("qsr_plugin.report.sensitivity_views.save_figure", lambda figure, path: figures.append(figure))
    sensitivity_plot(many(count), tmp_path / "x.png")
    figure = figures[0]
    figure.draw_without_rendering()
    axes = figure.axes[0]
    right, left = axes.get_xlim()[::-1]
    ticks = [label for label, at in zip(axes.get_xticklabels(), axes.get_xticks()) if right <= at <= left]
    texts = [*axes.texts, *axes.get_yticklabels(), *ticks, axes.xaxis.label, *figure.texts]
    texts += axes.get_legend().get_texts()
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    width, height = figure.get_size_inches() * figure.dpi
    assert len(axes.texts) == len(axes.patches) == min(count, 40)
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    assert not [1 for i, one in enumerate(boxes) for other in boxes[:i] if one.overlaps(other)]
    assert ("60 more layers" in figure.texts[1].get_text()) == (count == 100)


def test_picture_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.svg"):
        sensitivity_plot(many(3), tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        sensitivity_plot(many(3), tmp_path / "c.jpg")


# -- qsr report ------------------------------------------------------------------------------------------------------


def report(monkeypatch: pytest.MonkeyPatch, *arguments: object, fails: bool = False) -> str:
    monkeypatch.setattr(report_cli.console, "_width", 160)
    with report_cli.console.capture() as said:
        done = CliRunner().invoke(cli.app, ["report", *map(str, arguments)])
    assert (done.exit_code != 0) == fails, done.output
    return " ".join((said.get() + done.output + str(done.exception or "")).split())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    from qsr_plugin.archs.quant_net_arch import QuantNet

    torch.manual_seed(0)
    backbone = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 2, "upscale": 2}
    net = QuantNet(backbone, load_recipe("percentile", weight_bits=4, act_bits=4))
    save_quantized(calibrate(net, torch.rand(2, 3, 8, 8)), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


@pytest.fixture
def folder(write_images) -> Path:
    generator = np.random.default_rng(0)
    sides = {"a.png": (9, 12), "b.png": (7, 8)}
    return write_images("LR", {name: generator.integers(0, 256, (*side, 3), np.uint8) for name, side in sides.items()})


def test_command(model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("--sensitivity", folder, "--sensitivity-plot", tmp_path / "s.png", "--json", tmp_path / "r.json")
    said = report(monkeypatch, model, "--size", "12x20", *given)
    assert "each layer quantized alone" in said and "measuring damage: 26 in" in said, (
        "2 images, 4 layers, 8 places, all"
    )
    assert Image.open(tmp_path / "s.png").width == 1152
    found = json.loads((tmp_path / "r.json").read_text())["details"]["sensitivity"]
    assert found["images"] == 2 and len(found["sites"]) == 4 and sum(s["share"] for s in found["sites"]) > 0.999
    report(monkeypatch, model, "--size", "12x20", "--json", tmp_path / "r.json")
    assert "sensitivity" not in json.loads((tmp_path / "r.json").read_text())["details"]


def test_tuned_weights_are_no_float_network(model: Path, folder: Path, tmp_path: Path, monkeypatch) -> None:
    """What tuning made of the weights is replaced by those of the checkpoint; the ranges are those of the file."""
    from qsr_plugin.archs.quant_net_arch import QuantNet, build_backbone

    torch.manual_seed(0)
    backbone = load_quantized(model).backbone_options
    float_net = build_backbone(backbone)
    save_torch({"params": float_net.state_dict()}, tmp_path / "float.pth")
    net = QuantNet(backbone, load_recipe("auto", weight_bits=4, act_bits=4, fragile=None))
    net.load_state_dict(float_net.state_dict(), strict=False)
    wanted = sensitivity(calibrate(net, torch.rand(2, 3, 8, 8)), folder)
    with torch.no_grad():
        for site in net.body.modules():
            if isinstance(site, torch.nn.Conv2d):
                site.weight *= 30
    save_quantized(net, tmp_path / "tuned.safetensors")
    given = (tmp_path / "tuned.safetensors", "--size", "12x20", "--sensitivity", folder)
    assert "were tuned together with its quantizers" in report(monkeypatch, *given, fails=True)
    report(monkeypatch, *given, "--float", tmp_path / "float.pth", "--json", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())["details"]["sensitivity"]
    assert found["psnr"] == pytest.approx(wanted.psnr, abs=1e-3) and found["sites"][0]["name"] == wanted.sites[0].name
    assert "--float is for --sensitivity" in report(monkeypatch, model, "--float", tmp_path / "float.pth", fails=True)


def test_command_refuses_before_it_works(model: Path, folder: Path, tmp_path: Path, monkeypatch) -> None:
    assert "give a folder" in report(monkeypatch, model, "--sensitivity-plot", "s.png", fails=True)
    assert "change the ending" in report(
        monkeypatch, model, "--sensitivity", folder, "--sensitivity-plot", "s.jpg", fails=True
    )
    assert "nothing" in report(monkeypatch, model, "--sensitivity", tmp_path / "none", fails=True)
    assert "needs weights" in report(monkeypatch, "options.yml", "--sensitivity", folder, fails=True)
