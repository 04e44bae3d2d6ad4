"""Labels of the dots of a plot, so that none covers another, and no dot or line as far as there is room.

Every label stands beside its dot, at the best of many places around it. Where many dots touch, or labels so placed
would cover each other, each group of dots has a column of labels at its right, in their order and with a line to each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

_HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps text readable over lines
_CROWD = 7  # from this many dots that touch on, labels stand in columns
_COLUMN_GAP = 14.0  # points between the rightmost dot of a group and its column of labels
_DISTANCES = (5.0, 8.0, 12.0, 17.0, 24.0, 33.0, 45.0, 60.0, 80.0, 110.0)  # points from a dot to its label
_DIRECTIONS = 16
_LEADER = 9.0  # points; a label farther away than this has a line to its dot
_DOT, _PAD = 5.0, 1.0  # points: half of a dot with its edge, free room around a label
_SWEEPS, _CROWDED = 3, 60.0  # rounds; points within which dots count as neighbours
# What a place costs: beyond the frame, over a label, over a dot, over a line, nearer to another dot, a leader that
# crosses one of these, and each point of distance.
_OUTSIDE, _ON_LABEL, _ON_DOT, _ON_LINE, _NEARER, _CROSSES, _FAR = 1e4, 60.0, 20.0, 2.5, 6.0, 15.0, 0.1

Point = tuple[float, float]


def write_labels(
    axes: Axes,
    points: Sequence[Point],
    labels: Sequence[str],
    colours: Sequence[str],
    size: float,
    *,
    lines: Sequence[tuple[Point, Point]] = (),
) -> None:
    """Write a label for each dot. Limits, scales and place of the axes must not change afterwards.

    Args:
        axes: With everything else drawn; texts that are there are kept free.
        points: Dots, in data coordinates.
        labels: Their texts.
        colours: Of the lines to the dots.
        size: Of the text, in points.
        lines: Segments to keep off as well, in data coordinates.
    """
    renderer, unit = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    taken = [Text.get_window_extent(text, renderer).extents for text in axes.texts]
    pixels = axes.transData.transform(points)
    sides = np.array([_sides(axes, label, size) for label in labels])
    frame = axes.get_window_extent(renderer).extents
    leader = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    side, crowded = "center", _largest_crowd(pixels, 2 * _DOT * unit) >= _CROWD
    if not crowded:
        segments = np.array([axes.transData.transform(line) for line in lines]).reshape(-1, 2, 2)
        places, far = _beside(pixels, sides + 2 * _PAD * unit, frame, np.array(taken).reshape(-1, 4), segments, unit)
        boxes = np.hstack([places - sides / 2, places + sides / 2])
        crowded = _overlaps(boxes, boxes).sum() > len(boxes)  # each overlaps itself
    if crowded:
        places = _columns(pixels, sides, frame, unit)
        side, leader, far = "left", {**leader, "relpos": (0, 0.5)}, np.full(len(labels), np.inf)
    for point, label, colour, place, distance in zip(
        points, labels, colours, axes.transData.inverted().transform(places), far
    ):
        arrow = {**leader, "color": colour} if distance > _LEADER else None
        axes.annotate(
            label, point, place, fontsize=size, va="center", ha=side, annotation_clip=False, zorder=4,
            path_effects=_HALO, arrowprops=arrow,
        )  # fmt: skip


def _sides(axes: Axes, label: str, size: float) -> tuple[float, float]:
    """Width and height of a text in pixels."""
    text = axes.text(0, 0, label, fontsize=size)
    extent = text.get_window_extent(axes.figure.canvas.get_renderer())
    text.remove()
    return extent.width, extent.height


def _largest_crowd(pixels: np.ndarray, reach: float) -> int:
    """Most dots with which one dot touches, itself counted."""
    near = np.abs(pixels[:, None] - pixels[None]).max(2) < reach
    return int(near.sum(1).max())


# -- columns ----------------------------------------------------------------------------------------------------------


def _columns(pixels: np.ndarray, sides: np.ndarray, frame: np.ndarray, unit: float) -> np.ndarray:
    """Left middles of the labels: a column to the right of each group of dots closer than their labels are wide."""
    height, gap = sides[:, 1].max() * 1.12, _COLUMN_GAP * unit
    groups: list[list[int]] = []
    for index in np.argsort(pixels[:, 0], kind="stable").tolist():
        widest = max((sides[i, 0] for i in groups[-1]), default=0.0) if groups else 0.0
        if groups and pixels[index, 0] - min(pixels[i, 0] for i in groups[-1]) < widest + 2 * gap:
            groups[-1].append(index)
        else:
            groups.append([index])
    places = np.empty_like(pixels)
    for group in groups:
        group.sort(key=lambda i: pixels[i, 1])
        places[group, 0] = max(pixels[i, 0] for i in group) + gap
        places[group, 1] = spread([float(pixels[i, 1]) for i in group], height, float(frame[1]), float(frame[3]))
    return places


def spread(wanted: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Move ascending places apart until they are ``least`` from each other, as little as possible.

    Args:
        wanted: Ascending.
        least: Smallest distance.
        low: Nothing goes below, as far as there is room.
        high: Nothing goes above, as far as there is room.

    Returns:
        Ascending places.
    """
    blocks: list[list[float]] = []  # of places that touch each other: centre of the first if all could choose, count
    for place in wanted:
        blocks.append([place, 1.0])
        while len(blocks) > 1 and blocks[-1][0] < blocks[-2][0] + blocks[-2][1] * least:
            start, count = blocks.pop()
            previous, before = blocks[-1]
            # The least squared movement: the mean of what each place would choose for the first of the block.
            blocks[-1] = [(previous * before + (start - before * least) * count) / (before + count), before + count]
    places = [start + number * least for start, count in blocks for number in range(int(count))]
    for number in range(len(places)):
        places[number] = max(places[number], low + (number + 0.5) * least)
    for number in reversed(range(len(places))):
        places[number] = min(places[number], high - (len(places) - number - 0.5) * least)
    return places


