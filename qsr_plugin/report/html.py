"""The look of a report page: one file, no scripts, nothing fetched; for phones, screens and paper, light and dark."""

from __future__ import annotations

from functools import lru_cache

from jinja2 import Environment, StrictUndefined, Template

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6168; --line: #d9dce0; --paper: #ffffff; --tint: #f3f5f7;
  --accent: #0a6b9a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #a0a7ae; --line: #3a3f45; --paper: #16181b; --tint: #1f2226; --accent: #6cbbe6; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem 1rem 3rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; } .note, figcaption span, caption { color: var(--soft); font-size: .875rem; }
.lead { font-size: 1.1rem; list-style: none; margin: .5rem 0; padding: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .4rem 0; caption-side: bottom; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; white-space: nowrap; } thead th { color: var(--soft); font-size: .875rem; }
th:first-child, td:first-child, .text th, .text td { text-align: left; }
.facts th { width: 9rem; } .layers td, .layers th { white-space: nowrap; }
.layers td:last-child { width: 100%; white-space: normal; }
code { font: .875rem/1.5 ui-monospace, Consolas, monospace; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem; }
figure { margin: 0; } figcaption { font-size: .875rem; padding-top: .25rem; }
figcaption b, figcaption span { display: block; }
img { display: block; width: 100%; height: auto; border-radius: 3px; background: var(--tint); }
.tiles img { aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; }
.tiles .whole img { image-rendering: auto; }
@media (max-width: 30rem) { .tiles { grid-template-columns: repeat(2, 1fr); } th, td { padding: .3rem .35rem; } }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --tint: #fff; --accent: #000; }
  body { max-width: none; padding: 0; font-size: 10pt; } .wide { overflow: visible; }
  figure, table, h2, h3 { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .tiles { grid-template-columns: repeat(5, 1fr); }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ page.title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<h1>{{ page.title }}</h1>
<ul class="lead">
{%- for line in page.summary %}
<li>{{ line }}</li>
{%- endfor %}
</ul>

{%- macro figures(head, rows, caption) %}
<div class="wide"><table>
<thead><tr>{% for one in head %}<th scope="col">{{ one }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for one in row[1:] %}<td>{{ one }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody>
{%- if caption %}<caption>{{ caption }}</caption>{% endif %}
</table></div>
{%- endmacro %}

{%- for score in page.scores %}
{%- if loop.first %}
<h2>Quality</h2>{% endif %}
<h3>{{ score.name }}</h3>
{{ figures(score.head, score.rows, score.caption) }}
{%- endfor %}

<h2>Cost</h2>
{{ figures(page.cost.head, page.cost.rows, page.cost.caption) }}

{%- for example in page.examples %}
{%- if loop.first %}
<h2>Pictures</h2>
<p class="note">Where the float and the quantized network differ most. The box shows the place.</p>{% endif %}
<h3>{{ example.name }}</h3>
<div class="tiles">
<figure class="whole"><img src="{{ example.whole.source }}" alt="{{ example.name }}: {{ example.whole.label }}">
<figcaption><b>{{ example.whole.label }}</b><span>{{ example.whole.note }}</span></figcaption></figure>
{%- for tile in example.tiles %}
<figure><img src="{{ tile.source }}" alt="{{ example.name }}: {{ tile.label }}">
<figcaption><b>{{ tile.label }}</b><span>{{ tile.note }}</span></figcaption></figure>
{%- endfor %}
</div>
{%- endfor %}

<h2>Layers</h2>
<p>{{ page.layers_in_short }}</p>
<div class="wide"><table class="text layers">
<thead><tr><th scope="col">Bits</th><th scope="col">Class</th><th scope="col">Layers</th></tr></thead>
<tbody>
{%- for group in page.groups %}
<tr><td>{{ group.bits }}</td><td>{{ group.names | length }} x {{ group.kind }}</td>
<td><code>{{ group.brief | join(", ") }}</code></td></tr>
{%- endfor %}
</tbody></table></div>

<h2>How it was made</h2>
<div class="wide"><table class="text facts"><tbody>
{%- for name, value in page.facts.items() %}
<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{%- endfor %}
</tbody></table></div>
{%- if page.seconds %}
<h3>Time</h3>
{{ figures(("", "seconds", "share"), page.seconds, "") }}
{%- endif %}
</body>
</html>
"""


@lru_cache(maxsize=1)
def template() -> Template:
    """The page; every value put into it is escaped, only the style is not."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    return environment.from_string(_PAGE, globals={"style": _STYLE})
