"""Pictures of every common kind in and out: what a network does not see (gray, transparency, 16 bits) comes back.

Reading is that of :mod:`qsr_plugin.data.images`; this module keeps what it converts. Gray becomes RGB for the network
and gray again in the file; gray with transparency becomes RGBA of equal colours. Transparency is enlarged by itself,
bicubic. 16 bits per channel stay 16. A palette, a CMYK image and the EXIF orientation are converted for good.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from qsr_plugin.checkpoint import write_atomically
from qsr_plugin.data.images import read_rgb, to_uint8
from qsr_plugin.errors import UserError

logger = logging.getLogger("qsr_plugin")

#: Endings of pictures that can be written, and how they are encoded.
ENCODINGS = {
    "png": (),
    "jpg": (cv2.IMWRITE_JPEG_QUALITY, 95),
    "webp": (cv2.IMWRITE_WEBP_QUALITY, 101),  # above 100: lossless
}
_GRAY_MODES = ("1", "L", "LA")
_PNG_COLOUR_BYTE = 25  # after signature (8), chunk length and name (8), width and height (8), depth (1)
_PNG_GRAY = (0, 4)  # without and with alpha; Pillow calls the latter RGBA at 16 bits


@dataclass(frozen=True)
class Picture:
    """An image as a network takes it, and what its file had beside it.

    Attributes:
        rgb: (H, W, 3) float32, RGB in [0, 1].
        dtype: ``np.uint8`` or ``np.uint16``: what its values were.
        gray: The file has one channel of colour, here three times.
        alpha: (H, W) of ``dtype``, opacity; ``None`` if the file has none.
    """

    rgb: np.ndarray
    dtype: type[np.unsignedinteger] = np.uint8
    gray: bool = False
    alpha: np.ndarray | None = None


def read_picture(path: str | Path) -> Picture:
    """Read PNG, JPEG, WebP or BMP.

    Raises:
        ValueError: The file is missing, empty, truncated or not an image; the message names it.
    """
    pixels = read_rgb(path)
    data = Path(path).expanduser().read_bytes()
    deep = pixels.dtype == np.uint16
    with Image.open(io.BytesIO(data)) as picture:
        gray = data[_PNG_COLOUR_BYTE] in _PNG_GRAY if deep else picture.mode in _GRAY_MODES
        alpha = _alpha_of(picture, data, deep)
    rgb = pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
    return Picture(rgb, pixels.dtype.type, gray, alpha)


def write_picture(path: str | Path, pixels: np.ndarray, picture: Picture) -> None:
    """Write an enlarged image as its original was: gray, with transparency, with its depth, if the format can.

    JPEG and WebP hold 8 bits; JPEG holds no transparency. A warning names what is lost.

    Args:
        path: Ends in ``.png``, ``.jpg``, ``.jpeg`` or ``.webp``. Written atomically.
        pixels: (s H, s W, 3) RGB, uint8 or uint16.
        picture: The original, of (H, W).

    Raises:
        UserError: For another ending.
        OSError: If it cannot be written, or is too large for the format.
    """
    path = Path(path)
    kind = format_of(path)
    image = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY if picture.gray else cv2.COLOR_RGB2BGR)
    lost = [
        *(["transparency"] if picture.alpha is not None and kind == "jpg" else []),
        *(["16 bits per channel"] if pixels.dtype == np.uint16 and kind != "png" else []),
    ]
    if lost:
        logger.warning("%s: %s cannot hold %s: take png to keep it", path, kind, " and ".join(lost))
    if picture.alpha is not None and kind != "jpg":
        size = (pixels.shape[1], pixels.shape[0])
        alpha = cv2.resize(picture.alpha, size, interpolation=cv2.INTER_CUBIC).astype(pixels.dtype)
        image = np.dstack([image, image, image, alpha] if picture.gray else [image, alpha])
    if kind != "png":
        image = to_uint8(image)
    try:
        done, encoded = cv2.imencode(f".{kind}", image, ENCODINGS[kind])
    except cv2.error:
        done = False
    if not done:
        height, width = pixels.shape[:2]
        raise OSError(f"{path}: an image of {width}x{height} cannot be written as {kind}: try --format png")
    write_atomically(path, lambda temporary: temporary.write_bytes(encoded.tobytes()))


def format_of(path: Path) -> str:
    """``png``, ``jpg`` or ``webp``, by the ending of a path.

    Raises:
        UserError: For another ending.
    """
    kind = path.suffix.lower().lstrip(".").replace("jpeg", "jpg")
    if kind not in ENCODINGS:
        raise UserError(f"'{path}': pictures are written as {', '.join(ENCODINGS)}; change the ending")
    return kind


def _alpha_of(picture: Image.Image, data: bytes, deep: bool) -> np.ndarray | None:
    """Opacity (H, W), uint8, or uint16 from a PNG of 16 bits per channel, which Pillow would reduce to 8."""
    if deep:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        has_alpha = pixels.ndim == 3 and pixels.shape[2] == 4
        return np.ascontiguousarray(pixels[..., 3]) if has_alpha else None
    if not picture.has_transparency_data:
        return None
    return np.array(ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A"))
