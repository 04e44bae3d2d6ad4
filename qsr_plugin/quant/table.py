"""Tables of classes by name, behind the parts a recipe names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from qsr_plugin.errors import suggest

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Table(dict[str, type[T]], Generic[T]):
    """Classes derived from ``T`` by the name that recipes use.

    Args:
        kind: What the classes are, for messages.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator that makes a class available to recipes under ``name``.

        Raises:
            ValueError: If the name is taken.
        """

        def add(cls: C) -> C:
            if name in self:
                raise ValueError(f"{self.kind} '{name}' is already registered by {self[name].__qualname__}")
            self[name] = cls
            return cls

        return add

    def find(self, name: str) -> type[T]:
        """Look up a registered class.

        Raises:
            ValueError: For an unknown name, with the closest registered one.
        """
        if name not in self:
            raise ValueError(f"unknown {self.kind} '{name}'. {suggest(name, self)}")
        return self[name]
