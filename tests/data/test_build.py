"""Building LMDB pairs: what the host reads, what a stopped build leaves, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from qsr_plugin.data import build as build_module
from qsr_plugin.data.build import build_lmdb_pair
from qsr_plugin.data.images import read_rgb
from qsr_plugin.data.resize import downscale, shrink
from qsr_plugin.data.store import Journal, LmdbWriter
from tests.data.conftest import contents, noise, write_png


def everything(out: Path) -> list[object]:
    """All that a training reads of a build."""
    parts = [(contents(out / name), (out / name / "meta_info.txt").read_text()) for name in ("GT.lmdb", "LQ.lmdb")]
    return [part for pair in parts for part in pair]


def test_sub_images_match_and_come_from_the_whole_photo(photos: Path, tmp_path: Path, build: Callable) -> None:
    report = build(tmp_path / "out")
    assert (report.photos, report.sub_images, report.bad, report.unused) == (4, 4 * 2 * 3, (), 0)
    gt, lq = (contents(tmp_path / "out" / name) for name in ("GT.lmdb", "LQ.lmdb"))
    assert gt.keys() == lq.keys()
    high = read_rgb(photos / "b.png")[:40, :50]
    low = downscale(high, 2)
    corners = [(top, left) for top in (0, 16) for left in (0, 16, 26)]  # the last column is moved to the border
    for index, (top, left) in enumerate(corners, start=1):
        key = f"b_s{index:03d}".encode()
        np.testing.assert_array_equal(read_rgb(gt[key]), high[top : top + 24, left : left + 24])
        np.testing.assert_array_equal(read_rgb(lq[key]), low[top // 2 : top // 2 + 12, left // 2 : left // 2 + 12])


def test_meta_info_is_the_hosts(tmp_path: Path, build: Callable) -> None:
    build(tmp_path / "out", sub_image=0)
    lines = {
        name: (tmp_path / "out" / name / "meta_info.txt").read_text().splitlines() for name in ("GT.lmdb", "LQ.lmdb")
    }
    assert lines["GT.lmdb"] == [f"{name}_s001.png (40,50,3) 1" for name in "abcd"]
    assert lines["LQ.lmdb"] == [f"{name}_s001.png (20,25,3) 1" for name in "abcd"]


def test_the_host_reads_it(photos: Path, tmp_path: Path, build: Callable) -> None:
    from basicsr.data import build_dataloader
    from basicsr.data.paired_image_dataset import PairedImageDataset

    report = build(tmp_path / "out")
    options = {"name": "t", "dataroot_gt": str(report.gt), "dataroot_lq": str(report.lq), "scale": 2, "phase": "val"}
    dataset = PairedImageDataset({**options, "io_backend": {"type": "lmdb"}})
    assert len(dataset) == report.sub_images
    pair = next(item for item in dataset if item["gt_path"] == "c_s001")
    expected = read_rgb(photos / "c.png")[:24, :24]
    np.testing.assert_array_equal((pair["gt"].numpy() * 255).round().transpose(1, 2, 0), expected)
    assert pair["lq"].shape == (3, 12, 12)

    options |= {"phase": "train", "gt_size": 16, "use_hflip": True, "use_rot": True, "io_backend": {"type": "lmdb"}}
    options |= {"batch_size_per_gpu": 6, "num_worker_per_gpu": 0, "prefetch_mode": None}
    loader = build_dataloader(PairedImageDataset(options), options, num_gpu=0, dist=False, seed=0)
    batches = list(loader)
    assert len(batches) == report.sub_images // 6
    assert {tuple(batch["gt"].shape) for batch in batches} == {(6, 3, 16, 16)}
    assert {tuple(batch["lq"].shape) for batch in batches} == {(6, 3, 8, 8)}


def test_shrunk_copies_border_and_gates(photos: Path, tmp_path: Path, build: Callable) -> None:
    write_png(photos / "flat.png", np.full((41, 50, 3), 90, np.uint8))
    report = build(tmp_path / "out", shrink=(1.0, 0.7, 0.2), border=3, sub_image=0, min_std=1.0)
    gt = contents(report.gt)
    assert sorted(gt) == sorted(f"{name}{copy}_s001".encode() for name in "abcd" for copy in ("", "_r0p7"))
    assert (report.photos, report.unused) == (5, 1)
    inner = read_rgb(photos / "a.png")[3:-3, 3:-3]
    np.testing.assert_array_equal(read_rgb(gt[b"a_r0p7_s001"]), shrink(inner, 0.7)[:24, :30])


def test_names_become_unique_ascii_keys(tmp_path: Path) -> None:
    folder = tmp_path / "сад"
    for name in ("фото.png", "мост.png", "x.1.png", "same.png", "same.jpg", "é" * 110 + ".png"):
        write_png(folder / name, noise(16, 16))
    report = build_lmdb_pair(folder, tmp_path / "aus gabe é", 2, min_side=16)
    keys = contents(report.gt)
    assert len(keys) == report.sub_images == 6
    assert all(key.decode("ascii").count(".") == 0 for key in keys)
    assert contents(report.lq).keys() == keys.keys()


class Stopped(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("place", ["between photos", "after GT", "before the journal", "inside the journal"])
@pytest.mark.parametrize("done", [0, 2])
def test_a_stopped_build_continues_to_the_same_result(
    tmp_path: Path, build: Callable, monkeypatch: pytest.MonkeyPatch, place: str, done: int
) -> None:
    build(tmp_path / "whole")
    out = tmp_path / "out"
    target, name = {"between photos": (build_module, "read_rgb"), "after GT": (LmdbWriter, "put")}.get(
        place, (Journal, "add")
    )
    original = getattr(target, name)
    calls: list[int] = []

    def stopping(*args: object) -> object:
        calls.append(1)
        if len(calls) == (2 * done + 2 if place == "after GT" else done + 1):
            if place == "inside the journal":
                with (out / "build.jsonl").open("ab") as file:
                    file.write(b'{"photo": "c.p')
            raise Stopped
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, stopping)
        with pytest.raises(Stopped):
            build(out)
    assert not (out / "GT.lmdb" / "meta_info.txt").exists()
    report = build(out)
    assert report.resumed == done
    assert everything(out) == everything(tmp_path / "whole")
    assert build(out).already_complete


def test_a_killed_process_continues_to_the_same_result(photos: Path, tmp_path: Path, build: Callable) -> None:
    build(tmp_path / "whole")
    script = f"""
