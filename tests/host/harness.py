"""Real training runs for the tests: tiny LMDBs of synthetic photos, option files, and the entry points as processes."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from qsr_plugin import cli
from qsr_plugin.data.build import build_lmdb_pair

TIMEOUT = 240


def write_photos(folder: Path, count: int, side: int = 64, seed: int = 0) -> Path:
    """Smooth random colour photos with edges, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        coarse = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        photo = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
        cv2.rectangle(
            photo, (side // 4, side // 4), (side // 2, side // 2), tuple(map(int, rng.integers(0, 256, 3))), -1
        )
        cv2.imwrite(str(folder / f"photo{number}.png"), photo)
    return folder


def write_data(folder: Path, count: int = 6, scale: int = 4) -> Path:
    """Training LMDBs ``GT.lmdb`` and ``LQ.lmdb`` below ``folder``, in the host's format."""
    build_lmdb_pair(write_photos(folder / "photos", count), folder, scale, sub_image=64, step=64, min_side=32)
    return folder


def options(data: Path, **changes: Any) -> dict[str, Any]:
    """A complete option file for a tiny EDSR trained with PAMS on the CPU; mappings in ``changes`` are merged."""
    dataset = {
        "name": "tiny", "type": "PairedImageDataset", "dataroot_gt": str(data / "GT.lmdb"),
        "dataroot_lq": str(data / "LQ.lmdb"), "io_backend": {"type": "lmdb"},
    }  # fmt: skip
    train = {
        **dataset, "gt_size": 32, "use_hflip": True, "use_rot": True, "num_worker_per_gpu": 0, "batch_size_per_gpu": 2,
        "dataset_enlarge_ratio": 2, "prefetch_mode": None,
    }  # fmt: skip
    backbone = {
        "type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 2, "upscale": 4, "img_range": 255.0,
    }  # fmt: skip
    lr = {"weights": 1e-3, "ranges": 1e-2}
    opt = {
        "name": "run", "model_type": "QuantSRModel", "scale": 4, "num_gpu": 0, "manual_seed": 3,
        "datasets": {"train": train, "val": dict(dataset, name="tinyval")},
        "network_g": {"type": "QuantNet", "backbone": backbone},
        "recipe": {
            "base": "pams", "losses": [], "calibration": {"images": 4, "batch": 2},
            "stages": [{"train": ["weights", "ranges"], "iters": 8, "track_ranges": 0.0, "lr": lr}, {"lr": lr}],
        },
        "path": {"pretrain_network_g": None, "resume_state": None},
        "train": {
            "ema_decay": 0.9, "total_iter": 20, "warmup_iter": -1,
            "optim_g": {"type": "Adam", "lr": 1e-3, "betas": [0.9, 0.99]},
            "scheduler": {"type": "MultiStepLR", "milestones": [10], "gamma": 0.5},
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
        },
        "val": {
            "val_freq": 6, "save_img": False,
            "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 4, "test_y_channel": True}},
        },
        "logger": {"print_freq": 1, "save_checkpoint_freq": 4, "use_tb_logger": False},
        "dist_params": {"backend": "gloo", "port": 29500},
    }  # fmt: skip
    return _merge(opt, changes)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in changes.items():
        out[key] = _merge(out[key], value) if isinstance(out.get(key), dict) and isinstance(value, dict) else value
    return out


def write_options(opt: dict[str, Any], path: Path) -> Path:
    """Write an option file."""
    path.write_text(yaml.safe_dump(opt, sort_keys=False))
    return path


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with a command in a folder; one thread, output captured."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    cwd.mkdir(parents=True, exist_ok=True)
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, text=True, capture_output=True, timeout=TIMEOUT)


def qsr(cwd: Path, *arguments: object, fails: bool = False, starts: bool = False) -> str:
    """``qsr`` with arguments in a folder; returns what it says and asserts success, or failure without a traceback.

    Args:
        cwd: The folder.
        arguments: Of the command line.
        fails: Whether it is to end with an error.
        starts: In a process of its own, which takes seconds to start.
    """
    if starts:
        done = run(["-m", "qsr_plugin.cli", *map(str, arguments)], cwd, COLUMNS="160")
        status, said = done.returncode, done.stdout + done.stderr
    else:
        status, said = _qsr_here(cwd, list(map(str, arguments)))
    assert "Traceback" not in said and (status != 0) == fails, said[-5000:]
    return said


def _qsr_here(cwd: Path, arguments: list[str]) -> tuple[int, str]:
    """Exit status and output of the entry point in this process, which stays as it was."""
    said, logs = io.StringIO(), [logging.getLogger(name) for name in ("qsr_plugin", "qsr_plugin.compat")]
    before = [(log.level, list(log.handlers)) for log in logs]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.chdir(cwd)
        patch.setenv("COLUMNS", "160")
        patch.setattr(sys, "argv", ["qsr", *arguments])
        patch.setattr(sys, "path", [*sys.path])
        try:
            cli.main()
        except SystemExit as left:
            return int(left.code or 0), said.getvalue()
        finally:
            for log, (level, handlers) in zip(logs, before):
                log.setLevel(level)
                log.handlers = handlers
    return 0, said.getvalue()


def train(opt_file: Path, cwd: Path, *flags: str) -> str:
    """``python -m qsr_plugin.train``; returns its output and asserts success."""
    done = run(["-m", "qsr_plugin.train", "-opt", str(opt_file), *flags], cwd)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def losses(output: str) -> dict[int, str]:
    """Iteration to everything the log says about its losses."""
    found = re.findall(r"iter:\s*([\d,]+), lr:\(([^)]*)\).*?(l_\w+:.*)", output)
    return {int(number.replace(",", "")): f"{lr} {line.strip()}" for number, lr, line in found}


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint or a training state."""
    return torch.load(path, weights_only=True)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Places where two nested structures of tensors and plain values are not bit-identical."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [f"{path}: {a!r} != {b!r}"]


def write_pairs(folder: Path, scale: int = 2) -> tuple[Path, Path]:
    """Folders HR and LR of two photos each, whose sizes belong together and whose contents do not."""
    return write_photos(folder / "HR", 2, side=64), write_photos(folder / "LR", 2, side=64 // scale)
