"""What a recipe may say: strict models that refuse unknown keys and impossible values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qsr_plugin.errors import suggest
from qsr_plugin.quant.policy import policy_class
from qsr_plugin.quant.quantizer import quantizer_class
from qsr_plugin.quant.stage_schema import Fragile, Stage, Strict, Tuning

FLOAT_BITS = 32


def _check_bits(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not (2 <= value <= 16 or value == FLOAT_BITS):
        raise ValueError(f"{where} is {value!r}; allowed are whole numbers 2 to 16, or 32 for float")
    return value


class Bits(Strict):
    """Bit widths: weights one number; activations one, or the ascending candidates of a bit policy."""

    weight: Any = FLOAT_BITS
    act: Any = FLOAT_BITS

    @field_validator("weight")
    @classmethod
    def _weight(cls, value: Any) -> int:
        return _check_bits(value, "weight bits")

    @field_validator("act")
    @classmethod
    def _act(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return _check_bits(value, "activation bits")
        widths = tuple(_check_bits(v, "an activation bit candidate") for v in value)
        if len(widths) < 2 or list(widths) != sorted(set(widths)) or FLOAT_BITS in widths:
            raise ValueError(f"activation bit candidates are {list(value)}; give two or more ascending widths below 32")
        return widths


class Spec(Strict):
    """A registered part by name with its own options: ``name`` or ``{type: name, option: value}``."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    def extras(self) -> dict[str, Any]:
        """The options beside ``type``."""
        return dict(self.model_extra or {})


class QuantizerSpec(Spec):
    """A quantizer of the table, its options checked by its own class."""

    @model_validator(mode="after")
    def _check(self) -> QuantizerSpec:
        quantizer_class(self.type).Options(**self.extras())
        return self

    @staticmethod
    def options_model(value: Mapping[str, Any]) -> type[BaseModel]:
        """Options that go with the quantizer a mapping names."""
        return quantizer_class(value["type"]).Options


class PolicySpec(Spec):
    """A bit policy of the table, its options checked by its own class."""

    @model_validator(mode="after")
    def _check(self) -> PolicySpec:
        policy = policy_class(self.type)
        self.model_extra.update(policy.with_files(self.extras()))
        policy.Options(**self.extras())
        return self

    @staticmethod
    def options_model(value: Mapping[str, Any]) -> type[BaseModel]:
        """Options that go with the policy a mapping names."""
        return policy_class(value["type"]).Options


class Rule(Strict):
    """One line of a placement: which places, and what happens there. Later rules win.

    Attributes:
        role: Name in the backbone's role table; or
        match: Wildcards over dotted module names: ``*`` and ``?`` stay within one part, ``**`` spans parts.
        type: Only modules whose class has this name.
        port: input, weight, output, or a port the module offers; a role may already name it.
        quantizer: Quantizer for this place; the recipe's default for weights or activations if not given.
        bits: Bit width for this place; the recipe's if not given. Places with their own bits do not count in FAB.
        in_fab: They do: a place of the method's own that only needs other bits.
        adapt: ``False``: the recipe's bits, whatever the bit policy chooses elsewhere; the place counts in FAB.
        pad_first: At the input of a convolution: quantize the zeros of its padding together with the tensor.
        keep_float: Remove quantizers that earlier rules put here.
    """

    role: Optional[str] = None
    match: Optional[str] = None
    type: Optional[str] = None
    port: Optional[str] = None
    quantizer: Optional[QuantizerSpec] = None
    bits: Any = None
    in_fab: bool = False
    adapt: bool = True
    pad_first: bool = False
    keep_float: bool = False

    @model_validator(mode="after")
    def _check(self) -> Rule:
        if (self.role is None) == (self.match is None):
            raise ValueError("a rule needs exactly one of 'role' and 'match'")
        if self.bits is not None:
            _check_bits(self.bits, "the rule's bits")
        if self.in_fab and self.bits is None:
            raise ValueError("in_fab is for a rule with bits of its own: places without count in FAB anyway")
        if not self.adapt and (self.bits is not None or self.keep_float or self.port == "weight"):
            raise ValueError("adapt: false is for an activation at the recipe's bits: leave it out here")
        if self.keep_float and (self.quantizer is not None or self.bits is not None):
            raise ValueError("a rule with keep_float takes neither 'quantizer' nor 'bits'")
        return self


class Quantizers(Strict):
    """Default quantizers for activations and weights."""

    act: QuantizerSpec
    weight: QuantizerSpec


