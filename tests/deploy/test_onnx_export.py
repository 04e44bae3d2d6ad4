"""Exported models in real engines against PyTorch, and what cannot be exported."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from qsr_plugin.archs.quant_net_arch import build_backbone
from qsr_plugin.archs.roles import list_backbones
from torch import nn

import qsr_plugin
from qsr_plugin import calibrate, load_recipe, quantize_model
from qsr_plugin.data.borders import pad_to
from qsr_plugin.deploy.comparison import Agreement, _Forced, synthetic_images
from qsr_plugin.deploy.engine import Engine, open_engine
from qsr_plugin.deploy.lowering import LoweringError, lower
from qsr_plugin.deploy.onnx_export import ExportError, ExportReport, export_onnx
from qsr_plugin.errors import UserError

onnx = pytest.importorskip("onnx", reason="the extra [deploy] is not installed")
pytest.importorskip("onnxscript", reason="the extra [deploy] is not installed")
pytest.importorskip("onnxruntime", reason="the extra [deploy] is not installed")
pytest.importorskip("openvino", reason="the extra [deploy] is not installed")

EDSR = {"num_feat": 16, "num_block": 2, "upscale": 4}
SIZES = [(16, 16), (17, 23), (5, 40), (31, 8), (3, 4)]


def quantized(net: nn.Module, method: str, bits: int, images: list[torch.Tensor], **changes: object) -> nn.Module:
    return calibrate(
        quantize_model(deepcopy(net), load_recipe(method, weight_bits=bits, act_bits=bits, **changes)), images
    )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * np.log10(max(float(np.square(a.astype(np.float64) - b).mean()), 1e-20))


def output(net: nn.Module, image: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return net(torch.from_numpy(image)).numpy()


def kinds_of(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.fixture
def edsr(tiny_net) -> nn.Module:
    torch.manual_seed(0)
    return tiny_net("EDSR", **EDSR)


@pytest.fixture(scope="module")
def exported(
    tiny_net: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[nn.Module, ExportReport]]:
    """A quantized EDSR and what its export says, each made once: ``exported("auto", 8, signed=True)``."""
    images = list(torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3)).split(2))

    @cache
    def make(method: str, bits: int, **how: bool) -> tuple[nn.Module, ExportReport]:
        net = quantized(tiny_net("EDSR", **EDSR), method, bits, images)
        return net, export_onnx(net, tmp_path_factory.mktemp("exported") / "net.onnx", (12, 20), **how)

    return make


@pytest.mark.parametrize(
    ("method", "bits"),
    [("auto", 2), ("auto", 4), ("auto", 8), ("percentile", 8), ("percentile", 3), ("quantsr", 2), ("odm", 5)],
)
def test_two_engines_give_what_pytorch_gives(exported, method: str, bits: int) -> None:
    """At five sizes, any but the traced one: mean difference to the quantized network at most 1e-4 (in [0, 1])."""
    net, report = exported(method, bits)
    assert report.dynamic and report.float_layers == () and report.bytes == report.path.stat().st_size
    assert report.agreement.quantizers == 4 and report.agreement.identical == 1 and "one 5x5 convolution" in str(report)
    engines = [open_engine(report.path, kind, threads=1) for kind in ("onnxruntime", "openvino")]
    for size in SIZES:
        image = synthetic_images(2, size).numpy()
        wanted = output(net, image)
        for engine in engines:
            difference = np.abs(engine(image) - wanted)
            assert difference.mean() <= 1e-4 and difference.max() <= 1 / 255, size
    assert engines[0].scale == 4 and engines[0].fixed is None


def test_low_bits_are_carried_by_bytes(edsr, images, tmp_path: Path) -> None:
    """3 bits: codes 0..7 of a byte, weights -4..3; the collapsed tail is the only float convolution beside the first."""
    export_onnx(quantized(edsr, "auto", 3, images, fragile=None), path := tmp_path / "net.onnx")
    graph = onnx.load(path).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = [
        arrays[node.input[0]] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in arrays
    ]
    assert len(weights) == 4 and all(w.dtype == np.int8 and w.min() >= -4 and w.max() <= 3 for w in weights)
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            scale, zero = (arrays[name] for name in node.input[1:3])
            clip = next(one for one in graph.node if node.input[0] in one.output)
            low, high = (arrays[name] for name in clip.input[1:3])
            assert zero.dtype == np.uint8 and zero <= 7 and round(float((high - low) / scale)) <= 7


@pytest.mark.parametrize(("method", "bits"), [("auto", 4), ("auto", 8), ("percentile", 8), ("quantsr", 2)])
def test_signed_bytes_around_zero(exported, method: str, bits: int) -> None:
    """As TensorRT reads them: int8 with zero point 0 everywhere; the same network."""
    (net, plain), (_, signed) = exported(method, bits), exported(method, bits, signed=True)
    assert signed.agreement.holds and signed.agreement.quantizers == plain.agreement.quantizers
    graph = onnx.load(signed.path).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    zeros = [arrays[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(zeros) == 4 and all(zero.dtype == np.int8 and zero == 0 for zero in zeros)
    image = synthetic_images(1, (13, 18)).numpy()
    results = [
        open_engine(path, kind)(image) for path in (plain.path, signed.path) for kind in ("onnxruntime", "openvino")
    ]
    for result in results:
        assert psnr(result, output(net, image)) > 45


def test_more_than_8_bits_have_no_signed_carrier(edsr, images, tmp_path: Path) -> None:
    net = quantized(edsr, "percentile", 10, images)
    report = export_onnx(net, tmp_path / "net.onnx", signed=True)
    assert report.agreement.holds and report.agreement.quantizers == 0
    image = synthetic_images(1, (13, 18)).numpy()
    assert psnr(open_engine(tmp_path / "net.onnx")(image), output(net, image)) > 60


def test_long_steps_are_told_when_they_begin(edsr, images, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="qsr_plugin"):
        export_onnx(quantized(edsr, "minmax", 8, images), tmp_path / "net.onnx")
    told = [record.message for record in caplog.records if record.message.startswith(("tracing", "comparing"))]
    assert told == [
        "tracing this EDSR for any number of images of any size; large networks take minutes",
        "comparing the result with PyTorch",
    ]


def test_what_a_reader_needs_is_in_the_file(exported) -> None:
    net, report = exported("auto", 4)
    told = {entry.key: entry.value for entry in onnx.load(report.path).metadata_props}
    assert told["qsr_plugin"] == qsr_plugin.__version__ and told["format"] == "1"
    assert (told["scale"], told["window"], told["minimum"], told["dynamic"]) == ("4", "1", "3", "1")
    assert json.loads(told["recipe"]) == net.recipe.to_dict() and json.loads(told["backbone"])["type"] == "EDSR"


@pytest.mark.parametrize(("method", "passes"), [("auto", True), ("auto", False), ("minmax", True)])
def test_quantized_before_the_shuffle(tiny_net, images, tmp_path: Path, method: str, passes: bool) -> None:
    """Convolutions behind two pixel shuffles read bytes that these moved; a grid with a shift reads floats."""
    net = quantized(tiny_net("EDSR", upscale=4), method, 8, images, placement="full")
    report = export_onnx(net, path := tmp_path / "net.onnx", passes=passes)
    row = kinds_of(path)
    moved = [row[at - 2 : at + 2] == ["Clip", "QuantizeLinear", "DepthToSpace", "DequantizeLinear"]
             for at, kind in enumerate(row) if kind == "DepthToSpace"]  # fmt: skip
    assert moved == [passes and method == "auto"] * 2
    assert ("before the pixel shuffle: 2 place(s)" in str(report)) == moved[0]
    assert report.agreement.holds and report.agreement.quantizers == 9
    image = synthetic_images(1, (9, 14)).numpy()
    assert psnr(open_engine(path)(image), output(net, image)) > 45


def test_wider_grids_stay_behind_the_shuffle(tiny_net, images, tmp_path: Path) -> None:
    """As ``auto`` gives 16 bits to fragile inputs: the last convolution's is behind the second of two shuffles."""
    rules = load_recipe("auto").placements["full"]
    wide = [*rules, {"role": "tail", "port": "input", "bits": 16}]
    net = quantized(tiny_net("EDSR", upscale=4), "auto", 8, images, placement="wide", placements={"wide": wide})
    report = export_onnx(net, path := tmp_path / "net.onnx")
    assert report.agreement.holds and "before the pixel shuffle: 1 place(s)" in str(report)
    row = kinds_of(path)
    before = [row[at - 1] for at, kind in enumerate(row) if kind == "DepthToSpace"]
    assert before[0] == "QuantizeLinear" and before[1] != "QuantizeLinear"
    image = synthetic_images(1, (9, 14)).numpy()
    for kind in ("onnxruntime", "openvino"):
        assert psnr(open_engine(path, kind)(image), output(net, image)) > 45


