"""From a file of float weights to the network they belong to: by an option file, or recognised from the state dict."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsr_plugin.checkpoint import float_state, load_float_weights
from qsr_plugin.errors import UserError, first_line
from qsr_plugin.options_file import backbone_options, options_folder

logger = logging.getLogger("qsr_plugin")

#: Side of the image a network is tried on; a multiple of the windows of transformers.
_TRIED = 64
#: dB between an image and its enlarged and reduced form, below which something is wrong; usual are 30 and more.
_ALIKE = 20.0


@dataclass(frozen=True)
class FloatNetwork:
    """A float network with its weights.

    Attributes:
        net: In evaluation mode.
        options: ``type`` and arguments that build it.
        scale: Its factor, as it enlarges an image.
        source: How it was found, for reports.
    """

    net: nn.Module
    options: dict[str, Any]
    scale: int
    source: str

    @property
    def label(self) -> str:
        """Architecture and scale."""
        kind = self.options.get("architecture", self.options["type"])
        return f"{kind.removesuffix('_qsr')} x{self.scale}"


def open_float_network(weights: Path, arch: Optional[str] = None, scale: Optional[int] = None) -> FloatNetwork:
    """Build the network of a float checkpoint and load it.

    Args:
        weights: ``.pth`` or ``.safetensors``.
        arch: Shipped backbone, or a YAML file with a ``network_g`` block; recognised from the weights if not given.
        scale: Upsampling factor, to check, and for weights that serve several.

    Raises:
        CheckpointError: If the file is no float checkpoint, or does not fit ``arch``.
        UserError: If it is not recognised, or is no super-resolution network of this scale for RGB images.
    """
    if arch is not None:
        options, source = backbone_options(arch), f"--arch {arch}"
    else:
        options, source = _recognised(float_state(weights), weights, scale)
    from qsr_plugin.archs.quant_net_arch import build_backbone

    net = build_backbone(options)
    load_float_weights(net, weights)
    found = _scale_in_use(net.eval(), weights)
    if scale is not None and found != scale:
        told = f"{FloatNetwork(net, dict(options), found, source).label}, {source}"
        raise UserError(f"--scale is {scale}, but {weights} enlarges {found} times ({told}): leave --scale out")
    return FloatNetwork(net, dict(options), found, source)


def _recognised(state: Mapping[str, Tensor], weights: Path, scale: Optional[int]) -> tuple[dict[str, Any], str]:
    from qsr_plugin.archs.recognise import recognise

    if (options := recognise(state, scale)) is not None:
        return options, "recognised"
    several = {} if scale else {one: found for one in (2, 3, 4) if (found := recognise(state, one)) is not None}
    if several:
        kind = next(iter(several.values()))["type"].removesuffix("_qsr")
        scales = " or ".join(map(str, several))
        raise UserError(f"{weights}: {kind}, whose weights serve several scales: add --scale {scales}")
    tried = "the networks of BasicSR and of this package"
    if importlib.util.find_spec("spandrel") is not None:
        from qsr_plugin.archs.spandrel_arch import recognise_with_spandrel

        if (options := recognise_with_spandrel(state)) is not None:
            return options, "recognised by spandrel"
        tried += ", and spandrel's"
    else:
        tried += " (spandrel knows more: pip install spandrel)"
    keys = ", ".join(list(state)[:4])
    shipped = ", ".join(sorted(path.stem for path in (options_folder() / "backbones").glob("*.yml")))
    raise UserError(
        f"{weights}: its {len(state)} tensors ({keys}, ...) are those of no network known here. Tried: {tried}. If it "
        "is a super-resolution network, give --arch FILE, a YAML file with a network_g block (type and arguments of a "
        f"registered network; your own with qsr --import FILE.py ...), or the name of one of these: {shipped}."
    )


def _scale_in_use(net: nn.Module, weights: Path) -> int:
    """How many times a network enlarges an RGB image, found by trying."""
    kind = type(net).__name__
    try:
        with torch.no_grad():
            out = net(torch.full((1, 3, _TRIED, _TRIED), 0.5))
    except RuntimeError as error:
        reason = first_line(error)
        raise UserError(f"{weights}: {kind} does not take an RGB image of {_TRIED}x{_TRIED}: {reason}") from None
    if not isinstance(out, Tensor) or out.dim() != 4:
        raise UserError(f"{weights}: {kind} returns no image, so it is no super-resolution network")
    if out.shape[1] != 3 or out.shape[2] != out.shape[3] or out.shape[2] % _TRIED or out.shape[2] < _TRIED:
        raise UserError(
            f"{weights}: {kind} makes {tuple(out.shape[1:])} of an image of {(3, _TRIED, _TRIED)}: expected 3 "
            "channels, and both sides enlarged by a whole number"
        )
    if not bool(torch.isfinite(out).all()):
        raise UserError(
            f"{weights}: the output of {kind} holds NaN or infinity: the weights are damaged, get them again"
        )
    return out.shape[2] // _TRIED


def check_enlarges(network: FloatNetwork, crop: Tensor) -> float:
    """Compare an image with its enlarged form, reduced again; warn where they differ much.

    What leaves no trace in a state dict (range of the pixels, mean, scaling of residuals) may be assumed wrongly.

    Args:
        network: To try.
        crop: ``(N, 3, H, W)``, RGB in [0, 1].

    Returns:
        PSNR in dB.
    """
    crop = crop[:1].to(next(network.net.parameters()).device)
    with torch.no_grad():
        out = network.net(crop).clamp(0, 1)
    height, width = (network.scale * side for side in crop.shape[2:])
    error = float(F.mse_loss(F.avg_pool2d(out[..., :height, :width], network.scale), crop))
    psnr = -10 * torch.tensor(max(error, 1e-12)).log10().item()
    if psnr < _ALIKE:
        logger.warning(
            "the float network does not enlarge a calibration image: reduced again it is %.1f dB from the image, usual "
            "are 30 or more. The weights may be of another task, or of other options than %s: give --arch FILE "
            "(img_range, rgb_mean, res_scale, output).",
            psnr,
            {key: value for key, value in network.options.items() if key != "type"},
        )
    return psnr
