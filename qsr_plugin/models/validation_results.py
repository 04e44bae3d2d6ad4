"""What a validation found, as a result file: ``results.json`` in the folder of the training or the test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from basicsr.utils import get_root_logger
from torch import nn

from qsr_plugin.data.patches import PatchOptions, protocol
from qsr_plugin.report.complexity import complexity
from qsr_plugin.report.fab import BitStatistics
from qsr_plugin.report.result_io import write_results
from qsr_plugin.report.result_schema import (
    Costs,
    Quality,
    Result,
    Training,
    described,
    of_backbone,
    package_versions,
)

_SCORES = {"calculate_psnr": "psnr", "calculate_ssim": "ssim"}


def quality_of(
    opt: Mapping[str, Any],
    values: Mapping[str, float],
    bits: BitStatistics,
    images: int,
    patches: PatchOptions | None,
) -> Quality | None:
    """The scores of the host's metrics on one data set; ``None`` if there is no PSNR among them.

    Args:
        opt: Of the run.
        values: Means over the images by the names of ``val.metrics``.
        bits: Of the images.
        images: How many there are.
        patches: How they were cut.
    """
    metrics = opt["val"]["metrics"]
    found = {_SCORES[metrics[name]["type"]]: name for name in reversed(values) if metrics[name]["type"] in _SCORES}
    if "psnr" not in found:
        return None
    how = metrics[found["psnr"]]
    return Quality(
        **{score: float(values[name]) for score, name in found.items()},
        fab=bits.fab,
        images=images,
        colour="Y" if how.get("test_y_channel") else "RGB",
        border=how.get("crop_border"),
        patches=patches and patches.to_dict(),
        protocol=protocol(patches),
        bits=bits,
    )


def costs_of(net: nn.Module, bits: BitStatistics, patches: PatchOptions | None) -> Costs | None:
    """Costs of a network with the bits of a data set; ``None`` if they cannot be told, with a line in the log."""
    try:
        return Costs.of(complexity(net, bits={**bits.places, **bits.others}, patches=patches), sites=False)
    except (RuntimeError, ValueError) as error:  # a figure that is missing must not end a training
        get_root_logger().warning(f"costs of the network are not known: {error}")
        return None


def write_validation(
    opt: Mapping[str, Any], net: nn.Module, quality: Mapping[str, Quality], costs: Costs | None, iteration: int | str
) -> None:
    """Write the last scores on all data sets with the costs of the network, in place of those before.

    Does nothing for a run without a folder of its own. A file that cannot be written is told in the log.

    Args:
        opt: Of the run.
        net: The network that was validated.
        quality: By data set.
        costs: See :func:`costs_of`.
        iteration: Number of the iteration; anything in a test.
    """
    path, said = opt["path"], {**described(net.recipe), **of_backbone(getattr(net, "backbone_options", {}))}
    folder = path.get("experiments_root" if opt["is_train"] else "results_root")
    if folder is None:
        return
    if opt["is_train"]:
        start = path.get("pretrain_network_float")
        said |= {"training": Training(iterations=iteration), "weights": str(start or "")}
    else:
        said["model"] = str(path.get("pretrain_network_g") or "")
    known = {"quality": dict(quality), "costs": costs, "versions": package_versions()}
    result = Result(**said, **known, seed=opt.get("manual_seed"), details={"run": opt["name"]})
    file = Path(folder) / "results.json"
    try:
        write_results(result, file)
    except OSError as error:  # a full disk must not end a training
        get_root_logger().warning(f"{file} was not written, the run goes on: {error}")
