"""``qsr plot`` on a tiny network whose bits follow the image, and on result files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from qsr_plugin import save_quantized
from qsr_plugin.cli import app
from qsr_plugin.quant.image_stats import gradient_magnitudes
from qsr_plugin.quant.policy import POLICIES, BitDecision, BitPolicy
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.report.result_io import write_results
from qsr_plugin.report.result_schema import Costs, Quality, Result


class ByTexture(BitPolicy):
    """8 bits where the image has any gradient, else 4; at the first place always 4."""

    def decide(self, features: Tensor, record: ForwardRecord | None) -> BitDecision:
        textured = gradient_magnitudes(record.image).sum(1) > 0
        return BitDecision(4 + 4 * textured * bool(record.bits))


@pytest.fixture
def network(tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """EDSR x2 with four places that choose 4 or 8 bits."""
    monkeypatch.setitem(POLICIES, "by_texture", ByTexture)
    net = tiny("EDSR", "minmax", act_bits=[4, 8], weight_bits=8, policy="by_texture")
    save_quantized(net, tmp_path / "adaptive.safetensors")
    return tmp_path / "adaptive.safetensors"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """16x24: flat on the left, noise on the right third."""
    pixels = np.full((16, 24, 3), 128, dtype=np.uint8)
    pixels[:, 16:] = np.random.default_rng(0).integers(0, 256, (16, 8, 3))
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def qsr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[str, BaseException | None]]:
    """Run a command in ``tmp_path``: what it said, and what it ended with."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[str, BaseException | None]:
        done = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["plot", *map(str, arguments)])
        return " ".join(done.output.split()), done.exception

    return run


def test_bits_of_a_network(qsr, network: Path, photo: Path, tmp_path: Path) -> None:
    """Flat patches have 4 bits, the two with noise 4 and three times 8."""
    said, error = qsr(
        "bits", photo, "--model", network, "-o", "bits.png", "-o", "bits.svg", "--patch", 8, "--overlap", 0,
        "--data", "bits.json",
    )  # fmt: skip
    assert error is None, said
    assert "wrote bits.png, bits.svg, bits.json" in said
    assert "adaptive 6 5.00 75 % 25 % 4.00 7.00" in said
    data = json.loads((tmp_path / "bits.json").read_text())
    (row,), one = data["rows"], data["rows"][0]["details"]
    assert row["label"] == one["label"]
    assert [patch["mean"] for patch in one["patches"]] == [4, 4, 7, 4, 4, 7]
    assert one["patches"][2]["bits"] == {
        "body.0.conv1.input": 4, "body.0.conv2.input": 8, "body.1.conv1.input": 8, "body.1.conv2.input": 8,
    }  # fmt: skip
    assert (one["fab"], one["method"]) == (5.0, "EDSR, minmax W8A4/8")
    assert one["quarters"] == {"lowest": 4.0, "highest": 7.0}
    assert data["settings"]["patches"] == {"size": 8, "overlap": 0, "last": "enlarge", "batch": 16}
    with Image.open(tmp_path / "bits.png") as picture:
        picture.load()


def test_a_whole_image_beside_another_network(qsr, network: Path, photo: Path, tiny, tmp_path: Path) -> None:
    """Fixed bits can be drawn as well."""
    save_quantized(tiny("EDSR", "minmax", weight_bits=6, act_bits=6), tmp_path / "fixed.safetensors")
    said, error = qsr("bits", photo, "--model", network, "--model", "fixed.safetensors", "-o", "two.png", "--whole")
    assert error is None, said
    assert "adaptive 1 7.00 25 % 75 % " in said
    assert "fixed 1 6.00 100 % " in said
    assert "fewer than 4 patches have no quarters" in said


def test_many_widths_are_listed_in_one_column(qsr, network: Path, photo: Path, tiny, tmp_path: Path) -> None:
    models = ["--model", network]
    for bits in (3, 5, 6):
        save_quantized(tiny("EDSR", "minmax", weight_bits=8, act_bits=bits), tmp_path / f"fixed{bits}.safetensors")
        models += ["--model", f"fixed{bits}.safetensors"]
    said, error = qsr("bits", photo, *models, "-o", "many.png", "--whole")
    assert error is None, said
    assert "adaptive 1 7.00 4: 25 % 8: 75 % fixed3 1 3.00 3: 100 %" in said


