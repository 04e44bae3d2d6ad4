"""``qsr report`` on networks whose bits depend on the image, in this process, with policies of the tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from qsr_plugin.archs.quant_net_arch import QuantNet
from typer.testing import CliRunner

from qsr_plugin import calibrate, cli, save_quantized
from tests.quant.choosers import recipe

BACKBONE = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 2, "upscale": 2}
PLACES = [f"body.{block}.conv{conv}.input" for block in (0, 1) for conv in (1, 2)]

pytestmark = pytest.mark.usefixtures("choosers")


def report(monkeypatch: pytest.MonkeyPatch, *arguments: object, fails: bool = False) -> str:
    """What ``qsr report`` says on a wide terminal."""
    monkeypatch.setattr(cli.console, "_width", 160)
    with cli.console.capture() as said:
        done = CliRunner().invoke(cli.app, ["report", *map(str, arguments)])
    assert (done.exit_code != 0) == fails, done.output
    return said.get() + done.output + str(done.exception or "")


@pytest.fixture
def net() -> torch.nn.Module:
    """A tiny EDSR whose bits follow the brightness: dark 4, medium 6, bright 8."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rules = [{"match": "body.*.conv?", "port": port} for port in ("input", "weight")]
        net = QuantNet(BACKBONE, recipe("toy_brightness", placements={"all": rules}))
        images = torch.stack([torch.full((3, 8, 8), value) for value in (0.3, 0.7)])
        return calibrate(net, images + 0.1 * torch.rand(2, 3, 8, 8))


@pytest.fixture
def model(net: torch.nn.Module, tmp_path: Path) -> Path:
    save_quantized(net, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A dark image and one that is half dark, half bright."""
    dark, half = np.full((20, 24, 3), 30, np.uint8), np.full((20, 48, 3), 30, np.uint8)
    half[:, 24:] = 230
    hr, lr = tmp_path / "Two" / "HR", tmp_path / "Two" / "LR"
    for folder, scale in ((hr, 2), (lr, 1)):
        folder.mkdir(parents=True)
        for name, image in (("a.png", dark), ("b.png", half)):
            Image.fromarray(image.repeat(scale, 0).repeat(scale, 1)).save(folder / name)
    return hr, lr


def test_a_network_that_never_ran_has_its_static_part(
    model: Path, net: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = report(monkeypatch, model, "--size", "12x20", "--sites", "--json", tmp_path / "r.json")
    assert said.count("no record") == 4 + 4, "FAB, BitOPs, and the inputs of four layers"
    data = json.loads((tmp_path / "r.json").read_text())
    costs = data["costs"]
    assert costs["fab"] is costs["bitops"] is costs["weighted_fab"] is None and data["quality"] == {}
    assert costs["macs"] > 0 and costs["storage_bits"] < costs["float_storage_bits"]
    file = tmp_path / "options.yml"
    file.write_text(
        json.dumps({"network_g": {"type": "QuantNet", "backbone": BACKBONE}, "recipe": net.recipe.to_dict()})
    )
    assert "no record" in report(monkeypatch, file, "--size", "12x20")


def test_whole_images(model: Path, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = report(monkeypatch, model, "--size", "12x20", "--test", *folders, "--sites", "--json", tmp_path / "r.json")
    assert "5.00 [4.00, 6.00]" in said and "4: 50 %, 6: 50 %" in said and "no record" not in said
    data = json.loads((tmp_path / "r.json").read_text())
    costs, quality = data["costs"], data["quality"]["Two"]
    assert costs["fab"] == quality["fab"] == 5.0 and quality["bitops"] == costs["bitops"]
    assert costs["protocol"] == quality["protocol"] == "whole images"
    assert (quality["images"], quality["border"], quality["colour"]) == (2, 2, "Y")
    assert quality["bits"]["places"] == dict.fromkeys(PLACES, 5.0)
    assert [site["act_bits"] for site in costs["sites"] if site["in_fab"]] == [5.0] * 4
    assert costs["bitops_quantized"] == sum(site["macs"] * 8 * 5 for site in costs["sites"] if site["in_fab"])


def test_patches(model: Path, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of the wider image start at 0, 11, 22 and 33, so half of them are dark; the smaller one has two."""
    cut = ("--patch", 12, "--overlap", 1, "--batch", 16)
    size = ("--size", "12x48")
    said = report(monkeypatch, model, *size, "--test", *folders, *cut, "--json", tmp_path / "r.json")
    assert "4: 75 %, 8: 25 %" in said and "5.00 [4.00, 6.00]" in said
    assert "12x48 (LR height x width), in patches of 12x12, overlap 1, last enlarged" in " ".join(said.split())
    data = json.loads((tmp_path / "r.json").read_text())
    assert (
        data["quality"]["Two"]["patches"] == data["costs"]["patches"] == {"size": 12, "overlap": 1, "last": "enlarge"}
    )
    whole = report(monkeypatch, model, *size, "--json", tmp_path / "w.json")
    assert "in patches" not in " ".join(whole.split())
    assert data["costs"]["macs"] / json.loads((tmp_path / "w.json").read_text())["costs"]["macs"] == (48 + 3) / 48


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--overlap", "6"), "give --patch as well"),
        (("--patch", "8", "--overlap", "8"), "the overlap must be 0 to 7"),
        (("--patch", "8", "--last", "grow"), "'shift' or 'enlarge'"),
    ],
)
def test_patches_that_cannot_be_cut(model: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple, says: str) -> None:
    assert says in report(monkeypatch, model, *arguments, fails=True)