@pytest.mark.parametrize(("method", "bits", "told"), [("minmax", 8, True), ("minmax", 4, False), ("auto", 8, False)])
def test_weights_that_take_a_further_sum_are_told(exported, method: str, bits: int, told: bool) -> None:
    _, report = exported(method, bits)
    assert ("no level at zero and no room for one in 8 bits" in str(report)) == told


def test_without_passes_the_network_is_as_it_is(exported) -> None:
    _, report = exported("auto", 8, passes=False)
    data = report.path.read_bytes()
    assert b"site-packages" not in data and str(Path(qsr_plugin.__file__).parent).encode() not in data
    assert report.steps == () and kinds_of(report.path).count("DepthToSpace") == 2


def test_a_float_network(edsr, tmp_path: Path) -> None:
    report = export_onnx(edsr, path := tmp_path / "net.onnx")
    assert report.agreement.quantizers == 0 and "QuantizeLinear" not in kinds_of(path)
    image = synthetic_images(1, (13, 9)).numpy()
    assert np.abs(open_engine(path)(image) - output(edsr, image)).max() < 1e-4


def test_windows_of_attention(tiny_net, images, tmp_path: Path) -> None:
    """The engine pads to whole windows as the network does by itself."""
    float_net = tiny_net("SwinIR", depths=[1], num_heads=[2])
    net = quantized(float_net, "2dquant", 8, images)
    report = export_onnx(net, path := tmp_path / "net.onnx", (8, 11))
    assert report.multiple == 4 and report.size == (8, 12) and "multiples of 4" in str(report)
    engine: Engine = open_engine(path, threads=1)
    assert engine.window == 4
    for size in ((8, 8), (9, 14), (1, 5)):
        image = synthetic_images(1, size).numpy()
        assert engine(image).shape[2:] == (2 * size[0], 2 * size[1])
        assert psnr(engine(image), output(net, image)) > 45


