"""Role table of HAT. What the roles mean is said in :mod:`qsr_plugin.archs.roles`."""

from __future__ import annotations

from typing import Optional

from torch import nn

from qsr_plugin.quant.places import RoleTable

_BLOCK, _OVERLAP = "layers.*.residual_group.blocks.*", "layers.*.residual_group.overlap_attn"
_MLP = tuple(f"{part}.mlp.{layer}" for part in (_BLOCK, _OVERLAP) for layer in ("fc1", "fc2"))
_LINEAR = (*(f"{part}.{layer}" for part in (f"{_BLOCK}.attn", _OVERLAP) for layer in ("qkv", "proj")), *_MLP)


def hat_roles(net: nn.Module) -> Optional[RoleTable]:
    """Blocks are the residual hybrid attention groups; ``None`` for a class of this name from elsewhere.

    A norm stands between the input of a block and its first layer, so no convolution or linear layer reads that input.
    The channel attention blocks have a role of their own, ``block.channel_attention``, which no shipped recipe names:
    in published trainings gradients exploded until they were left float (Granular-DQ, supplement). An option file may
    ask for them.
    """
    from qsr_plugin.archs.hat_arch import HAT  # needs the host, and role tables are listed without

    if not isinstance(net, HAT):
        return None
    shuffled = tuple(
        f"upsample.{name}" for name, layer in net.upsample.named_children() if isinstance(layer, nn.Conv2d)
    )
    return {
        "head": ("conv_first",),
        "block": ("layers.*",),
        "block.shortcut": ("layers.*:shortcut",),
        "block.conv": (*_LINEAR, "layers.*.conv"),
        "block.conv_first": (),
        "block.conv_later": (*_LINEAR, "layers.*.conv"),
        "block.conv_last": ("layers.*.conv",),
        "block.residual": ("layers.*.conv:output",),
        "block.addition": ("layers.*:addition",),
        "block.linear": _LINEAR,
        "block.mlp": _MLP,
        "block.mlp_last": _MLP[1::2],
        "block.attention": tuple(
            f"{part}:{port}" for part in (f"{_BLOCK}.attn", _OVERLAP) for port in ("query", "key", "attention", "value")
        ),
        "block.channel_attention": tuple(
            f"{_BLOCK}.conv_block.cab.{layer}" for layer in ("0", "2", "3.attention.1", "3.attention.3")
        ),
        "body_end": ("conv_after_body",),
        "upsampler": ("conv_before_upsample.0", *shuffled),
        "tail": ("conv_last",),
        "features": ("conv_before_upsample:input",),
    }
