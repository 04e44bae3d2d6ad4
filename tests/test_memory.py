"""How much memory is free."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qsr_plugin import memory


def test_free_memory_is_what_the_system_calls_available(tmp_path: Path, monkeypatch) -> None:
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:       16 kB\nMemFree:         3 kB\nMemAvailable:    7 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", told)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "none")
    assert memory.free_memory(torch.device("cpu")) == 7 * 1024


def test_a_system_that_does_not_say_is_taken_to_have_two_gibibytes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    assert memory.free_memory(torch.device("cpu")) == 2 * 2**30


def test_peak_memory_is_that_of_this_process(tmp_path: Path, monkeypatch) -> None:
    """What Linux tells of the process itself; else what it and those that started it have used."""
    told = tmp_path / "status"
    told.write_text("VmPeak:\t       9 kB\nVmHWM:\t       5 kB\nVmRSS:\t       4 kB\n")
    monkeypatch.setattr(memory, "_STATUS", told)
    assert memory.peak_memory() == 5 * 1024
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))
    monkeypatch.setitem(sys.modules, "resource", usage)
    for system, unit in (("linux", 1024), ("darwin", 1)):  # macOS counts in bytes
        monkeypatch.setattr(memory, "sys", SimpleNamespace(platform=system))
        assert memory.peak_memory() == 3 * 2**20 * unit


GROUPS = {
    1: ("4:memory:/", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("0::/", "", "memory.max", "memory.current", ""),
}


@pytest.fixture(params=[1, 2])
def group(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Writes the files of a control group and gives the free memory of a process in ``jobs/this``."""
    line, top, limit_file, use_file, prefix = GROUPS[request.param]
    told, own, groups = tmp_path / "meminfo", tmp_path / "own", tmp_path / "groups"
    told.write_text("MemAvailable:    7 kB\n")
    own.write_text(f"1:name=systemd:/else\n\n{line}jobs/this\n")
    for name, path in (("_MEMINFO", told), ("_OWN_GROUPS", own), ("_GROUPS", groups)):
        monkeypatch.setattr(memory, name, path)

    def write(path: str, limit: str, stat: str | None = "{0}active_file 300\n{0}inactive_file 200") -> int:
        folder = groups / top / path
        folder.mkdir(parents=True)
        (folder / limit_file).write_text(f"{limit}\n")
        (folder / use_file).write_text("3000\n")
        if stat is not None:
            (folder / "memory.stat").write_text("rss 1\n" + stat.format(prefix) + "\n")
        return memory.free_memory(torch.device("cpu"))

    return write


@pytest.mark.parametrize(
    ("path", "limit", "free"),
    [
        ("jobs/this", "5000", 5000 - 3000 + 300 + 200),
        ("jobs", "5000", 5000 - 3000 + 300 + 200),  # the limit of a group holds for those in it
        ("", "5000", 5000 - 3000 + 300 + 200),  # what a container sees of its own group
        ("jobs/this", "2000", 0),
        ("jobs/this", str(2**60), 7 * 1024),
        ("jobs/this", "max", 7 * 1024),
        ("jobs/this", "", 7 * 1024),
    ],
)
def test_the_limit_of_a_container_counts(group: Callable[..., int], path: str, limit: str, free: int) -> None:
    assert group(path, limit) == free


@pytest.mark.parametrize("stat", [None, "", "a line of words", "{0}inactive_file many"])
def test_without_figures_of_files_all_use_counts(group: Callable[..., int], stat: str | None) -> None:
    assert group("jobs/this", "5000", stat) == 2000


def test_groups_that_cannot_be_read_are_passed_over(tmp_path: Path, group: Callable[..., int]) -> None:
    (tmp_path / "own").write_bytes(b"0::/\xff\n")
    assert group("jobs/this", "5000") == 7 * 1024
