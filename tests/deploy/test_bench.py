"""``qsr bench``: the order of its measurements and what it makes of them, the variants, the command, the tool."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from qsr_plugin import calibrate, load_quantized, load_recipe, quantize_model, save_quantized, slim
from qsr_plugin.checkpoint import save_torch
from qsr_plugin.deploy import bench as work
from qsr_plugin.deploy import bench_machine, bench_memory, bench_variants
from qsr_plugin.deploy.bench_names import DEFAULT, REFERENCE, VARIANTS
from qsr_plugin.deploy.bench_rows import Protocol, Row, legend, speed_text, to_table
from qsr_plugin.deploy.bench_timing import Pair, Speed, clock_for, measure_round, timed
from qsr_plugin.deploy.bench_variants import Models, float_network_of
from qsr_plugin.deploy.engine import Engine
from qsr_plugin.deploy.packed import save_packed
from qsr_plugin.errors import UserError
from qsr_plugin.report.result_io import read_table
from tests.deploy.engines import nearest_engine
from tests.deploy.test_export_cli import qsr
from tests.recipes import equal
from tests.tools.conftest import script  # noqa: F401  (a fixture)


class Clock:
    """Time passes only in what is run."""

    def __init__(self) -> None:
        self.now, self.ran = 0.0, ""

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """A function that takes these times in turn."""
        times = iter(seconds * 100)

        def run() -> None:
            self.ran += name
            self.now += next(times)

        return run


def test_rounds_are_abba_and_baab() -> None:
    """A drift that is the same in each step leaves no trace: the outer two cost what the inner two cost."""
    clock = Clock()
    reference, own = clock.work("A", 4.0), clock.work("B", 2.0)
    pairs = [measure_round(number, reference, own, 0.0, clock) for number in range(3)]
    assert clock.ran == "ABBA" + "BAAB" + "ABBA"
    assert pairs == [Pair(4.0, 2.0)] * 3 and pairs[0].faster == 2.0
    slower = Clock()
    steps = iter(range(100))  # every run takes a second longer than the one before

    def drifting(base: float) -> Callable[[], None]:
        def run() -> None:
            slower.now += base + next(steps)

        return run

    found = [measure_round(number, drifting(10), drifting(10), 0.0, slower) for number in range(2)]
    assert [pair.faster for pair in found] == [1.0, 1.0]


def test_a_measurement_is_repeated_until_it_is_long_enough() -> None:
    clock = Clock()
    assert timed(clock.work("A", 0.2), 0.5, clock) == pytest.approx(0.2) and clock.ran == "AAA"
    clock = Clock()
    assert timed(clock.work("A", 0.9), 0.5, clock) == pytest.approx(0.9) and clock.ran == "A"
    clock = Clock()
    assert timed(clock.work("A", 0.1, 0.3), 0.7, clock) == pytest.approx(0.2)


def test_median_and_range_of_the_rounds() -> None:
    pairs = [Pair(3.0, 1.0), Pair(4.0, 2.0), Pair(10.0, 1.0)]
    speed = Speed.of(pairs)
    assert (speed.seconds, speed.faster, speed.least, speed.most) == (1.0, 3.0, 2.0, 10.0)
    assert speed_text(speed) == "3.00 [2.00, 10.00]"
    reference = Speed.of_reference(pairs)
    assert (reference.seconds, reference.faster, reference.ratios) == (4.0, 1.0, ())
    assert speed_text(reference) == "1.00"


def test_every_variant_is_paired_with_the_reference_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ran = Clock(), []
    monkeypatch.setattr(work, "clock_for", lambda threads: (clock, ""))

    def engine(name: str, seconds: float) -> Engine:
        def watch(x: np.ndarray) -> None:
            ran.append(name)
            clock.now += seconds

        return nearest_engine(watch=watch)

    engines = {"torch": engine("t", 6.0), REFERENCE: engine("A", 3.0), "openvino-int8": engine("q", 1.0)}
    seen: list[str] = []

    def progress(items: list, what: str) -> list:
        seen.append(f"{what}: {len(items)}")
        return items

    speeds = work.measure(engines, (4, 6), Protocol(((4, 6),), rounds=2, seconds=0.0), progress)
    assert {name: speed.faster for name, speed in speeds.items()} == {
        REFERENCE: 1.0,
        "torch": 0.5,
        "openvino-int8": 3.0,
    }
    assert speeds[REFERENCE].seconds == 3.0
    assert "".join(ran) == "ttAAqq" + "AttA" + "AqqA" + "tAAt" + "qAAq"
    assert seen == ["measuring 4x6: 4"]


def test_the_clock() -> None:
    assert clock_for(1)[1] == "CPU time" and clock_for(2)[1] == "wall time"


def test_ratio_to_torch_is_a_quotient_of_medians(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    size = (4, 6)
    rows = [
        Row("torch", {size: Speed(2.0, (0.5, 0.5))}, file_bytes=2_000_000),
        Row(REFERENCE, {size: Speed(1.0)}, file_bytes=1_000_000),
        Row("openvino-int8", {size: Speed(0.25, (3.0, 5.0))}, file_bytes=500_000),
        Row("nncf", note="not installed: pip install nncf"),
    ]
    Console(width=200).print(to_table(rows, size, "net [x]"))
    said = capsys.readouterr().out
    assert "net [x], 4x6" in said and "[least, most]" in legend(rows, Protocol((size,)))[0]
    lines = [re.split(r"\s{2,}", line.strip()) for line in said.splitlines()]
    cells = {line[0]: line[1:] for line in lines if line}
    assert cells["openvino-int8"] == ["4.00 [3.00, 5.00]", "8.00", "250", "500 kB"]
    assert cells[REFERENCE][:3] == ["1.00", "2.00", "1000"] and cells["nncf"][0] == "-"


def test_figures_are_whole_on_a_usual_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    size, quality = (540, 960), {"Urban100": SimpleNamespace(psnr=26.123)}
    figures = Speed(0.2345, (4.12, 5.34)), Speed(1.2345, (0.512, 0.634))
    names = ("openvino-int8-no-passes", "torch")
    rows = [Row(name, {size: speed}, quality=quality, file_bytes=1_234_567) for name, speed in zip(names, figures)]
    Console(width=80).print(to_table(rows, size, "EDSR x4, auto W8A8+"))
    said = capsys.readouterr().out
    assert "…" not in said and "4.73 [4.12, 5.34]" in said and "26.12" in said and "1.235 MB" in said


@pytest.fixture
def model(tiny_net, images, tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save_quantized(calibrate(quantize_model(tiny_net(), equal("pams", 4)), images), path)
    return path


@pytest.fixture
def test_set(tmp_path: Path) -> tuple[Path, Path]:
    """Two pairs of images, 24x26 at scale 2."""
    noise = np.random.default_rng(0)
    folders = tmp_path / "Small" / "HR", tmp_path / "Small" / "LR"
    for folder, shape in zip(folders, ((24, 26, 3), (12, 13, 3))):
        folder.mkdir(parents=True)
        for name in ("a.png", "b.png"):
            cv2.imwrite(str(folder / name), noise.integers(0, 256, shape, np.uint8))
    return folders


def test_the_command(monkeypatch, model: Path, test_set: tuple[Path, Path], tmp_path: Path) -> None:
    """All variants on a tiny network: table, results, plot; one that is not installed has a row that says so."""
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "nncf", None)  # an import then fails, installed or not
    out = tmp_path / "made" / "speed.json"
    given = ("--size", 12, 16, "--size", 9, 11, "--rounds", 1, "--seconds", 0, "--test", *test_set, "-o", out)
    said = qsr(monkeypatch, "bench", model, *given, "--variants", ",".join(VARIANTS))
    assert "EDSR x2, pams W4A4, 12x16" in said and "EDSR x2, pams W4A4, 9x11" in said and "Small" in said
    assert "CPU time, 1 thread" in said and "nncf: not installed: pip install nncf" in said
    assert f"wrote {out} and {out.with_suffix('.png')}" in said and "measuring 12x16: 7 in" in said
    table = read_table(out)
    rows = {row.label: row for row in table.rows}
    assert list(rows) == list(VARIANTS) and table.settings["threads"] == 1 and table.settings["machine"]["cores"] >= 1
    assert {"torch", "openvino", "onnxruntime"} <= set(rows["torch"].versions)
    for name, row in rows.items():
        if name == "nncf":
            assert row.note and not row.seconds and row.details["file_bytes"] == 0
            continue
        assert list(row.seconds) == ["12x16", "9x11"] and min(row.seconds.values()) > 0 and not row.note
        assert row.details["file_bytes"] > 1000 and row.scale == 2 and row.quality["Small"].images == 2
        assert [one["size"] for one in row.details["sizes"]] == [[12, 16], [9, 11]]
        assert len(row.details["sizes"][0]["ratios"]) == (name != REFERENCE)
    assert rows["openvino-int8"].bits == "W4A4" and rows["torch"].bits == ""
    psnr = {name: row.quality["Small"].psnr for name, row in rows.items() if row.quality}
    for name, score in psnr.items():  # float ones score like PyTorch, quantized ones like the export
        quantized = "int8" in name
        assert score == pytest.approx(psnr["openvino-int8" if quantized else "torch"], abs=0.05 if quantized else 1e-4)
    assert psnr["openvino-int8"] != psnr["torch"]
    assert any("tail" in step for step in rows["openvino-int8"].details["steps"])
    assert any("convolution in 8 bits" in step for step in rows["openvino-int8-tail"].details["steps"])
    assert not any("tail" in step for step in rows["openvino-int8-no-passes"].details["steps"])
    picture = cv2.imread(str(out.with_suffix(".png")))
    assert picture.shape[1] == 1152 and picture.std() > 10


def stub_nncf() -> ModuleType:
    """What is called of NNCF; the model stays as it is."""
    nncf = ModuleType("nncf")
    nncf.QuantizationPreset = SimpleNamespace(MIXED="mixed")
    nncf.TargetDevice = SimpleNamespace(CPU="cpu")
    nncf.Dataset, nncf.calls = list, []

    def quantize(model: object, data: list[np.ndarray], **how: object) -> object:
        nncf.calls.append(([batch.shape for batch in data], how))
        return model

    nncf.quantize = quantize
    return nncf


def test_nncf_quantizes_the_float_file_after_the_passes(monkeypatch, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    nncf = stub_nncf()
    monkeypatch.setitem(sys.modules, "nncf", nncf)
    net = load_quantized(model)
    models = Models(net, float_network_of(net, None, model), tmp_path / "files", images=[torch.rand(1, 3, 20, 24)])
    opened = models.open("nncf", (12, 16))
    models.open("nncf", (8, 8))
    how = {"subset_size": 1, "preset": "mixed", "target_device": "cpu"}
    assert nncf.calls == [([(1, 3, 20, 24)], how)]  # once for all sizes
    assert opened.notes[-1] == "calibrated on 1 batches of the images given"
    assert any("tail" in note for note in opened.notes) and "after the exact passes" in VARIANTS["nncf"]
    x = np.random.default_rng(0).random((1, 3, 12, 16), np.float32)
    float_file = models.open("openvino-float-passes", (12, 16))
    np.testing.assert_allclose(opened.engine(x), float_file.engine(x), atol=1e-5)
    assert opened.file_bytes > 1000

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no pattern for this operator")

    nncf.quantize = fails
    with pytest.raises(UserError, match="NNCF cannot quantize this network .RuntimeError: no pattern"):
        bench_variants.quantize_with_nncf(tmp_path / "files" / "float.onnx", tmp_path / "made.xml", [x])


def test_memory_is_that_of_another_process(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    net = load_quantized(model)
    models = Models(net, float_network_of(net, None, model), tmp_path)
    opened = models.open("torch", (16, 16))
    taken = bench_memory.memory_of(opened.open_run, np.zeros((1, 3, 512, 512), np.float32))
    maps = 8 * 4 * 1024 * 1024  # bytes of one at output size
    assert 2 * maps < taken < 20 * maps


def test_memory_of_a_network_with_windows(tiny_net, images, tmp_path: Path) -> None:
    """Its class, which pads, cannot be pickled: the child builds it anew."""
    net = calibrate(quantize_model(tiny_net("SwinIR"), equal("pams", 4)), images)
    opened = Models(net, float_network_of(net, None, tmp_path), tmp_path).open("torch", (9, 11))
    x = np.random.default_rng(0).random((1, 3, 9, 11), np.float32)
    np.testing.assert_array_equal(opened.open_run()(x), opened.engine(x))
    assert bench_memory.memory_of(opened.open_run, np.zeros((1, 3, 128, 128), np.float32)) > 2**20


@pytest.mark.parametrize(
    ("open_run", "said"),
    [
        (partial(os._exit, 3), "the process was ended"),
        (lambda: None, "pickle"),
        (partial(int, "no number"), "ValueError: invalid literal"),
    ],
)
def test_what_can_happen_to_a_child(open_run: Callable, said: str) -> None:
    with pytest.raises(UserError, match=said):
        bench_memory.memory_of(open_run, np.zeros(1))


def test_a_child_that_dies_is_a_note(monkeypatch, model: Path) -> None:
    monkeypatch.setattr(work, "memory_of", lambda *_: (_ for _ in ()).throw(UserError("the process was ended")))
    opened = {REFERENCE: nearest_engine(), "torch": nearest_engine()}

    class Two(Models):
        def open(self, name: str, size: tuple[int, int]) -> bench_variants.Opened:
            return bench_variants.Opened(opened[name], lambda: None, 1)

    net = load_quantized(model)
    before = torch.get_num_threads()
    rows = work.bench(
        Two(net, float_network_of(net, None, model), model.parent),
        [REFERENCE, "torch"],
        Protocol(((8, 8),), before + 1, rounds=1, seconds=0.0),
        memory=True,
    )
    assert torch.get_num_threads() == before
    assert [row.note for row in rows] == ["memory at 8x8 is not known: the process was ended"] * 2
    assert all(row.speeds for row in rows)


def test_float_networks(model: Path, tiny_net, images, tmp_path: Path) -> None:
    """Master weights of the file, those of a float checkpoint, or the quantized ones of a packed file."""
    net, plain = load_quantized(model), tiny_net()
    with torch.no_grad():
        wanted = plain(images[0])
        assert torch.equal(float_network_of(net, None, model)(images[0]), wanted)
        save_packed(net, tmp_path / "packed.safetensors")
        packed = load_quantized(tmp_path / "packed.safetensors")
        assert not torch.equal(float_network_of(packed, None, model)(images[0]), wanted)
        save_torch({"params": plain.state_dict()}, tmp_path / "float.pth")
        assert torch.equal(float_network_of(packed, tmp_path / "float.pth", model)(images[0]), wanted)


def test_a_slimmed_network_has_no_float_form(tiny_net, images, tmp_path: Path) -> None:
    recipe = load_recipe("quantsr", weight_bits=4, act_bits=4)
    small = slim(calibrate(quantize_model(tiny_net(num_block=2), recipe), images), 1)
    with pytest.raises(UserError, match="blocks were left out.*before qsr slim"):
        float_network_of(small, None, Path("small.safetensors"))


def test_a_variant_that_cannot_be_made_is_a_row_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tiny_net, images, tmp_path: Path
) -> None:
    """Bits by content: refused without a width, exported at the one given."""
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")

    class WithReference(Models):
        def open(self, name: str, size: tuple[int, int]) -> bench_variants.Opened:
            fixed = bench_variants.Opened(nearest_engine(), lambda: None, 1)
            return fixed if name == REFERENCE else super().open(name, size)

    net = calibrate(quantize_model(tiny_net(), load_recipe("adabm", weight_bits=4, act_bits=4)), images)
    models = WithReference(net, float_network_of(net, None, tmp_path), tmp_path)
    protocol = Protocol(((8, 8),), rounds=1, seconds=0.0)
    rows = work.bench(models, work.check_variants(["torch", "openvino-int8"]), protocol)
    assert [bool(row.speeds) for row in rows] == [True, True, False]
    assert "bits depend on the image" in rows[2].note and "--bits" in rows[2].note

    def export_onnx(net: torch.nn.Module, path: Path, **options: object) -> None:
        raise UserError(f"asked for {options}")

    monkeypatch.setattr(bench_variants, "export_onnx", export_onnx)
    models.bits = 6
    with pytest.raises(UserError, match="asked for {'bits': 6, 'passes': True}"):
        models.open("openvino-int8", (8, 8))


def test_a_tail_that_is_not_collapsed_has_no_row_in_8_bits(tiny_net, images, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    net = calibrate(quantize_model(tiny_net("SRResNet"), equal("pams", 4)), images)
    models = Models(net, float_network_of(net, None, tmp_path), tmp_path)
    with pytest.raises(UserError, match="tail: not collapsed: .*; so no tail can compute in 8 bits"):
        models.open("openvino-int8-tail", (12, 12))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--variants", "openvino-int4"), "no variant 'openvino-int4'. Did you mean 'openvino-int8'?"),
        (("--variants", "openvino-float"), "alone has nothing to be compared with"),
        (("--size", "8"), "--size takes a height and a width: --size 180 320"),
        (("--size", "8", "0"), "1 pixel or more"),
        (("--size", "99999999", "99999999"), "--size 99999999 99999999: one layer of EDSR alone needs"),
        (("-o", "speed.png"), "results are written as .json"),
        (("--float", "missing.pth"), "missing.pth does not exist"),
        (("--test", "nowhere", "neither"), "found nothing. Check the path"),
    ],
)
def test_what_does_not_fit_is_told_before_work(monkeypatch, model: Path, arguments: tuple, message: str) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(model.parent)
    monkeypatch.setattr(bench_variants, "export_onnx", lambda *_, **__: pytest.fail("worked first"))
    assert message in qsr(monkeypatch, "bench", model, *arguments, fails=True)
    assert [path.name for path in model.parent.iterdir()] == ["net.safetensors"]


def test_files_that_are_not_quantized(monkeypatch, tiny_net, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    path = tmp_path / "float.safetensors"
    from safetensors.torch import save_file

    save_file(tiny_net().state_dict(), path)
    assert "has no recipe in it" in qsr(monkeypatch, "bench", path, "-o", tmp_path / "o.json", fails=True)
    save_torch({"params": tiny_net().state_dict()}, tmp_path / "float.pth")
    assert "'qsr quantize' makes" in qsr(monkeypatch, "bench", tmp_path / "float.pth", fails=True)


def test_a_missing_extra_is_named(monkeypatch, model: Path) -> None:
    def missing(name: str) -> None:
        raise UserError(f"{name} is needed for this and cannot be imported (no): install the extra 'deploy'")

    monkeypatch.setattr("qsr_plugin.deploy.engine.require", missing)
    monkeypatch.chdir(model.parent)
    assert "install the extra 'deploy'" in qsr(monkeypatch, "bench", model, fails=True)


def test_out_of_memory_names_the_size() -> None:
    def full(x: np.ndarray) -> None:
        raise MemoryError("bad_alloc")

    with pytest.raises(UserError, match="out of memory at 8x8: give a smaller --size"):
        work.measure({REFERENCE: nearest_engine(watch=full)}, (8, 8), Protocol(((8, 8),)), lambda items, what: items)


def test_the_largest_layer_is_counted(tiny_net) -> None:
    """EDSR x2, 8 features: the pixel shuffle reads and makes 4 x 8 floats per pixel; the last convolution 4 x (8 + 3)."""
    assert work.bytes_per_pixel(tiny_net()) == 4 * (32 + 32)


def test_nncf_is_left_out_by_default_where_onnxruntime_is() -> None:
    assert "onnxruntime-int8" not in DEFAULT and "nncf" in DEFAULT and REFERENCE in DEFAULT
    assert work.check_variants(["nncf"]) == [REFERENCE, "nncf"]


def test_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("model name\t: Some CPU: 1\nflags\t\t: fpu avx2 avx512_vnni avx512_vnnix\n\nmodel name\t: Other\n")
    monkeypatch.setattr(bench_machine, "_CPUINFO", file)
    found = bench_machine.machine()
    assert found["cpu"] == "Some CPU: 1" and found["flags"] == ["avx2", "avx512_vnni"] and found["cores"] >= 1
    assert bench_machine.described(found).endswith("core(s), avx2 avx512_vnni")
    monkeypatch.setattr(bench_machine, "_CPUINFO", tmp_path / "none")
    assert bench_machine.machine()["flags"] == []


def test_the_tool(monkeypatch, script, tmp_path: Path, capsys) -> None:  # noqa: F811
    """The table of the README, from rows that are there already."""
    tool = script("bench_engines")
    monkeypatch.setattr(tool, "CASES", ((8, 8, 1), (8, 12, 1)))
    monkeypatch.setattr(tool, "float_network", lambda features, blocks, make=tool.float_network: make(8, 1))

    def bench(models: Models, names: list[str], protocol: Protocol, **_: object) -> list[Row]:
        rows = {name: Row(name, {protocol.sizes[0]: Speed(0.1, (2.0, 3.0))}, file_bytes=10_000) for name in names}
        rows[REFERENCE].speeds[protocol.sizes[0]] = Speed(0.2)
        if "nncf" in rows:
            rows["nncf"] = Row("nncf", note="not installed: pip install nncf")
        return list(rows.values())

    monkeypatch.setattr(tool, "bench", bench)
    tool.main(tmp_path, bits="W8A8,W4A4", rounds=1, seconds=0.0, small=False, memory=False)
    lines = (tmp_path / "engines.md").read_text().splitlines()
    assert lines[0] == "| | 8x8, 1 thread | 8x12, 1 thread | MB |"
    assert "| `openvino-int8, W4A4` | 2.50 [2.00, 3.00] | 2.50 [2.00, 3.00] | 0.01 |" in lines
    assert sum("openvino-float`" in line for line in lines) == 1 and any("pip install nncf" in line for line in lines)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"w8a8_8x8_1t.json", "w8a8_8x8_1t.png", "w4a4_8x12_1t.json", "w4a4_8x12_1t.png"} <= written
    assert len(read_table(tmp_path / "w4a4_8x8_1t.json").rows) == 4
