"""The columns of the papers: what stands in them, how it is written, and which direction is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qsr_plugin.errors import UserError, suggest
from qsr_plugin.report.complexity_types import CONVENTIONS
from qsr_plugin.report.ptq_rows import in_seconds
from qsr_plugin.report.result_schema import Costs, Quality, Result
from qsr_plugin.report.tables import quantity, size

MORE, LESS = 1, -1


class ColumnError(UserError, ValueError):
    """Columns or test sets that there are none of."""


@dataclass(frozen=True)
class Way:
    """How operations and parameters were counted: convention, size, and how the image was cut."""

    convention: str
    input_size: tuple[int, int]
    protocol: str

    @classmethod
    def of(cls, costs: Costs) -> Way:
        """The way of a result's costs."""
        return cls(costs.convention, costs.input_size, costs.protocol)

    @property
    def unit(self) -> str:
        """What its operations are called."""
        return CONVENTIONS[self.convention].unit if self.convention in CONVENTIONS else "BitOPs"

    def __str__(self) -> str:
        cut = "" if self.protocol == "whole images" else f", {self.protocol}"
        return f"{self.convention}, {'x'.join(map(str, self.input_size))}{cut}"


@dataclass(frozen=True)
class Column:
    """One column of numbers.

    Attributes:
        heading: Above it.
        value: Its figure of a result, or ``None``.
        form: A figure as text.
        better: :data:`MORE` or :data:`LESS`.
        test: Test set it belongs to; empty for those of the network.
    """

    heading: str
    value: Callable[[Result], float | None]
    form: Callable[[float], str]
    better: int = LESS
    test: str = ""


@dataclass(frozen=True)
class Layout:
    """Columns of a paper, by the names of the functions below.

    Attributes:
        before: Of the network, before those of the test sets.
        each: Of every test set.
        after: Of the network, after those of the test sets.
        digits: Decimals of SSIM.
        bits: Whether a column says the bits; else the method does.
    """

    before: tuple[str, ...] = ()
    each: tuple[str, ...] = ("PSNR", "SSIM")
    after: tuple[str, ...] = ()
    digits: int = 3
    bits: bool = True


#: Layouts by name. ``all`` is that of no paper: all there is, without columns that are empty.
LAYOUTS = {
    "cadyq": Layout(each=("FAB", "PSNR", "SSIM", "operations")),  # FQR there
    "adabm": Layout(each=("FAB", "PSNR", "SSIM"), after=("time",)),
    "quantsr": Layout(before=("Params", "operations"), digits=4),
    "odm": Layout(before=("Storage", "operations")),
    "granular-dq": Layout(before=("Params", "operations"), each=("FAB", "PSNR", "SSIM")),
    "all": Layout(
        ("Parameters", "MACs", "Params", "operations", "Size"), ("FAB", "PSNR", "SSIM"), ("time", "memory"), digits=4
    ),
}


def layout_of(name: str) -> Layout:
    """A layout by its name.

    Raises:
        ColumnError: If there is none of this name.
    """
    if name not in LAYOUTS:
        raise ColumnError(f"unknown columns '{name}'. {suggest(name, LAYOUTS)}")
    return LAYOUTS[name]


def ways_of(results: Sequence[Result]) -> list[Way]:
    """All ways of counting, in the order of their first appearance."""
    return list(dict.fromkeys(Way.of(result.costs) for result in results if result.costs is not None))


def columns_of(layout: Layout, tests: Sequence[str], ways: Sequence[Way]) -> list[Column]:
    """The columns of numbers; what was counted in several ways has one for each."""
    columns = [column for name in layout.before for column in _of_network(name, ways)]
    for test in tests:
        columns += [column for name in layout.each for column in _of_test(name, test, ways, layout.digits)]
    return [*columns, *(column for name in layout.after for column in _of_network(name, ways))]


def _of_network(name: str, ways: Sequence[Way]) -> list[Column]:
    if name in ("Params", "Storage", "operations"):
        figure = "bitops" if name == "operations" else "scaled_parameters"
        return [Column(_heading(name, way, ways), _counted(figure, way), quantity) for way in ways]
    return [_NETWORK[name]]


def _of_test(name: str, test: str, ways: Sequence[Way], digits: int) -> list[Column]:
    if name == "operations":
        return [Column(_heading(name, way, ways), _operations(test, way), quantity, test=test) for way in ways]
    decimals, better = {"FAB": (2, LESS), "PSNR": (2, MORE), "SSIM": (digits, MORE)}[name]
    return [Column(name, _score(test, name.lower()), f"{{:.{decimals}f}}".format, better, test)]


def _heading(name: str, way: Way, ways: Sequence[Way]) -> str:
    text = way.unit if name == "operations" else name
    return f"{text} ({way})" if len(ways) > 1 else text


def _score(test: str, figure: str) -> Callable[[Result], float | None]:
    return lambda result: getattr(result.scores.get(test), figure, None)


def _cost(figure: str) -> Callable[[Result], float | None]:
    return lambda result: getattr(result.costs, figure, None)


def _counted(figure: str, way: Way) -> Callable[[Result], float | None]:
    def value(result: Result) -> float | None:
        return getattr(result.costs, figure) if result.costs is not None and Way.of(result.costs) == way else None

    return value


def _operations(test: str, way: Way) -> Callable[[Result], float | None]:
    """Those on a test set: as written, or those of the network if it had the same bits there."""

    def value(result: Result) -> float | None:
        quality, costs = result.scores.get(test), result.costs
        if quality is None or costs is None or Way.of(costs) != way:
            return None
        return costs.bitops if quality.bitops is None and same_bits(quality, costs) else quality.bitops

    return value


def same_bits(quality: Quality, costs: Costs) -> bool:
    """Whether costs were counted with the mean bits that a network had on a test set; unknown ones are the same."""
    return quality.fab is None or (costs.fab is not None and math.isclose(quality.fab, costs.fab, rel_tol=1e-6))


def _in_bytes(number: float) -> str:
    return size(8 * int(number))


def _spent(result: Result) -> float | None:
    return sum(result.seconds.values()) if result.seconds else None


_NETWORK = {
    "Parameters": Column("Parameters", _cost("parameters"), quantity),
    "MACs": Column("MACs", _cost("macs"), quantity),
    "Size": Column("Size", _cost("storage_bits"), lambda bits: size(int(bits))),
    "time": Column("Time (s)", _spent, in_seconds),
    "memory": Column("Memory", lambda result: result.peak_memory, _in_bytes),
}
