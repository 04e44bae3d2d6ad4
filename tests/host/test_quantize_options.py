"""What users ask of ``qsr quantize``: its options, what is written under which name, how runs end; in this process."""

from __future__ import annotations

import html
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from qsr_plugin import cli, load_quantized, quantize_report
from qsr_plugin.quantize_cli import DEFAULT_METHOD
from qsr_plugin.report.evaluate import evaluate
from qsr_plugin.report.result_files import read_points
from tests.host.harness import write_pairs

SAYS = Callable[..., str]


def test_weights_and_photos_are_enough(qsr: SAYS, weights: Path, photos: Path) -> None:
    said = qsr(weights, "--photos", photos)
    assert "tiny.pth: EDSR x2 (recognised)" in said and "num_feat 8" in said
    assert "quantized: 4 of 8 layers at W8A8; float: 4" in said
    assert "wrote tiny_minmax_w8a8.safetensors, tiny_minmax_w8a8.json and tiny_minmax_w8a8.html" in said
    assert "memory at its peak: " in said
    with torch.no_grad():
        assert load_quantized("tiny_minmax_w8a8.safetensors")(torch.rand(1, 3, 8, 8)).shape == (1, 3, 16, 16)
    data = json.loads(Path("tiny_minmax_w8a8.json").read_text())
    assert data["scale"] == 2 and data["seed"] == 0 and data["details"]["source"] == "recognised"
    assert data["details"]["device"] == "cpu"
    assert sorted(data["calibration"]["names"]) == ["photo0.png", "photo1.png", "photo2.png"]
    assert data["recipe"]["method"] == "minmax" and data["versions"]["torch"] == torch.__version__
    assert [group["bits"] for group in data["details"]["layers"]] == ["W8A8", "float"] and data["seconds"][
        "calibration"
    ] > 0
    page = Path("tiny_minmax_w8a8.html").read_text()
    assert "calibration image 3" in page and "photo0.png" in page and page.count("data:image/png;base64,") == 3 * 4


def test_a_network_that_is_far_from_the_float_one_is_told_everywhere(
    qsr: SAYS, weights: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_report, "_ALIKE", ((0, 200.0),))
    said = qsr(weights, "--photos", photos, "-o", "far")
    told = json.loads(Path("far.json").read_text())["details"]["warning"]
    assert re.match(r"[\d.]+ dB against the float network's output is low; 200 dB and more are usual", told)
    page = Path("far.html").read_text()
    assert f"warning: {told}" in said and told in html.unescape(page)
    assert "Memory at its peak" in page and "export far.safetensors --format packed" in page


def test_a_name_without_ending_and_a_folder_for_the_result(qsr: SAYS, weights: Path, photos: Path) -> None:
    assert "wrote mine.safetensors, mine.json and mine.html" in qsr(weights, "--photos", photos, "-o", "mine")
    Path("made").mkdir()
    said = qsr(weights, "--photos", photos, "-o", "made", "--threads", 1)
    assert "wrote made/tiny_minmax_w8a8.safetensors" in said and load_quantized("made/tiny_minmax_w8a8.safetensors")


@pytest.mark.parametrize(
    ("arguments", "plan"),
    [
        (["--method", "minmax"], "calibration"),
        (["--method", "percentile_ft", "--steps", 10], "calibration, 10 steps of tuning"),
        (["--no-tune"], "calibration, search for fragile places, each measured alone"),
    ],
)
def test_what_takes_time_is_told_before(
    qsr: SAYS, weights: Path, photos: Path, arguments: list[object], plan: str
) -> None:
    said = qsr(weights, "--photos", photos, *arguments)
    assert f"to do: {plan}; each shows the time it has left" in said.split("calibrating:")[0]


