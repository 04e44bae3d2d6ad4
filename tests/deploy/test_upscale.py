"""``qsr upscale`` and the runs behind it: what goes where, what is refused before work, and what survives a stop."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from qsr_plugin import set_depth
from qsr_plugin.cli import app
from qsr_plugin.deploy.engine import Engine
from qsr_plugin.deploy.image_io import read_picture
from qsr_plugin.deploy.upscale import (
    Job,
    Tiling,
    check_any_readable,
    plan,
    prepare,
    share_of_process,
    upscale_files,
)
from qsr_plugin.errors import UserError
from qsr_plugin.progress import track
from tests.data.conftest import noise, write_png
from tests.deploy.engines import nearest, nearest_engine, write_onnx


def pixels_of(path: Path) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Folder of three PNG images, a.png to c.png, of unlike sizes."""
    for seed, (name, size) in enumerate({"a": (9, 12), "b": (1, 1), "c": (20, 7)}.items()):
        write_png(tmp_path / "in" / f"{name}.png", noise(*size, seed))
    return tmp_path / "in"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run ``qsr upscale`` in a wide terminal; what a user can mend is the exception of the result."""
    monkeypatch.setenv("COLUMNS", "400")

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(app, ["upscale", *map(str, arguments)])

    return call


def whole_run(photos: Path, out: Path, engine: Engine, **keep: bool):
    jobs, there = prepare(plan([photos], out), engine.scale, **keep)
    return upscale_files(engine, jobs, Tiling(), there=there)


# -- the command -----------------------------------------------------------------------------------------------------


def test_a_folder_with_a_broken_image(run, photos: Path, model_of_depths: Path, tmp_path: Path) -> None:
    write_png(photos / "фото.png", noise(5, 5))
    Image.fromarray(noise(6, 8)[..., 0]).save(photos / "gray.jpg")
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    out = tmp_path / "out"
    done = run(
        photos, "-o", out, "--model", model_of_depths, "--tile", 8, "--overlap", 4, "--batch", 2, "--suffix", "_x2"
    )
    assert done.exit_code == 1, done.output
    assert re.search(
        r"torch x2: 5 image\(s\) in \d+\.\d s, \d+\.\d\d megapixels of results/s; 1 skipped.*broken\.png", done.output
    )
    sizes = {path.name: pixels_of(path).shape for path in out.iterdir()}
    assert sizes == {
        "a_x2.png": (18, 24, 3),
        "b_x2.png": (2, 2, 3),
        "c_x2.png": (40, 14, 3),
        "gray_x2.png": (12, 16),
        "фото_x2.png": (10, 10, 3),
    }


def test_one_image_into_a_file_at_two_depths(run, photos: Path, model_of_depths: Path, tmp_path: Path) -> None:
    from qsr_plugin import load_quantized

    for depth in (2, 1):
        out = tmp_path / f"{depth}.png"
        done = run(photos / "a.png", "-o", out, "--model", model_of_depths, "--tile", 0, "--depth", depth)
        assert done.exit_code == 0, done.output
        x = torch.from_numpy(noise(9, 12).transpose(2, 0, 1) / np.float32(255))[None]
        with torch.no_grad():
            wanted = set_depth(load_quantized(model_of_depths), depth)(x)[0].clamp(0, 1) * 255
        found = pixels_of(out)[..., ::-1].transpose(2, 0, 1)
        assert np.abs(found - wanted.numpy()).max() <= 1.5
    assert (pixels_of(tmp_path / "1.png") != pixels_of(tmp_path / "2.png")).any()


def test_onnx_files_run(run, photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("openvino")
    net = write_onnx(tmp_path / "net.onnx", size=(8, 8))
    done = run(photos, "-o", tmp_path / "out", "--model", net, "--overlap", 4, "--threads", 1, "--format", "jpg")
    assert done.exit_code == 0, done.output
    assert "openvino x2: 3 image(s)" in done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jpg", "b.jpg", "c.jpg"]
    refused = run(photos, "-o", tmp_path / "other", "--model", net, "--depth", 1)
    assert isinstance(refused.exception, UserError) and "--depth is for quantized" in str(refused.exception)


def test_a_single_broken_image_is_an_error(run, photos: Path, model_of_depths: Path, tmp_path: Path) -> None:
    (photos / "a.png").write_bytes(b"")
    done = run(photos / "a.png", "-o", tmp_path / "out", "--model", model_of_depths)
    assert isinstance(done.exception, ValueError) and "a.png: is empty" in str(done.exception)


def test_nothing_readable_is_an_error(run, photos: Path, model_of_depths: Path, tmp_path: Path) -> None:
    for path in photos.iterdir():
        path.write_bytes(b"")
    done = run(photos, "-o", tmp_path / "out", "--model", model_of_depths)
    assert isinstance(done.exception, UserError) and "none of 3 images" in str(done.exception)


def test_impossible_tiles_are_refused_before_work(run, photos: Path, model_of_depths: Path, tmp_path: Path) -> None:
    done = run(photos, "-o", tmp_path / "out", "--model", model_of_depths, "--tile", 16, "--overlap", 16)
    assert isinstance(done.exception, UserError) and "overlap is 16; it must be 0 to 15" in str(done.exception)
    assert not (tmp_path / "out").exists()


# -- what goes where -------------------------------------------------------------------------------------------------


def test_names_of_results(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.d"
    assert plan([photos / "a.png"], tmp_path / "x.webp") == [Job(photos / "a.png", tmp_path / "x.webp")]
    assert [job.target for job in plan([photos], out, form="jpg", suffix="_x2")] == [out / f"{n}_x2.jpg" for n in "abc"]
    out.mkdir()
    assert plan([photos / "a.png"], out)[0].target == out / "a.png"


@pytest.mark.parametrize(
    "inputs, out, changes, said",
    [
        (["in", "more"], "out", {}, r"in/a.png and .*more/a.jpg would both be written to .*out/a.png"),
        (["in/a.png", "in/a.png"], "out", {}, "would both be written"),
        (["in"], "in", {}, "a.png is an input: choose another folder, or add --suffix"),
        (["in/a.png"], "in/a.png", {}, "a.png is an input"),
        (["in"], "out", {"form": "jpeg"}, "format is 'jpeg'. Did you mean 'jpg'"),
        (["in/a.png"], "out.png", {"form": "jpg"}, "--format is 'jpg', but the output is '.*out.png'"),
        (["in/a.png"], "out.gif", {}, "written as png, jpg, webp"),
        (["gone.png"], "out", {}, "gone.png: is not there"),
        (["empty"], "out", {}, "found it empty"),
    ],
)
def test_impossible_plans_are_refused(
    inputs: list[str], out: str, changes: dict[str, str], said: str, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    write_png(tmp_path / "more" / "a.jpg", noise(4, 4))
    with pytest.raises((UserError, ValueError), match=said):
        plan([tmp_path / one for one in inputs], tmp_path / out, **changes)


def test_results_that_exist_need_a_word(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole_run(photos, out, nearest_engine(2))
    with pytest.raises(UserError, match=r"a.png exists already \(and 2 more\): --resume .* --overwrite"):
        prepare(plan([photos], out), 2)
    whole_run(photos, out, nearest_engine(3), overwrite=True)
    assert pixels_of(out / "a.png").shape == (27, 36, 3)


@pytest.mark.parametrize("place", ["file", "file/out", "/proc/out"])
def test_a_folder_that_cannot_be_written_is_refused_before_work(place: str, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*Choose a folder"):
        prepare(plan([photos], tmp_path / place), 2)


def test_a_folder_without_permission_is_refused_by_the_system(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an administrator a test may write everywhere, so the system's answer is put in its place."""

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("qsr_plugin.atomic.tempfile.TemporaryFile", refuse)
    with pytest.raises(OSError, match="cannot write .*out.*Permission denied"):
        prepare(plan([photos], tmp_path / "out"), 2)


