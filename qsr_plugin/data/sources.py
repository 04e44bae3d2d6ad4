"""The two places a ``PairedImageDataset`` reads images from, listed exactly as the host lists them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import lmdb

from qsr_plugin.data.store import META_NAME

_SHOWN = 5


class Source(Protocol):
    """A folder or an LMDB whose images are read by name.

    Attributes:
        path: Where it is.
        names: What the host will ask for: file names, or keys of ``meta_info.txt``.
    """

    path: Path
    names: list[str]

    def read(self, name: str) -> bytes | None:
        """Return the encoded image, or None if there is none of that name."""


class FolderSource:
    """All files of a folder that are not hidden, whatever their type, as the host takes them.

    Args:
        path: The folder.

    Raises:
        ValueError: It is missing, not a folder, or empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing"
            where = "" if path.is_absolute() else f" Relative paths begin in the current folder, {Path.cwd()}."
            raise ValueError(f"looked for a folder of images, found {found}: correct the path.{where}")
        self.names = sorted(
            entry.name for entry in path.iterdir() if entry.is_file() and not entry.name.startswith(".")
        )
        if not self.names:
            raise ValueError("looked for image files, found none (sub-folders are not searched).")

    def read(self, name: str) -> bytes | None:
        """Return the content of a file of the folder, or None if there is no such file."""
        file = self.path / name
        return file.read_bytes() if file.is_file() else None


class LmdbSource:
    """An LMDB in BasicSR's format. Use it inside :func:`open_source`, which closes it.

    Args:
        path: Folder of the database.

    Attributes:
        stored: Keys that are really in the database.

    Raises:
        ValueError: The folder, the database or ``meta_info.txt`` is missing, unreadable or empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix != ".lmdb":
            raise ValueError("BasicSR accepts an LMDB only if the folder's name ends in .lmdb; rename it.")
        if not (path / "data.mdb").is_file():
            raise ValueError(f"looked for data.mdb in it, found {_listing(path)}.")
        if not (path / META_NAME).is_file():
            raise ValueError(
                f"looked for {META_NAME} in it, found {_listing(path)}. "
                "An unfinished build lacks it: run the same `qsr data build` again."
            )
        self.names = [line.split(".")[0] for line in (path / META_NAME).read_text("utf-8").splitlines()]
        if not self.names:
            raise ValueError(f"{META_NAME} lists no image; build the database again.")
        try:
            self._env = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise ValueError(f"the database does not open ({error}).") from error
        with self._env.begin() as transaction, transaction.cursor() as cursor:
            self.stored = {key.decode("utf-8", "replace") for key in cursor.iternext(values=False)}

    def read(self, name: str) -> bytes | None:
        """Return the value of a key, or None if the database lacks the key."""
        with self._env.begin() as transaction:
            return transaction.get(name.encode("utf-8"))

    def close(self) -> None:
        """Close the database, so that the host can open it in this process."""
        self._env.close()


@contextlib.contextmanager
def open_source(path: Path, as_lmdb: bool) -> Iterator[FolderSource | LmdbSource]:
    """Open a folder or an LMDB for the length of a ``with`` block.

    Args:
        path: Where it is; ``~`` is expanded.
        as_lmdb: Which of the two it must be.

    Raises:
        ValueError: It cannot be used; the message says what was looked for and found.
    """
    path = path.expanduser()
    if not as_lmdb:
        yield FolderSource(path)
        return
    source = LmdbSource(path)
    try:
        yield source
    finally:
        source.close()


def some(names: Sequence[str]) -> str:
    """Return the number of names and the first few of them, for messages."""
    return f"{len(names)}: {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"


def _listing(path: Path) -> str:
    if not path.is_dir():
        return "a file" if path.exists() else "nothing"
    names = sorted(entry.name for entry in path.iterdir())
    return f"only {some(names)}" if names else "an empty folder"
