"""Option files; installed below ``qsr_plugin.options``."""
