"""Calibration: set the ranges of a quantized network from images, without changing a weight."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Optional, Union

import torch
from torch import Tensor, nn

from qsr_plugin.quant.record import evaluating, fitting, float_mode
from qsr_plugin.quant.surgery import policies, quantizers, sites
from qsr_plugin.quant.visits import short_passes

logger = logging.getLogger("qsr_plugin")


@contextmanager
def calibrating(net: nn.Module, *, ranges: bool = True) -> Iterator[None]:
    """Inside the ``with`` block forwards run the float network and every quantizer watches its own tensors.

    On leaving, ranges are set from what was seen; if the block raised, they stay as they were. Weight quantizers are
    set from the weights, activation quantizers and bit policies from the forwards. Without ``ranges``, quantizers keep
    theirs and only the bit policies watch.
    """
    parts = [quantizer for _, quantizer in quantizers(net)] if ranges else []
    asking, shared = dict(policies(net)), getattr(net, "bit_policy", None)
    choosing = [*asking.values(), *([] if shared is None else [shared])]
    try:
        for part in (*parts, *choosing):
            part.begin_calibration()
        # In evaluation mode batch norm uses its running statistics and keeps them.
        with evaluating(net), torch.no_grad(), float_mode():
            yield
            for _, site in sites(net):
                if (quantizer := site.quantizer("weight")) is not None:
                    quantizer.observe(site.weight)
            for quantizer in parts:
                quantizer.observed_range()  # a place without data fails before any range is changed
            for quantizer in parts:
                quantizer.end_calibration()
            for kind in {type(quantizer): None for quantizer in parts}:
                kind.settle([quantizer for quantizer in parts if type(quantizer) is kind])
            for policy in choosing:
                policy.end_calibration()
            if shared is not None:
                shared.settle({place: asking[place] for place in shared.places})
    finally:
        for part in (*parts, *choosing):
            part.end_calibration(keep=False)


def calibrate(
    net: nn.Module,
    images: Union[str, Path, Tensor, Iterable[Tensor]],
    *,
    ranges: bool = True,
    spent: Optional[dict[str, float]] = None,
) -> nn.Module:
    """Set all ranges of a quantized network, and what its bit policies compare images with. A second call starts anew.

    Forwards are left behind the last place that watches, all but one for each size of images; hooks on what comes after
    see these alone.

    Args:
        net: Network from :func:`quantize_model`.
        images: A folder of low-resolution images, a ``(N, 3, H, W)`` float tensor, RGB in [0, 1], or any iterable of
            such tensors or of BasicSR batches (dicts with ``lq``). Sizes may differ; each item is one batch, and so is
            each file of a folder, whatever ``recipe.calibration`` says. Where ranges of batches are averaged, the last
            ten or so decide: :func:`qsr_plugin.data.calibration_set.crops_from_folder` makes batches of many images.
        ranges: ``False`` leaves all ranges as they are and sets the bit policies alone.
        spent: Is given the seconds of ``calibration``, and of ``clipping`` where a method fits ranges to their bits.

    Returns:
        ``net``.

    Raises:
        ValueError: For an empty set, a wrong shape, or non-finite values.
        RuntimeError: If the network is not quantized or a site saw no data.
    """
    if not any(True for _ in sites(net)) and getattr(net, "recipe", None) is None:
        raise RuntimeError(f"{type(net).__name__} is not quantized: call quantize_model(net, recipe) first")
    images = [images] if isinstance(images, Tensor) else images
    device, fit = next(net.parameters()).device, _fit_images(net) if ranges else 0
    count, kept, spent, begun = 0, [], {} if spent is None else spent, perf_counter()
    with calibrating(net, ranges=ranges), short_passes(net) as watch:
        for batch in image_batches(images):
            if count == 0 and float(batch.max()) > 2:
                logger.warning("calibration values reach %g; images are expected as RGB in [0, 1]", batch.max())
            watch(batch.to(device))
            missing = fit - sum(map(len, kept))
            if missing > 0 and batch.shape[1:] == (kept or [batch])[0].shape[1:]:
                kept.append(batch[:missing].clone())
            count += batch.shape[0]
        if count == 0:
            raise ValueError("no calibration images: give a folder with images, or a non-empty iterable of tensors")
    what = f"{sum(1 for _ in quantizers(net))} quantizers" if ranges else "the bit policies"
    logger.info("calibrated %s on %d image(s)", what, count)
    if count < 2:
        logger.warning("calibrated on one image only: ranges may not fit others; 16 or more are advised")
    spent["calibration"] = perf_counter() - begun
    if kept:
        fit_ranges(net, torch.cat(kept).to(device))
        spent["clipping"] = perf_counter() - begun - spent["calibration"]
    return net


def fit_ranges(net: nn.Module, images: Tensor) -> None:
    """Let every quantizer of a calibrated network fit its range to what arrives there behind quantized layers.

    Args:
        net: Calibrated network.
        images: ``(N, 3, H, W)``, RGB in [0, 1], on the network's device.
    """
    with evaluating(net), torch.no_grad(), fitting():
        net(images)


def _fit_images(net: nn.Module) -> int:
    recipe = getattr(net, "recipe", None)
    return 0 if recipe is None else recipe.calibration.fit


def image_batches(images: Union[str, Path, Iterable[Tensor]]) -> Iterator[Tensor]:
    """Calibration input as ``(N, 3, H, W)`` tensors, checked; files are read one at a time."""
    if isinstance(images, (str, Path)):
        from qsr_plugin.data.images import list_images, read_rgb, to_tensor

        for path in list_images(images):
            yield _checked(to_tensor(read_rgb(path)).unsqueeze(0), str(path))
        return
    for number, item in enumerate(images):
        yield _checked(item.get("lq", item) if isinstance(item, dict) else item, f"batch {number}")


def joined(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Images in batches of a size, whatever batches they come in; only images of one shape share a batch.

    Args:
        batches: ``(N, 3, H, W)`` tensors.
        size: Images per batch; what is left over at the end makes smaller ones.
    """
    waiting: dict[torch.Size, list[Tensor]] = {}
    for image in (image for batch in batches for image in batch.split(1)):
        group = waiting.setdefault(image.shape, [])
        group.append(image)
        if len(group) == size:
            yield torch.cat(waiting.pop(image.shape))
    for group in waiting.values():
        yield torch.cat(group)


def _checked(batch: Tensor, name: str) -> Tensor:
    if not isinstance(batch, Tensor) or batch.dim() != 4 or not batch.is_floating_point():
        shape = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        raise ValueError(
            f"calibration {name} is {shape}: expected a float tensor (N, 3, H, W), RGB in [0, 1], or a dict with it as "
            "'lq'"
        )
    if batch.shape[-1] in (1, 3) and batch.shape[1] > 4:
        raise ValueError(
            f"calibration {name} is {tuple(batch.shape)}, with its channels last: .permute(0, 3, 1, 2) makes it fit"
        )
    if not bool(torch.isfinite(batch).all()):
        raise ValueError(f"calibration {name} holds NaN or infinity: remove or repair it")
    return batch
