"""Progress in a terminal and in a file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from qsr_plugin import progress


def shown(items, *, terminal: bool) -> tuple[list, str]:
    told = io.StringIO()
    console = Console(file=told, force_terminal=terminal, width=80)
    return list(progress.track(items, "tuning", console)), told.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("items", [[1, 2, 3, 4], range(4), []])
def test_every_item_comes_once(items, terminal: bool) -> None:
    assert shown(items, terminal=terminal)[0] == list(items)


def test_a_file_gets_a_line_now_and_then(monkeypatch) -> None:
    seconds = iter(range(0, 100, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    told = shown([1, 2, 3], terminal=False)[1].splitlines()
    assert told == ["tuning: 2 of 3 in 0:00:40, 0:00:20 left", "tuning: 3 in 0:01:20"]


def test_the_end_is_told_once(monkeypatch) -> None:
    seconds = iter(range(0, 200, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    told = shown([1, 2, 3, 4], terminal=False)[1].splitlines()
    assert told == ["tuning: 2 of 4 in 0:00:40, 0:00:40 left", "tuning: 4 in 0:01:40"]


def test_without_a_length_there_is_no_time_left(monkeypatch) -> None:
    seconds = iter(range(0, 200, 40))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    told = shown(iter([1, 2]), terminal=False)[1].splitlines()
    assert told == ["tuning: 1 in 0:00:40", "tuning: 2 in 0:01:20", "tuning: 2 in 0:02:00"]


def test_a_terminal_gets_a_bar() -> None:
    assert "100%" in shown([1, 2], terminal=True)[1]
