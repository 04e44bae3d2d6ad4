"""Pictures of every kind in, and the same kind out."""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from qsr_plugin.deploy.image_io import Picture, read_picture, write_picture
from qsr_plugin.errors import UserError
from tests.data.conftest import noise
from tests.deploy.engines import nearest


def deep_png(path: Path, pixels: np.ndarray, colour: int) -> Path:
    """Write (H, W, C) uint16 as a PNG of a colour type that no writer at hand makes: 4 is gray with alpha."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def deep(channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65536, (4, 6, channels), dtype=np.uint16)


def back(picture: Picture, path: Path, scale: int = 1) -> np.ndarray:
    """What the file holds after the image was enlarged by repetition, as OpenCV reads it."""
    full = np.iinfo(picture.dtype).max
    pixels = np.rint(nearest(picture.rgb.transpose(2, 0, 1), scale) * full).astype(picture.dtype).transpose(1, 2, 0)
    write_picture(path, np.ascontiguousarray(pixels), picture)
    return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_gray_comes_back_as_gray(mode: str, tmp_path: Path) -> None:
    gray = np.where(noise(5, 7)[..., 0] > 127, 255, 0).astype(np.uint8) if mode == "1" else noise(5, 7)[..., 0]
    Image.fromarray(gray).convert(mode).save(tmp_path / "in.png")
    picture = read_picture(tmp_path / "in.png")
    assert picture.gray and picture.alpha is None and picture.rgb.dtype == np.float32
    np.testing.assert_array_equal(picture.rgb, np.repeat(gray[..., None] / np.float32(255), 3, axis=2))
    np.testing.assert_array_equal(back(picture, tmp_path / "out.png", 2), nearest(gray))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_comes_back(mode: str, tmp_path: Path) -> None:
    rgba = np.dstack([noise(6, 8), np.full((6, 8), 255, np.uint8)])
    rgba[:3, :, 3] = 0
    Image.fromarray(rgba, "RGBA").convert(mode).save(tmp_path / "in.png")
    picture = read_picture(tmp_path / "in.png")
    out = back(picture, tmp_path / "out.png", 2)
    assert out.shape == (12, 16, 4) and picture.gray == (mode == "LA")
    np.testing.assert_array_equal(
        out[..., 2::-1], np.rint(nearest(picture.rgb.transpose(2, 0, 1)).transpose(1, 2, 0) * 255)
    )
    assert (out[:4, :, 3] == 0).all() and (out[8:, :, 3] == 255).all()
    assert 0 < out[5, 0, 3] < 128 < out[6, 0, 3] < 255  # bicubic between them, not repeated


def test_a_palette_with_transparency_becomes_rgba(tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "clear.png", transparency=1)
    assert read_picture(tmp_path / "plain.png").alpha is None
    clear = read_picture(tmp_path / "clear.png")
    assert clear.alpha.tolist() == [[255, 0], [255, 255]]
    assert back(clear, tmp_path / "out.png").tolist()[0] == [[30, 20, 10, 255], [60, 50, 40, 0]]


def test_a_cmyk_photo_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "in.jpg", quality=100)
    picture = read_picture(tmp_path / "in.jpg")
    assert not picture.gray and picture.alpha is None
    assert np.abs(back(picture, tmp_path / "out.png").astype(int) - [0, 0, 255]).max() <= 4


@pytest.mark.parametrize("colour, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_stay_16(colour: int, channels: int, tmp_path: Path) -> None:
    pixels = deep(channels)
    picture = read_picture(deep_png(tmp_path / "in.png", pixels, colour))
    assert picture.dtype == np.uint16 and picture.gray == (colour in (0, 4))
    out = back(picture, tmp_path / "out.png")
    assert out.dtype == np.uint16
    order = {0: [0], 2: [2, 1, 0], 4: [0, 0, 0, 1], 6: [2, 1, 0, 3]}[colour]  # gray with alpha has equal colours
    np.testing.assert_array_equal(out.reshape(4, 6, -1), pixels[..., order])


def test_a_dark_16_bit_picture_is_not_taken_for_8_bits(tmp_path: Path) -> None:
    path = deep_png(tmp_path / "in.png", np.full((2, 2, 3), 200, np.uint16), 2)
    assert read_picture(path).rgb.max() == pytest.approx(200 / 65535)


def test_names_of_any_characters(tmp_path: Path) -> None:
    path = tmp_path / "каталог [1]" / "фото 写真 é.png"
    rgb = noise(4, 6)
    write_picture(path, rgb, Picture(rgb / np.float32(255)))
    np.testing.assert_array_equal(np.rint(read_picture(path).rgb * 255), rgb)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("ending, kind", [("jpg", "JPEG"), ("JPEG", "JPEG"), ("webp", "WEBP")])
def test_other_formats_and_what_they_cannot_hold(
    ending: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rgb = np.full((8, 8, 3), (51, 102, 204), np.uint16) * 257
    picture = Picture(rgb / np.float32(65535), np.uint16, alpha=np.full((8, 8), 65535, np.uint16))
    with caplog.at_level(logging.WARNING):
        write_picture(tmp_path / f"out.{ending}", rgb, picture)
    with Image.open(tmp_path / f"out.{ending}") as found:
        assert found.format == kind
        assert np.abs(np.array(found.convert("RGB")).astype(int) - [51, 102, 204]).max() <= 3
    lost = "16 bits per channel" if kind == "WEBP" else "transparency and 16 bits per channel"
    assert f"cannot hold {lost}: take png" in caplog.text


@pytest.mark.parametrize(
    "path, error, said",
    [
        ("out.tiff", UserError, "written as png, jpg, webp; change the ending"),
        ("out.webp", UserError, "17000x2 cannot be written as webp"),
    ],
)
def test_what_cannot_be_written_is_named(path: str, error: type[Exception], said: str, tmp_path: Path) -> None:
    wide = np.zeros((2, 17000, 3), np.uint8)
    with pytest.raises(error, match=said):
        write_picture(tmp_path / path, wide, Picture(wide / np.float32(255)))
    assert list(tmp_path.iterdir()) == []


def profile_of(space: str) -> bytes:
    """The colour profile of sRGB, which says that it is for a space of colours."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data[:16] + space.encode() + data[20:]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_the_colour_profile_comes_back(ending: str, mode: str, tmp_path: Path) -> None:
    profile = profile_of("GRAY" if mode == "L" else "RGB ")
    smooth = Image.fromarray(noise(4, 4)).resize((16, 16)).convert(mode)
    smooth.save(tmp_path / "in.png", icc_profile=profile)
    picture = read_picture(tmp_path / "in.png")
    assert picture.profile == profile
    with_profile = back(picture, tmp_path / f"out.{ending}", 2)
    with Image.open(tmp_path / f"out.{ending}") as found:
        assert found.info["icc_profile"] == profile and found.size == (32, 32)
        found.load()
    without = back(replace(picture, profile=None), tmp_path / f"plain.{ending}", 2)
    assert with_profile.shape == without.shape
    assert np.abs(with_profile.astype(int) - without).max() <= (3 if ending == "jpg" else 0)


def test_a_profile_at_16_bits(tmp_path: Path) -> None:
    profile, pixels = profile_of("RGB "), deep(3)
    path = deep_png(tmp_path / "in.png", pixels, 2)
    picture = replace(read_picture(path), profile=profile)
    np.testing.assert_array_equal(back(picture, tmp_path / "out.png"), pixels[..., ::-1])
    assert read_picture(tmp_path / "out.png").profile == profile


def test_a_profile_for_other_colours_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("CMYK", (16, 16)).save(tmp_path / "in.jpg", icc_profile=profile_of("CMYK"))
    with caplog.at_level(logging.WARNING):
        assert read_picture(tmp_path / "in.jpg").profile is None
    assert "in.jpg: its colour profile is for other colours" in caplog.text


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"text" * 9])
def test_a_broken_picture_is_named(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    data = cv2.imencode(".png", noise(30, 30))[1].tobytes()
    (tmp_path / "in.png").write_bytes(spoil(data))
    with pytest.raises(ValueError, match=r"in\.png: is (empty|damaged|not a PNG)"):
        read_picture(tmp_path / "in.png")
