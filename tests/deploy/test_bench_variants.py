"""Variants of ``qsr bench``: how they are made, the memory they take, and what a failing one leaves of the others."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from qsr_plugin import calibrate, load_quantized, load_recipe, quantize_model, slim
from qsr_plugin.checkpoint import save_torch
from qsr_plugin.deploy import bench as work
from qsr_plugin.deploy import bench_memory, bench_variants
from qsr_plugin.deploy.bench_names import REFERENCE, VARIANTS
from qsr_plugin.deploy.bench_rows import Protocol
from qsr_plugin.deploy.bench_variants import Models, float_network_of
from qsr_plugin.deploy.packed import save_packed
from qsr_plugin.errors import UserError
from tests.deploy.engines import nearest_engine
from tests.recipes import equal


def stub_nncf() -> ModuleType:
    """What is called of NNCF; the model stays as it is."""
    nncf = ModuleType("nncf")
    nncf.QuantizationPreset = SimpleNamespace(MIXED="mixed")
    nncf.TargetDevice = SimpleNamespace(CPU="cpu")
    nncf.Dataset, nncf.calls = list, []

    def quantize(model: object, data: list[np.ndarray], **how: object) -> object:
        nncf.calls.append(([batch.shape for batch in data], how))
        return model

    nncf.quantize = quantize
    return nncf


def test_nncf_quantizes_the_float_file_after_the_passes(monkeypatch, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    nncf = stub_nncf()
    monkeypatch.setitem(sys.modules, "nncf", nncf)
    net = load_quantized(model)
    models = Models(net, float_network_of(net, None, model), tmp_path / "files", images=[torch.rand(1, 3, 20, 24)])
    opened = models.open("nncf", (12, 16))
    models.open("nncf", (8, 8))
    how = {"subset_size": 1, "preset": "mixed", "target_device": "cpu"}
    assert nncf.calls == [([(1, 3, 20, 24)], how)]  # once for all sizes
    assert opened.notes[-1] == "calibrated on 1 batches of the images given"
    assert any("tail" in note for note in opened.notes) and "after the exact passes" in VARIANTS["nncf"]
    x = np.random.default_rng(0).random((1, 3, 12, 16), np.float32)
    float_file = models.open("openvino-float-passes", (12, 16))
    np.testing.assert_allclose(opened.engine(x), float_file.engine(x), atol=1e-5)
    assert opened.file_bytes > 1000

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no pattern for this operator")

    nncf.quantize = fails
    with pytest.raises(UserError, match="NNCF cannot quantize this network .RuntimeError: no pattern"):
        bench_variants.quantize_with_nncf(tmp_path / "files" / "float.onnx", tmp_path / "made.xml", [x])


def test_memory_is_that_of_another_process(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    net = load_quantized(model)
    models = Models(net, float_network_of(net, None, model), tmp_path)
    opened = models.open("torch", (16, 16))
    taken = bench_memory.memory_of(opened.open_run, np.zeros((1, 3, 512, 512), np.float32))
    maps = 8 * 4 * 1024 * 1024  # bytes of one at output size
    assert 2 * maps < taken < 20 * maps


def test_memory_of_a_network_with_windows(tiny_net, images, tmp_path: Path) -> None:
    """Its class, which pads, cannot be pickled: the child builds it anew."""
    net = calibrate(quantize_model(tiny_net("SwinIR"), equal("pams", 4)), images)
    opened = Models(net, float_network_of(net, None, tmp_path), tmp_path).open("torch", (9, 11))
    x = np.random.default_rng(0).random((1, 3, 9, 11), np.float32)
    np.testing.assert_array_equal(opened.open_run()(x), opened.engine(x))
    assert bench_memory.memory_of(opened.open_run, np.zeros((1, 3, 128, 128), np.float32)) > 2**20


@pytest.mark.parametrize(
    ("open_run", "said"),
    [
        (partial(os._exit, 3), "the process was ended"),
        (lambda: None, "pickle"),
        (partial(int, "no number"), "ValueError: invalid literal"),
    ],
)
def test_what_can_happen_to_a_child(open_run: Callable, said: str) -> None:
    with pytest.raises(UserError, match=said):
        bench_memory.memory_of(open_run, np.zeros(1))


def test_a_child_that_dies_is_a_note(monkeypatch, model: Path) -> None:
    monkeypatch.setattr(work, "memory_of", lambda *_: (_ for _ in ()).throw(UserError("the process was ended")))
    opened = {REFERENCE: nearest_engine(), "torch": nearest_engine()}

    class Two(Models):
        def open(self, name: str, size: tuple[int, int]) -> bench_variants.Opened:
            return bench_variants.Opened(opened[name], lambda: None, 1)

    net = load_quantized(model)
    before = torch.get_num_threads()
    rows = work.bench(
        Two(net, float_network_of(net, None, model), model.parent),
        [REFERENCE, "torch"],
        Protocol(((8, 8),), before + 1, rounds=1, seconds=0.0),
        memory=True,
    )
    assert torch.get_num_threads() == before
    assert [row.note for row in rows] == ["memory at 8x8 is not known: the process was ended"] * 2
    assert all(row.speeds for row in rows)


def test_float_networks(model: Path, tiny_net, images, tmp_path: Path) -> None:
    """Master weights of the file, those of a float checkpoint, or the quantized ones of a packed file."""
    net, plain = load_quantized(model), tiny_net()
    with torch.no_grad():
        wanted = plain(images[0])
        assert torch.equal(float_network_of(net, None, model)(images[0]), wanted)
        save_packed(net, tmp_path / "packed.safetensors")
        packed = load_quantized(tmp_path / "packed.safetensors")
        assert not torch.equal(float_network_of(packed, None, model)(images[0]), wanted)
        save_torch({"params": plain.state_dict()}, tmp_path / "float.pth")
        assert torch.equal(float_network_of(packed, tmp_path / "float.pth", model)(images[0]), wanted)


def test_a_slimmed_network_has_no_float_form(tiny_net, images, tmp_path: Path) -> None:
    recipe = load_recipe("quantsr", weight_bits=4, act_bits=4)
    small = slim(calibrate(quantize_model(tiny_net(num_block=2), recipe), images), 1)
    with pytest.raises(UserError, match="blocks were left out.*before qsr slim"):
        float_network_of(small, None, Path("small.safetensors"))


def test_a_variant_that_cannot_be_made_is_a_row_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tiny_net, images, tmp_path: Path
) -> None:
    """Bits by content: refused without a width, exported at the one given."""
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")

    class WithReference(Models):
        def open(self, name: str, size: tuple[int, int]) -> bench_variants.Opened:
            fixed = bench_variants.Opened(nearest_engine(), lambda: None, 1)
            return fixed if name == REFERENCE else super().open(name, size)

    net = calibrate(quantize_model(tiny_net(), load_recipe("adabm", weight_bits=4, act_bits=4)), images)
    models = WithReference(net, float_network_of(net, None, tmp_path), tmp_path)
    protocol = Protocol(((8, 8),), rounds=1, seconds=0.0)
    rows = work.bench(models, work.check_variants(["torch", "openvino-int8"]), protocol)
    assert [bool(row.speeds) for row in rows] == [True, True, False]
    assert "bits depend on the image" in rows[2].note and "--bits" in rows[2].note

    def export_onnx(net: torch.nn.Module, path: Path, **options: object) -> None:
        raise UserError(f"asked for {options}")

    monkeypatch.setattr(bench_variants, "export_onnx", export_onnx)
    models.bits = 6
    with pytest.raises(UserError, match="asked for {'bits': 6, 'passes': True}"):
        models.open("openvino-int8", (8, 8))


def test_a_tail_that_is_not_collapsed_has_no_row_in_8_bits(tiny_net, images, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    net = calibrate(quantize_model(tiny_net("SRResNet"), equal("pams", 4)), images)
    models = Models(net, float_network_of(net, None, tmp_path), tmp_path)
    with pytest.raises(UserError, match="tail: not collapsed: .*; so no tail can compute in 8 bits"):
        models.open("openvino-int8-tail", (12, 12))
