"""Repairs and registration at the moment BasicSR is imported, however that comes about."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

HOST = "basicsr"


def complete() -> None:
    """Repair the imported BasicSR and register the architectures, losses and models of this package with it."""
    from qsr_plugin import compat

    compat.repair_host()
    from qsr_plugin.register import register_all

    register_all()


class _HostLoader(importlib.abc.Loader):
    """Loads BasicSR with the loader it has anyway, with :func:`compat.prepare` before and :func:`complete` after."""

    def __init__(self, loader: importlib.abc.Loader, finder: HostFinder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        from qsr_plugin import compat

        module.__loader__ = module.__spec__.loader = self._loader
        self._finder.disarm()
        try:
            compat.prepare()
            self._loader.exec_module(module)
            complete()
        except BaseException:
            self._finder.arm()
            raise


class HostFinder(importlib.abc.MetaPathFinder):
    """Waits on ``sys.meta_path`` for the first import of BasicSR; merely looking for its spec does not set it off."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the other finders know of BasicSR, with the loader wrapped; None for any other module."""
        if fullname != HOST:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None and spec.origin is not None:
            spec.loader = _HostLoader(spec.loader, self)
        return spec

    def arm(self) -> None:
        """Wait for BasicSR."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def disarm(self) -> None:
        """Stop waiting."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)


_finder = HostFinder()


def arm() -> None:
    """Repair and register at the next import of BasicSR, or at once if it is imported already."""
    if HOST not in sys.modules:
        _finder.arm()
        return
    from qsr_plugin import compat

    compat.prepare()
    complete()
