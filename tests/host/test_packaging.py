"""What is in the source archive, the wheel and an editable install, and what an installed package needs to run."""

from __future__ import annotations

import ast
import json
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable
from configparser import ConfigParser
from email import message_from_bytes
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from qsr_plugin import __version__
from tests.host.conftest import ROOT, Built, call, new_environment, pip_install

MAPPED = ("archs", "assets", "options")
#: What makes up the installed package, by folder.
INSTALLED = {
    "qsr_plugin": {".py", ".md"},
    "archs": {".py"},
    "options": {".py", ".yml"},
    "assets": {".py", ".md", ".safetensors"},
}

WHERE = """
import importlib.util, json
from importlib import resources
import qsr_plugin, qsr_plugin.archs, qsr_plugin.assets
from qsr_plugin.quant.recipe import list_methods
options = resources.files("qsr_plugin.options")
print(json.dumps({
    "files": [module.__file__ for module in (qsr_plugin, qsr_plugin.archs, qsr_plugin.assets)] + [str(options)],
    "found": sorted(str(path.relative_to(str(options))) for path in options.rglob("*.yml")),
    "methods": list_methods(),
    "top": [name for name in ("archs", "assets", "options", "tests", "tools") if importlib.util.find_spec(name)],
}))
"""


def files_below(folder: Path) -> set[str]:
    """Relative paths of all files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def wheel_names(built: Built) -> set[str]:
    with zipfile.ZipFile(built.wheel) as archive:
        return set(archive.namelist())


def metadata(built: Built, name: str) -> bytes:
    with zipfile.ZipFile(built.wheel) as archive:
        return archive.read(f"qsr_plugin-{__version__}.dist-info/{name}")


def options_of_sources(sources: Path) -> list[str]:
    return sorted(path.relative_to(sources / "options").as_posix() for path in (sources / "options").rglob("*.yml"))


@pytest.mark.parametrize("name", MAPPED)
def test_every_mapped_folder_is_a_package(name: str) -> None:
    """Without ``__init__.py`` a mapped folder is lost to editable installs, and a folder below it to the wheel."""
    folders = [ROOT / name, *(path for path in (ROOT / name).rglob("*") if path.is_dir())]
    bare = [str(path) for path in folders if path.name != "__pycache__" and not (path / "__init__.py").is_file()]
    assert bare == []


def test_sdist_holds_every_source(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        found = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    generated = {name for name in found if name.startswith("qsr_plugin.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    expected = {name for name in files_below(built.sources) if ".egg-info/" not in name}
    assert expected - found == set()
    assert found - expected == generated


def test_wheel_holds_the_package_and_nothing_else(built: Built, wheel_names: set[str]) -> None:
    expected = set()
    for folder, kinds in INSTALLED.items():
        place = folder if folder == "qsr_plugin" else f"qsr_plugin/{folder}"
        names = (name for name in files_below(built.sources / folder) if Path(name).suffix in kinds)
        expected |= {f"{place}/{name}" for name in names}
    assert {"qsr_plugin/options/recipes/pams.yml", "qsr_plugin/archs/roles.py"} <= expected
    package = {name for name in wheel_names if not name.startswith(f"qsr_plugin-{__version__}.dist-info/")}
    assert package == expected


def test_metadata(built: Built) -> None:
    about = message_from_bytes(metadata(built, "METADATA"))
    needs = [need.replace(" ", "") for need in about.get_all("Requires-Dist")]
    assert (about["Name"], about["Version"]) == ("qsr_plugin", __version__)
    assert about["Requires-Python"] == ">=3.10"
    assert "basicsr>=1.4.2" in needs
    assert not [need for need in needs if "==" in need.partition(";")[0]]  # pins belong to constraints.txt
    assert b"Apache License" in metadata(built, "licenses/LICENSE")
    commands = ConfigParser()
    commands.read_string(metadata(built, "entry_points.txt").decode())
    assert dict(commands["console_scripts"]) == {"qsr": "qsr_plugin.cli:main"}


def test_every_import_is_a_declared_requirement(built: Built) -> None:
    needs = message_from_bytes(metadata(built, "METADATA")).get_all("Requires-Dist")
    declared = {re.split(r"[^\w.-]", need)[0].lower().replace("_", "-") for need in needs if "extra ==" not in need}
    imported: dict[str, str] = {}
    for folder in ("qsr_plugin", "archs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0]: path.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    imported[node.module.partition(".")[0]] = path.name
    outside = imported.keys() - sys.stdlib_module_names - {"qsr_plugin", "distutils"}
    assert {"torch", "yaml"} <= outside
    providers = packages_distributions()
    missing = {
        name: imported[name]
        for name in outside
        if not declared & {distribution.lower().replace("_", "-") for distribution in providers.get(name, [name])}
    }
    assert missing == {}


def test_wheel_installed_elsewhere(built: Built, second_python: Path, tmp_path: Path) -> None:
    seen = json.loads(call(second_python, "-c", WHERE, cwd=tmp_path))
    home = second_python.parents[1]
    assert all(Path(file).is_relative_to(home) for file in seen["files"]), seen["files"]
    assert seen["found"] == options_of_sources(built.sources)
    assert "pams" in seen["methods"]
    assert seen["top"] == []
    assert "quantize" in call(home / "bin" / "qsr", "--help", cwd=tmp_path)


def test_editable_install(copy_sources: Callable[[Path], Path], tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "checkout")
    python = new_environment(tmp_path / "env")
    pip_install(python, "--editable", sources)
    late = sources / "options" / "recipes" / "added_later.yml"
    late.write_text("recipe: {}\n", "utf-8")
    seen = json.loads(call(python, "-c", WHERE, cwd=tmp_path))
    assert all(Path(file).is_relative_to(sources) for file in seen["files"]), seen["files"]
    assert seen["found"] == options_of_sources(sources)
    assert "added_later" in seen["methods"]
    assert seen["top"] == []


def test_bare_environment_gets_the_remedy(built: Built, tmp_path: Path) -> None:
    """Nothing but the package: it imports, and asked for the host it says how to install it."""
    python = new_environment(tmp_path / "env", with_dependencies=False)
    pip_install(python, built.wheel)
    code = """
import qsr_plugin
from qsr_plugin import compat
assert "quantize_model" in dir(qsr_plugin)
try:
    compat.import_host()
except ImportError as error:
    print(error)
"""
    told = call(python, "-c", code, cwd=tmp_path)
    assert "pip install --no-build-isolation --no-deps basicsr==1.4.2" in told
