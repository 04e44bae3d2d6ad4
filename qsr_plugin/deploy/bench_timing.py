"""Times of two functions compared in ABBA pairs: what drifts in a machine reaches both alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

Run = Callable[[], object]
Clock = Callable[[], float]

#: Runs that are not counted: engines compile for a new size in the first one.
WARM_UP = 2


@dataclass(frozen=True)
class Pair:
    """One round: seconds of one run, each the mean of two measurements.

    Attributes:
        reference: Of the reference.
        own: Of what is compared with it.
    """

    reference: float
    own: float

    @property
    def faster(self) -> float:
        """How many times as fast as the reference it is."""
        return self.reference / self.own


@dataclass(frozen=True)
class Speed:
    """What the rounds of one size say.

    Attributes:
        seconds: Median time of one run.
        ratios: How many times as fast as the reference it is, by round; empty for the reference itself.
    """

    seconds: float
    ratios: tuple[float, ...] = ()

    @classmethod
    def of(cls, pairs: list[Pair]) -> Speed:
        """Of at least one round."""
        return cls(median(pair.own for pair in pairs), tuple(pair.faster for pair in pairs))

    @classmethod
    def of_reference(cls, pairs: list[Pair]) -> Speed:
        """The same of the reference itself, from all its rounds."""
        return cls(median(pair.reference for pair in pairs))

    @property
    def faster(self) -> float:
        """Median of the ratios; 1 for the reference."""
        return median(self.ratios or (1.0,))

    @property
    def least(self) -> float:
        """The least ratio."""
        return min(self.ratios, default=1.0)

    @property
    def most(self) -> float:
        """The largest ratio."""
        return max(self.ratios, default=1.0)

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {"seconds": self.seconds, "faster": self.faster, "ratios": list(self.ratios)}


def clock_for(threads: int) -> tuple[Clock, str]:
    """What to measure with, and its name: other programs do not disturb CPU time, but threads that wait cost none."""
    return (time.process_time, "CPU time") if threads == 1 else (time.perf_counter, "wall time")


def warm_up(run: Run) -> None:
    """Run what will be measured, without counting."""
    for _ in range(WARM_UP):
        run()


def timed(run: Run, least: float, clock: Clock) -> float:
    """Seconds of one run, which is repeated until ``least`` seconds have passed."""
    begun, count = clock(), 0
    while True:
        run()
        count += 1
        if (spent := clock() - begun) >= least:
            return spent / count


def measure_round(number: int, reference: Run, own: Run, least: float, clock: Clock) -> Pair:
    """One round: reference, own, own, reference; in the rounds of odd number the other way round.

    Args:
        number: Of the round, from 0.
        reference: What is compared with.
        own: What is compared.
        least: Seconds that each of the four measurements takes, at least.
        clock: Seconds since whenever.
    """
    outer, inner = (own, reference) if number % 2 else (reference, own)
    first, second, third, fourth = (timed(run, least, clock) for run in (outer, inner, inner, outer))
    outside, inside = (first + fourth) / 2, (second + third) / 2
    return Pair(inside, outside) if number % 2 else Pair(outside, inside)
