"""Plots of a comparison."""

from __future__ import annotations

from pathlib import Path

import matplotlib.axes
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from qsr_plugin.report import plots
from qsr_plugin.report.labels import spread
from qsr_plugin.report.plots import gain_plot, pareto_front, tradeoff_plot

METHODS = ("pams", "linq", "dorefa", "lsq", "daq", "ddtb", "fqsr", "quantsr", "odm", "a rather long method name")


def comparison() -> list[dict[str, object]]:
    """Ten methods at two widths, all of a width at nearly the same cost, and the float network far away."""
    rows: list[dict[str, object]] = [{"label": "float", "method": "float", "psnr": 31.2, "bitops": 5e12}]
    for bits, psnr, bitops in (("W2A2", 29.5, 1.1e12), ("W4A4", 30.6, 1.15e12)):
        for number, method in enumerate(METHODS):
            start = {"psnr": psnr - 0.1 * number}
            rows.append({
                "label": f"{method} {bits}", "method": method, "psnr": psnr + 0.01 * (number % 4), "bitops": bitops, "start": start,
            })  # fmt: skip
    return rows


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def boxes(axes: matplotlib.axes.Axes) -> list[tuple[float, float, float, float]]:
    """Left, bottom, right, top of every text in the plot, in pixels."""
    axes.figure.canvas.draw()  # saving has left measures of another resolution
    extents = [Text.get_window_extent(text) for text in axes.texts]  # an annotation's own counts its line as well
    return [(box.x0, box.y0, box.x1, box.y1) for box in extents]


def overlaps(axes: matplotlib.axes.Axes) -> list[tuple[int, int]]:
    found = boxes(axes)
    pairs = [(i, j) for i in range(len(found)) for j in range(i)]
    hit = lambda a, b: min(a[2], b[2]) - max(a[0], b[0]) > 0.5 and min(a[3], b[3]) - max(a[1], b[1]) > 0.5  # noqa: E731
    return [(i, j) for i, j in pairs if hit(found[i], found[j])]


def test_labels_that_find_no_room_beside_their_dots_stand_in_a_column(tmp_path: Path, drawn: list[Figure]) -> None:
    """Eleven networks of one cost, most of them within 1.5 dB, as comparisons of methods have them."""
    scores = {
        "daq": 31.68, "ddtb": 31.67, "dorefa": 30.47, "linq": 30.33, "lsq": 31.65, "odm": 31.72, "pams": 30.99,
        "quantsr": 31.65, "quantsr W4A4, 8": 29.73, "quantsr W4A4, 4": 29.7,
    }  # fmt: skip
    costs = {"quantsr W4A4, 8": 61.89e12, "quantsr W4A4, 4": 61.57e12}
    rows = [{"label": "float", "method": "float", "psnr": 32.01, "bitops": 130.8e12}]
    rows.append({"label": "fqsr W4A4", "method": "fqsr", "psnr": 21.68, "bitops": 2.14e12})
    for name, psnr in scores.items():
        label = f"{name} blocks" if "," in name else f"{name} W4A4"
        rows.append({"label": label, "method": name, "psnr": psnr, "bitops": costs.get(name, 62.54e12)})
    tradeoff_plot(rows, "bitops", "psnr", tmp_path / "plot.png", title="Set5: some network, 200 iterations of batch 4")
    assert overlaps(drawn[0].axes[0]) == []


def test_labels_do_not_overlap_and_stay_in_the_picture(tmp_path: Path, drawn: list[Figure]) -> None:
    """Twenty labels in two places of the plot."""
    rows = comparison()
    tradeoff_plot(rows, "bitops", "psnr", tmp_path / "plot.png", title="Set5")
    (axes,) = drawn[0].axes
    assert sorted(text.get_text() for text in axes.texts) == sorted(row["label"] for row in rows)
    assert overlaps(axes) == []
    width, height = drawn[0].bbox.width, drawn[0].bbox.height
    assert all(min(x0, y0) >= 0 and x1 <= width and y1 <= height for x0, y0, x1, y1 in boxes(axes))


def test_every_network_is_drawn_where_it_belongs(tmp_path: Path, drawn: list[Figure]) -> None:
    """Size in megabytes; a row without the figure, or with one that is not finite, is left out."""
    rows = [
        {"label": "a", "method": "a", "psnr": 30.0, "storage_bits": 8_000_000},
        {"label": "b", "method": "b", "psnr": 31.0, "storage_bits": 16_000_000},
        {"label": "c", "method": "c", "psnr": float("nan"), "storage_bits": 16_000_000},
        {"label": "d", "method": "d", "psnr": 31.0, "storage_bits": None},
    ]
    tradeoff_plot(rows, "storage_bits", "psnr", tmp_path / "plot.svg")
    points = {tuple(np.ravel(line.get_xydata())) for line in drawn[0].axes[0].lines}
    assert points == {(1.0, 30.0), (2.0, 31.0)}


def test_methods_are_told_apart(tmp_path: Path, drawn: list[Figure]) -> None:
    """Eleven methods, eleven pairs of colour and marker."""
    tradeoff_plot(comparison(), "bitops", "psnr", tmp_path / "plot.png")
    looks = {(line.get_color(), line.get_marker()) for line in drawn[0].axes[0].lines}
    assert len(looks) == len(METHODS) + 1


