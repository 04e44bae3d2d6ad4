"""Where a network spends its bits on one image: by patch, by layer, and on smooth against textured patches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from statistics import fmean

import numpy as np
from torch import Tensor, nn

from qsr_plugin.quant.image_stats import gradient_magnitudes
from qsr_plugin.quant.surgery import quantizers
from qsr_plugin.report.complexity import complexity
from qsr_plugin.report.patch_bits import PatchBits, run_and_observe

#: Fewest patches that have quarters to compare.
LEAST_FOR_QUARTERS = 4


@dataclass(frozen=True)
class BitMap:
    """What one network chose on one image.

    Attributes:
        label: What to call the network.
        method: Backbone, recipe and bits.
        widths: Bit widths it may choose from at the counted places, ascending.
        patches: Place in the low-resolution image and chosen bits.
    """

    label: str
    method: str
    widths: tuple[int, ...]
    patches: tuple[PatchBits, ...]

    @property
    def places(self) -> tuple[str, ...]:
        """Names ``site.port`` of the counted places, in the order of the network's modules."""
        return tuple(self.patches[0].bits)

    @cached_property
    def bits(self) -> np.ndarray:
        """(patches, places): chosen bits."""
        return np.array([[patch.bits[place] for place in self.places] for patch in self.patches], dtype=np.float64)

    @property
    def by_patch(self) -> np.ndarray:
        """(patches,): mean bits of each patch."""
        return self.bits.mean(1)

    @property
    def by_place(self) -> np.ndarray:
        """(places,): mean bits of each place."""
        return self.bits.mean(0)

    @property
    def fab(self) -> float:
        """Mean over the places, then over the patches, whatever their size."""
        return float(self.by_patch.mean())

    @cached_property
    def shares(self) -> np.ndarray:
        """(places, widths): share of the patches that chose each width there; rows sum to one."""
        nearest = np.abs(self.bits[..., None] - np.array(self.widths)).argmin(2)
        return (nearest[..., None] == np.arange(len(self.widths))).mean(0)

    def quarters(self, gradients: Sequence[float]) -> tuple[float, float] | None:
        """Mean bits of the quarter of the patches with the lowest gradients, and of that with the highest.

        Args:
            gradients: One for each patch, from :func:`patch_gradients`.

        Returns:
            The two means, or ``None`` with fewer than four patches.
        """
        if len(self.patches) < LEAST_FOR_QUARTERS:
            return None
        order, count = np.argsort(gradients, kind="stable"), len(self.patches) // 4
        return float(self.by_patch[order[:count]].mean()), float(self.by_patch[order[-count:]].mean())

    def to_dict(self, gradients: Sequence[float]) -> dict[str, object]:
        """Plain data for JSON.

        Args:
            gradients: One for each patch, from :func:`patch_gradients`.
        """
        quarters = self.quarters(gradients)
        return {
            "label": self.label,
            "method": self.method,
            "fab": self.fab,
            "widths": list(self.widths),
            "shares": {place: row.tolist() for place, row in zip(self.places, self.shares)},
            "quarters": None if quarters is None else dict(zip(("lowest", "highest"), quarters)),
            "patches": [
                {
                    "top": patch.top,
                    "left": patch.left,
                    "height": patch.height,
                    "width": patch.width,
                    "gradient": gradient,
                    "mean": fmean(patch.bits.values()),
                    "bits": dict(patch.bits),
                }
                for patch, gradient in zip(self.patches, gradients)
            ],
        }


def observe_bits(net: nn.Module, image: Tensor, scale: int, label: str = "", **patches: object) -> BitMap:
    """Run a network on an image and note what it chose.

    Args:
        net: Quantized and calibrated.
        image: (1, 3, H, W), RGB in 0..1, on the network's device.
        scale: Factor of the network.
        label: What to call it; the method if empty.
        patches: How to cut the image, see :func:`~qsr_plugin.report.patch_bits.run_and_observe`.

    Raises:
        ValueError: If the network has no counted activation places, or the patches do not fit together.
    """
    _, seen = run_and_observe(net, image, scale, **patches)
    if not seen[0].bits:
        raise ValueError(
            f"{label or type(net).__name__} quantizes no activation that counts in FAB, so there are no bits to draw: "
            "give a network whose recipe quantizes activations"
        )
    report = complexity(net)
    method = f"{report.network}, {report.method}"
    candidates = {place: quantizer.candidates for place, quantizer in quantizers(net)}
    widths = sorted({width for place in seen[0].bits for width in candidates[place]})
    return BitMap(label or method, method, tuple(widths), tuple(seen))


def labels_of(files: Sequence[Path]) -> list[str]:
    """What to call networks: files by their stem, or, where stems repeat, by their folder.

    The folder of ``experiments/NAME/models/net_g_latest.safetensors`` is ``NAME``. Folders above it are named as far as
    they tell it from the others, and the file as well if there are others in its folder.

    Args:
        files: Paths of the networks; they need not exist.

    Returns:
        One label for each; all differ unless the files are the same.
    """
    files = [Path(os.path.abspath(file)) for file in files]
    stems = [file.stem for file in set(files)]
    whole = {file: file.parent.parts for file in files}
    folders = {file: parts[:-1] if parts[-1] == "models" else parts for file, parts in whole.items()}
    if len(set(folders.values())) < len(set(whole.values())):  # a network lies beside a folder `models`
        folders = whole
    labels = []
    for file in files:
        folder, others = folders[file], {parts for parts in folders.values() if parts != folders[file]}
        depth = next(depth for depth in count(1) if all(parts[-depth:] != folder[-depth:] for parts in others))
        alone = sum(parts == folder for parts in folders.values()) == 1
        name = "/".join(folder[-depth:])
        labels.append(file.stem if stems.count(file.stem) == 1 else name if alone else f"{name}/{file.stem}")
    return labels


def patch_gradients(image: Tensor, patches: Sequence[PatchBits]) -> list[float]:
    """Gradient magnitude of what the network saw of each patch: mean absolute horizontal plus vertical derivative.

    Args:
        image: (1, 3, H, W), RGB in 0..1.
        patches: From :func:`observe_bits`.
    """
    return [float(gradient_magnitudes(_seen(image, patch)).sum()) for patch in patches]


def _seen(image: Tensor, part: PatchBits) -> Tensor:
    if part.patch is not None:
        return part.patch.of(image)
    return image[..., part.top : part.top + part.height, part.left : part.left + part.width]
