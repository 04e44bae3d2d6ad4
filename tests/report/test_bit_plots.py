"""Numbers and pictures of chosen bits."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from qsr_plugin.report.bit_maps import BitMap, labels_of, observe_bits, patch_gradients
from qsr_plugin.report.bit_plots import bits_figure, save_bits
from qsr_plugin.report.patch_bits import PatchBits

PLACES = ("body.0.conv1.input", "body.0.conv2.input", "body.1.conv1.input")
CHOSEN = ([4, 4, 8], [8, 8, 8], [4, 6, 8], [4, 4, 4], [6, 8, 8])
REGIONS = ((0, 0, 10, 12), (0, 12, 10, 8), (10, 0, 6, 12), (10, 12, 3, 8), (13, 12, 3, 8))
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)


def bit_map(label: str = "net", chosen: tuple = CHOSEN, places: tuple[str, ...] = PLACES) -> BitMap:
    """Five patches of an image of 16x20."""
    patches = [PatchBits(*region, dict(zip(places, map(float, bits)))) for region, bits in zip(REGIONS, chosen)]
    return BitMap(label, "EDSR, mine W8A4/6/8", (4, 6, 8), tuple(patches))


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_means_and_shares_by_hand() -> None:
    """The mean is a plain one: sizes of patches do not matter."""
    one = bit_map()
    assert one.by_patch.tolist() == pytest.approx([16 / 3, 8, 6, 4, 22 / 3])
    assert one.by_place.tolist() == pytest.approx([5.2, 6.0, 7.2])
    assert one.fab == pytest.approx(92 / 15)
    assert one.shares.tolist() == [[0.6, 0.2, 0.2], [0.4, 0.2, 0.4], [0.2, 0.0, 0.8]]


def test_a_real_width_counts_as_the_nearest() -> None:
    one = BitMap(
        "net", "", (4, 6, 8), (PatchBits(0, 0, 4, 4, {"a.input": 6.9}), PatchBits(0, 4, 4, 4, {"a.input": 4.2}))
    )
    assert one.shares.tolist() == [[0.5, 0.5, 0.0]]
    assert one.fab == pytest.approx(5.55)


def test_quarters_are_those_of_the_gradient() -> None:
    """One of five patches is a quarter, two of nine; three patches have none."""
    one = bit_map()
    assert one.quarters([0.3, 0.9, 0.2, 0.1, 0.5]) == (4.0, 8.0)
    assert one.quarters([0.1, 0.2, 0.3, 0.4, 0.5]) == (pytest.approx(16 / 3), pytest.approx(22 / 3))
    assert BitMap("net", "", (4,), one.patches[:3]).quarters([1.0, 2.0, 3.0]) is None
    nine = BitMap("net", "", (4,), tuple(PatchBits(0, 0, 1, 1, {"a.input": float(bits)}) for bits in range(9)))
    assert nine.quarters(range(9)) == (0.5, 7.5)


def test_gradients_are_those_of_what_the_network_saw(tiny) -> None:
    """Left half flat, right half black and white columns; the overlap belongs to a patch as well."""
    image = torch.full((1, 3, 8, 16), 0.5)
    image[..., 8:] = torch.arange(8).remainder(4).lt(2).float()
    parts = [PatchBits(0, 0, 8, 8, {}), PatchBits(0, 8, 8, 8, {})]
    flat, columns = patch_gradients(image, parts)
    assert flat == 0.0 and columns == pytest.approx(6 / 8 * 0.5)
    net = tiny("EDSR", "minmax", weight_bits=4, act_bits=4)
    overlapping = observe_bits(net, image, 2, size=10, overlap=4).patches
    assert [(part.left, part.width) for part in overlapping] == [(0, 8), (8, 8)]
    assert patch_gradients(image, overlapping)[0] > 0.0  # it saw two columns of the right half


def test_bits_of_a_network_are_observed(tiny) -> None:
    net = tiny("EDSR", "minmax", placement="full", weight_bits=4, act_bits=3)
    one = observe_bits(net, torch.rand(1, 3, 9, 14), 2, "mine", size=6, batch=3)
    assert (one.label, one.method, one.widths, one.fab) == ("mine", "EDSR, minmax W4A3", (3,), 3.0)
    assert len(one.patches) == 2 and "conv_first.input" not in one.places  # it has bits of its own
    assert observe_bits(net, torch.rand(1, 3, 9, 14), 2).patches[0].height == 9
    with pytest.raises(ValueError, match="quantizes no activation that counts in FAB"):
        observe_bits(tiny("EDSR", "minmax", weight_bits=4, act_bits=32), torch.rand(1, 3, 8, 8), 2)


@pytest.mark.parametrize(
    ("files", "labels"),
    [
        (["a/net.safetensors", "a/other.safetensors"], ["net", "other"]),
        (["runs/a/models/net.safetensors", "runs/b/models/net.safetensors", "c.safetensors"], ["a", "b", "c"]),
        (["runs/a/models/net.safetensors", "saved/net.safetensors"], ["a", "saved"]),
        (["old/a/models/net.safetensors", "new/a/models/net.safetensors"], ["old/a", "new/a"]),
        (["a/models/1.safetensors", "a/models/2.safetensors", "b/models/2.safetensors"], ["1", "a/2", "b"]),
        (["a/net.safetensors", "a/models/net.safetensors"], ["a", "models"]),
        (["a/net.safetensors", "a/../a/net.safetensors"], ["net", "net"]),
    ],
)
def test_labels_tell_networks_apart(files: list[str], labels: list[str]) -> None:
    """Folders are named where stems repeat, as many as it takes."""
    assert labels_of([Path(file) for file in files]) == labels


def test_labels_of_files_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "models")
    assert labels_of([Path("net.safetensors"), Path("../../b/models/net.safetensors")]) == ["a", "b"]


def test_map_shows_patches_and_means() -> None:
    """A number in every patch that has room, borders at the owned parts, and the name with the mean above."""
    axes = bits_figure(IMAGE, [bit_map()]).axes[0]
    assert texts(axes) == ["5.3", "8.0", "6.0", "4.0", "7.3", "net", "EDSR, mine W8A4/6/8, FAB 6.13 bits"]
    borders = [box for box in axes.patches if not box.get_fill()]
    found = [(box.get_y() + 0.5, box.get_x() + 0.5, box.get_height(), box.get_width()) for box in borders]
    assert found == [tuple(map(float, region)) for region in REGIONS]
    fills = [box.get_facecolor() for box in axes.patches if box.get_fill()]
    lightness = [0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue, _ in fills]
    assert np.argsort(lightness).tolist() == np.argsort(bit_map().by_patch).tolist()
    assert all(alpha < 1 for *_, alpha in fills)


def test_layers_show_shares() -> None:
    figure = bits_figure(IMAGE, [bit_map()])
    layers, total = figure.axes[2:]
    assert np.array_equal(layers.images[0].get_array(), bit_map().shares)
    assert [label.get_text() for label in layers.get_yticklabels()] == ["body.0.conv1", "body.0.conv2", "body.1.conv1"]
    assert [label.get_text() for label in layers.get_xticklabels()] == ["4", "6", "8"]
    assert texts(layers)[:12] == ["60", "20", "20", "5.20", "40", "20", "40", "6.00", "20", "", "80", "7.20"]
    assert texts(total) == ["40", "13", "47", "6.13"]


def test_colours_are_shared_by_all_networks() -> None:
    """Of 4 to 8 bits, from 16/3 alone at least one bit wide."""
    low = bit_map("low", tuple([4, 4, 4] for _ in CHOSEN))
    figure = bits_figure(IMAGE, [bit_map(), low])
    assert len(figure.axes) == 8 and figure.axes[1].get_xlim() == figure.axes[5].get_xlim() == (4.0, 8.0)
    assert bits_figure(IMAGE, [low]).axes[1].get_xlim() == (3.5, 4.5)
    near = bit_map("near", ([4, 4, 6], *([4, 4, 4] for _ in CHOSEN[1:])))
    figure = bits_figure(IMAGE, [near])
    assert figure.axes[1].get_xlim() == (4.0, 5.0) and texts(figure.axes[0])[0] == "4.67"


def test_long_names_and_different_ports() -> None:
    """Long names lose their start; the port is only said where there are several."""
    places = ("layers.0.residual_group.blocks.0.attn.qkv.input", "b.input", "b.left")
    layers = bits_figure(IMAGE, [bit_map(places=places)]).axes[2]
    names = [label.get_text() for label in layers.get_yticklabels()]
    assert names == ["…blocks.0.attn.qkv.input", "b.input", "b.left"]


def inside(figure: Figure) -> list[str]:
    """Texts that leave the picture, and pairs that overlap."""
    figure.canvas.draw()
    labels = []
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [
            tick for tick in axes.get_xticklabels() if low <= tick.get_position()[0] <= high
        ]  # others are not drawn
        labels += [*axes.texts, *axes.get_yticklabels(), *ticks, axes.xaxis.label]
    boxes = [
        (text.get_text(), Text.get_window_extent(text)) for text in labels if text.get_text() and text.get_visible()
    ]
    width, height = figure.bbox.width, figure.bbox.height
    wrong = [name for name, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
    for number, (name, box) in enumerate(boxes):
        for other, second in boxes[:number]:
            if (
                min(box.x1, second.x1) - max(box.x0, second.x0) > 1
                and min(box.y1, second.y1) - max(box.y0, second.y0) > 2
            ):
                wrong.append(f"{name} over {other}")
    return wrong


@pytest.mark.parametrize(("layers", "patches"), [(1, 1), (32, 5), (64, 5), (200, 5)])
def test_texts_are_readable(layers: int, patches: int) -> None:
    """No text leaves the picture or lies over another one, whatever the number of layers."""
    places = tuple(f"body.{number}.conv{port}.input" for number in range((layers + 1) // 2) for port in (1, 2))[:layers]
    one = bit_map(places=places, chosen=tuple([4, 6, 8, 8] * 50 for _ in CHOSEN))
    figure = bits_figure(IMAGE, [BitMap("net", one.method, one.widths, one.patches[:patches])] * 2)
    assert inside(figure) == []
    assert figure.get_size_inches().max() < 40


def test_titles_of_a_narrow_image_keep_off_the_table() -> None:
    one = BitMap("net", "SRResNet, mine W8A4/5/6/7/8", (4, 8), (PatchBits(0, 0, 90, 9, {"a.input": 4.0}),))
    assert inside(bits_figure(np.zeros((90, 9, 3), dtype=np.uint8), [one])) == []


def test_files_of_both_kinds(tmp_path: Path) -> None:
    for name in ("bits.png", "bits.SVG"):
        save_bits(tmp_path / name, IMAGE, [bit_map()])
    with Image.open(tmp_path / "bits.png") as picture:
        picture.load()
        assert 1000 < picture.width < 2500
    root = ElementTree.parse(tmp_path / "bits.SVG").getroot()
    assert root.tag.endswith("svg")
    save_bits(tmp_path / "again.svg", IMAGE, [bit_map()])
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "bits.SVG").read_bytes()


def test_mistakes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plots are written as .png or .svg"):
        save_bits(tmp_path / "bits.jpg", IMAGE, [bit_map()])
    with pytest.raises(ValueError, match="at least one network"):
        save_bits(tmp_path / "bits.png", IMAGE, [])
    with pytest.raises(ValueError, match="does not lie in the image of 12x20"):
        save_bits(tmp_path / "bits.png", IMAGE[:12], [bit_map()])
    assert list(tmp_path.iterdir()) == []
