"""A run's report (`ReportData`) as one self-contained HTML page. Pure: no store, no cluster.

The page holds no script and asks nothing of any network: pictures are `data:` URIs, charts inline SVG, and its own
Content-Security-Policy forbids the rest. All text is escaped, since captions come from strangers.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Mapping
from datetime import UTC
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stages import charts
from stages.charts import Node, Series
from stages.report_data import Artifact, Curve, LedgerEntry, ReportData
from training.metrics.tradeoff import FIT, Sweep
from training.metrics.tradeoff import Curve as TradeOff

_PNG_START = b"\x89PNG\r\n\x1a\n"


def render(data: ReportData) -> str:
    """The whole page as HTML. Raises ValueError when a picture is no PNG or the lineage is out of order."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        duration=duration,
        size=file_size,
        score=score_text,
        cosine=_cosine_text,
        picture=png_data_uri,
        pixels=png_size,
        tile=tile_width,
    )
    return environment.get_template("report.html.j2").render(
        data=data,
        sections=sections(data),
        created=data.created.astimezone(UTC),
        config=json.dumps(data.config, indent=2, ensure_ascii=False, sort_keys=True, default=str),
        curves=_drawable(data.curves),
        curve_chart=curve_chart,
        tradeoff_chart=tradeoff_chart,
        lengths_chart=_lengths_chart,
        ledger_chart=_ledger_chart,
        lineage_chart=_lineage_chart,
    )


def sections(data: ReportData) -> dict[str, str]:
    """Anchor -> heading of the sections that have something to show, in the order of the page."""
    shown = {
        "generated": ("Generated images", data.generated),
        "scores": ("Scores", data.scores or data.accuracy or data.diagnostics),
        "gates": ("Gates", data.gates),
        "tradeoff": ("Trade-off", data.sweeps),
        "variations": ("Image variations", data.variations),
        "interpolations": ("Interpolations", data.interpolations),
        "reconstructions": ("Reconstructions", data.reconstructions),
        "curves": ("Loss curves", _drawable(data.curves)),
        "dataset": ("Dataset", data.dataset),
        "ledger": ("Ledger", data.ledger),
        "plan": ("Plan as run", data.plan),
        "lineage": ("Lineage", data.lineage),
        "environment": ("Environment and config", data.environment or data.config),
    }
    return {anchor: heading for anchor, (heading, content) in shown.items() if content}


def png_data_uri(png: bytes) -> str:
    """`data:image/png;base64,…`. Raises ValueError when `png` does not start as a PNG does."""
    png_size(png)
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def png_size(png: bytes) -> tuple[int, int]:
    """(width, height) in pixels, from the IHDR chunk. Raises ValueError when `png` does not start as a PNG does."""
    if png[:8] != _PNG_START or png[12:16] != b"IHDR" or len(png) < 24:
        raise ValueError(
            f"a picture starts with {png[:8]!r}, and the page shows PNG only: encode it as PNG first"
        )
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def tile_width(png: bytes, target: int) -> int:
    """CSS pixels to show a PNG at: the largest whole multiple of its width within `target`, or `target` for larger ones."""
    width, _ = png_size(png)
    return width * (target // width) if width <= target else target


def curve_chart(curve: Curve) -> Markup:
    """The chart of one training stage: raw loss faint, its moving average strong, validation loss beside it."""
    values = [y for _, y in charts.finite([*curve.train, *curve.validation])]
    log_y = min(values) > 0 and max(values) / min(values) > 30
    series = [
        Series(label="logged", points=curve.train, role="raw"),
        Series(label="average", points=charts.smooth(curve.train)),
        Series(label="validation", points=curve.validation, role="second"),
    ]
    title = f"Loss of {curve.stage} over {len(curve.train)} logged steps"
    return charts.line_chart(series, title=title, x_label="step", y_label="loss", log_y=log_y)


def tradeoff_chart(sweep: Sweep, curve: TradeOff) -> Markup:
    """The chart of one sweep: CLIP score to the right, distance upwards; the front joined, the best point ringed."""
    marks = [
        charts.Mark(
            label=f"{point.setting:g}" if isinstance(point.setting, float) else str(point.setting),
            at=(point.scores[FIT][0], point.scores[curve.distance][0]),
            joined=point.setting in curve.pareto,
            ringed=point.setting == curve.best,
        )
        for point in sweep.points
    ]
    title = f"{curve.distance} against {FIT} over {sweep.field}"
    return charts.tradeoff(marks, title=title, x_label="CLIP score", y_label=curve.distance)


def score_text(value: float | None, unit: str = "") -> str:
    """`value` with three significant digits, or one decimal for "%" of a fraction; a dash for None and for NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "%":
        return f"{100 * value:.1f} %"
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}".replace("-", "−") + (f" {unit}" if unit else "")


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def file_size(count: float) -> str:
    """`count` bytes in B, kB, MB … of 1000, with three significant digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return (
        f"{count:.0f} B"
        if unit == "B"
        else f"{count:.{2 if count < 9.995 else 1 if count < 99.95 else 0}f} {unit}"
    )


def _cosine_text(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _drawable(curves: tuple[Curve, ...]) -> list[Curve]:
    return [curve for curve in curves if charts.finite(curve.train)]


def _lengths_chart(lengths: Mapping[int, int]) -> Markup:
    return charts.histogram(
        lengths, title="Distribution of caption lengths", x_label="characters per caption", y_label="captions"
    )


def _ledger_chart(entry: LedgerEntry) -> Markup:
    parts: list[tuple[str, float, charts.Role]] = [
        ("written", entry.written, "ok"),
        ("filtered", sum(entry.filtered.values()), "warn"),
        ("failed", sum(entry.failed.values()), "bad"),
    ]
    return charts.stacked_bar(parts, title=f"Rows of {entry.stage}: written, filtered and failed")


def _lineage_chart(lineage: tuple[Artifact, ...]) -> Markup:
    nodes = [Node(name=a.stage, note=a.fingerprint, parents=a.parents) for a in lineage]
    return charts.lineage_graph(nodes, title="Which artifact was made from which")
