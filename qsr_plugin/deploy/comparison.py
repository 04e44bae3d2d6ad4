"""An exported model beside PyTorch: each part on identical input, then the whole network.

Two runs of one quantized network differ as soon as a value lands on the other side of a rounding border, and every such
step causes more behind it; so the difference at the output says little. What has to hold is that each part gives the
same for the same input. So PyTorch runs once more with what the model's quantizers made in the place of what its own
make: then all that lies between two quantizers has to agree as floating-point numbers do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qsr_plugin.deploy.engine import require
from qsr_plugin.deploy.signal_stack import same_signal_stack

#: Least share of identical codes.
IDENTICAL = 0.9999
#: Below this PSNR in dB, and clearly below that of ONNX Runtime, an engine does not just round otherwise.
LEAST_PSNR = 40.0
#: Up to which side the smallest image is looked for that a model can take.
LARGEST_LEAST = 64
#: Largest difference of floating-point numbers, as a share of the largest of them.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Agreement:
    """How near an exported model is to PyTorch, on synthetic images.

    Attributes:
        quantizers: How many were compared.
        identical: Least share of identical codes of one quantizer on the same input.
        steps: Largest difference of two codes.
        between: Largest difference of what lies between two quantizers, and of the output, on the same input, as share
            of the largest value there.
        psnr: Between the outputs of both networks by themselves, in dB, peak 1; infinite if they are equal.
        openvino: The same in OpenVINO; ``None`` where it is not installed.
    """

    quantizers: int
    identical: float
    steps: int
    between: float
    psnr: float
    openvino: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the model computes the same network."""
        return (
            self.identical >= IDENTICAL and self.steps <= 1 and self.between <= TOLERANCE and not math.isnan(self.psnr)
        )

    def __str__(self) -> str:
        codes = (
            "all codes the same"
            if self.steps == 0
            else f"{self.identical:.4%} the same codes in the worst, others at most {self.steps} step apart"
        )
        text = (
            f"compared with PyTorch on the same input: {self.quantizers} quantizers, {codes}; all between them within "
            f"{self.between:.0e} of the largest value; PSNR between the outputs of both networks by "
            f"themselves: {self.psnr:.1f} dB ({LEAST_PSNR:.0f} and more are usual)"
        )
        if self.holds and self.psnr < LEAST_PSNR:
            text += ", as roundings of single values add up; 'qsr bench --test HR LR' shows whether scores differ"
        if self.openvino is None:
            return text
        text += f"; in OpenVINO {self.openvino:.1f} dB"
        if self.openvino < min(LEAST_PSNR, self.psnr - 6):
            text += (
                "\nwarning: OpenVINO computes something else. Run this file with --engine onnxruntime, and report it"
            )
        return text


def compare(model: Any, net: nn.Module, batches: Sequence[tuple[int, tuple[int, int]]]) -> Agreement:
    """Run a model in ONNX Runtime without its optimisations, and beside it PyTorch; what is worst in any batch.

    Args:
        model: ``onnx.ModelProto`` with quantizers in the order in which PyTorch runs them.
        net: What it was made from, lowered.
        batches: How many images, and their height and width.
    """
    found = [_compare(model, net, synthetic_images(count, size)) for count, size in batches]
    return Agreement(
        quantizers=found[0].quantizers,
        identical=min(one.identical for one in found),
        steps=max(one.steps for one in found),
        between=max(one.between for one in found),
        psnr=min(one.psnr for one in found),
        openvino=_openvino(model, net, batches[-1]),
    )


