"""Errors a user can mend, and messages that help: the closest allowed name for a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Base of errors whose message is all a user needs; the command line shows no traceback for them."""


def suggest(name: str, allowed: Iterable[str]) -> str:
    """Return the tail of an error message for an unknown name.

    Args:
        name: What the user wrote.
        allowed: Every name that would have been accepted.

    Returns:
        ``"Did you mean 'x'? Allowed: a, b, c."``; the question is left out when nothing is close.
    """
    options = sorted({str(option) for option in allowed})
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Allowed: {', '.join(options) or '(nothing)'}."


def first_line(error: Exception) -> str:
    """What an error says in its first line, or its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