import os, signal
from qsr_plugin.data import build
original = build.Journal.add
def add(self, photo, record):
    if photo == "c.png":
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, photo, record)
build.Journal.add = add
build.build_lmdb_pair({str(photos)!r}, {str(tmp_path / "out")!r}, 2, sub_image=24, step=16, min_side=16)
"""
    process = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert build(tmp_path / "out").resumed == 2
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_a_complete_build_is_left_alone(tmp_path: Path, build: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(tmp_path / "out")
    assert not first.already_complete

    def never(*_: object) -> None:
        raise AssertionError("something was done")

    for target, name in ((build_module, "read_rgb"), (build_module, "write_meta_info"), (build_module, "LmdbWriter")):
        monkeypatch.setattr(target, name, never)
    again = build(tmp_path / "out", skip_bad=True)
    assert again.already_complete
    assert (again.sub_images, again.size, again.photos) == (first.sub_images, first.size, first.photos)


def test_other_settings_are_refused_until_overwritten(photos: Path, tmp_path: Path, build: Callable) -> None:
    out = tmp_path / "out"
    build(out)
    with pytest.raises(ValueError, match=r"scale: 2 there, 4 asked for; step: 16 there, 8 asked for\).*--overwrite"):
        build(out, scale=4, step=8)
    write_png(photos / "e.png", noise(30, 30))
    with pytest.raises(ValueError, match="photo_list: 4 photos, .* there, 5 photos, .* asked for"):
        build(out)
    report = build(out, scale=4, step=8, overwrite=True)
    assert (report.photos, report.resumed) == (5, 0)
    assert {read_rgb(value).shape[0] for value in contents(report.lq).values()} == {6}


def test_foreign_and_damaged_outputs_are_refused(tmp_path: Path, build: Callable) -> None:
    (tmp_path / "foreign" / "GT.lmdb").mkdir(parents=True)
    with pytest.raises(ValueError, match="did not build.*--overwrite"):
        build(tmp_path / "foreign")
    out = tmp_path / "out"
    report = build(out)
    (report.lq / "data.mdb").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"records 4 photos, but .*LQ\.lmdb is gone; pass --overwrite"):
        build(out)
    (out / "build.jsonl").write_text("not a journal\n")
    with pytest.raises(ValueError, match="is not a build journal.*--overwrite"):
        build(out)
    assert build(out, overwrite=True).sub_images == report.sub_images


def test_a_bad_photo_stops_the_build_or_is_counted(
    photos: Path, tmp_path: Path, build: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (photos / "b.png").read_bytes()
    (photos / "b.png").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"b\.png: is damaged .*--skip-bad"):
        build(out)
    report = build(out, skip_bad=True)
    assert (report.bad, report.photos, report.resumed) == (("b.png",), 3, 1)
    assert "b.png: is damaged" in caplog.text
    assert not any(key.startswith(b"b") for key in contents(report.gt))
    assert build(out, skip_bad=True).bad == ("b.png",)


def test_16_bit_and_gray_photos_become_8_bit_rgb(tmp_path: Path) -> None:
    deep = np.arange(16 * 16, dtype=np.uint16).reshape(16, 16) * 257
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "deep.png").write_bytes(cv2.imencode(".png", deep)[1].tobytes())
    report = build_lmdb_pair(tmp_path / "photos", tmp_path / "out", 2, min_side=16)
    image = read_rgb(contents(report.gt)[b"deep_s001"])
    np.testing.assert_array_equal(image, np.repeat((deep // 257).astype(np.uint8)[..., None], 3, axis=2))


def test_the_database_grows(tmp_path: Path) -> None:
    values = [(f"k{index}", os.urandom(100_000)) for index in range(8)]
    with LmdbWriter(tmp_path / "x.lmdb", map_size=2**16) as writer:
        writer.put(values[:1])
        writer.put(values[1:])
    assert contents(tmp_path / "x.lmdb") == {key.encode(): value for key, value in values}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0}, "scale is 0; it must be 1 or more"),
        ({"sub_image": 25}, "sub_image is 25; it must be a multiple of scale = 2"),
        ({"step": 3}, "step is 3; it must be a multiple of scale = 2"),
        ({"step": 0}, "step is 0; it must be 1 or more"),
        ({"border": -1}, "border is -1"),
        ({"shrink": ()}, "one or more factors"),
        ({"shrink": (1.2,)}, "at most 1"),
        ({"shrink": (0.5, 0.5)}, "only once"),
        ({"min_side": 500}, "no sub-image was left of 4 photos .* lower min_side = 500"),
        ({"photos": "absent"}, "looked for a folder of images .* found nothing"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, build: Callable, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", **changes)


def test_the_journal_is_lines_of_json(tmp_path: Path, build: Callable) -> None:
    build(tmp_path / "out")
    settings, *records = map(json.loads, (tmp_path / "out" / "build.jsonl").read_text().splitlines())
    assert settings["scale"] == 2 and settings["shrink"] == [1.0]
    assert [record["photo"] for record in records] == ["a.png", "b.png", "c.png", "d.png"]