def least_agreeing_side(model: Any, net: nn.Module, minimum: int, multiple: int) -> int:
    """The side from which on a model computes what PyTorch does.

    Some networks treat small images in a way of their own, which a traced model does not follow. The side grows by a
    quarter until images of this height and of this width agree.

    Args:
        model: ``onnx.ModelProto`` that agrees at usual sizes.
        net: What it was made from, lowered.
        minimum: Where to begin.
        multiple: Of which sides have to be.

    Raises:
        ValueError: If there is no such side up to :data:`LARGEST_LEAST` pixels.
    """
    side = minimum
    while side <= max(LARGEST_LEAST, minimum):
        other = -(-max(LARGEST_LEAST, side) // multiple) * multiple
        if all(_agrees(model, net, size) for size in ((side, side), (side, other), (other, side))):
            return side
        side += -(-max(side // 4, 1) // multiple) * multiple
    raise ValueError(f"it disagrees with PyTorch on images with sides below {side} pixels")


def _agrees(model: Any, net: nn.Module, size: tuple[int, int]) -> bool:
    try:
        return _compare(model, net, synthetic_images(1, size)).holds
    except Exception:  # runtimes have kinds of their own for sizes that they cannot run
        return False


def _openvino(model: Any, net: nn.Module, batch: tuple[int, tuple[int, int]]) -> float | None:
    if find_spec("openvino") is None:
        return None
    core = require("openvino").Core()
    images = synthetic_images(*batch)
    with same_signal_stack():
        opened = core.read_model(model.SerializeToString())
        compiled = core.compile_model(opened, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.inference_mode():
        return _psnr(net(images), torch.from_numpy(compiled(images.numpy())[0]))


def _psnr(mine: Tensor, theirs: Tensor) -> float:
    if mine.shape != theirs.shape:
        return 0.0
    error = float((mine - theirs).double().square().mean())
    return -10 * math.log10(error) if error else math.inf


def synthetic_images(count: int, size: tuple[int, int]) -> Tensor:
    """Smooth coloured fields with fine texture, (count, 3, H, W) in [0, 1], always the same."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    return (smooth + 0.1 * torch.randn(count, 3, *size, generator=generator)).clamp(0, 1)


def _compare(model: Any, net: nn.Module, images: Tensor) -> Agreement:
    nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    run, constants = _with_inner_results(model, nodes, images.numpy()), _constants(model)
    codes = [_codes_of(node, run, constants) for node in nodes]
    output = run[model.graph.output[0].name]
    with torch.inference_mode():
        plain = net(images)
        with _Forced([(run[node.input[0]], run[_value(node)]) for node in nodes]) as forced:
            forced.agree(net(images), output)
            forced.finish()
    return Agreement(
        quantizers=len(nodes),
        identical=min((same for same, _ in codes), default=1.0),
        steps=max((apart for _, apart in codes), default=0),
        between=forced.apart,
        psnr=_psnr(plain, output),
    )


class _Forced(TorchDispatchMode):
    """Hands out what a model's quantizers made, in their order, and compares what they got.

    Args:
        results: For each quantizer the clipped tensor it got, and the value it made of it.
    """

    def __init__(self, results: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._results, self._next, self.apart = results, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.qsr_plugin.quantize_dequantize.default:
            return func(*args, **(kwargs or {}))
        if self._next >= len(self._results):
            self.apart = math.inf  # the model has fewer quantizers
            return func(*args)
        x, _, _, low, high = args
        clipped, value = (_as_shuffled(result, x) for result in self._results[self._next])
        self._next += 1
        self.agree(torch.clamp(x, low, high), clipped)
        return value if value.shape == x.shape else torch.zeros_like(x)

    def finish(self) -> None:
        """Say that there are no more quantizers in PyTorch."""
        if self._next != len(self._results):
            self.apart = math.inf

    def agree(self, mine: Tensor, theirs: Tensor) -> None:
        """Take the difference of two tensors into account."""
        apart = math.inf
        if mine.shape == theirs.shape:
            apart = float((mine - theirs).abs().max()) / max(float(theirs.abs().max()), 1e-12)
        self.apart = max(self.apart, apart) if math.isfinite(apart) else math.inf


def _as_shuffled(result: Tensor, x: Tensor) -> Tensor:
    """What was quantized before a pixel shuffle, as ``x``, which comes after it."""
    if result.dim() != 4 or x.dim() != 4 or result.shape[1] <= x.shape[1]:
        return result
    return F.pixel_shuffle(result, x.shape[2] // result.shape[2])


def _value(node: Any) -> str:
    """The name under which a quantizer's result is read as numbers."""
    return f"{node.output[0]}.value"


def _with_inner_results(model: Any, quantizers: Sequence[Any], images: np.ndarray) -> dict[str, Tensor]:
    """The output, and for every quantizer what goes in, its codes and their values, by name."""
    onnx, ort = require("onnx"), require("onnxruntime")
    opened = type(model).FromString(model.SerializeToString())
    graph, names = opened.graph, {}
    for node in quantizers:
        graph.node.append(onnx.helper.make_node("DequantizeLinear", [node.output[0], *node.input[1:3]], [_value(node)]))
        names |= dict.fromkeys((node.input[0], node.output[0], _value(node)))
    for name in names:
        if name != graph.output[0].name:
            graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(opened.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = [output.name for output in session.get_outputs()]
    results = session.run(None, {graph.input[0].name: images})
    return {name: torch.from_numpy(result) for name, result in zip(found, results)}


def _constants(model: Any) -> dict[str, np.ndarray]:
    to_array = require("onnx").numpy_helper.to_array
    return {tensor.name: to_array(tensor) for tensor in model.graph.initializer}


def _codes_of(node: Any, run: dict[str, Tensor], constants: dict[str, np.ndarray]) -> tuple[float, int]:
    """Share of identical codes, and the largest difference, of one quantizer against PyTorch."""
    scale, zero = (torch.from_numpy(constants[name].copy()) for name in node.input[1:3])
    wanted = torch.round(run[node.input[0]] / scale) + zero.float()
    apart = (run[node.output[0]].float() - wanted).abs()
    return float((apart == 0).float().mean()), int(apart.max())
