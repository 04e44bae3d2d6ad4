"""Tiles of one image shared among networks of several depths: those with few edges go to fewer blocks.

Where integer kernels have one speed for all bit widths, leaving out blocks is what saves time (the depths of Qin et
al., NeurIPS 2023). Edges are measured as by Tian et al. (CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qsr_plugin.data.spans import Patch
from qsr_plugin.deploy.engine import Engine
from qsr_plugin.errors import UserError


def with_shallower(engines: Sequence[Engine]) -> Engine:
    """The last of some engines, which leaves tiles to the others.

    Args:
        engines: From the fewest blocks to the most, one or more.

    Raises:
        UserError: If they do not take the same images, or make results of different sizes.
    """
    *others, deepest = engines
    for one in others:
        if one.scale != deepest.scale:
            raise UserError(
                f"networks that share the tiles of an image have scale {one.scale} and {deepest.scale}: give one "
                "network at several depths"
            )
        if one.fixed != deepest.fixed:
            fixed = (one.fixed, deepest.fixed)
            sizes = ["any size" if size is None else f"{size[0]}x{size[1]} pixels only" for size in fixed]
            raise UserError(
                f"networks that share the tiles of an image take {sizes[0]} and {sizes[1]}: export them with one "
                "--input-size"
            )
    return replace(deepest, shallower=tuple(others))


def in_groups(
    engine: Engine, patches: Sequence[Patch], planes: np.ndarray, batch: int
) -> list[tuple[Engine, Sequence[Patch]]]:
    """Which tiles run together, and where: each network gets an equal share, the deepest those with the most edges.

    Args:
        engine: With or without shallower ones.
        patches: Tiles of equal size.
        planes: (3, H, W) float32, RGB in [0, 1], that they are cut from.
        batch: At most so many together.
    """
    engines, chosen = (*engine.shallower, engine), np.zeros(len(patches), int)
    if len(engines) > 1:
        order = np.argsort([_edge_score(patch.of(planes)) for patch in patches], kind="stable")
        chosen[order[::-1]] = len(engines) - 1 - np.arange(len(patches)) * len(engines) // len(patches)
    groups: list[tuple[Engine, Sequence[Patch]]] = []
    for index, one in enumerate(engines):
        own = [patch for patch, at in zip(patches, chosen) if at == index]
        groups += [(one, own[first : first + batch]) for first in range(0, len(own), batch)]
    return groups


def _edge_score(tile: np.ndarray) -> float:
    """What :func:`qsr_plugin.quant.image_stats.edge_scores` makes of a tile, without PyTorch."""
    import cv2  # one network alone needs none of it

    pixels = np.rint(255 * tile.transpose(1, 2, 0).clip(0, 1)).astype(np.uint8)
    response = cv2.Laplacian(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.CV_16S, ksize=3)
    return float(cv2.convertScaleAbs(response).mean())
