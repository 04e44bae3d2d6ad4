"""``tools/results_table.py``: columns of the papers, groups, marks, the three formats, and what cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qsr_plugin.report.paper_columns import ColumnError
from qsr_plugin.report.paper_formats import FormatError, check_format, to_html, to_latex, to_markdown
from qsr_plugin.report.paper_tables import BEST, SECOND, collect, paper_table
from qsr_plugin.report.result_io import ResultError, write_results
from qsr_plugin.report.result_schema import Costs, Quality, Result, ResultTable

WAY = {"convention": "macs-bits", "input_size": (180, 320), "convention_text": "all layers"}


def costs(fab: float, bitops: float, storage_bits: int, **way: Any) -> Costs:
    given = {**WAY, "parameters": 1_517_571, "macs": 114 * 10**9, **way}
    return Costs(fab=fab, bitops=bitops, storage_bits=storage_bits, scaled_parameters=storage_bits / 32, **given)


def scores(psnr: float, fab: float = 4.0, **more: Any) -> dict[str, Quality]:
    return {
        name: Quality(psnr=psnr - lower, ssim=0.8 + psnr / 1000, fab=fab, border=4, **more)
        for name, lower in (("Set5", 0), ("Urban_100", 6))
    }


def quantized(method: str, psnr: float, bits: str = "W4A4", placement: str = "body", **more: Any) -> Result:
    told = {"method": method, "bits": bits, "placement": placement, "network": "edsr", "scale": 4}
    label = more.pop("label", f"{method} {bits}")
    return Result(label=label, quality=scores(psnr, more.pop("fab", 4.0)), **told, **more)


PLAIN = Result(label="float", network="edsr", quality=scores(32.1, 32.0), costs=costs(32.0, 117e12, 48_562_272))
ROWS = [
    quantized("omse", 30.4, costs=costs(4.0, 1.9e12, 8_000_000), seconds={"calibration": 4.0, "ranges": 12.0}),
    quantized("minmax", 30.1, costs=costs(4.0, 2e12, 8_000_000), seconds={"calibration": 3.0}),
    quantized("adabm", 30.702, "W4A4MP", fab=3.9, costs=costs(3.9, 1.8e12, 9_000_000), seconds={"calibration": 60.0}),
    quantized("auto", 30.699, label="auto W4A4+"),
    PLAIN,
    quantized("omse", 31.9, "W8A8"),
    Result(label="lsq W4A4", method="lsq", network="edsr", note="ValueError: a\nb"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A table and a JSON file that holds something else."""
    write_results(ResultTable(rows=tuple(ROWS)), tmp_path / "in" / "ptq.json")
    (tmp_path / "in" / "other.json").write_text('{"a": 1}')
    return tmp_path / "in"


