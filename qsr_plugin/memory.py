"""How much memory is free, and memory of freed tensors kept by the process instead of handed back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
#: Limit, use and the name of reclaimable use of a control group, by its version.
_GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
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


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device without displacing anything.

    Args:
        device: A CUDA device, or another one that uses the computer's main memory. For the latter, what Linux calls
            available, or what the limit of a container leaves where that is less; 2 GiB on other systems.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not _MEMINFO.is_file():
        return _ASSUMED
    sizes = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    return min([1024 * int(sizes["MemAvailable"].split()[0]), *_left_by_limits()])


def _left_by_limits() -> Iterator[int]:
    """What the limits of the control groups leave that this process is in, of both versions and all levels."""
    if not _OWN_GROUPS.is_file():
        return
    for line in _OWN_GROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
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


def _left_in(group: Path, limit: str, use: str, reclaimable: str) -> Iterator[int]:
    try:
        most, used = ((group / name).read_text().strip() for name in (limit, use))
        of_cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return
    if most != "max":
        yield max(int(most) - int(used) + int(of_cache.get(reclaimable, 0)), 0)
