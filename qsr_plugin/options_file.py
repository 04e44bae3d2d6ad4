"""Option files: ``_base_`` inheritance, the recipe block, and safety checks, resolved into one plain BasicSR file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Union

import yaml

from qsr_plugin.errors import UserError
from qsr_plugin.quant.recipe import load_recipe

#: Prefix in ``_base_`` for files shipped with the package.
SHIPPED = "qsr:"


class OptionsError(UserError, ValueError):
    """An option file that cannot be used."""


def options_folder() -> Path:
    """Folder of the shipped option files."""
    return Path(str(resources.files("qsr_plugin.options")))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file of plain data.

    Raises:
        OptionsError: If it is missing, not YAML, no mapping, or wants to build Python objects.
    """
    if not path.is_file():
        raise OptionsError(f"option file {path} does not exist")
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise OptionsError(f"{path} is not plain YAML (Python object tags are refused): {error}") from None
    if not isinstance(data, Mapping):
        raise OptionsError(f"{path} holds {type(data).__name__}, expected a mapping of options")
    return dict(data)


def _assemble(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file merged over its bases, in order; read here because mmengine's own reader builds Python objects."""
    from mmengine.config import Config

    path = path.resolve()
    if path in seen:
        raise OptionsError(f"_base_ of {seen[-1]} leads back to {path}")
    if path.suffix not in (".yml", ".yaml"):
        raise OptionsError(f"{path}: only .yml and .yaml option files are read")
    data = read_yaml(path)
    bases = data.pop("_base_", [])
    merged = Config({})
    for base in [bases] if isinstance(bases, str) else bases:
        merged.merge_from_dict(_assemble(_locate(base, path), (*seen, path)))
    merged.merge_from_dict(data)
    return merged.to_dict()


def _locate(base: str, origin: Path) -> Path:
    return options_folder() / base[len(SHIPPED) :] if base.startswith(SHIPPED) else origin.parent / base


def load_options(path: Union[str, Path]) -> dict[str, Any]:
    """Load an option file with everything its ``_base_`` names, as one plain dict in BasicSR's layout.

    A top-level ``recipe`` block moves to ``network_g.recipe`` and is written out in full, so that the result needs
    neither this package's files nor its defaults.

    Args:
        path: YAML file. ``_base_`` entries are relative to the file, or ``qsr:...`` for files of this package.

    Returns:
        The options; keys of the file win over those of its bases, mappings are merged.

    Raises:
        OptionsError: For a missing, unsafe or circular file, or a recipe without a QuantNet.
        RecipeError: For a recipe that is not valid.
    """
    options = _assemble(Path(path))
    recipe, network = options.pop("recipe", None), options.get("network_g") or {}
    if recipe is not None:
        if network.get("type") != "QuantNet":
            raise OptionsError(f"{path}: a recipe needs network_g.type QuantNet, got {network.get('type')!r}")
        network["recipe"] = recipe
    if network.get("type") == "QuantNet":
        if "recipe" not in network:
            raise OptionsError(f"{path}: network_g.type is QuantNet, but there is no recipe block")
        network["recipe"] = load_recipe(network["recipe"]).to_dict()
    return options


def write_options(options: Mapping[str, Any], path: Path) -> None:
    """Write options as a plain YAML file."""
    path.write_text(yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True), "utf-8")
