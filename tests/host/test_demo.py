"""The demonstration: its parts, and the whole script at a tiny size."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from qsr_plugin import compat, demo, load_quantized, watched_run
from qsr_plugin.data.images import list_images, read_rgb
from qsr_plugin.data.resize import downscale
from qsr_plugin.report.result_io import read_results

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "demo.py"
TINY = {"num_feat": 8, "num_block": 2}


@pytest.fixture
def script() -> ModuleType:
    """``tools/demo.py`` as a module."""
    spec = importlib.util.spec_from_file_location("demo_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Random weights of a tiny EDSR."""
    compat.import_host()
    from qsr_plugin.archs.quant_net_arch import build_backbone

    path = tmp_path / "tiny.safetensors"
    options = demo.demo_options(demo.Folders(tmp_path), path)["network_g"]["backbone"]
    torch.manual_seed(0)
    save_file(build_backbone({**options, **TINY}).state_dict(), path)
    return path


def tiny(options: dict[str, Any]) -> dict[str, Any]:
    """The demonstration's options for the tiny EDSR and small batches."""
    options["network_g"]["backbone"].update(TINY)
    options["datasets"]["train"].update(gt_size=32, batch_size_per_gpu=2, num_worker_per_gpu=0)
    options["logger"]["print_freq"] = 1
    return options


def test_photos_come_in_matching_pairs_and_are_not_shared(tmp_path: Path) -> None:
    """Sides are multiples of the scale, LR follows the rule, no photo is on both sides."""
    folders = demo.Folders(tmp_path)
    demo.write_photos(folders)
    names = {path.stem for path in list_images(folders.train)}
    assert names == set(demo.TRAIN_PHOTOS) and len(demo.TEST_PHOTOS) >= 2
    assert not names & set(demo.TEST_PHOTOS)
    for path in list_images(folders.hr):
        hr = read_rgb(path)
        assert hr.shape[0] % 4 == hr.shape[1] % 4 == 0 and max(hr.shape) <= 640
        assert hr.std() > 10
        np.testing.assert_array_equal(read_rgb(folders.lr / path.name), downscale(hr, 4))


def test_bicubic_is_that_of_the_low_resolution_images() -> None:
    """Pillow uses the same kernel; OpenCV's (a = -0.75) is another."""
    image = np.random.default_rng(0).integers(60, 190, (12, 10, 3), np.uint8)  # nothing overshoots and is clipped
    got = demo.Bicubic()(torch.from_numpy(image.transpose(2, 0, 1)).float()[None])[0].permute(1, 2, 0).numpy()
    same = np.asarray(Image.fromarray(image).resize((40, 48), Image.Resampling.BICUBIC), np.float32)
    other = cv2.resize(image, (40, 48), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    assert np.abs(got - same).max() <= 2 < np.abs(got - other).max()


def test_options_follow_the_length(tmp_path: Path) -> None:
    """A shorter run decays at the same shares of its length; data and weights are those of the demonstration."""
    folders = demo.Folders(tmp_path)
    full = demo.demo_options(folders, tmp_path / "w.safetensors")["train"]
    options = demo.demo_options(folders, tmp_path / "w.safetensors", full["total_iter"] // 2)
    assert options["train"]["total_iter"] == full["total_iter"] // 2
    assert options["train"]["scheduler"]["milestones"] == [m // 2 for m in full["scheduler"]["milestones"]]
    assert options["network_g"]["recipe"]["bits"] == {"weight": 4, "act": 4}
    assert Path(options["datasets"]["train"]["dataroot_lq"]) == folders.data / "LQ.lmdb"
    assert Path(options["path"]["pretrain_network_float"]) == tmp_path / "w.safetensors"


def test_failed_training_shows_the_end_of_its_log(tmp_path: Path, weights: Path) -> None:
    """Here because there are no data."""
    folders = demo.Folders(tmp_path)
    with pytest.raises(watched_run.TrainingError, match="GT.lmdb") as caught:
        watched_run.train(tiny(demo.demo_options(folders, weights, 2)), tmp_path, lambda step: None)
    assert str(tmp_path / "train.log") in str(caught.value)
    assert "GT.lmdb" in (tmp_path / "train.log").read_text()
    assert caught.value.reason.startswith("the data cannot be used") and "GT.lmdb" in caught.value.reason


def test_whole_script(
    script: ModuleType,
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From photos to table, pictures and networks; what an earlier run left is replaced."""
    whole, options = demo.photo, demo.demo_options
    middle: Callable[[str], np.ndarray] = lambda name: np.ascontiguousarray(whole(name)[100:292, 100:292])  # noqa: E731
    monkeypatch.setattr(demo, "photo", middle)
    monkeypatch.setattr(demo, "TRAIN_PHOTOS", demo.TRAIN_PHOTOS[:1])
    monkeypatch.setattr(demo, "TEST_PHOTOS", {name: (20, 20, 40, 40) for name in demo.TEST_PHOTOS})
    monkeypatch.setattr(demo, "demo_options", lambda *args: tiny(options(*args)))
    out = tmp_path / "out"
    earlier = out / "experiments" / "pams_edsr_small_x4_demo"
    earlier.mkdir(parents=True)
    script.main(out=out, iters=4, weights=weights)

    figures = {result.label: result.quality["photos"] for result in read_results(out / "results.json")}
    fab = {label: quality.fab for label, quality in figures.items()}
    assert list(fab.values()) == [32, 8, 4, 4, 4, 4] and list(fab)[-1] == "PAMS W4A4, trained"
    printed = capsys.readouterr().out
    assert all(f"{quality.psnr:.2f}" in printed for quality in figures.values())
    assert [path.stem for path in list_images(out / "pictures")] == sorted(demo.TEST_PHOTOS)
    start, end = (load_quantized(out / "models" / f"pams_w4a4{kind}.safetensors") for kind in ("", "_trained"))
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), end.parameters()))
    assert [path.name for path in earlier.parent.iterdir()] == [earlier.name]
    assert (out / "models" / "pams_w4a4_trained.onnx").is_file() and "compared with PyTorch" in printed
    packed = load_quantized(out / "models" / "pams_w4a4_trained_packed.safetensors")
    x = torch.rand(1, 3, 12, 9)
    with torch.no_grad():
        assert torch.equal(packed(x), end(x))
    speeds = {result.label for result in read_results(out / "speed.json")}
    assert {"torch", "openvino-float", "openvino-int8"} <= speeds
