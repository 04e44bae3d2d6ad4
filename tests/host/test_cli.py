"""The ``qsr`` command line on the shipped network and synthetic photos; with QSR_DATA, on the public SRResNet."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path

import pytest
import torch

from qsr_plugin import load_quantized, set_depth
from tests.host import harness
from tests.host.harness import qsr

WEIGHTS = Path(str(resources.files("qsr_plugin.assets"))) / "edsr_small_x4.safetensors"
DATA = os.environ.get("QSR_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="needs benchmark images and weights: set QSR_DATA to their folder")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.write_photos(tmp_path_factory.mktemp("photos"), 5, side=96)


@pytest.fixture(scope="module")
def quantized(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("quantized") / "net.safetensors"
    said = qsr(
        out.parent, "quantize", WEIGHTS, "--arch", "edsr_small_x4", "--photos", photos, "--bits", "W4A6",
        "--method", "percentile", "--placement", "full", "-o", out, starts=True,
    )  # fmt: skip
    return out, said


def test_quantize_writes_a_network_and_its_costs(quantized: tuple[Path, str]) -> None:
    out, said = quantized
    assert "loaded 42 of 42 keys" in said and "calibrated" in said and "5 image(s)" in said
    figures = json.loads(out.with_suffix(".json").read_text())
    assert figures["costs"]["fab"] == 6 and figures["label"] == "percentile W4A6"
    net = load_quantized(out)
    with torch.no_grad():
        net(torch.rand(1, 3, 8, 8))
    assert set(net.last_record().bits.values()) == {6, 8}


def test_report_of_a_network_and_of_option_files(quantized: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    out, _ = quantized
    said = qsr(tmp_path, "report", out, "--sites", "--size", "90x160", "--json", "r.json")
    assert "body.0.conv1" in said and "6.00 bits" in said
    assert json.loads((tmp_path / "r.json").read_text())["costs"]["input_size"] == [90, 160]
    file = tmp_path / "pams.yml"
    file.write_text('_base_: ["qsr:train/pams/edsr_small_x4_w4a4.yml"]\n')
    assert "pams W4A4" in qsr(tmp_path, "report", file)
    file.write_text('_base_: ["qsr:backbones/edsr_small_x4.yml"]\n')
    assert "32.00 bits" in qsr(tmp_path, "report", file)


@pytest.fixture(scope="module")
def with_depth(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of 8 blocks whose recipe trains 8, 4 and 2 of them."""
    folder = tmp_path_factory.mktemp("depth")
    recipe = {"base": "percentile", "depth": {"role": "block"}, "stages": [{"depths": [1, 0.5, 0.25]}]}
    (folder / "recipe.yml").write_text(json.dumps(recipe))
    qsr(
        folder, "quantize", WEIGHTS, "--arch", "edsr_small_x4", "--photos", photos, "--bits", "W4A4", "--method",
        "recipe.yml", "-o", "net.safetensors",
    )  # fmt: skip
    return folder / "net.safetensors"


def test_report_of_a_network_with_depth(with_depth: Path, tmp_path: Path) -> None:
    said = qsr(tmp_path, "report", with_depth, "--json", "all.json")
    assert "8 of 8 run" in said and "Size if slimmed" in said
    full = json.loads((tmp_path / "all.json").read_text())
    assert [one["blocks"] for one in full["details"]["depths"]] == [[8, 8], [4, 4], [2, 2]]
    said = qsr(tmp_path, "report", with_depth, "--depth", "4", "--json", "half.json")
    assert "4 of 8 run" in said and "Size of all 8 blocks" in said and "Size if slimmed" not in said
    half = json.loads((tmp_path / "half.json").read_text())
    slimmed, costs = full["details"]["depths"][1], full["costs"]
    assert half["costs"]["macs"] == slimmed["macs"] < costs["macs"]
    assert half["costs"]["storage_bits"] == costs["storage_bits"] > slimmed["storage_bits"]
    assert "depths" not in half["details"]


def test_slim_writes_a_smaller_network_of_the_same_output(with_depth: Path, tmp_path: Path) -> None:
    said = " ".join(qsr(tmp_path, "slim", with_depth, "--depth", "2", "-o", "small.safetensors").split())
    assert "wrote small.safetensors: file of" in said and "note:" not in said
    small, net = load_quantized(tmp_path / "small.safetensors"), load_quantized(with_depth)
    assert small.recipe.depth.kept == (0, 1)
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(small(x), set_depth(net, 2)(x))
    assert "2 of 2 run" in qsr(tmp_path, "report", "small.safetensors")
    said = " ".join(qsr(tmp_path, "slim", with_depth, "--depth", "3", "-o", "three.safetensors").split())
    assert "note: 3 is no depth that was trained (8, 4, 2)" in said


