"""The files a build writes: two LMDBs in BasicSR's format and a journal of what is done."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import lmdb

COMPRESSION = 1  # PNG level that BasicSR's own tool uses and meta_info.txt records
META_NAME = "meta_info.txt"
_FIRST_MAP_SIZE = 64 * 2**20


class LmdbWriter:
    """Write access to an LMDB that starts small and grows.

    Args:
        folder: Folder of the database; its name must end in ``.lmdb`` for the host to accept it.
        map_size: First size limit in bytes; it is doubled when the database is full.
    """

    def __init__(self, folder: Path, map_size: int = _FIRST_MAP_SIZE) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._env = lmdb.open(str(folder), map_size=map_size)

    def __enter__(self) -> LmdbWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._env.close()

    def put(self, items: Sequence[tuple[str, bytes]]) -> None:
        """Store all items in one transaction; on return they are on disk."""
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    for key, value in items:
                        transaction.put(key.encode("ascii"), value)
                return
            except lmdb.MapFullError:
                self._env.set_mapsize(2 * self._env.info()["map_size"])


def write_meta_info(folder: Path, items: Sequence[tuple[str, Sequence[int]]]) -> None:
    """Write BasicSR's ``meta_info.txt`` of a database, at once or not at all.

    Args:
        folder: Folder of the database.
        items: Key and (height, width) of every image.
    """
    lines = [f"{key}.png ({height},{width},3) {COMPRESSION}\n" for key, (height, width) in items]
    temporary = folder / f"{META_NAME}.tmp"
    temporary.write_text("".join(lines), "ascii")
    os.replace(temporary, folder / META_NAME)


class Journal:
    """What a build has done: a line of settings, then a line of JSON per photo.

    Attributes:
        entries: Name of a photo -> what was recorded about it.
    """

    def __init__(self, path: Path, entries: dict[str, dict]) -> None:
        self._path = path
        self.entries = entries

    @classmethod
    def open(cls, path: Path, settings: dict) -> Journal:
        """Open a journal, or start one.

        Args:
            path: File of the journal.
            settings: What the build is asked for.

        Raises:
            ValueError: The journal belongs to a build with other settings, or is not a journal.
        """
        settings = json.loads(json.dumps(settings))
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        complete, torn = lines[:-1], lines[-1]  # a write that was cut short has no newline
        if not complete:
            _replace(path, [json.dumps(settings).encode()])
            return cls(path, {})
        try:
            recorded, *records = [json.loads(line) for line in complete]
            entries = {record.pop("photo"): record for record in records}
            recorded = dict(recorded)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a build journal ({error}); pass --overwrite to start again.") from error
        different = [
            f"{name}: {recorded.get(name)} there, {settings.get(name)} asked for"
            for name in sorted({*recorded, *settings})
            if recorded.get(name) != settings.get(name)
        ]
        if different:
            raise ValueError(
                f"{path.parent} was built with other settings ({'; '.join(different)}). Use the same ones to "
                "continue, choose another folder, or pass --overwrite to start again."
            )
        if torn:
            _replace(path, complete)
        return cls(path, entries)

    def add(self, photo: str, record: dict) -> None:
        """Record a photo; on return the line is on disk."""
        with self._path.open("ab") as file:
            file.write(json.dumps({"photo": photo, **record}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries[photo] = record


def _replace(path: Path, lines: Sequence[bytes]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(b"".join(line + b"\n" for line in lines))
    os.replace(temporary, path)
