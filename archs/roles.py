"""Role tables of the backbones: which of their modules play which part in a quantization recipe.

A table maps a role to places ``"pattern"`` or ``"pattern:port"``; ``*`` stays within one dotted part of a module name.
An empty tuple says that the backbone has no such place; a placement that asks for a role that a table does not have is
refused. Roles used by the shipped recipes:

==========================  ============================================================================================
``head``                    first convolution(s)
``block``                   residual block; its input feeds both the branch and the identity path
``block.shortcut``          identity path alone
``block.conv``              every convolution of a block, in transformers also every linear layer of attention and MLPs
``block.conv_first``        first convolution of a block
``block.conv_later``        every convolution of a block but the first
``block.conv_last``         last convolution of a block
``block.residual``          result of the branch just before the addition, where this is the result of a convolution
``block.addition``          both operands of the addition, through one quantizer; only in blocks without batch norm
``block.linear``            transformers: the linear layers of a block
``block.mlp``               those of its MLPs
``block.mlp_last``          the last of each MLP, which reads what comes out of a GELU
``block.attention``         operands of the matrix products of attention: queries, keys, attention map, values
``body_end``                convolutions of the body outside of its blocks: after the last one, or joining several
``upsampler``               convolutions that raise the resolution
``tail``                    convolution(s) that make the image
``features``                input of the upsampler: what feature distillation compares
==========================  ============================================================================================
"""

from __future__ import annotations

from typing import Optional

from qsr_plugin.archs.hat_roles import hat_roles
from torch import nn

from qsr_plugin.quant.places import ROLE_TABLES, RoleTable, register_roles

_EDSR_BLOCKS = {
    "block": ("body.*",),
    "block.shortcut": ("body.*:shortcut",),
    "block.conv": ("body.*.conv?",),
    "block.conv_first": ("body.*.conv1",),
    "block.conv_later": ("body.*.conv2",),
    "block.conv_last": ("body.*.conv2",),
    "block.residual": ("body.*.conv2:output",),
    "block.addition": ("body.*:addition",),
}


def _convolutions(net: nn.Module, part: str) -> tuple[str, ...]:
    """Names of the convolutions in a part of a network, in order."""
    inside = ((name, module) for name, module in net.named_modules() if name.startswith(f"{part}."))
    return tuple(name for name, module in inside if isinstance(module, nn.Conv2d))


def _edsr(net: nn.Module) -> RoleTable:
    return {
        "head": ("conv_first",),
        **_EDSR_BLOCKS,
        "body_end": ("conv_after_body",),
        "upsampler": _convolutions(net, "upsample"),
        "tail": ("conv_last",),
        "features": ("upsample:input",),
    }


register_roles("EDSR", _edsr)

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


def _carn(net: nn.Module) -> RoleTable:
    """Blocks are the residual blocks, as in the papers that quantize CARN: the cascading blocks have no identity path.

    With groups, a 1x1 convolution is the last one of a block. Of several upsamplers, one runs.
    """
    first, later = "b*.b*.body.0", ("b*.b*.body.2", *(("b*.b*.body.4",) if net.group > 1 else ()))
    return {
        "head": ("entry",),
        "block": ("b*.b*",),
        "block.shortcut": ("b*.b*:shortcut",),
        "block.conv": (first, *later),
        "block.conv_first": (first,),
        "block.conv_later": later,
        "block.conv_last": later[-1:],
        "block.residual": (f"{later[-1]}:output",),
        "block.addition": ("b*.b*:addition",),
        "body_end": ("b*.c*.body.0", "c*.body.0"),
        "upsampler": _convolutions(net, f"upsample.{net.upsampler}"),
        "tail": ("exit",),
        "features": (f"upsample.{net.upsampler}:input",),
    }


register_roles("CARN", _carn)