def lines(text: str) -> list[list[str]]:
    """Cells of a Markdown table without its rule."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in rows[:1] + rows[2:]]


@pytest.mark.parametrize(
    ("columns", "head", "adabm"),
    [
        ("cadyq", ["FAB", "PSNR", "SSIM", "BitOPs"], ["**3.90**", "**30.70**", "**0.831**", "**1.8 T**"]),
        ("adabm", ["FAB", "PSNR", "SSIM"], ["**3.90**", "**30.70**", "**0.831**"]),
        ("quantsr", ["PSNR", "SSIM"], ["**30.70**", "**0.8307**"]),
        ("odm", ["PSNR", "SSIM"], ["**30.70**", "**0.831**"]),
        ("granular-dq", ["FAB", "PSNR", "SSIM"], ["**3.90**", "**30.70**", "**0.831**"]),
    ],
)
def test_columns_of_the_papers(folder: Path, columns: str, head: list[str], adabm: list[str]) -> None:
    found, *rows = lines(to_markdown(paper_table(collect([folder]), columns)))
    before = {"quantsr": ["Params", "BitOPs"], "odm": ["Storage", "BitOPs"], "granular-dq": ["Params", "BitOPs"]}
    sets = [f"{test} {one}" for test in ("Set5", "Urban_100") for one in head]
    after = ["Time (s)"] if columns == "adabm" else []
    assert found == ["Method", "Bits", *before.get(columns, []), *sets, *after]
    (row,) = (row for row in rows if row[:2] == ["adabm", "W4A4MP"])
    start = 2 + len(before.get(columns, []))
    assert row[start : start + len(head)] == adabm
    if before.get(columns):
        assert row[2:4] == ["<u>281.2 k</u>", "**1.8 T**"]
    if after:
        assert row[-1] == "60" and [one[-1] for one in rows if one[0] == "omse"] == ["-", "<u>16</u>"]


def test_float_first_then_groups_with_the_best_and_the_second(folder: Path) -> None:
    """Ranks are those of what is shown: 30.702 and 30.699 are the same; nothing is marked in a group of one."""
    table = paper_table(collect([folder]), "adabm", ["Set5"])
    names = [[(line[0].text, line[1].text) for line in group] for group in table.groups]
    assert names == [
        [("float", "32")], [("omse", "W8A8")],
        [("omse", "W4A4"), ("minmax", "W4A4"), ("adabm", "W4A4MP"), ("auto", "W4A4+")],
    ]  # fmt: skip
    assert [[line[3].rank for line in group] for group in table.groups] == [[0], [0], [SECOND, 0, BEST, BEST]]
    assert [line[2].rank for line in table.groups[2]] == [SECOND, SECOND, BEST, SECOND], "fewer bits are better"
    assert any("lsq W4A4 of ptq.json: ValueError: a b" in note for note in table.notes)
    assert "PSNR in dB and SSIM on Y, 4 border pixels left out, whole images." in table.notes
    assert "BitOPs (macs-bits, 180x320): all layers." in table.notes


def test_missing_figures_are_dashes(folder: Path) -> None:
    _, *rows = lines(to_markdown(paper_table(collect([folder]), "odm")))
    (auto,) = (row for row in rows if row[0] == "auto")
    assert auto[2:4] == ["-", "-"]
    every, *_ = lines(to_markdown(paper_table(collect([folder]))))
    assert "Memory" not in every and {"Size", "MACs", "Parameters", "Params", "Time (s)"} <= set(every)


def test_what_was_counted_in_two_ways_has_two_columns(folder: Path) -> None:
    way = {"convention": "cadyq", "input_size": (96, 96), "protocol": "patches of 96x96"}
    write_results(quantized("cadyq", 30.0, costs=costs(4.0, 6.55e9, 8_000_000, **way)), folder / "c.json")
    head, *rows = lines(to_markdown(paper_table(collect([folder]), "odm", ["Set5"])))
    assert head[4:6] == ["BitOPs (cadyq, 96x96, patches of 96x96)", "BitOPs (macs-bits, 180x320)"]
    (row,) = (row for row in rows if row[0] == "cadyq")
    assert row[4:6] == ["6.55 G", "-"], "alone in its column: nothing to compare"


def test_operations_on_a_set_need_the_bits_of_that_set(tmp_path: Path) -> None:
    """As written, or those of the network where the bits are the same; else there are none."""
    quality = {
        "A": Quality(psnr=30, fab=4.0),
        "B": Quality(psnr=30, fab=3.5),
        "C": Quality(psnr=30, fab=3.5, bitops=1e9),
    }
    write_results(Result(label="m W4A4", method="m", quality=quality, costs=costs(4.0, 2e9, 8000)), tmp_path / "r.json")
    head, row = lines(to_markdown(paper_table(collect([tmp_path / "r.json"]), "cadyq")))
    assert [cell for name, cell in zip(head, row) if "BitOPs" in name] == ["2 G", "-", "1 G"]


def test_placements_are_groups_where_methods_have_several(tmp_path: Path) -> None:
    rows = tuple(quantized(m, p, placement=x) for x, p in (("body", 30.0), ("full", 29.0)) for m in ("minmax", "omse"))
    write_results(ResultTable(rows=rows), tmp_path / "r.json")
    table = paper_table(collect([tmp_path / "r.json"]), "adabm")
    names = [[line[0].text for line in group] for group in table.groups]
    assert names == [["minmax, body", "omse, body"], ["minmax, full", "omse, full"]]


def test_files_that_belong_together_are_joined(tmp_path: Path) -> None:
    """The same result in two files is one; float networks are merged; what does not tell its network joins by backbone."""
    backbone = {"type": "EDSR", "upscale": 4}
    mine = quantized("omse", 30.4, backbone=backbone, reference=PLAIN)
    write_results(mine, tmp_path / "a.json")
    write_results(mine, tmp_path / "again" / "a.json")
    more = PLAIN.model_copy(update={"quality": {"B100": Quality(psnr=27.5)}, "costs": None})
    write_results(quantized("omse", 30.3, reference=more), tmp_path / "b.json")
    unnamed = {"network": "", "architecture": "EDSR x4", "backbone": backbone}
    write_results(quantized("pams", 30.0).model_copy(update=unnamed), tmp_path / "c.json")
    other = PLAIN.model_copy(update={"network": "rdn", "quality": scores(32.4, 32.0)})
    write_results(other, tmp_path / "d.json")
    head, *rows = lines(to_markdown(paper_table(collect([tmp_path]), "odm")))
    assert head[0] == "Network" and "B100 PSNR" in head
    assert [row[:2] for row in rows] == [
        ["edsr", "float"], ["edsr", "omse (a)"], ["edsr", "omse (b)"], ["edsr", "pams"], ["rdn", "float"],
    ]  # fmt: skip
    assert rows[0][head.index("B100 PSNR")] == "27.50" and rows[0][head.index("Set5 PSNR")] == "32.10"


def test_networks_without_a_name_are_told_apart_by_their_arguments(tmp_path: Path) -> None:
    """Equal architectures of other arguments are no group: nothing is ranked, no float networks are merged."""
    for blocks, psnr in ((16, 30.0), (32, 31.0)):
        said = {"architecture": "EDSR x4", "backbone": {"type": "EDSR", "num_block": blocks, "upscale": 4}}
        plain = Result(label="float", quality={f"Set{blocks}": Quality(psnr=32.0)}, **said)
        quality = {"Set5": Quality(psnr=psnr)}
        mine = Result(label="pams W4A4", method="pams", bits="W4A4", quality=quality, reference=plain, **said)
        write_results(mine, tmp_path / f"{blocks}.json")
    named = quantized("pams", 32.0, backbone={"type": "RDN"}, architecture="EDSR x4")
    write_results(named, tmp_path / "named.json")
    _, *rows = lines(to_markdown(paper_table(collect([tmp_path]), "odm", ["Set5"])))
    assert [(row[0], row[1], row[3]) for row in rows] == [
        ("EDSR x4 (num_block 16)", "float", "-"), ("EDSR x4 (num_block 16)", "pams", "30.00"),
        ("EDSR x4 (num_block 32)", "float", "-"), ("EDSR x4 (num_block 32)", "pams", "31.00"),
        ("edsr", "pams", "32.00"),
    ]  # fmt: skip


@pytest.mark.parametrize(("blocks", "lines_of_float"), [(16, 1), (32, 2)])
def test_float_networks_without_a_common_set_need_the_same_arguments(blocks: int, lines_of_float: int) -> None:
    found = [
        (Path(f"{name}.json"), Result(label="float", network="n", backbone={"num_block": b}, quality=quality))
        for name, b, quality in (("a", 16, {"A": Quality(psnr=30)}), ("b", blocks, {"B": Quality(psnr=30)}))
    ]
    (group,) = paper_table(found, "odm").groups
    assert len(group) == lines_of_float


class Cells(HTMLParser):
    """Texts of a page's table by row, with marks."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.bodies, self.spans = 0, []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.spans += [int(value) for name, value in attrs if name == "colspan"]
        elif tag in ("b", "u"):
            self.rows[-1][-1] += tag
        self.bodies += tag == "tbody"

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_html(folder: Path) -> None:
    write_results(quantized("<b>&", 29.0), folder / "x.json")
    text = to_html(paper_table(collect([folder]), "adabm"))
    page = Cells()
    page.feed(text[: text.index("</table>")])
    sets, head, *rows = page.rows
    assert sets == ["", "Set5", "Urban_100", ""] and page.spans == [2, 3, 3, 1] and page.bodies == 3
    assert {len(row) for row in rows} == {len(head)} == {9}
    (row,) = (row for row in rows if row[0] == "adabm")
    assert row[2:5] == ["b3.90", "b30.70", "b0.831"]
    assert "&lt;b&gt;&amp;" in text and "http" not in text