# -- runs that were stopped ------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on(photos: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", []

    def stop(x: np.ndarray) -> None:
        seen.append(x.shape)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole_run(photos, out, nearest_engine(2, stop))
    assert [path.name for path in out.iterdir()] == ["a.png"]
    (out / ".b.png.k3x_9a.tmp").write_bytes(b"half")  # of a process that was killed while it wrote
    (out / ".z.png.k3x_9a.tmp").write_bytes(b"of another run")
    (out / ".c.png.k3x_9a.tmp").write_bytes(b"of one that is writing now")
    for name in "bz":
        os.utime(out / f".{name}.png.k3x_9a.tmp", (time.time() - 4000,) * 2)
    before = (out / "a.png").stat().st_mtime_ns
    summary = whole_run(photos, out, nearest_engine(2), resume=True)
    assert (summary.images, summary.there) == (2, 1) and "1 there already" in str(summary)
    assert (out / "a.png").stat().st_mtime_ns == before
    assert sorted(path.name for path in out.iterdir()) == [
        *(".c.png.k3x_9a.tmp", ".z.png.k3x_9a.tmp"),
        *("a.png", "b.png", "c.png"),
    ]
    for path in photos.iterdir():
        np.testing.assert_array_equal(
            pixels_of(out / path.name), nearest(pixels_of(path).transpose(2, 0, 1)).transpose(1, 2, 0)
        )
    assert whole_run(photos, out, nearest_engine(2), resume=True).images == 0


