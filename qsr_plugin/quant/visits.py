"""Calibration passes that end behind the last place that watches: what comes after it tells no range anything.

Which places a pass visits, and in which order, is taken from a complete pass with an image of the same size. A pass
that goes another way runs to its end. One that goes on to places which the complete pass had no more of ends too early
for them; in networks with a fixed graph there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Optional

import torch
from torch import Tensor, nn

#: Images of a batch from which on one of them passes first, unwatched, so that the others need not pass completely.
SEVERAL = 4


class _Enough(BaseException):
    """Leaves a forward pass. No error, so a network that catches those does not keep it."""


class _Visits:
    """Places visited by the pass going on, and by complete passes, by the size of their images.

    Args:
        net: The network whose places watch.

    Attributes:
        watched: Whether places are to watch the pass going on.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._complete: dict[torch.Size, list[str]] = {}
        self._wanted: Optional[list[str]] = None
        self._places: list[str] = []
        self.watched = True

    def watch(self, images: Tensor) -> None:
        """Pass images (N, 3, H, W) through the network, as far as needed."""
        size = images.shape[1:]
        if size not in self._complete and len(images) >= SEVERAL:
            self.watched = False
            try:
                self._complete[size] = self._visited_by(images[:1], None)
            finally:
                self.watched = True
        visited = self._visited_by(images, self._complete.get(size))
        self._complete.setdefault(size, visited)

    def _visited_by(self, images: Tensor, wanted: Optional[list[str]]) -> list[str]:
        self._wanted, self._places = wanted, []
        with suppress(_Enough):
            self._net(images)
        return self._places

    def note(self, place: str) -> None:
        """Take a visit into account.

        Raises:
            _Enough: If it was the last one.
        """
        self._places.append(place)
        if self._places == self._wanted:
            raise _Enough


_CURRENT: ContextVar[Optional[_Visits]] = ContextVar("qsr_visits", default=None)


def watched() -> bool:
    """Whether what watches in a calibration is to watch the pass going on."""
    visits = _CURRENT.get()
    return visits is None or visits.watched


def visited(place: str) -> None:
    """To be called when a pass is done with a place ``site.port`` that watches; may leave the pass."""
    if (visits := _CURRENT.get()) is not None:
        visits.note(place)


@contextmanager
def short_passes(net: nn.Module) -> Iterator[Callable[[Tensor], None]]:
    """Gives a function that passes images ``(N, 3, H, W)`` through a network as far as its places watch."""
    visits = _Visits(net)
    token = _CURRENT.set(visits)
    try:
        yield visits.watch
    finally:
        _CURRENT.reset(token)
