"""``tools/ptq_table.py``: what its rows depend on, which are made again, and a whole small table."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import pytest
import yaml
from PIL import Image

from qsr_plugin import demo, list_methods, ptq_table
from qsr_plugin.ptq_row import Crops, Job
from qsr_plugin.ptq_table import PtqTableError, make_table, plan, read_methods, read_network
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.report.ptq_plot import ptq_plot
from qsr_plugin.report.ptq_rows import PtqRow, networks_of, to_csv, to_html, to_markdown
from qsr_plugin.report.result_files import read_points
from qsr_plugin.report.result_io import read_table, write_results
from qsr_plugin.report.result_schema import Quality, Result, ResultTable
from tests.host.harness import write_photos


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the sets Two and Other at x4 and photos to calibrate on."""
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("Two", "Other")):
        (folder / name / "LRbicx4").mkdir(parents=True)
        for path in write_photos(folder / name / "HR", 2, seed=seed).iterdir():
            small = cv2.resize(cv2.imread(str(path)), (16, 16), interpolation=cv2.INTER_AREA)
            cv2.imwrite(str(folder / name / "LRbicx4" / path.name), small)
    write_photos(folder / "photos", 3, seed=5)
    return folder


@pytest.fixture
def jobs(data: Path) -> list[Job]:
    """The float network, then minmax and omse at W8A8 and W4A4."""
    return plan(
        [read_network(f"edsr_small_x4:{demo.packaged_weights()}")], read_methods(["minmax", "omse"]), ["W8A8", "W4A4"],
        ["body"], crops=lambda one: Crops(str(data / "photos"), one.scale, 16, 3, 0),
        tests=lambda one: ptq_table.sets_in(data, ["Two"], one.scale), threads=1,
    )  # fmt: skip


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rows without work: the labels of those that were asked for. minmax at W4A4 fails."""
    labels: list[str] = []

    def rows_of(jobs: list[Job], logs: Path, at_once: int) -> Iterator[tuple[Job, Result]]:
        for job in jobs:
            labels.append(job.label.removeprefix("edsr_small_x4 "))
            failed = (job.method, job.bits) == ("minmax", "W4A4")
            quality = {} if failed else {name: Quality(psnr=30.0, ssim=0.9, fab=8.0) for name in job.tests}
            note = "FloatingPointError: step 3 | not\nfinite" if failed else ""
            yield job, job.result().model_copy(update={"quality": quality, "note": note})

    monkeypatch.setattr(ptq_table, "rows_of", rows_of)
    return labels


def test_methods_are_found_by_their_recipes() -> None:
    """Those that train weights or learn a choice of bits are none; tuned ones come last."""
    found = ptq_table.post_training_methods()
    assert {"minmax", "percentile", "omse", "minmax_ft", "percentile_ft", "adabm"} <= set(found) <= set(list_methods())
    assert not {"pams", "cadyq", "cabm", "granular_dq", "fqsr"} & set(found)
    assert found.index("percentile") < found.index("adabm")


def test_plan_has_the_float_row_once_for_each_network(jobs: list[Job]) -> None:
    labels = [job.label for job in jobs]
    assert labels[0] == "edsr_small_x4 float" and jobs[0].crops is None
    assert labels[1:] == [f"edsr_small_x4 {m} {b} body" for b in ("W8A8", "W4A4") for m in ("minmax", "omse")]
    assert len({job.key() for job in jobs}) == 5


def test_what_a_row_depends_on(jobs: list[Job], data: Path, tmp_path: Path) -> None:
    """Contents count, names and places do not, nor do placements that the row does not have."""
    job = jobs[1]
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(Path(job.weights).read_bytes())
    assert replace(job, network="other", method="other", weights=str(copy)).key() == job.key()
    other = tmp_path / "other.safetensors"
    other.write_bytes(copy.read_bytes() + b" ")
    (data / "photos" / "Thumbs.txt").write_text("no image")
    recipe = {**job.recipe, "calibration": {"images": 7}}
    changes: list[dict[str, Any]] = [
        {"weights": str(other)}, {"recipe": recipe}, {"bits": "W8A6"}, {"placement": "full"}, {"threads": 2},
        {"tests": {"Two": job.tests["Two"], "Other": (str(data / "Other/HR"), str(data / "Other/LRbicx4"))}},
        {"crops": replace(job.crops, seed=1)}, {"crops": replace(job.crops, side=8)},
        {"crops": replace(job.crops, folder=str(data / "Two" / "HR"))}, {"backbone": {**job.backbone, "num_block": 3}},
    ]  # fmt: skip
    assert len({job.key(), *(replace(job, **change).key() for change in changes)}) == 1 + len(changes)
    assert Job.read(json.loads(json.dumps(job.to_dict()))).key() == job.key()
    placements = {**job.recipe["placements"], "more": job.recipe["placements"]["body"]}
    assert replace(job, recipe={**job.recipe, "placement": "more", "placements": placements}).key() == job.key()
    older = [{key: value for key, value in rule.items() if key != "pad_first"} for rule in placements["body"]]
    assert older != placements["body"]
    assert replace(job, recipe={**job.recipe, "placements": {**placements, "body": older}}).key() == job.key()
    placements["body"] = placements["body"][:1]
    assert replace(job, recipe={**job.recipe, "placements": placements}).key() != job.key()


def test_rows_are_made_once(jobs: list[Job], made: list[str], tmp_path: Path) -> None:
    """Of a second call only what is new, also after rows of other calls; failed ones only if asked for."""
    rows = make_table(jobs[:3], tmp_path)
    assert made == ["float", "minmax W8A8 body", "omse W8A8 body"]
    made.clear()
    rows = make_table(jobs, tmp_path)
    assert made == ["minmax W4A4 body", "omse W4A4 body"] and [row.label for row in rows] == [job.label for job in jobs]
    assert [row.failed for row in rows] == [False, False, False, True, False]
    made.clear()
    assert make_table(jobs, tmp_path) == rows and made == []
    assert make_table(jobs, tmp_path, retry=True) == rows and made == ["minmax W4A4 body"]
    made.clear()
    assert len(make_table(jobs[:1], tmp_path)) == 1 and made == []
    assert [row.origin for row in read_table(tmp_path / "ptq.json").rows] == [job.origin() for job in jobs]
    assert list(ptq_table.kept_rows(tmp_path)) == [job.key() for job in jobs]


def test_rows_survive_an_interruption(jobs: list[Job], made: list[str], tmp_path: Path) -> None:
    def stop(row: PtqRow) -> None:
        if row.method == "omse":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_table(jobs, tmp_path, told=stop)
    assert len(made) == 3 and "omse" in (tmp_path / "ptq.md").read_text()
    make_table(jobs, tmp_path)
    assert len(made) == 5


ROWS = [
    PtqRow("net", "float", scores={"Two": {"psnr": 31.5, "ssim": 0.9, "fab": 32.0}}, fab=32.0, bitops=2e12),
    PtqRow(
        "net", "a", "W4A4", "body", {"Two": {"psnr": 30.104, "ssim": 0.88, "fab": 4.5}}, 4.5, 1e12, 8_000_000,
        {"calibration": 2.0, "ranges": 3.25}, 500_000_000, ("conv.input",),
    ),
    PtqRow("net", "b", "W4A4", "body", {"Two": {"psnr": 29.0, "ssim": 0.87, "fab": 4.0}}, 4.0, seconds={"x": 12.3}),
    PtqRow("net", "c", "W4A4", "body", note="ValueError: a | b\nc"),
    PtqRow("other", "a", "W4A4", "body", {"One": {"psnr": 20.0, "ssim": 0.5, "fab": 4.0}}),
]  # fmt: skip


def test_markdown() -> None:
    """A table for each network with its own sets; the best is bold, failures are told below."""
    text = to_markdown(ROWS, ["on 3 photos"])
    assert "* on 3 photos" in text and text.index("## net") < text.index("## other")
    assert "| a | W4A4+ | body | **30.10/0.8800** | 4.50 | 1 T | 1 MB | 5.2 | 500 MB |" in text
    assert "| b | W4A4 | body | 29.00/0.8700 | 4.00 |  |  | 12 |  |" in text
    assert "| float |  |  | 31.50/0.9000 | 32.00 | 2 T |" in text
    assert "| c | W4A4 | body | failed |" in text and "* net c W4A4 body failed: ValueError: a | b c" in text
    assert "* net a W4A4 body: more bits at conv.input" in text
    assert "| a | W4A4 | body | 20.00/0.5000 |" in text and "**20" not in text


def test_csv() -> None:
    rows = list(csv.DictReader(to_csv(ROWS).splitlines()))
    assert [row["method"] for row in rows] == ["float", "a", "b", "c", "a"]
    assert (rows[1]["Two_psnr"], rows[1]["seconds"], rows[1]["memory_bytes"]) == ("30.104", "5.25", "500000000")
    assert rows[3]["Two_psnr"] == "" and rows[3]["note"] == "ValueError: a | b c" and rows[1]["One_psnr"] == ""


def test_html_holds_all_networks_and_failures() -> None:
    text = to_html(ROWS)
    assert all(part in text for part in ("other", "29.00", "30.10", "ValueError: a | b c"))


def test_plot(tmp_path: Path) -> None:
    own = networks_of(ROWS)["net"]
    ptq_plot(own, "Two", tmp_path / "plot.png", title="net")
    assert Image.open(tmp_path / "plot.png").width > 700
    for rows, test in ((own[:1], "Two"), (own, "Five")):
        with pytest.raises(ValueError, match="nothing to draw"):
            ptq_plot(rows, test, tmp_path / "no.png")


@pytest.mark.parametrize("lowest", [29.0, 9.0])
def test_scores_far_below_do_not_stretch_the_axis(lowest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are arrows at its left edge, with their values."""
    figures = []
    monkeypatch.setattr("qsr_plugin.report.ptq_plot.save_figure", lambda figure, path: figures.append(figure))
    row = PtqRow("net", "d", "W4A4", "body", {"Two": {"psnr": lowest, "ssim": 0.1, "fab": 4.0}})
    ptq_plot([*ROWS[:3], row], "Two", "plot.png")
    (axes,) = figures[0].axes
    assert 27 < axes.get_xlim()[0] < 29 and axes.get_xlim()[1] < 33
    assert f"{lowest:.2f}" in [text.get_text() for text in axes.texts]
    assert [line.get_marker() for line in axes.lines].count("<") == (lowest == 9.0)