def sweep() -> list[dict[str, object]]:
    """Two series that choose bits, fixed ones between and above them, and a float network without FAB."""
    rows: list[dict[str, object]] = [{"label": "float", "method": "float", "psnr": 32.0}]
    for bits, psnr, method in (
        (4, 28.9, "minmax"),
        (4, 30.55, "minmax+FT"),
        (4, 31.45, "percentile"),
        (8, 31.95, "pams"),
    ):
        rows.append({"label": f"{method} W{bits}A{bits}", "method": method, "psnr": psnr, "fab": bits})
    for name, above in (("min-max", 0.0), ("percentile", 0.6)):
        for weight, fab, psnr in ((200, 3.2, 30.0), (0, 4.4, 30.75), (50, 3.7, 30.6), (10, 4.1, 30.7)):
            point = {"psnr": psnr + above, "fab": fab - 0.1 * above, "series": name, "adaptive": True}
            rows.append({"label": f"λ={weight}", "method": f"ours {name}", **point})
    return rows


def test_series_are_lines_and_fixed_bits_open_dots(tmp_path: Path, drawn: list[Figure]) -> None:
    """Joined by ascending FAB; the float network is a line across, the front goes from dot to dot in steps."""
    tradeoff_plot(sweep(), "fab", "psnr", tmp_path / "plot.png", front=True)
    (axes,) = drawn[0].axes
    lines = [line for line in axes.lines if len(line.get_xydata()) > 1]
    dots = [line for line in axes.lines if len(line.get_xydata()) == 1]
    series, front, reference = lines[:2], lines[2], lines[3]
    assert [line.get_xdata().tolist() for line in series] == [
        pytest.approx([3.2, 3.7, 4.1, 4.4]), pytest.approx([3.14, 3.64, 4.04, 4.34]),
    ]  # fmt: skip
    assert reference.get_ydata() == [32.0, 32.0] and "float\n32.00" in [text.get_text() for text in axes.texts]
    assert front.get_drawstyle() == "steps-post" and front.get_xydata().tolist() == pytest.approx(
        np.array([[3.14, 30.6], [3.64, 31.2], [4.0, 31.45], [8.0, 31.95]])
    )
    assert sum(dot.get_markerfacecolor() == "white" for dot in dots) == 4 and len(dots) == 12
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["bits chosen by content", "fixed bits"]


def test_labels_stand_beside_their_dots_where_there_is_room(tmp_path: Path, drawn: list[Figure]) -> None:
    """They cover neither one another nor a dot, and stay within the frame."""
    tradeoff_plot(sweep(), "fab", "psnr", tmp_path / "plot.png", front=True)
    (axes,) = drawn[0].axes
    assert overlaps(axes) == []
    dots = axes.transData.transform([line.get_xydata()[0] for line in axes.lines if len(line.get_xydata()) == 1])
    frame = axes.get_window_extent()
    for x0, y0, x1, y1 in boxes(axes)[1:]:  # the float network's name is at the right of the frame
        assert x0 >= frame.x0 - 1 and x1 <= frame.x1 + 1 and y0 >= frame.y0 - 1 and y1 <= frame.y1 + 1
        assert not [dot for dot in dots if x0 < dot[0] < x1 and y0 < dot[1] < y1]


def test_only_fixed_bits_are_filled_dots(tmp_path: Path, drawn: list[Figure]) -> None:
    """Nothing to tell apart, so no legend."""
    tradeoff_plot(comparison(), "bitops", "psnr", tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    assert axes.get_legend() is None and not [line for line in axes.lines if line.get_markerfacecolor() == "white"]


def test_gains_go_from_start_to_end(tmp_path: Path, drawn: list[Figure]) -> None:
    """An open and a filled dot for each network; the float one is a line to compare with."""
    rows = comparison()
    gain_plot(rows, "psnr", tmp_path / "gain.png")
    (axes,) = drawn[0].axes
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("29.50") >= 2 and "float 31.20" in texts
    assert [label.get_text() for label in axes.get_yticklabels()] == [row["label"] for row in rows[1:]]
    assert Image.open(tmp_path / "gain.png").width == 1152


def test_front_is_what_none_beats() -> None:
    """Ascending in both figures; equal cost keeps the better, equal quality the cheaper."""
    points = [(3.0, 30.0), (2.0, 29.0), (2.0, 28.0), (4.0, 30.0), (5.0, 29.5), (6.0, 31.0)]
    assert pareto_front(points) == [(2.0, 29.0), (3.0, 30.0), (6.0, 31.0)]
    assert pareto_front([]) == []


@pytest.mark.parametrize("rows", [1, 2, 12])
def test_spread_keeps_order_and_distance(rows: int) -> None:
    """Places move apart by the least squares; free ones stay."""
    places = spread([5.0] * rows, 1.0, -100.0, 100.0)
    assert np.allclose(np.diff(places), 1.0) and np.isclose(np.mean(places), 5.0)
    assert spread([1.0, 1.2, 7.0], 1.0, -10.0, 10.0) == pytest.approx([0.6, 1.6, 7.0])
    assert spread([0.0, 0.0, 10.0], 1.0, 0.0, 10.0) == pytest.approx([0.5, 1.5, 9.5])


def test_mistakes_are_explained(tmp_path: Path) -> None:
    row = {"label": "a", "method": "a", "psnr": 30.0, "bitops": 1.0}
    with pytest.raises(ValueError, match="no axis 'bitop'. Did you mean 'bitops'"):
        tradeoff_plot([row], "bitop", "psnr", tmp_path / "plot.png")
    with pytest.raises(ValueError, match="plots are written as .png or .svg"):
        tradeoff_plot([row], "bitops", "psnr", tmp_path / "plot.jpg")
    with pytest.raises(ValueError, match="nothing to draw"):
        gain_plot([row], "psnr", tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []
