"""How much memory is free."""

from __future__ import annotations

from pathlib import Path

import torch

from qsr_plugin import memory


def test_free_memory_is_what_the_system_calls_available(tmp_path: Path, monkeypatch) -> None:
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:       16 kB\nMemFree:         3 kB\nMemAvailable:    7 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", told)
    assert memory.free_memory(torch.device("cpu")) == 7 * 1024


def test_a_system_that_does_not_say_is_taken_to_have_two_gibibytes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    assert memory.free_memory(torch.device("cpu")) == 2 * 2**30
