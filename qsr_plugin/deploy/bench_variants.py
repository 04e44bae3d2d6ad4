"""What ``qsr bench`` compares: one network, float and quantized, in several engines."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qsr_plugin import compat
from qsr_plugin.checkpoint import key_differences, load_float_weights
from qsr_plugin.deploy.bench_names import (
    CHANNELS_LAST,
    INT8_PLAIN,
    INT8_TAIL,
    NNCF,
    ONNXRUNTIME,
    QUANTIZED,
    REFERENCE,
    TORCH,
)
from qsr_plugin.deploy.comparison import synthetic_images
from qsr_plugin.deploy.engine import Engine, onnx_facts, openvino_session, require
from qsr_plugin.deploy.onnx_export import ExportReport, export_onnx
from qsr_plugin.deploy.signal_stack import same_signal_stack
from qsr_plugin.deploy.tail_bits import TAIL_IMAGES
from qsr_plugin.errors import UserError
from qsr_plugin.quant.surgery import plugin_keys

_TRIED, _CALIBRATED, _IMAGES = 48, (96, 96), 4
_TAIL = "int8_tail"  # kind of a file

Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Opened:
    """A variant that can run.

    Attributes:
        engine: Takes what it can run; see :class:`~qsr_plugin.deploy.engine.Engine`.
        open_run: Opens the same elsewhere; can be pickled.
        file_bytes: Size of its file.
        notes: What was done to the network on the way.
    """

    engine: Engine
    open_run: Callable[[], Run]
    file_bytes: int
    notes: tuple[str, ...] = ()


class Models:
    """The networks of a bench, and the files made of them.

    Args:
        net: Quantized and calibrated.
        float_net: Of the same architecture.
        folder: Where files may be written; not needed any more afterwards.
        threads: Of every engine.
        bits: Width where bits depend on the image, see :func:`~qsr_plugin.deploy.onnx_export.export_onnx`.
        images: (N, 3, h, w) batches that NNCF and 8-bit tails are calibrated on; synthetic ones if there are none.
    """

    def __init__(
        self,
        net: nn.Module,
        float_net: nn.Module,
        folder: Path,
        *,
        threads: int = 1,
        bits: int | None = None,
        images: Sequence[Tensor] = (),
    ) -> None:
        self.net, self.float_net, self.folder = net, float_net.eval(), folder
        self.threads, self.bits, self.images = threads, bits, images
        self._exported: dict[Path, ExportReport] = {}

    def open(self, name: str, size: tuple[int, int]) -> Opened:
        """Make what a variant needs, and open it for images of a size.

        Raises:
            UserError: If it cannot be made, or what it needs is not installed.
        """
        if name in (TORCH, CHANNELS_LAST):
            return self._in_torch(torch.contiguous_format if name == TORCH else torch.channels_last)
        passes, which = name not in (REFERENCE, INT8_PLAIN), "int8" if name in QUANTIZED else "float"
        report = self._export(_TAIL if name == INT8_TAIL else which, passes, size)
        if name == INT8_TAIL and not report.tail_in_bytes:
            raise UserError(next(step for step in reversed(report.steps) if step.startswith("tail: ")))
        path, notes = report.path, tuple(str(report).splitlines()[1:])
        if name == INT8_TAIL and not self.images:
            notes += ("its tail is calibrated on synthetic images",)
        kind, open_session = "openvino", openvino_session
        if name == ONNXRUNTIME:
            kind, open_session = "onnxruntime", _onnxruntime
        elif name == NNCF:
            path, own = self._with_nncf(report)
            notes += own
        open_run = partial(open_session, path, self.threads)
        try:
            engine = Engine(kind, run=open_run(), **onnx_facts(report.path))
        except UserError:
            raise
        except Exception as error:  # the runtimes raise kinds of their own
            raise UserError(f"{kind} cannot run it ({type(error).__name__}: {error})") from error
        files = path.parent.glob(f"{path.stem}.*")  # OpenVINO's own format has two
        return Opened(engine, open_run, sum(file.stat().st_size for file in files), notes)

    def _in_torch(self, memory_format: torch.memory_format) -> Opened:
        path = self.folder / "torch.safetensors"
        save_file({key: value.contiguous().clone() for key, value in self.float_net.state_dict().items()}, path)
        open_run = partial(_torch_of_file, self.float_net.backbone_options, path, memory_format, self.threads)
        run = _torch(deepcopy(self.float_net), memory_format)
        scale = run(np.zeros((1, 3, _TRIED, _TRIED), np.float32)).shape[-1] // _TRIED
        return Opened(Engine(TORCH, scale, run), open_run, path.stat().st_size)

    def _export(self, kind: str, passes: bool, size: tuple[int, int]) -> ExportReport:
        """An ONNX file: one for all sizes if the network allows it, else one for this size."""
        stem = f"{kind}{'' if passes else '_no_passes'}"
        path, own = self.folder / f"{stem}.onnx", self.folder / f"{stem}_{size[0]}x{size[1]}.onnx"
        net, bits = (self.float_net, None) if kind == "float" else (self.net, self.bits)
        how: dict[str, Any] = {"bits": bits, "passes": passes}
        if kind == _TAIL:
            how["tail_images"] = self.images[:TAIL_IMAGES] or synthetic_images(_IMAGES, _CALIBRATED).split(1)
        if path not in self._exported:
            self._exported[path] = export_onnx(net, path, **how)
        if self._exported[path].dynamic:
            return self._exported[path]
        if own not in self._exported:
            self._exported[own] = export_onnx(net, own, size, **how)
        return self._exported[own]

    def _with_nncf(self, report: ExportReport) -> tuple[Path, tuple[str, ...]]:
        """The float file quantized by NNCF, in OpenVINO's own format, and on what."""
        path = self.folder / f"nncf_{report.path.stem}.xml"
        batches, on = [batch.numpy() for batch in self.images], "the images given"
        if not batches or not report.dynamic:
            size = _CALIBRATED if report.dynamic else report.size
            batches, on = [image[None].numpy() for image in synthetic_images(_IMAGES, size)], "synthetic images"
        if not path.exists():
            quantize_with_nncf(report.path, path, batches)
        return path, (f"calibrated on {len(batches)} batches of {on}",)


