"""Constructor arguments of backbones from the shapes of their tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

#: Features of the wide EDSR, whose residual scale is published as 0.1; it is 1 in the smaller ones.
_WIDE_EDSR = 256


def options_by_shape(kind: str, shapes: Shapes, scale: int | None = None) -> dict[str, Any]:
    """Constructor arguments that show in shapes.

    Args:
        kind: Registered name, one of those this module has a reader for.
        shapes: Shape by key; more keys than the architecture has do not matter.
        scale: Upsampling factor. Where one convolution before one pixel shuffle makes it, the output channels follow
            from it; if it is not given, they are those of the input. IDN and CARN for several scales need it: none of
            their shapes depends on it.

    Raises:
        LookupError, ArithmeticError, TypeError, ValueError: If keys and shapes are not those of the architecture.
    """
    options = READERS[kind](shapes, scale)
    if any(value == 0 for value in options.values() if type(value) is int):
        raise ValueError(f"no {kind} has {options}")
    return options


def _count(shapes: Shapes, key: str, first: int = 0, step: int = 1) -> int:
    """How many keys there are in a row, ``key`` with a number from ``first`` on."""
    number = first
    while key.format(number) in shapes:
        number += step
    return (number - first) // step


def _ends(shapes: Shapes, first: str, last: str) -> dict[str, Any]:
    num_feat, num_in_ch = shapes[f"{first}.weight"][:2]
    return {"num_in_ch": num_in_ch, "num_out_ch": shapes[f"{last}.weight"][0], "num_feat": num_feat}


def _shuffle(rows: int, num_in_ch: int, scale: int | None) -> dict[str, int]:
    """Output channels and scale of one convolution with so many ``rows`` before one pixel shuffle."""
    if scale is None:
        return {"num_out_ch": num_in_ch, "upscale": math.isqrt(rows // num_in_ch)}
    return {"num_out_ch": rows // scale**2, "upscale": scale}


def _stages(shapes: Shapes, num_feat: int) -> int:
    """Scale of the host's ``Upsample``, stages of factor 2 or one of factor 3."""
    count = _count(shapes, "upsample.{}.weight", step=2)
    return 3 if count == 1 and shapes["upsample.0.weight"][0] == 9 * num_feat else 2**count


def _edsr(shapes: Shapes, scale: int | None) -> dict[str, Any]:
    ends = _ends(shapes, "conv_first", "conv_last")
    return {
        **ends,
        "num_block": _count(shapes, "body.{}.conv1.weight"),
        "upscale": _stages(shapes, ends["num_feat"]),
        "res_scale": 0.1 if ends["num_feat"] == _WIDE_EDSR else 1,
    }


