"""Keeps a thread's alternate signal stack as it is.

OpenVINO (2026.4) gives the thread that compiles a model an alternate stack of 11 kB. Python's signal handlers run there
from then on, and overflow it: a program that later uses worker processes (data loaders) ends in a segmentation fault.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = [("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t)]


def signal_stack() -> tuple[int | None, int, int]:
    """Address, flags and size of this thread's alternate signal stack; nothing elsewhere than on Linux."""
    if not sys.platform.startswith("linux"):
        return None, 0, 0
    found = _Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found.ss_sp, found.ss_flags, found.ss_size


@contextmanager
def same_signal_stack() -> Iterator[None]:
    """After the ``with`` block this thread has the alternate signal stack that it had before."""
    before = signal_stack()
    try:
        yield
    finally:
        if signal_stack() != before:
            ctypes.CDLL(None).sigaltstack(ctypes.byref(_Stack(*before)), None)
