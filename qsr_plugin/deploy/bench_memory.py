"""Peak memory of one engine on one image, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from qsr_plugin.errors import UserError
from qsr_plugin.memory import peak_memory


def memory_of(open_run: Callable[[], Callable[[Any], Any]], image: Any) -> int:
    """Open an engine in a fresh process, run it on an image, and see what that took.

    Args:
        open_run: Opens it; can be pickled.
        image: (N, 3, H, W) float32.

    Returns:
        Bytes at the peak, beyond those of the process before the engine was opened.

    Raises:
        UserError: If the process was ended, as the system does where memory runs out, or failed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_taken, open_run, image).result()
        except BrokenProcessPool:
            raise UserError("the process was ended, which is what the system does when memory runs out") from None
        except Exception as error:  # also what cannot be pickled, and kinds of each engine
            raise UserError(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}") from error


def _taken(open_run: Callable[[], Callable[[Any], Any]], image: Any) -> int:
    before = peak_memory()
    open_run()(image)
    return peak_memory() - before
