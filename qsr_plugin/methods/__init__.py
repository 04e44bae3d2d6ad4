"""Published methods, one file each; importing this package registers their quantizers and bit policies."""

from qsr_plugin.methods import (  # noqa: F401
    adabm,
    cabm,
    cadyq,
    daq,
    ddtb,
    fqsr,
    granular_dq,
    linq_dorefa_lsq,
    minmax_percentile,
    odm,
    pams,
    per_channel,
    ptq4sr,
    quantsr,
    two_d_quant,
)
