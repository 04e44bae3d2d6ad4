"""Reading photos of every kind: what is converted, what is refused and how the refusal reads."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from qsr_plugin.data.images import list_images, read_rgb, to_tensor, to_uint8
from tests.data.conftest import noise, write_png


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_rgb_is_read_as_stored(tmp_path: Path) -> None:
    image = noise(5, 7)
    np.testing.assert_array_equal(read_rgb(write_png(tmp_path / "a.png", image)), image)
    assert read_rgb(str(tmp_path / "a.png")).flags.writeable


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_gray_is_replicated(mode: str) -> None:
    gray = np.where(noise(4, 6)[..., 0] > 127, 255, 0).astype(np.uint8)
    image = read_rgb(encoded(Image.fromarray(gray).convert(mode), "PNG"))
    np.testing.assert_array_equal(image, np.repeat(gray[..., None], 3, axis=2))


def test_alpha_is_dropped_and_the_colours_below_it_kept() -> None:
    rgba = np.dstack([noise(4, 6), np.zeros((4, 6), np.uint8)])
    np.testing.assert_array_equal(read_rgb(encoded(Image.fromarray(rgba, "RGBA"), "PNG")), rgba[..., :3])


def test_a_palette_is_looked_up() -> None:
    picture = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8), "P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    plain, transparent = (encoded(picture, "PNG", **extra) for extra in ({}, {"transparency": 1}))
    expected = [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [10, 20, 30]]]
    assert read_rgb(plain).tolist() == read_rgb(transparent).tolist() == expected


def test_cmyk_jpeg_becomes_rgb() -> None:
    image = read_rgb(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert image.shape == (16, 16, 3)
    assert np.abs(image.astype(int) - [255, 0, 0]).max() <= 4


def test_the_orientation_of_a_photo_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_rgb(encoded(Image.new("RGB", (16, 8)), "JPEG", exif=exif)).shape == (16, 8, 3)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_png_keeps_its_depth(channels: int) -> None:
    bgr = np.random.default_rng(0).integers(0, 65536, (4, 5, channels), dtype=np.uint16)
    image = read_rgb(cv2.imencode(".png", bgr)[1].tobytes())
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, np.repeat(bgr, 3, axis=2) if channels == 1 else bgr[..., 2::-1])


def test_a_dark_16_bit_image_is_not_taken_for_8_bit() -> None:
    """The dtype decides, not the largest value."""
    tensor = to_tensor(np.full((2, 2, 3), 200, np.uint16))
    assert tensor.max().item() == pytest.approx(200 / 65535)
    assert to_tensor(np.full((2, 2, 3), 255, np.uint8)).max().item() == 1.0


def test_to_uint8_rounds() -> None:
    levels = np.array([0, 128, 129, 257, 65535 - 129, 65535 - 128, 65535], np.uint16)
    assert to_uint8(levels).tolist() == [0, 0, 1, 1, 254, 255, 255]
    assert to_uint8(to_uint8(levels)).tolist() == to_uint8(levels).tolist()


def test_tensor_layout() -> None:
    image = noise(3, 5)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 3, 5) and tensor.dtype == torch.float32
    assert tensor[2, 1, 4].item() == pytest.approx(image[1, 4, 2] / 255)


@pytest.mark.parametrize("image", [np.zeros((2, 2, 3)), np.zeros((2, 2), np.uint8), np.zeros((2, 2, 4), np.uint8)])
def test_tensor_of_something_else_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        to_tensor(image)


@pytest.mark.parametrize("name", ["фото 写真 é.png", "ü" * 120 + ".png", "a b  c.png"])
def test_names_of_any_characters_and_length(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "каталог with spaces"
    write_png(folder / name, noise(4, 4))
    assert [read_rgb(path).shape for path in list_images(folder)] == [(4, 4, 3)]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "16-bit PNG"])
def test_truncated_files_are_refused(tmp_path: Path, kind: str) -> None:
    if kind == "16-bit PNG":
        whole = cv2.imencode(".png", noise(64, 64).astype(np.uint16) * 257)[1].tobytes()
    else:
        whole = encoded(Image.fromarray(noise(64, 64)), kind)
    path = tmp_path / "cut.png"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match=r"cut\.png: is damaged .*(again|remove)"):
        read_rgb(path)


def test_changed_bytes_are_refused() -> None:
    data = bytearray(encoded(Image.fromarray(noise(32, 32)), "PNG"))
    data[200] ^= 255
    with pytest.raises(ValueError, match="key_7: is damaged"):
        read_rgb(bytes(data), "key_7")


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", r"is empty \(0 bytes\)"), (b"<html>not found</html>", "is not a PNG, JPEG, WebP or BMP")],
)
def test_what_is_no_image_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "page.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"page\.jpg: {message}"):
        read_rgb(path)
    with pytest.raises(ValueError, match=r"gone\.png: cannot be read \(No such file"):
        read_rgb(tmp_path / "gone.png")


def test_listing_a_folder(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpeg", ".hidden", "notes.txt", "c.webp"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpeg", "b.PNG", "c.webp"]


def test_listing_nothing_says_what_was_found(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"looked for \*\.bmp.* in .*empty, found it empty"):
        list_images(empty)
    (empty / "readme.txt").touch()
    with pytest.raises(ValueError, match=r"found 1 other entries \(readme\.txt\)"):
        list_images(empty)
    with pytest.raises(ValueError, match="found nothing"):
        list_images(tmp_path / "absent")
    with pytest.raises(ValueError, match="found a file"):
        list_images(empty / "readme.txt")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_png(tmp_path / "p" / "a.png", noise(4, 4))
    assert len(list_images("~/p")) == 1
    assert read_rgb("~/p/a.png").shape == (4, 4, 3)
