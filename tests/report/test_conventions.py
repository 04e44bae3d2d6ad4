"""Ways of counting against hand counts, and what reports say of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from qsr_plugin.archs.quant_net_arch import QuantNet
from torch import Tensor, nn
from typer.testing import CliRunner

import qsr_plugin
from qsr_plugin import cli, complexity, load_recipe, quantize_model, save_quantized
from qsr_plugin.quant.sites import MatMul
from qsr_plugin.report.complexity_types import CONVENTIONS
from tests.backbones import tiny_options

PIXELS = 5 * 6


class Small(nn.Module):
    """A float convolution, a quantized one with a norm, a quantized linear layer, and a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 4)
        self.far_norm = nn.BatchNorm2d(4)
        self.product = MatMul()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.body(self.head(x)))
        tokens = self.linear(self.far_norm(x).flatten(2).transpose(1, 2))
        return self.product(tokens.transpose(1, 2), tokens)


def small(bits: int) -> nn.Module:
    rules = [{"match": name, "port": port} for name in ("body", "linear") for port in ("input", "weight")]
    recipe = {"method": "hand", "placement": "all", "placements": {"all": rules}, "bits": {"weight": bits, "act": bits}}
    return quantize_model(Small(), load_recipe({**recipe, "quantizers": {"act": "pams", "weight": "maxabs"}}))


HEAD, BODY, LINEAR, PRODUCT = (count * PIXELS for count in (3 * 4, 4 * 4 * 9, 4 * 4, 4 * 4))


@pytest.mark.parametrize(
    ("convention", "bits", "operations", "quantized"),
    [
        ("macs-bits", 2, 1024 * (HEAD + PRODUCT) + 4 * (BODY + LINEAR), 4 * (BODY + LINEAR)),
        ("odm", 4, 1024 * (HEAD + PRODUCT) + 16 * (BODY + LINEAR), 16 * (BODY + LINEAR)),
        ("cadyq", 8, 2 * (BODY + LINEAR + 4 * PIXELS) / 16, 2 * (BODY + LINEAR + 4 * PIXELS) / 16),
        ("quantsr", 2, HEAD + 4 * PIXELS + (BODY + 4 * PIXELS + LINEAR) / 16, (BODY + 4 * PIXELS + LINEAR) / 16),
        ("quantsr-printed", 4, HEAD + 4 * PIXELS + (BODY + 4 * PIXELS + LINEAR) / 8, (BODY + 4 * PIXELS + LINEAR) / 8),
        (
            "quantsr-printed",
            2,
            HEAD + 4 * PIXELS + (BODY + 4 * PIXELS + LINEAR) / 128,
            (BODY + 4 * PIXELS + LINEAR) / 128,
        ),
    ],
)
def test_operations(convention: str, bits: int, operations: float, quantized: float) -> None:
    """Only the norm right behind a convolution counts, and only where norms do."""
    report = complexity(small(bits), (5, 6), convention=convention)
    assert (report.bitops, report.bitops_quantized) == (operations, quantized)


@pytest.mark.parametrize(
    ("convention", "numbers"),
    [
        # Head, two biases and two norms; two weights at 4 bits; two max scales.
        ("odm", 12 + 4 + 8 + 16 + (144 + 16) / 8 + 2),
        ("cadyq", 12 + 4 + 8 + 16 + 144 + 16 + 2),
        ("quantsr", 12 + 4 + (144 + 16) / 8),
        # Beside that, what a file has: two steps of weights, and means and variances of the norms.
        ("macs-bits", 12 + 4 + 8 + 16 + (144 + 16) / 8 + 2 + 2 + 16),
    ],
)
def test_parameters(convention: str, numbers: float) -> None:
    report = complexity(small(4), (5, 6), convention=convention)
    assert report.scaled_parameters == numbers == report.to_dict()["scaled_parameters"]


def test_patches_add_biases_and_norms_of_each() -> None:
    whole = complexity(small(4), (5, 12), convention="quantsr")
    cut = complexity(small(4), (5, 12), convention="quantsr", patches={"size": 6, "last": "enlarge"})
    assert cut.bitops == whole.bitops
    assert [site.norm_values for site in whole.sites] == [site.norm_values for site in cut.sites] == [0, 240, 0, 0]


@pytest.mark.parametrize("name", CONVENTIONS)
def test_every_convention_is_named_where_a_user_looks(name: str, tiny) -> None:
    report = complexity(tiny("EDSR", "pams"), convention=name)
    assert report.input_size == CONVENTIONS[name].input_size
    text = report.to_dict()["convention_text"]
    assert CONVENTIONS[name].text in text and CONVENTIONS[name].params_text in text
    page = (Path(qsr_plugin.__file__).parent / "report" / "conventions.md").read_text("utf-8")
    height, width = report.input_size
    assert re.search(rf"^\| `{name}` \|.*\| {height}x{width} \|$", page, re.MULTILINE)
    assert name in re.split(r"[\s:,.]+", _option_help())


def _option_help() -> str:
    from qsr_plugin.report_cli import report

    return report.__annotations__["convention"]


def test_the_command_counts_by_a_convention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images) -> None:
    monkeypatch.setattr(cli.console, "_width", 200)
    net = qsr_plugin.calibrate(QuantNet(tiny_options("EDSR"), load_recipe("pams")), images)
    save_quantized(net, tmp_path / "net.safetensors")
    arguments = ["report", tmp_path / "net.safetensors", "--convention", "quantsr", "--json", tmp_path / "r.json"]
    with cli.console.capture() as said:
        done = CliRunner().invoke(cli.app, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    said = " ".join(said.get().split())
    want = complexity(net, (256, 256), convention="quantsr")
    assert "Per image of 256x256" in said and f"Ops 'quantsr': {CONVENTIONS['quantsr'].text}" in said
    costs = json.loads((tmp_path / "r.json").read_text())["costs"]
    found = {key: costs[key] for key in ("bitops", "scaled_parameters", "convention", "convention_text", "input_size")}
    assert found == {key: json.loads(json.dumps(want.to_dict()))[key] for key in found}


def test_an_unknown_convention_is_told_before_anything_runs(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["report", str(tmp_path / "net.safetensors"), "--convention", "quantzr"])
    assert done.exit_code == 2 and "Did you mean 'quantsr'" in " ".join(done.output.split())
