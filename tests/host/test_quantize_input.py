"""What users give to ``qsr quantize``: all kinds of images, and files and folders that cannot be used; in this process."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from qsr_plugin import save_quantized
from qsr_plugin.data.calibration_set import crops_from_folder
from qsr_plugin.float_networks import check_enlarges, open_float_network
from qsr_plugin.quant.surgery import quantize_model
from tests.host.harness import write_pairs, write_photos

SAYS = Callable[..., str]


# -- images ------------------------------------------------------------------------------------------------------------


def write_all_kinds(folder: Path) -> list[str]:
    """One image of each kind that there is."""
    folder.mkdir()
    colour = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    rgb, grey16 = Image.fromarray(colour), colour[..., 0].astype(np.uint16) * 257
    kinds = {
        "grey.png": rgb.convert("L"),
        "grey_alpha.png": rgb.convert("LA"),
        "palette.png": rgb.convert("P"),
        "alpha.png": rgb.convert("RGBA"),
        "bilevel.png": rgb.convert("1"),
        "grey16.png": Image.fromarray(grey16),
        "cmyk.jpg": rgb.convert("CMYK"),
        "grey.jpg": rgb.convert("L"),
        "plain.webp": rgb,
        "plain.bmp": rgb,
    }
    for name, image in kinds.items():
        image.save(folder / name)
    return sorted(kinds)


@pytest.mark.parametrize("option", ["--photos", "--images"])
def test_all_kinds_of_images(qsr: SAYS, weights: Path, tmp_path: Path, option: str) -> None:
    names = write_all_kinds(tmp_path / "kinds")
    qsr(weights, option, tmp_path / "kinds")
    assert sorted(json.loads(Path("tiny_minmax_w8a8.json").read_text())["calibration"]["names"]) == names


def test_two_images_work_with_a_note(qsr: SAYS, weights: Path, photos: Path) -> None:
    (photos / "photo2.png").unlink()
    assert "only 2 image(s) to calibrate on; 16 or more are advised" in qsr(weights, "--photos", photos)


def test_unreadable_images_are_left_out_and_named(qsr: SAYS, weights: Path, photos: Path) -> None:
    (photos / "broken.png").write_bytes((photos / "photo0.png").read_bytes()[:200])
    (photos / "text.jpg").write_text("no image")
    Image.new("RGB", (1, 9)).save(photos / "thin.png")
    said = qsr(weights, "--photos", photos)
    assert "broken.png: is damaged" in said and "text.jpg: is not a PNG" in said and "thin.png: is 1x9" in said
    assert f"3 image(s) of {photos} left out, 3 used" in said
    assert len(json.loads(Path("tiny_minmax_w8a8.json").read_text())["calibration"]["names"]) == 3


@pytest.mark.parametrize(("option", "factor"), [("--images", 1), ("--photos", 2)])
def test_images_of_a_few_pixels_are_left_out(
    qsr: SAYS, weights: Path, tmp_path: Path, option: str, factor: int
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    for side in (7, 8):
        Image.new("RGB", (9 * factor, side * factor), "teal").save(folder / f"{side}.png")
    said = qsr(weights, option, folder)
    reduced = ", and 9x7 when reduced 2 times" if factor > 1 else ""
    told = f"7.png: is {9 * factor}x{7 * factor}{reduced}: too small to calibrate on, 8x8 are needed"
    assert told in said and f"1 image(s) of {folder} left out, 1 used" in said


def test_no_image_that_can_be_used(qsr: SAYS, weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    assert "found it empty" in qsr(weights, "--images", folder, fails=True)
    (folder / "a.txt").write_text("a")
    assert "found 1 other entries (a.txt)" in qsr(weights, "--images", folder, fails=True)
    (folder / "a.png").write_bytes(b"")
    said = qsr(weights, "--images", folder, fails=True)
    assert "none of the 1 image(s)" in said and "a.png: is empty (0 bytes)" in said
    assert "found a file" in qsr(weights, "--images", folder / "a.png", fails=True)
    assert "found nothing" in qsr(weights, "--images", folder / "b", fails=True)
    assert "give one of --images" in qsr(weights, fails=True)
    assert "give one of --images" in qsr(weights, "--images", folder, "--photos", folder, fails=True)


def test_test_sets_are_checked_before_the_work(qsr: SAYS, weights: Path, photos: Path, tmp_path: Path) -> None:
    hr, lr = write_pairs(tmp_path / "Set")
    other = write_photos(tmp_path / "Other" / "LR", 2, side=16)
    said = qsr(weights, "--photos", photos, "--test", hr, other, fails=True)
    assert "HR must be exactly 2 times LR" in said and "calibrated" not in said and "reading images" not in said
    (lr / "photo1.png").write_bytes(b"x")
    assert "photo1.png: is not a PNG" in qsr(weights, "--photos", photos, "--test", hr, lr, fails=True)
    (lr / "photo1.png").unlink()
    assert "photo1.png: no partner in" in qsr(weights, "--photos", photos, "--test", hr, lr, fails=True)
    assert "--test takes two folders" in qsr(weights, "--photos", photos, "--test", hr, fails=True)
    for given in (["--test", hr, "--seed", "1"], ["--test", hr, "-o", "net.safetensors"], [f"--test={hr}"]):
        assert "--test takes two folders" in qsr(weights, "--photos", photos, *given, fails=True)


# -- weights -----------------------------------------------------------------------------------------------------------


def write_evil(path: Path, tiny_net: Callable[..., nn.Module]) -> None:
    torch.save(tiny_net(), path)  # a pickled module


def write_quantized(path: Path, tiny_net: Callable[..., nn.Module]) -> None:
    net = quantize_model(tiny_net(), "minmax")
    save_quantized(net, path.with_suffix(".safetensors"))
    torch.save(net.state_dict(), path)


def write_nan(path: Path, tiny_net: Callable[..., nn.Module]) -> None:
    state = tiny_net().state_dict()
    state["conv_last.bias"][0] = float("nan")
    torch.save(state, path)


def write_classifier(path: Path, tiny_net: Callable[..., nn.Module]) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 10)).state_dict(), path)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path, net: path.write_bytes(b""), "is empty (zero bytes)"),
        (lambda path, net: path.write_bytes(b"<!DOCTYPE html><html></html>"), "is an HTML or XML page (a failed downl"),
        (write_evil, "save net.state_dict() instead of the network itself"),
        (write_quantized, "is a quantized checkpoint, a float one is wanted here"),
        (write_nan, "the weights are damaged"),
        (write_classifier, "are those of no network known here. Tried: the networks of BasicSR"),
        (write_classifier, "give --arch FILE, a YAML file with a network_g block"),
        (lambda path, net: torch.save({"epoch": 3}, path), "is not a state dict (entries: epoch)"),
        (lambda path, net: torch.save({}, path), "is not a state dict (entries: none, it is empty)"),
        (lambda path, net: torch.save(torch.ones(2), path), "holds a Tensor"),
    ],
)
def test_what_is_no_float_checkpoint(
    qsr: SAYS, tiny_net, photos: Path, tmp_path: Path, write: Callable, says: str
) -> None:
    write(tmp_path / "net.pth", tiny_net)
    assert says in qsr(tmp_path / "net.pth", "--photos", photos, fails=True)


@pytest.mark.parametrize(
    ("installed", "says"), [(False, "spandrel knows more: pip install spandrel"), (True, "and sp")]
)
def test_unknown_networks_are_also_looked_for_in_spandrel(
    qsr: SAYS, tiny_net, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, says: str
) -> None:
    asked: list[int] = []
    fake = ModuleType("spandrel_arch")
    fake.recognise_with_spandrel = lambda state: asked.append(len(state))
    monkeypatch.setitem(sys.modules, "qsr_plugin.archs.spandrel_arch", fake)
    find = importlib.util.find_spec
    found = {"spandrel": installed or None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found[name] if name in found else find(name, *rest)
    )
    write_classifier(tmp_path / "net.pth", tiny_net)
    assert says in qsr(tmp_path / "net.pth", "--photos", photos, fails=True)
    assert asked == [4] * installed


def test_a_quantized_model_of_ours_given_as_float(qsr: SAYS, tiny_net, photos: Path, tmp_path: Path) -> None:
    write_quantized(tmp_path / "net.pth", tiny_net)
    said = qsr(tmp_path / "net.safetensors", "--photos", photos, fails=True)
    assert "is a quantized checkpoint, a float one is wanted here" in said


def test_scales(qsr: SAYS, weights: Path, photos: Path, tmp_path: Path) -> None:
    qsr(weights, "--photos", photos, "--scale", "2", "-o", tmp_path / "ok.safetensors")
    assert "--scale is 4, but" in (said := qsr(weights, "--photos", photos, "--scale", "4", fails=True))
    assert "tiny.pth enlarges 2 times" in said
    said = qsr(weights, "--photos", photos, "--arch", "edsr_small_x4", fails=True)
    assert "does not fit EDSR" in said and "Check backbone type, sizes and scale" in said


def test_networks_for_other_images(qsr: SAYS, tiny_net, photos: Path, tmp_path: Path) -> None:
    torch.save(tiny_net("MSRResNet", num_in_ch=1, num_out_ch=1).state_dict(), tmp_path / "grey.pth")
    said = qsr(tmp_path / "grey.pth", "--photos", photos, fails=True)
    assert "MSRResNet does not take an RGB image" in said


def test_the_weights_are_not_overwritten(qsr: SAYS, tiny_net, photos: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tiny_net().state_dict(), tmp_path / "net.safetensors")
    given = (tmp_path / "net.safetensors", "--photos", photos, "-o", tmp_path / "net.safetensors")
    assert "is the file of the float weights" in qsr(*given, fails=True)


def test_wrong_options_that_leave_no_trace_are_noticed(
    qsr: SAYS, tiny_net, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that copies its input, once with the range of pixels it was made for and once with another."""
    net = tiny_net("MSRResNet")
    for parameter in net.parameters():
        parameter.data.zero_()  # what is left is the bilinear enlargement
    torch.save(net.state_dict(), tmp_path / "bilinear.pth")
    crop = next(crops_from_folder(photos, images=1, batch=1, scale=2))
    assert check_enlarges(open_float_network(tmp_path / "bilinear.pth"), crop) > 20
    net.conv_last.bias.data.fill_(0.4)
    torch.save(net.state_dict(), tmp_path / "shifted.pth")
    assert "does not enlarge a calibration image" in qsr(tmp_path / "shifted.pth", "--photos", photos)
