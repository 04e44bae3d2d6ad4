"""Constructor arguments of backbones, read back from their modules.

A network built through ``QuantNet`` remembers its options. One that a user built directly does not, so they are derived
here from its attributes and tensor shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from basicsr.archs.swinir_arch import DropPath
from qsr_plugin.archs.option_readers import options_by_shape
from torch import nn

from qsr_plugin.checkpoint import CheckpointError


def _block(net: nn.Module) -> nn.Module:
    """The first block of the body that has its layers; a slimmed network keeps little of the others."""
    return next(block for block in net.body if any(block.children()))


def _edsr(net: nn.Module) -> dict[str, Any]:
    return {
        "num_in_ch": net.conv_first.in_channels,
        "num_out_ch": net.conv_last.out_channels,
        "num_feat": net.conv_first.out_channels,
        "num_block": len(net.body),
        "upscale": math.prod(m.upscale_factor for m in net.upsample if isinstance(m, nn.PixelShuffle)),
        "res_scale": _block(net).res_scale,
        "img_range": net.img_range,
        "rgb_mean": net.mean.flatten().tolist(),
    }


def _msrresnet(net: nn.Module) -> dict[str, Any]:
    return {
        "num_in_ch": net.conv_first.in_channels,
        "num_out_ch": net.conv_last.out_channels,
        "num_feat": net.conv_first.out_channels,
        "num_block": len(net.body),
        "upscale": net.upscale,
    }


def _srresnet(net: nn.Module) -> dict[str, Any]:
    block = _block(net)
    options = {"bias": block.conv1.bias is not None, "bn_eps": block.bn1.eps, "output": net.output}
    return {**_msrresnet(net), **options}


def _one_shuffle(net: nn.Module) -> dict[str, Any]:
    """RLFN, IMDN, RFDN and BSRN, whose images come from one pixel shuffle."""
    scale = next(m.upscale_factor for m in net.modules() if isinstance(m, nn.PixelShuffle))
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    kind = getattr(net, "float_class", type(net)).__name__
    unseen = {"img_range": net.img_range} if hasattr(net, "img_range") else {}
    return {**options_by_shape(f"{kind}_qsr", shapes, scale), **unseen}


def _rdn(net: nn.Module) -> dict[str, Any]:
    return {
        "num_in_ch": net.SFENet1.in_channels,
        "num_out_ch": net.UPNet[-1].out_channels,
        "num_feat": net.SFENet1.out_channels,
        "num_block": len(net.RDBs),
        "num_layer": net.num_layer,
        "num_grow_ch": net.UPNet[-1].in_channels,
        "upscale": net.upscale,
        "img_range": net.img_range,
    }


def _swinir(net: nn.Module) -> dict[str, Any]:
    """Layers that were dropped count as those left."""
    whole = next(layer for layer in net.layers if hasattr(layer, "residual_group"))
    groups = [getattr(layer, "residual_group", whole.residual_group) for layer in net.layers]
    block = whole.residual_group.blocks[0]
    height, width = net.patch_embed.img_size
    drops = [module.drop_prob for module in net.modules() if isinstance(module, DropPath)]
    options = {
        "img_size": height if height == width else [height, width],
        "in_chans": net.conv_first.in_channels,
        "embed_dim": net.embed_dim,
        "depths": [len(group.blocks) for group in groups],
        "num_heads": [group.blocks[0].num_heads for group in groups],
        "window_size": block.window_size,
        "mlp_ratio": net.mlp_ratio,
        "qkv_bias": block.attn.qkv.bias is not None,
        "drop_rate": net.pos_drop.p,
        "attn_drop_rate": block.attn.attn_drop.p,
        "drop_path_rate": max(drops, default=0.0),
        "ape": net.ape,
        "patch_norm": net.patch_norm,
        "upscale": net.upscale,
        "img_range": net.img_range,
        "upsampler": net.upsampler,
        "resi_connection": "1conv" if isinstance(net.conv_after_body, nn.Conv2d) else "3conv",
    }
    usual = (block.dim // block.num_heads) ** -0.5
    return options if block.attn.scale == usual else {**options, "qk_scale": block.attn.scale}


def _by_shape(*unseen: str) -> Callable[[nn.Module], dict[str, Any]]:
    """Reader of a network whose shapes show all but its scale and the attributes ``unseen``."""

    def read(net: nn.Module) -> dict[str, Any]:
        shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
        kind = getattr(net, "float_class", type(net)).__name__
        return {**options_by_shape(f"{kind}_qsr", shapes, net.upscale), **{name: getattr(net, name) for name in unseen}}

    return read


def _hat(net: nn.Module) -> dict[str, Any]:
    """Groups that were dropped count as the first of those left."""
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    groups = {number: hasattr(layer, "residual_group") for number, layer in enumerate(net.layers)}
    whole = next(number for number, complete in groups.items() if complete)
    group = {key: shape for key, shape in shapes.items() if key.startswith(f"layers.{whole}.")}
    for number in (number for number, complete in groups.items() if not complete):
        shapes |= {key.replace(f".{whole}.", f".{number}.", 1): shape for key, shape in group.items()}
    unseen = {name: getattr(net, name) for name in ("conv_scale", "drop_path_rate", "img_range")}
    return {**options_by_shape("HAT_qsr", shapes), **unseen}


_READERS = {
    "EDSR": _edsr,
    "MSRResNet": _msrresnet,
    "SRResNet": _srresnet,
    "RLFN": _one_shuffle,
    "IMDN": _one_shuffle,
    "RFDN": _one_shuffle,
    "BSRN": _one_shuffle,
    "CARN": _by_shape(),
    "RDN": _rdn,
    "IDN": _by_shape("rgb"),
    "SwinIR": _swinir,
    "HAT": _hat,
}


def describe_backbone(net: nn.Module) -> dict[str, Any]:
    """Options that rebuild a network's float backbone.

    Args:
        net: Float or quantized network.

    Raises:
        CheckpointError: For a class without a reader here, or another one of the same name.
    """
    kind = getattr(net, "float_class", type(net)).__name__
    try:
        return {"type": kind, **_READERS[kind](net)}
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError) as error:
        raise CheckpointError(
            f"the constructor arguments of {kind} are not known: build it with QuantNet, or set net.backbone_options = "
            "{'type': ..., and its arguments} before saving"
        ) from error
