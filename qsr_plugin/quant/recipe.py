"""Recipes: a quantization method as validated data.

A recipe says which places of a network are quantized, with which quantizer and how many bits, how ranges are
calibrated, and in which stages training goes on. It names block *roles* ("block.conv"), which a backbone's role table
turns into module patterns, so one recipe serves every backbone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module, resources
from pathlib import Path
from typing import Any, Literal, Optional, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qsr_plugin.errors import UserError, suggest
from qsr_plugin.quant.explain import explain
from qsr_plugin.quant.policy import policy_class
from qsr_plugin.quant.quantizer import quantizer_class

FLOAT_BITS = 32


class RecipeError(UserError, ValueError):
    """A recipe that cannot be used; the message names the key, the value, what is allowed and the next step."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


def _check_bits(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not (2 <= value <= 16 or value == FLOAT_BITS):
        raise ValueError(f"{where} is {value!r}; allowed are whole numbers 2 to 16, or 32 for float")
    return value


class Bits(_Strict):
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


class Spec(_Strict):
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
    def option_names(value: Mapping[str, Any]) -> list[str]:
        """Options that go with the quantizer a mapping names."""
        return list(quantizer_class(value["type"]).Options.model_fields)


class PolicySpec(Spec):
    """A bit policy of the table, its options checked by its own class."""

    @model_validator(mode="after")
    def _check(self) -> PolicySpec:
        policy_class(self.type).Options(**self.extras())
        return self


class Rule(_Strict):
    """One line of a placement: which places, and what happens there. Later rules win.

    Attributes:
        role: Name in the backbone's role table; or
        match: Wildcards over dotted module names: ``*`` and ``?`` stay within one part, ``**`` spans parts.
        type: Only modules whose class has this name.
        port: input, weight, output, or a port the module offers; a role may already name it.
        quantizer: Quantizer for this place; the recipe's default for weights or activations if not given.
        bits: Bit width for this place; the recipe's if not given. Places with their own bits do not count in FAB.
        keep_float: Remove quantizers that earlier rules put here.
    """

    role: Optional[str] = None
    match: Optional[str] = None
    type: Optional[str] = None
    port: Optional[str] = None
    quantizer: Optional[QuantizerSpec] = None
    bits: Any = None
    keep_float: bool = False

    @model_validator(mode="after")
    def _check(self) -> Rule:
        if (self.role is None) == (self.match is None):
            raise ValueError("a rule needs exactly one of 'role' and 'match'")
        if self.bits is not None:
            _check_bits(self.bits, "the rule's bits")
        if self.keep_float and (self.quantizer is not None or self.bits is not None):
            raise ValueError("a rule with keep_float takes neither 'quantizer' nor 'bits'")
        return self


class Quantizers(_Strict):
    """Default quantizers for activations and weights."""

    act: QuantizerSpec
    weight: QuantizerSpec


class Calibration(_Strict):
    """How ranges are found from data before (or without) training."""

    images: int = Field(16, ge=1, description="how many images are drawn from the training set")
    batch: int = Field(1, ge=1, description="images per batch; statistics are taken per batch")


class LearningRates(_Strict):
    """Learning rate per parameter group; a group not named takes that of ``optim_g``."""

    weights: Optional[float] = Field(None, gt=0)
    ranges: Optional[float] = Field(None, gt=0)
    others: Optional[float] = Field(None, gt=0)


Group = Literal["weights", "ranges", "others"]


class Stage(_Strict):
    """One phase of the training: who learns, for how long, how fast.

    Attributes:
        train: Parameter groups that learn; the others are frozen.
        iters: Length in iterations; ``None`` lasts until the end of the training.
        lr: Learning rates of this stage before the scheduler's decay.
        track_ranges: Ranges follow the training batches during this stage: the weight of the past in [0, 1), 0 for the
            latest batch only.
    """

    train: tuple[Group, ...] = ("weights", "ranges", "others")
    iters: Optional[int] = Field(None, ge=1)
    lr: LearningRates = LearningRates()
    track_ranges: Optional[float] = Field(None, ge=0, lt=1)


class LossSpec(Spec):
    """A loss of the host's registry with its options; ``weight`` or ``loss_weight`` as that loss names it."""


class Recipe(_Strict):
    """Everything that turns a float network into a quantized one; see the module docstring."""

    method: str
    bits: Bits = Bits()
    placement: str
    placements: dict[str, tuple[Rule, ...]]
    quantizers: Quantizers
    policy: PolicySpec = PolicySpec(type="fixed")
    calibration: Calibration = Calibration()
    stages: tuple[Stage, ...] = (Stage(),)
    losses: tuple[LossSpec, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.placement not in self.placements:
            raise ValueError(f"unknown placement '{self.placement}'. {suggest(self.placement, self.placements)}")
        if not self.stages or any(stage.iters is None for stage in self.stages[:-1]):
            raise ValueError("every stage but the last needs 'iters'")
        return self

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Rules of the chosen placement."""
        return self.placements[self.placement]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :func:`load_recipe` reads back; what checkpoints carry."""
        return self.model_dump(mode="json", exclude_none=True)


# -- reading ---------------------------------------------------------------------------------------------------------


def recipe_folder() -> Path:
    """Folder of the shipped recipes."""
    return Path(str(resources.files("qsr_plugin.options") / "recipes"))


def list_methods() -> list[str]:
    """Names of the shipped recipes, usable in :func:`load_recipe`."""
    return sorted(path.stem for path in recipe_folder().glob("*.yml"))


@lru_cache(maxsize=1)
def register_parts() -> None:
    """Import the modules that register quantizers, policies and role tables with the mechanism."""
    import_module("qsr_plugin.methods")
    import_module("qsr_plugin.archs.roles")


def load_recipe(
    source: Union[str, Path, Mapping[str, Any], Recipe],
    *,
    weight_bits: Optional[int] = None,
    act_bits: Union[int, tuple[int, ...], None] = None,
    **overrides: Any,
) -> Recipe:
    """Read and validate a recipe.

    Args:
        source: Name of a shipped recipe (see :func:`list_methods`), path of a YAML file, a mapping, or a recipe. A
            mapping may name a shipped recipe as ``base`` and only say what differs.
        weight_bits: Bit width of weights, 2 to 16, or 32 for float.
        act_bits: Bit width of activations, or the candidates of a bit policy.
        **overrides: Further keys of the recipe, e.g. ``placement="full"``; mappings are merged, lists replaced.

    Returns:
        The validated recipe.

    Raises:
        RecipeError: For anything unknown, misspelt or out of range, with the path of the key.
    """
    register_parts()
    data = source.to_dict() if isinstance(source, Recipe) else _read(source)
    bits = {"weight": weight_bits, "act": act_bits}
    bits = {key: value for key, value in bits.items() if value is not None}
    data = _merge(_merge(data, overrides), {"bits": bits} if bits else {})
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, data)) from None


def _read(source: Union[str, Path, Mapping[str, Any]]) -> dict[str, Any]:
    if isinstance(source, Mapping):
        data = {key: value for key, value in source.items() if key != "base"}
        if "base" not in source:
            return data
        base = _read(source["base"])
        if data.get("method", base.get("method")) != base.get("method"):
            raise RecipeError(
                f"recipe: base '{source['base']}' meets method '{data['method']}' of a _base_ file: keep one of them"
            )
        return _merge(base, data)
    path = Path(source)
    if path.suffix in (".yml", ".yaml"):
        if not path.is_file():
            raise RecipeError(
                f"recipe file '{path}' does not exist; give a file or one of: {', '.join(list_methods())}"
            )
    elif (path := recipe_folder() / f"{source}.yml").is_file() is False:
        raise RecipeError(f"unknown recipe '{source}'. {suggest(str(source), list_methods())} Or give a .yml file.")
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not plain YAML (no Python objects allowed): {error}") from None
    data = data.get("recipe", data) if isinstance(data, Mapping) else data
    if not isinstance(data, Mapping):
        raise RecipeError(f"{path} holds {type(data).__name__}, expected a mapping with a 'recipe' block")
    return _read(data)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
