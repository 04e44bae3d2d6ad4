"""What the log of a training tells."""

from __future__ import annotations

import pytest

from qsr_plugin.watched_run import Step, read_line


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "INFO: [pams_..][epoch:  0, iter:   1,020, lr:(5.000e-04,5.000e-01,)] [eta: 0:00:11, time (data): 0.160 "
            "(0.008)] l_pix: 2.6159e-02 l_sktloss: 2.4449e-04 ",
            Step(iteration=1020, loss=0.026159),
        ),
        ("\t # psnr: 30.1907\tBest: 30.1907 @ 100 iter", Step(psnr=30.1907)),
        ("INFO: Stage 1 of 2: train weights, ranges.", None),
    ],
)
def test_lines_of_the_log(line: str, expected: Step | None) -> None:
    """Iterations and scores are told apart from everything else."""
    assert read_line(line) == expected
