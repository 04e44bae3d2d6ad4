"""Residual blocks whose identity path has a port of its own (``shortcut``), for recipes that quantize it alone."""

from __future__ import annotations

from basicsr.archs.arch_util import ResidualBlockNoBN
from qsr_plugin.archs.srresnet_arch import ResidualBlockBN
from torch import Tensor

from qsr_plugin.quant.sites import Site, register_site_class


class ShortcutSite(Site):
    """Ports of a residual block: input (both paths), shortcut (identity path alone), output (after the addition)."""

    ports = ("input", "shortcut", "output")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        x = self.at_port("input", x)
        return self.at_port("output", self.at_port("shortcut", x) + self.branch(x))


class QuantResidualBlockNoBN(ShortcutSite, ResidualBlockNoBN):
    """The host's residual block (EDSR, MSRResNet) with a shortcut port."""

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the identity."""
        return self.conv2(self.relu(self.conv1(x))) * self.res_scale


class QuantResidualBlockBN(ShortcutSite, ResidualBlockBN):
    """SRResNet's residual block with a shortcut port."""


register_site_class(ResidualBlockNoBN, QuantResidualBlockNoBN)
register_site_class(ResidualBlockBN, QuantResidualBlockBN)
