"""One call for every engine: equal results, padding, and what is said of files and engines that do not fit."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from qsr_plugin import calibrate, quantize_model, save_quantized
from qsr_plugin.data.borders import pad_to
from qsr_plugin.deploy.engine import Engine, open_engine
from qsr_plugin.deploy.signal_stack import signal_stack
from qsr_plugin.errors import UserError
from tests.deploy.engines import nearest, nearest_engine, small_net, write_onnx

SIZES = [(17, 23), (1, 1), (1, 100), (40, 3)]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, np.float32)


def expected(x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return small_net()(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("kind", ["openvino", "onnxruntime", "torch"])
def test_engines_agree_on_all_sizes(kind: str, tmp_path: Path) -> None:
    if kind != "torch":
        pytest.importorskip("onnx")
        pytest.importorskip(kind)
    source = small_net() if kind == "torch" else write_onnx(tmp_path / "net.onnx")
    engine = open_engine(source, kind, threads=1)
    assert (engine.kind, engine.scale, engine.window, engine.fixed) == (kind, 2, 1, None)
    for size in SIZES:
        x = noise(2, 3, *size)
        out = engine(x)
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, expected(x), atol=1e-5)


def test_openvino_is_the_engine_of_onnx_files(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("openvino")
    first = open_engine(write_onnx(tmp_path / "net.onnx", size=(8, 12)))
    assert first.kind == "openvino" and first.fixed == (8, 12)
    x = noise(3, 3, 8, 12)
    kept = first(x[:1])
    np.testing.assert_allclose(first(x), expected(x), atol=1e-5)
    np.testing.assert_allclose(kept, expected(x[:1]), atol=1e-5)  # a result does not change with the next one


@pytest.mark.parametrize("size", [*SIZES, (8, 16)])
def test_images_are_padded_to_windows(size: tuple[int, int]) -> None:
    shapes: list[tuple[int, ...]] = []
    engine = nearest_engine(3, lambda x: shapes.append(x.shape), window=8)
    x = noise(2, 3, *size)
    np.testing.assert_array_equal(engine(x), nearest(x, 3))
    assert shapes == [(2, 3, *(-(-side // 8) * 8 for side in size))]


def test_padding_mirrors_and_repeats_the_last_pixel_beyond() -> None:
    seen: list[np.ndarray] = []
    x = np.broadcast_to(np.array([1, 2, 3], np.float32), (1, 3, 2, 3))
    nearest_engine(2, seen.append, window=8)(x)
    assert seen[0][0, 0, 7].tolist() == [1, 2, 3, 2, 1, 1, 1, 1]
    inside = noise(1, 3, 5, 9)
    nearest_engine(2, seen.append, window=4)(inside)
    padded = torch.nn.functional.pad(torch.from_numpy(inside), (0, 3, 0, 3), mode="reflect")
    np.testing.assert_array_equal(seen[1], padded.numpy())


@pytest.mark.parametrize("size", [(8, 8), (5, 8), (1, 1), (3, 7), (2, 1)])
def test_padding_is_that_of_the_networks(size: tuple[int, int]) -> None:
    seen: list[np.ndarray] = []
    image = noise(2, 3, *size)
    nearest_engine(watch=seen.append, window=8)(image)
    np.testing.assert_array_equal(seen[0], pad_to(torch.from_numpy(image), 8, 8).numpy())


def test_exported_models_run_without_pytorch(tmp_path: Path) -> None:
    """It takes a second and 200 MB to import, more than tiles of a small network need."""
    pytest.importorskip("onnx")
    pytest.importorskip("openvino")
    cv2.imwrite(str(tmp_path / "in.png"), np.zeros((9, 7, 3), np.uint8))
    names = ("upscale", "in.png", "-o", "out.png", "--model", str(write_onnx(tmp_path / "net.onnx")), "--tile", "8")
    code = (
        "import sys\nfrom qsr_plugin.cli import app\napp(sys.argv[1:], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cv2.imread(str(tmp_path / "out.png")).shape == (18, 14, 3)


def test_a_model_of_fixed_size_gets_this_size_and_one_image() -> None:
    shapes: list[tuple[int, ...]] = []
    engine = nearest_engine(2, lambda x: shapes.append(x.shape), fixed=(8, 12), batches=False)
    x = noise(3, 3, 5, 12)
    np.testing.assert_array_equal(engine(x), nearest(x))
    assert shapes == [(1, 3, 8, 12)] * 3
    with pytest.raises(UserError, match=r"9x12 for a model of fixed size 8x12.*tiles"):
        engine(noise(1, 3, 9, 12))


def test_a_model_of_another_scale_than_it_says_is_told() -> None:
    with pytest.raises(UserError, match=r"scale 3 asks for \(1, 3, 12, 15\)"):
        Engine("torch", 3, nearest)(noise(1, 3, 4, 5))


def test_a_quantized_file_runs_as_the_network(tiny_net, images, tmp_path: Path) -> None:
    net = calibrate(quantize_model(tiny_net("EDSR"), "minmax"), images)
    save_quantized(net.eval(), tmp_path / "net.safetensors")
    engine = open_engine(tmp_path / "net.safetensors")
    with torch.no_grad():
        out = net(images[0].contiguous(memory_format=torch.channels_last)).numpy()
    assert (engine.kind, engine.scale) == ("torch", 2)
    np.testing.assert_allclose(engine(images[0].numpy()), out, atol=1 / 255)


# -- files that are no models ----------------------------------------------------------------------------------------


def test_a_file_of_a_newer_version_is_refused_by_its_version(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    newer = write_onnx(tmp_path / "net.onnx", metadata={"format": 2, "qsr_plugin": "9.1.0"})
    with pytest.raises(UserError, match=r"net.onnx was written by qsr_plugin 9\.1\.0 in format 2.*update"):
        open_engine(newer)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"format": None, "scale": None}, "no metadata 'format'"),
        ({"scale": "x"}, "no metadata 'scale'"),
        ({"window": 0}, "no metadata 'window'"),
        ({"dynamic": 0}, "says it has a fixed size"),
    ],
)
def test_a_foreign_onnx_file_is_refused(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    with pytest.raises(UserError, match=f"net.onnx is .*{said}.*qsr export"):
        open_engine(write_onnx(tmp_path / "net.onnx", metadata=changes))


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("net.onnx", b"<!DOCTYPE html><html>404</html>", "an HTML or XML page"),
        ("net.onnx", b"", "empty"),
        ("net.onnx", b"\x08\x08\xff\xffgarbage" * 9, "no ONNX model .*or a damaged one"),
        ("net.onnx", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("net.pth", b"<html>404</html>", "an HTML or XML page"),
        ("net.safetensors", b"<html>404</html>", "an HTML or XML page"),
        ("net.safetensors", b"", "empty"),
        ("net.ckpt", b"", "empty"),
    ],
)
def test_what_a_wrong_file_is_gets_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    if name.endswith(".onnx"):
        pytest.importorskip("onnx")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is {said}"):
        open_engine(tmp_path / name)


@pytest.mark.parametrize("name", ["net.pt", "net.onnx"])
def test_a_torchscript_file_is_named(name: str, tmp_path: Path) -> None:
    if name.endswith(".onnx"):
        pytest.importorskip("onnx")
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("net/code/__torch__.py", "")
    with pytest.raises(UserError, match=f"{name} is a TorchScript program"):
        open_engine(tmp_path / name)


@pytest.mark.parametrize("name", ["net.onnx", "net.safetensors"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{name} (does not exist|is not there)"):
        open_engine(tmp_path / name)


def test_float_weights_are_refused_with_the_next_step(tmp_path: Path) -> None:
    torch.save(small_net().state_dict(), tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"net.pth.*quantize"):
        open_engine(tmp_path / "net.pth")


# -- engines that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["openvino", "onnxruntime"])
def test_a_missing_extra_is_named_on_use(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    path = write_onnx(tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(
        UserError,
        match=rf"{kind} is needed.*install the extra 'deploy', for example pip install -e \"\.\[deploy\]\" in the folder",
    ):
        open_engine(path, kind)


def test_a_missing_onnx_is_named_on_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "net.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"onnx is needed.*install the extra 'deploy'"):
        open_engine(tmp_path / "net.onnx")


def test_engines_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'openvino'"):
        open_engine(small_net(), "openvin")
    with pytest.raises(UserError, match="'openvino' does not run Sequential, which needs torch.*qsr export"):
        open_engine(small_net(), "openvino")
    with pytest.raises(UserError, match="'torch' does not run .*net.onnx, which needs openvino or onnxruntime"):
        open_engine(tmp_path / "net.onnx", "torch")
    with pytest.raises(UserError, match="'openvino' runs on the CPU here, device is 'cuda'"):
        open_engine(tmp_path / "net.onnx", device="cuda")
    with pytest.raises(UserError, match="device is 'warp', which cannot be used here"):
        open_engine(small_net(), device="warp")


def test_a_network_that_enlarges_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"Conv2d makes \(1, 4, 48, 48\) of an image"):
        open_engine(nn.Conv2d(3, 4, 1))


def test_a_model_that_a_runtime_cannot_run_is_named(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = write_onnx(tmp_path / "net.onnx")
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    with pytest.raises(UserError, match=r"net.onnx: onnxruntime cannot run it \(.*NoSuchOperator"):
        open_engine(path, "onnxruntime")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="alternate signal stacks are looked at on Linux")
def test_opening_a_model_leaves_the_signal_stack_alone(tmp_path: Path) -> None:
    """OpenVINO leaves a small one, on which Python's signal handlers overflow as soon as a worker process ends."""
    pytest.importorskip("openvino", reason="the extra [deploy] is not installed")
    before = signal_stack()
    engine = open_engine(write_onnx(tmp_path / "net.onnx"), "openvino")
    engine(noise(1, 3, 5, 6))
    assert signal_stack() == before
