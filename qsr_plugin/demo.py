"""Parts of the demonstration ``tools/demo.py``: free photos, and its options."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from qsr_plugin.data.calibration_set import calibration_batches
from qsr_plugin.data.resize import downscale
from qsr_plugin.options_file import load_options, options_folder
from qsr_plugin.quant.schema import Calibration

SCALE = 4
TRAIN_PHOTOS = ("coffee", "rocket", "immunohistochemistry", "hubble_deep_field", "retina")
#: Test photos, and the part that the pictures enlarge: top, left, height, width.
TEST_PHOTOS = {"astronaut": (345, 135, 104, 104), "chelsea": (78, 132, 80, 80)}
_LONGEST = 640  # of a photo's middle that is used, so that no large photo outweighs the others


@dataclass(frozen=True)
class Folders:
    """Where the demonstration keeps its files, all below one folder.

    Attributes:
        root: The folder.
    """

    root: Path

    @property
    def train(self) -> Path:
        """Training photos, high resolution."""
        return self.root / "photos" / "train"

    @property
    def hr(self) -> Path:
        """Test photos, high resolution."""
        return self.root / "photos" / "test" / "HR"

    @property
    def lr(self) -> Path:
        """Test photos, low resolution."""
        return self.root / "photos" / "test" / f"LRbicx{SCALE}"

    @property
    def data(self) -> Path:
        """Training databases."""
        return self.root / "data"

    @property
    def models(self) -> Path:
        """Quantized networks."""
        return self.root / "models"

    @property
    def pictures(self) -> Path:
        """Side-by-side pictures."""
        return self.root / "pictures"


class Bicubic(nn.Module):
    """Plain bicubic enlargement (kernel with a = -0.5, as the low-resolution images were made), to compare with."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 3, 4 H, 4 W)."""
        return F.interpolate(x, scale_factor=SCALE, mode="bicubic", antialias=True)


def packaged_weights() -> Path:
    """Float weights of the small EDSR that come with the package."""
    return Path(str(resources.files("qsr_plugin.assets") / "edsr_small_x4.safetensors"))


def write_photos(folders: Folders) -> None:
    """Write the photos as PNG: training photos, and test photos in both resolutions.

    All of them lie in the scikit-image package. Public domain: astronaut, rocket, hubble_deep_field. CC0: chelsea,
    coffee, retina. No known copyright restrictions: immunohistochemistry.

    Args:
        folders: Where; what lies there is overwritten.
    """
    for folder, names in ((folders.train, TRAIN_PHOTOS), (folders.hr, TEST_PHOTOS)):
        for name in names:
            _save(photo(name), folder / f"{name}.png")
    for name in TEST_PHOTOS:
        _save(downscale(photo(name), SCALE), folders.lr / f"{name}.png")


def photo(name: str) -> np.ndarray:
    """The middle of a photo of scikit-image.

    Args:
        name: A function of ``skimage.data``.

    Returns:
        (H, W, 3) RGB uint8, both sides multiples of 4 and at most 640.
    """
    from skimage import data

    image = getattr(data, name)()
    height, width = (min(side, _LONGEST) // SCALE * SCALE for side in image.shape[:2])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def demo_options(folders: Folders, weights: Path, iters: int | None = None) -> dict[str, Any]:
    """The shipped options of the short run, with the demonstration's data and weights.

    Args:
        folders: Where the data are.
        weights: Float weights, for the start and for the teacher.
        iters: Length of the training; ``None`` for that of the file.
    """
    options = load_options(options_folder() / "train" / "pams" / "edsr_small_x4_demo.yml")
    train, val = options["datasets"]["train"], options["datasets"]["val"]
    train.update(dataroot_gt=_absolute(folders.data / "GT.lmdb"), dataroot_lq=_absolute(folders.data / "LQ.lmdb"))
    val.update(name="photos", dataroot_gt=_absolute(folders.hr), dataroot_lq=_absolute(folders.lr))
    options["path"]["pretrain_network_float"] = _absolute(weights)
    if iters is not None:
        schedule, length = options["train"]["scheduler"], options["train"]["total_iter"]
        schedule["milestones"] = [milestone * iters // length for milestone in schedule["milestones"]]
        options["train"]["total_iter"] = iters
    return options


def _absolute(path: Path) -> str:
    return str(path.expanduser().resolve())


def calibration_crops(options: dict[str, Any], images: int, batch: int) -> Iterator[Tensor]:
    """Batches of low-resolution crops (N, 3, h, w) of the training set, RGB in [0, 1]; the same in every call."""
    options = deepcopy(options)
    options["datasets"]["train"].update(phase="train", scale=options["scale"])
    return calibration_batches(options, Calibration(images=images, batch=batch))
