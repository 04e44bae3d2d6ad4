"""Memory of freed tensors, kept by the process instead of handed back to the system."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGE = -1, -3, 2**30


def keep_freed_memory() -> bool:
    """Tell the C library not to return freed memory to the system.

    A training step on the CPU allocates and frees the same large tensors each time. By default glibc gives them back
    and the system maps and clears them again, page by page, in every step; the quantizers' temporaries trigger it. Does
    nothing on GPUs, whose memory PyTorch keeps itself, and where the C library has no such switch.

    Returns:
        Whether the C library took the setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_MMAP_THRESHOLD, _LARGE) and mallopt(_TRIM_THRESHOLD, _LARGE))
