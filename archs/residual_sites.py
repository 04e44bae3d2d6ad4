"""Residual blocks with ports for the identity path alone (``shortcut``) and for both operands of the addition."""

from __future__ import annotations

from basicsr.archs.arch_util import ResidualBlockNoBN
from qsr_plugin.archs.srresnet_arch import ResidualBlockBN
from torch import Tensor

from qsr_plugin.quant.sites import Site, register_site_class


class ShortcutSite(Site):
    """Ports of a residual block.

    ``input`` feeds both paths and ``shortcut`` the identity path alone; both operands of the sum pass the one
    ``addition``; ``output`` comes after the sum.
    """

    ports = ("input", "shortcut", "addition", "output")
    read_ports = ("shortcut", "addition")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        x = self.at_port("input", x)
        identity = self.at_port("addition", self.at_port("shortcut", x))
        return self.at_port("output", identity + self.at_port("addition", self.branch(x), operand=".residual"))


class QuantResidualBlockNoBN(ShortcutSite, ResidualBlockNoBN):
    """The host's residual block (EDSR, MSRResNet) with the ports of :class:`ShortcutSite`."""

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the identity."""
        return self.conv2(self.relu(self.conv1(x))) * self.res_scale


class QuantResidualBlockBN(ShortcutSite, ResidualBlockBN):
    """SRResNet's residual block with the ports of :class:`ShortcutSite`."""


register_site_class(ResidualBlockNoBN, QuantResidualBlockNoBN)
register_site_class(ResidualBlockBN, QuantResidualBlockBN)
