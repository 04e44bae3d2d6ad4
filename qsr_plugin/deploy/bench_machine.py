"""What figures of speed depend on beside the network: processor, and versions of what computes."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_CPUINFO = Path("/proc/cpuinfo")
#: What decides how fast integers are: x86, then ARM.
_FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip
_ENGINES = ("openvino", "onnxruntime", "nncf")


def machine() -> dict[str, Any]:
    """The processor of this machine, as plain data.

    Returns:
        ``cpu`` (name), ``cores`` (that this process may use), ``flags`` (of its instructions those for integers and
        wide vectors; empty where the system does not tell).
    """
    told = _cpuinfo()
    known = set(told.get("flags", told.get("Features", "")).split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": told.get("model name") or platform.processor() or platform.machine(),
        "cores": usable,
        "flags": [flag for flag in _FLAGS if flag in known],
    }


def described(known: dict[str, Any]) -> str:
    """The same in a line."""
    flags = f", {' '.join(known['flags'])}" if known["flags"] else ""
    return f"{known['cpu']}, {known['cores']} core(s){flags}"


def engine_versions() -> dict[str, str]:
    """Versions of the engines that are installed."""
    found = {}
    for name in _ENGINES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpuinfo() -> dict[str, str]:
    """What Linux says about the first core; nothing elsewhere."""
    try:
        first = _CPUINFO.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
