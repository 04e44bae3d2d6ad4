"""Option files: ``_base_`` inheritance, the recipe block, and safety checks, resolved into one plain BasicSR file."""

from __future__ import annotations

import difflib
import pickle
import re
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Union

import yaml

from qsr_plugin import compat
from qsr_plugin.errors import UserError, suggest
from qsr_plugin.quant.recipe import load_recipe

#: Options that no shipped file sets, and that may be set from the command line all the same.
_UNSET = {("val", "depth"), ("val", "patches")}
#: How alike a key and a known one are, from 0 to 1, for the first to be taken for a slip; blocks have few names.
_ALIKE, _ALIKE_BLOCK = 0.85, 0.7
#: How names of files end that hold networks or options.
_FILES = (".bin", ".ckpt", ".json", ".onnx", ".pkl", ".pt", ".pth", ".safetensors", ".yaml", ".yml")
#: What is checked key by key elsewhere: constructors refuse unknown arguments, recipes are strict.
_CHECKED_ELSEWHERE = ("network_g", "recipe")

#: Prefix in ``_base_`` and ``starts_from`` for files shipped with the package.
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


def assemble(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file merged over its bases, in order; read here because mmengine's own reader builds Python objects.

    Raises:
        OptionsError: For a missing, unsafe or circular file, values that do not merge, or a misspelt key.
    """
    path = path.resolve()
    if path in seen:
        raise OptionsError(f"_base_ of {seen[-1]} leads back to {path}")
    if path.suffix not in (".yml", ".yaml"):
        raise OptionsError(f"{path}: only .yml and .yaml option files are read")
    data = read_yaml(path)
    bases = data.pop("_base_", [])
    if data.get("starts_from"):
        data["starts_from"] = str(_locate(str(data["starts_from"]), path).resolve())
    merged = _config_class()({})
    try:
        for base in [bases] if isinstance(bases, str) else bases:
            merged.merge_from_dict(assemble(_locate(base, path), (*seen, path)))
        for key in merged:
            if key not in _CHECKED_ELSEWHERE:
                _refuse_misspelt(data.get(key), merged[key], f"{key}.", path)
        _refuse_misspelt(data, merged.to_dict(), "", path, deep=False)
        merged.merge_from_dict(data)
    except (TypeError, KeyError) as error:  # a mapping over a plain value
        raise OptionsError(f"{path} does not merge with its _base_: {error.args[0]}") from None
    return merged.to_dict()


def _config_class() -> type:
    """mmengine's ``Config``, also where processes import it together for the first time after an installation.

    yapf, which mmengine imports, then writes a cache that another process may find half written.
    """
    try:
        from mmengine.config import Config
    except (EOFError, pickle.UnpicklingError):
        time.sleep(1)
        from mmengine.config import Config
    return Config


def _refuse_misspelt(data: Any, base: Any, where: str, path: Path, *, deep: bool = True) -> None:
    """Refuse keys that are in no base but look like one that is: the host takes any key and reads what it knows.

    Raises:
        OptionsError: For the first of them.
    """
    if not isinstance(data, Mapping) or not isinstance(base, Mapping) or data.get("_delete_"):
        return
    for key, value in data.items():
        if key in base:
            if deep:
                _refuse_misspelt(value, base[key], f"{where}{key}.", path)
            continue
        close = difflib.get_close_matches(str(key), map(str, base), n=1, cutoff=_ALIKE if deep else _ALIKE_BLOCK)
        if close and not _numbered_alike(str(key), close[0]):
            raise OptionsError(
                f"{path}: {where}{key} is in no _base_. Did you mean '{close[0]}'? If it is right, give it in a file "
                "of its own and name that in _base_ as well."
            )


def _numbered_alike(one: str, other: str) -> bool:
    """Whether names differ in a last letter or number after an underscore, as network_g and network_d do."""
    (stem, _, end), (other_stem, _, other_end) = one.rpartition("_"), other.rpartition("_")
    return stem == other_stem != "" and len(end) == len(other_end) == 1


def _locate(base: str, origin: Path) -> Path:
    return options_folder() / base[len(SHIPPED) :] if base.startswith(SHIPPED) else origin.parent / base


def load_options(path: Union[str, Path], forced: Sequence[str] = ()) -> dict[str, Any]:
    """Load an option file with everything its ``_base_`` names, as one plain dict in BasicSR's layout.

    A top-level ``recipe`` block moves to ``network_g.recipe`` and is written out in full, so that the result needs
    neither this package's files nor its defaults.

    Args:
        path: YAML file. ``_base_`` entries and ``starts_from`` are relative to the file, or ``qsr:...`` for files of
            this package; so may be weights below ``path``, as ``qsr:assets/NAME``.
        forced: BasicSR's ``key:key=value`` entries, which win over the file. The key must exist.

    Returns:
        The options; keys of the file win over those of its bases, mappings are merged. Data sets set to null are left
        out.

    Raises:
        OptionsError: For a missing, unsafe or circular file, or a recipe without a QuantNet.
        RecipeError: For a recipe that is not valid.
    """
    options = assemble(Path(path))
    for entry in forced:
        _force(options, entry)
    recipe, network = options.pop("recipe", None), options.get("network_g") or {}
    if recipe is not None:
        if network.get("type") != "QuantNet":
            raise OptionsError(f"{path}: a recipe needs network_g.type QuantNet, got {network.get('type')!r}")
        network["recipe"] = recipe
    if network.get("type") == "QuantNet":
        if "recipe" not in network:
            raise OptionsError(f"{path}: network_g.type is QuantNet, but there is no recipe block")
        network["recipe"] = load_recipe(network["recipe"]).to_dict()
    for name in [name for name, dataset in (options.get("datasets") or {}).items() if dataset is None]:
        del options["datasets"][name]  # how a file leaves out a set of its _base_
    for key, value in (options.get("path") or {}).items():
        if isinstance(value, str) and value.startswith(SHIPPED):
            folder, _, name = value[len(SHIPPED) :].partition("/")
            options["path"][key] = str(resources.files(f"qsr_plugin.{folder}") / name)
    return options


def _force(options: dict[str, Any], entry: str) -> None:
    """Set one ``key:key=value``; a recipe given by name is read first, so that its keys exist."""
    keys, equals, text = entry.partition("=")
    *parents, last = keys.strip().split(":")
    if parents[:1] == ["recipe"] and "recipe" in options:
        options["recipe"] = load_recipe(options["recipe"]).to_dict()
    path = (*parents, last)
    place: Any = options
    for depth, key in enumerate(path, 1):
        known = place if isinstance(place, dict) else {}
        free = place is known and depth > 1 and path[:2] in _UNSET
        if not equals or not (free or key in known):
            raise OptionsError(
                f"--force_yml {entry}: the file has no option '{':'.join(path)}'. {suggest(key, known)} Give a new one "
                "in a YAML file that names this one in _base_."
            )
        if depth < len(path):
            place = place.setdefault(key, {})
    place[last] = yaml.safe_load(text)


def arch_options(arch: str) -> dict[str, Any]:
    """All options of a YAML file with a ``network_g`` block, or of a shipped backbone by name.

    Raises:
        OptionsError: If there is no such backbone, or the file says nothing about a network.
    """
    path = Path(arch)
    if path.suffix not in (".yml", ".yaml"):
        path = options_folder() / "backbones" / f"{arch}.yml"
        if not path.is_file():
            names = [shipped.stem for shipped in path.parent.glob("*.yml")]
            if arch in compat.import_host("basicsr.utils.registry").ARCH_REGISTRY:
                raise OptionsError(
                    f"'{arch}' is the class of a network, whose arguments are not known: give a .yml file with "
                    f"network_g: {{type: {arch}, ...}}, its arguments beside the type"
                )
            raise OptionsError(f"unknown backbone '{arch}'. {suggest(arch, names)} Or give a .yml file.")
    options = assemble(path)
    if not options.get("network_g"):
        raise OptionsError(f"{arch} has no network_g block")
    return options


def backbone_options(arch: str) -> dict[str, Any]:
    """Type and arguments of a float network, from what :func:`arch_options` takes."""
    network = arch_options(arch)["network_g"]
    return network["backbone"] if network.get("type") == "QuantNet" else network


def scale_of(backbone: Mapping[str, Any]) -> int:
    """Up-sampling factor in a backbone's options.

    Raises:
        OptionsError: If they name none.
    """
    scale = backbone.get("upscale", backbone.get("scale"))
    if not isinstance(scale, int):
        raise OptionsError(f"the options of {backbone.get('type')} name no scale: add upscale")
    return scale


def path_in(value: Any) -> str:
    """The first string in plain data that is a path or ends like the name of a file; empty if there is none.

    Options of a foreign file must not have one: some constructors open what they are given.
    """
    if isinstance(value, str):
        return value if re.search(r"[/\\]", value) or value.lower().endswith(_FILES) else ""
    parts = (*value, *value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return next(filter(None, map(path_in, parts)), "")


def parse_bits(text: str) -> tuple[int, int]:
    """``W4A4`` as (4, 4): bits of weights and of activations; ``W4A4MP`` is the same, for a policy around them.

    Raises:
        OptionsError: For anything else.
    """
    if not (found := re.fullmatch(r"[wW](\d+)[aA](\d+)(?:[mM][pP])?", text)):
        raise OptionsError(f"bits are '{text}'; expected weight and activation bits, e.g. W4A4, W8A8 or W4A4MP")
    return int(found[1]), int(found[2])


def write_options(options: Mapping[str, Any], path: Path) -> None:
    """Write options as a plain YAML file."""
    path.write_text(yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True), "utf-8")
