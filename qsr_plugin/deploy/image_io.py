"""Pictures of every common kind in and out: what a network does not see (gray, transparency, 16 bits) comes back.

Reading is that of :mod:`qsr_plugin.data.images`; this module keeps what it converts. Gray becomes RGB for the network
and gray again in the file; gray with transparency becomes RGBA of equal colours. Transparency is enlarged by itself,
bicubic. 16 bits per channel stay 16. A palette, a CMYK image and the EXIF orientation are converted for good.
"""

from __future__ import annotations

import io
import logging
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from qsr_plugin.atomic import write_atomically
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
#: Longest side that a format holds.
_LONGEST = {"png": 2**31 - 1, "jpg": 65500, "webp": 16383}
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
_TURNED = (5, 6, 7, 8)  # values of EXIF's orientation for images that lie on their side
_EXIF_ORIENTATION = 0x0112
_PROFILE_SPACE = slice(16, 20)  # of a colour profile: which colours it is for
_PNG_HEAD = 33  # bytes before the second chunk: signature (8), length (4), name (4), values (13), checksum (4)
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
        profile: Colour profile (ICC), what the numbers mean as colours; ``None`` if the file has none.
    """

    rgb: np.ndarray
    dtype: type[np.unsignedinteger] = np.uint8
    gray: bool = False
    alpha: np.ndarray | None = None
    profile: bytes | None = None


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
        alpha, profile = _alpha_of(picture, data, deep), picture.info.get("icc_profile")
    if profile and profile[_PROFILE_SPACE] != (b"GRAY" if gray else b"RGB "):  # of CMYK, which was converted
        logger.warning("%s: its colour profile is for other colours than the result has, and is left out", path)
        profile = None
    rgb = pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
    return Picture(rgb, pixels.dtype.type, gray, alpha, profile or None)


def size_of(path: Path, *, whole: bool = False) -> tuple[int, int] | None:
    """Height and width as a viewer shows it, from the head of a file of any size; ``None`` for no image.

    Args:
        path: PNG, JPEG, WebP or BMP.
        whole: Also ``None`` for a file that ends too early, a PNG whose checksums are wrong, and a BMP.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # it is against files from elsewhere, when decoded
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            width, height = picture.size
            # Image's own method: a PNG's would decode the image first
            if Image.Image.getexif(picture).get(_EXIF_ORIENTATION) in _TURNED:
                height, width = width, height
            if whole:
                picture.verify()
        return (height, width) if not whole or _has_end(path) else None
    except Exception:  # decoders raise OSError, SyntaxError, struct.error and others on damaged data
        return None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def check_size(path: Path, height: int, width: int) -> None:
    """Refuse a result that is too large for its format, before it is made.

    Raises:
        UserError: With what the format holds.
    """
    kind = format_of(path)
    if max(height, width) > _LONGEST[kind]:
        raise UserError(
            f"{path}: an image of {width}x{height} cannot be written as {kind}, which holds {_LONGEST[kind]} pixels to "
            "a side: try --format png"
        )


def write_picture(path: str | Path, pixels: np.ndarray, picture: Picture) -> None:
    """Write an enlarged image as its original was: gray, with transparency, with its depth, if the format can.

    JPEG and WebP hold 8 bits; JPEG holds no transparency. A warning names what is lost.

    Args:
        path: Ends in ``.png``, ``.jpg``, ``.jpeg`` or ``.webp``. Written atomically.
        pixels: (s H, s W, 3) RGB, uint8 or uint16.
        picture: The original, of (H, W).

    Raises:
        UserError: For another ending, or an image that is too large for the format.
        OSError: If it cannot be written.
    """
    path = Path(path)
    kind = format_of(path)
    check_size(path, *pixels.shape[:2])
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
    data = _encoded(image, kind, picture.profile)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def format_of(path: Path) -> str:
    """``png``, ``jpg`` or ``webp``, by the ending of a path.

    Raises:
        UserError: For another ending.
    """
    kind = path.suffix.lower().lstrip(".").replace("jpeg", "jpg")
    if kind not in ENCODINGS:
        raise UserError(f"'{path}': pictures are written as {', '.join(ENCODINGS)}; change the ending")
    return kind


def _encoded(image: np.ndarray, kind: str, profile: bytes | None) -> bytes | memoryview:
    """A file of (H, W) or (H, W, C), BGR; OpenCV writes no profiles, Pillow no colour of 16 bits."""
    if profile is None or kind == "png":
        try:
            data = cv2.imencode(f".{kind}", image, ENCODINGS[kind])[1].data
        except cv2.error as error:
            raise OSError(
                f"an image of {image.shape[1]}x{image.shape[0]} cannot be encoded as {kind}: {error}"
            ) from None
        return data if profile is None else b"".join((data[:_PNG_HEAD], _png_profile(profile), data[_PNG_HEAD:]))
    colours = image if image.ndim == 2 else image[..., [2, 1, 0, 3][: image.shape[2]]]
    file = io.BytesIO()
    how = {"lossless": True} if kind == "webp" else {"quality": ENCODINGS["jpg"][1]}
    Image.fromarray(np.ascontiguousarray(colours)).save(file, kind.replace("jpg", "jpeg"), icc_profile=profile, **how)
    return file.getvalue()


def _png_profile(profile: bytes) -> bytes:
    """A chunk iCCP: its name, no name of the profile but one letter, method 0, compressed."""
    content = b"iCCP" + b"i\0\0" + zlib.compress(profile)
    return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))


def _has_end(path: Path) -> bool:
    """Whether the last bytes are those that the format ends in; WebP says its length."""
    with open(path, "rb") as file:
        head = file.read(8)
        length = file.seek(0, io.SEEK_END)
        file.seek(max(length - 8, 0))
        last = file.read()
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:], "little") + 8 <= length
    return last.endswith(b"\xff\xd9" if head.startswith(b"\xff\xd8") else b"IEND\xaeB`\x82")


def _alpha_of(picture: Image.Image, data: bytes, deep: bool) -> np.ndarray | None:
    """Opacity (H, W), uint8, or uint16 from a PNG of 16 bits per channel, which Pillow would reduce to 8."""
    if deep:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        has_alpha = pixels.ndim == 3 and pixels.shape[2] == 4
        return np.ascontiguousarray(pixels[..., 3]) if has_alpha else None
    if not picture.has_transparency_data:
        return None
    return np.array(ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A"))
