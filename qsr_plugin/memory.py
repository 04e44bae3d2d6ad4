"""How much memory is free, and memory of freed tensors kept by the process instead of handed back to the system."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
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
            available; 2 GiB on other systems.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not _MEMINFO.is_file():
        return _ASSUMED
    sizes = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    return 1024 * int(sizes["MemAvailable"].split()[0])