def test_latex(folder: Path) -> None:
    """Balanced columns, escaped names, the rules of booktabs."""
    text = to_latex(paper_table(collect([folder]), "odm"))
    assert r"\multicolumn{2}{c}{Urban\_100}" in text and r"\cmidrule(lr){5-6}\cmidrule(lr){7-8}" in text
    assert text.count(r"\midrule") == 3 and text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    assert r"\textbf{1.8 T}" in text and r"\underline{1.9 T}" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert r"\begin{tabular}{llrrrrrr}" in text and {line.count(" & ") for line in body[1:]} == {7}
    # Two columns of a set are one cell.
    assert body[0].count(" & ") == 5
    hard = to_latex(paper_table([(Path("x.json"), quantized("a_b%\\^", 29.0))], "odm"))
    assert r"a\_b\%\textbackslash{}\textasciicircum{}" in hard


def test_script_writes_what_is_asked_for(
    script: Callable[[str], ModuleType], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = script("results_table")
    files = [tmp_path / f"table{ending}" for ending in (".md", ".html", ".tex")]
    tool.main([folder], "adabm", None, files)
    assert all("30.70" in file.read_text("utf-8") for file in files)
    assert "wrote" in capsys.readouterr().out
    tool.main([folder / "ptq.json"], "all", "Set5", None)
    assert capsys.readouterr().out == to_markdown(paper_table(collect([folder]), "all", ["Set5"]))


@pytest.mark.parametrize(
    ("results", "options", "says"),
    [
        ("ptq.json", {"columns": "adabn"}, "unknown columns 'adabn'. Did you mean 'adabm'? Allowed: adabm, all, cadyq"),
        ("ptq.json", {"sets": "Set5,Urban100"}, "no result on 'Urban100'. Did you mean 'Urban_100'?"),
        ("ptq.json", {"out": [Path("t.txt")]}, "t.txt: tables end in .md, .html or .tex"),
        ("none.json", {}, "none.json cannot be read"),
        ("other.json", {}, "other.json is no result file: expected schema 'qsr-results', found the keys a"),
        ("broken.json", {}, "broken.json is no JSON"),
        ("failed.json", {}, "there are no results"),
        ("empty", {}, "holds no result files"),
    ],
)
def test_bad_input_ends_in_a_sentence(
    script: Callable[[str], ModuleType],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    results: str,
    options: dict[str, Any],
    says: str,
) -> None:
    (folder / "broken.json").write_text("{")
    write_results(ROWS[-1], folder / "failed.json")
    (folder / "empty").mkdir()
    with pytest.raises(SystemExit):
        script("results_table").main([folder / results], **{"columns": "all", "sets": None, "out": None, **options})
    assert says in " ".join(capsys.readouterr().err.split())


def test_errors_have_types(folder: Path) -> None:
    found = collect([folder])
    with pytest.raises(ColumnError):
        paper_table(found, "mine")
    with pytest.raises(FormatError):
        check_format(Path("a.png"))
    with pytest.raises(ResultError):
        paper_table([])
