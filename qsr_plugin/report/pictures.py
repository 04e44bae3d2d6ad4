"""What a quantized network makes of some images beside its float network, where the two differ most."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image
from torch import nn

from qsr_plugin.quant.record import evaluating
from qsr_plugin.report.crops import Box, largest_box
from qsr_plugin.report.evaluate import psnr_of, super_resolve

_SIDE = 96  # of a crop, in HR pixels
_WHOLE = 320  # longer side of the small picture of the whole image
_LINE = (214, 39, 40)


@dataclass(frozen=True)
class Tile:
    """One picture with what stands below it.

    Attributes:
        label: What it is.
        note: A figure that goes with it; may be empty.
        png: The picture.
    """

    label: str
    note: str
    png: bytes

    @property
    def source(self) -> str:
        """Address of a picture that needs no file."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Example:
    """One image: small as a whole, with a box, and the same crop of every result.

    Attributes:
        name: Of the image.
        whole: The quantized network's result.
        tiles: The crops.
    """

    name: str
    whole: Tile
    tiles: tuple[Tile, ...]


def example_of(
    name: str, lr: np.ndarray, nets: Mapping[str, nn.Module], *, hr: np.ndarray | None = None, scale: int
) -> Example:
    """Run the float and the quantized network on one image, and cut out where their results differ most.

    Args:
        name: Of the image.
        lr: (H, W, 3) RGB, uint8 or uint16.
        nets: Label to network: the float one, then the quantized one.
        hr: (scale H, scale W, 3) RGB uint8, if there is one: then results have their PSNR.
        scale: Factor of the super-resolution.

    Raises:
        ValueError: If an output holds NaN or infinity.
    """
    results = {}
    for label, net in nets.items():
        with evaluating(net):
            results[label] = super_resolve(net, lr, name)
    plain, quantized = results.values()
    box = _where_they_differ(plain, quantized)
    bicubic = _bicubic(lr, quantized.shape[:2])
    tiles = [_tile(bicubic, "bicubic", box, hr, scale)]
    tiles += [_tile(image, label, box, hr, scale) for label, image in results.items()]
    if hr is None:
        tiles[-1] = Tile(tiles[-1].label, f"{_psnr(quantized, plain, scale)} to float", tiles[-1].png)
    else:
        tiles.append(_tile(hr, "original (HR)", box, None, scale))
    size = f"{quantized.shape[1]} x {quantized.shape[0]} pixels"
    return Example(name, Tile("quantized, whole", size, _png(_whole(quantized, box))), tuple(tiles))


def _where_they_differ(one: np.ndarray, other: np.ndarray) -> Box:
    difference = np.abs(one.astype(np.float64) - other).sum(axis=2)
    return largest_box(difference, min(_SIDE, *difference.shape))


def _tile(image: np.ndarray, label: str, box: Box, hr: np.ndarray | None, scale: int) -> Tile:
    return Tile(label, "" if hr is None else _psnr(image, hr, scale), _png(box.of(image)))


def _psnr(image: np.ndarray, reference: np.ndarray, scale: int) -> str:
    psnr = psnr_of(image, reference, scale)
    return f"{psnr:.2f} dB" if math.isfinite(psnr) else "identical"


def _bicubic(lr: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    depth = 257 if lr.dtype == np.uint16 else 1
    small = Image.fromarray((lr // depth).astype(np.uint8))
    return np.asarray(small.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def _whole(image: np.ndarray, box: Box) -> np.ndarray:
    """A small copy with the box drawn."""
    zoom = min(1.0, _WHOLE / max(image.shape[:2]))
    size = max(1, round(image.shape[1] * zoom)), max(1, round(image.shape[0] * zoom))
    small = np.ascontiguousarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    corners = [(round(x * zoom), round(y * zoom)) for x, y in _corners(box)]
    return cv2.rectangle(small, corners[0], corners[1], _LINE, 2)


def _corners(box: Box) -> tuple[tuple[int, int], tuple[int, int]]:
    return (box.left, box.top), (box.left + box.width - 1, box.top + box.height - 1)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG")
    return buffer.getvalue()
