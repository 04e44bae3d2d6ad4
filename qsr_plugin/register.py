"""Registers everything of this package with the host's registries; importing the host triggers it."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module

_PLUGINS = (
    "qsr_plugin.archs.srresnet_arch",
    "qsr_plugin.archs.rlfn_arch",
    "qsr_plugin.archs.imdn_arch",
    "qsr_plugin.archs.rfdn_arch",
    "qsr_plugin.archs.bsrn_arch",
    "qsr_plugin.archs.carn_arch",
    "qsr_plugin.archs.rdn_arch",
    "qsr_plugin.archs.idn_arch",
    "qsr_plugin.archs.hat_arch",
    "qsr_plugin.archs.residual_sites",
    "qsr_plugin.archs.attention_sites",
    "qsr_plugin.archs.spandrel_arch",
    "qsr_plugin.archs.quant_net_arch",
    "qsr_plugin.losses.calibration_loss",
    "qsr_plugin.losses.bit_loss",
    "qsr_plugin.losses.distill_loss",
    "qsr_plugin.losses.feature_loss",
    "qsr_plugin.losses.gate_loss",
    "qsr_plugin.losses.mismatch_loss",
    "qsr_plugin.losses.weighted_bit_loss",
    "qsr_plugin.models.quant_sr_model",
)


@lru_cache(maxsize=1)
def register_all() -> None:
    """Import every module that registers an arch, a loss or a model. Does nothing the second time."""
    for name in _PLUGINS:
        import_module(name)
