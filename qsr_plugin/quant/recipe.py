"""Recipes: a quantization method as validated data.

A recipe says which places of a network are quantized, with which quantizer and how many bits, how ranges are
calibrated, and in which stages training goes on. It names block *roles* ("block.conv"), which a backbone's role table
turns into module patterns, so one recipe serves every backbone. What it may say is in :mod:`qsr_plugin.quant.schema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module, resources
from pathlib import Path
from typing import Any, Optional, Union

import yaml
from pydantic import ValidationError

from qsr_plugin.errors import UserError, suggest
from qsr_plugin.quant.explain import explain
from qsr_plugin.quant.schema import Recipe


class RecipeError(UserError, ValueError):
    """A recipe that cannot be used; the message names the key, the value, what is allowed and the next step."""


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


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """A recipe whose tuning takes so many steps; its stages keep their shares of them.

    Args:
        recipe: With ``tuning``.
        steps: In all.

    Raises:
        RecipeError: If the recipe is not tuned, or has more stages than steps.
    """
    if recipe.tuning is None:
        raise RecipeError(
            f"method '{recipe.method}' only calibrates, so {steps} steps have nothing to do: leave them out"
        )
    lengths = [stage.iters for stage in recipe.stages]
    ends = [round(steps * sum(lengths[: index + 1]) / sum(lengths)) for index in range(len(lengths))]
    if min(found := [end - begin for begin, end in zip([0, *ends], ends)]) < 1:
        usual = f"its {len(lengths)} stages usually take {sum(lengths)}"
        raise RecipeError(f"method '{recipe.method}' cannot be tuned in {steps} steps, {usual}: give more")
    stages = [stage.model_copy(update={"iters": length}) for stage, length in zip(recipe.stages, found)]
    return recipe.model_copy(update={"stages": tuple(stages)})


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
        old, joined = merged.get(key), value
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            other = "type" in value and value["type"] != old.get("type")  # whose options are others as well
            joined = dict(value) if other else _merge(old, value)
        merged[key] = joined
    return merged
