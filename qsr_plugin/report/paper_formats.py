"""Tables of results as Markdown, as an HTML page, and as LaTeX with booktabs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from qsr_plugin.checkpoint import write_atomically
from qsr_plugin.errors import UserError, suggest
from qsr_plugin.report.paper_tables import BEST, SECOND, Cell, PaperTable

_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}  # fmt: skip

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Results</title>
<style>
body { margin: 1.25rem; font: 1rem/1.5 system-ui, sans-serif; color: #1c1e21; background: #fff; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; border-bottom: 1px solid #1c1e21; } .name { text-align: left; } .set { text-align: center; }
tbody { border-bottom: 1px solid #b5bac0; }
p { color: #5b6168; font-size: .875rem; max-width: 46rem; }
</style>
</head>
<body>
<div><table>
<thead>
<tr>{% for set, span in spans %}<th{% if set %} class="set" scope="colgroup"{% endif %}
 colspan="{{ span }}">{{ set }}</th>{% endfor %}</tr>
<tr>{% for _, heading in table.head %}<th scope="col"{% if loop.index <= table.texts %} class="name"{% endif %}>
{{- heading }}</th>{% endfor %}</tr>
</thead>
{%- for group in table.groups %}
<tbody>
{%- for line in group %}
<tr>{% for cell in line %}<td{% if loop.index <= table.texts %} class="name"{% endif %}>
{%- if cell.rank == best %}<b>{{ cell.text }}</b>{% elif cell.rank == second %}<u>{{ cell.text }}</u>
{%- else %}{{ cell.text }}{% endif %}</td>{% endfor %}</tr>
{%- endfor %}
</tbody>
{%- endfor %}
</table></div>
{%- for note in table.notes %}
<p>{{ note }}</p>
{%- endfor %}
</body>
</html>
"""


class FormatError(UserError, ValueError):
    """An ending that no table is written as."""


def to_markdown(table: PaperTable) -> str:
    """One line of headings, with the test set before those that belong to one; notes as a list below."""
    head = [f"{test} {heading}".strip() for test, heading in table.head]
    rules = ["---"] * table.texts + ["---:"] * (len(head) - table.texts)
    lines = [[_markdown(cell) for cell in line] for group in table.groups for line in group]
    text = [f"| {' | '.join(line)} |" for line in ([one.replace("|", "\\|") for one in head], rules, *lines)]
    return "\n".join([*text, "", *(f"* {note}" for note in table.notes)]) + "\n"


def _markdown(cell: Cell) -> str:
    text = cell.text.replace("|", "\\|")
    return {BEST: f"**{text}**", SECOND: f"<u>{text}</u>"}.get(cell.rank, text)


def to_html(table: PaperTable) -> str:
    """A page that needs no other file, with the test sets above their columns."""
    return _template().render(table=table, spans=list(_spans(table)), best=BEST, second=SECOND)


@lru_cache(maxsize=1)
def _template() -> Template:
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(_PAGE)


def to_latex(table: PaperTable) -> str:
    """A ``tabular`` with the rules of the package booktabs; notes as comments above it."""
    align = "l" * table.texts + "r" * (len(table.head) - table.texts)
    spans, rules, column = [], [], 1
    for test, span in _spans(table):
        spans.append(rf"\multicolumn{{{span}}}{{c}}{{{_escaped(test)}}}" if test else " & " * (span - 1))
        rules += [rf"\cmidrule(lr){{{column}-{column + span - 1}}}"] if test else []
        column += span
    sets = [" & ".join(spans) + r" \\", "".join(rules)] if rules else []
    head = " & ".join(_escaped(heading) for _, heading in table.head) + r" \\"
    body = []
    for group in table.groups:
        body += [r"\midrule", *(" & ".join(map(_latex, line)) + r" \\" for line in group)]
    begin, end = rf"\begin{{tabular}}{{{align}}}", r"\end{tabular}"
    notes = [f"% {note}" for note in table.notes]
    needs = r"% \usepackage{booktabs}"
    return "\n".join([needs, *notes, begin, r"\toprule", *sets, head, *body, r"\bottomrule", end]) + "\n"


def _latex(cell: Cell) -> str:
    text = _escaped(cell.text)
    return {BEST: rf"\textbf{{{text}}}", SECOND: rf"\underline{{{text}}}"}.get(cell.rank, text)


def _escaped(text: str) -> str:
    return re.sub(r"[\\~^&%$#_{}]", lambda found: _LATEX[found[0]], text)


def _spans(table: PaperTable) -> Iterator[tuple[str, int]]:
    """Test sets (empty for columns of none) and how many columns they have."""
    for test, columns in groupby(test for test, _ in table.head):
        yield test, len(list(columns))


#: How a table is written, by the ending of the file.
FORMATS: dict[str, Callable[[PaperTable], str]] = {".md": to_markdown, ".html": to_html, ".tex": to_latex}


def check_format(path: Path) -> None:
    """Refuse a file whose ending no table is written as.

    Raises:
        FormatError: With what is allowed.
    """
    if path.suffix not in FORMATS:
        raise FormatError(f"{path}: tables end in .md, .html or .tex. {suggest(path.suffix, FORMATS)}")


def write_table(table: PaperTable, path: Path) -> None:
    """Write a table as its ending says, whole or not at all.

    Raises:
        FormatError: For another ending.
        OSError: If the file cannot be written.
    """
    check_format(path)
    text = FORMATS[path.suffix](table)
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))