def test_what_cannot_be_is_refused_before_any_work(data: Path, tmp_path: Path) -> None:
    """The message names what was given and what to do."""
    weights = demo.packaged_weights()
    for entry, told in (
        ("net.pth", "NAME:WEIGHTS"),
        ("auto:no.pth", "no.pth does not exist"),
        (f"edsr_small_x4:{weights}:2", "enlarges 4 times"),
    ):
        with pytest.raises(PtqTableError, match=told):
            read_network(entry)
    with pytest.raises(PtqTableError, match="'pams' needs a training"):
        read_methods(["pams"])
    with pytest.raises(RecipeError, match="Did you mean 'minmax'"):
        read_methods(["minmx"])
    (tmp_path / "minmax.yml").write_text("recipe: {base: omse}")
    with pytest.raises(PtqTableError, match="two methods are called 'minmax'"):
        read_methods(["minmax", str(tmp_path / "minmax.yml")])
    with pytest.raises(PtqTableError, match="Did you mean 'Other'"):
        ptq_table.sets_in(data, ["Othe"], 4)
    with pytest.raises(PtqTableError, match="LRbicx2"):
        ptq_table.sets_in(data, ["Two"], 2)
    two = [read_network(f"edsr_small_x4:{weights}")] * 2
    with pytest.raises(PtqTableError, match="two networks are called 'edsr_small_x4'"):
        plan(two, {}, [], [], crops=lambda one: None, tests=lambda one: {}, threads=1)
    (tmp_path / "ptq.json").write_text('{"rows": 3}')
    with pytest.raises(PtqTableError, match="no table of post-training methods: give another folder with -o"):
        ptq_table.kept_rows(tmp_path)


