"""Progress of long work on the command line: a bar in a terminal, a line now and then in a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from datetime import timedelta
from typing import Any, TypeVar

from rich import progress
from rich.console import Console

Item = TypeVar("Item")
#: Wraps a sequence that is worked through, with what is done to its items: :func:`track` without its console.
Progress = Callable[[Sequence[Any], str], Iterable[Any]]

#: Seconds between two lines where there is no terminal.
EVERY = 30.0


def no_progress(items: Sequence[Item], description: str) -> Iterable[Item]:
    """The items as they are."""
    return items


def track(items: Iterable[Item], description: str, console: Console) -> Iterator[Item]:
    """Hand on ``items`` and show how far they are.

    Args:
        items: Whatever is worked through; the time left is shown where it has a length.
        description: What is done with them.
        console: Where to show it. Rich draws nothing before the end where this is no terminal.
    """
    total = len(items) if isinstance(items, Sized) else None
    if console.is_terminal:
        yield from progress.track(items, description, total=total, console=console)
        return
    begun = told = time.monotonic()
    count = 0
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - told >= EVERY and count != total:  # the end is told below
            told = now
            console.print(f"{description}: {_so_far(count, total, now - begun)}", highlight=False)
    console.print(f"{description}: {count} in {_clock(time.monotonic() - begun)}", highlight=False)


def _so_far(count: int, total: int | None, seconds: float) -> str:
    if total is None:
        return f"{count} in {_clock(seconds)}"
    return f"{count} of {total} in {_clock(seconds)}, {_clock(seconds * (total - count) / count)} left"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
