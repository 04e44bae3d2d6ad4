"""``qsr data build`` and ``qsr data check`` as a user types them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from qsr_plugin.data import cli

BUILD = ["--scale", "2", "--sub-image", "24", "--step", "16", "--min-side", "16"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command in a wide terminal, so that no cell is broken."""
    for console in (cli._out, cli._err):
        monkeypatch.setattr(console, "_width", 400)

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

    return call


def test_build_then_check(run: Callable[..., Result], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out [1]"
    first = run("build", photos, out, *BUILD, "--shrink", "1", "--shrink", "0.8")
    assert first.exit_code == 0, first.output
    assert "sub-image pairs" in first.output and str(out / "GT.lmdb") in first.output
    again = run("build", photos, out, *BUILD, "--shrink", "1", "--shrink", "0.8")
    assert again.exit_code == 0 and "Already complete" in again.output
    checked = run("check", "--gt", out / "GT.lmdb", "--lq", out / "LQ.lmdb", "--scale", 2)
    assert checked.exit_code == 0 and "No problem found" in checked.output


def test_build_reports_an_error_without_a_traceback(run: Callable[..., Result], photos: Path, tmp_path: Path) -> None:
    (photos / "x.png").write_bytes(b"")
    result = run("build", photos, tmp_path / "out", *BUILD)
    assert result.exit_code == 1
    assert "x.png: is empty (0 bytes)" in result.output and "--skip-bad" in result.output
    result = run("build", photos, tmp_path / "out", *BUILD, "--skip-bad")
    assert result.exit_code == 0 and "Continued: 4 photos" in result.output


def test_check_of_an_option_file(run: Callable[..., Result], photos: Path, tmp_path: Path) -> None:
    dataset = {"type": "PairedImageDataset", "dataroot_gt": str(photos), "dataroot_lq": str(photos)}
    path = tmp_path / "x.yml"
    path.write_text(yaml.safe_dump({"scale": 1, "datasets": {"val": {**dataset, "io_backend": {"type": "disk"}}}}))
    assert run("check", "-opt", path).exit_code == 0
    (photos / "d.png").write_bytes(b"[red]")
    result = run("check", "-opt", path)
    assert result.exit_code == 1
    assert "problems found: 2" in result.output and "d.png" in result.output and "is not a PNG" in result.output
    assert run("check", "-opt", path, "--sample", 1).exit_code == 0


def test_check_says_what_it_needs(run: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "x.yml"
    for arguments in ((), ("--gt", "a"), ("-opt", path, "--gt", "a", "--lq", "b"), ("-opt", path, "--lq", "b")):
        result = run("check", *arguments)
        assert result.exit_code == 1 and "give either -opt FILE, or both --gt and --lq" in result.output
    assert "does not exist" in run("check", "-opt", path).output
    path.write_text("name: x")
    assert "no 'datasets' block" in run("check", "-opt", path).output
    path.write_text("x: !!python/object/apply:os.getcwd []")
    assert run("check", "-opt", path).exit_code == 1
