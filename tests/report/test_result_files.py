"""Result files as points of a plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsr_plugin import complexity
from qsr_plugin.report.evaluate import evaluate
from qsr_plugin.report.fab import BitStatistics
from qsr_plugin.report.paper_columns import Way
from qsr_plugin.report.result_files import choose_set, read_points, rename, rows_of
from qsr_plugin.report.result_io import ResultError, read_results, write_results
from qsr_plugin.report.result_schema import Costs, Quality, Result, ResultTable, described

WAY = {"convention": "macs-bits", "input_size": (180, 320), "parameters": 1, "macs": 1}


def costs(fab: float, bitops: float, storage_bits: int = 8000, **way: Any) -> Costs:
    return Costs(fab=fab, bitops=bitops, storage_bits=storage_bits, **{**WAY, **way})


def comparison(path: Path) -> Path:
    """A float network, two methods on two sets, and one that failed."""
    score = Quality(psnr=30.0, ssim=0.9)
    quality = {"A": Quality(psnr=31.0), "B": Quality(psnr=29.0)}
    rows = (
        Result(label="float", quality=quality, costs=costs(32.0, 9e12)),
        Result(
            label="odm W2A2", method="odm", before={"A": score}, quality={"A": Quality(psnr=30.5), "B": score},
            costs=costs(2.0, 1e9),
        ),
        Result(label="odm W4A4", method="odm", before={"A": score, "B": score}, costs=costs(4.0, 2e9, 16000)),
        Result(label="lsq W2A2", method="lsq", note="diverged"),
    )  # fmt: skip
    write_results(ResultTable(rows=rows), path)
    return path


def quantized(
    path: Path, psnr: float = 30.0, fab: float = 3.5, label: str = "mine W4A4", test: str = "A", **way: Any
) -> Path:
    """What ``qsr quantize --test`` writes."""
    plain = Result(label="float", quality={test: Quality(psnr=31.0, fab=32.0)})
    quality = {test: Quality(psnr=psnr, ssim=0.9, fab=fab)}
    mine = Result(label=label, method="mine", quality=quality, costs=costs(4.0, 2e9, **way), reference=plain)
    write_results(mine, path)
    return path


def test_files_on_different_sets_do_not_mix(tmp_path: Path) -> None:
    files = [quantized(tmp_path / f"{name}.json", test=name) for name in ("Set5", "Set14")]
    with pytest.raises(ResultError, match="no test set is in all files"):
        choose_set([point for file in files for point in read_points(file)])


def test_rows_of_a_comparison(tmp_path: Path) -> None:
    """After the training, else before it; what failed is not there."""
    points = read_points(comparison(tmp_path / "c.json"))
    assert [(p.label, p.test, p.figures["psnr"]) for p in points] == [
        ("float", "A", 31.0), ("float", "B", 29.0), ("odm W2A2", "A", 30.5), ("odm W2A2", "B", 30.0),
        ("odm W4A4", "A", 30.0), ("odm W4A4", "B", 30.0),
    ]  # fmt: skip
    assert points[-1].figures == {"psnr": 30.0, "fab": 4.0, "bitops": 2e9, "storage_bits": 16000}
    assert not any(point.adaptive for point in points) and points[-1].family == "odm"


def test_a_quantized_network(tmp_path: Path) -> None:
    """Mean bits are those on the set, its size that of the network; the float one has its scores alone."""
    reference, mine = read_points(quantized(tmp_path / "q.json"))
    assert reference.figures == {"psnr": 31.0, "fab": 32.0} and reference.way is None
    assert mine.figures == {"psnr": 30.0, "fab": 3.5, "storage_bits": 8000}
    assert mine.adaptive and not read_points(quantized(tmp_path / "q.json", fab=4.0))[1].adaptive
    (result,) = read_results(tmp_path / "q.json")[1:]
    bits = BitStatistics(4.0, 2.0, (3.0, 4.0, 5.0), 6.0, {"2": 0.5, "6": 0.5}, {"body.0.input": 4.0}, {})
    quality = {"A": result.quality["A"].model_copy(update={"bits": bits, "bitops": 3e9})}
    write_results(result.model_copy(update={"quality": quality}), tmp_path / "q.json")
    mine = read_points(tmp_path / "q.json")[1]
    assert mine.adaptive and mine.figures["bitops"] == 3e9, "a mean of 4 bits, but of 2 and 6"


def test_networks_and_placements_of_one_file_are_told_apart(tmp_path: Path) -> None:
    """A table of post-training methods: labels say what differs, before the bits."""
    score = {"A": Quality(psnr=30.0)}
    rows = [
        Result(label=f"minmax {bits}", method="minmax", placement=placement, network="net", quality=score)
        for placement in ("body", "full") for bits in ("W4A4", "W8A8")
    ]  # fmt: skip
    write_results(ResultTable(rows=tuple(rows)), tmp_path / "ptq.json")
    points = read_points(tmp_path / "ptq.json")
    assert [point.label for point in points][:2] == ["body minmax W4A4", "body minmax W8A8"]
    assert [point.family for point in points][2:] == ["full minmax"] * 2
    write_results(ResultTable(rows=tuple(rows[:2])), tmp_path / "ptq.json")
    assert [point.label for point in read_points(tmp_path / "ptq.json")] == ["minmax W4A4", "minmax W8A8"]


def test_a_report_of_a_real_network(tiny, write_images, tmp_path: Path) -> None:
    """The very structure that the command line writes."""
    rng = np.random.default_rng(0)
    hr = write_images("HR", {"a.png": rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)})
    lr = write_images("LR", {"a.png": rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)})
    net = tiny("EDSR", "minmax", weight_bits=4, act_bits=4)
    score = evaluate(net, hr, lr, 2)
    counted = complexity(net)
    quality = {"Set5": Quality.of(score, counted.bitops)}
    write_results(Result(**described(net.recipe), quality=quality, costs=Costs.of(counted)), tmp_path / "r.json")
    (point,) = read_points(tmp_path / "r.json")
    assert (point.label, point.test, point.adaptive) == ("minmax W4A4", "Set5", False)
    assert point.figures == {
        "psnr": pytest.approx(score.psnr), "fab": 4.0, "bitops": counted.bitops, "storage_bits": counted.storage_bits,
    }  # fmt: skip
    assert point.way == Way("macs-bits", (180, 320), "whole images")


def test_sets(tmp_path: Path) -> None:
    """The first that all files have, or the one asked for."""
    both = read_points(comparison(tmp_path / "c.json"))
    only_b = read_points(quantized(tmp_path / "q.json", test="B"))
    assert {point.test for point in choose_set(both)} == {"A"}
    assert {point.test for point in choose_set(both + only_b)} == {"B"}
    assert {point.test for point in choose_set(both, "B")} == {"B"}
    with pytest.raises(ResultError, match="no result on 'Bb'. Did you mean 'B'. Allowed: A, B."):
        choose_set(both, "Bb")
    other = read_points(quantized(tmp_path / "o.json", test="C"))
    with pytest.raises(ResultError, match=r"no test set is in all files.*c\.json: A, B; .*o\.json: C"):
        choose_set(both + other)


def test_networks_of_a_family_are_a_series(tmp_path: Path) -> None:
    """From three on only the dearest keeps its whole label; float ones become one line."""
    points = [
        *rename(read_points(quantized(tmp_path / "a.json", 30.0, 3.5)), "AdaBM min-max λ=50"),
        *rename(read_points(quantized(tmp_path / "b.json", 30.5, 3.8)), "AdaBM min-max λ=10"),
        *rename(read_points(quantized(tmp_path / "c.json", 30.2, 3.6)), "AdaBM min-max λ=20"),
        *rename(read_points(quantized(tmp_path / "d.json", 30.5, 4.0)), "MinMax"),
    ]
    rows = rows_of(points, "fab")
    family = "AdaBM min-max"
    assert [(row["label"], row["method"], row["series"]) for row in rows[:4]] == [
        ("λ=50", family, family), ("AdaBM min-max λ=10", family, family), ("λ=20", family, family),
        ("MinMax", "MinMax", ""),
    ]  # fmt: skip
    assert [row["adaptive"] for row in rows[:4]] == [True, True, True, False]
    assert rows[4:] == [{"label": "float", "method": "float", "psnr": 31.0}]
    assert [row["label"] for row in rows_of(points[2:6], "fab")[:2]] == ["AdaBM min-max λ=10", "AdaBM min-max λ=20"]


def test_equal_labels_are_told_apart_by_file(tmp_path: Path) -> None:
    points = read_points(quantized(tmp_path / "low.json", 30.0, 3.5)) + read_points(quantized(tmp_path / "high.json"))
    assert {row["label"] for row in rows_of(points, "fab")} == {"mine W4A4 (low)", "mine W4A4 (high)", "float"}


def test_a_label_for_several_networks_goes_before_theirs(tmp_path: Path) -> None:
    renamed = rename(read_points(comparison(tmp_path / "c.json")), "long run")
    assert list(dict.fromkeys(point.label for point in renamed)) == ["float", "long run odm W2A2", "long run odm W4A4"]


def test_what_cannot_be_drawn_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(Result(label="mine W4A4", costs=costs(4.0, 2e9)), path)
    with pytest.raises(ResultError, match=r"results\.json holds no scores on a test set: run the command with --test"):
        read_points(path)
    write_results(Result(label="a", method="a", quality={"A": Quality(psnr=math.inf)}), path)
    with pytest.raises(ResultError, match=r"results\.json: psnr of a is inf, expected a finite number"):
        read_points(path)


def test_missing_files_and_figures_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"none\.json cannot be read \(No such file"):
        read_points(tmp_path / "none.json")
    (result,) = read_results(quantized(tmp_path / "q.json"))[1:]
    write_results(result.model_copy(update={"costs": None}), tmp_path / "q.json")
    with pytest.raises(ResultError, match=r"q\.json: mine W4A4 has no 'storage_bits' on 'A'; it has psnr, fab$"):
        rows_of(choose_set(read_points(tmp_path / "q.json")), "storage_bits")


def test_bitops_need_the_bits_of_the_set(tmp_path: Path) -> None:
    """Costs are counted with the bits chosen on one set: there they count, on another one only what was written."""
    quality = {
        "A": Quality(psnr=30, fab=4.0),
        "B": Quality(psnr=29, fab=3.5),
        "C": Quality(psnr=28, fab=3.5, bitops=1e9),
    }
    write_results(Result(label="m W4A4", method="m", quality=quality, costs=costs(4.0, 2e9)), tmp_path / "r.json")
    points = read_points(tmp_path / "r.json")
    assert [point.figures.get("bitops") for point in points] == [2e9, None, 1e9]
    with pytest.raises(ResultError, match=r"m W4A4 has no 'bitops' on 'B'; .* counted with other bits: choose their"):
        rows_of(choose_set(points, "B"), "bitops")


@pytest.mark.parametrize(
    ("way", "told"),
    [
        ({"convention": "cadyq", "input_size": [90, 160]}, "cadyq, 90x160"),
        ({"protocol": "patches of 96x96"}, "macs-bits, 180x320, patches of 96x96"),
    ],
)
def test_bitops_counted_in_two_ways_are_refused(tmp_path: Path, way: dict[str, Any], told: str) -> None:
    points = read_points(quantized(tmp_path / "a.json", fab=4.0))
    points += read_points(quantized(tmp_path / "b.json", fab=4.0, label="other W4A4", **way))
    assert len(rows_of(points, "fab")) == 3
    with pytest.raises(ResultError, match=rf"a\.json: macs-bits, 180x320; .*b\.json: {told}"):
        rows_of(points, "bitops")
