"""Tables and JSON files."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
from rich.console import Console
from rich.table import Table

from qsr_plugin import complexity
from qsr_plugin.data.patches import PatchOptions
from qsr_plugin.report.evaluate import EvaluationResult, ImageScore
from qsr_plugin.report.fab import BitStatistics
from qsr_plugin.report.tables import (
    NO_RECORD,
    depth_table,
    quantity,
    results_table,
    site_table,
    size,
    summary_table,
    write_json,
)

RESULT = EvaluationResult(4, 31.4159, 0.87654, 4.0, (ImageScore("a.png", 31.4159, 0.87654, 4.0),))
CUT = PatchOptions(size=96, overlap=6, last="enlarge")
BITS = BitStatistics(
    5.6, 4.9, (5.2, 5.5, 6.0), 6.81, {"4": 0.31, "6": 0.58, "8": 0.11}, {"body.0.conv1.input": 5.6}, {}
)
ADAPTIVE = dataclasses.replace(RESULT, fab=5.6, bits=BITS, patches=CUT)


def text_of(table: Table, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 140])
def test_site_table_has_every_layer_on_one_line(tiny, width: int) -> None:
    report = complexity(tiny("SRResNet", "pams", weight_bits=4, act_bits=4), (6, 10))
    lines = text_of(site_table(report), width).splitlines()
    for site in report.sites:
        (line,) = (line for line in lines if f" {site.name} " in line)
        assert f" {site.parameters:,} " in line
        assert ("yes" in line) == site.in_fab
    total = next(line for line in lines if " total " in line)
    assert quantity(report.macs) in total
    assert size(report.storage_bits) in total


def test_rows_and_the_rest_add_up_to_the_total(tiny) -> None:
    report = complexity(tiny("SRResNet", "pams", weight_bits=4, act_bits=4), (6, 10))
    other = next(line for line in text_of(site_table(report)).splitlines() if "(other)" in line)
    assert f" {report.parameters - sum(site.parameters for site in report.sites)} " in other
    ranges = 2 * 32 * 1  # the max scale at the input of each block
    norms = 5 * 4 * 8 * 32  # five batch norms of eight channels
    prelus = 4 * 8 * 32
    assert size(ranges + norms + prelus) in other


def test_summary_states_convention_size_and_scores(tiny) -> None:
    report = complexity(tiny("EDSR", "pams", weight_bits=4, act_bits=4), (6, 10), convention="cadyq")
    text = text_of(summary_table(report, {"Set5": RESULT}))
    for part in ("EDSR, pams W4A4", "'cadyq'", "6x10", "4.00 bits", "Set5 x4", "31.42 dB / 0.8765"):
        assert part in text
    assert size(report.storage_bits) in text
    assert "4 of 8 layers" in text


def test_summary_names_what_is_computed_at_run_time_where_there_is_any(tiny) -> None:
    texts = [text_of(summary_table(complexity(tiny("EDSR", method), (6, 10)))) for method in ("daq", "minmax")]
    assert "Ranges found at run time" in texts[0] and "12.48 k float operations" in texts[0]
    assert "run time" not in texts[1]


def test_results_are_compared_in_one_table(tiny) -> None:
    networks = {"float": tiny("EDSR"), "4 bits": tiny("EDSR", "pams", weight_bits=4, act_bits=4)}
    reports = {label: complexity(net, (6, 10)) for label, net in networks.items()}
    text = text_of(results_table({label: (report, RESULT) for label, report in reports.items()}, "Set5"), 80)
    for heading in ("PSNR", "SSIM", "FAB", "BitOPs", "Size"):
        assert heading in text
    for label, report in reports.items():
        line = next(line for line in text.splitlines() if f" {label} " in line)
        for part in ("31.42", "0.8765", quantity(report.bitops), size(report.storage_bits)):
            assert part in line


def test_results_counted_differently_are_not_compared(tiny) -> None:
    report = complexity(tiny("EDSR"), (6, 10))
    for change in ({"convention": "cadyq"}, {"input_size": (6, 11)}, {"patches": CUT}):
        other = dataclasses.replace(report, **change)
        with pytest.raises(ValueError, match="one BitOPs convention, input size, scale and way of cutting images"):
            results_table({"a": (report, RESULT), "b": (other, RESULT)})
    with pytest.raises(ValueError, match="scored on patches of 96x96, overlap 6, last enlarged"):
        results_table({"a": (report, RESULT), "b": (report, ADAPTIVE)})
    with pytest.raises(ValueError, match="no result"):
        results_table({})


def test_bits_that_vary_are_shown_with_their_range_and_the_protocol(tiny) -> None:
    report = complexity(tiny("EDSR", "pams", weight_bits=4, act_bits=4), (200, 200), patches=CUT)
    summary = text_of(summary_table(report, {"Set5": ADAPTIVE}), 120)
    for part in (
        "5.60 [4.90, 6.81]",
        "4: 31 %, 6: 58 %, 8: 11 %",
        "Set5 run as",
        "patches of 96x96, overlap 6, last enlar",
    ):
        assert part in summary
    assert "200x200 (LR height x width), in patches of 96x96" in summary
    compared = text_of(
        results_table({"static": (report, dataclasses.replace(RESULT, patches=CUT)), "own": (report, ADAPTIVE)})
    )
    assert "5.60 [4.90, 6.81]" in compared and " 4.00 " in compared
    assert "Scores and FAB on patches of 96x96" in " ".join(compared.split())
    assert ADAPTIVE.to_dict()["protocol"] == "patches of 96x96, overlap 6, last enlarged"
    assert json.loads(json.dumps(ADAPTIVE.to_dict()))["bits"]["shares"]["6"] == 0.58
    assert ADAPTIVE.place_bits == {"body.0.conv1.input": 5.6} and RESULT.place_bits == {}


def test_bits_without_a_record_are_said_to_have_none(tiny) -> None:
    report = complexity(tiny("EDSR", "pams", weight_bits=4, act_bits=4), (6, 10))
    sites = tuple(dataclasses.replace(site, act_bits=None) for site in report.sites)
    never = {"fab": None, "weighted_fab": None, "bitops": None, "bitops_quantized": None, "sites": sites}
    report = dataclasses.replace(report, **never, policy_ops=1500, blocks=(1, 1))
    summary = text_of(summary_table(report))
    assert summary.count(NO_RECORD) == 4 and "1.5 k float operations" in summary
    assert quantity(report.macs) in summary and size(report.storage_bits) in summary
    assert text_of(site_table(report), 140).count(NO_RECORD) == len(sites)
    assert text_of(depth_table([report])).count(NO_RECORD) == 2
    assert NO_RECORD in text_of(results_table({"a": (report, RESULT)}))


def test_json_is_strict_and_complete(tiny, tmp_path) -> None:
    report = complexity(tiny("EDSR", "pams"), (6, 10))
    perfect = dataclasses.replace(RESULT, psnr=math.inf)
    path = tmp_path / "deep" / "report.json"
    write_json({"complexity": report.to_dict(), "scores": {"Größe": perfect.to_dict()}}, path)
    data = json.loads(path.read_text("utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["complexity"]["macs"] == report.macs
    assert data["scores"]["Größe"]["psnr"] == "inf"
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (999, "999"), (1000, "1 k"), (114_230_476_800, "114.2 G")])
def test_quantities(number: float, text: str) -> None:
    assert quantity(number) == text


@pytest.mark.parametrize(("bits", "text"), [(800, "100 B"), (8000, "1 kB"), (16_729_280, "2.091 MB")])
def test_sizes(bits: int, text: str) -> None:
    assert size(bits) == text
