"""Parts of the demonstration ``tools/demo.py``: free photos, its options, and a training watched through its log."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
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
from qsr_plugin.errors import UserError
from qsr_plugin.options_file import load_options, options_folder, write_options
from qsr_plugin.quant.schema import Calibration

SCALE = 4
TRAIN_PHOTOS = ("coffee", "rocket", "immunohistochemistry", "hubble_deep_field", "retina")
#: Test photos, and the part that the pictures enlarge: top, left, height, width.
TEST_PHOTOS = {"astronaut": (345, 135, 104, 104), "chelsea": (78, 132, 80, 80)}
_LONGEST = 640  # of a photo's middle that is used, so that no large photo outweighs the others
_TAIL = 15  # lines of a failed training's log to show

_ITERATION = re.compile(r"iter:\s*([\d,]+), lr:.*?l_pix: (\S+)")
_SCORE = re.compile(r"# psnr: (\S+)")


class DemoError(UserError, RuntimeError):
    """The training failed; the message holds the end of its log."""


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


@dataclass(frozen=True)
class Step:
    """What a line of the training's log says.

    Attributes:
        iteration: Iterations done; ``None`` on a line that tells a score.
        loss: Pixel loss of that iteration, pixels in [0, 1]; ``None`` on a line that tells a score.
        psnr: Score on the test photos in dB; ``None`` on a line that tells an iteration.
    """

    iteration: int | None = None
    loss: float | None = None
    psnr: float | None = None


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


def train(options: dict[str, Any], folders: Folders, watch: Callable[[Step], None]) -> Path:
    """Train in a process of its own: ``python -m qsr_plugin.train -opt FILE``, as a user would.

    Results of an earlier run are deleted. The complete log is ``train.log``.

    Args:
        options: From :func:`demo_options`.
        folders: The training runs in their root.
        watch: Called for every line of the log that tells an iteration or a score.

    Returns:
        The trained network, ``.safetensors``.

    Raises:
        DemoError: If the training fails, with the end of its log.
    """
    root = folders.root.resolve()
    shutil.rmtree(root / "experiments" / options["name"], ignore_errors=True)
    write_options(options, root / "train.yml")
    command = [sys.executable, "-m", "qsr_plugin.train", "-opt", "train.yml"]
    tail: deque[str] = deque(maxlen=_TAIL)
    how = {"cwd": root, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    # Small layers gain little from more threads, and threads that wait for each other on a busy machine lose minutes.
    how["env"] = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // 2, 1)), **os.environ}
    with open(root / "train.log", "w", encoding="utf-8") as log, subprocess.Popen(command, **how) as process:
        try:
            for line in process.stdout:
                log.write(line)
                tail.append(line.rstrip())
                if (step := read_line(line)) is not None:
                    watch(step)
            status = process.wait()
        except BaseException:
            process.terminate()
            raise
    if status != 0:
        end = "\n  ".join(tail)
        raise DemoError(f"the training ended with status {status}. The end of {root / 'train.log'}:\n  {end}")
    return root / "experiments" / options["name"] / "models" / "net_g_latest.safetensors"


def read_line(line: str) -> Step | None:
    """What a line of the training's log says, or ``None`` if it tells neither an iteration nor a score."""
    if found := _ITERATION.search(line):
        return Step(iteration=int(found[1].replace(",", "")), loss=float(found[2]))
    if found := _SCORE.search(line):
        return Step(psnr=float(found[1]))
    return None
