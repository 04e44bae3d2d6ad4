"""``qsr export`` in this process: what it writes, prints and refuses before it works."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from safetensors.torch import save_file
from typer.testing import CliRunner

import qsr_plugin
from qsr_plugin import cli, load_quantized
from qsr_plugin.checkpoint import load_float_weights
from tests.backbones import TINY


def qsr(monkeypatch: pytest.MonkeyPatch, *arguments: object, fails: bool = False) -> str:
    """What a command says on a wide terminal, in one line."""
    monkeypatch.setattr(cli.console, "_width", 160)
    monkeypatch.setenv("COLUMNS", "200")
    with cli.console.capture() as said:
        done = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert (done.exit_code != 0) == fails, done.output + str(done.exception)
    return " ".join(f"{said.get()} {done.output} {done.exception or ''}".replace("│", " ").split())


def test_packed(monkeypatch, model: Path, images, tmp_path: Path) -> None:
    out = tmp_path / "made" / "small.safetensors"
    said = qsr(monkeypatch, "export", model, "-o", out, "--format", "packed")
    with torch.no_grad():
        assert torch.equal(load_quantized(out)(images[0]), load_quantized(model)(images[0]))
    figures = f"{out.stat().st_size / 1000:.4g} kB", f"{model.stat().st_size / 1000:.4g} kB"
    assert all(figure in said for figure in figures) and "in theory" in said and "8.00 x" in said
    assert f"wrote {out}" in said and "not packed" not in said
    half = qsr(monkeypatch, "export", model, "-o", tmp_path / "half.safetensors", "--format", "packed", "--half")
    assert "float layers, in 16 bits" in half
    assert (tmp_path / "half.safetensors").stat().st_size < out.stat().st_size


def test_report_of_a_packed_file(monkeypatch, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    qsr(monkeypatch, "export", model, "-o", out, "--format", "packed")
    size = ("--size", "8x8", "--sites")
    assert qsr(monkeypatch, "report", out, *size) == qsr(monkeypatch, "report", model, *size)


def test_plain(monkeypatch, model: Path, tmp_path: Path) -> None:
    said = qsr(monkeypatch, "export", model, "-o", tmp_path / "plain.pth", "--format", "plain")
    assert "activations are not quantized in it" in said and "tensors of EDSR" in said
    assert load_float_weights(EDSR(**TINY), tmp_path / "plain.pth") > 0


def test_onnx_is_given_what_was_asked_for(monkeypatch, model: Path, tmp_path: Path) -> None:
    seen: list[tuple] = []

    def export_onnx(net: torch.nn.Module, path: Path, input_size: object = None, **others: object) -> SimpleNamespace:
        seen.append((net.recipe.method, path, input_size, others))
        return type("Report", (), {"__str__": lambda self: "one [line]\nanother"})()

    monkeypatch.setitem(vars(qsr_plugin), "export_onnx", export_onnx)
    out = tmp_path / "net.onnx"
    said = qsr(monkeypatch, "export", model, "-o", out, "--format", "onnx", "--input-size", 24, 32, "--bits", 6)
    assert seen == [("pams", out, (24, 32), {"bits": 6, "tail_images": None, "signed": False})]
    assert "one [line] another" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "x.onnx", "--format", "packed"), "'x.onnx': --format packed writes .safetensors files"),
        (("-o", "x.pth", "--format", "onnx"), "'x.pth': --format onnx writes .onnx files"),
        (("-o", "x.onnx", "--format", "plain"), "--format plain writes .pth or .safetensors files"),
        (("-o", "x.pth", "--format", "plain", "--half"), "--half belongs to --format packed"),
        (("-o", "x.onnx", "--format", "onnx", "--collapse"), "--collapse belongs to --format packed"),
        (("-o", "x.pth", "--format", "plain", "--input-size", "8", "8"), "--input-size belongs to --format onnx"),
        (("-o", "x.safetensors", "--format", "packed", "--bits", "8"), "--bits belongs to --format onnx"),
        (("-o", "x.pth", "--format", "plain", "--tail-images", "."), "--tail-images belongs to --format onnx"),
        (("-o", "x.pth", "--format", "plain", "--signed"), "--signed belongs to --format onnx"),
        (("-o", "x.onnx", "--format", "onnx", "--tail-images", "."), "looked for *.bmp, *.jpeg"),
        (("-o", "x.onnx", "--format", "onnx", "--input-size", "8", "0"), "--input-size is 8 0"),
        (("-o", "net.safetensors", "--format", "packed"), "is the file to export: choose another name"),
        (("-o", "x.bin", "--format", "tflite"), "'tflite' is not one of"),
    ],
)
def test_options_that_do_not_fit(monkeypatch, model: Path, arguments: tuple, message: str) -> None:
    monkeypatch.chdir(model.parent)
    assert message in qsr(monkeypatch, "export", model, *arguments, fails=True)
    assert [path.name for path in model.parent.iterdir()] == ["net.safetensors"]


def test_an_interrupted_export_says_so(monkeypatch, model: Path, tmp_path: Path) -> None:
    def interrupted(*given: object, **others: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(qsr_plugin, "export_onnx", interrupted)
    out = tmp_path / "net.onnx"
    assert f"interrupted: {out} is not written" in qsr(
        monkeypatch, "export", model, "-o", out, "--format", "onnx", fails=True
    )
    assert not out.exists()


def test_a_float_checkpoint_is_no_quantized_one(monkeypatch, tiny_net, tmp_path: Path) -> None:
    save_file(tiny_net().state_dict(), tmp_path / "float.safetensors")
    given = ("export", tmp_path / "float.safetensors", "-o", tmp_path / "out.pth", "--format", "plain")
    assert "has no recipe in it: it was not written by save_quantized" in qsr(monkeypatch, *given, fails=True)
    assert not (tmp_path / "out.pth").exists()


def test_what_is_no_quantized_file_is_named_before_anything_is_imported(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qsr_plugin.checkpoint.read_file", lambda path: pytest.fail("the model was read first"))
    for command in (("report",), ("export", "-o", tmp_path / "a.onnx", "--format", "onnx")):
        said = qsr(monkeypatch, *command, tmp_path / "net.onnx", fails=True)
        assert "give the .safetensors that it was made from" in said
    said = qsr(monkeypatch, *command, tmp_path / "nope.safetensors", fails=True)
    assert "nope.safetensors' is not there" in said


@pytest.mark.parametrize("kind", ["a file", "read-only"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_read(
    monkeypatch, model: Path, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "out"
    if kind == "a file":
        folder.write_text("not a folder")
    else:
        folder.mkdir(mode=0o500)
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write into read-only folders")
    monkeypatch.setattr("qsr_plugin.checkpoint.read_file", lambda path: pytest.fail("the model was read first"))
    said = qsr(monkeypatch, "export", model, "-o", folder / "x.safetensors", "--format", "packed", fails=True)
    assert "cannot write" in said and "Choose a folder you may write to" in said
