"""Whole images in patches: where to cut, how to put the results together, and what to do when memory runs out.

Neighbouring patches overlap; each output pixel is taken from one patch only, the one in which it lies deeper, so
nothing is averaged and no seam can show as long as the overlap covers the network's receptive field.

Where the last patch of a row would reach over the border, it is moved back (``shift``: all patches have one size, the
least memory) or it takes what is left over into itself (``enlarge``: the published protocol of content-adaptive bits,
Hong et al., ECCV 2022, and after it; 96 pixels with overlap 6). A network whose bits depend on the patch gives another
result for either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from qsr_plugin.data.spans import Last, Patch, spans
from qsr_plugin.options_file import OptionsError
from qsr_plugin.quant.explain import explain
from qsr_plugin.quant.quantizer import StrictOptions

T = TypeVar("T")

logger = logging.getLogger("qsr_plugin")

#: Patches are not made smaller than this when memory runs out.
SMALLEST = 16


class PatchOptions(StrictOptions):
    """How images are cut, as option files say it.

    Attributes:
        size: Side of a patch in low-resolution pixels.
        overlap: Pixels that neighbours share, at least.
        last: See the module's text.
        batch: Patches of equal size that run together.
    """

    size: int = Field(ge=1)
    overlap: int = Field(0, ge=0)
    last: Last = "shift"
    batch: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> PatchOptions:
        spans(self.size, self.size, self.overlap)
        return self

    @classmethod
    def read(cls, data: PatchOptions | Mapping[str, Any] | None, where: str = "val.patches") -> PatchOptions | None:
        """Options from plain data; ``None`` stands for whole images.

        Raises:
            OptionsError: For unknown keys and impossible values, with what is allowed.
        """
        if data is None or isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise OptionsError(f"{where} is {data!r}; expected a mapping like {{size: 96, overlap: 6, last: enlarge}}")
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise OptionsError(explain(error, cls, data, where)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data of what belongs to the protocol; the batch does not."""
        return self.model_dump(exclude={"batch"})


def protocol(patches: PatchOptions | None) -> str:
    """What images are run as, in words."""
    if patches is None:
        return "whole images"
    last = "enlarged" if patches.last == "enlarge" else "moved back"
    return f"patches of {patches.size}x{patches.size}, overlap {patches.overlap}, last {last}"


def patches_of(height: int, width: int, options: PatchOptions) -> list[Patch]:
    """The patches of an image of ``height`` x ``width`` input pixels, row after row."""
    rows, columns = (spans(side, options.size, options.overlap, options.last) for side in (height, width))
    return [Patch(y, x) for y in rows for x in columns]


def run_in_patches(
    net: Callable[[Tensor], Tensor],
    image: Tensor,
    scale: int,
    size: int,
    overlap: int,
    batch: int = 1,
    last: Last = "shift",
) -> Tensor:
    """Super-resolve an image patch by patch; see :func:`run_with_notes`.

    Args:
        net: Takes (N, C, h, w), returns (N, C', scale h, scale w).
        image: (1, C, H, W), on the network's device.
        scale: Factor of the network.
        size: Side of a patch in input pixels.
        overlap: Pixels that neighbouring patches share.
        batch: Patches of equal size that run together.
        last: What becomes of the last patch of a row or column.

    Returns:
        (1, C', scale H, scale W).
    """
    options = PatchOptions(size=size, overlap=overlap, batch=batch, last=last)
    return run_with_notes(lambda x: (net(x), [None] * x.shape[0]), image, scale, options)[0]


def run_with_notes(
    net: Callable[[Tensor], tuple[Tensor, Sequence[T]]],
    image: Tensor,
    scale: int,
    options: PatchOptions,
    *,
    smallest: int = SMALLEST,
) -> tuple[Tensor, list[tuple[Patch, T]]]:
    """Super-resolve an image patch by patch, and keep what was noted of each patch.

    Patches of equal size run together. If memory runs out, first the batches are halved, then the patches.

    Args:
        net: Takes (N, C, h, w), returns (N, C', scale h, scale w) and one note for each of the N patches.
        image: (1, C, H, W), on the network's device.
        scale: Factor of the network.
        options: How to cut.
        smallest: Patches are not made smaller than this when memory runs out.

    Returns:
        (1, C', scale H, scale W), and the patches with their notes, row after row.

    Raises:
        ValueError: For more than one image, or if the network's output is not ``scale`` times its input.
        torch.OutOfMemoryError: If even the smallest patches do not fit; never a result with missing parts.
    """
    if image.shape[0] != 1:
        raise ValueError(f"got a batch of {image.shape[0]} images; cut one after the other")
    while True:
        try:
            return _run(net, image, scale, options)
        except (torch.OutOfMemoryError, MemoryError):
            half = max(options.size // 2, SMALLEST)
            if options.batch > 1:
                options = options.model_copy(update={"batch": options.batch // 2})
            elif smallest <= half < min(options.size, max(image.shape[2:])) and options.overlap < half:
                options = options.model_copy(update={"size": half})
            else:
                raise
            logger.warning(
                "out of memory: going on with patches of %d pixels, %d at a time", options.size, options.batch
            )


def _run(
    net: Callable[[Tensor], tuple[Tensor, Sequence[T]]], image: Tensor, scale: int, options: PatchOptions
) -> tuple[Tensor, list[tuple[Patch, T]]]:
    patches = patches_of(*image.shape[2:], options)
    notes: dict[Patch, T] = {}
    out: Tensor | None = None
    for (height, width), group in groupby(sorted(patches, key=lambda patch: patch.shape), lambda patch: patch.shape):
        alike = list(group)
        for first in range(0, len(alike), options.batch):
            together = alike[first : first + options.batch]
            results, noted = net(torch.cat([patch.of(image) for patch in together]))
            if tuple(results.shape[2:]) != (expected := (scale * height, scale * width)):
                raise ValueError(
                    f"the network made {tuple(results.shape[2:])} of a patch, scale {scale} asks for {expected}"
                )
            if out is None:
                out = results.new_empty(1, results.shape[1], scale * image.shape[2], scale * image.shape[3])
            for patch, result in zip(together, results):
                _place(out, patch, result, scale)
            notes.update(zip(together, noted, strict=True))
    return out, [(patch, notes[patch]) for patch in patches]


def _place(out: Tensor, patch: Patch, result: Tensor, scale: int) -> None:
    """Copy what the image takes from a patch's result."""
    into, taken = [], []
    for span in patch:
        into.append(slice(scale * span.keep_from, scale * span.keep_to))
        taken.append(slice(scale * (span.keep_from - span.start), scale * (span.keep_to - span.start)))
    out[0, :, into[0], into[1]] = result[:, taken[0], taken[1]]
