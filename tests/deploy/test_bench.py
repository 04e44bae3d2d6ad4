"""``qsr bench``: the command, what it refuses before it works, the machine that it names, the tool."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from qsr_plugin.checkpoint import save_torch
from qsr_plugin.deploy import bench as work
from qsr_plugin.deploy import bench_machine, bench_variants
from qsr_plugin.deploy.bench_names import DEFAULT, REFERENCE, VARIANTS
from qsr_plugin.deploy.bench_rows import Protocol, Row
from qsr_plugin.deploy.bench_timing import Speed
from qsr_plugin.deploy.bench_variants import Models
from qsr_plugin.errors import UserError
from qsr_plugin.report.result_io import read_table
from tests.deploy.engines import nearest_engine
from tests.deploy.test_export_cli import qsr
from tests.tools.conftest import script  # noqa: F401  (a fixture)


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
