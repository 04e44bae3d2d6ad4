"""ONNX files of quantized networks: ``Clip -> QuantizeLinear -> DequantizeLinear`` on 8-bit carriers.

Activations are unsigned bytes with a zero point (on request signed ones around zero), weights signed bytes with a scale
per output channel, whatever their bit width: engines have no faster arithmetic for fewer bits. A model is run and
compared with PyTorch before it is written.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from qsr_plugin import __version__
from qsr_plugin.atomic import check_writable, write_atomically
from qsr_plugin.checkpoint import metadata_of
from qsr_plugin.deploy.affine import fold_affine
from qsr_plugin.deploy.collapsed import collapsed_tail, least_side
from qsr_plugin.deploy.comparison import Agreement, compare, least_agreeing_side
from qsr_plugin.deploy.engine import FORMAT, require
from qsr_plugin.deploy.image_mean import fold_mean
from qsr_plugin.deploy.lowering import lower
from qsr_plugin.deploy.onnx_graph import quantize_before_shuffle, without_traces
from qsr_plugin.deploy.onnx_operators import translations
from qsr_plugin.deploy.tail import collapse_tail
from qsr_plugin.deploy.tail_bits import quantize_tail
from qsr_plugin.errors import UserError
from qsr_plugin.report.tables import size as size_text

logger = logging.getLogger("qsr_plugin")

#: uint16 carriers need 21.
OPSET = 21
#: The size a network is traced at if none is given, in LR pixels, and the least one it is compared at.
TRACED, CHECKED = (48, 64), (24, 32)


class ExportError(UserError, RuntimeError):
    """A network that cannot be exported; the message says what stands in the way and what to do."""


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export_onnx` wrote.

    Attributes:
        path: The file.
        bytes: Its size.
        dynamic: Whether height and width may vary.
        size: Height and width it was traced at, in LR pixels: the only ones if it is not dynamic.
        multiple: What heights and widths have to be a multiple of; ``qsr upscale`` pads to it.
        minimum: Least height and width; ``qsr upscale`` pads smaller images.
        steps: What was rewritten, and what was not and why, a line each.
        float_layers: Layers whose quantized weight stays float, because it does not fit into bytes.
        agreement: With PyTorch.
        tail_in_bytes: Whether the convolution of a collapsed tail computes in 8 bits.
    """

    path: Path
    bytes: int
    dynamic: bool
    size: tuple[int, int]
    multiple: int
    minimum: int
    steps: tuple[str, ...]
    float_layers: tuple[str, ...]
    agreement: Agreement = field(repr=False)
    tail_in_bytes: bool = False

    def __str__(self) -> str:
        any_size = (
            "any height and width"
            if self.multiple == 1
            else f"heights and widths that are multiples of {self.multiple}"
        )
        any_size += f" from {self.minimum} pixels" if self.minimum > self.multiple else ""
        kind = any_size if self.dynamic else f"{self.size[0]}x{self.size[1]} pixels only"
        lines = [f"{self.path}: {size_text(8 * self.bytes)}, ONNX opset {OPSET}, {kind}", *self.steps]
        if self.float_layers:
            named = ", ".join(self.float_layers[:4]) + (" ..." if len(self.float_layers) > 4 else "")
            lines.append(f"weights kept float, their grid does not fit into bytes: {len(self.float_layers)} ({named})")
        return "\n".join([*lines, *str(self.agreement).splitlines()])


