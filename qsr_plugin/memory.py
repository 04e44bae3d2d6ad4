"""How much memory is free, how much was used at most, and how the process keeps that of freed tensors."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
#: Limit and use of a control group, and what its figures of memory begin with, by its version.
_GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("memory.max", "memory.current", ""),
}
#: Taken to be free where the system does not say.
_ASSUMED = 2 * 2**30
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE, _NEVER = 2**30, -1


def keep_freed_memory() -> bool:
    """Tell the C library not to return freed memory to the system.

    A training step on the CPU allocates and frees the same large tensors each time. By default glibc gives them back
    and the system maps and clears them again, page by page, in every step; the quantizers' temporaries trigger it. Does
    nothing on GPUs, whose memory PyTorch keeps itself, and where the C library has no such switch.

    Returns:
        Whether the C library took the setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_MMAP_THRESHOLD, _LARGE) and mallopt(_TRIM_THRESHOLD, _NEVER))


def free_memory(device: torch.device | str) -> int:
    """Bytes that can be allocated on a device without displacing anything.

    Args:
        device: A CUDA device, or another one that uses the computer's main memory. For the latter, what Linux calls
            available, or what the limit of a container leaves where that is less; 2 GiB on other systems.
    """
    if str(device).startswith("cuda"):
        import torch  # it takes time and memory, which the CPU's answer does not need

        return torch.cuda.mem_get_info(device)[0]
    if not _MEMINFO.is_file():
        return _ASSUMED
    sizes = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    return min([1024 * int(sizes["MemAvailable"].split()[0]), *_left_by_limits()])


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes this process has held at its peak: on a CUDA device in PyTorch's tensors, else of main memory."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    own = _read(_STATUS)  # unlike getrusage, not inherited from the process that started this one
    found = [int(line.split()[1]) for line in own.splitlines() if line.startswith("VmHWM")]
    if found:
        return 1024 * found[0]
    import resource  # not there on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _left_by_limits() -> Iterator[int]:
    """What the limits of the control groups leave that this process is in, of both versions and all levels."""
    for line in _read(_OWN_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "none", "")
        if controllers == "":
            top, files = _GROUPS, _GROUP_FILES[2]
        elif "memory" in controllers.split(","):
            top, files = _GROUPS / "memory", _GROUP_FILES[1]
        else:
            continue
        own = top / path.lstrip("/")
        for group in (own, *own.parents):  # a container often sees its own group at the top, under another path
            if top in (group, *group.parents):
                yield from _left_in(group, *files)


def _left_in(group: Path, limit: str, use: str, prefix: str) -> Iterator[int]:
    most, used = _read(group / limit), _read(group / use)
    if most.isdecimal() and used.isdecimal():
        lines = (line.split() for line in _read(group / "memory.stat").splitlines())
        figures = {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdecimal()}
        of_files = sum(figures.get(f"{prefix}{name}_file", 0) for name in ("active", "inactive"))
        yield max(int(most) - int(used) + of_files, 0)


def _read(path: Path) -> str:
    """A text of the system; nothing if it cannot be read, because a guess about memory must not end any work."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
