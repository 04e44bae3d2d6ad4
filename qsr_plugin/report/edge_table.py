"""Making a bit table: which bits a network with trained selectors chose for patches of each edge score.

A network runs patch by patch over low-resolution images (Tian et al., CVPR 2023, and its release: patches of 96 pixels,
94 apart, the last of a row or column extended to the border). Every different set of bits that was chosen at a score is
kept; what a look-up uses of them is decided by the policy that looks up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import torch
from rich.table import Table
from torch import Tensor, nn

from qsr_plugin.data.images import read_rgb, to_tensor, to_uint8
from qsr_plugin.data.patches import PatchOptions, patches_of
from qsr_plugin.data.resize import downscale
from qsr_plugin.methods.cabm import BitTable, as_characters, key_score, score_keys
from qsr_plugin.quant.image_stats import edge_scores
from qsr_plugin.quant.record import evaluating
from qsr_plugin.quant.surgery import policies
from qsr_plugin.report.fab import BitStatistics, BitTally, bits_of_images


@dataclass(frozen=True)
class TableReport:
    """A bit table and what it was made from.

    Attributes:
        table: The table.
        patches: How many patches were looked at.
        bits: How the bits chosen for them are distributed; each patch counts as an image.
    """

    table: BitTable
    patches: int
    bits: BitStatistics


def build_table(
    net: nn.Module, images: Iterable[Tensor], *, patch: int = 96, step: int = 94, batch: int = 8
) -> TableReport:
    """Run a network over images in patches and collect the bits it chooses.

    Args:
        net: Quantized network whose policy chooses bits for each image, with trained weights.
        images: ``(1, 3, H, W)`` low-resolution images of any sizes, RGB in [0, 1].
        patch: Side of a patch in pixels.
        step: Distance between patches in pixels, 1 to ``patch``.
        batch: Patches of equal size that run together; it changes nothing but the time.

    Raises:
        ValueError: If the network chooses no bits, there is no image, or patch and step do not fit.
    """
    if not 1 <= step <= patch:
        raise ValueError(
            f"step {step} with patches of {patch} pixels: allowed are 1 to {patch}, else pixels are missed"
        )
    choosing = {place: policy.candidates for place, policy in policies(net) if len(policy.candidates) > 1}
    if not choosing:
        raise ValueError(
            "this network has the same bits for every image: give one that was trained with a recipe whose bits.act is "
            "a list, e.g. cadyq"
        )
    options = PatchOptions(size=patch, overlap=patch - step, last="enlarge", batch=batch)
    device = next(net.parameters()).device
    found: set[tuple[int, tuple[int, ...]]] = set()
    tally, count = BitTally(), 0
    with torch.no_grad(), evaluating(net):
        for group in _patches(images, options):
            net(group.to(device))
            record = net.last_record()
            keys = score_keys(edge_scores(record.image)).tolist()
            for key, bits in zip(keys, bits_of_images(net, record)[0], strict=True):
                count += 1
                tally.add([bits])
                found.add((key, tuple(round(bits[place]) for place in choosing)))
    if not found:
        raise ValueError("no images to make a table from: give a folder with low-resolution images")
    rows = sorted(found, key=lambda row: (row[0], sum(row[1]), row[1]))
    table = BitTable(
        places=tuple(choosing),
        candidates=tuple(sorted({width for widths in choosing.values() for width in widths})),
        scores=tuple(key_score(key) for key, _ in rows),
        bits=tuple(as_characters(widths) for _, widths in rows),
        patch=patch,
        step=step,
    )
    return TableReport(table, count, tally.statistics())


def _patches(images: Iterable[Tensor], options: PatchOptions) -> Iterator[Tensor]:
    """Patches of all images in batches of equal size ``(N, 3, h, w)``."""
    pending: dict[tuple[int, int], list[Tensor]] = {}
    for image in images:
        for patch in patches_of(*image.shape[-2:], options):
            group = pending.setdefault(patch.shape, [])
            group.append(patch.of(image))
            if len(group) == options.batch:
                yield torch.cat(pending.pop(patch.shape))
    for group in pending.values():
        yield torch.cat(group)


def low_resolution(path: Union[str, Path], scale: int = 1) -> Tensor:
    """Read an image as ``(1, 3, H, W)``, RGB in [0, 1]; reduced by ``scale`` first, for a high-resolution photo."""
    image = read_rgb(path)
    if scale > 1:
        height, width = (length - length % scale for length in image.shape[:2])
        image = downscale(to_uint8(image[:height, :width]), scale)
    return to_tensor(image).unsqueeze(0)


def table_summary(report: TableReport) -> Table:
    """What a table was made from and what is in it."""
    made, bits = report.table, report.bits
    scores = sorted(set(made.scores))
    rows = {
        "Patches": f"{report.patches:,} of {made.patch} pixels, {made.step} apart",
        "Edge scores": f"{len(scores):,} from {scores[0]:g} to {scores[-1]:g}",
        "Sets of bits": f"{len(made.bits):,} for {len(made.places)} places",
        "Looked up": f"{len(made.cheapest().bits):,}, the cheapest of each score where it changes",
        "FAB of a patch": f"{bits.lowest:.2f} to {bits.highest:.2f}, mean {bits.fab:.2f}",
        "Bits chosen": bits.shares_text(),
    }
    table = Table(title="bits by edge score", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for key, value in rows.items():
        table.add_row(key, value)
    return table
