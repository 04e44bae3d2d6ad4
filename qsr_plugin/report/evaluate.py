"""Scores of a network on folders of image pairs: PSNR and SSIM on Y, as BasicSR computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from basicsr.metrics.psnr_ssim import calculate_psnr, calculate_ssim
from basicsr.utils import tensor2img
from torch import Tensor, nn

from qsr_plugin.data.images import list_images, read_rgb, to_tensor, to_uint8
from qsr_plugin.data.patches import PatchOptions, protocol
from qsr_plugin.quant.record import evaluating
from qsr_plugin.report.fab import BitStatistics, BitTally
from qsr_plugin.report.patch_bits import run_and_observe

_SSIM_WINDOW = 11

Pair = tuple[Path, Path]


@dataclass(frozen=True)
class ImageScore:
    """Scores of one image.

    Attributes:
        name: File name of the HR image.
        psnr: In dB on Y; infinite for identical images.
        ssim: On Y, at most 1.
        fab: Feature average bit width of this image.
    """

    name: str
    psnr: float
    ssim: float
    fab: float


@dataclass(frozen=True)
class EvaluationResult:
    """Scores on one data set; the means are plain means over the images.

    Attributes:
        scale: Factor between LR and HR, also the number of border pixels left out on each side.
        psnr: Mean PSNR in dB on Y.
        ssim: Mean SSIM on Y.
        fab: Mean feature average bit width.
        images: Scores by image, in the order of the file names.
        bits: How the activation bits are distributed.
        patches: How images were cut; ``None`` for whole images.
    """

    scale: int
    psnr: float
    ssim: float
    fab: float
    images: tuple[ImageScore, ...]
    bits: BitStatistics | None = None
    patches: PatchOptions | None = None

    @property
    def place_bits(self) -> dict[str, float]:
        """Mean bits at every activation place over the set, as :func:`qsr_plugin.complexity` takes them."""
        return {} if self.bits is None else {**self.bits.places, **self.bits.others}

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON; the patches are also spelt out as ``protocol``."""
        patches = self.patches and self.patches.to_dict()
        return {**asdict(self), "patches": patches, "protocol": protocol(self.patches)}


def evaluate(
    net: nn.Module,
    hr_folder: str | Path,
    lr_folder: str | Path,
    scale: int,
    *,
    patches: PatchOptions | Mapping[str, Any] | None = None,
    progress: Callable[[Sequence[Pair]], Iterable[Pair]] = iter,
) -> EvaluationResult:
    """Run a network on a folder of LR images and compare with the HR images.

    Outputs are clipped and rounded to 8 bits; ``scale`` pixels on each side are left out; Y is BT.601 (16 to 235).
    Each image runs alone, whole or in patches, on the network's device, in evaluation mode.

    Args:
        net: Takes and returns (1, 3, H, W), RGB in [0, 1]; float, or quantized and calibrated.
        hr_folder: Folder of high-resolution images.
        lr_folder: Folder of low-resolution images of the same names; ``name`` may also be ``namex4`` at scale 4.
        scale: Factor between them.
        patches: How to cut images (:class:`qsr_plugin.data.patches.PatchOptions` or the same as plain data); whole if
            not given.
        progress: Wraps the list of pairs, e.g. ``rich.progress.track``.

    Raises:
        ValueError: For a bad folder or image, a missing partner, sizes that do not fit, output that is not finite, or
            impossible patches.
        torch.OutOfMemoryError: If memory is too small; other patches than asked for are not tried.
    """
    patches = PatchOptions.read(patches, "patches")
    cut = {} if patches is None else patches.model_dump()
    scores, tally = [], BitTally()
    with evaluating(net):
        for hr_path, lr_path in progress(find_pairs(hr_folder, lr_folder, scale)):
            hr, lr = to_uint8(read_rgb(hr_path)), read_rgb(lr_path)
            _check_sizes(hr_path, hr, lr_path, lr, scale)
            out, parts = run_and_observe(net, _as_batch(net, lr), scale, **cut)
            sr = _to_image(out, str(lr_path))
            if sr.shape != hr.shape:
                raise ValueError(
                    f"{lr_path}: the network made {_size(sr)} of {_size(lr)}, scale {scale} asks for {_size(hr)}. Give "
                    "the scale the network was built for, and the folder that belongs to it."
                )
            psnr, ssim = psnr_ssim(sr, hr, scale)
            fab = tally.add([part.bits for part in parts], [part.others for part in parts])
            scores.append(ImageScore(hr_path.name, psnr, ssim, fab))
    means = {key: fmean(getattr(score, key) for score in scores) for key in ("psnr", "ssim", "fab")}
    return EvaluationResult(scale, images=tuple(scores), bits=tally.statistics(), patches=patches, **means)


