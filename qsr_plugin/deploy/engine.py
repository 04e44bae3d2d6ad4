"""Engines: one call that enlarges a batch of images, whatever runs the network behind it.

OpenVINO is the fast one on CPUs. ONNX Runtime runs with its graph optimisations off and checks the others: it executes
the file as it is written. PyTorch runs quantized networks as they were trained, and all whose bits depend on the image.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from qsr_plugin import __version__
from qsr_plugin.deploy.context import measured_reach
from qsr_plugin.deploy.signal_stack import same_signal_stack
from qsr_plugin.errors import UserError, first_line, suggest
from qsr_plugin.foreign_files import ONNX, foreign_kind

if TYPE_CHECKING:
    from torch import nn

KINDS = ("openvino", "onnxruntime", "torch")
#: Layout of the metadata in exported ONNX files that this version reads.
FORMAT = 1
#: Numbers that the metadata must have, with their least values.
_METADATA = {"format": 1, "scale": 1, "window": 1, "minimum": 1, "dynamic": 0, "batches": 0}
_INPUT, _OUTPUT = "image", "upscaled"


@dataclass(frozen=True)
class Engine:
    """Enlarges batches of images.

    Attributes:
        kind: One of :data:`KINDS`.
        scale: Upsampling factor.
        run: The network behind it: (N, 3, H, W) float32 to (N, 3, scale H, scale W), of sizes that it can take.
        window: Both sides of what ``run`` gets are a multiple of it,
        minimum: and not shorter than this.
        fixed: Height and width of what ``run`` gets; ``None`` where it takes all sizes.
        batches: Whether ``run`` takes several images at a time.
        device: Where it runs, as PyTorch writes it.
        pixel_bytes: Bytes of the largest layer's input and output, per pixel of the input; ``None`` if not known.
        shallower: Networks of fewer blocks, the least first, that tiles with few edges go to; see
            :mod:`qsr_plugin.deploy.routing`.
    """

    kind: str
    scale: int
    run: Callable[[np.ndarray], np.ndarray]
    window: int = 1
    minimum: int = 1
    fixed: tuple[int, int] | None = None
    batches: bool = True
    device: str = "cpu"
    pixel_bytes: float | None = None
    shallower: tuple[Engine, ...] = ()

    @cached_property
    def reach(self) -> int | None:
        """How far the surroundings of a pixel matter, see :func:`~qsr_plugin.deploy.context.measured_reach`."""
        return measured_reach(self)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Enlarge images of one size; those of another size than the network takes are padded, the result cropped.

        Args:
            x: (N, 3, H, W) float32, RGB in [0, 1].

        Returns:
            (N, 3, scale H, scale W) float32, not clipped.

        Raises:
            UserError: If the images are larger than a network of fixed size takes, or its output has another size than
                ``scale`` says.
        """
        height, width = x.shape[2:]
        if self.fixed is not None and (height > self.fixed[0] or width > self.fixed[1]):
            raise UserError(
                f"an image of {height}x{width} for a model of fixed size {self.fixed[0]}x{self.fixed[1]}: cut it into "
                "tiles of that size (upscale_tiled), or export the model with another --input-size"
            )
        taken = self.fixed or (self._taken(height), self._taken(width))
        x = _padded(x, *taken)
        padded = self.run(x) if self.batches else np.concatenate([self.run(one[None]) for one in x])
        out = padded[..., : self.scale * height, : self.scale * width]
        if out.shape != (expected := (x.shape[0], 3, self.scale * height, self.scale * width)):
            raise UserError(
                f"the model made {tuple(padded.shape)} of a batch {tuple(x.shape)}, scale {self.scale} asks for "
                f"{expected}: it is damaged or of another scale, export it again"
            )
        return out

    def _taken(self, side: int) -> int:
        return -(-max(side, self.minimum) // self.window) * self.window


def open_engine(
    source: Union[str, Path, nn.Module],
    kind: str | None = None,
    *,
    threads: int | None = None,
    device: str = "cpu",
) -> Engine:
    """Open a model for inference.

    Args:
        source: ``.onnx`` written by :func:`qsr_plugin.deploy.onnx_export.export_onnx`; a quantized or packed
            ``.safetensors``; or a network, which is put in evaluation mode and moved to ``device`` in place.
        kind: ``openvino`` or ``onnxruntime`` for ONNX files, the first if not given; ``torch`` for everything else.
        threads: CPU threads, the engine's own choice if not given. PyTorch has one such number per process.
        device: ``cpu``, or for PyTorch any of its devices.

    Raises:
        UserError: For a file that is no such model (the message says what it is), one of a newer version, an engine
            that does not fit it or is not installed, or a device that is not there.
    """
    path = Path(source).expanduser() if isinstance(source, (str, Path)) else None
    is_onnx = path is not None and path.suffix == ".onnx"
    kind = kind or ("openvino" if is_onnx else "torch")
    if kind not in KINDS:
        raise UserError(f"engine is '{kind}'. {suggest(kind, KINDS)}")
    if is_onnx != (kind != "torch"):
        needed = "openvino or onnxruntime" if is_onnx else "torch; for the others export it: qsr export --format onnx"
        raise UserError(f"engine '{kind}' does not run {path or type(source).__name__}, which needs {needed}")
    if kind != "torch" and device != "cpu":
        raise UserError(f"engine '{kind}' runs on the CPU here, device is '{device}': leave it out, or use torch")
    if not is_onnx:
        from qsr_plugin.deploy.torch_engine import quantized_in, torch_engine  # others run without PyTorch

        return torch_engine(source if path is None else quantized_in(path), threads, device)
    facts = onnx_facts(path)
    session = {"openvino": openvino_session, "onnxruntime": _onnxruntime_session}[kind]
    try:
        run = session(path, threads)
    except UserError:
        raise
    except Exception as error:  # the runtimes raise kinds of their own
        raise UserError(f"{path}: {kind} cannot run it ({first_line(error)}). Try another --engine") from None
    return Engine(kind, run=run, **facts)


def require(module: str) -> Any:
    """Import a module of the extra ``[deploy]``.

    Raises:
        UserError: If it cannot be imported, with the way to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module} is needed for this and cannot be imported ({first_line(error)}): "
            "install the extra 'deploy', for example pip install -e \".[deploy]\" in the folder of qsr_plugin"
        ) from None


def onnx_facts(path: Path) -> dict[str, Any]:
    """Scale, window and fixed size of an exported file."""
    if not path.is_file():
        raise no_model(path, "a folder" if path.is_dir() else "not there")
    onnx = require("onnx")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # google.protobuf raises DecodeError, and others for files cut short
        raise no_model(path, _not_onnx(path, first_line(error))) from None
    if not model.graph.input:  # also what protobuf makes of an empty file
        raise no_model(path, _not_onnx(path, "no network in it"))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if missing := [key for key, least in _METADATA.items() if _number(metadata.get(key)) < least]:
        raise no_model(path, f"an ONNX model of another program (no metadata '{missing[0]}')")
    if int(metadata["format"]) > FORMAT:
        raise UserError(
            f"{path} was written by qsr_plugin {metadata.get('qsr_plugin')} in format {metadata['format']}, this is "
            f"{__version__} (format {FORMAT}): update qsr_plugin, or export again with this version"
        )
    fixed = None
    if metadata["dynamic"] == "0":
        fixed = tuple(axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim[2:])
        if len(fixed) != 2 or not all(fixed):
            raise no_model(path, f"an ONNX model that says it has a fixed size, but has {fixed}")
    numbers = {key: int(metadata[key]) for key in ("scale", "window", "minimum")}
    return {**numbers, "fixed": fixed, "batches": metadata["batches"] == "1"}


def openvino_session(path: Path, threads: int | None) -> Callable[[np.ndarray], np.ndarray]:
    """An ONNX file or OpenVINO's own format, compiled for the CPU; threads are OpenVINO's own choice if not given."""
    openvino = require("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    with same_signal_stack():
        model = core.compile_model(core.read_model(path), "CPU", settings)
    return lambda x: model({_INPUT: np.ascontiguousarray(x)})[_OUTPUT]


def _onnxruntime_session(path: Path, threads: int | None) -> Callable[[np.ndarray], np.ndarray]:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads or 0
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run([_OUTPUT], {_INPUT: np.ascontiguousarray(x)})[0]


def _padded(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """An array as :func:`qsr_plugin.data.borders.pad_to` pads a tensor."""
    for mode in ("reflect", "edge"):
        bottom, right = height - x.shape[2], width - x.shape[3]
        if mode == "reflect":
            bottom, right = min(bottom, x.shape[2] - 1), min(right, x.shape[3] - 1)
        if bottom or right:
            x = np.pad(x, ((0, 0), (0, 0), (0, bottom), (0, right)), mode)
    return x


def no_model(path: Path, what: str) -> UserError:
    """The error for a file that is no model that an engine runs."""
    return UserError(
        f"{path} is {what}; expected a quantized .safetensors (of qsr quantize or a training), or an .onnx that qsr "
        "export made of one"
    )


def _not_onnx(path: Path, reason: str) -> str:
    kind = foreign_kind(path)
    if kind not in ("", ONNX):
        return kind
    return f"no ONNX model in spite of its name, or a damaged one ({reason}), to be copied or exported again"


def _number(text: str | None) -> int:
    """A metadata entry as a number, -1 for what is none."""
    return int(text) if text is not None and text.isdecimal() else -1