# -- beside the dots --------------------------------------------------------------------------------------------------


def _beside(
    pixels: np.ndarray, sides: np.ndarray, frame: np.ndarray, taken: np.ndarray, lines: np.ndarray, unit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the labels, and how many points they are from their dots.

    One label after the other takes its best place, and again when all have seen the others; in several orders, of which
    the cheapest result is taken.
    """
    dots = np.hstack([pixels - _DOT * unit, pixels + _DOT * unit])
    crowd = (np.abs(pixels[:, None] - pixels[None]).max(2) < _CROWDED * unit).sum(1)
    results = []
    for key in (-pixels[:, 1], pixels[:, 1], -crowd, crowd, pixels[:, 0]):
        placed: dict[int, tuple[np.ndarray, float, float]] = {}
        for index in _SWEEPS * np.argsort(key, kind="stable").tolist():
            others = {i: place for i, place in placed.items() if i != index}
            boxes = [_around(centre, sides[i]) for i, (centre, _, _) in others.items()]
            leaders = [(pixels[i], centre) for i, (centre, far, _) in others.items() if far > _LEADER]
            labels = np.array([*taken, *boxes]).reshape(-1, 4)
            room = _Room(frame, labels, dots, index, lines, np.array(leaders).reshape(-1, 2, 2))
            placed[index] = room.best_place(pixels[index], sides[index], unit)
        results.append((sum(cost for *_, cost in placed.values()), len(results), placed))
    placed = min(results)[2]
    ordered = [placed[index] for index in range(len(pixels))]
    return np.array([centre for centre, _, _ in ordered]), np.array([far for _, far, _ in ordered])


def _around(centre: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Left, bottom, right, top."""
    return np.concatenate([centre - sides / 2, centre + sides / 2])


@dataclass(frozen=True)
class _Room:
    """What is drawn already, in pixels; boxes are left, bottom, right, top."""

    frame: np.ndarray
    labels: np.ndarray
    dots: np.ndarray
    own_dot: int
    lines: np.ndarray
    leaders: np.ndarray

    def best_place(self, dot: np.ndarray, sides: np.ndarray, unit: float) -> tuple[np.ndarray, float, float]:
        """Centre of the cheapest place for a label, in pixels, how far it is from the dot, in points, and its cost."""
        centres, far = _candidates(dot, sides, unit)
        boxes = np.hstack([centres - sides / 2, centres + sides / 2])
        outside = ((boxes[:, :2] < self.frame[:2]) | (boxes[:, 2:] > self.frame[2:])).any(1)
        own = np.stack([np.broadcast_to(dot, centres.shape), centres], 1)
        other_dots = np.delete(self.dots, self.own_dot, 0)
        things = np.vstack([self.labels, other_dots])
        nearer = (_gaps(boxes, other_dots) < _gaps(boxes, self.dots[self.own_dot][None])).any(1)
        crossed = _hits(own, things).sum(0) + _cross(own, self.leaders).sum(1)
        cost = _FAR * far + _OUTSIDE * outside + _CROSSES * (far > _LEADER) * crossed
        cost += _ON_LABEL * _overlaps(boxes, self.labels).sum(1) + _ON_DOT * _overlaps(boxes, self.dots).sum(1)
        cost += _ON_LINE * _hits(self.lines, boxes).sum(1) + _CROSSES * _hits(self.leaders, boxes).sum(1)
        cost += _NEARER * (far <= _LEADER) * nearer
        best = int(cost.argmin())
        return centres[best], float(far[best]), float(cost[best])


def _candidates(dot: np.ndarray, sides: np.ndarray, unit: float) -> tuple[np.ndarray, np.ndarray]:
    """Centres (n, 2) of places around a dot, in pixels, and how far their edge is from it, in points."""
    angles = np.arange(_DIRECTIONS) * 2 * np.pi / _DIRECTIONS
    way = np.stack([np.cos(angles), np.sin(angles)], 1)
    edge = np.clip(1.5 * way, -1, 1) * sides / 2
    centres = dot + edge[None] + way[None] * unit * np.array(_DISTANCES)[:, None, None]
    return centres.reshape(-1, 2), np.repeat(_DISTANCES, _DIRECTIONS)


def _gaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n, m): distance of boxes (n, 4) and (m, 4) of left, bottom, right, top."""
    a, b = boxes[:, None], others[None]
    return np.linalg.norm(np.maximum(np.maximum(a[..., :2] - b[..., 2:], b[..., :2] - a[..., 2:]), 0), axis=-1)


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n, m): whether boxes (n, 4) and (m, 4) of left, bottom, right, top share an area."""
    a, b = boxes[:, None], others[None]
    return (np.minimum(a[..., 2:], b[..., 2:]) > np.maximum(a[..., :2], b[..., :2])).all(-1)


def _hits(segments: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(n boxes, m segments): whether a segment passes through a box (clipping by the slabs of the box)."""
    start = segments[None, :, 0]
    step = segments[None, :, 1] - start
    step = np.where(np.abs(step) < 1e-9, 1e-9, step)
    first, second = (boxes[:, None, :2] - start) / step, (boxes[:, None, 2:] - start) / step
    enter, leave = np.minimum(first, second).max(-1), np.maximum(first, second).min(-1)
    return np.maximum(enter, 0) < np.minimum(leave, 1)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, m): whether segments cross, by the sides on which their ends lie."""

    def side(line: np.ndarray, point: np.ndarray) -> np.ndarray:
        along, to = line[..., 1, :] - line[..., 0, :], point - line[..., 0, :]
        return along[..., 0] * to[..., 1] - along[..., 1] * to[..., 0]

    a, b = a[:, None], b[None]
    return (side(a, b[..., 0, :]) * side(a, b[..., 1, :]) < 0) & (side(b, a[..., 0, :]) * side(b, a[..., 1, :]) < 0)