def test_a_result_that_is_cut_short_is_made_again(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole_run(photos, out, nearest_engine(2))
    good = (out / "c.png").read_bytes()
    (out / "c.png").write_bytes(good[:-30])
    assert whole_run(photos, out, nearest_engine(2), resume=True).images == 1
    assert (out / "c.png").read_bytes() == good


def test_results_of_any_size_are_kept(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pillow's limit against decompression bombs is for images from elsewhere, not for results."""
    out = tmp_path / "out"
    whole_run(photos, out, nearest_engine(4))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 7)  # an image may have twice as many, a result has 16 times
    assert prepare(plan([photos], out), 4, resume=True) == ([], 3)
    assert Image.MAX_IMAGE_PIXELS == 20 * 7 and not caplog.records
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(ValueError, match=r"a\.png: is too large \(Image size \(108 pixels\) exceeds limit.*Cut it"):
        read_picture(photos / "a.png")


@pytest.mark.parametrize("form", ["png", "jpg", "webp"])
def test_a_result_of_another_scale_is_made_again(
    form: str, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lying = Image.Exif()
    lying[0x0112] = 6  # a viewer turns it by 90 degrees
    Image.fromarray(noise(5, 8)).save(photos / "turned.jpg", exif=lying)
    out = tmp_path / "out"
    jobs = plan([photos], out, form=form)
    upscale_files(nearest_engine(2), prepare(jobs, 2)[0], Tiling())
    assert prepare(jobs, 2, resume=True) == ([], 4)
    assert prepare(jobs, 4, resume=True) == (jobs, 0)
    assert f"a.{form} is 24x18, this network makes 48x36 of the image: it is made again" in caplog.text
    (out / f"a.{form}").write_bytes((out / f"a.{form}").read_bytes()[:-3])
    assert prepare(jobs, 2, resume=True) == (jobs[:1], 3)


def test_what_a_format_cannot_hold_is_refused_before_work(photos: Path, tmp_path: Path) -> None:
    write_png(photos / "a.png", noise(1, 8192))
    engine = nearest_engine(2, lambda x: pytest.fail("worked first"))
    with pytest.raises(UserError, match="16384x2 cannot be written as webp, which holds 16383 pixels"):
        upscale_files(engine, plan([photos / "a.png"], tmp_path / "a.webp"), Tiling())


def test_an_image_at_fault_is_named(photos: Path, tmp_path: Path) -> None:
    with np.errstate(all="ignore"), pytest.raises(UserError, match=r"a\.png: the output holds NaN or infinity"):
        whole_run(photos, tmp_path / "out", Engine("torch", 2, lambda x: nearest(x) / np.float32(0)))


def test_processes_share_the_images(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = plan([photos], tmp_path / "out")
    assert share_of_process(jobs) == jobs
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        shares.append([job.source.name for job in share_of_process(jobs)])
    assert shares == [["a.png", "c.png"], ["b.png"]]


def test_a_process_judges_by_its_own_share(photos: Path, tmp_path: Path) -> None:
    """One whose only image is broken must not stop the others; where no image is one, every process says so."""
    jobs = plan([photos], tmp_path / "out")
    broken = [job.source for job in jobs]
    check_any_readable(jobs, jobs, broken[:2])
    check_any_readable(jobs, jobs[1:2], broken[1:2])
    check_any_readable(jobs, [], [])  # more processes than images
    for path in photos.iterdir():
        path.write_bytes(b"")
    for own in (jobs, jobs[1:2]):
        with pytest.raises(UserError, match="none of 3 images could be read"):
            check_any_readable(jobs, own, [job.source for job in own])


def test_two_processes_make_all_results(
    run, photos: Path, model_of_depths: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, in the environment that torchrun sets; the image of one is broken."""
    (photos / "b.png").write_bytes(b"")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank, said in (("0", "2 image(s)"), ("1", "no image made")):
        monkeypatch.setenv("RANK", rank)
        done = run(photos, "-o", tmp_path / "out", "--model", model_of_depths)
        assert done.exit_code == 0 and said in done.output, done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


@pytest.mark.parametrize("names, said", [("abc", "upscaling"), ("a", "tiles")])
def test_progress_is_of_images_or_of_the_tiles_of_one(names: str, said: str, photos: Path, tmp_path: Path) -> None:
    """In a terminal, and although the first tiles do not fit: two bars at a time would be an error."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)

    def watch(x: np.ndarray) -> None:
        if x.shape[0] > 1:
            raise MemoryError

    jobs = plan([photos / f"{name}.png" for name in names], tmp_path / "out")
    tiling = Tiling(8, 2, 2)
    upscale_files(nearest_engine(2, watch), jobs, tiling, progress=lambda items, what: track(items, what, console))
    assert said in text.getvalue() and "100%" in text.getvalue()
    assert len(list((tmp_path / "out").iterdir())) == len(names)
