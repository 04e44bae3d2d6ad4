"""What a file is that somebody took for a checkpoint, told from its first bytes and its archive; nothing in it runs."""

from __future__ import annotations

import zipfile
from pathlib import Path

_HEAD = 512  # bytes that are looked at
#: What a file is called that only its name tells from others.
ONNX = "an ONNX model"


def foreign_kind(path: Path) -> str:
    """What a file is if it is certainly no state dict.

    Args:
        path: A file that is there.

    Returns:
        A phrase for a message, e.g. ``an ONNX model``; empty for what may be a state dict.

    Raises:
        OSError: If it cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "empty (zero bytes)"
    if head.lstrip()[:1] == b"<":
        return "an HTML or XML page (a failed download?)"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (run 'git lfs pull')"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                return "a TorchScript program"
    return ONNX if path.suffix == ".onnx" else ""
