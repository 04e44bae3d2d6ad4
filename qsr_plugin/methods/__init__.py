"""Published methods, one file each; importing this package registers their quantizers and bit policies."""

from qsr_plugin.methods import daq, ddtb, fqsr, linq_dorefa_lsq, minmax_percentile, odm, pams, quantsr  # noqa: F401
