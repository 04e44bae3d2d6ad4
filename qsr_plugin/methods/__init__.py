"""Published methods, one file each; importing this package registers their quantizers and bit policies."""

from qsr_plugin.methods import minmax_percentile, pams  # noqa: F401