def test_depths_that_are_not_there_end_in_a_sentence(
    with_depth: Path, quantized: tuple[Path, str], tmp_path: Path
) -> None:
    said = " ".join(qsr(tmp_path, "report", with_depth, "--depth", "9", fails=True).split())
    assert "this EDSR has 8 blocks: give 1 to 8" in said
    said = " ".join(qsr(tmp_path, "slim", quantized[0], "--depth", "2", "-o", "o.safetensors", fails=True).split())
    assert "has one depth only" in said
    said = " ".join(qsr(tmp_path, "slim", with_depth, "--depth", "2", "-o", "o.pth", fails=True).split())
    assert "saved as .safetensors" in said
    assert not list(tmp_path.iterdir())


def test_list_names_methods_and_backbones(tmp_path: Path) -> None:
    said = qsr(tmp_path, "list")
    assert all(name in said for name in ("pams", "percentile", "edsr_small_x4", "srresnet_x4"))


def test_arch_may_be_a_file_of_ours(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yml"
    file.write_text('_base_: ["qsr:backbones/edsr_small_x4.yml"]\n')
    qsr(tmp_path, "quantize", WEIGHTS, "--arch", file, "--photos", photos, "--method", "pams", "-o", "o.safetensors")
    assert (tmp_path / "o.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bits", "4"], "expected weight and activation bits"),
        (["--method", "percentil"], "Did you mean 'percentile'"),
        (["--arch", "edsr_smal_x4"], "Did you mean 'edsr_small_x4'"),
        (["--placement", "ful"], "Did you mean 'full'"),
        (["-o", "net.pth"], "saved as .safetensors"),
        (["-o", "/proc/none/net.safetensors"], "cannot write"),
        (["--photos", "nowhere"], "nowhere"),
        (["--arch", "srresnet_x4"], "the network has 258 keys"),
    ],
)
def test_mistakes_end_in_a_sentence(photos: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    base = {"--arch": "edsr_small_x4", "--photos": str(photos), "-o": "net.safetensors"}
    given = {**base, **dict(zip(arguments[::2], arguments[1::2]))}
    said = qsr(tmp_path, "quantize", WEIGHTS, *(part for pair in given.items() for part in pair), fails=True)
    assert says in " ".join(said.split())
    assert not list(tmp_path.glob("*.safetensors"))


@needs_data
@pytest.mark.parametrize(("method", "bits", "loss"), [("minmax", "W8A8", 0.1), ("percentile", "W4A4", 1.0)])
def test_srresnet_keeps_its_quality(tmp_path: Path, method: str, bits: str, loss: float) -> None:
    data, photos = Path(DATA), tmp_path / "photos"
    photos.mkdir()
    for photo in sorted((data / "train/BSDS400").iterdir())[:16]:
        (photos / photo.name).symlink_to(photo)
    qsr(
        tmp_path, "quantize", data / "weights/srresnet_x4.pth", "--arch", "srresnet_x4", "--method", method, "--bits",
        bits, "--photos", photos, "-o", "net.safetensors", "--test", data / "Set5/HR", data / "Set5/LRbicx4",
    )  # fmt: skip
    figures = json.loads((tmp_path / "net.json").read_text())
    plain, quantized = (one["quality"]["Set5"]["psnr"] for one in (figures["reference"], figures))
    assert plain == pytest.approx(32.01, abs=0.02) and plain - quantized <= loss


@needs_data
def test_our_small_network_is_good_enough() -> None:
    from qsr_plugin import compat

    compat.import_host()
    from qsr_plugin.archs.quant_net_arch import build_backbone

    from qsr_plugin.checkpoint import load_float_weights
    from qsr_plugin.options_file import options_folder, read_yaml
    from qsr_plugin.report.evaluate import evaluate

    net = build_backbone(read_yaml(options_folder() / "backbones/edsr_small_x4.yml")["network_g"]["backbone"])
    load_float_weights(net, WEIGHTS)
    score = evaluate(net, Path(DATA) / "Set5/HR", Path(DATA) / "Set5/LRbicx4", 4)
    assert score.psnr >= 30.6
    assert f"| Set5 | 5 | {score.psnr:.2f} | {score.ssim:.4f} |" in WEIGHTS.with_suffix(".md").read_text()
