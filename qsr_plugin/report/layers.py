"""Which layers of a network are quantized to how many bits, in a few lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from qsr_plugin.quant.schema import Recipe
from qsr_plugin.report.complexity_types import ComplexityReport, SiteCost

_NUMBER = re.compile(r"(?<!\d)(0|[1-9]\d*)(?!\d)")  # as indices are written; "01" is part of a name
#: Layers of a group that are told by name in one line; the rest are counted.
_TOLD = 12
#: So few more are told as well.
_SPARED = 2


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one class with equal bits.

    Attributes:
        bits: As ``W4A4``; ``W4A2-6`` where a policy chooses, ``float`` without quantizers.
        kind: Class of the float layers.
        names: Dotted module names, in module order.
    """

    bits: str
    kind: str
    names: tuple[str, ...]

    @property
    def brief(self) -> list[str]:
        """Their names, those that differ in indices only as one: ``body.[0-7].conv[1-2]``."""
        return brief_names(self.names)

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


def layer_groups(report: ComplexityReport, recipe: Recipe) -> list[LayerGroup]:
    """Group the layers of a quantized network by bits and class: quantized ones first, the most frequent first.

    Args:
        report: Costs of the network without bits of an image: what a policy chooses is unknown there.
        recipe: Of the network.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for row in report.sites:
        groups.setdefault((_bits_of(row, recipe), row.kind), []).append(row.name)
    found = [LayerGroup(bits, kind, tuple(names)) for (bits, kind), names in groups.items()]
    return sorted(found, key=lambda group: (group.bits == "float", -len(group.names)))


def _bits_of(row: SiteCost, recipe: Recipe) -> str:
    if not row.quantized:
        return "float"
    widths = recipe.act_widths
    chosen = f"{min(widths)}-{max(widths)}" if isinstance(widths, tuple) else ""
    weight, act = (chosen if bits is None else f"{bits:g}" for bits in (row.weight_bits, row.act_bits))
    return f"W{weight}A{act}"


def layer_lines(groups: Sequence[LayerGroup], *, told: int = _TOLD) -> list[str]:
    """One line of totals, then one per group with the names of its layers.

    Args:
        groups: Of :func:`layer_groups`.
        told: How many (brief) names are told of each group, or two more if that is all.
    """
    quantized = {g.bits: sum(len(o.names) for o in groups if o.bits == g.bits) for g in groups if g.bits != "float"}
    total, first = sum(len(group.names) for group in groups), True
    parts = []
    for bits, count in sorted(quantized.items(), key=lambda item: -item[1]):
        parts.append(f"{count} of {total} layers at {bits}" if first else f"{count} at {bits}")
        first = False
    left = sum(len(group.names) for group in groups if group.bits == "float")
    lines = [f"quantized: {', '.join(parts) or 'nothing'}; float: {left or 'none'}"]
    for group in groups:
        shown = told if len(group.brief) > told + _SPARED else len(group.brief)
        names, more = group.brief[:shown], len(group.brief) - shown
        tail = f" and {more} more" if more > 0 else ""
        lines.append(f"  {group.bits:<6} {len(group.names)} x {group.kind}: {', '.join(names)}{tail}")
    return lines


# -- names ------------------------------------------------------------------------------------------------------------

Indices = tuple[int, ...]
Span = tuple[int, ...]  # indices at one position of a name


def brief_names(names: Iterable[str]) -> list[str]:
    """Names that differ in indices only as one, where all combinations of the indices are there.

    ``a.0.x, a.1.x, a.2.x, b`` becomes ``a.[0-2].x, b``. Each name is in exactly one of the results.
    """
    templates: dict[str, list[Indices]] = {}
    for name in names:
        indices = tuple(int(number) for number in _NUMBER.findall(name))
        templates.setdefault(_NUMBER.sub("\0", name), []).append(indices)
    brief = []
    for template, found in templates.items():
        for spans in _products(sorted(set(found))):
            texts = [_span(one) for one in spans]
            brief.append("".join(map("".join, zip(template.split("\0"), [*texts, ""]))))
    return brief


def _products(found: Sequence[Indices]) -> list[tuple[Span, ...]]:
    """Split a set of index tuples into products of sets, one per position."""
    if not found or not found[0]:
        return [()] if found else []
    rests: dict[int, list[Indices]] = {}
    for first, *rest in found:
        rests.setdefault(first, []).append(tuple(rest))
    alike: dict[tuple[Indices, ...], list[int]] = {}
    for first, rest in rests.items():
        alike.setdefault(tuple(rest), []).append(first)
    return [(tuple(firsts), *spans) for rest, firsts in alike.items() for spans in _products(rest)]


def _span(numbers: Span) -> str:
    """``3`` for one index, ``[0-2,5]`` for several."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "[" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) + "]"
