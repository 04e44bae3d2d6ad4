"""What was asked of ``qsr quantize`` and what came of it, as its report and its page need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qsr_plugin.float_networks import FloatNetwork
from qsr_plugin.post_training import PostTrained
from qsr_plugin.report.complexity import complexity, method_label
from qsr_plugin.report.page import Scored
from qsr_plugin.report.result_schema import (
    FLOAT,
    CalibrationImages,
    Costs,
    Result,
    described,
    of_backbone,
    package_versions,
)

TestSets = Mapping[str, tuple[Path, Path]]
Scores = dict[str, dict[str, Scored]]


@dataclass(frozen=True)
class Settings:
    """What was asked for, and what came of it.

    Attributes:
        weights: Float checkpoint.
        out: Quantized network.
        network: The float one.
        made: The quantized one.
        seed: Of the draw of crops.
        folder: Of the calibration images.
        photos: Whether these were reduced.
        images: Names of those that were used.
        peak: Bytes of memory held at most until it was made.
    """

    weights: Path
    out: Path
    network: FloatNetwork
    made: PostTrained
    seed: int
    folder: str
    photos: bool
    images: tuple[str, ...]
    peak: int

    @property
    def label(self) -> str:
        """Method and bits."""
        return method_label(self.made.recipe)

    @property
    def tuned(self) -> bool:
        """Whether stages of the recipe ran after the calibration."""
        return "teacher" in self.made.seconds

    @property
    def device(self) -> torch.device:
        """Where the networks ran."""
        return next(self.made.net.parameters()).device

    def result(self) -> Result:
        """What is known before any test."""
        network = self.network
        backbone = {**of_backbone(network.options), "architecture": network.label, "scale": network.scale}
        backbone["weights"] = str(self.weights)
        shared = {"network": self.weights.stem, **backbone, "versions": package_versions()}
        images = {"reduced": network.scale if self.photos else 1, "images": len(self.images), "names": self.images}
        return Result(
            **described(self.made.recipe),
            **shared,
            model=str(self.out),
            tuned=self.tuned,
            seed=self.seed,
            calibration=CalibrationImages(folder=self.folder, seed=self.seed, **images),
            seconds=self.made.seconds,
            peak_memory=self.peak,
            reference=Result(label=FLOAT, costs=Costs.of(complexity(network.net), sites=False), **shared),
            details={"source": network.source, "device": str(self.device), "fragile": list(self.made.fragile)},
        )
