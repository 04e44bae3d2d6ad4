"""Rows of a comparison and their tables."""

from __future__ import annotations

import csv
import io

from rich.console import Console

from qsr_plugin.report.comparison import Row, to_csv, to_markdown, to_table
from qsr_plugin.report.result_schema import Costs, Quality, Result, Training

ROWS = [
    Row("float", "float", "float", end={"Set5": {"psnr": 31.2061, "ssim": 0.88026}}, fab=32.0, bitops=20.98e12, storage_bits=7454816),
    Row(
        "pams W4A4", "pams", "W4A4", "body", {"Set5": {"psnr": 29.876, "ssim": 0.8293}}, {"Set5": {"psnr": 30.311, "ssim": 0.856}},
        4.0, 12.42e12, 3327328, 0.15, 0.1, 1000,
    ),
    Row("odm W4A4", "odm", "W4A4", note="iteration 7: loss l_pix\nis not finite"),
]  # fmt: skip


def test_markdown_has_a_line_for_each_row_and_the_reasons() -> None:
    lines = to_markdown(ROWS, "Comparison").splitlines()
    assert lines[0] == "# Comparison"
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert len(widths) == 1
    (pams,) = (line for line in lines if line.startswith("| pams"))
    for part in ("29.88 → 30.31", "0.8293 → 0.8560", "4.00", "12.42 T", "415.9 kB", "1.50"):
        assert f"| {part} |" in pams
    (plain,) = (line for line in lines if line.startswith("| float"))
    assert "| 31.21 |" in plain
    assert lines[-1] == "* odm W4A4: failed: iteration 7: loss l_pix is not finite"


def test_a_table_without_any_result_still_says_why() -> None:
    assert to_markdown(ROWS[2:]).splitlines()[-1].startswith("* odm W4A4: failed")


def test_terminal_table_fits_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(to_table(ROWS, "Comparison"))
    text = console.export_text()
    for part in (
        "pams W4A4",
        "29.88 → 30.31",
        "0.8560",
        "12.42 T",
        "415.9 kB",
        "1.50",
        "odm W4A4: failed: iteration 7",
    ):
        assert part in text
    assert "…" not in text


def test_csv_holds_the_numbers_unrounded() -> None:
    float_row, pams, failed = csv.DictReader(io.StringIO(to_csv(ROWS)))
    assert (float(pams["Set5_psnr_start"]), float(pams["Set5_psnr"])) == (29.876, 30.311)
    assert float(pams["cost"]) == 0.15 / 0.1 and int(pams["storage_bits"]) == 3327328
    assert float_row["Set5_psnr_start"] == "" and float_row["cost"] == ""
    assert failed["Set5_psnr"] == "" and failed["note"] == "iteration 7: loss l_pix is not finite"


def test_rows_of_results() -> None:
    """What a result says, none of what a table leaves out."""
    shared = {"parameters": 1, "macs": 1, "convention": "macs-bits", "input_size": (180, 320)}
    results = [
        Result(label="float", quality={"Set5": Quality(psnr=31.2061, ssim=0.88026, fab=32)}, costs=Costs(fab=32, bitops=20.98e12, storage_bits=7454816, **shared)),
        Result(
            label="pams W4A4", method="pams", bits="W4A4", placement="body", before={"Set5": Quality(psnr=29.876, ssim=0.8293)},
            quality={"Set5": Quality(psnr=30.311, ssim=0.856)}, costs=Costs(fab=4, bitops=12.42e12, storage_bits=3327328, **shared),
            training=Training(iterations=1000, seconds=0.15, float_seconds=0.1), seed=0,
        ),
        Result(label="odm W4A4", method="odm", bits="W4A4", note="iteration 7: loss l_pix\nis not finite"),
    ]  # fmt: skip
    assert [Row.of(result) for result in results] == ROWS
    assert [row.failed for row in ROWS] == [False, False, True]
