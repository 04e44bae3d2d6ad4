"""Window attention whose two matrix products can be quantized: ports for all four operands.

What a recipe asks for by roles or names::

    query ---+                            value ---+
             +-- scores --- softmax --- attention -+-- attended values
    key -----+

The same class serves every attention whose float form has a method ``attend`` for all that comes after the projection
of queries, keys and values and before that of the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from basicsr.archs.swinir_arch import WindowAttention
from qsr_plugin.archs.hat_blocks import OCAB
from qsr_plugin.archs.hat_blocks import WindowAttention as HATWindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from qsr_plugin.quant.sites import MatMul, PortSite, register_site_class


class TransposedMatMul(MatMul):
    """Product with the transpose of the right operand: similarities of queries and keys."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right^T`` for (..., M, K) and (..., N, K)."""
        return left @ right.transpose(-2, -1)


class AttentionSite(PortSite):
    """Ports at the operands of both products, ``query`` (scaled), ``key``, ``attention`` (after softmax), ``value``.

    Before a float class whose forward calls ``self.attend(q, k, v, bias)``. Windows are folded into the batch, image
    after image; channels, the last axis, are those of a head, and of ``attention`` the keys. The products are child
    modules without parameters, so that reports tell them apart; state-dict keys stay as they are. A float class says
    how many channels pass the ports in an attribute ``port_channels``, port to channels.
    """

    ports: ClassVar[tuple[str, ...]] = (*PortSite.ports, "query", "key", "attention", "value")
    read_ports: ClassVar[tuple[str, ...]] = ("query", "key", "attention", "value")
    channel_axis: ClassVar[int] = -1

    @classmethod
    def from_float(cls, module: nn.Module, name: str = "") -> nn.Module:
        """See :meth:`qsr_plugin.quant.sites.Site.from_float`."""
        site = super().from_float(module, name)
        site.scores, site.mixture = TransposedMatMul(), MatMul()
        return site

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *biases: Tensor) -> Tensor:
        """Mix values by the similarity of queries and keys.

        Args:
            q: (B, heads, N, d), scaled already; B windows of all images.
            k: (B, heads, M, d).
            v: (B, heads, M, d).
            *biases: Added to the similarities one after the other, each broadcastable to (B, heads, N, M).

        Returns:
            (B, heads, N, d).
        """
        scores = self.scores(self.at_port("query", q), self.at_port("key", k))
        for bias in biases:
            scores = scores + bias
        attention = self.at_port("attention", self.after_softmax(F.softmax(scores, dim=-1)))
        return self.mixture(attention, self.at_port("value", v))

    def after_softmax(self, attention: Tensor) -> Tensor:
        """What the float class does with the weights before they are used, if anything."""
        return attention


class QuantWindowAttention(AttentionSite, WindowAttention):
    """The host's window attention (SwinIR) with the ports of :class:`AttentionSite`."""

    @classmethod
    def channels_of(cls, module: nn.Module) -> Mapping[str, int]:
        """See :meth:`qsr_plugin.quant.sites.Site.channels_of`."""
        head, (height, width) = module.dim // module.num_heads, module.window_size
        return {"query": head, "key": head, "value": head, "attention": height * width}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention in every window.

        Args:
            x: (windows * images, N, C), the windows of an image in a row.
            mask: (windows, N, N), added to the similarities: 0, or a large negative number for pairs that are no
                neighbours in the image.

        Returns:
            The shape of ``x``.
        """
        x = self.at_port("input", x)
        windows, tokens, channels = x.shape
        parts = self.qkv(x).reshape(windows, tokens, 3, self.num_heads, channels // self.num_heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        table = self.relative_position_bias_table[self.relative_position_index.flatten()]
        biases = [table.view(1, tokens, tokens, -1).permute(0, 3, 1, 2)]
        if mask is not None:
            biases.append(mask.unsqueeze(1).repeat(windows // mask.shape[0], 1, 1, 1))
        mixed = self.attend(q * self.scale, k, v, *biases).transpose(1, 2).reshape(windows, tokens, channels)
        return self.at_port("output", self.proj_drop(self.proj(mixed)))

    def after_softmax(self, attention: Tensor) -> Tensor:
        """Dropout, where the network has it."""
        return self.attn_drop(attention)


class QuantHATWindowAttention(AttentionSite, HATWindowAttention):
    """HAT's window attention with the ports of :class:`AttentionSite`."""


class QuantOCAB(AttentionSite, OCAB):
    """HAT's overlapping attention with the ports of :class:`AttentionSite`."""


register_site_class(WindowAttention, QuantWindowAttention)
register_site_class(HATWindowAttention, QuantHATWindowAttention)
register_site_class(OCAB, QuantOCAB)
