"""Repairs that let BasicSR 1.4.2 import and run on a current torch, torchvision and Python.

Nothing is compared by version where a feature can be asked for, because several distributions install a package named
``basicsr``. Modules are patched in memory, files never. ``QSR_COMPAT=0`` in the environment switches every repair off.

``python -m qsr_plugin.compat`` shows the host in use, the versions around it and which repairs were needed here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qsr_plugin import host_patches
from qsr_plugin.errors import UserError, suggest

logger = logging.getLogger("qsr_plugin.compat")

INSTALL_HELP = """\
qsr_plugin needs BasicSR for this, and it cannot be imported. In a fresh environment (Python 3.10 to 3.12):
    pip install -U pip setuptools
    pip install torch
    pip install torchvision
    pip install --no-build-isolation --no-deps basicsr==1.4.2
    pip install -e .
Take the torch and torchvision that belong together (same index, same CUDA or CPU variant), and keep this order: without
--no-build-isolation pip downloads a second torch only to build BasicSR. Run the last line in qsr_plugin's folder."""


@dataclass(frozen=True)
class Repair:
    """One repair.

    Attributes:
        name: Short name used in the log.
        reason: What fails without it.
        needed: Tells whether this stack has the fault.
        apply: Removes the fault.
        module: The host module that is changed; a host without it does not need the repair.
    """

    name: str
    reason: str
    needed: Callable[[], bool]
    apply: Callable[[], None]
    module: str | None = None


_applied: list[str] = []

IMPORT_REPAIRS = (
    Repair(
        "torchvision-ops",
        "a torchvision whose compiled operators cannot be loaded refuses to import",
        host_patches.torchvision_refuses,
        host_patches.import_torchvision_without_ops,
    ),
    Repair(
        "functional-tensor",
        "BasicSR imports transforms.functional_tensor, which torchvision 0.17 removed",
        functools.partial(host_patches.lacks, "torchvision.transforms.functional_tensor"),
        host_patches.stub_functional_tensor,
    ),
    Repair(
        "distutils",
        "BasicSR imports distutils, which Python 3.12 removed; setuptools may supply it",
        host_patches.lacks_distutils,
        host_patches.stub_distutils,
    ),
    Repair(
        "scipy-filters",
        "BasicSR imports scipy.ndimage.filters, which scipy announces to remove",
        functools.partial(host_patches.lacks, "scipy.ndimage.filters"),
        host_patches.alias_ndimage_filters,
    ),
)

HOST_REPAIRS = (
    Repair(
        "lmdb-opened-twice",
        "py-lmdb 2 and later refuse a second environment on one file, so training and validation cannot share an LMDB",
        host_patches.lmdb_opens_once,
        host_patches.patch_lmdb_backend,
        "basicsr.utils.file_client",
    ),
    Repair(
        "gloo",
        "without a CUDA device '--launcher pytorch' divides by the number of devices",
        host_patches.no_cuda_device,
        host_patches.patch_init_dist,
        "basicsr.utils.dist_util",
    ),
    Repair(
        "ddp-on-cpu",
        "without a CUDA device a distributed run asks for the current one when it wraps a network",
        host_patches.no_cuda_device,
        host_patches.patch_model_to_device,
        "basicsr.models.base_model",
    ),
)


class HostMissingError(UserError, ImportError):
    """BasicSR is not installed, or does not import."""


class NotRegisteredError(UserError, LookupError):
    """The host's registry does not know a class that an option file names."""


def enabled() -> bool:
    """Whether repairs may be applied (``QSR_COMPAT`` is not ``0``)."""
    return os.environ.get("QSR_COMPAT", "1") != "0"


def applied() -> list[str]:
    """Names of the repairs applied in this process so far, in order."""
    return list(_applied)


