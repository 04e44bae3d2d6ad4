"""The HTML page of a quantized network: everything in one file, all text escaped, and what it shows."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from qsr_plugin import complexity
from qsr_plugin.report.evaluate import evaluate
from qsr_plugin.report.layers import LayerGroup, brief_names, layer_groups, layer_lines
from qsr_plugin.report.page import Figures, Page, cost_figures, score_figures, write_page
from qsr_plugin.report.pictures import Example, Tile, example_of

EVIL = "<script>alert('x')</script>&\"\u00e9.png"


def page(**changes: object) -> Page:
    tile = Tile(EVIL, EVIL, b"png")
    figures = Figures(("", EVIL), ((EVIL, EVIL),), EVIL, EVIL)
    given = {
        "title": EVIL,
        "summary": [EVIL],
        "scores": [figures],
        "cost": figures,
        "examples": [Example(EVIL, tile, (tile,))],
        "groups": [LayerGroup("W4A4", EVIL, (EVIL,))],
        "facts": {EVIL: EVIL},
        "times": {EVIL: 2.0, "rest": 6.0},
    }
    return Page(**{**given, **changes})


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    def write(**changes: object) -> str:
        write_page(page(**changes), tmp_path / "page.html")
        return (tmp_path / "page.html").read_text("utf-8")

    return write


def test_all_text_is_escaped(written) -> None:
    text = written()
    read = Reader(text)
    assert "script" not in read.tags and "<script" not in text
    assert read.words.count(EVIL) >= 12, "and it is all there"
    assert ("alt", f"{EVIL}: {EVIL}") in read.attributes


def test_the_style_is_written_as_it_is(written) -> None:
    style = written().partition("<style>")[2].partition("</style>")[0]
    assert '"Segoe UI"' in style and "&" not in style


def test_nothing_is_fetched(written) -> None:
    read = Reader(written())
    links = [value for name, value in read.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert links and all(value.startswith("data:image/png;base64,") for value in links)
    assert not {"link", "iframe", "object", "script", "base", "form"} & set(read.tags)
    assert not re.search(r"url\(|@import|https?://", written())
    assert ("name", "viewport") in read.attributes and ("charset", "utf-8") in read.attributes
    assert "prefers-color-scheme: dark" in written() and "@media print" in written()


def test_times_have_shares_and_parts_may_be_missing(written) -> None:
    assert {"25%", "75%", "2.0", "6.0"} <= set(Reader(written()).words)
    bare = Reader(written(scores=[], examples=[], times={}))
    assert "Cost" in bare.words and not {"Quality", "Pictures", "Time"} & set(bare.words)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_scores_and_costs(tiny: Callable[..., nn.Module], write_images, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hr = write_images("HR", {"a.png": rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)})
    lr = write_images("LR", {"a.png": rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)})
    nets = {"float": tiny("EDSR"), "minmax": tiny("EDSR", "minmax", weight_bits=4, act_bits=4, placement="body")}
    rows = {name: (complexity(net), evaluate(net, hr, lr, 2)) for name, net in nets.items()}
    scores = score_figures("Set1", rows)
    (plain, quantized), lost = scores.rows, rows["minmax"][1].psnr - rows["float"][1].psnr
    assert plain[:3] == ("float", f"{rows['float'][1].psnr:.2f}", "")
    assert quantized[2] == f"{lost:+.2f}" and quantized[4] == "4.00" and "1 images, x2" in scores.caption
    costs = {
        name: (before, after, factor)
        for name, before, after, factor in cost_figures(*(c for c, _ in rows.values())).rows
    }
    assert costs["FAB, bits"] == ("32.00", "4.00", "") and costs["MACs"][0] == costs["MACs"][1]
    less = rows["float"][0].bitops / rows["minmax"][0].bitops
    assert costs["BitOPs"][2] == f"{less:.2f} x less" and less > 1


def test_costs_without_a_record(tiny: Callable[..., nn.Module]) -> None:
    net = tiny("EDSR", "adabm", weight_bits=4, act_bits=4)
    net._last_record = None
    rows = {row[0]: row[1:] for row in cost_figures(complexity(tiny("EDSR")), complexity(net)).rows}
    assert rows["FAB, bits"] == ("32.00", "no record", "") and rows["BitOPs"][1:] == ("no record", "")


# -- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "brief"),
    [
        (["b", "a"], ["b", "a"]),
        (["a.0.x", "a.1.x", "a.2.x", "b"], ["a.[0-2].x", "b"]),
        (["a.0.c1", "a.0.c2", "a.1.c1", "a.1.c2"], ["a.[0-1].c[1-2]"]),
        (["a.0.c1", "a.0.c2", "a.1.c1"], ["a.0.c[1-2]", "a.1.c1"]),
        (["a.0", "a.2", "a.3", "a.9"], ["a.[0,2-3,9]"]),
        (["a.9", "a.10", "a.11"], ["a.[9-11]"]),
        (["a.01", "a.2"], ["a.01", "a.2"]),
        ([], []),
    ],
)
def test_brief_names(names: list[str], brief: list[str]) -> None:
    assert brief_names(names) == brief


def test_layers_of_fixed_bits(tiny: Callable[..., nn.Module]) -> None:
    net = tiny("EDSR", "percentile", weight_bits=4, act_bits=6, placement="full")
    groups = layer_groups(complexity(net), net.recipe)
    assert [(group.bits, len(group.names)) for group in groups] == [("W4A6", 5), ("W8A8", 3)]
    assert groups[0].brief == ["body.[0-1].conv[1-2]", "conv_after_body"]
    assert layer_lines(groups)[0] == "quantized: 5 of 8 layers at W4A6, 3 at W8A8; float: none"


def test_layers_of_chosen_bits_and_float_ones(tiny: Callable[..., nn.Module]) -> None:
    net = tiny("EDSR", "adabm", weight_bits=4, act_bits=4)
    net._last_record = None
    groups = layer_groups(complexity(net), net.recipe)
    assert [(group.bits, len(group.names)) for group in groups] == [("W4A2-6", 4), ("float", 4)]
    lines = layer_lines(groups, told=1)
    assert lines[0] == "quantized: 4 of 8 layers at W4A2-6; float: 4"
    assert lines[1].endswith("4 x Conv2d: body.[0-1].conv[1-2]") and lines[2].endswith("conv_first and 3 more")


# -- pictures ----------------------------------------------------------------------------------------------------------


class Nearest(nn.Module):
    """Enlarges by 2; a spot is off by a little everywhere and by much in one place."""

    def __init__(self, spot: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.spot = spot

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
        if self.spot:
            top, left = self.spot
            out[..., top : top + 40, left : left + 40] = 0
        return out


def pixels(tile: Tile) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(tile.source.partition(",")[2]))))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_crops_show_where_the_results_differ(dtype: type) -> None:
    lr = np.full((120, 160, 3), 200 * (257 if dtype is np.uint16 else 1), dtype)
    hr = np.full((240, 320, 3), 200, np.uint8)
    example = example_of("a.png", lr, {"float": Nearest(), "W4A4": Nearest((170, 250))}, hr=hr, scale=2)
    bicubic, plain, quantized, original = example.tiles
    assert [tile.label for tile in example.tiles] == ["bicubic", "float", "W4A4", "original (HR)"]
    assert plain.note == bicubic.note == "identical" and quantized.note.endswith(" dB") and original.note == ""
    assert all(pixels(tile).shape == (96, 96, 3) for tile in example.tiles)
    assert (pixels(quantized) == 0).all(axis=2).sum() == 40 * 40 and (pixels(plain) == 200).all()
    assert pixels(example.whole).shape == (240, 320, 3) and example.whole.note == "320 x 240 pixels"


def test_without_an_original_the_float_result_is_the_reference() -> None:
    lr = np.full((20, 16, 3), 90, np.uint8)
    example = example_of("a.png", lr, {"float": Nearest(), "W4A4": Nearest((0, 0))}, scale=2)
    assert [tile.label for tile in example.tiles] == ["bicubic", "float", "W4A4"]
    assert example.tiles[-1].note.endswith(" dB to float") and example.tiles[0].note == ""
    assert pixels(example.tiles[0]).shape == (32, 32, 3), "the shorter side"