def quantize_with_nncf(source: Path, target: Path, batches: Sequence[np.ndarray]) -> None:
    """Post-training quantization of a float ONNX file by NNCF, with its mixed preset (unsigned activations).

    Args:
        source: Written by :func:`~qsr_plugin.deploy.onnx_export.export_onnx`.
        target: ``.xml``; a ``.bin`` is written beside it.
        batches: (N, 3, h, w) float32, RGB in [0, 1].

    Raises:
        UserError: If NNCF is not installed, or cannot quantize it.
    """
    try:
        nncf = importlib.import_module("nncf")
    except ImportError:
        raise UserError("not installed: pip install nncf") from None
    openvino = require("openvino")
    how = {"preset": nncf.QuantizationPreset.MIXED, "target_device": nncf.TargetDevice.CPU}
    try:
        model = openvino.Core().read_model(source)
        with same_signal_stack():  # it compiles the model to calibrate it
            made = nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches), **how)
    except Exception as error:  # it raises kinds of its own
        raise UserError(f"NNCF cannot quantize this network ({type(error).__name__}: {error})") from error
    openvino.save_model(made, target, compress_to_fp16=False)


def float_network_of(net: nn.Module, weights: Path | None, source: Path) -> nn.Module:
    """The float network that a quantized one was made from.

    Args:
        net: Quantized, as ``source`` holds it.
        weights: Its float checkpoint. Without it, the weights in the file: the float ones that it was quantized from,
            or in a packed file the quantized ones.
        source: For messages.

    Raises:
        UserError: If the two do not fit, or the network has blocks that the float one has not.
    """
    from qsr_plugin.archs.quant_net_arch import build_backbone

    float_net = build_backbone(net.backbone_options).eval()
    if weights is not None:
        load_float_weights(float_net, weights)
        return float_net
    added = plugin_keys(net)
    state = {key: value for key, value in net.state_dict().items() if key not in added}
    if problems := key_differences(float_net.state_dict(), state):
        raise UserError(
            f"{source}: its float network cannot be made from it ({problems[0]}): blocks were left out of it, or "
            "its tail was collapsed. Give the file it was made from (before qsr slim), or --float WEIGHTS"
        )
    float_net.load_state_dict(state)
    return float_net


def _torch_of_file(backbone: Mapping[str, Any], path: Path, memory_format: torch.memory_format, threads: int) -> Run:
    """The float network in a process of its own: networks with windows cannot be pickled."""
    compat.import_host()
    from qsr_plugin.archs.quant_net_arch import build_backbone

    torch.set_num_threads(threads)
    net = build_backbone(backbone).eval()
    net.load_state_dict(load_file(path))
    return _torch(net, memory_format)


def _torch(net: nn.Module, memory_format: torch.memory_format) -> Run:
    net.to(memory_format=memory_format)

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return net(torch.from_numpy(x).to(memory_format=memory_format)).contiguous().numpy()

    return run


def _onnxruntime(path: Path, threads: int) -> Run:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"image": x})[0]