def _run(repairs: tuple[Repair, ...]) -> None:
    if not enabled():
        return
    for repair in repairs:
        absent = repair.module is not None and host_patches.lacks(repair.module)
        if repair.name not in _applied and not absent and repair.needed():
            repair.apply()
            _applied.append(repair.name)
            logger.info("Repair '%s' applied: %s.", repair.name, repair.reason)


def prepare() -> None:
    """Apply what must be in place before BasicSR is imported. May be called any number of times."""
    _run(IMPORT_REPAIRS)


def repair_host() -> None:
    """Apply the repairs of BasicSR's own modules; BasicSR must be imported. May be called any number of times."""
    _run(HOST_REPAIRS)


def import_host(name: str = "basicsr") -> types.ModuleType:
    """Import BasicSR, or one of its modules, repaired.

    Args:
        name: ``"basicsr"`` or a module in it, such as ``"basicsr.train"``.

    Returns:
        The module.

    Raises:
        ImportError: BasicSR is not installed (the message is :data:`INSTALL_HELP`), or the copy that is found does not
            import (the message names its path and the cause).
    """
    prepare()
    if host_location() is None:
        raise HostMissingError(INSTALL_HELP)
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision without its operators raises RuntimeError
        missing = getattr(error, "name", None)
        raise HostMissingError(f"Cannot import '{name}': {error}. {describe_host()}", name=missing) from error


def host_location() -> Path | None:
    """Folder of the ``basicsr`` that this process uses or would use; None without one. Does not import it."""
    loaded = sys.modules.get("basicsr")
    try:
        spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec("basicsr")
    except ImportError:
        return None
    return Path(spec.origin).resolve().parent if spec is not None and spec.origin else None


def describe_host() -> str:
    """One line on the ``basicsr`` in use: its folder, and every other copy on ``sys.path`` that it hides."""
    used = host_location()
    if used is None:
        return "No basicsr is installed."
    copies = {Path(entry, "basicsr").resolve() for entry in sys.path if Path(entry, "basicsr", "__init__.py").is_file()}
    hidden = ", ".join(sorted(str(copy) for copy in copies - {used}))
    return f"basicsr in use: {used}." + (f" It hides another copy: {hidden}." if hidden else "")


def require_registered(kind: str, name: str) -> None:
    """Check that the host knows a class before it is built, because the host's own error says too little.

    Args:
        kind: ``"arch"``, ``"model"``, ``"loss"``, ``"dataset"`` or ``"metric"``.
        name: The ``type`` an option file asks for.

    Raises:
        NotRegisteredError: Nothing of that name is registered; the message gives close names, the ``basicsr`` in use
            and the import that may be missing.
    """
    registry = getattr(import_host("basicsr.utils.registry"), f"{kind.upper()}_REGISTRY")
    known = list(registry.keys())
    if name in known or f"{name}_basicsr" in known:
        return
    raise NotRegisteredError(
        f"No {kind} named '{name}' is registered. {suggest(name, known)} {describe_host()} Classes of a project become "
        f"known when it is imported: put 'import qsr_plugin' (and the project that defines '{name}') first in the "
        "script, and do not run it from a folder that holds another copy of basicsr."
    )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def report() -> str:
    """What ``python -m qsr_plugin.compat`` shows: the host, the versions around it, and each repair with its reason.

    Raises:
        ImportError: As :func:`import_host`.
    """
    import_host()
    lines = [describe_host(), f"python {sys.version.split()[0]}"]
    lines += [f"{name} {_version(name)}" for name in ("basicsr", "torch", "torchvision", "numpy", "scipy", "lmdb")]
    for repair in IMPORT_REPAIRS + HOST_REPAIRS:
        state = "applied" if repair.name in _applied else "not needed" if enabled() else "off (QSR_COMPAT=0)"
        lines.append(f"{repair.name}: {state} ({repair.reason})")
    return "\n".join(lines)


if __name__ == "__main__":
    import typer

    from qsr_plugin import compat

    try:
        typer.echo(compat.report())
    except ImportError as problem:
        typer.echo(problem, err=True)
        raise SystemExit(1) from None
