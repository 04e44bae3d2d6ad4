"""A training in a process of its own, watched through its log: a crash there leaves this process alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsr_plugin.errors import UserError
from qsr_plugin.options_file import write_options

_TAIL = 15  # lines of a failed training's log to show

_ITERATION = re.compile(r"iter:\s*([\d,]+), lr:.*?l_pix: (\S+)")
_SCORE = re.compile(r"# psnr: (\S+)")


class TrainingError(UserError, RuntimeError):
    """The training failed; the message holds the end of its log.

    Attributes:
        reason: What its log says about why, without the lines that led there.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Step:
    """What a line of the training's log says.

    Attributes:
        iteration: Iterations done; ``None`` on a line that tells a score.
        loss: Pixel loss of that iteration, pixels in [0, 1]; ``None`` on a line that tells a score.
        psnr: Score on the validation images in dB; ``None`` on a line that tells an iteration.
    """

    iteration: int | None = None
    loss: float | None = None
    psnr: float | None = None


def train(options: dict[str, Any], folder: Path, watch: Callable[[Step], None]) -> Path:
    """Run ``python -m qsr_plugin.train`` on the options; the complete log is ``train.log``.

    Args:
        options: All options of the run. What an earlier run of this name left in the folder is deleted.
        folder: The training runs in it; options, log and ``experiments`` are written there.
        watch: Called for every line of the log that tells an iteration or a score.

    Returns:
        The trained network: ``.safetensors`` of a quantized one, ``.pth`` of a float one.

    Raises:
        TrainingError: If the training fails, with the end of its log.
    """
    root = folder.resolve()
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(root / "experiments" / options["name"], ignore_errors=True)
    write_options(options, root / "train.yml")
    command = [sys.executable, "-m", "qsr_plugin.train", "-opt", "train.yml"]
    tail: deque[str] = deque(maxlen=_TAIL)
    how = {"cwd": root, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    # Small layers gain little from more threads, and threads that wait for each other on a busy machine lose minutes.
    how["env"] = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // 2, 1)), **os.environ}
    with open(root / "train.log", "w", encoding="utf-8") as log, subprocess.Popen(command, **how) as process:
        try:
            for line in process.stdout:
                log.write(line)
                tail.append(line.rstrip())
                if (step := read_line(line)) is not None:
                    watch(step)
            status = process.wait()
        except BaseException:
            process.terminate()
            raise
    if status != 0:
        end = "\n  ".join(tail)
        message = f"the training ended with status {status}. The end of {root / 'train.log'}:\n  {end}"
        raise TrainingError(message, _reason(list(tail), status))
    network = root / "experiments" / options["name"] / "models" / "net_g_latest.safetensors"
    return network if network.is_file() else network.with_suffix(".pth")


def read_line(line: str) -> Step | None:
    """What a line of the training's log says, or ``None`` if it tells neither an iteration nor a score."""
    if found := _ITERATION.search(line):
        return Step(iteration=int(found[1].replace(",", "")), loss=float(found[2]))
    if found := _SCORE.search(line):
        return Step(psnr=float(found[1]))
    return None


def _reason(tail: list[str], status: int) -> str:
    """What this package reported as error, else the last line: that of a traceback names its exception."""
    lines = [line for line in tail if line.strip()]
    start = next((index for index, line in enumerate(lines) if line.startswith("error: ")), -1)
    if start >= 0:
        return "\n".join(lines[start:]).removeprefix("error: ")
    return lines[-1].strip() if lines else f"ended with status {status} and said nothing"