def _rdn(net: nn.Module) -> RoleTable:
    """The last convolution of a block is the 1x1 on all its layers; the last layer of the upsampler makes the image."""
    first, *others = (f"RDBs.*.convs.{number}.conv.0" for number in range(net.num_layer))
    *upsampler, tail = _convolutions(net, "UPNet")
    later = (*others, "RDBs.*.LFF")
    return {
        "head": ("SFENet?",),
        "block": ("RDBs.*",),
        "block.shortcut": ("RDBs.*:shortcut",),
        "block.conv": (first, *later),
        "block.conv_first": (first,),
        "block.conv_later": later,
        "block.conv_last": ("RDBs.*.LFF",),
        "block.residual": ("RDBs.*.LFF:output",),
        "block.addition": ("RDBs.*:addition",),
        "body_end": ("GFF.?",),
        "upsampler": tuple(upsampler),
        "tail": (tail,),
        "features": ("UPNet:input",),
    }


register_roles("RDN", _rdn)


register_roles(
    "IDN",
    {
        "head": ("conv1", "conv2"),
        "block": ("stage*",),
        "block.shortcut": ("stage*:shortcut",),
        "block.conv": ("conv*_?",),
        "block.conv_first": ("conv*_1",),
        "block.conv_later": tuple(f"conv*_{position}" for position in range(2, 7)),
        "block.conv_last": ("conv*_6",),
        "block.residual": (),  # an activation stands before the addition
        "block.addition": ("stage*:addition",),
        "body_end": ("down*",),
        "upsampler": (),  # the convolution that raises the resolution makes the image
        "tail": ("upsample",),
        "features": ("upsample:input",),
    },
)


def _swinir(net: nn.Module) -> Optional[RoleTable]:
    """Blocks are the residual Swin Transformer blocks; ``None`` for a class of this name from elsewhere.

    A norm stands between the input of a block and its first layer, so no convolution or linear layer reads that input.
    """
    if not any(cls.__module__.startswith("basicsr.") for cls in type(net).__mro__):
        return None
    group = "layers.*.residual_group.blocks.*"
    linear = tuple(f"{group}.{layer}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
    body_end = _convolutions(net, "conv_after_body") or ("conv_after_body",)
    convs = tuple(name.replace("conv_after_body", "layers.*.conv") for name in body_end)  # both are built alike
    return {
        "head": ("conv_first",),
        "block": ("layers.*",),
        "block.shortcut": ("layers.*:shortcut",),
        "block.conv": (*linear, *convs),
        "block.conv_first": (),
        "block.conv_later": (*linear, *convs),
        "block.conv_last": convs[-1:],
        "block.residual": (f"{convs[-1]}:output",),
        "block.addition": ("layers.*:addition",),
        "block.linear": linear,
        "block.mlp": linear[2:],
        "block.mlp_last": linear[3:],
        "block.attention": tuple(f"{group}.attn:{port}" for port in ("query", "key", "attention", "value")),
        "body_end": body_end,
        **_swinir_ends(net),
    }


def _swinir_ends(net: nn.Module) -> RoleTable:
    """What follows the body; where there is a convolution before the upsampler, it counts as a part of it."""
    if net.upsampler == "pixelshuffledirect":  # the convolution that raises the resolution makes the image
        return {"upsampler": (), "tail": ("upsample.0",), "features": ("upsample:input",)}
    if net.upsampler == "pixelshuffle":
        layers, tail = _convolutions(net, "upsample"), ("conv_last",)
    elif net.upsampler == "nearest+conv":
        layers, tail = ("conv_up?",), ("conv_hr", "conv_last")
    else:
        return {"upsampler": (), "tail": ("conv_last",), "features": ("conv_last:input",)}
    return {"upsampler": ("conv_before_upsample.0", *layers), "tail": tail, "features": ("conv_before_upsample:input",)}


register_roles("SwinIR", _swinir)
register_roles("HAT", hat_roles)


def list_backbones() -> list[str]:
    """Class names of the backbones with a role table, usable with every recipe."""
    return sorted(ROLE_TABLES)
