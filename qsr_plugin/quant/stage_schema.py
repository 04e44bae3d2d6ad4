"""What a recipe may say about learning: stages of a training or tuning, and what is decided between the two."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Strict(BaseModel):
    """Part of a recipe: refuses unknown keys and cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class LearningRates(Strict):
    """Learning rate per parameter group; a group not named takes that of ``optim_g``."""

    weights: Optional[float] = Field(None, gt=0)
    ranges: Optional[float] = Field(None, gt=0)
    weight_ranges: Optional[float] = Field(None, gt=0)
    others: Optional[float] = Field(None, gt=0)
    bits: Optional[float] = Field(None, gt=0)
    thresholds: Optional[float] = Field(None, gt=0)


Group = Literal["weights", "ranges", "weight_ranges", "others", "bits", "thresholds"]


class Stage(Strict):
    """One phase of the training: who learns, for how long, how fast.

    Attributes:
        train: Parameter groups that learn; the others are frozen.
        iters: Length in iterations; ``None`` lasts until the end of the training.
        lr: Learning rates of this stage before the scheduler's decay.
        track_ranges: Ranges follow the training batches during this stage: the weight of the past in [0, 1), 0 for the
            latest batch only, or ``mean`` of all batches of the stage. Quantizers that do not know this learn as ever.
        gated: Quantizers with a gate rescale their range for each image.
        freeze_batch_norm: Batch norm layers normalise with the statistics they have, and keep them. At 2 bits, ranges
            that follow the largest value leave so little in some channels that batch statistics blow gradients up.
        adapt_thresholds: Thresholds of the bit policy that are no parameters follow the training batches.
        depths: Shares of the blocks that are trained in turn on each batch; needs the recipe's ``depth``.
    """

    train: Annotated[tuple[Group, ...], Field(min_length=1)] = get_args(Group)
    iters: Optional[int] = Field(None, ge=1)
    lr: LearningRates = LearningRates()
    track_ranges: Union[float, Literal["mean"], None] = None
    gated: bool = False
    freeze_batch_norm: bool = False
    adapt_thresholds: bool = False
    depths: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (1.0,)

    @field_validator("track_ranges", mode="before")
    @classmethod
    def _tracking(cls, value: Any) -> Any:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (value is None or value == "mean" or number and 0 <= value < 1):
            raise ValueError(f"is {value!r}; allowed are a number in [0, 1) and mean")
        return value


class Tuning(Strict):
    """How a calibrated network is tuned without ground truth: the stages, on the calibration images.

    Attributes:
        batch: Images per step; they pass in the same order again and again.
        crop: Side in LR pixels of the pieces that images are cut into first; whole images if not given.
        relative: Learning rates are shares of a quantization step: of the tensor that a quantizer or weight works on.
        schedule: How rates fall within the whole tuning: not at all, or along half a cosine to zero.
    """

    batch: int = Field(2, ge=1)
    crop: Optional[int] = Field(None, ge=8)
    relative: bool = False
    schedule: Literal["constant", "cosine"] = "constant"


class Fragile(Strict):
    """After calibration, the places that hurt most when they alone are quantized get more bits.

    Attributes:
        bits: Bit width of these places, or several in ascending order, of which the first is taken that is more than
            weights or activations have.
        budget: How much BitOPs of the body may grow by it, as a share.
        outer_budget: How much those of all quantized layers may grow by raising layers with bits of their own (first,
            upsampling, last), as a share.
    """

    bits: tuple[Annotated[int, Field(ge=2, le=16)], ...] = Field((8,), min_length=1)
    budget: float = Field(0.05, gt=0, le=1)
    outer_budget: float = Field(0.0, ge=0, le=1)

    @field_validator("bits", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return value if isinstance(value, (list, tuple)) else (value,)

    @field_validator("bits")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(f"are {list(value)}; give several in ascending order")
        return value

    def above(self, bits: int) -> int:
        """The width for places with so many bits; the widest one if none is more."""
        return next((width for width in self.bits if width > bits), self.bits[-1])
