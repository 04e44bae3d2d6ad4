"""``tools/compare_methods.py``: the options of its runs, and a whole comparison of two methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import pytest
import yaml
from PIL import Image

from qsr_plugin import list_methods, load_quantized, load_recipe
from qsr_plugin.options_file import OptionsError, assemble, options_folder
from qsr_plugin.report import comparison_options, comparison_runs
from qsr_plugin.report.comparison_options import ComparisonError, Settings, published_recipe, training_options
from qsr_plugin.report.result_io import read_table
from qsr_plugin.report.result_schema import Result
from qsr_plugin.watched_run import Step, TrainingError
from tests.host.harness import write_data, write_photos
from tests.tools.conftest import TinyNetwork


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Training databases, and the argument that names a test set of two photos."""
    folder = tmp_path_factory.mktemp("data")
    hr, lr = write_photos(folder / "HR", 2, seed=1), folder / "LR"
    lr.mkdir()
    for path in hr.iterdir():
        cv2.imwrite(str(lr / path.name), cv2.resize(cv2.imread(str(path)), (16, 16), interpolation=cv2.INTER_AREA))
    return write_data(folder / "train"), f"Tiny={hr}:{lr}"


@pytest.fixture
def settings(network: TinyNetwork, inputs: tuple[Path, str]) -> Settings:
    """A comparison of 24 iterations."""
    return Settings(str(network.backbone), network.weights, inputs[0], {}, iters=24, batch=2, lq_size=8)


def test_static_methods_train_weights() -> None:
    """Every shipped recipe at one bit width that does more than calibrate."""
    found = comparison_options.static_methods()
    assert "pams" in found and not {"minmax", "percentile", "omse"} & set(found)
    assert set(found) <= set(list_methods())


def test_published_length_is_that_of_the_methods_files() -> None:
    """The longest, because short runs and demonstrations have files too; the shared one where there is none."""
    shared = assemble(options_folder() / "train" / "qat.yml")["train"]["total_iter"]
    assert comparison_options.published_iterations("pams", "edsr_small_x4") == shared == 30000
    assert comparison_options.published_iterations("no_such_method", "edsr_small_x4") == shared


def test_options_of_a_training(settings: Settings) -> None:
    """Recipe and backbone as asked, the schedule shortened by the shared rule, the rest equal for all methods."""
    options = training_options(settings, "pams", "W2A3", span=60.0)
    recipe = options["network_g"]["recipe"]
    assert recipe["bits"] == {"weight": 2, "act": 3} and options["network_g"]["backbone"]["num_feat"] == 8
    assert [stage.get("iters") for stage in recipe["stages"]] == [10, None]
    # 30000 published iterations are so many more that ranges get the most: the median width of ranges in all.
    assert recipe["stages"][0]["lr"]["ranges"] == pytest.approx(60 / 24)
    assert not recipe["stages"][0]["freeze_batch_norm"]
    frozen = training_options(replace(settings, freeze_batch_norm=True), "pams", "W2A3", 60.0)["network_g"]["recipe"]
    assert all(stage["freeze_batch_norm"] for stage in frozen["stages"])
    assert recipe["losses"] == load_recipe("pams").to_dict()["losses"]
    assert options["train"]["total_iter"] == 24 and options["train"]["scheduler"]["milestones"] == [12, 18]
    train = options["datasets"]["train"]
    assert (train["gt_size"], train["batch_size_per_gpu"]) == (32, 2) and list(options["datasets"]) == ["train"]
    other = training_options(settings, "omse", "W2A3", 60.0)
    same = ("scale", "datasets", "train", "logger", "path", "manual_seed")
    assert {key: options[key] for key in same} == {key: other[key] for key in same}


def test_a_recipe_is_that_of_the_option_file_for_the_backbone(settings: Settings) -> None:
    """DDTB quantizes other places of networks with batch norm; PAMS freezes theirs at 2 bits, and at 2 bits only."""
    ddtb, plain = (published_recipe("ddtb", backbone, "W3A3") for backbone in ("srresnet_x4", "edsr_small_x4"))
    assert (ddtb["placement"], plain["placement"]) == ("body", "quantized_input")
    assert all(stage["freeze_batch_norm"] for stage in published_recipe("pams", "srresnet_x4", "W2A2")["stages"])
    assert "freeze_batch_norm" not in published_recipe("pams", "srresnet_x4", "W4A4")["stages"][0]
    assert published_recipe("pams", "another_net", "W4A4") == "pams"


def test_same_placement_is_the_common_one(settings: Settings) -> None:
    """``same`` takes the placement that every recipe has."""
    options = training_options(replace(settings, placement="same"), "percentile", "W4A4", 60.0)
    assert options["network_g"]["recipe"]["placement"] == "body"


