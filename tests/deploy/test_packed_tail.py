"""Packed files with a collapsed tail: read back, as small as promised, and refused when damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qsr_plugin import calibrate, complexity, load_quantized, quantize_model
from qsr_plugin.checkpoint import CheckpointError, read_file, save_quantized
from qsr_plugin.deploy.collapsed import CollapsedTail
from qsr_plugin.deploy.packed import save_packed
from qsr_plugin.deploy.plain import save_plain
from qsr_plugin.deploy.tail import collapse_tail
from qsr_plugin.errors import UserError
from tests.deploy.tails import difference, lively
from tests.deploy.test_export_cli import qsr
from tests.recipes import equal

CHAIN = ("upsample.0", "upsample.1", "upsample.2", "upsample.3", "conv_last")
KERNEL, BIAS = "upsample.0.conv.weight", "upsample.0.conv.bias"
#: Blocks and the convolution behind them.
BODY = [{"role": role, "port": port} for role in ("block.conv", "body_end") for port in ("input", "weight")]


@pytest.fixture
def net(tiny_net, images) -> nn.Module:
    """A calibrated network of scale 4 whose pixels are of the size of its biases."""
    plain = lively(tiny_net("EDSR", upscale=4, img_range=1.0))
    return calibrate(quantize_model(plain, equal("minmax", 4)), images).eval()


@pytest.fixture
def packed(net, tmp_path: Path) -> Path:
    return save_packed(net, tmp_path / "net.safetensors", collapse=True).path


def test_only_the_outermost_pixels_differ_and_are_said(net, tmp_path: Path) -> None:
    whole = save_packed(net, tmp_path / "whole.safetensors")
    report = save_packed(net, tmp_path / "net.safetensors", collapse=True)
    twin = load_quantized(report.path)
    assert report.collapsed == CHAIN and report.ring == 3 and whole.collapsed == () and whole.ring == 0
    assert difference(net, twin, (17, 23), border=3) <= 1e-5 and difference(net, twin, (17, 23), border=2) > 1e-3
    assert not any(isinstance(module, CollapsedTail) for module in net.modules())
    assert isinstance(twin.upsample[0], CollapsedTail) and isinstance(twin.conv_last, nn.Identity)
    assert (report.float_bytes, report.quantized_bytes) == (whole.float_bytes, whole.quantized_bytes)
    listed = sum(row.codes_bytes + row.side_bytes for row in report.rows) + report.float_layer_bytes
    assert listed + report.range_bytes + report.header_bytes == report.file_bytes == report.path.stat().st_size
    assert report.stated_bytes == complexity(twin, (8, 8)).storage_bits // 8


def test_half_of_the_kernel(net, packed: Path, tmp_path: Path) -> None:
    half = save_packed(net, tmp_path / "half.safetensors", half=True, collapse=True)
    tensors = load_file(half.path)
    assert tensors[KERNEL].dtype == tensors[BIAS].dtype == torch.float16
    twin = load_quantized(half.path)
    assert twin.upsample[0].conv.weight.dtype == torch.float32
    assert 0 < difference(load_quantized(packed), twin, (9, 11)) < 0.05


@pytest.mark.parametrize("collapse", [False, True])
def test_packing_what_was_loaded_changes_nothing(packed: Path, tmp_path: Path, collapse: bool) -> None:
    report = save_packed(load_quantized(packed), tmp_path / "second.safetensors", collapse=collapse)
    (ours, said), (theirs, told) = read_file(packed), read_file(report.path)
    assert said == told and ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert report.collapsed == CHAIN and report.ring == 3


@pytest.mark.parametrize(("bits", "times"), [(4, 6), (2, 9)])
def test_edsr_baseline_is_as_small_as_promised(images, tmp_path: Path, bits: int, times: int) -> None:
    """16 blocks of 64 features: 6 times smaller than float at 4 bits, 9 times at 2; without the last one, in 16 bits."""
    from qsr_plugin.archs.quant_net_arch import build_backbone

    from qsr_plugin.options_file import backbone_options

    for changes, half in (({"placements": {"body": BODY}}, False), ({}, True)):
        torch.manual_seed(0)
        plain = build_backbone(backbone_options("edsr_baseline_x4"))
        net = calibrate(quantize_model(plain, equal("minmax", bits, placement="body", **changes)), images[:1])
        report = save_packed(net, tmp_path / "net.safetensors", half=half, collapse=True)
        assert report.path.stat().st_size * times <= 4 * 1_517_571 <= report.float_bytes


@pytest.mark.parametrize(
    ("kind", "recipe", "words"),
    [
        ("MSRResNet", "minmax", r"'lrelu' \(LeakyReLU\) is not linear"),
        ("EDSR", "fqsr", r"'conv_last' \(\w+\) quantizes"),
        ("RLFN", "minmax", "no gain, one convolution would need"),
    ],
)
def test_tails_that_are_none(tiny_net, images, tmp_path: Path, kind: str, recipe: str, words: str) -> None:
    net = calibrate(quantize_model(tiny_net(kind), equal(recipe, 4)), images)
    with pytest.raises(CheckpointError, match=f"tail: not collapsed: {words}.*Leave out collapse"):
        save_packed(net, tmp_path / "net.safetensors", collapse=True)
    assert not list(tmp_path.iterdir())


def test_files_that_need_the_original_modules(net, packed: Path, tmp_path: Path) -> None:
    twin = load_quantized(packed)
    with pytest.raises(UserError, match=r"upsample\.0 is a collapsed tail, its original weights are gone"):
        save_plain(twin, tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="weights of this network are folded"):
        save_quantized(twin, tmp_path / "float.safetensors")
    assert collapse_tail(net).applied
    for collapse in (False, True):
        with pytest.raises(CheckpointError, match=r"upsample\.0 is a collapsed tail with an exact border"):
            save_packed(net, tmp_path / "other.safetensors", collapse=collapse)
    assert list(tmp_path.iterdir()) == [packed]


# -- damages ---------------------------------------------------------------------------------------------------------


def entry(metadata: dict, **changes: object) -> None:
    metadata["collapsed"] = json.dumps({**json.loads(metadata["collapsed"]), **changes})


def flip(tensors: dict) -> None:
    tensors[KERNEL].view(torch.uint8)[0, 0, 0, 0].bitwise_xor_(1)


DAMAGES: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "a bit": (lambda tensors, _: flip(tensors), "collapsed tail upsample.0 has another checksum"),
    "no kernel": (lambda tensors, _: tensors.pop(KERNEL), f"it lacks '{KERNEL}'"),
    "no bias": (lambda tensors, _: tensors.pop(BIAS), f"it lacks '{BIAS}'"),
    "a smaller kernel": (
        lambda tensors, _: tensors.update({KERNEL: tensors[KERNEL][:, :, 1:-1, 1:-1].contiguous()}),
        r"is torch.float32 \(48, 8, 3, 3\), its metadata say \(48, 8, 5, 5\)",
    ),
    "another type": (lambda tensors, _: tensors.update({KERNEL: tensors[KERNEL].double()}), "is torch.float64"),
    "another scale": (lambda _, metadata: entry(metadata, scale=2), "has another checksum"),
    "an odd scale": (lambda _, metadata: entry(metadata, scale=7), "is none of a collapsed tail of scale 7"),
    "another ring": (lambda _, metadata: entry(metadata, ring=0), "has another checksum"),
    "fewer modules": (lambda _, metadata: entry(metadata, modules=list(CHAIN[:-1])), "has another checksum"),
    "no modules": (lambda _, metadata: entry(metadata, modules=[]), "at least 1 item"),
    "a word for the scale": (lambda _, metadata: entry(metadata, scale="4"), "valid integer"),
    "an unknown entry": (lambda _, metadata: entry(metadata, secret=1), "Extra inputs"),
    "no entry": (lambda _, metadata: metadata.update(collapsed=""), "JSON"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(packed: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    tensors, metadata = load_file(packed), read_file(packed)[1]
    change(tensors, metadata)
    save_file(tensors, packed, metadata)
    with pytest.raises(CheckpointError, match=rf"(?s)packed file that is damaged \(.*{message}") as error:
        load_quantized(packed)
    assert str(packed) in str(error.value)


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        (("upsample.0", "upsample.9"), "stands for upsample.9, which this network does not have"),
        (("upsample.0", "body.0.conv1"), "stands for body.0.conv1, which is quantized"),
    ],
)
def test_tails_of_another_network_are_refused(net, tmp_path: Path, chain: tuple[str, ...], words: str) -> None:
    collapse_tail(net, ring=False)
    net.upsample[0].replaced = chain
    save_packed(net, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load_quantized(tmp_path / "net.safetensors")


def test_without_its_entry_the_network_is_another_one(packed: Path) -> None:
    tensors, metadata = load_file(packed), read_file(packed)[1]
    del metadata["collapsed"]
    save_file(tensors, packed, metadata)
    with pytest.raises(CheckpointError, match=r"does not hold the network it describes:\s+missing: upsample.0.weight"):
        load_quantized(packed)


# -- what a loaded one is used for -----------------------------------------------------------------------------------


def test_on_the_command_line(monkeypatch: pytest.MonkeyPatch, net, tmp_path: Path) -> None:
    save_quantized(net, model := tmp_path / "net.safetensors")
    given = ("export", model, "--format", "packed", "--collapse", "-o")
    said = qsr(monkeypatch, *given, out := tmp_path / "small.safetensors")
    assert "conv_last are one convolution; the outermost 3 pixels of images differ for that" in said
    report = qsr(monkeypatch, "report", out, "--size", "8x8", "--sites")
    costs = complexity(load_quantized(out), (8, 8))
    kernel = next(site for site in costs.sites if site.name == "upsample.0.conv")
    assert kernel.macs == 64 * 25 * 8 * 48 and "upsample.0.conv" in report and "conv_last" not in report
    assert costs.macs == complexity(net, (8, 8)).macs - 64 * 9 * 8 * (32 + 4 * 32 + 16 * 3) + kernel.macs


def test_on_the_command_line_without_a_linear_tail(
    monkeypatch: pytest.MonkeyPatch, tiny_net, images, tmp_path: Path
) -> None:
    save_quantized(
        calibrate(quantize_model(tiny_net("MSRResNet"), "minmax"), images), model := tmp_path / "a.safetensors"
    )
    given = ("export", model, "--format", "packed", "--collapse", "-o", tmp_path / "b.safetensors")
    assert "(LeakyReLU) is not linear" in qsr(monkeypatch, *given, fails=True)
    assert not (tmp_path / "b.safetensors").exists()


def test_exported_for_engines(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra [deploy] is not installed")
    pytest.importorskip("onnxscript", reason="the extra [deploy] is not installed")
    from qsr_plugin.deploy.engine import open_engine
    from qsr_plugin.deploy.onnx_export import export_onnx

    twin = load_quantized(packed)
    assert "tail: collapsed already" in export_onnx(twin, tmp_path / "net.onnx").steps
    image = torch.rand(1, 3, 9, 14, generator=torch.Generator().manual_seed(0)).numpy()
    by_torch, by_onnx = open_engine(packed, threads=1), open_engine(tmp_path / "net.onnx", "onnxruntime", threads=1)
    assert abs(by_torch(image) - by_onnx(image)).mean() <= 1e-4