@pytest.mark.parametrize("backbone", list_backbones())
def test_every_backbone_takes_any_size(tiny_net, images, tmp_path: Path, backbone: str) -> None:
    """Of a tall and of a wide image as much as of the one that was traced, in both engines."""
    net = quantized(tiny_net(backbone, num_block=1), "percentile", 8, images)
    report = export_onnx(net, path := tmp_path / "net.onnx")
    assert report.dynamic and report.agreement.holds and "pixels only" not in str(report)
    for kind in ("onnxruntime", "openvino"):
        engine = open_engine(path, kind, threads=1)
        for size in ((21, 9), (7, 26)):
            image = synthetic_images(1, size).numpy()
            assert psnr(engine(image), output(net, image)) > 40


def test_small_images_that_a_network_treats_otherwise(tiny_net, images, tmp_path: Path) -> None:
    """Attention that extends features of less than 15 pixels: the file says so, and engines pad such images."""
    net = quantized(
        build_backbone({"type": "RLFN_qsr", "num_feat": 8, "num_block": 1, "esa_channels": 4}).eval(),
        "percentile",
        8,
        images,
    )
    report = export_onnx(net, path := tmp_path / "net.onnx")
    assert report.dynamic and 15 <= report.minimum <= 19 and f"from {report.minimum} pixels" in str(report)
    for kind in ("openvino", "onnxruntime"):
        engine = open_engine(path, kind, threads=1)
        assert engine.minimum == report.minimum
        large = synthetic_images(1, (21, 30)).numpy()
        before = engine(large)
        for size in ((1, 1), (14, 14), (3, 40)):
            image = synthetic_images(1, size).numpy()
            wanted = output(net, pad_to(torch.from_numpy(image), *(max(side, report.minimum) for side in size)).numpy())
            assert psnr(engine(image), wanted[..., : 4 * size[0], : 4 * size[1]]) > 40
        np.testing.assert_array_equal(engine(large), before)  # nothing is left of the small ones


