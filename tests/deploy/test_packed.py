"""Packed files: exactly b bits for each weight, read back to the last bit, and what they really take."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qsr_plugin import checkpoint, complexity, fold, load_quantized, quantize_model
from qsr_plugin.checkpoint import CheckpointError, load_float_weights, read_file, save_quantized
from qsr_plugin.deploy.codes import coded, pack, unpack
from qsr_plugin.deploy.packed import PackedReport, save_packed
from qsr_plugin.models.loading import adopt
from qsr_plugin.quant.quantizer import QParams
from qsr_plugin.quant.surgery import plugin_keys, quantizers, sites
from qsr_plugin.report.complexity_types import CONVENTIONS
from qsr_plugin.report.storage import storage_bits
from tests.backbones import FITTING
from tests.recipes import METHODS

BACKBONES = [(method, backbone) for method, backbone in FITTING if method == "auto" and backbone != "EDSR"]


def output(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


# -- integers --------------------------------------------------------------------------------------------------------


@given(st.integers(2, 8), st.lists(st.integers(0, 255), max_size=40))
def test_packed_codes_come_back_in_exactly_as_many_bits(bits: int, numbers: list[int]) -> None:
    codes = torch.tensor([number % 2**bits for number in numbers], dtype=torch.uint8)
    data = pack(codes, bits)
    assert data.dtype == torch.uint8 and data.numel() == math.ceil(len(numbers) * bits / 8)
    assert torch.equal(unpack(data, bits, len(numbers)), codes)


def test_the_order_of_bits_is_part_of_the_format() -> None:
    assert pack(torch.tensor([[1, 2], [3, 0]]), 2).tolist() == [0b00111001]
    assert pack(torch.tensor([5, 6, 7]), 3).tolist() == [0b11110101, 0b1]


def test_codes_and_streams_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="cannot pack 9 bits: 2 to 8 can be"):
        pack(torch.tensor([1]), 9)
    with pytest.raises(ValueError, match="codes from 0 to 4 do not fit 2 bits: 0 to 3 do"):
        pack(torch.tensor([0, 4]), 2)
    with pytest.raises(ValueError, match=r"10 codes of 3 bits are 4 bytes, found torch.uint8 \(3,\)"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 10)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_levels_that_no_formula_gives_are_listed(shift: float) -> None:
    """Values of one code differ by channel: exact all the same, or not packed."""
    grid = QParams(torch.tensor([0.5, 0.25]), torch.tensor([2.0, 2.0]), 0, 3)
    weight = (torch.randint(0, 4, (40, 2), generator=torch.Generator().manual_seed(0)) - 2.0) * grid.scale
    weight = weight + shift * grid.scale * 1e-3
    found = coded(weight, grid, 2, axis=1)
    assert torch.equal(found.values(), weight) and len(found.table) == (6 if shift else 2)
    weight[0, 0] += 0.05  # one more value than there are codes
    assert coded(weight, grid, 2, axis=1) is None


# -- files -----------------------------------------------------------------------------------------------------------


def parts(report: PackedReport) -> int:
    listed = sum(row.codes_bytes + row.side_bytes for row in report.rows)
    return listed + report.float_layer_bytes + report.range_bytes + report.header_bytes


@pytest.mark.parametrize(("method", "backbone"), [*((method, "EDSR") for method in METHODS), *BACKBONES])
def test_the_loaded_network_is_the_same_to_the_last_bit(
    quantized, images, tmp_path, method: str, backbone: str
) -> None:
    net, path = quantized(method, backbone), tmp_path / "net.safetensors"
    report = save_packed(net, path)
    twin = load_quantized(path)
    assert torch.equal(output(twin, images[0]), output(net, images[0])) and not twin.training
    assert twin.recipe == net.recipe and [place for place, _ in quantizers(twin)] == [p for p, _ in quantizers(net)]
    assert storage_bits(twin) == storage_bits(net)
    assert report.in_float == () and parts(report) == report.file_bytes == path.stat().st_size
    for row in report.rows:
        site = net.get_submodule(row.name)
        assert row.bits == site.quantizer("weight").candidates[0]
        assert row.codes_bytes == math.ceil(site.weight.numel() * row.bits / 8)


def test_packing_a_packed_network_changes_nothing(quantized, tmp_path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    for method in ("pams", "dorefa", "odm", "auto"):
        save_packed(quantized(method), first)
        save_packed(load_quantized(first), second)
        (ours, said), (theirs, told) = read_file(first), read_file(second)
        assert said == told and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_costs_of_a_packed_network_are_reported_as_before(quantized, images, tmp_path) -> None:
    for method in ("lsq", "adabm"):
        net = quantized(method)
        save_packed(net, tmp_path / "net.safetensors")
        twin = load_quantized(tmp_path / "net.safetensors")
        output(net, images[0]), output(twin, images[0])  # where bits depend on the image, those of the last one count
        for convention in CONVENTIONS:
            assert complexity(twin, (4, 4), convention=convention) == complexity(net, (4, 4), convention=convention)


@pytest.mark.parametrize("method", ["pams", "minmax", "dorefa", "auto"])
@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 8])
def test_every_width(quantized, images, tmp_path, method: str, bits: int) -> None:
    net = quantized(method, bits=bits)
    report = save_packed(net, tmp_path / "net.safetensors")
    assert torch.equal(output(load_quantized(tmp_path / "net.safetensors"), images[0]), output(net, images[0]))
    assert report.in_float == () and bits in {row.bits for row in report.rows}


@pytest.mark.parametrize("method", ["pams", "2dquant", "auto", "quantsr", "daq"])
def test_stated_storage_is_that_of_the_packed_integers_and_listed_extras(quantized, tmp_path, method: str) -> None:
    """What is stated: codes, float layers, 32 bits per range. The file has the last in its own form, and a header."""
    net = quantized(method)
    report = save_packed(net, tmp_path / "net.safetensors")
    ranges = sum(quantizer.extra_storage_bits() for _, quantizer in quantizers(net)) // 8
    scales = sum(p.numel() * 4 for key, p in net.named_parameters() if key.endswith("shortcut_scale"))
    codes = sum(row.codes_bytes for row in report.rows)
    assert report.stated_bytes == codes + report.float_layer_bytes + scales + ranges
    assert report.stated_bytes == complexity(net, (8, 8)).storage_bits // 8
    save_quantized(net, tmp_path / "float.safetensors")
    assert report.quantized_bytes == (tmp_path / "float.safetensors").stat().st_size > report.file_bytes
    assert report.float_bytes == complexity(net, (8, 8)).float_storage_bits // 8
    assert report.theoretical_bytes == math.ceil(report.float_bytes * net.recipe.bits.weight / 32)


@pytest.mark.parametrize("method", ["minmax", "auto"])
def test_weights_that_cannot_be_packed_stay_float_and_are_named(quantized, images, tmp_path, method: str) -> None:
    net = quantized(method, bits=9)
    report = save_packed(net, tmp_path / "net.safetensors")
    twin = load_quantized(tmp_path / "net.safetensors")
    wide = tuple(row.name for row in report.rows if row.bits == 9)
    assert wide and set(wide) == set(report.in_float)
    assert torch.equal(output(twin, images[0]), output(net, images[0]))
    one, other = (n.get_submodule(wide[0]).quantizer("weight").qparams() for n in (fold(net), twin))
    assert torch.equal(one.scale, other.scale) and (one.qmin, one.qmax) == (other.qmin, other.qmax)


def test_grids_with_more_codes_than_the_bits_have_stay_float(quantized, images, tmp_path) -> None:
    net = quantized("ddtb", quantizers={"weight": {"type": "ddtb_weight", "range": "minmax", "clamp_codes": False}})
    with torch.no_grad():
        net.body[0].conv1.weight.clamp_(-0.01, 0.01)[0, 0, 0, :2] = torch.tensor([-0.01, 0.01])
    report = save_packed(net, tmp_path / "net.safetensors")
    assert torch.equal(output(load_quantized(tmp_path / "net.safetensors"), images[0]), output(net, images[0]))
    for row in report.rows:
        grid = fold(net).get_submodule(row.name).quantizer("weight").qparams()
        assert (grid.qmax - grid.qmin == 2**row.bits) == (row.name in report.in_float)
    assert "body.0.conv1" in report.in_float


def test_a_quantizer_without_a_grid_stays_float(quantized, images, tmp_path, monkeypatch) -> None:
    net = quantized("linq")
    kind = type(net.body[0].conv1.quantizer("weight"))

    def none(*_: object) -> QParams:
        raise NotImplementedError

    monkeypatch.setattr(kind, "qparams_of", none)
    report = save_packed(net, tmp_path / "net.safetensors")
    twin = load_quantized(tmp_path / "net.safetensors")
    assert len(report.in_float) == len(report.rows) and sum(row.side_bytes for row in report.rows) == 0
    assert torch.equal(output(twin, images[0]), output(net, images[0]))
    with pytest.raises(NotImplementedError, match="conv1.weight: .*not uniform"):
        twin.body[0].conv1.quantizer("weight").qparams()


def test_half_of_the_float_layers(quantized, images, tmp_path) -> None:
    net = quantized("pams")
    with torch.no_grad():
        net.conv_last.bias[0] = 1e5  # beyond 16 bits
    whole, half = (
        save_packed(net, tmp_path / f"{name}.safetensors", half=name == "half") for name in ("whole", "half")
    )
    tensors, metadata = read_file(half.path)
    assert metadata["half"] == "True" and half.half and not whole.half
    assert tensors["conv_first.weight"].dtype == torch.float16 and tensors["conv_last.bias"].dtype == torch.float32
    assert {tensor.dtype for key, tensor in tensors.items() if key.endswith(".alpha")} == {torch.float32}
    assert 0.5 <= half.float_layer_bytes / whole.float_layer_bytes < 0.51
    want, got = output(net, images[0]), output(load_quantized(half.path), images[0])
    assert not torch.equal(got, want) and torch.allclose(got[:, 1:], want[:, 1:], atol=0.05)
    names = [name for name, site in sites(net) if site.quantizer("weight") is not None]
    twin = load_quantized(half.path)
    assert all(torch.equal(twin.get_submodule(n).weight, fold(net).get_submodule(n).weight) for n in names)


# -- what does not fit -----------------------------------------------------------------------------------------------


@pytest.fixture
def packed(quantized, tmp_path) -> Path:
    path = tmp_path / "net.safetensors"
    save_packed(quantized("pams"), path)
    return path


def rewritten(path: Path, change: Callable[[dict, dict], None]) -> Path:
    tensors, metadata = load_file(path), read_file(path)[1]
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


CODES, GRID = "body.0.conv1.weight.codes", "body.0.conv1.weight.grid"


def entry(metadata: dict, **changes: object) -> None:
    said = json.loads(metadata["packed"])
    said["body.0.conv1"] |= changes
    metadata["packed"] = json.dumps(said)


DAMAGES: dict[str, tuple[Callable[[dict, dict], None], str]] = {
    "a bit": (lambda tensors, _: tensors[CODES][7:8].bitwise_xor_(1), "body.0.conv1.weight: its codes .* checksum"),
    "too short": (lambda tensors, _: tensors.update({CODES: tensors[CODES][:-1].clone()}), "are 288 bytes, found"),
    "too long": (lambda tensors, _: tensors.update({CODES: tensors[CODES].repeat(2)}), "are 288 bytes, found"),
    "another type": (lambda tensors, _: tensors.update({CODES: tensors[CODES].float()}), "found torch.float32"),
    "no codes": (lambda tensors, _: tensors.pop(CODES), f"it lacks '{CODES}'"),
    "no grid": (lambda tensors, _: tensors.pop(GRID), f"it lacks '{GRID}'"),
    "a grid of zero": (lambda tensors, _: tensors[GRID].zero_(), "a finite scale above 0"),
    "a grid of NaN": (lambda tensors, _: tensors[GRID].fill_(math.nan), "a finite scale above 0"),
    "a flat grid": (lambda tensors, _: tensors.update({GRID: tensors[GRID][0].clone()}), "a grid is a float32 table"),
    "a wide grid": (lambda tensors, _: tensors.update({GRID: tensors[GRID].repeat(1, 3)}), "does not fit a weight"),
    "a high grid": (lambda tensors, _: tensors.update({GRID: tensors[GRID].repeat(5, 1)}), "does not fit a weight"),
    "other bits": (lambda _, metadata: entry(metadata, bits=3), "3 bits, its recipe says 4"),
    "a word for bits": (lambda _, metadata: entry(metadata, bits="4"), "valid integer"),
    "an unknown entry": (lambda _, metadata: entry(metadata, secret=1), "Extra inputs"),
    "no table": (lambda _, metadata: metadata.pop("packed"), "JSON"),
    "a site that is not there": (
        lambda _, metadata: metadata.update(packed=json.dumps({**json.loads(metadata["packed"]), "nowhere": {"bits": 4, "qmin": 0, "qmax": 1}})),
        "nowhere has no quantized weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(packed: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    with pytest.raises(CheckpointError, match=rf"(?s)packed file that is damaged \(.*{message}") as error:
        load_quantized(rewritten(packed, change))
    assert str(packed) in str(error.value)


def test_truncated_files_and_missing_or_left_over_tensors(packed: Path) -> None:
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_quantized(packed)
    packed.write_bytes(whole)
    rewritten(packed, lambda tensors, _: tensors.pop("conv_first.weight"))
    with pytest.raises(CheckpointError, match="missing: conv_first.weight"):
        load_quantized(packed)
    packed.write_bytes(whole)
    rewritten(packed, lambda tensors, _: tensors.update({"other.weight.codes": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match="unexpected: other.weight.codes"):
        load_quantized(packed)


def test_newer_and_older_versions(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten(packed, lambda _, metadata: metadata.update(format="3", qsr_plugin="9.1"))
    with pytest.raises(CheckpointError, match=r"written by qsr_plugin 9\.1 in format 3, this is .*update qsr_plugin"):
        load_quantized(packed)
    rewritten(packed, lambda _, metadata: metadata.update(format=str(checkpoint.PACKED_FORMAT)))
    monkeypatch.setattr(checkpoint, "PACKED_FORMAT", checkpoint.FORMAT)  # a reader before packed files
    with pytest.raises(CheckpointError, match="in format 2, this is"):
        load_quantized(packed)


def test_a_packed_file_starts_no_training_and_is_no_float_checkpoint(packed: Path, tiny_net) -> None:
    for read in (load_float_weights, adopt):
        with pytest.raises(CheckpointError, match="is a packed file, its weights are quantized for good"):
            read(quantize_model(tiny_net(), "pams"), packed)


def test_loaded_weights_take_no_gradient(packed: Path, images) -> None:
    net = load_quantized(packed)
    net.train()(images[0]).sum().backward()
    assert net.body[0].conv1.weight.grad is None and net.conv_first.weight.grad is not None
    assert not any(key.endswith("weight") for key in plugin_keys(net))


def test_what_cannot_be_packed(quantized, tiny_net, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="EDSR is not quantized"):
        save_packed(tiny_net(), tmp_path / "net.safetensors")
    net = quantized("pams")
    with pytest.raises(CheckpointError, match="change the ending"):
        save_packed(net, tmp_path / "net.pth")
    with torch.no_grad():
        net.body[1].conv2.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(CheckpointError, match="weight of body.1.conv2 holds NaN or infinity"):
        save_packed(net, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())
