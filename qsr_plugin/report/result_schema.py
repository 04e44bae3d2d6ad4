"""The form of all results: what was measured, its quality on every test set, its costs, and what making it took.

Files of this form are written and read by :mod:`qsr_plugin.report.result_io`: one network is a :class:`Result`,
several are a :class:`ResultTable`. They refuse unknown keys, so every change of the keys raises
the version of the files.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Optional

from pydantic import BaseModel, BeforeValidator, ConfigDict, StrictInt

from qsr_plugin import __version__
from qsr_plugin.quant.schema import FLOAT_BITS
from qsr_plugin.report.complexity_types import ComplexityReport
from qsr_plugin.report.fab import BitStatistics

if TYPE_CHECKING:
    from qsr_plugin.quant.schema import Recipe
    from qsr_plugin.report.evaluate import EvaluationResult

#: Method and label of a float network.
FLOAT = "float"


def _number(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, str) and value not in ("inf", "-inf", "nan")):
        raise ValueError(f"is {value!r}, expected a number")
    return value


Number = Annotated[float, BeforeValidator(_number)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageQuality(_Part):
    """Scores of one image, as in :class:`Quality`, and the file name of its high-resolution image."""

    name: str
    psnr: Number
    ssim: Number
    fab: Number


class Quality(_Part):
    """Scores on one test set: means over its images.

    Attributes:
        psnr: dB; infinite for identical images.
        ssim: At most 1.
        fab: Mean bits of the counted activations on these images.
        images: How many there are.
        colour: What is compared: ``Y`` (BT.601, 16 to 235) or ``RGB``.
        border: Pixels left out on each side.
        patches: How images were cut (``size``, ``overlap``, ``last``); ``None`` for whole images.
        protocol: The same in words.
        bits: How the activation bits are distributed.
        bitops: Bit operations with the bits chosen on this set; convention and size are those of the costs.
        by_image: Scores by image.
    """

    psnr: Number
    ssim: Optional[Number] = None
    fab: Optional[Number] = None
    images: Optional[StrictInt] = None
    colour: str = "Y"
    border: Optional[StrictInt] = None
    patches: Optional[dict[str, Any]] = None
    protocol: str = "whole images"
    bits: Optional[BitStatistics] = None
    bitops: Optional[Number] = None
    by_image: tuple[ImageQuality, ...] = ()

    @classmethod
    def of(cls, score: EvaluationResult, bitops: float | None = None, *, by_image: bool = True) -> Quality:
        """Of an evaluation; ``by_image=False`` keeps only the means."""
        data = score.to_dict()
        same = {name: data[name] for name in ("psnr", "ssim", "fab", "patches", "protocol", "bits")}
        singles = data["images"] if by_image else ()
        return cls(**same, images=len(score.images), border=score.scale, bitops=bitops, by_image=singles)


class Costs(_Part):
    """Costs for one image; all but ``ideal_storage_bits`` as in :class:`~.complexity_types.ComplexityReport`.

    Attributes:
        ideal_storage_bits: Weights times their bits, all other parameters at 32; nothing for ranges and selectors, no
            rounding to bytes. ``storage_bits`` is what a file takes.
        sites: One entry per layer; may be left out.
    """

    parameters: StrictInt
    macs: StrictInt
    bitops: Optional[Number]
    bitops_quantized: Optional[Number] = None
    convention: str
    convention_text: str = ""
    input_size: tuple[StrictInt, StrictInt]
    patches: Optional[dict[str, Any]] = None
    protocol: str = "whole images"
    fab: Optional[Number]
    weighted_fab: Optional[Number] = None
    storage_bits: StrictInt
    float_storage_bits: Optional[StrictInt] = None
    ideal_storage_bits: Optional[Number] = None
    scaled_parameters: Optional[Number] = None
    overhead: StrictInt = 0
    policy_ops: StrictInt = 0
    blocks: Optional[tuple[StrictInt, StrictInt]] = None
    sites: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, report: ComplexityReport, *, sites: bool = True) -> Costs:
        """Of a report; ``sites=False`` leaves out the layers."""
        data = {name: value for name, value in report.to_dict().items() if name in cls.model_fields}
        saved = sum(row.weights * (FLOAT_BITS - row.weight_bits) for row in report.sites if row.weight_bits is not None)
        ideal = FLOAT_BITS * report.parameters - saved
        return cls(**{**data, "sites": data["sites"] if sites else ()}, ideal_storage_bits=ideal)


class CalibrationImages(_Part):
    """What ranges were found on.

    Attributes:
        folder: Where the images are.
        reduced: Factor they were reduced by; 1 for low-resolution images.
        images: How many were used.
        names: Of the files.
        side: Side of a crop in low-resolution pixels.
        seed: Of the draw of files and crops.
    """

    folder: str
    reduced: StrictInt = 1
    images: StrictInt
    names: tuple[str, ...] = ()
    side: Optional[StrictInt] = None
    seed: Optional[StrictInt] = None


class Training(_Part):
    """A training that made the network.

    Attributes:
        iterations: Its length.
        seconds: Time of one iteration.
        float_seconds: That of the float network, measured right before.
    """

    iterations: StrictInt
    seconds: Optional[Number] = None
    float_seconds: Optional[Number] = None


class Result(_Part):
    """One network, float or quantized, or why there is none.

    Attributes:
        label: What to call it: method and bits, as ``cadyq W8A4/6/8``; ``float`` for a float network.
        method: Recipe; ``float`` without.
        bits: As asked for, like ``W4A4``; empty for a float network.
        placement: Which places are quantized.
        network: What the float network is called; empty where a file of weights does not tell.
        architecture: Kind of the float network and scale, like ``EDSR x4``.
        backbone: Its type and arguments.
        scale: Up-sampling factor.
        weights: File of the float weights it was made from.
        model: Its own file.
        recipe: As it was used.
        tuned: Whether stages ran after the calibration.
        calibration: What ranges were found on.
        seed: Of everything that is drawn.
        versions: Of packages, by name.
        quality: By the name of the test set.
        before: The same before a training: float weights, calibrated ranges.
        costs: For one image.
        seconds: By what they were spent on: calibration and tuning, without tests and reading.
        peak_memory: Bytes at most until the network was made, tests left out; on a GPU those of its tensors.
        training: What a training took.
        note: Why there are no figures, or what else must be known.
        origin: What it was made from; a command that is called again compares it with what it would do.
        reference: The float network it was made from.
        details: What only the command that wrote it knows, by name.
    """

    label: str
    method: str = FLOAT
    bits: str = ""
    placement: str = ""
    network: str = ""
    architecture: str = ""
    backbone: dict[str, Any] = {}
    scale: Optional[StrictInt] = None
    weights: str = ""
    model: str = ""
    recipe: Optional[dict[str, Any]] = None
    tuned: Optional[bool] = None
    calibration: Optional[CalibrationImages] = None
    seed: Optional[StrictInt] = None
    versions: dict[str, str] = {}
    quality: dict[str, Quality] = {}
    before: dict[str, Quality] = {}
    costs: Optional[Costs] = None
    seconds: dict[str, Number] = {}
    peak_memory: Optional[StrictInt] = None
    training: Optional[Training] = None
    note: str = ""
    origin: Optional[dict[str, Any]] = None
    reference: Optional[Result] = None
    details: dict[str, Any] = {}

    @property
    def scores(self) -> dict[str, Quality]:
        """Quality, or where no training has ended that before it."""
        return self.quality or self.before


class ResultTable(_Part):
    """Networks that belong together.

    Attributes:
        rows: In their order.
        settings: What they share.
        details: What only the command that wrote it knows, by name.
    """

    rows: tuple[Result, ...]
    settings: dict[str, Any] = {}
    details: dict[str, Any] = {}


def described(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says, as keywords of :class:`Result`."""
    from qsr_plugin.report.complexity import method_label

    act = recipe.bits.act
    bits = f"W{recipe.bits.weight}A{'/'.join(map(str, act)) if isinstance(act, tuple) else act}"
    said = {"method": recipe.method, "bits": bits, "placement": recipe.placement, "recipe": recipe.to_dict()}
    return {**said, "label": method_label(recipe)}


def of_backbone(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a backbone's type and arguments say, as keywords of :class:`Result`."""
    scale = options.get("upscale", options.get("scale"))
    kind = str(options.get("architecture", options.get("type", ""))).removesuffix("_qsr")
    known = isinstance(scale, int)
    said = {"backbone": dict(options), "architecture": f"{kind} x{scale}" if known else kind}
    return {**said, "scale": scale if known else None}


def package_versions() -> dict[str, str]:
    """Versions that figures may depend on."""
    packages = {name: version(name) for name in ("basicsr", "torch")}
    return {"qsr_plugin": __version__, "python": platform.python_version(), **packages}
