"""Quantized image super-resolution for BasicSR.

Importing this package is cheap: neither torch nor BasicSR is loaded. The public names below are imported when they are
first used, and everything is registered with BasicSR when BasicSR itself is imported (or at once, if it already is), so
one ``import qsr_plugin`` at the top of an existing training script is enough.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from qsr_plugin import import_hook

if TYPE_CHECKING:
    from qsr_plugin.archs.roles import list_backbones
    from qsr_plugin.checkpoint import load_quantized, save_quantized
    from qsr_plugin.deploy.folding import fold
    from qsr_plugin.deploy.onnx_export import export_onnx
    from qsr_plugin.quant.calibrate import calibrate
    from qsr_plugin.quant.depth import set_depth, slim
    from qsr_plugin.quant.recipe import Recipe, list_methods, load_recipe
    from qsr_plugin.quant.surgery import quantize_model
    from qsr_plugin.report.complexity import complexity

__version__ = "0.1.0"

_HOME = {
    "Recipe": "qsr_plugin.quant.recipe",
    "calibrate": "qsr_plugin.quant.calibrate",
    "complexity": "qsr_plugin.report.complexity",
    "export_onnx": "qsr_plugin.deploy.onnx_export",
    "fold": "qsr_plugin.deploy.folding",
    "list_backbones": "qsr_plugin.archs.roles",
    "list_methods": "qsr_plugin.quant.recipe",
    "load_quantized": "qsr_plugin.checkpoint",
    "load_recipe": "qsr_plugin.quant.recipe",
    "quantize_model": "qsr_plugin.quant.surgery",
    "save_quantized": "qsr_plugin.checkpoint",
    "set_depth": "qsr_plugin.quant.depth",
    "slim": "qsr_plugin.quant.depth",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        from qsr_plugin.errors import suggest

        raise AttributeError(f"module 'qsr_plugin' has no attribute '{name}'. {suggest(name, _HOME)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


import_hook.arm()
