"""One self-contained HTML page of two runs: what was set differently, what was measured, and pictures of the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined

from flows import console
from stages.report_page import png_data_uri, tile_width

TILE = 128
"""CSS pixels that a picture is shown at."""
TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ found.runs | join(" and ") }}</title>
<style>
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #8884; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 1.2rem; }
figure { margin: 0; } figcaption { margin-top: .3rem; }
img { image-rendering: pixelated; border-radius: 4px; }
</style></head><body>
<h1>{{ found.runs[0] }} and {{ found.runs[1] }}</h1>
{% if found.config %}<table><tr><th>setting</th>{% for run in found.runs %}<th>{{ run }}</th>{% endfor %}</tr>
{% for row in found.config %}<tr><td>{{ row.path }}</td><td>{{ row.a }}</td><td>{{ row.b }}</td></tr>
{% endfor %}</table>{% endif %}
{% if found.metrics %}<table><tr><th>score</th>{% for run in found.runs %}<th>{{ run }}</th>{% endfor %}<th>difference, 95 %</th></tr>
{% for row in found.metrics.metrics + found.metrics.incomparable %}<tr><td>{{ row.name }}</td>
{% for run in found.runs %}{% set score = row["values"][run] %}<td>{{ "%.4g" | format(score.value) }}
({{ "%.4g" | format(score.low) }} – {{ "%.4g" | format(score.high) }})</td>{% endfor %}
<td>{% if "differences" in row %}another protocol: {{ row.differences | join("; ") }}
{%- else %}{{ row.against_first[found.runs[1]] | difference }}{% endif %}</td></tr>
{% endfor %}</table>{% endif %}
<p>The first picture of each pair is by {{ found.runs[0] }}, the second by {{ found.runs[1] }},
from {{ "the same noise" if found.samples.same_noise else "noise of their own" }}.</p>
<main>
{% for pair in pairs %}<figure>
{% for run, picture in [(found.runs[0], pair.first), (found.runs[1], pair.second)] %}
<img src="{{ picture | uri }}" width="{{ picture | tile }}" alt="{{ pair.prompt }}, by {{ run }}">
{% endfor %}<figcaption>{{ pair.prompt }}</figcaption></figure>
{% endfor %}</main></body></html>
"""


@dataclass(frozen=True)
class Pair:
    """PNG files of one prompt by the two runs."""

    prompt: str
    first: bytes
    second: bytes


def page(found: Mapping[str, Any], pairs: Sequence[Pair]) -> str:
    """The page of what `flows.diff.diff` found."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters.update(
        uri=png_data_uri, tile=lambda picture: tile_width(picture, TILE), difference=console.difference
    )
    return environment.from_string(TEMPLATE).render(found=found, pairs=pairs)
