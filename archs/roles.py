"""Role tables of the backbones: which of their modules play which part in a quantization recipe.

A table maps a role to places ``"pattern"`` or ``"pattern:port"``; ``*`` stays within one dotted part of a module name.
An empty tuple says that the backbone has no such place. Roles used by the shipped recipes:

==========================  ============================================================================================
``head``                    first convolution(s)
``block``                   residual block; its input feeds both the branch and the identity path
``block.shortcut``          identity path alone
``block.conv``              every convolution of a block
``block.conv_first``        first convolution of a block
``block.conv_last``         last convolution of a block
``block.residual``          result of the branch just before the addition, in blocks without batch norm
``block.addition``          both operands of the addition, through one quantizer; only in blocks without batch norm
``body_end``                convolution after the last block
``upsampler``               convolutions that raise the resolution
``tail``                    convolution(s) that make the image
``features``                input of the upsampler: what feature distillation compares
==========================  ============================================================================================
"""

from __future__ import annotations

from qsr_plugin.quant.places import ROLE_TABLES, register_roles

_EDSR_BLOCKS = {
    "block": ("body.*",),
    "block.shortcut": ("body.*:shortcut",),
    "block.conv": ("body.*.conv?",),
    "block.conv_first": ("body.*.conv1",),
    "block.conv_last": ("body.*.conv2",),
    "block.residual": ("body.*.conv2:output",),
    "block.addition": ("body.*:addition",),
}

register_roles(
    "EDSR",
    {
        "head": ("conv_first",),
        **_EDSR_BLOCKS,
        "body_end": ("conv_after_body",),
        "upsampler": ("upsample.*",),
        "tail": ("conv_last",),
        "features": ("upsample:input",),
    },
)

register_roles(
    "MSRResNet",
    {
        "head": ("conv_first",),
        **_EDSR_BLOCKS,
        "body_end": (),
        "upsampler": ("upconv?",),
        "tail": ("conv_hr", "conv_last"),
        "features": ("upconv1:input",),
    },
)

register_roles(
    "SRResNet",
    {
        "head": ("conv_first",),
        **_EDSR_BLOCKS,
        "block.residual": (),  # a batch norm stands before the addition
        "block.addition": (),
        "body_end": ("conv_body",),
        "upsampler": ("upconv?",),
        "tail": ("conv_last",),
        "features": ("upconv1:input",),
    },
)


def list_backbones() -> list[str]:
    """Class names of the backbones with a role table, usable with every recipe."""
    return sorted(ROLE_TABLES)