def test_runs_are_named_by_their_folders(qsr, network: Path, photo: Path, tmp_path: Path) -> None:
    files = [tmp_path / "experiments" / name / "models" / "net_g_latest.safetensors" for name in ("soft", "hard")]
    for file in files:
        file.parent.mkdir(parents=True)
        shutil.copy(network, file)
    said, error = qsr(
        "bits", photo, "--model", files[0], "--model", files[1], "-o", "two.png", "--whole", "--data", "two.json"
    )
    assert error is None, said
    assert "soft 1 7.00" in said and "hard 1 7.00" in said
    assert [one["label"] for one in json.loads((tmp_path / "two.json").read_text())["rows"]] == ["soft", "hard"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-o", "bits.jpg"), "plots are written as .png or .svg"),
        (("-o", "b.png", "--patch", 4, "--overlap", 4), "the overlap must be 0 to 3 pixels"),
        (("-o", "b.png", "--last", "crop"), "'enlarge'"),
        (("-o", "b.png", "--whole", "--patch", 96), "--whole is one patch, but --patch says how to cut: leave out"),
        (("-o", "b.png", "--whole", "--overlap", 6), "leave out --whole, or --overlap"),
        (("-o", "b.png", "--whole", "--last", "enlarge", "--batch", 16), "or --last, --batch"),
        (("-o", "b.png", "--model", "none.safetensors"), "none.safetensors does not exist"),
    ],
)
def test_mistakes_about_bits(qsr, network: Path, photo: Path, tmp_path: Path, arguments: tuple, says: str) -> None:
    said, error = qsr("bits", photo, "--model", network, *arguments)
    assert error is not None and says in f"{said} {error}"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("b")]


def results(path: Path, psnr: float, fab: float, convention: str = "macs-bits") -> Path:
    """What ``qsr report --json`` writes, as far as it is looked at."""
    way = {"convention": convention, "input_size": (180, 320), "parameters": 1, "macs": 1}
    costs = Costs(fab=fab, bitops=1e9 * fab, storage_bits=80000, **way)
    quality = {"Set5": Quality(psnr=psnr, fab=fab), "Set14": Quality(psnr=psnr - 3, fab=fab)}
    write_results(Result(label="mine W4A4", method="mine", quality=quality, costs=costs), path)
    return path


def test_tradeoff_of_some_files(qsr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr("qsr_plugin.report.plots.save_figure", lambda figure, path: figures.append(figure))
    for name, psnr, fab in (("a", 30.0, 3.5), ("b", 30.5, 3.75), ("c", 30.25, 4.0)):
        results(tmp_path / f"{name}.json", psnr, fab)
    files = ("soft weight=9=a.json", "soft weight=1=b.json", "c.json")
    said, error = qsr("tradeoff", *files, "-o", "t.png", "--set", "Set14", "--front")
    assert error is None, said
    assert "soft weight=9 │ 27.00 dB │ 3.50 │ 3.5 G │ 10 kB" in said
    (axes,) = figures[0].axes
    assert axes.get_title(loc="left") == "Set14" and axes.get_xlabel() == "FAB, bits"
    assert {text.get_text() for text in axes.texts} == {"soft weight=9", "soft weight=1", "mine W4A4"}
    lines = [line.get_xydata().tolist() for line in axes.lines]
    assert [[3.5, 27.0], [3.75, 27.5]] in lines and [[4.0, 27.25]] in lines
    dots = [line for line in axes.lines if len(line.get_xydata()) == 1]
    filled = {tuple(dot.get_xydata()[0]): dot.get_markerfacecolor() != "white" for dot in dots}
    assert filled == {(3.5, 27.0): True, (3.75, 27.5): True, (4.0, 27.25): False}


def test_the_axis_says_how_operations_were_counted(qsr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr("qsr_plugin.report.plots.save_figure", lambda figure, path: figures.append(figure))
    said, error = qsr("tradeoff", results(tmp_path / "a.json", 30.0, 4.0, "quantsr"), "-o", "t.png", "--x", "bitops")
    assert error is None, said
    assert figures[0].axes[0].get_xlabel() == "Ops of one image (quantsr, 180x320)"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-o", "t.png", "--x", "fap"), "--x is 'fap'. Did you mean 'fab'? Allowed: bitops, fab, size."),
        (("-o", "t.png", "--set", "Set4"), "no result on 'Set4'. Did you mean 'Set"),
        (("-o", "t.gif"), "plots are written as .png or .svg"),
        (("none.json", "-o", "t.png"), "none.json cannot be read"),
    ],
)
def test_mistakes_about_tradeoffs(qsr, tmp_path: Path, arguments: tuple, says: str) -> None:
    said, error = qsr("tradeoff", results(tmp_path / "a.json", 30.0, 4.0), *arguments)
    assert error is not None and says in f"{said} {error}".replace("│ ", "").replace(" │", "")
    assert not list(tmp_path.glob("t.*"))
