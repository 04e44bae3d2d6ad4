"""How the grids' operators are written in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qsr_plugin.deploy import grids as _defined  # noqa: F401  the operators that are translated here
from qsr_plugin.deploy.engine import require


def translations() -> dict[Any, Callable[..., Any]]:
    """For :func:`torch.onnx.export`; needs onnxscript."""
    op = require("onnxscript").opset21

    def quantize_dequantize(x: Any, scale: Any, zero: Any, low: Any, high: Any) -> Any:
        codes = op.QuantizeLinear(op.Clip(x, low, high), scale, zero)
        return op.DequantizeLinear(codes, scale, zero)

    def dequantize(codes: Any, scale: Any, axis: int) -> Any:
        return op.DequantizeLinear(codes, scale, axis=axis)

    return {
        torch.ops.qsr_plugin.quantize_dequantize.default: quantize_dequantize,
        torch.ops.qsr_plugin.dequantize.default: dequantize,
    }
