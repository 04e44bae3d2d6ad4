"""Python files of a user, imported so that the networks and losses they register are known."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

from qsr_plugin import compat
from qsr_plugin.errors import UserError

#: What :func:`import_own` was given, in its order.
_imported: list[str] = []


def command() -> str:
    """``qsr`` with the imports of this process, for commands that are shown to the user."""
    return " ".join(["qsr", *(f"--import {name}" for name in _imported)])


def import_own(name: str) -> None:
    """Import a file or module of the user after BasicSR and this package.

    Args:
        name: ``path/to/file.py``, imported under its own name with its folder on the path, or a dotted module name,
            looked for in the current folder as well.

    Raises:
        UserError: If it cannot be found or imported.
    """
    compat.import_host()
    path = Path(name)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise UserError(f"--import {name}: there is no such file (current folder: {Path.cwd()})")
    folder = str(path.resolve().parent) if is_file else str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    module = path.stem if is_file else name
    try:
        if is_file and _elsewhere(module, path):
            raise UserError(f"--import {name}: a module '{module}' exists already: rename the file")
        importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:  # whatever the code of the user raises
        raise UserError(f"--import {name}: {type(error).__name__}: {error}") from error
    if name not in _imported:
        _imported.append(name)


def _elsewhere(module: str, path: Path) -> bool:
    """Whether the name of a file would import something else."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None and Path(found.origin).resolve() != path.resolve()
