"""Folding: the weights of a quantized network become their quantized values, and nothing quantizes them any more.

Quantizing a quantized weight again may move it, by a rounding error or, where the grid follows the weight itself, by a
step. So the quantizers of weights give way to :class:`FoldedQuantizer`, which hands the weight through and still says
its bits and its grid.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Optional

import torch
from torch import Tensor, nn

from qsr_plugin.deploy.grids import grid_of
from qsr_plugin.errors import UserError
from qsr_plugin.quant.quantizer import QParams, Quantizer
from qsr_plugin.quant.sites import Site
from qsr_plugin.quant.surgery import quantizers, sites


class FoldedQuantizer(Quantizer):
    """In the place of a weight quantizer: the weight is quantized already, and goes through as it is.

    It has no state of its own in a state dict. Calibration and training leave it alone.

    Args:
        original: The quantizer that made the weight, or one like it.
        grid: The grid that the weight lies on; ``None`` if it is not uniform.

    Attributes:
        learned_numbers: How many parameters the original quantizer had.
    """

    roles = ("weight",)
    needs_calibration = False

    def __init__(self, original: Quantizer, grid: Optional[QParams]) -> None:
        super().__init__(original.options, original.candidates, "weight", original.channel_axis)
        self._limits = None if grid is None else (grid.qmin, grid.qmax)
        self._storage = original.extra_storage_bits()
        self.learned_numbers = sum(parameter.numel() for parameter in original.parameters())
        for name in () if grid is None else ("scale", "zero_point"):
            self.register_buffer(name, getattr(grid, name).detach().clone(), persistent=False)

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """``x`` itself."""
        return x

    def qparams(self, bits: int | None = None) -> QParams:
        """The grid that the weight lies on.

        Raises:
            NotImplementedError: If it is not uniform.
        """
        if self._limits is None:
            raise NotImplementedError(f"{self.site}: its weights were quantized to a grid that is not uniform")
        return QParams(self.scale, self.zero_point, *self._limits)

    def qparams_of(self, weight: Tensor, bits: int | None = None) -> QParams:
        """The same; the weight is known."""
        return self.qparams(bits)

    def extra_storage_bits(self) -> int:
        """As many as the original quantizer."""
        return self._storage


def fold(net: nn.Module) -> nn.Module:
    """A copy of a quantized network whose weights are their quantized values, in evaluation mode.

    Its output equals that of ``net`` in evaluation mode to the last bit. What it costs and its bits are reported as
    before. Its activations may be calibrated again; its weights can neither be calibrated nor trained, and take no
    gradient. With all quantizers off (``float_mode``) it computes with the quantized weights.

    Args:
        net: Quantized and calibrated; or float or folded, then the copy is equal to it. Not changed.

    Raises:
        UserError: If a range was never set, or a quantized weight is no parameter of its layer.
    """
    check_calibrated(net)
    for name, site in sites(net):
        if site.quantizer("weight") is not None and "weight" not in site._parameters:
            raise UserError(
                f"the weight of {name} is computed anew in each forward: remove the parametrization first, for example "
                "with torch.nn.utils.remove_weight_norm(module)"
            )
    folded = deepcopy(net).eval()
    made: dict[int, nn.Parameter] = {}
    with torch.no_grad():
        for _, site in sites(folded):
            quantizer = site.quantizer("weight")
            if quantizer is None or isinstance(quantizer, FoldedQuantizer):
                continue
            values = quantizer(site.weight) + 0.0  # a weight of -0.0, which has no code, becomes 0.0
            put_folded(site, _grid(quantizer, site.weight))
            known = made.get(id(site.weight))  # two layers may share one weight
            if known is None or not torch.equal(known, values):
                known = made[id(site.weight)] = nn.Parameter(values, requires_grad=False)
            site.weight = known
    folded.folded = True
    return folded


def put_folded(site: Site, grid: Optional[QParams]) -> None:
    """Replace the weight quantizer of a site, in place; the weight itself is the caller's business."""
    site.add_quantizer("weight", FoldedQuantizer(site.quantizer("weight"), grid).eval(), None)


def check_calibrated(net: nn.Module) -> None:
    """Refuse a network with a range that was never set.

    Raises:
        UserError: With the first such place.
    """
    missing = [place for place, quantizer in quantizers(net) if not quantizer.is_calibrated]
    if missing:
        raise UserError(
            f"not calibrated: {missing[0]} ({len(missing)} places in all). Run qsr_plugin.calibrate(net, images) "
            "first, or load a quantized checkpoint"
        )


def _grid(quantizer: Quantizer, weight: Tensor) -> Optional[QParams]:
    try:
        return grid_of(quantizer, weight, quantizer.candidates[0])
    except NotImplementedError:
        return None
