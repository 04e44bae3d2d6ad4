"""Runs a network on one image, whole or in patches, and says which bits each patch got at each place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qsr_plugin.data.patches import SMALLEST, PatchOptions, run_with_notes
from qsr_plugin.data.spans import Last, Patch, Span
from qsr_plugin.quant.record import RecordingRoot, evaluating
from qsr_plugin.report.fab import bits_of_images


@dataclass(frozen=True)
class PatchBits:
    """The part of an image that is taken from one patch, and the bits of that patch.

    The parts of all patches tile the image without overlap; all numbers are low-resolution pixels.

    Attributes:
        top: First row of the part.
        left: First column.
        height: Rows.
        width: Columns.
        bits: Place ``site.port`` to bits, of the places that FAB counts, in module order. Empty for a float network.
        others: The same of activation places that FAB does not count.
        patch: All the network saw, which is more than the part where patches overlap.
    """

    top: int
    left: int
    height: int
    width: int
    bits: Mapping[str, float]
    others: Mapping[str, float] = field(default_factory=dict)
    patch: Patch | None = None


def run_and_observe(
    net: nn.Module,
    image: Tensor,
    scale: int,
    *,
    size: int | None = None,
    overlap: int = 0,
    last: Last = "enlarge",
    batch: int = 1,
    may_shrink: bool = False,
) -> tuple[Tensor, list[PatchBits]]:
    """Super-resolve one image in evaluation mode, without graph, and observe the bits.

    Args:
        net: Takes (N, 3, h, w), returns (N, 3, scale h, scale w), RGB in [0, 1]; float or quantized.
        image: (1, 3, H, W), RGB in [0, 1], on the network's device. Whole images may be several of one size.
        scale: Factor of the network.
        size: Side of a patch; ``None`` runs the whole image, and the other options on patches do not matter.
        overlap: Pixels that neighbouring patches share.
        last: What becomes of the last patch of a row or column, see :mod:`qsr_plugin.data.patches`.
        batch: Patches of equal size that run together; changes no result.
        may_shrink: Go on with smaller patches if memory runs out, which is another protocol. Smaller batches are always
            tried.

    Returns:
        (1, 3, scale H, scale W), not clipped; and one entry per patch, row after row, or per whole image.

    Raises:
        OptionsError: For an impossible size, overlap or batch.
        ValueError: For several images to be cut, or if a patch's output is not ``scale`` times its input.
        torch.OutOfMemoryError: If memory is too small.
    """

    def noted(x: Tensor) -> tuple[Tensor, Sequence[tuple[dict[str, float], dict[str, float]]]]:
        out = net(x)
        if not isinstance(net, RecordingRoot):
            return out, [({}, {})] * x.shape[0]
        return out, list(zip(*bits_of_images(net, net.last_record())))

    with torch.no_grad(), evaluating(net):
        if size is None:
            (out, notes), whole = noted(image), Patch(*(Span(0, side, 0, side) for side in image.shape[2:]))
            return out, [_entry(whole, *bits) for bits in notes]
        options = PatchOptions.read({"size": size, "overlap": overlap, "last": last, "batch": batch}, "patches")
        out, notes = run_with_notes(noted, image, scale, options, smallest=SMALLEST if may_shrink else size)
    return out, [_entry(patch, *bits) for patch, bits in notes]


def _entry(patch: Patch, bits: dict[str, float], others: dict[str, float]) -> PatchBits:
    (top, height), (left, width) = ((span.keep_from, span.keep_to - span.keep_from) for span in patch)
    return PatchBits(top, left, height, width, bits, others, patch)
