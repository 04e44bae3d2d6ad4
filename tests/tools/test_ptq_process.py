"""Processes that make the rows of a table: how they end, and that some are at work at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from qsr_plugin.ptq_process import rows_of
from qsr_plugin.ptq_row import Job

#: Reads its job, and has what the test needs: the name of the network, and the folder of the test as its weights.
HEAD = """#!{python}
import json, os, sys, time
from pathlib import Path
job = json.loads(Path(sys.argv[3]).read_text())
name, folder = job["network"], Path(job["weights"])
def wait_for(path):
    end = time.monotonic() + 30
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert path.exists(), path
(folder / name).write_text(str(os.getpid()))
"""


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Job]]:
    """Jobs whose processes run lines of Python instead of making a row."""

    def give(lines: str, *names: str) -> list[Job]:
        program = tmp_path / "program"
        program.write_text(HEAD.format(python=sys.executable) + lines)
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return [Job(name, {"type": "EDSR"}, str(tmp_path), 4, {}, method="minmax") for name in names]

    return give


@pytest.mark.parametrize(
    ("lines", "status", "told"),
    [
        ("print('a'); print('last'); print(); sys.exit(1)", 1, "last"),
        ("sys.exit(3)", 3, "nothing"),
        ("os.kill(os.getpid(), 9)", -9, "memory"),
    ],
)
def test_a_process_that_ends_without_a_row_is_a_failed_row(
    processes: Callable[..., list[Job]], tmp_path: Path, lines: str, status: int, told: str
) -> None:
    jobs = processes(lines, "net")
    [(job, row)] = rows_of(jobs, tmp_path / "logs")
    assert job is jobs[0] and row.method == "minmax" and row.network == "net" and not row.quality
    assert row.note.startswith(f"the process ended with status {status}: ") and told in row.note
    assert (tmp_path / "logs" / "net_minmax.log").is_file()


def test_rows_are_at_work_at_once(processes: Callable[..., list[Job]], tmp_path: Path) -> None:
    """Each of two ends only when the other one is at work; a third begins when one has ended."""
    jobs = processes("wait_for(folder / {'a': 'b', 'b': 'a', 'c': 'a'}[name]); sys.exit(f'{name} done')", *"abc")
    rows = {job.network: row.note for job, row in rows_of(jobs, tmp_path / "logs", at_once=2)}
    assert rows == {name: f"the process ended with status 1: {name} done" for name in "abc"}


def test_one_after_another_in_their_order(processes: Callable[..., list[Job]], tmp_path: Path) -> None:
    jobs = processes("sys.exit(' '.join(sorted(path.name for path in folder.glob('?'))))", *"cab")
    notes = [row.note.rpartition(": ")[2] for _, row in rows_of(jobs, tmp_path / "logs")]
    assert notes == ["c", "a c", "a b c"]


def test_leaving_ends_those_at_work(processes: Callable[..., list[Job]], tmp_path: Path) -> None:
    """And begins no other one."""
    jobs = processes(
        "if name == 'quick': wait_for(folder / 'slow'); sys.exit(1)\ntime.sleep(600)", "slow", "quick", "z"
    )
    with closing(rows_of(jobs, tmp_path / "logs", at_once=2)) as rows:
        assert next(rows)[0].network == "quick"
    assert not (tmp_path / "z").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "slow").read_text()), 0)
