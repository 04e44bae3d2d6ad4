"""Data for tiny runs; ``qsr quantize`` in an empty folder; the package, built and installed into environments of its own."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from qsr_plugin import cli
from tests.host.harness import TIMEOUT, options, write_data, write_photos

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "archs", "assets", "options", "qsr_plugin", "tests", "tools", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in",
    "Makefile", "README.md", "constraints.txt", "pyproject.toml", "requirements.txt", "setup.py",
)  # fmt: skip


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """As ever, and it hears the host's logger, which does not pass its messages on once it is set up."""
    host = logging.getLogger("basicsr")
    host.addHandler(caplog.handler)
    yield caplog
    host.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training LMDBs of four photos."""
    return write_data(tmp_path_factory.mktemp("data"), count=4)


@pytest.fixture
def float_file(data: Path, tmp_path: Path) -> Path:
    """Random weights of the network that the option files of the harness name."""
    from qsr_plugin.archs.quant_net_arch import build_backbone

    torch.manual_seed(1)
    net = build_backbone(options(data)["network_g"]["backbone"])
    torch.save({"params": net.state_dict()}, tmp_path / "float.pth")
    return tmp_path / "float.pth"


class Built(NamedTuple):
    """What a build made.

    Attributes:
        sources: The copy of the sources it was made from.
        sdist: Source archive.
        wheel: Wheel, built from the source archive.
    """

    sources: Path
    sdist: Path
    wheel: Path


def call(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed; returns what it wrote to stdout."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, text=True, capture_output=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def new_environment(folder: Path, *, with_dependencies: bool = True) -> Path:
    """A virtual environment without pip and without this package; returns its Python.

    Args:
        folder: Where to make it.
        with_dependencies: See the installed packages of this environment. Its editable installs stay unseen, because
            ``.pth`` files of a folder that is named in a ``.pth`` file are not read.
    """
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    if with_dependencies:
        own = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
        used = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        Path(own, "dependencies.pth").write_text("\n".join(used) + "\n", "utf-8")
    return python


def pip_install(python: Path, *what: str | Path) -> None:
    """Install with this environment's pip into another one, without network and without dependencies."""
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    call(sys.executable, "-m", "pip", "--python", python, "install", *offline, *what, cwd=python.parent)


@pytest.fixture(scope="session")
def copy_sources() -> Callable[[Path], Path]:
    """Copy what a release is built from, and nothing that lies about in the working tree, into a folder."""

    def copy(folder: Path) -> Path:
        folder.mkdir(parents=True)
        for name in SOURCES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            else:
                shutil.copy2(source, folder)
        return folder

    return copy


@pytest.fixture(scope="session")
def built(copy_sources: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Source archive and wheel of the present sources."""
    folder = tmp_path_factory.mktemp("build")
    sources = copy_sources(folder / "sources")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, sources, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return Built(sources, sdist, wheel)


@pytest.fixture(scope="session")
def second_python(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a second environment: the dependencies of this one, and the package installed from its wheel."""
    python = new_environment(tmp_path_factory.mktemp("second") / "env")
    pip_install(python, built.wheel)
    return python


@pytest.fixture
def qsr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """Run ``qsr quantize`` in an empty folder; returns what it says, warnings and the error included.

    A run that ``fails`` leaves that many files, none unless said otherwise.
    """
    monkeypatch.setattr(cli.console, "_width", 400)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    caplog.set_level(logging.INFO, "qsr_plugin")

    def run(*arguments: object, fails: bool = False, leaves: int = 0) -> str:
        caplog.clear()
        given = ["quantize", *map(str, arguments)]
        if "--method" not in given and "--no-tune" not in given:
            given += ["--method", "minmax", "--bits", "W8A8"]
        with cli.console.capture() as said:
            done = CliRunner().invoke(cli.app, given, env={"COLUMNS": "400"})
        assert (done.exit_code != 0) == fails, done.output + str(done.exception)
        assert not fails or len(list(tmp_path.glob("work/*"))) == leaves, "files are written where something is wrong"
        text = said.get() + done.output + str(done.exception or "") + caplog.text
        return " ".join(text.replace("│", " ").split())

    return run


@pytest.fixture
def weights(tiny_net: Callable[..., nn.Module], tmp_path: Path) -> Path:
    """Of a tiny EDSR x2 with random weights."""
    path = tmp_path / "tiny.pth"
    torch.save(tiny_net().state_dict(), path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Folder of three photos."""
    return write_photos(tmp_path / "photos", 3, side=64)
