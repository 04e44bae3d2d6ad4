"""How much each layer hurts: one layer at a time is quantized, and its output compared with the float pass.

The damage of a set of places is the mean over the images of the squared error at the network's output, when these
places quantize and all others hand their tensors through as they are. It is measured against the same network with no
place quantizing, so neither ground truth nor a second network is needed. An image counts with an error of
:data:`LOST` at most: in some networks one layer alone makes features explode, and all others would look harmless.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from qsr_plugin.data.images import list_images
from qsr_plugin.progress import Progress, no_progress
from qsr_plugin.quant.calibrate import image_batches
from qsr_plugin.quant.record import evaluating
from qsr_plugin.quant.surgery import quantizers
from qsr_plugin.report.complexity import method_label
from qsr_plugin.report.float_prefix import FloatPrefix, float_prefix

#: LR pixels that run together at most, if images are smaller than that: eight crops of 96x96.
PIXELS = 8 * 96 * 96
#: Mean squared error, 10 dB, at which nothing is left of an image, so that it does not matter how much larger it is.
LOST = 0.1


@dataclass(frozen=True)
class SiteDamage:
    """What one site does to the output when it alone is quantized.

    Attributes:
        name: Dotted module name.
        bits: Port to the bit widths its quantizer may use: its weight and its activations.
        error: Mean over the images of the squared error at the output, RGB in [0, 1], with all its ports quantized; at
            most :data:`LOST`.
        psnr: The same in dB against the float output, peak 1; infinite without any error.
        share: Part of the sum of these errors over all sites, 0 to 1.
        parts: Port to the PSNR with this port alone; empty if it was not measured.
    """

    name: str
    bits: dict[str, tuple[int, ...]]
    error: float
    psnr: float
    share: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Sensitivity:
    """Sites of a network, the most damaging first.

    Attributes:
        network: Class of the float network.
        method: Recipe and bits.
        sites: Ranked by ``error``.
        psnr: Of the output with every place quantized, in dB against the float output.
        images: How many images it was measured on.
        seconds: How long that took.
    """

    network: str
    method: str
    sites: tuple[SiteDamage, ...]
    psnr: float
    images: int
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


def sensitivity(
    net: nn.Module,
    images: str | Path | Tensor | Iterable[Tensor],
    *,
    parts: bool = True,
    progress: Progress = no_progress,
) -> Sensitivity:
    """Quantize one site of a network at a time and rank the damage at the output.

    Args:
        net: Quantized and calibrated; left as it is, with the record of its last forward.
        images: As :func:`qsr_plugin.calibrate` takes them; sizes may differ.
        parts: Measure every port of a site alone as well, which takes about three times as long.
        progress: Shows how far it is.

    Raises:
        RuntimeError: If the network is not quantized.
        NotCalibratedError: If a range was never set.
        ValueError: For no images, a bad one, a site that makes the output NaN or infinite, or folded weights.
    """
    if getattr(net, "folded", False):
        raise ValueError(
            "the weights of this network are folded (a packed file), so no layer can be run in float: measure on the "
            "quantized .safetensors that it was packed from"
        )
    begun = perf_counter()
    widths: dict[str, dict[str, tuple[int, ...]]] = {}
    for place, quantizer in quantizers(net):
        name, _, port = place.rpartition(".")
        widths.setdefault(name, {})[port] = quantizer.candidates
    sites = {name: frozenset(f"{name}.{port}" for port in ports) for name, ports in widths.items()}
    everything = frozenset().union(*sites.values())
    alone = [frozenset([place]) for places in sites.values() for place in places] if parts else []
    errors, count = output_errors(net, images, [everything, *sites.values(), *alone], progress=progress)
    total = math.fsum(errors[places] for places in sites.values())
    rows = [
        SiteDamage(
            name=name,
            bits=widths[name],
            error=errors[places],
            psnr=psnr(errors[places]),
            share=errors[places] / total if total else 0.0,
            parts={port: psnr(errors[frozenset([f"{name}.{port}"])]) for port in widths[name]} if parts else {},
        )
        for name, places in sites.items()
    ]
    return Sensitivity(
        network=getattr(net, "float_class", type(net)).__name__,
        method=method_label(net.recipe),
        sites=tuple(sorted(rows, key=lambda row: -row.error)),
        psnr=psnr(errors[everything]),
        images=count,
        seconds=perf_counter() - begun,
    )


def output_errors(
    net: nn.Module,
    images: str | Path | Tensor | Iterable[Tensor],
    groups: Collection[frozenset[str]],
    *,
    progress: Progress = no_progress,
) -> tuple[dict[frozenset[str], float], int]:
    """Damage at the output of each group of places, quantized without the others.

    A batch passes once in float and once for each group, whose first layers take their results from the float pass. Of
    a folder, one batch is in memory at a time.

    Args:
        net: See :func:`sensitivity`.
        images: See :func:`sensitivity`.
        groups: Sets of places ``site.port``; of equal ones, one is measured.
        progress: Shows how far it is.

    Returns:
        Group to the mean over the images of the squared error, at most :data:`LOST`, and the number of images.

    Raises:
        RuntimeError, ValueError: See :func:`sensitivity`.
    """
    if not any(True for _ in quantizers(net)):
        raise RuntimeError(f"{type(net).__name__} is not quantized: call quantize_model(net, recipe) first")
    device = next(net.parameters()).device
    if isinstance(images, (str, Path)):
        batches, count = image_batches(images), len(list_images(images))
    else:
        batches = list(image_batches([images] if isinstance(images, Tensor) else images))
        count = sum(map(len, batches))
    if count == 0:
        raise ValueError("no images to measure damage on: give a folder with images, or a non-empty iterable")
    sums = {group: torch.zeros((), dtype=torch.float64, device=device) for group in groups}
    steps = iter(progress(range(count * len(sums)), "measuring damage"))
    record, net._last_record = net._last_record, None  # what a forward clears stays in the record that is given back
    try:
        with evaluating(net), torch.no_grad(), float_prefix(net) as prefix:
            for batch in _of_equal_size(batches):
                _add_errors(prefix, batch.to(device), sums, steps)
    finally:
        net._last_record = record
    for _ in steps:  # whoever shows them sees the end
        pass
    errors = {group: value.item() / count for group, value in sums.items()}
    for group, error in errors.items():
        if not math.isfinite(error):
            raise ValueError(
                f"the output holds NaN or infinity with {', '.join(sorted(group))} quantized: its range or the weights "
                "are broken; check the checkpoint, or calibrate again"
            )
    return errors, count


def _add_errors(prefix: FloatPrefix, batch: Tensor, sums: dict[frozenset[str], Tensor], steps: Iterator[int]) -> None:
    wanted = prefix.float_output(batch)
    for group, total in sums.items():
        difference = prefix.output(batch, group) - wanted
        errors = difference.double().square().flatten(1).mean(1)
        total += torch.where(errors.isfinite(), errors.clamp(max=LOST), errors).sum()
        for _ in range(len(batch)):
            next(steps, None)


def _of_equal_size(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Neighbouring images of one size in batches of at most :data:`PIXELS` pixels; larger images alone."""
    waiting: list[Tensor] = []
    for image in (image for batch in batches for image in batch.split(1)):
        fits = (len(waiting) + 1) * image.shape[-2:].numel() <= PIXELS
        if waiting and not (fits and image.shape == waiting[0].shape):
            yield torch.cat(waiting)
            waiting = []
        waiting.append(image)
    if waiting:
        yield torch.cat(waiting)


def psnr(error: float) -> float:
    """Mean squared error of values in [0, 1] as PSNR in dB; infinite for 0."""
    return -10 * math.log10(error) if error > 0 else math.inf