def _msrresnet(shapes: Shapes, scale: int | None) -> dict[str, Any]:
    ends = _ends(shapes, "conv_first", "conv_last")
    one_step = math.isqrt(shapes["upconv1.weight"][0] // ends["num_feat"])
    return {
        **ends,
        "num_block": _count(shapes, "body.{}.conv1.weight"),
        "upscale": 4 if "upconv2.weight" in shapes else one_step,
    }


def _srresnet(shapes: Shapes, scale: int | None) -> dict[str, Any]:
    return {**_msrresnet(shapes, scale), "bias": "conv_body.bias" in shapes}


def _rlfn(shapes: Shapes, scale: int | None) -> dict[str, Any]:
    num_feat, num_in_ch = shapes["conv_1.weight"][:2]
    return {
        "num_in_ch": num_in_ch,
        "num_feat": num_feat,
        "num_mid": shapes["block_1.c1_r.weight"][0],
        "num_block": _count(shapes, "block_{}.c1_r.weight", first=1),
        "esa_channels": shapes["block_1.esa.conv1.weight"][0],
        **_shuffle(shapes["upsampler.0.weight"][0], num_in_ch, scale),
    }


def _distillation(block: str, upsampler: str, stem: str = "fea_conv", copies: int = 1) -> Callable[..., dict[str, Any]]:
    """Reader for IMDN and its successors.

    Args:
        block: Key that every block has, with ``{}`` for its number.
        upsampler: Name of the convolution before the pixel shuffle.
        stem: Name of the first convolution.
        copies: How often the input image is repeated.
    """

    def read(shapes: Shapes, scale: int | None) -> dict[str, Any]:
        num_feat, channels = shapes[f"{stem}.weight"][:2]
        return {
            "num_in_ch": channels // copies,
            "num_feat": num_feat,
            "num_block": _count(shapes, block, first=1),
            **_shuffle(shapes[f"{upsampler}.weight"][0], channels // copies, scale),
        }

    return read


def _carn(shapes: Shapes, scale: int | None) -> dict[str, Any]:
    num_feat = shapes["entry.weight"][0]
    multi_scale = "upsample.up2.body.0.weight" in shapes
    if multi_scale:
        upscale = _told(scale)
    elif "upsample.up.body.3.weight" in shapes:
        upscale = 4
    else:
        upscale = math.isqrt(shapes["upsample.up.body.0.weight"][0] // num_feat)
    return {
        "num_feat": num_feat,
        "num_block": _count(shapes, "c{}.body.0.weight", first=1),
        "upscale": upscale,
        "group": num_feat // shapes["b1.b1.body.0.weight"][1],
        "shared": "b1.b2.body.0.weight" not in shapes,
        "multi_scale": multi_scale,
    }


def _rdn(shapes: Shapes, scale: int | None) -> dict[str, Any]:
    twice, num_grow_ch = "UPNet.4.weight" in shapes, shapes["RDBs.0.convs.0.conv.0.weight"][0]
    return {
        **_ends(shapes, "SFENet1", "UPNet.4" if twice else "UPNet.2"),
        "num_block": _count(shapes, "RDBs.{}.LFF.weight"),
        "num_layer": _count(shapes, "RDBs.0.convs.{}.conv.0.weight"),
        "num_grow_ch": num_grow_ch,
        "upscale": 4 if twice else math.isqrt(shapes["UPNet.0.weight"][0] // num_grow_ch),
    }


def _idn(shapes: Shapes, scale: int | None) -> dict[str, Any]:
    num_feat, num_in_ch = shapes["conv1.weight"][:2]
    return {
        "num_in_ch": num_in_ch,
        "num_feat": num_feat,
        "num_block": _count(shapes, "down{}.weight", first=1),
        "upscale": _told(scale),
        "rgb": num_in_ch == 1,
    }


def _told(scale: int | None) -> int:
    """A scale that no shape shows."""
    if scale is None:
        raise LookupError("tensors of the same shapes serve several scales")
    return scale


def _swinir(shapes: Shapes, scale: int | None) -> dict[str, Any]:
    embed_dim, in_chans = shapes["conv_first.weight"][:2]
    block = "layers.{}.residual_group.blocks.{}."
    depths, num_heads = [], []
    for layer in range(_count(shapes, "layers.{}.residual_group.blocks.0.norm1.weight")):
        depths.append(_count(shapes, block.format(layer, "{}") + "norm1.weight"))
        num_heads.append(shapes[block.format(layer, 0) + "attn.relative_position_bias_table"][1])
    first = block.format(0, 0)
    window_size = (math.isqrt(shapes[first + "attn.relative_position_bias_table"][0]) + 1) // 2
    return {
        "in_chans": in_chans,
        "img_size": _swinir_img_size(shapes, window_size),
        "window_size": window_size,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": num_heads,
        "mlp_ratio": shapes[first + "mlp.fc1.weight"][0] / embed_dim,
        "qkv_bias": first + "attn.qkv.bias" in shapes,
        "ape": "absolute_pos_embed" in shapes,
        "patch_norm": "patch_embed.norm.weight" in shapes,
        "resi_connection": "3conv" if "conv_after_body.0.weight" in shapes else "1conv",
        **_swinir_upsampler(shapes, in_chans),
    }


def _swinir_img_size(shapes: Shapes, window_size: int) -> int:
    """Side of the images that masks or position embeddings were made for; 64 where there are none."""
    if "absolute_pos_embed" in shapes:
        return math.isqrt(shapes["absolute_pos_embed"][1])
    mask = "layers.0.residual_group.blocks.1.attn_mask"
    return window_size * math.isqrt(shapes[mask][0]) if mask in shapes else 64


def _swinir_upsampler(shapes: Shapes, in_chans: int) -> dict[str, Any]:
    if "conv_up1.weight" in shapes:
        return {"upsampler": "nearest+conv", "upscale": 4}
    if "conv_before_upsample.0.weight" in shapes:
        return {"upsampler": "pixelshuffle", "upscale": _stages(shapes, shapes["conv_before_upsample.0.weight"][0])}
    if "upsample.0.weight" in shapes:
        upscale = math.isqrt(shapes["upsample.0.weight"][0] // in_chans)
        return {"upsampler": "pixelshuffledirect", "upscale": upscale}
    return {"upsampler": "", "upscale": 1}


def _hat(shapes: Shapes, scale: int | None) -> dict[str, Any]:
    embed_dim, in_chans = shapes["conv_first.weight"][:2]
    block = "layers.{}.residual_group.blocks.{}."
    groups = _count(shapes, "layers.{}.residual_group.blocks.0.norm1.weight")
    overlap = "layers.{}.residual_group.overlap_attn.relative_position_bias_table"
    first = block.format(0, 0)
    window_size = (math.isqrt(shapes[first + "attn.relative_position_bias_table"][0]) + 1) // 2
    extra = math.isqrt(shapes[overlap.format(0)][0]) + 1 - 2 * window_size
    return {
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depths": [_count(shapes, block.format(group, "{}") + "norm1.weight") for group in range(groups)],
        "num_heads": [shapes[overlap.format(group)][1] for group in range(groups)],
        "window_size": window_size,
        "compress_ratio": embed_dim // shapes[first + "conv_block.cab.0.weight"][0],
        "squeeze_factor": embed_dim // shapes[first + "conv_block.cab.3.attention.1.weight"][0],
        "overlap_ratio": extra / window_size,
        "mlp_ratio": shapes[first + "mlp.fc1.weight"][0] / embed_dim,
        "upscale": _stages(shapes, shapes["conv_before_upsample.0.weight"][0]),
    }


#: By registered name: takes shapes and the scale, returns arguments.
READERS: dict[str, Callable[[Shapes, int | None], dict[str, Any]]] = {
    "EDSR": _edsr,
    "MSRResNet": _msrresnet,
    "SRResNet_qsr": _srresnet,
    "RLFN_qsr": _rlfn,
    "IMDN_qsr": _distillation("IMDB{}.c1.weight", "upsampler.0"),
    "RFDN_qsr": _distillation("B{}.c1_r.weight", "upsampler.0"),
    "BSRN_qsr": _distillation("B{}.c1_r.pw.weight", "upsampler.upsampleOneStep.0", "fea_conv.pw", copies=4),
    "CARN_qsr": _carn,
    "RDN_qsr": _rdn,
    "IDN_qsr": _idn,
    "SwinIR": _swinir,
    "HAT_qsr": _hat,
}
