"""Result files as points of a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsr_plugin import complexity
from qsr_plugin.report.comparison import Row
from qsr_plugin.report.evaluate import evaluate
from qsr_plugin.report.result_files import ResultError, choose_set, read_points, rename, rows_of
from qsr_plugin.report.tables import write_json

COSTS = {"method": "mine W4A4", "fab": 4.0, "bitops": 2e9, "storage_bits": 8000, "input_size": [180, 320]}
COSTS["convention"] = "macs-bits"


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def comparison(path: Path) -> Path:
    """A float network, two methods on two sets, and one that failed."""
    score = {"psnr": 30.0, "ssim": 0.9}
    rows = [
        Row("float", "float", "float", end={"A": {"psnr": 31.0}, "B": {"psnr": 29.0}}, fab=32.0, bitops=9e12),
        Row("odm W2A2", "odm", "W2A2", start={"A": score}, end={"A": {"psnr": 30.5}, "B": score}, fab=2.0, bitops=1e9),
        Row("odm W4A4", "odm", "W4A4", start={"A": score, "B": score}, fab=4.0, bitops=2e9, storage_bits=16000),
        Row("lsq W2A2", "lsq", "W2A2", note="diverged"),
    ]
    return write(path, {"settings": {}, "rows": [row.to_dict() for row in rows]})


def quantized(path: Path, psnr: float = 30.0, fab: float = 3.5, label: str = "mine W4A4", **costs: Any) -> Path:
    """What ``qsr quantize --test`` writes."""
    score = {"scale": 4, "psnr": psnr, "ssim": 0.9, "fab": fab, "images": []}
    float_score = {"scale": 4, "psnr": 31.0, "ssim": 0.9, "fab": 32.0, "images": []}
    data = {"weights": "w.pth", "model": "m.safetensors", "complexity": {**COSTS, **costs}}
    return write(path, {**data, "float": float_score, label: score})


def test_files_on_different_sets_do_not_mix(tmp_path: Path) -> None:
    files = []
    for name in ("Set5", "Set14"):
        files.append(quantized(tmp_path / f"{name}.json", label=f"mine {name}"))
        data = json.loads(files[-1].read_text())
        for label in ("float", f"mine {name}"):
            data[label]["set"] = name
        files[-1].write_text(json.dumps(data))
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
    """Mean bits are those on the set, all other costs those of the network; the float one has its scores alone."""
    reference, mine = read_points(quantized(tmp_path / "q.json"))
    assert reference.figures == {"psnr": 31.0, "fab": 32.0} and reference.test == ""
    assert mine.figures == {"psnr": 30.0, "fab": 3.5, "bitops": 2e9, "storage_bits": 8000}
    assert mine.adaptive and not read_points(quantized(tmp_path / "q.json", fab=4.0))[1].adaptive
    data = json.loads((tmp_path / "q.json").read_text())
    data["mine W4A4"]["bits"] = {"shares": {"2": 0.5, "6": 0.5}}
    assert read_points(write(tmp_path / "q.json", data))[1].adaptive  # a mean of 4 bits, but of 2 and 6


def test_a_report_of_a_real_network(tiny, write_images, tmp_path: Path) -> None:
    """The very structure that the command line writes."""
    rng = np.random.default_rng(0)
    hr = write_images("HR", {"a.png": rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)})
    lr = write_images("LR", {"a.png": rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)})
    net = tiny("EDSR", "minmax", weight_bits=4, act_bits=4)
    score = evaluate(net, hr, lr, 2)
    costs = complexity(net)
    write_json({**costs.to_dict(), "scores": {"Set5": score.to_dict()}}, tmp_path / "r.json")
    (point,) = read_points(tmp_path / "r.json")
    assert (point.label, point.test, point.adaptive) == ("minmax W4A4", "Set5", False)
    assert point.figures == {
        "psnr": pytest.approx(score.psnr), "fab": 4.0, "bitops": costs.bitops, "storage_bits": costs.storage_bits,
    }  # fmt: skip
    assert point.way == ("macs-bits", (180, 320))


def test_sets(tmp_path: Path) -> None:
    """The first that all files have, or the one asked for; a file that names none goes with any."""
    both, unnamed = read_points(comparison(tmp_path / "c.json")), read_points(quantized(tmp_path / "q.json"))
    report = {**COSTS, "scores": {"B": {"psnr": 28.0, "fab": 4.0}}}
    only_b = read_points(write(tmp_path / "r.json", report))
    assert {point.test for point in choose_set(both)} == {"A"}
    assert {point.test for point in choose_set(both + only_b)} == {"B"}
    assert {point.test for point in choose_set(both + unnamed, "B")} == {"B", ""}
    assert {point.test for point in choose_set(unnamed, "Set5")} == {""}
    with pytest.raises(ResultError, match="no result on 'Bb'. Did you mean 'B'. Allowed: A, B."):
        choose_set(both, "Bb")
    other = read_points(write(tmp_path / "o.json", {**COSTS, "scores": {"C": {"psnr": 28.0}}}))
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


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no JSON"),
        ("[1]", "expected 'rows'.*found list"),
        ('{"a": 1, "b": 2}', "expected 'rows'.*found the keys a, b"),
        ('{"rows": [{"end": {}}]}', r"rows\[0\] has no 'label', found end"),
        ('{"rows": []}', "holds no scores on a test set"),
        ('{"rows": [{"label": "a", "end": {"A": {"ssim": 1}}}]}', r"rows\[0\]\.A has no 'psnr', found ssim"),
        ('{"rows": [{"label": "a", "end": {"A": {"psnr": "inf"}}}]}', "psnr of a is 'inf', expected a finite number"),
        ('{"scores": {"A": {"psnr": 1}}}', "the report has no 'method', found scores"),
        ('{"complexity": {}}', "holds no scores on a test set: run the command with --test"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=rf"results\.json.*{says}"):
        read_points(path)


def test_missing_files_and_figures_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"none\.json cannot be read \(No such file"):
        read_points(tmp_path / "none.json")
    points = choose_set(read_points(comparison(tmp_path / "c.json")))
    with pytest.raises(ResultError, match=r"c\.json: odm W2A2 has no 'storage_bits'; it has psnr, fab, bitops"):
        rows_of(points, "storage_bits")


def test_bitops_of_two_conventions_are_refused(tmp_path: Path) -> None:
    points = read_points(quantized(tmp_path / "a.json"))
    points += read_points(quantized(tmp_path / "b.json", label="other W4A4", convention="cadyq", input_size=[90, 160]))
    assert len(rows_of(points, "fab")) == 3
    with pytest.raises(ResultError, match=r"a\.json: macs-bits at 180x320; .*b\.json: cadyq at 90x160"):
        rows_of(points, "bitops")
