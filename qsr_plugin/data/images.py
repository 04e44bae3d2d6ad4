"""Reading photos of every common kind into one: RGB, three channels, height before width.

What is not RGB is converted: gray is replicated, a palette is looked up, CMYK is converted, an alpha channel is
dropped (the colours below it are kept as stored). The EXIF orientation is applied, as the host's own reader does. A
PNG of 16 bits per channel stays ``uint16``; everything else is ``uint8``.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    import torch

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
_PNG_DEPTH_BYTE = 24  # signature (8), chunk length and name (8), width and height (8), then the bit depth


def read_rgb(source: str | Path | bytes, name: str = "") -> np.ndarray:
    """Decode an image file, or the bytes of one.

    Args:
        source: Path (any characters, ``~`` allowed) or encoded bytes: PNG, JPEG, WebP or BMP.
        name: What to call the image in errors; the path if empty.

    Returns:
        (H, W, 3) RGB, uint8 in 0..255, or uint16 in 0..65535 for a PNG of 16 bits per channel.

    Raises:
        ValueError: The file is missing, empty, truncated or not an image; the message names it.
    """
    if isinstance(source, (str, Path)):
        name = name or str(source)
        try:
            source = Path(source).expanduser().read_bytes()
        except OSError as error:
            raise ValueError(
                f"{name}: cannot be read ({error.strerror}). Check the path and its permissions."
            ) from error
    name = name or "image"
    if not source:
        raise ValueError(f"{name}: is empty (0 bytes). Copy or download it again, or remove it.")
    try:
        with Image.open(io.BytesIO(source), formats=_FORMATS) as picture:
            picture.load()  # Pillow refuses truncated data, where OpenCV fills the rest with gray
            if picture.format == "PNG" and source[_PNG_DEPTH_BYTE] == 16:
                return _decode_16_bit(source)
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name}: is not a PNG, JPEG, WebP or BMP image. Convert it, or remove it.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name}: is too large ({error}). Cut it into parts; if you trust it, read it in Python after "
            "PIL.Image.MAX_IMAGE_PIXELS = None."
        ) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others on damaged data
        raise ValueError(f"{name}: is damaged ({error}). Copy or download it again, or remove it.") from error


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Round a uint16 image to uint8 (value / 257); a uint8 image is returned as it is.

    Args:
        image: Any shape, uint8 or uint16.

    Returns:
        The same shape, uint8.

    Raises:
        ValueError: Another dtype.
    """
    if _full_scale(image) == 255:
        return image
    return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """Turn an image into a tensor in [0, 1].

    Args:
        image: (H, W, 3) uint8 or uint16, RGB; the dtype alone decides between 255 and 65535 as full scale.

    Returns:
        (3, H, W) float32 in [0, 1].

    Raises:
        ValueError: Another dtype or shape.
    """
    full = _full_scale(image)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected an image of shape (H, W, 3), found {image.shape}; read it with read_rgb().")
    import torch  # building and checking data need no torch, which takes seconds to import

    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32) / full)


def list_images(folder: str | Path) -> list[Path]:
    """List the images directly inside a folder.

    Args:
        folder: Path; ``~`` is expanded. Sub-folders are not searched.

    Returns:
        Paths sorted by file name.

    Raises:
        ValueError: The folder is missing, is a file, or holds no image; the message says what it holds instead.
    """
    folder = Path(folder).expanduser()
    wanted = ", ".join(f"*{suffix}" for suffix in IMAGE_SUFFIXES)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing"
        raise ValueError(f"looked for a folder of images ({wanted}) at {folder}, found {what}. Check the path.")
    entries = sorted(folder.iterdir())
    images = [path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not images:
        some = ", ".join(path.name for path in entries[:5])
        found = f"{len(entries)} other entries ({some}{', …' if len(entries) > 5 else ''})" if entries else "it empty"
        raise ValueError(f"looked for {wanted} in {folder}, found {found}. Sub-folders are not searched.")
    return images


def _decode_16_bit(data: bytes) -> np.ndarray:
    """Pillow reduces 16-bit colour PNGs to 8 bits, OpenCV does not. Data are known to be complete."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16:
        raise OSError("a 16-bit PNG that does not decode")
    if image.ndim == 2:
        return np.repeat(image[:, :, None], 3, axis=2)
    return np.ascontiguousarray(image[:, :, 2::-1])


def _full_scale(image: np.ndarray) -> int:
    if image.dtype == np.uint8:
        return 255
    if image.dtype == np.uint16:
        return 65535
    raise ValueError(f"expected a uint8 or uint16 image, found {image.dtype}; read it with read_rgb().")
