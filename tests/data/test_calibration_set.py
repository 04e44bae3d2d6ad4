"""Calibration crops from a folder: full batches, reproducible, from photos or from low-resolution images."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from qsr_plugin.data.calibration_set import calibration_batches, crops_from_folder
from qsr_plugin.data.images import read_rgb, to_tensor
from qsr_plugin.data.resize import downscale
from qsr_plugin.quant.schema import Calibration


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(10):
        shape = (80, 120, 3) if number % 2 else (120, 80, 3)
        cv2.imwrite(str(tmp_path / f"{number}.png"), rng.integers(0, 256, shape, dtype=np.uint8))
    return tmp_path


def shapes(batches) -> list[tuple[int, ...]]:
    return sorted(tuple(batch.shape) for batch in batches)


def test_crops_of_equal_size_share_a_batch(folder: Path) -> None:
    sizes = shapes(crops_from_folder(folder, images=10, batch=4))
    assert sizes == [(1, 3, 80, 96), (1, 3, 96, 80), (4, 3, 80, 96), (4, 3, 96, 80)]
    assert shapes(crops_from_folder(folder, images=8, batch=4, side=32)) == [(4, 3, 32, 32)] * 2
    assert shapes(crops_from_folder(folder, images=10, batch=16, scale=4)) == [(5, 3, 20, 30), (5, 3, 30, 20)]


def test_the_draw_follows_the_seed(folder: Path) -> None:
    def draw(seed: int) -> list[torch.Tensor]:
        return list(crops_from_folder(folder, images=4, batch=2, side=32, seed=seed))

    assert all(torch.equal(a, b) for a, b in zip(draw(0), draw(0)))
    assert not all(torch.equal(a, b) for a, b in zip(draw(0), draw(1)))
    assert all(batch.min() >= 0 and batch.max() <= 1 for batch in draw(0))


def test_a_folder_given_to_a_training_comes_in_batches_of_equal_sizes(tmp_path: Path) -> None:
    for number, size in enumerate([(16, 12), (20, 12), (16, 12), (16, 12), (20, 12)]):
        Image.new("RGB", size, (number, 0, 0)).save(tmp_path / f"{number}.png")
    found = list(calibration_batches({"calibration_folder": str(tmp_path)}, Calibration(images=4, batch=2)))
    assert [tuple(batch.shape) for batch in found] == [(2, 3, 12, 16), (1, 3, 12, 20), (1, 3, 12, 16)]
    assert [round(255 * image[0, 0, 0].item()) for batch in found for image in batch] == [0, 2, 1, 3]


def test_crops_of_photos_are_those_of_the_reduced_photo(tmp_path: Path) -> None:
    """Only the part around a crop is reduced, with the same result."""
    rng = np.random.default_rng(1)
    for number, shape in enumerate([(203, 151, 3), (64, 301, 3), (65, 67, 3)]):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / f"{number}.png")
    for scale, seed in [(2, 0), (3, 1), (4, 2), (8, 3)]:
        names: list[str] = []
        cut = {"images": 3, "batch": 1, "scale": scale, "side": 7, "seed": seed}
        for crop in crops_from_folder(tmp_path, used=names, **cut):
            image = read_rgb(tmp_path / names[-1])
            whole = downscale(image[: len(image) // scale * scale, : image.shape[1] // scale * scale], scale)
            wanted = to_tensor(whole)
            found = [
                (top, left)
                for top in range(wanted.shape[1] - crop.shape[2] + 1)
                for left in range(wanted.shape[2] - crop.shape[3] + 1)
                if torch.equal(wanted[:, top : top + crop.shape[2], left : left + crop.shape[3]], crop[0])
            ]
            assert len(found) == 1
        assert len(names) == 3


def test_other_files_take_the_place_of_unreadable_ones(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("1.png", "4.png", "7.png"):
        (folder / name).write_bytes(b"damaged")
    used: list[str] = []
    batches = list(crops_from_folder(folder, images=6, batch=1, side=8, used=used))
    assert len(batches) == len(set(used)) == 6 and not {"1.png", "4.png", "7.png"} & set(used)
    assert list(crops_from_folder(folder, images=10, batch=16, side=8))[0].shape[0] == 7
    assert f"3 image(s) of {folder} left out, 7 used" in caplog.text and "4.png: is not a PNG" in caplog.text


def test_files_are_counted_for_progress(folder: Path) -> None:
    seen: list[int] = []
    list(crops_from_folder(folder, images=4, batch=2, side=8, progress=lambda paths: seen.append(len(paths)) or paths))
    assert seen == [4]