@pytest.mark.parametrize(("backbone", "bits", "told"), [("edsr_smal_x4", "W4A4", "Did you mean"), (None, "4", "W4A4")])
def test_wrong_names_are_explained(settings: Settings, backbone: str | None, bits: str, told: str) -> None:
    """A misspelt backbone gets the near name, odd bits an example."""
    with pytest.raises(OptionsError, match=told):
        training_options(replace(settings, backbone=backbone or settings.backbone), "pams", bits, 60.0)


def test_pixel_range_is_that_inside_the_network(settings: Settings) -> None:
    """A run longer than the published one keeps its rates: a 255th of them where there is no ``img_range``."""
    long = replace(settings, iters=10**6)
    for backbone, rate in ((settings.backbone, 1e-2), ("srresnet_x4", 1e-2 / 255)):
        recipe = training_options(replace(long, backbone=backbone), "pams", "W4A4", 1.0)["network_g"]["recipe"]
        assert recipe["stages"][0]["lr"]["ranges"] == pytest.approx(rate)


def test_jobs_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would train in one folder; the same job twice is done once."""
    monkeypatch.chdir(tmp_path)
    for name in ("pams.yml", "odm.yml"):
        Path(name).write_text("recipe: {base: pams}", "utf-8")
    comparison_options.check_jobs([("odm", "W4A4"), ("odm", "W2A2"), ("pams.yml", "W4A4"), ("odm", "W4A4")])
    with pytest.raises(ComparisonError, match="odm W4A4 and odm.yml W4A4 would both be kept as odm_w4a4"):
        comparison_options.check_jobs([("odm", "W4A4"), ("odm.yml", "W4A4")])


@pytest.mark.parametrize(
    ("method", "says"), [("lsqq", "unknown method 'lsqq'. Did you mean 'lsq'"), ("no.yml", "no.yml does not exist")]
)
def test_unknown_methods_are_refused_before_anything_trains(method: str, says: str) -> None:
    with pytest.raises(ComparisonError, match=says):
        comparison_options.check_jobs([("odm", "W4A4"), (method, "W4A4")])


def test_time_is_the_median_between_lines_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before the first line does not count; without two lines there is no time, which is said."""
    told = [(1, 9.0), (5, 9.4), (6, 10.4), (10, 11.2), (14, 11.8)]  # 0.1, 1, 0.2 and 0.15 s an iteration

    def train(options: dict[str, Any], folder: Path, watch: Callable[[Step], None]) -> Path:
        for iteration, now in told:
            monkeypatch.setattr(comparison_runs.time, "perf_counter", lambda now=now: now)
            watch(Step(iteration=iteration, loss=0.1))
            watch(Step(psnr=30.0))
        return folder / "net"

    monkeypatch.setattr(comparison_runs, "train", train)
    seen: list[Step] = []
    path, seconds = comparison_runs._timed({}, tmp_path, seen.append)
    assert path == tmp_path / "net" and seconds == pytest.approx(0.175)
    assert [step.iteration for step in seen[::2]] == [1, 5, 6, 10, 14]
    for few in (told[:1], []):
        told[:] = few
        with pytest.raises(TrainingError, match=rf"logged {len(few)} iteration\(s\)"):
            comparison_runs._timed({}, tmp_path, seen.append)