def super_resolve(net: nn.Module, lr: np.ndarray, name: str = "the image") -> np.ndarray:
    """Enlarge one image, on the network's device and in its present mode.

    Args:
        net: Takes and returns (1, 3, H, W), RGB in [0, 1].
        lr: (H, W, 3) RGB, uint8 or uint16.
        name: What to call the image in errors.

    Returns:
        (scale H, scale W, 3) RGB uint8, clipped and rounded.

    Raises:
        ValueError: If the output holds NaN or infinity.
    """
    with torch.no_grad():
        return _to_image(net(_as_batch(net, lr)), name)


def _as_batch(net: nn.Module, lr: np.ndarray) -> Tensor:
    """(1, 3, H, W) on the network's device."""
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    return to_tensor(lr).unsqueeze(0).to(device)


def _to_image(out: Tensor, name: str) -> np.ndarray:
    if not bool(torch.isfinite(out).all()):
        raise ValueError(
            f"{name}: the network's output holds NaN or infinity. Its weights or ranges are broken: check the "
            "checkpoint, or calibrate again."
        )
    return tensor2img(out.clamp(0, 1), rgb2bgr=False)  # a new tensor, because the host clips in place


def psnr_ssim(sr: np.ndarray, hr: np.ndarray, scale: int) -> tuple[float, float]:
    """PSNR (dB) and SSIM on Y of two (H, W, 3) RGB uint8 images, ``scale`` pixels on each side left out."""
    ssim = calculate_ssim(*_as_host_reads(sr, hr), crop_border=scale, test_y_channel=True)
    return psnr_of(sr, hr, scale), float(ssim)


def psnr_of(sr: np.ndarray, hr: np.ndarray, scale: int) -> float:
    """PSNR alone, as :func:`psnr_ssim` has it."""
    return float(calculate_psnr(*_as_host_reads(sr, hr), crop_border=scale, test_y_channel=True))


def _as_host_reads(*images: np.ndarray) -> list[np.ndarray]:
    """In OpenCV's channel order, which the host's metrics expect."""
    return [np.ascontiguousarray(image[..., ::-1]) for image in images]


def find_pairs(hr_folder: str | Path, lr_folder: str | Path, scale: int) -> list[Pair]:
    """Pairs (HR file, LR file) of two folders, sorted by name.

    Raises:
        ValueError: For a bad or empty folder, or an image without its partner on either side.
    """
    by_name = {path.stem: path for path in list_images(lr_folder)}
    pairs = []
    for path in list_images(hr_folder):
        partner = by_name.pop(path.stem, None) or by_name.pop(f"{path.stem}x{scale}", None)
        if partner is None:
            found = ", ".join(sorted(p.name for p in list_images(lr_folder))[:5])
            raise ValueError(
                f"{path}: no partner in {lr_folder}. Looked for {path.stem} or {path.stem}x{scale} with any image "
                f"ending, found {found}. Give the LR folder made from this HR folder."
            )
        pairs.append((path, partner))
    if by_name:
        extra = sorted(path.name for path in by_name.values())
        raise ValueError(
            f"{lr_folder}: {len(extra)} image(s) without a partner in {hr_folder}: {', '.join(extra[:5])}. Remove "
            "them, or give the HR folder they were made from."
        )
    return pairs


def check_pairs(pairs: Iterable[Pair], scale: int) -> None:
    """Read all images of a test set once, to tell what is wrong with them before work is done for it.

    Raises:
        ValueError: For an unreadable image, or sizes that do not fit the scale.
    """
    for hr_path, lr_path in pairs:
        _check_sizes(hr_path, read_rgb(hr_path), lr_path, read_rgb(lr_path), scale)


def _check_sizes(hr_path: Path, hr: np.ndarray, lr_path: Path, lr: np.ndarray, scale: int) -> None:
    if hr.shape[:2] != (lr.shape[0] * scale, lr.shape[1] * scale):
        remedy = "Crop HR, or make LR from it anew."
        if lr.shape[0] > hr.shape[0]:
            remedy = "The two folders look swapped: HR comes first."
        elif hr.shape[0] % lr.shape[0] == hr.shape[1] % lr.shape[1] == 0:
            remedy = f"That is x{hr.shape[0] // lr.shape[0]}: give the LR folder for x{scale}, or another network."
        raise ValueError(
            f"{hr_path} is {_size(hr)} and {lr_path} is {_size(lr)}: HR must be exactly {scale} times LR. {remedy}"
        )
    least = _SSIM_WINDOW + 2 * scale
    if min(hr.shape[:2]) < least:
        raise ValueError(
            f"{hr_path} is {_size(hr)}: too small to score, at scale {scale} each side needs {least} pixels. Leave it "
            "out."
        )


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
