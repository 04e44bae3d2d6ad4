"""What an engine needs around a pixel, measured on an image of noise."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qsr_plugin.deploy.engine import Engine

logger = logging.getLogger("qsr_plugin")

#: Overlap of tiles where a network looks further than can be measured.
WIDE = 64
#: Input pixels up to which a reach is measured.
FARTHEST = 48
_ROWS = 48
_MATTERS = 1e-3  # of full scale: a quarter of a gray level
_SHARE = 0.99  # of a column lies below it where nothing has changed: a rounding that falls otherwise is no reach


def measured_reach(engine: Engine) -> int | None:
    """How far from a pixel the image still changes its result.

    Two overlapping pieces are cut from an image of noise that becomes brighter to the right. Near the cut edges their
    results differ, further inside they are equal.

    Args:
        engine: Any.

    Returns:
        Distance in input pixels beyond which results differ by less than 1/1000 of full scale; ``None`` if they differ
        everywhere that can be seen: up to :data:`FARTHEST` pixels, or a quarter of the fixed size of a model. This is
        warned of.
    """
    height, width = engine.fixed or (_ROWS, 4 * FARTHEST)
    step = width // 2 // engine.window * engine.window or width // 2
    shared, scale = width - step, engine.scale
    image = _noise(height, width + step)
    left = engine(image[..., :width])[..., scale * step :]
    right = engine(image[..., step:])[..., : scale * shared]
    changes = np.quantile(np.abs(left - right), _SHARE, axis=(0, 1, 2)).reshape(shared, scale).max(axis=1)
    (places,) = np.nonzero(changes > _MATTERS)
    reach = 1 + int(np.minimum(places, shared - 1 - places).max(initial=-1))
    if 2 * reach < shared:
        return reach
    logger.warning(
        "this network looks at more than %d pixels to each side, or at the whole image: tiles overlap by %d (at most "
        "half a tile), and the result may differ a little from that of the whole image (--overlap for another, --tile "
        "0 for no tiles)",
        shared // 2, WIDE,
    )  # fmt: skip
    return None


def _noise(height: int, width: int) -> np.ndarray:
    """(1, 3, height, width) float32 in [0, 1]: blocks and single pixels, on a ramp."""
    noise = np.random.default_rng(0)
    blocks = noise.random((1, 3, height // 4 + 1, width // 4 + 1)).repeat(4, axis=2).repeat(4, axis=3)
    pixels = noise.random((1, 3, height, width))
    return (np.linspace(0, 0.2, width) + 0.4 * blocks[..., :height, :width] + 0.4 * pixels).astype(np.float32)
