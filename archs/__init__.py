"""Float backbones, their role tables and the registered quantized arch; installed as ``qsr_plugin.archs``."""
