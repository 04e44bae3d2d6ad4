"""Fixtures for all tests. The host is repaired first, so that any test may import BasicSR."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import nn

from qsr_plugin import compat

compat.prepare()
torch.set_num_threads(1)  # tensors of tests are too small for threads to pay

# Property tests try the same examples in every run and write nothing beside the repository's files.
settings.register_profile("suite", derandomize=True, database=None, deadline=None)
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    """Workers that import mmengine together after an installation would meet in a cache that its yapf writes."""
    if not hasattr(config, "workerinput"):
        import mmengine.config  # noqa: F401 - before any worker starts


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


@pytest.fixture(scope="session")
def tiny_net() -> Callable[..., nn.Module]:
    """Build a small float backbone with fixed random weights: ``tiny_net("EDSR", num_block=1)``."""

    def build(kind: str = "EDSR", **changes: object) -> nn.Module:
        from qsr_plugin.archs.quant_net_arch import build_backbone

        from tests.backbones import tiny_options

        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build_backbone(tiny_options(kind, **changes)).eval()

    return build


@pytest.fixture
def images() -> list[torch.Tensor]:
    """Three batches of two 8x8 RGB images in [0, 1], always the same."""
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(2, 3, 8, 8, generator=generator) for _ in range(3)]


@pytest.fixture(scope="module", params=[False, True], ids=["changed", "read"])
def both_uses(request: pytest.FixtureRequest) -> Iterator[None]:
    """Quantizers whose result may be changed in place, and those whose result is only read, as before a convolution."""
    from qsr_plugin.quant.quantizer import Quantizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Quantizer, "only_read", request.param)
        yield


@pytest.fixture
def choosers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the small bit policies of ``tests/quant/choosers.py`` into the registry for one test."""
    from qsr_plugin.quant.policy import POLICIES
    from qsr_plugin.quant.recipe import register_parts
    from tests.quant.choosers import KINDS

    register_parts()  # or those of the package would be gone with them after the test
    for name, kind in KINDS.items():
        monkeypatch.setitem(POLICIES, name, kind)
