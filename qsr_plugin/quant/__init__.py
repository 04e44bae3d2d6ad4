"""The quantization mechanism: arithmetic, observers, quantizers, policies, sites, recipes, surgery, calibration.

Nothing in here knows a published method or a backbone; those register themselves from ``qsr_plugin.methods`` and
``qsr_plugin.archs``.
"""
