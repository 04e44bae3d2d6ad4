"""Fixtures for all tests. The host is repaired first, so that any test may import BasicSR."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qsr_plugin import compat

compat.prepare()


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., str]:
    """Run a script in a fresh interpreter: ``run_python(code, path=(folder, ...), env={...}, timeout=120)``.

    ``path`` goes in front of the interpreter's module search path. Returns what the script wrote to stdout; a script that
    fails or does not end in time fails the test with its stderr.
    """

    def run(code: str, *, path: tuple[Path, ...] = (), env: dict[str, str] | None = None, timeout: float = 120) -> str:
        script = tmp_path / "script_under_test.py"
        script.write_text(code, "utf-8")
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, path)), **(env or {})}
        process = subprocess.Popen(
            [sys.executable, str(script)],
            cwd=tmp_path,
            env=variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"The script did not end within {timeout} s:\n{out}\n{err}")
        assert process.returncode == 0, f"The script failed:\n{out}\n{err}"
        return out

    return run