def test_bits_by_content_are_exported_at_one_width_on_request(edsr, images, tmp_path: Path) -> None:
    net = calibrate(quantize_model(edsr, load_recipe("cadyq")), images)
    with pytest.raises(LoweringError, match=r"one of \[4, 6, 8\].*another network.*'auto'"):
        export_onnx(net, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
    export_onnx(net, path := tmp_path / "net.onnx", bits=8)
    image = synthetic_images(1, (16, 16)).numpy()
    assert psnr(open_engine(path, "onnxruntime")(image), output(lower(net, bits=8), image)) > 60


@pytest.mark.parametrize("method", ["fqsr", "minmax", "dorefa"])
def test_grids_without_a_zero_level(tiny_net, images, tmp_path: Path, method: str) -> None:
    """Enough values that some lie on a rounding border; places behind sums and outputs are compared as well."""
    net = quantized(tiny_net("EDSR", num_feat=24), method, 8, images)
    report = export_onnx(net, path := tmp_path / "net.onnx")
    assert report.agreement.holds and report.agreement.openvino > 40
    image = synthetic_images(2, (20, 31)).numpy()
    assert psnr(open_engine(path)(image), output(net, image)) > 40


def test_what_is_not_finite_or_missing_does_not_agree() -> None:
    forced = _Forced([(torch.zeros(1), torch.zeros(1))])
    forced.agree(torch.zeros(3), torch.tensor([math.nan, 0.0, 0.0]))
    assert forced.apart == math.inf
    fewer = _Forced([(torch.zeros(1), torch.zeros(1))])
    fewer.finish()
    assert fewer.apart == math.inf and not Agreement(1, 1.0, 0, 0.0, math.nan).holds


def test_outputs_that_are_apart_while_all_codes_agree_are_explained() -> None:
    told = [str(Agreement(4, identical, 0, 1e-6, psnr)) for identical, psnr in ((1.0, 35.0), (1.0, 45.0), (0.9, 35.0))]
    assert ["'qsr bench --test HR LR' shows whether scores differ" in text for text in told] == [True, False, False]


@pytest.mark.parametrize("method", ["daq", "linq"])
def test_what_is_not_uniform_is_refused_before_work(edsr, images, tmp_path: Path, method: str) -> None:
    with pytest.raises(LoweringError, match=r"body\.0.*not uniform.*'auto'"):
        export_onnx(quantized(edsr, method, 4, images), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_bad_places(edsr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"end in \.onnx"):
        export_onnx(edsr, tmp_path / "net.bin")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        export_onnx(edsr, tmp_path / "file" / "net.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnxscript is needed.*extra 'deploy'"):
        export_onnx(edsr, tmp_path / "net.onnx")


def test_a_model_that_disagrees_is_not_written(exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, report = exported("auto", 8)
    monkeypatch.setattr("qsr_plugin.deploy.onnx_export._exported", lambda *_: onnx.load(report.path))
    monkeypatch.setattr("qsr_plugin.deploy.onnx_export.compare", lambda *_: Agreement(4, 0.98, 2, 0.5, 20.0))
    with pytest.raises(ExportError, match="98.0000%"):
        export_onnx(net, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sides", [(9, 13)])
def test_a_network_that_takes_one_size(edsr, images, tmp_path: Path, sides: tuple[int, int]) -> None:
    class Sized(nn.Module):
        """Adds a constant image."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.extra = edsr, nn.Parameter(torch.rand(3, 4 * sides[0], 4 * sides[1]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) + self.extra

    net = Sized().eval()
    report = export_onnx(net, path := tmp_path / "net.onnx", sides)
    assert not report.dynamic and f"{sides[0]}x{sides[1]} pixels only" in str(report)
    engine = open_engine(path)
    image = synthetic_images(1, sides).numpy()
    assert engine.fixed == sides and np.abs(engine(image) - output(net, image)).max() < 1e-4


class Enlarging(nn.Module):
    """An engine as a module, for the functions that score one."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.engine(x.numpy()))


@pytest.mark.skipif("QSR_DATA" not in os.environ, reason="QSR_DATA is not set: needs Set5 and weights/srresnet_x4.pth")
def test_srresnet_on_set5_is_the_same_in_openvino(tmp_path: Path) -> None:
    """Mean PSNR within 0.02 dB, the worst image within 0.05: 4 bits between percentiles, real weights."""
    from qsr_plugin.archs.quant_net_arch import build_backbone

    from qsr_plugin.checkpoint import load_float_weights
    from qsr_plugin.report.evaluate import evaluate

    data = Path(os.environ["QSR_DATA"])
    float_net = build_backbone({"type": "SRResNet", "bias": True, "bn_eps": 1e-3, "output": "tanh"})
    load_float_weights(float_net, data / "weights" / "srresnet_x4.pth")
    net = quantize_model(float_net.eval(), load_recipe("percentile", weight_bits=4, act_bits=4))
    calibrate(net, data / "Set5" / "LRbicx4")
    export_onnx(net, path := tmp_path / "net.onnx")
    folders = data / "Set5" / "HR", data / "Set5" / "LRbicx4"
    wanted, got = (evaluate(one, *folders, 4) for one in (net, Enlarging(open_engine(path))))
    assert abs(wanted.psnr - got.psnr) < 0.02
    assert all(abs(a.psnr - b.psnr) < 0.05 for a, b in zip(wanted.images, got.images))
