"""Residual blocks with ports for the identity path alone (``shortcut``) and for both operands of the addition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from basicsr.archs.arch_util import ResidualBlockNoBN
from basicsr.archs.swinir_arch import RSTB
from qsr_plugin.archs.carn_arch import ResidualBlock
from qsr_plugin.archs.hat_arch import RHAG
from qsr_plugin.archs.idn_arch import DistillationStage
from qsr_plugin.archs.rdn_arch import ResidualDenseBlock
from qsr_plugin.archs.srresnet_arch import ResidualBlockBN
from torch import Tensor, nn

from qsr_plugin.quant.sites import Site, register_site_class


class ShortcutSite(Site):
    """Ports of a residual block.

    ``input`` feeds both paths and ``shortcut`` the identity path alone; both operands of the sum pass the one
    ``addition``; ``output`` comes after the sum, and after ``after_sum`` of blocks that go on from there.
    """

    ports = ("input", "shortcut", "addition", "output")
    read_ports = ("shortcut", "addition")

    def forward(self, x: Tensor, *args) -> Tensor:
        """(N, C, H, W), or (N, tokens, C), to the same shape; what else the block takes goes to its branch."""
        x = self.at_port("input", x)
        identity = self.at_port("addition", self.at_port("shortcut", x))
        total = identity + self.at_port("addition", self.branch(x, *args), operand=".residual")
        return self.at_port("output", self.after_sum(total))

    def after_sum(self, x: Tensor) -> Tensor:
        """The block's result, from the sum."""
        return x


class QuantResidualBlockNoBN(ShortcutSite, ResidualBlockNoBN):
    """The host's residual block (EDSR, MSRResNet) with the ports of :class:`ShortcutSite`."""

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the identity."""
        return self.conv2(self.relu(self.conv1(x))) * self.res_scale


class QuantResidualBlockBN(ShortcutSite, ResidualBlockBN):
    """SRResNet's residual block with the ports of :class:`ShortcutSite`."""


class QuantResidualDenseBlock(ShortcutSite, ResidualDenseBlock):
    """RDN's block with the ports of :class:`ShortcutSite`."""


class QuantResidualBlock(ShortcutSite, ResidualBlock):
    """CARN's residual block with the ports of :class:`ShortcutSite`."""

    after_sum = ResidualBlock.after_sum


class QuantDistillationStage(ShortcutSite, DistillationStage):
    """IDN's stage with the ports of :class:`ShortcutSite`.

    The identity is the stage input joined with the channels kept of the branch; ``shortcut`` is the stage input alone.
    """

    def forward(self, x: Tensor, convs: Sequence[nn.Module], down: nn.Module) -> Tensor:
        """(N, num_feat, H, W) to the same shape; see :class:`DistillationStage`."""
        x = self.at_port("input", x)
        kept, enhanced = self.branch(x, convs)
        identity = self.at_port("addition", torch.cat((self.at_port("shortcut", x), kept), 1))
        total = identity + self.at_port("addition", enhanced, operand=".residual")
        return self.at_port("output", self.compress(total, down))


class QuantRSTB(ShortcutSite, RSTB):
    """The host's residual Swin Transformer block (SwinIR) with the ports of :class:`ShortcutSite`, on tokens."""

    channel_axis = -1

    def branch(self, x: Tensor, x_size: tuple[int, int]) -> Tensor:
        """What is added to the identity: (N, tokens, C), of an image of height and width ``x_size``."""
        image = self.patch_unembed(self.residual_group(x, x_size), x_size)
        return self.patch_embed(self.conv(image))


class QuantRHAG(ShortcutSite, RHAG):
    """HAT's residual hybrid attention group with the ports of :class:`ShortcutSite`, on tokens."""

    channel_axis = -1


register_site_class(ResidualBlockNoBN, QuantResidualBlockNoBN)
register_site_class(ResidualBlockBN, QuantResidualBlockBN)
register_site_class(ResidualDenseBlock, QuantResidualDenseBlock)
register_site_class(ResidualBlock, QuantResidualBlock)
register_site_class(DistillationStage, QuantDistillationStage)
register_site_class(RSTB, QuantRSTB)
register_site_class(RHAG, QuantRHAG)
