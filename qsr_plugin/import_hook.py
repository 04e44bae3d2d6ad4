"""Repairs and registration at the moment BasicSR is imported, however that comes about."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

HOST = "basicsr"
OWN = "qsr_plugin."

_Execute = Callable[[importlib.abc.Loader, ModuleType], None]


class _Loader(importlib.abc.Loader):
    """The loader a module has anyway, with the execution of the module handed to ``execute``."""

    def __init__(self, loader: importlib.abc.Loader, execute: _Execute) -> None:
        self._loader = loader
        self._execute = execute

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._execute(self._loader, module)


class HostFinder(importlib.abc.MetaPathFinder):
    """Waits on ``sys.meta_path`` for the first import of BasicSR; merely looking for its spec does not set it off.

    Modules of this package are watched as well: when one of them first imports BasicSR, it is only half executed
    at that moment, and registration, which imports others that need it, has to wait until it is complete.
    """

    def __init__(self) -> None:
        self._running = 0
        self._pending = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the other finders know of a watched module, with the loader wrapped; None for any other."""
        if fullname != HOST and not fullname.startswith(OWN):
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None and spec.origin is not None:
            spec.loader = _Loader(spec.loader, self._execute_host if fullname == HOST else self._execute_own)
        return spec

    def _execute_host(self, loader: importlib.abc.Loader, module: ModuleType) -> None:
        self.disarm()
        try:
            from qsr_plugin import compat

            compat.prepare()
            loader.exec_module(module)
            self.complete()
        except BaseException:
            self.arm()
            raise

    def _execute_own(self, loader: importlib.abc.Loader, module: ModuleType) -> None:
        self._running += 1
        try:
            loader.exec_module(module)
        except BaseException:
            if self._pending:  # the next import of one of our modules registers
                self.arm()
            raise
        finally:
            self._running -= 1
        if self._pending:
            self._register()

    def complete(self) -> None:
        """Repair the imported BasicSR and register this package with it."""
        from qsr_plugin import compat

        compat.repair_host()
        self._register()

    def _register(self) -> None:
        self._pending = self._running > 0
        if self._pending:
            return
        self.disarm()
        from qsr_plugin.register import register_all

        register_all()

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
    _finder.complete()