@pytest.mark.parametrize("iters", [20, 1000, 2050, 30000])
def test_float_timing_logs_often_enough_however_long_the_trainings(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iters: int
) -> None:
    """At least seven windows beside the first; the timing run itself stays short."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(comparison_runs, "_timed", lambda options, *_: (asked.append(options), 0.5))
    assert comparison_runs.time_float(replace(settings, iters=iters), tmp_path) == 0.5
    total, every = asked[0]["train"]["total_iter"], asked[0]["logger"]["print_freq"]
    assert total == min(iters, 40) and total // every >= 8


def test_whole_comparison(
    script: Callable[[str], ModuleType],
    network: TinyNetwork,
    inputs: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One method trains, two fail each in its own row; a second call trains nothing anew; other settings are refused."""
    tool, out = script("compare_methods"), tmp_path / "out"
    broken, nothing = tmp_path / "broken.yml", tmp_path / "nothing.yml"
    nothing.write_text("recipe: {base: of_nothing}", "utf-8")
    lr = {"weights": 1.0e30, "ranges": 1.0e-3}
    broken.write_text(yaml.safe_dump({"recipe": {"base": "pams", "losses": [], "stages": [{"lr": lr}]}}), "utf-8")
    arguments: dict[str, Any] = {
        "backbone": str(network.backbone), "weights": network.weights, "methods": f"{broken},pams,{nothing}",
        "bits": "W4A4", "placement": "published", "iters": 20, "batch": 2, "lq_size": 8, "lr": None,
        "milestones": "0.5,0.75", "seed": 0, "data": inputs[0], "test": [inputs[1]],
    }  # fmt: skip
    tool.main(out=out, **arguments)
    rows = {row.label: row for row in read_table(out / "comparison.json").rows}
    assert list(rows) == ["float", "broken W4A4", "pams W4A4", "nothing W4A4"]
    assert "not finite" in rows["broken W4A4"].note and not rows["broken W4A4"].quality
    assert "unknown recipe" in rows["nothing W4A4"].note
    row = rows["pams W4A4"]
    assert row.before["Tiny"].psnr != row.quality["Tiny"].psnr and row.network == "tiny_edsr" and row.scale == 4
    assert row.costs.fab == 4 and row.costs.bitops < rows["float"].costs.bitops and row.costs.storage_bits > 0
    assert row.training.seconds > 0 and row.training.float_seconds > 0 and not row.note
    span = read_table(out / "comparison.json").settings["span"]
    trained_with = load_quantized(out / "models" / "pams_w4a4.safetensors").recipe.stages
    assert span > 0 and trained_with[0].lr.ranges == pytest.approx(max(span / 20, 1e-2))
    table = (out / "comparison.md").read_text()
    assert f"{rows['pams W4A4'].quality['Tiny'].psnr:.2f}" in table and "not finite" in table
    assert len((out / "comparison.csv").read_text().splitlines()) == 5
    for plot in ("tradeoff.png", "gain.png"):
        assert Image.open(out / plot).width == 1152
    assert load_quantized(out / "models" / "pams_w4a4.safetensors").recipe.method == "pams"

    def unexpected(*_: object) -> None:
        raise AssertionError("measured before")

    trained: list[str] = []
    monkeypatch.setattr(comparison_runs, "float_span", unexpected)
    monkeypatch.setattr(comparison_runs, "train", lambda options, *_: trained.append(options["name"]))
    tool.main(out=out, **{**arguments, "methods": "pams"})
    assert trained == []
    assert read_table(out / "comparison.json").rows == (rows["float"], row)
    with pytest.raises(SystemExit):
        tool.main(out=out, **{**arguments, "iters": 21})
    (tmp_path / "pams.yml").write_text("recipe: {base: pams}", "utf-8")
    with pytest.raises(SystemExit):
        tool.main(out=out, **{**arguments, "methods": f"pams,{tmp_path / 'pams.yml'}"})
    assert "would both be kept as pams_w4a4" in " ".join(capsys.readouterr().err.split())
    assert trained == []


def test_kept_rows_of_other_settings_are_refused(settings: Settings, tmp_path: Path) -> None:
    """The message names what differs."""
    path = tmp_path / "row.json"
    comparison_runs.save_rows([], settings.to_dict(), path)
    assert comparison_runs.kept_rows(settings.to_dict(), path) == []
    with pytest.raises(ComparisonError, match="iters: 24, now 25"):
        comparison_runs.kept_rows(replace(settings, iters=25).to_dict(), path)


def test_files_that_hold_no_results_are_refused(settings: Settings, tmp_path: Path) -> None:
    """Such as the rows of an earlier version."""
    path = tmp_path / "row.json"
    path.write_text('{"settings": {}, "rows": []}', "utf-8")
    with pytest.raises(ComparisonError, match=r"row\.json is no result file.*Give another folder with -o"):
        comparison_runs.kept_rows(settings.to_dict(), path)


def test_kept_rows_of_another_recipe_are_refused(settings: Settings, tmp_path: Path) -> None:
    """A recipe file that was edited since, or ranges of another reach; rows that tell no recipe are refused as well."""
    mine, path = tmp_path / "mine.yml", comparison_runs.result_path(tmp_path, "mine.yml", "W4A4")

    def write(weight: float) -> None:
        losses = [{"type": "SKTLoss", "loss_weight": weight}]
        mine.write_text(yaml.safe_dump({"recipe": {"base": "pams", "losses": losses}}), "utf-8")

    def kept(span: float = 60.0) -> list[Result] | None:
        return comparison_runs.kept_method(settings, str(mine), "W4A4", span, tmp_path)

    write(2.0)
    assert kept() is None
    recipe = training_options(settings, str(mine), "W4A4", 60.0)["network_g"]["recipe"]
    path.parent.mkdir()
    comparison_runs.save_rows([], {**settings.to_dict(), "recipe": recipe}, path)
    assert kept() == []
    with pytest.raises(ComparisonError, match=r"recipe\.stages\[0\]\.lr\.ranges: 2\.5, now 1\.25;"):
        kept(span=30.0)
    write(3.0)
    with pytest.raises(ComparisonError, match=r"\(recipe\.losses\[0\]\.loss_weight: 2\.0, now 3\.0\)"):
        kept()
    comparison_runs.save_rows([], settings.to_dict(), path)
    with pytest.raises(ComparisonError, match="recipe: None, now "):
        kept()
