"""Engines and model files for the tests: enlarging by repetition, one convolution as an ONNX file of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qsr_plugin.deploy.engine import Engine


def nearest(x: np.ndarray, scale: int = 2) -> np.ndarray:
    """Every pixel repeated along the last two axes."""
    return x.repeat(scale, axis=-2).repeat(scale, axis=-1)


def nearest_engine(scale: int = 2, watch: Callable[[np.ndarray], None] = lambda x: None, **changes: object) -> Engine:
    """An engine that repeats pixels; ``watch`` sees every batch that reaches the network."""

    def run(x: np.ndarray) -> np.ndarray:
        watch(x)
        return nearest(x, scale)

    return Engine("torch", scale, run, **changes)


def small_net(scale: int = 2) -> nn.Module:
    """One convolution and a pixel shuffle, always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale)).eval()


def write_onnx(
    path: Path, scale: int = 2, size: tuple[int, int] | None = None, metadata: dict[str, object] | None = None
) -> Path:
    """Write :func:`small_net` with our metadata; ``metadata`` changes or, with ``None``, removes some."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    conv = small_net(scale)[0]
    weights = [numpy_helper.from_array(value.detach().numpy(), name) for name, value in conv.named_parameters()]
    # DepthToSpace in CRD order is the pixel shuffle of PyTorch
    nodes = [
        helper.make_node("Conv", ["image", "weight", "bias"], ["features"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("DepthToSpace", ["features"], ["upscaled"], blocksize=scale, mode="CRD"),
    ]
    ends = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, *size] if size else ["N", 3, "H", "W"]),
        helper.make_tensor_value_info("upscaled", TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    ours = {
        "qsr_plugin": "0.1.0",
        "format": 1,
        "scale": scale,
        "window": 1,
        "minimum": 1,
        "batches": int(size is None),
        "dynamic": int(size is None),
        **(metadata or {}),
    }
    helper.set_model_props(model, {key: str(value) for key, value in ours.items() if value is not None})
    onnx.save(model, path)
    return path