def test_rows_of_another_command_are_not_deleted(jobs: list[Job], made: list[str], tmp_path: Path) -> None:
    path = tmp_path / "ptq.json"
    write_results(ResultTable(rows=(jobs[0].result(), Result(label="pams W4A4"))), path)
    before = path.read_text()
    with pytest.raises(PtqTableError, match=r"ptq\.json: row '.*' does not say .*another folder with -o"):
        make_table(jobs, tmp_path)
    assert path.read_text() == before and made == []


def test_a_network_is_recognised_from_its_weights() -> None:
    weights = demo.packaged_weights()
    found, named = read_network(f"auto:{weights}"), read_network(f"edsr_small_x4:{weights}")
    assert (found.name, found.scale) == ("edsr_small_x4", 4) and dict(found.backbone) == dict(named.backbone)


def test_whole_table(
    script: Callable[[str], ModuleType], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One method works, one fails in its own row and says why; a second call makes nothing again."""
    tool, out, broken = script("ptq_table"), tmp_path / "out", tmp_path / "broken.yml"
    broken.write_text(
        yaml.safe_dump({"recipe": {"base": "percentile_ft", "losses": [{"type": "NoSuchLoss"}]}}), "utf-8"
    )
    arguments: dict[str, Any] = {
        "net": [f"edsr_small_x4:{demo.packaged_weights()}"], "photos": data / "photos", "images": None, "data": data,
        "sets": "Two,Other", "test": None, "method": f"{broken},minmax", "bits": "W4A4", "placement": "body", "crop": 16,
        "calibration_images": 2, "seed": 0, "threads": 1, "jobs": 2, "device": "cpu", "retry": False, "html": True,
        "imports": None,
    }  # fmt: skip
    tool.main(out=out, **arguments)
    text = (out / "ptq.json").read_text()
    rows = {row.method: row for row in read_table(out / "ptq.json").rows}
    assert set(rows) == {"float", "broken", "minmax"}
    assert "NoSuchLoss" in rows["broken"].note and not rows["broken"].quality
    assert "Traceback" in (out / "logs" / "edsr_small_x4_broken_W4A4_body.log").read_text()
    row = rows["minmax"]
    plain = rows["float"]
    assert row.note == "" and list(row.quality) == ["Two", "Other"] and row.costs.fab == 4
    assert row.quality["Two"].psnr < plain.quality["Two"].psnr and row.quality["Two"].images == 2
    assert row.costs.bitops < plain.costs.bitops and row.costs.storage_bits < plain.costs.storage_bits
    assert sum(row.seconds.values()) > 0 and row.peak_memory > 50e6 and plain.peak_memory is None
    assert row.label == "minmax W4A4" and row.architecture == "EDSR x4" and len(row.calibration.names) == 2
    points = {(point.label, point.test) for point in read_points(out / "ptq.json")}
    assert points == {(label, test) for label in ("float", "minmax W4A4") for test in ("Two", "Other")}
    for name in ("ptq.md", "ptq.html"):
        assert f"{row.quality['Two'].psnr:.2f}" in (out / name).read_text()
    assert len((out / "ptq.csv").read_text().splitlines()) == 4
    assert all((out / f"ptq_edsr_small_x4_{name}.png").is_file() for name in ("Two", "Other"))
    shown = capsys.readouterr().out
    assert "edsr_small_x4 minmax W4A4 body: Two" in shown and "Placement" in shown and "NoSuchLoss" in shown
    assert "2 rows at once" in (out / "ptq.md").read_text()
    assert "ptq.html, 2 plots to" in shown and "1 row(s) failed" in shown and "only with --retry" in shown
    folders = [data / name / what for name in ("Two", "Other") for what in ("HR", "LRbicx4")]
    tool.main(out=out, **{**arguments, "data": None, "test": folders})
    assert (out / "ptq.json").read_text() == text
    capsys.readouterr()
    tool.main(out=out, **{**arguments, "method": "minmax", "jobs": 1000})
    shown = capsys.readouterr().out
    assert "ptq.json also keeps 1 row(s) that this call did not ask for" in shown and "failed" not in shown
    assert "1000 rows at once with 1 thread(s) each wait for one another" in shown
    with pytest.raises(SystemExit):
        tool.main(out=out, **{**arguments, "method": "pams"})
    assert "needs a training" in capsys.readouterr().err