def test_defaults(qsr: SAYS, weights: Path, photos: Path) -> None:
    assert "layers at W4A4" in qsr(weights, "--photos", photos, "--no-tune")
    data = json.loads(Path("tiny_w4a4_untuned.json").read_text())
    assert data["method"] == DEFAULT_METHOD and data["recipe"]["bits"] == {"weight": 4, "act": 4}
    assert list(data["seconds"]) == ["calibration", "fragile places"] and data["tuned"] is False
    assert "not tuned" in Path("tiny_w4a4_untuned.html").read_text()


def test_several_test_sets(qsr: SAYS, weights: Path, photos: Path, tmp_path: Path) -> None:
    one, other = write_pairs(tmp_path / "One"), write_pairs(tmp_path / "Other")
    said = qsr(weights, "--photos", photos, "--test", *one, "--test", *other, "-o", "net.safetensors")
    assert "testing float on One" in said and "testing minmax W8A8 on Other" in said
    data = json.loads(Path("net.json").read_text())
    plain = data["reference"]["quality"]
    assert list(plain) == list(data["quality"]) == ["One", "Other"]
    assert data["details"]["tests"] == {"One": list(map(str, one)), "Other": list(map(str, other))}
    assert re.search(r"the float layers do \d\d% of all MACs; --placement full quantizes them", said)
    assert plain["One"]["psnr"] == plain["Other"]["psnr"]
    page = Path("net.html").read_text()
    assert page.count("original (HR)") == 2 * 3, "below and as the text of three pictures"
    assert {(point.label, point.test) for point in read_points(Path("net.json"))} == {
        (label, name) for label in ("float", "minmax W8A8") for name in ("One", "Other")
    }
    qsr(weights, "--photos", photos, "--test", *one, "--test", *reversed((one[1], one[0])), "-o", "two.safetensors")
    assert list(json.loads(Path("two.json").read_text())["quality"]) == ["One", "One (2)"]
    qsr(weights, "--photos", photos, "--test", *one, "-o", "one.safetensors")
    assert list(json.loads(Path("one.json").read_text())["quality"]) == ["One"], "as with several"


def test_a_placement_is_in_the_name(qsr: SAYS, weights: Path, photos: Path) -> None:
    said = qsr(weights, "--photos", photos, "--placement", "full")
    assert load_quantized("tiny_minmax_w8a8_full.safetensors").recipe.placement == "full"
    assert (
        "float layers do" not in said
        and "will be replaced" not in said
        and "qsr export tiny_minmax_w8a8_full.safetensors --format packed" in said
    )
    again = qsr(weights, "--photos", photos, "--placement", "full")
    assert "note: tiny_minmax_w8a8_full.safetensors is there and will be replaced" in again


def test_steps_of_the_tuning(qsr: SAYS, weights: Path, photos: Path) -> None:
    """They are in the name and the recipe; what has no tuning has none."""
    assert "'minmax' only calibrates" in qsr(weights, "--photos", photos, "--steps", "3", fails=True)
    said = qsr(weights, "--photos", photos, "--method", "auto", "--steps", "3", "--no-tune", fails=True)
    assert "--no-tune leaves out: give one of them" in said
    said = qsr(weights, "--photos", photos, "--method", "auto", "--bits", "W8A8", "--steps", "3")
    recipe = json.loads(Path("tiny_w8a8_3steps.json").read_text())["recipe"]
    assert [stage["iters"] for stage in recipe["stages"]] == [3] and "tuned in" in said
    assert load_quantized("tiny_w8a8_3steps.safetensors").recipe.stages[0].iters == 3


