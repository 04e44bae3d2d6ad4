"""How much memory is free."""

from __future__ import annotations

from pathlib import Path

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


GROUPS = {
    1: ("4:memory:/", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("0::/", "", "memory.max", "memory.current", "inactive_file"),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("path", "limit", "free"),
    [
        ("jobs/this", "5000", 5000 - 3000 + 500),
        ("jobs", "5000", 5000 - 3000 + 500),  # the limit of a group holds for those in it
        ("", "5000", 5000 - 3000 + 500),  # what a container sees of its own group
        ("jobs/this", "2000", 0),
        ("jobs/this", str(2**60), 7 * 1024),
    ],
)
def test_the_limit_of_a_container_counts(
    tmp_path: Path, monkeypatch, version: int, path: str, limit: str, free: int
) -> None:
    line, top, limit_file, use_file, reclaimable = GROUPS[version]
    (tmp_path / "meminfo").write_text("MemAvailable:    7 kB\n")
    (tmp_path / "own").write_text(f"1:name=systemd:/else\n{line}jobs/this\n")
    group = tmp_path / "groups" / top / path
    group.mkdir(parents=True)
    for name, text in ((limit_file, limit), (use_file, "3000"), ("memory.stat", f"rss 1\n{reclaimable} 500")):
        (group / name).write_text(f"{text}\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    assert memory.free_memory(torch.device("cpu")) == free


def test_a_group_without_limit_counts_as_none(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "own").write_text("0::/\n")
    for name, text in (("memory.max", "max"), ("memory.current", "3000"), ("memory.stat", "inactive_file 1")):
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "meminfo").write_text("MemAvailable:    7 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    assert memory.free_memory(torch.device("cpu")) == 7 * 1024
