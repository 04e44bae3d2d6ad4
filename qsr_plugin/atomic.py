"""Files that are there whole or not at all."""

from __future__ import annotations

import os
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}. Choose a folder you may write to.") from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch reports a full disk as RuntimeError
            raise OSError(f"cannot write {path}: {error}. Free some space or choose another folder.") from error
        raise


def check_writable(path: Union[str, Path]) -> None:
    """Make the folder of a file to come, and try to write there, before work is done for it.

    Raises:
        OSError: If the folder cannot be made or written.
    """
    probe = Path(path).with_suffix(".probe")
    write_atomically(probe, lambda temporary: None)
    probe.unlink()
