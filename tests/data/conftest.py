"""Small photos and databases for the data tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest

from qsr_plugin.data.build import build_lmdb_pair


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return an (H, W, 3) uint8 picture that is the same for the same seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_png(path: Path, rgb: np.ndarray) -> Path:
    """Write an RGB picture as PNG under any file name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", np.ascontiguousarray(rgb[..., ::-1]))[1].tobytes())
    return path


def contents(folder: Path) -> dict[bytes, bytes]:
    """Return all keys and values of an LMDB."""
    with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as transaction:
        return dict(transaction.cursor())


def change(folder: Path, key: str, value: bytes | None) -> None:
    """Replace a value of an LMDB, or delete the key."""
    with lmdb.open(str(folder)) as env, env.begin(write=True) as transaction:
        if value is None:
            assert transaction.delete(key.encode())
        else:
            transaction.put(key.encode(), value)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Folder of four PNG photos of 41 x 50 pixels, a.png to d.png."""
    for seed, name in enumerate("abcd"):
        write_png(tmp_path / "photos" / f"{name}.png", noise(41, 50, seed))
    return tmp_path / "photos"


@pytest.fixture
def build(photos: Path) -> Callable[..., object]:
    """Build LMDBs of the four photos: 24-pixel sub-images, step 16, scale 2, unless told otherwise."""

    def call(out: Path, **changes: object) -> object:
        settings = {"scale": 2, "sub_image": 24, "step": 16, "min_side": 16, **changes}
        return build_lmdb_pair(settings.pop("photos", photos), out, **settings)

    return call