def export_onnx(
    net: nn.Module,
    path: Union[str, Path],
    input_size: Optional[tuple[int, int]] = None,
    *,
    bits: Optional[int] = None,
    passes: bool = True,
    tail_images: Optional[Sequence[Tensor]] = None,
    signed: bool = False,
) -> ExportReport:
    """Write a network as an ONNX file for OpenVINO and ONNX Runtime.

    CPUs without VNNI add pairs of 8-bit products in 16 bits, which can saturate: weights of 7 bits and less are safe.

    Args:
        net: Quantized and calibrated, or float. (N, 3, H, W), RGB in [0, 1]. Not changed.
        path: Ends in ``.onnx``.
        input_size: Height and width of the low-resolution image to trace with. Networks that do not allow other sizes
            (windows of attention) then take exactly this one.
        bits: See :func:`qsr_plugin.deploy.lowering.lower`.
        passes: Rewrite the network first where that is exact: collapse a linear tail, fold scalings into convolutions.
        tail_images: Batches (N, 3, h, w), RGB in [0, 1]: a collapsed tail then computes in 8 bits as well, unless that
            changes them too much; see :func:`qsr_plugin.deploy.tail_bits.quantize_tail`.
        signed: Carry activations by signed bytes around zero, as TensorRT has them; places of more than 8 bits are
            rounded in floats. The same network, slower on CPUs.

    Raises:
        LoweringError: If the network has no constant integer form.
        ExportError: If PyTorch cannot export it, the file disagrees with PyTorch, or there are ``tail_images`` but no
            collapsed tail.
        UserError: If the packages of the extra ``deploy`` are missing, or ``tail_images`` are fewer than two.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ExportError(f"'{path}': ONNX models end in .onnx; change the ending")
    onnx, _, _ = (require(module) for module in ("onnx", "onnxscript", "onnxruntime"))
    check_writable(path)  # before work is done for it
    lowered = lower(net, bits=bits, signed=signed)
    steps = []
    if offset := sum(getattr(module, "rest", None) is not None for module in lowered.modules()):
        steps.append(
            f"weights: those of {offset} layer(s) have no level at zero and no room for one in 8 bits; each sums its "
            "input once more for that, which is exact and takes time (weights of the method 'auto' need no such sum)"
        )
    if passes:
        steps += map(str, [*fold_affine(lowered), *fold_mean(lowered), collapse_tail(lowered)])
    if tail_images is not None and collapsed_tail(lowered) is None:
        why = steps[-1] if passes else "tail: nothing is collapsed without passes"
        raise ExportError(f"{why}; so no tail can compute in 8 bits, and images for it are of no use")
    tail = None if tail_images is None else quantize_tail(lowered, tail_images, signed=signed)
    steps += [] if tail is None else [str(tail)]
    kind, sides = type(lowered).__name__, _Sides.of(lowered)
    size = sides.fitting(input_size or TRACED)
    model, agreement, free = _traced(lowered, size, sides, passes, kind)
    if free.sides:
        try:
            sides = replace(
                sides, minimum=least_agreeing_side(model, lowered, sides.fitting((1, 1))[0], sides.multiple)
            )
        except ValueError as error:
            raise ExportError(f"this {kind} was not exported: {error}. Run it with the torch engine") from None
    with torch.inference_mode():
        scale = lowered(torch.zeros(1, 3, *size)).shape[-1] // size[1]
    _describe(model, net, scale, sides, free)
    without_traces(model)
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
    steps += free.told
    return ExportReport(
        path,
        len(data),
        free.sides,
        size,
        sides.multiple,
        sides.minimum,
        tuple(steps),
        lowered.float_weights,
        agreement,
        tail_in_bytes=tail is not None and tail.applied,
    )


@dataclass(frozen=True)
class _Sides:
    """What heights and widths a network takes: multiples of a number, from a minimum on."""

    multiple: int = 1
    minimum: int = 1

    @classmethod
    def of(cls, net: nn.Module) -> _Sides:
        """Of a network that pads its input; in place, it does so no more, and the engine does it."""
        if getattr(net, "pad_square", True):
            return cls(minimum=least_side(net))
        from qsr_plugin.archs.padding import without_padding

        without_padding(net)
        return cls(net.pad_multiple, max(net.pad_minimum, least_side(net)))

    def fitting(self, size: tuple[int, int]) -> tuple[int, int]:
        """The next larger height and width."""
        return tuple(-(-max(side, self.minimum) // self.multiple) * self.multiple for side in size)


@dataclass(frozen=True)
class _Free:
    """Which axes of the input may vary, and what was found on the way."""

    sides: bool = True
    images: bool = True
    told: tuple[str, ...] = ()

    def of(self, size: tuple[int, int]) -> str:
        """What sizes it takes, in words."""
        return "any size" if self.sides else f"{size[0]}x{size[1]}"


def _traced(
    net: nn.Module, size: tuple[int, int], sides: _Sides, passes: bool, kind: str
) -> tuple[Any, Agreement, _Free]:
    """The model with as many free axes as the network allows, and how near it is to PyTorch."""
    problem, found = "", sides.fitting(CHECKED)
    larger = (found[0] + 3 * sides.multiple, found[1] + 5 * sides.multiple)
    for free in (_Free(), _Free(images=False), _Free(images=False, sides=False)):
        try:
            wanted = f"{'any number of images' if free.images else 'one image'} of {free.of(size)}"
            logger.info("tracing this %s for %s; large networks take minutes", kind, wanted)
            model = _exported(net, size, sides.multiple, free)
            moved = quantize_before_shuffle(model) if passes else 0
            batches = [(1, found), (3 if free.images else 1, larger)] if free.sides else [(1, size)]
            logger.info("comparing the result with PyTorch")
            agreement = compare(model, net, batches)
        except Exception as error:  # the exporter and the runtime raise many kinds
            problem = _cause(error)
        else:
            if agreement.holds:
                told = [f"quantized before the pixel shuffle: {moved} place(s)"] if moved else []
                told += [] if free.images else [f"one image at a time ({problem})"]
                return model, agreement, replace(free, told=tuple(told))
            problem = str(agreement)
    raise ExportError(
        f"this {kind} was not exported (PyTorch {torch.__version__}): {problem}. Run it with the torch engine"
    )


def _exported(net: nn.Module, size: tuple[int, int], multiple: int, free: _Free) -> Any:
    image = torch.rand(2 if free.images else 1, 3, *size, generator=torch.Generator().manual_seed(0))
    images, height, width = map(torch.export.Dim, ("images", "height", "width"))
    axes = {0: images} if free.images else {}
    axes |= {2: multiple * height, 3: multiple * width} if free.sides else {}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            net, (image,), input_names=["image"], output_names=["upscaled"], dynamo=True, verbose=False,
            opset_version=OPSET, dynamic_shapes=(axes,), custom_translation_table=translations(),
        )  # fmt: skip
    return program.model_proto


def _cause(error: BaseException) -> str:
    """The first telling line of what the exporter raised first."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]


def _describe(model: Any, net: nn.Module, scale: int, sides: _Sides, free: _Free) -> None:
    """Write what a reader needs to know into the model."""
    known = metadata_of(net) if getattr(net, "recipe", None) is not None else {}
    told = {
        "qsr_plugin": __version__,
        "format": str(FORMAT),
        "scale": str(scale),
        "recipe": known.get("recipe", "null"),
        "backbone": known.get("backbone", "null"),
        "window": str(sides.multiple),
        "minimum": str(sides.minimum),
        "dynamic": str(int(free.sides)),
        "batches": str(int(free.images)),
    }
    for key, value in told.items():
        model.metadata_props.add(key=key, value=value)
