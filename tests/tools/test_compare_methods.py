"""``tools/compare_methods.py``: the options of its runs, and a whole comparison of two methods."""

from __future__ import annotations

import json
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
from qsr_plugin.options_file import assemble, options_folder
from qsr_plugin.report import comparison_options, comparison_runs
from qsr_plugin.report.comparison_options import ComparisonError, Settings, training_options
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
    options = training_options(settings, "pams", "W2A3")
    recipe = options["network_g"]["recipe"]
    assert recipe["bits"] == {"weight": 2, "act": 3} and options["network_g"]["backbone"]["num_feat"] == 8
    assert [stage.get("iters") for stage in recipe["stages"]] == [10, None]
    # 30000 published iterations are so many more that ranges get the most: a quarter of the pixel range in all.
    assert recipe["stages"][0]["lr"]["ranges"] == pytest.approx(255 / 4 / 24)
    assert not recipe["stages"][0]["freeze_batch_norm"]
    frozen = training_options(replace(settings, freeze_batch_norm=True), "pams", "W2A3")["network_g"]["recipe"]
    assert all(stage["freeze_batch_norm"] for stage in frozen["stages"])
    assert recipe["losses"] == load_recipe("pams").to_dict()["losses"]
    assert options["train"]["total_iter"] == 24 and options["train"]["scheduler"]["milestones"] == [12, 18]
    train = options["datasets"]["train"]
    assert (train["gt_size"], train["batch_size_per_gpu"]) == (32, 2) and list(options["datasets"]) == ["train"]
    other = training_options(settings, "omse", "W2A3")
    same = ("scale", "datasets", "train", "logger", "path", "manual_seed")
    assert {key: options[key] for key in same} == {key: other[key] for key in same}


def test_same_placement_is_the_common_one(settings: Settings) -> None:
    """``same`` takes the placement that every recipe has."""
    options = training_options(replace(settings, placement="same"), "percentile", "W4A4")
    assert options["network_g"]["recipe"]["placement"] == "body"


@pytest.mark.parametrize(("backbone", "bits", "told"), [("edsr_smal_x4", "W4A4", "Did you mean"), (None, "4", "W4A4")])
def test_wrong_names_are_explained(settings: Settings, backbone: str | None, bits: str, told: str) -> None:
    """A misspelt backbone gets the near name, odd bits an example."""
    with pytest.raises(ComparisonError, match=told):
        training_options(replace(settings, backbone=backbone or settings.backbone), "pams", bits)


def test_whole_comparison(
    script: Callable[[str], ModuleType],
    network: TinyNetwork,
    inputs: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One method trains, two fail each in its own row; a second call trains nothing anew; other settings are refused."""
    tool, out = script("compare_methods"), tmp_path / "out"
    broken = tmp_path / "broken.yml"
    lr = {"weights": 1.0e30, "ranges": 1.0e-3}
    broken.write_text(yaml.safe_dump({"recipe": {"base": "pams", "losses": [], "stages": [{"lr": lr}]}}), "utf-8")
    arguments: dict[str, Any] = {
        "backbone": str(network.backbone), "weights": network.weights, "methods": f"{broken},pams,nothing",
        "bits": "W4A4", "placement": "published", "iters": 20, "batch": 2, "lq_size": 8, "lr": None,
        "milestones": "0.5,0.75", "seed": 0, "data": inputs[0], "test": [inputs[1]],
    }  # fmt: skip
    tool.main(out=out, **arguments)
    rows = {row["label"]: row for row in json.loads((out / "comparison.json").read_text())["rows"]}
    assert list(rows) == ["float", "broken W4A4", "pams W4A4", "nothing W4A4"]
    assert "not finite" in rows["broken W4A4"]["note"] and not rows["broken W4A4"]["end"]
    assert "unknown recipe" in rows["nothing W4A4"]["note"]
    row = rows["pams W4A4"]
    assert row["start"]["Tiny"]["psnr"] != row["end"]["Tiny"]["psnr"]
    assert row["fab"] == 4 and row["bitops"] < rows["float"]["bitops"] and row["storage_bits"] > 0
    assert row["seconds"] > 0 and row["float_seconds"] > 0 and not row["note"]
    table = (out / "comparison.md").read_text()
    assert f"{rows['pams W4A4']['end']['Tiny']['psnr']:.2f}" in table and "not finite" in table
    assert len((out / "comparison.csv").read_text().splitlines()) == 5
    for plot in ("tradeoff.png", "gain.png"):
        assert Image.open(out / plot).width == 1152
    assert load_quantized(out / "models" / "pams_w4a4.safetensors").recipe.method == "pams"

    trained: list[str] = []
    monkeypatch.setattr(comparison_runs, "train", lambda options, *_: trained.append(options["name"]))
    tool.main(out=out, **{**arguments, "methods": "pams"})
    assert trained == []
    again = json.loads((out / "comparison.json").read_text())["rows"]
    assert again == [rows["float"], row]
    with pytest.raises(SystemExit):
        tool.main(out=out, **{**arguments, "iters": 21})
    assert trained == []


def test_kept_rows_of_other_settings_are_refused(settings: Settings, tmp_path: Path) -> None:
    """The message names what differs."""
    path = tmp_path / "row.json"
    comparison_runs.save_rows([], settings, path)
    assert comparison_runs.kept_rows(settings, path) == []
    with pytest.raises(ComparisonError, match="iters: 24, now 25"):
        comparison_runs.kept_rows(replace(settings, iters=25), path)
