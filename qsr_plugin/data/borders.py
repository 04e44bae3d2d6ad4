"""What is put around an image that is smaller than a network takes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """Pad an image at the right and at the bottom: mirrored, and beyond a whole mirror image the last pixel repeated.

    Args:
        x: (N, C, H, W).
        height: Wanted, at least H.
        width: Wanted, at least W.

    Returns:
        (N, C, height, width), ``x`` itself if it has this size.
    """
    for mode in ("reflect", "replicate"):
        right, bottom = width - x.shape[-1], height - x.shape[-2]
        if mode == "reflect":  # a mirror image has one pixel less than the image
            right, bottom = min(right, x.shape[-1] - 1), min(bottom, x.shape[-2] - 1)
        if right or bottom:
            x = F.pad(x, (0, right, 0, bottom), mode=mode)
    return x
