"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Union


def write_atomically(path: Union[str, Path], write: Callable[[Path], None]) -> None:
    """Write a file so that a crash leaves either the old or the new one, never half.

    Args:
        path: Final place.
        write: Called with a temporary path in the same folder.

    Raises:
        OSError: If writing failed (disk full, no permission); the final place is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less what the umask takes away
    except OSError as error:
        raise _no_place(path, error) from error
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch reports a full disk as RuntimeError
            raise OSError(f"cannot write {path}: {error}. Free some space or choose another folder.") from error
        raise


def check_writable(path: Union[str, Path]) -> None:
    """Make the folder of a file to come, and try to write there, before work is done for it; leaves nothing behind.

    Raises:
        OSError: If the folder cannot be made or written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _no_place(path, error) from error


def _no_place(path: Path, error: OSError) -> OSError:
    """The error for a folder that cannot be made or written; files that were tried there are nobody's concern."""
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return OSError(
            f"cannot write {path}: {path.parent} is a file, or lies in one. Choose a folder you may write to."
        )
    return OSError(f"cannot write {path}: {error.strerror or error}. Choose a folder you may write to.")