def test_an_interruption_is_told(qsr: SAYS, weights: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qsr_plugin.post_training.post_train", interrupted)
    said = qsr(weights, "--photos", photos, "-o", "net.safetensors", fails=True)
    assert "interrupted: net.safetensors is not written" in said


def test_an_interruption_of_the_scores_leaves_the_network(
    qsr: SAYS, weights: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qsr_plugin.quantize_report.write_page", interrupted)
    said = qsr(weights, "--photos", photos, "--method", "minmax", "-o", "net.safetensors", fails=True, leaves=2)
    assert "interrupted: net.safetensors is written, scores and page are not; qsr report net.safetensors --test" in said
    assert load_quantized("net.safetensors").recipe.method == "minmax" and not Path("net.html").exists()


@pytest.mark.parametrize("device", ["warp", "meta", "cuda:99"])
def test_a_device_that_is_not_there(qsr: SAYS, weights: Path, photos: Path, device: str) -> None:
    """Found out before the work; one without data computes nothing."""
    said = qsr(weights, "--photos", photos, "--device", device, fails=True)
    assert f"device is '{device}', which cannot be used here" in said and "calibrated" not in said


def test_too_little_memory_of_a_device(qsr: SAYS, weights: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore about it")

    monkeypatch.setattr("qsr_plugin.post_training.post_train", full)
    said = qsr(weights, "--photos", photos, fails=True)
    assert "cpu has too little memory: CUDA out of memory. Tried to allocate 2 GiB. Free some" in said
    assert "smaller calibration.batch, here 16" in said and "More about it" not in said


def test_what_ends_a_test_loses_nothing_made_before(
    qsr: SAYS, weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = write_pairs(tmp_path / "One"), write_pairs(tmp_path / "Other")

    def fails_on_other(net: nn.Module, hr: Path, *rest: object, **options: object) -> object:
        if hr == other[0]:
            raise KeyboardInterrupt
        return evaluate(net, hr, *rest, **options)

    monkeypatch.setattr(quantize_report, "evaluate", fails_on_other)
    CliRunner().invoke(
        cli.app,
        ["quantize", str(weights), "--photos", str(photos), "--method", "minmax", "-o", "net.safetensors"]
        + [str(part) for pair in (one, other) for part in ("--test", *pair)],
    )
    load_quantized("net.safetensors")
    data = json.loads(Path("net.json").read_text())
    assert list(data["reference"]["quality"]) == list(data["quality"]) == ["One"] and data["seconds"]["calibration"] > 0


def test_a_tuning_that_diverges_ends_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge() -> None:
        raise FloatingPointError("step 3: the gradient of conv_first.weight is not finite")

    monkeypatch.setattr(cli, "app", diverge)
    apart = SimpleNamespace(getLogger=logging.Logger, INFO=logging.INFO, WARNING=logging.WARNING)
    monkeypatch.setattr(cli, "logging", apart)  # handlers of the command line stay out of other tests
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "error: step 3: the gradient of conv_first.weight is not finite\n"


def test_a_method_of_a_training_says_so(qsr: SAYS, weights: Path, photos: Path) -> None:
    note = "is made for a training (qsr train); here it is only calibrated"
    assert f"'pams' {note}" in qsr(weights, "--photos", photos, "--method", "pams")
    assert note not in qsr(weights, "--photos", photos, "--method", "percentile_ft", "--no-tune")


def test_a_name_that_is_markup_stays_text(qsr: SAYS, tiny_net, photos: Path, tmp_path: Path) -> None:
    torch.save(tiny_net().state_dict(), tmp_path / "<b>[red]x&.pth")
    (photos / "photo0.png").rename(photos / "<img src=x onerror=alert(1)>.png")
    assert "<b>[red]x&.pth: EDSR x2" in qsr(tmp_path / "<b>[red]x&.pth", "--photos", photos)
    page = next(Path().glob("*.html")).read_text()
    assert "<img src=x" not in page and "&lt;img src=x onerror" in page and "<b>[red]" not in page


def test_adapting_methods_say_around_what(qsr: SAYS, weights: Path, photos: Path) -> None:
    said = qsr(weights, "--photos", photos, "--method", "adabm", "--bits", "w4a4", "--no-tune")
    assert "'adabm' adapts activations around 4 bits, 2 to 6: W4A4 is W4A4MP" in said
    assert "layers at W4A2-6" in said and Path("tiny_adabm_w4a4_untuned.safetensors").is_file()