class Calibration(Strict):
    """How ranges are found from data before (or without) training."""

    images: int = Field(16, ge=1, description="how many images are drawn from the training set")
    batch: int = Field(1, ge=1, description="images per batch; statistics are taken per batch")
    fit: int = Field(
        0, ge=0, description="then ranges are fitted on this many of them, layer after layer, behind quantized layers"
    )


class Cooperative(Strict):
    """How far the regularizing losses may act, from the angle between their gradient and that of the other losses.

    Attributes:
        granularity: What one angle is taken over: each parameter tensor, each layer, or all weights together.
        similarity: Factor of the regularizer's gradient: ``half_cosine`` is (cos + 1) / 2, ``cosine`` the cosine
            itself, ``unit_step`` 1 where the cosine is positive and 0 elsewhere.
    """

    granularity: Literal["tensor", "layer", "global"] = "tensor"
    similarity: Literal["half_cosine", "cosine", "unit_step"] = "half_cosine"


class Depth(Strict):
    """Residual blocks get a learned factor on their identity path and can be left out.

    Attributes:
        role: Role of the blocks.
        kept: Positions of the blocks this network has, counted from 0; all if not given.
    """

    role: str = "block"
    kept: Optional[tuple[int, ...]] = None


class LossSpec(Spec):
    """A loss of the host's registry with its options; ``weight`` or ``loss_weight`` as that loss names it."""


class Recipe(Strict):
    """Everything that turns a float network into a quantized one; see the module docstring.

    Attributes:
        teacher: What losses with a teacher compare with: the ``float`` network, or the quantized one at the ``start``.
    """

    method: str
    bits: Bits = Bits()
    placement: str
    placements: dict[str, tuple[Rule, ...]]
    quantizers: Quantizers
    policy: PolicySpec = PolicySpec(type="fixed")
    calibration: Calibration = Calibration()
    stages: tuple[Stage, ...] = (Stage(),)
    losses: tuple[LossSpec, ...] = ()
    cooperative: Optional[Cooperative] = None
    depth: Optional[Depth] = None
    teacher: Literal["float", "start"] = "float"
    tuning: Optional[Tuning] = None
    fragile: Optional[Fragile] = None

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.placement not in self.placements:
            raise ValueError(f"unknown placement '{self.placement}'. {suggest(self.placement, self.placements)}")
        if not self.stages or any(stage.iters is None for stage in self.stages[:-1]):
            raise ValueError("every stage but the last needs 'iters'")
        if any(stage.depths != (1.0,) for stage in self.stages):
            if self.depth is None:
                raise ValueError(
                    "a stage trains several depths, but the recipe has no 'depth': add depth: {role: block}"
                )
            if self.cooperative is not None:
                raise ValueError("a stage trains several depths, which 'cooperative' cannot: set one of them to null")
        reach = policy_class(self.policy.type).reach
        if reach and not isinstance(self.bits.act, tuple) and self.bits.act - reach < 2:
            raise ValueError(
                f"policy '{self.policy.type}' goes {reach} below and above the activation bits, which are "
                f"{self.bits.act}: give {2 + reach} or more"
            )
        if self.tuning is not None and any(stage.iters is None for stage in self.stages):
            raise ValueError("a recipe with 'tuning' needs 'iters' in every stage")
        if self.fragile is not None and isinstance(self.act_widths, tuple):
            raise ValueError(
                f"'fragile' raises fixed bits, and policy '{self.policy.type}' chooses its own: leave one of them out"
            )
        lowest = min(self.act_widths) if isinstance(self.act_widths, tuple) else self.act_widths
        for index, loss in enumerate(self.losses):
            target = loss.extras().get("target_bits")
            if target is None:
                continue
            if isinstance(target, bool) or not isinstance(target, (int, float)):
                raise ValueError(f"losses[{index}].target_bits is {target!r}; give a number of bits")
            if target < lowest:
                raise ValueError(
                    f"losses[{index}].target_bits is {target}, below the smallest activation bit width {lowest}, so no "
                    f"network can reach it; give {lowest} or more, or add a smaller candidate to bits.act"
                )
        return self

    @property
    def act_widths(self) -> Union[int, tuple[int, ...]]:
        """Bit width of activations, or all that the policy can choose."""
        reach, bits = policy_class(self.policy.type).reach, self.bits.act
        around = reach and not isinstance(bits, tuple) and bits != FLOAT_BITS
        return tuple(range(bits - reach, bits + reach + 1)) if around else bits

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Rules of the chosen placement."""
        return self.placements[self.placement]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :func:`load_recipe` reads back; what checkpoints carry."""
        return self.model_dump(mode="json", exclude_none=True)
