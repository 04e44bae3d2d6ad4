"""House rules a machine can check: what may know what, and how long a file may be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import qsr_plugin
from qsr_plugin import list_backbones

ROOT = Path(qsr_plugin.__file__).parent
METHODS = [
    "pams",
    "linq",
    "dorefa",
    "lsq",
    "daq",
    "ddtb",
    "fqsr",
    "quantsr",
    "odm",
    "cadyq",
    "cabm",
    "adabm",
    "granular[-_]dq",
    "ptq4sr",
    "2dquant",
]
#: Folders in the order in which they may import one another.
LAYERS = ["quant", "methods", "losses", "data", "report", "deploy", "models"]


@pytest.mark.parametrize("path", sorted((ROOT / "quant").glob("*.py")), ids=lambda p: p.name)
def test_the_mechanism_names_no_method(path: Path) -> None:
    assert not re.findall(rf"\b({'|'.join(METHODS)})", path.read_text(), re.IGNORECASE)


@pytest.mark.parametrize("path", sorted((ROOT / "methods").glob("*.py")), ids=lambda p: p.name)
def test_methods_name_no_backbone(path: Path) -> None:
    assert not re.findall(rf"\b({'|'.join(list_backbones())}|SwinIR|HAT|CARN|RDN|IDN)\b", path.read_text())


@pytest.mark.parametrize("folder", ["quant", "methods"])
def test_core_knows_neither_host_nor_models(folder: Path) -> None:
    for path in (ROOT / folder).glob("*.py"):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = [alias.name for node in top for alias in node.names] + [
            getattr(node, "module", "") or "" for node in top
        ]
        later = LAYERS[LAYERS.index(folder) + 1 :]
        assert not [n for n in names if n.startswith(("basicsr", *(f"qsr_plugin.{layer}" for layer in later)))], path


def test_files_are_short() -> None:
    import qsr_plugin.archs

    folders = [ROOT, Path(qsr_plugin.archs.__file__).parent]
    lengths = {path: len(path.read_text().splitlines()) for folder in folders for path in folder.rglob("*.py")}
    assert {str(path): n for path, n in lengths.items() if n > 300} == {}


def test_no_devices_prints_or_unsafe_readers_in_library_code() -> None:
    bad = re.compile(r"\.cuda\(\)|cuda:0|^\s*print\(|yaml\.load\(|torch\.load\((?!.*weights_only=True)", re.MULTILINE)
    assert {
        str(path): bad.findall(path.read_text()) for path in ROOT.rglob("*.py") if bad.search(path.read_text())
    } == {}
