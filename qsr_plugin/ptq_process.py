"""Rows of a table of post-training methods, each in a process of its own, some of them at once."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Optional

from qsr_plugin.ptq_row import Job
from qsr_plugin.report.result_io import read_results
from qsr_plugin.report.result_schema import Result
from qsr_plugin.report.tables import write_json

#: Seconds between two looks at processes that are at work.
_LOOK = 0.1


class RowProcess:
    """A process that makes one row: ``python -m qsr_plugin.ptq_row``.

    Args:
        job: What to do.
        logs: Folder for what the process prints.
    """

    def __init__(self, job: Job, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.job = job
        self._log = logs / f"{job.label.replace(' ', '_')}.log"
        self._folder = tempfile.TemporaryDirectory(prefix="qsr_")
        asked, self._answer = (Path(self._folder.name) / name for name in ("job.json", "row.json"))
        write_json(job.to_dict(), asked)
        command = [sys.executable, "-m", "qsr_plugin.ptq_row", str(asked), str(self._answer)]
        variables = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
        with open(self._log, "w", encoding="utf-8") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=variables)

    def row(self) -> Optional[Result]:
        """The row, one that says why if it fails or the process ends without one; ``None`` while it is at work."""
        status = self._process.poll()
        if status is None:
            return None
        with self._folder:
            if self._answer.is_file():
                return read_results(self._answer)[0]
        lines = [line.strip() for line in self._log.read_text("utf-8", "replace").splitlines() if line.strip()]
        why = "killed, perhaps for want of memory" if status == -9 else lines[-1] if lines else "said nothing"
        return self.job.result().model_copy(update={"note": f"the process ended with status {status}: {why}"})

    def stop(self) -> None:
        """End it without a row."""
        with self._folder, self._process:
            self._process.kill()


def rows_of(jobs: Iterable[Job], logs: Path, at_once: int = 1) -> Iterator[tuple[Job, Result]]:
    """Make rows, some at once, and hand each on when it is there. Closing the iterator ends those that are at work.

    Args:
        jobs: What to do, begun in this order.
        logs: Folder for what the processes print.
        at_once: How many processes are at work.
    """
    waiting, running = iter(jobs), list[RowProcess]()
    try:
        while True:
            for job in islice(waiting, at_once - len(running)):
                running.append(RowProcess(job, logs))
            if not running:
                return
            time.sleep(_LOOK)
            for one in tuple(running):
                if (row := one.row()) is not None:
                    running.remove(one)
                    yield one.job, row
    finally:
        for one in running:
            one.stop()
