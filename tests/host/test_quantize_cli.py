"""``qsr quantize`` with a method that tunes: calibrate, tune, save, report, on the shipped network and tiny crops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qsr_plugin import load_quantized, load_recipe
from qsr_plugin.options_file import OptionsError, parse_bits
from tests.host import harness
from tests.host.harness import qsr
from tests.host.test_cli import WEIGHTS

RATES = {"weight_ranges": 1.0e-2, "ranges": 1.0e-2, "bits": 1.0e-2, "thresholds": 1.0e-1}
STAGES = [
    {"train": train, "iters": 1, "freeze_batch_norm": True, "lr": {name: RATES[name] for name in train}}
    for train in (["weight_ranges"], ["ranges"], ["bits", "thresholds"])
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.write_photos(tmp_path_factory.mktemp("photos"), 4, side=64)


def quantize(folder: Path, photos: Path, *arguments: object, fails: bool = False) -> str:
    recipe = {"base": "adabm", "stages": STAGES, "calibration": {"images": 4, "batch": 2, "fit": 2}}
    (folder / "recipe.yml").write_text(json.dumps(recipe))
    given = ("--arch", "edsr_small_x4", "--photos", photos, "--bits", "W4A4MP", "--method", "recipe.yml")
    return " ".join(qsr(folder, "quantize", WEIGHTS, *given, *arguments, fails=fails).split())


def test_calibrated_tuned_and_scored(photos: Path, tmp_path: Path) -> None:
    small = harness.write_photos(tmp_path / "LR", 4, side=16)
    said = quantize(tmp_path, photos, "-o", "net.safetensors", "--test", photos, small)
    assert "calibrated in" in said and "tuned in" in said and "clipping: " in said and "thresholds: " in said
    figures = json.loads((tmp_path / "net.json").read_text())
    assert list(figures["seconds"]) == [
        "calibration",
        "clipping",
        "teacher",
        "weight_ranges",
        "ranges",
        "bits, thresholds",
    ]
    assert figures["label"] == "adabm W4A4MP" and figures["reference"]["label"] == "float"
    plain, result = (one["quality"][photos.parent.name] for one in (figures["reference"], figures))
    assert 2 <= result["fab"] <= 6 and result["fab"] == pytest.approx(figures["costs"]["fab"], abs=1e-6)
    assert result["bitops"] == figures["costs"]["bitops"] < plain["bitops"]
    assert figures["costs"]["storage_bits"] < figures["reference"]["costs"]["storage_bits"]
    assert len({image["fab"] for image in result["by_image"]} | {4.0}) > 1, "bits are not those of a fixed method"
    net = load_quantized(tmp_path / "net.safetensors")
    with torch.no_grad():
        net(torch.rand(2, 3, 8, 8))
    assert all(bits.shape == (2,) for bits in net.last_record().bits.values())


def test_without_tuning_and_test_set(photos: Path, tmp_path: Path) -> None:
    said = quantize(tmp_path, photos, "-o", "net.safetensors", "--no-tune")
    figures = json.loads((tmp_path / "net.json").read_text())
    assert "tuned in" not in said and list(figures["seconds"]) == ["calibration", "clipping"]
    assert figures["costs"]["fab"] is None, "no test set was run"
    assert "'adabm' chooses bits by the image: for FAB and BitOPs, give --test" in " ".join(said.split())
    quantize(tmp_path, photos, "-o", "again.safetensors", "--no-tune")
    one, other = (load_quantized(tmp_path / f"{name}.safetensors").state_dict() for name in ("net", "again"))
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_adaptive_bits_of_a_fixed_method_end_in_a_sentence(photos: Path, tmp_path: Path) -> None:
    said = quantize(tmp_path, photos, "-o", "net.safetensors", "--method", "minmax", fails=True)
    assert "W4A4MP asks for adaptive bits, which 'minmax' has not" in said.replace("│ ", "")
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("method", ["cadyq", "granular_dq"])
def test_methods_that_learn_to_choose_need_a_training(method: str, photos: Path, tmp_path: Path) -> None:
    said = quantize(tmp_path, photos, "-o", "net.safetensors", "--method", method, fails=True)
    assert f"'{method}' chooses among several widths" in said.replace("│ ", "")
    assert not list(tmp_path.glob("*.safetensors"))


def test_adaptive_bits_in_short() -> None:
    """The number is the middle; the policy of the recipe says how far it goes."""
    assert parse_bits("W8A6MP") == parse_bits("w8a6mp") == (8, 6)
    recipe = load_recipe("adabm", weight_bits=8, act_bits=6)
    assert recipe.bits.act == 6 and recipe.act_widths == (4, 5, 6, 7, 8)
    with pytest.raises(OptionsError, match="bits are 'W4A4M'"):
        parse_bits("W4A4M")
