"""Inline SVG for the report page: curves, a histogram, a stacked bar and the lineage's arcs. Pure functions of numbers.

Every chart is drawn in a 360-unit wide view box, so that its text stays legible on a 360 px phone. Colours are CSS
variables of the page with fallbacks; the classes (`chart`, `tick`, `axis` …) let the page set type sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

Point = tuple[float, float]

WIDTH = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 352, 34, 38
_MOST_POINTS = 480

_COLOURS = {
    "main": "var(--accent, #a63a1e)",
    "raw": "var(--accent, #a63a1e)",
    "second": "var(--second, #2f6690)",
    "ok": "var(--ok, #2e6b4a)",
    "warn": "var(--warn, #8a6410)",
    "bad": "var(--bad, #a3262a)",
}
Role = Literal["main", "raw", "second", "ok", "warn", "bad"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One labelled curve; `raw` is drawn faint, behind the others."""

    label: str
    points: Sequence[Point]
    role: Role = "main"


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One artifact of the lineage; `parents` are names of nodes that come before it."""

    name: str
    note: str
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Axis:
    """Maps values in [low, high] to coordinates in [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        found = log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high)
        return [tick for tick in found if self.low <= tick <= self.high]


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, log_y: bool = False
) -> Markup:
    """An `<svg>` of the curves with ticks, axis names and a legend. Points that are not finite are left out.

    Raises ValueError when no finite point is left, or when `log_y` is asked of a value that is not positive.
    """
    drawn = [Series(label=s.label, points=finite(s.points), role=s.role) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        raise ValueError(f"{title!r} has no finite point to draw: leave the chart out")
    ys = [y for s in drawn for _, y in s.points]
    if log_y and min(ys) <= 0:
        raise ValueError(
            f"{title!r} has the value {min(ys)}, and a logarithmic axis takes positive ones: use log_y=False"
        )
    height = 226
    x_axis = _Axis(*_padded(_from_zero([x for s in drawn for x, _ in s.points]), pad=0.0), _LEFT, _RIGHT)
    y_axis = _Axis(*_padded(ys, pad=0.05, log=log_y), height - _BOTTOM, _TOP, log=log_y)
    behind_first = sorted(drawn, key=lambda s: s.role != "raw")
    body = [
        *_y_grid(y_axis),
        *_x_ticks(x_axis, height),
        *(_polyline(s, x_axis, y_axis) for s in behind_first),
        *_legend(drawn),
        *_names(x_label, y_label + (" (log)" if log_y else ""), height),
    ]
    return _svg(height, title, body)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """One labelled point of a trade-off."""

    label: str
    at: Point
    joined: bool = False
    """On the front, which a line joins."""
    ringed: bool = False


def tradeoff(marks: Sequence[Mark], *, title: str, x_label: str, y_label: str) -> Markup:
    """An `<svg>` of labelled points with their front as a line and the marked one in a ring. Points must be finite."""
    if len(finite([mark.at for mark in marks])) < max(1, len(marks)):
        raise ValueError(f"{title!r} has no point or one that is not finite: leave the chart out")
    height = 226
    x_axis = _Axis(*_padded([mark.at[0] for mark in marks], pad=0.08), _LEFT, _RIGHT)
    y_axis = _Axis(*_padded([mark.at[1] for mark in marks], pad=0.1), height - _BOTTOM, _TOP)
    front = Series(label="front", points=sorted(mark.at for mark in marks if mark.joined))
    body = [*_y_grid(y_axis), *_x_ticks(x_axis, height)]
    if len(front.points) > 1:
        body.append(_polyline(front, x_axis, y_axis))
    body += [_mark(mark, x_axis(mark.at[0]), y_axis(mark.at[1])) for mark in marks]
    return _svg(height, title, [*body, *_names(x_label, y_label, height)])


def _mark(mark: Mark, x: float, y: float) -> str:
    colour = _COLOURS["main" if mark.joined else "second"]
    ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="7.5" fill="none" style="stroke:{colour}" stroke-width="1.8"/>'
    return (
        f"<g><title>{escape(mark.label)}: {mark.at[0]:.4g}, {mark.at[1]:.4g}</title>{ring if mark.ringed else ''}"
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" style="fill:{colour}"/>'
        f'<text x="{x:.1f}" y="{y - 10:.1f}" text-anchor="middle">{escape(mark.label)}</text></g>'
    )


def histogram(
    counts: Mapping[int, int], *, title: str, x_label: str, y_label: str, most_bins: int = 24
) -> Markup:
    """An `<svg>` of bars: how many samples have each whole-number value, in at most `most_bins` equal bins."""
    if not counts:
        raise ValueError(f"{title!r} has no counts to draw: leave the chart out")
    low, high = min(counts), max(counts)
    width = math.ceil((high - low + 1) / most_bins)
    bins = [0] * ((high - low) // width + 1)
    for value, count in counts.items():
        bins[(value - low) // width] += count
    height = 212
    x_axis = _Axis(low - 0.5, low + len(bins) * width - 0.5, _LEFT, _RIGHT)
    y_axis = _Axis(0, max(*bins, 1) * 1.05, height - _BOTTOM, _TOP)
    gap = min(2.0, 60 / len(bins))
    bars = [
        f'<rect class="bar" x="{x_axis(left):.1f}" y="{y_axis(count):.1f}" style="fill:{_COLOURS["main"]}"'
        f' width="{max(0.6, x_axis(left + width) - x_axis(left) - gap):.1f}" height="{y_axis(0) - y_axis(count):.1f}"/>'
        for left, count in ((low - 0.5 + i * width, count) for i, count in enumerate(bins))
    ]
    whole = [
        *_y_grid(y_axis),
        *bars,
        *_x_ticks(x_axis, height, whole=True),
        *_names(x_label, y_label, height),
    ]
    return _svg(height, title, whole)


def stacked_bar(parts: Sequence[tuple[str, float, Role]], *, title: str) -> Markup:
    """An `<svg>` of one horizontal bar, split in proportion; a part that is not zero is never thinner than 3 units."""
    shown = [(label, value, role) for label, value, role in parts if value > 0]
    total = sum(value for _, value, _ in shown)
    if not total:
        raise ValueError(f"{title!r} has no part above zero: leave the chart out")
    widths = [max(3.0, value / total * WIDTH) for _, value, _ in shown]
    scale = WIDTH / sum(widths)
    body, x = [], 0.0
    for (label, value, role), width in zip(shown, widths, strict=True):
        body.append(
            f'<rect x="{x:.1f}" y="0" width="{max(1.0, width * scale - 1):.1f}" height="12"'
            f' style="fill:{_COLOURS[role]}"><title>{escape(label)}: {value:,.0f}</title></rect>'
        )
        x += width * scale
    return _svg(12, title, body, stretch=True)


def lineage_graph(nodes: Sequence[Node], *, title: str) -> Markup:
    """An `<svg>` arc diagram: one row per artifact in the order given, an arc from each parent down to its child.

    Raises ValueError when a parent is unknown or does not come before its child.
    """
    row = {node.name: index for index, node in enumerate(nodes)}
    for node in nodes:
        for parent in node.parents:
            if row.get(parent, len(nodes)) >= row[node.name]:
                raise ValueError(
                    f"{parent!r} is no node before {node.name!r}: order nodes from parents to children"
                )
    step, dot = 36, 118
    longest = max((row[n.name] - row[p] for n in nodes for p in n.parents), default=1)
    body = []
    for node in nodes:
        y = row[node.name] * step + step / 2
        arcs = "".join(_arc(dot, row[p] * step + step / 2, y, longest * step) for p in node.parents)
        body.append(
            f'<g class="node"><rect class="hover" x="0" y="{y - step / 2:.0f}" width="{WIDTH}" height="{step}"/>{arcs}'
            f'<circle cx="{dot}" cy="{y:.0f}" r="4.5" style="fill:{_COLOURS["main"]}"/>'
            f'<text class="name" x="{dot + 16}" y="{y + 4:.0f}">{escape(node.name)}</text>'
            f'<text class="note" x="{WIDTH - 4}" y="{y + 4:.0f}" text-anchor="end">{escape(node.note)}</text></g>'
        )
    return _svg(len(nodes) * step, title, body)


def finite(points: Sequence[Point]) -> list[Point]:
    """The points whose two numbers are finite, in order."""
    return [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def smooth(points: Sequence[Point], span: float | None = None) -> list[Point]:
    """The finite points with their exponential moving average, weight 2 / (span + 1) for the newest, unbiased at the start.

    `span` counts points and is by default one fortieth of them, at least 3.
    """
    kept = finite(points)
    keep = 1 - 2 / ((span or max(3.0, len(kept) / 40)) + 1)
    total = weight = 0.0
    averaged = []
    for x, y in kept:
        total, weight = keep * total + y, keep * weight + 1
        averaged.append((x, total / weight))
    return averaged


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten that lie in [low, high]; needs low < high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough / 1.4)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], with their multiples by 2 and 5 where these are few; needs 0 < low < high."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples = (1, 2, 5) if len(decades) <= 4 else (1,)
    every = max(1, len(decades) // 6)
    ticks = [m * 10.0**d for d in decades if d % every == 0 for m in multiples]
    return [tick for tick in ticks if low <= tick <= high]


def thin(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most `most` of the points, keeping the lowest and the highest of each bucket, so that spikes stay visible."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        ends = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        kept.extend(sorted(ends))
    return kept


def _from_zero(values: Sequence[float]) -> list[float]:
    starts_near_zero = 0 <= min(values) < 0.1 * max(values)
    return [0.0, *values] if starts_near_zero else list(values)


def _padded(values: Sequence[float], *, pad: float, log: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return (low / 2, high * 2) if log else (low - max(abs(low), 1) / 2, high + max(abs(high), 1) / 2)
    if log:
        room = (high / low) ** pad
        return low / room, high * room
    return low - pad * (high - low), high + pad * (high - low)


def _y_grid(axis: _Axis) -> list[str]:
    return [
        f'<line class="rule" x1="{_LEFT}" x2="{_RIGHT}" y1="{axis(t):.1f}" y2="{axis(t):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 6}" y="{axis(t) + 4:.1f}" text-anchor="end">{_tick(t)}</text>'
        for t in axis.ticks()
    ]


def _x_ticks(axis: _Axis, height: float, *, whole: bool = False) -> list[str]:
    base = height - _BOTTOM
    ticks = [t for t in axis.ticks() if not whole or t == int(t)]
    return [f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{base}" y2="{base}"/>'] + [
        f'<line class="axis" x1="{axis(t):.1f}" x2="{axis(t):.1f}" y1="{base}" y2="{base + 4}"/>'
        f'<text class="tick" x="{axis(t):.1f}" y="{base + 17}" text-anchor="{_anchor(axis(t))}">{_tick(t)}</text>'
        for t in ticks
    ]


def _anchor(x: float) -> str:
    return "end" if x > _RIGHT - 12 else "middle"


def _names(x_label: str, y_label: str, height: float) -> list[str]:
    return [
        f'<text class="label" x="{(_LEFT + _RIGHT) / 2}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text class="label" x="0" y="16">{escape(y_label)}</text>',
    ]


def _polyline(series: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    points = thin(series.points)
    style = f"stroke:{_COLOURS[series.role]}"
    if len(points) == 1:
        x, y = points[0]
        return f'<circle class="curve {series.role}" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="2.5" style="{style}"/>'
    path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in points)
    return f'<polyline class="curve {series.role}" fill="none" style="{style}" points="{path}"/>'


def _legend(series: Sequence[Series]) -> list[str]:
    drawn, x = [], float(WIDTH)
    for s in reversed(series):
        x -= 21 + 6.9 * len(s.label)
        drawn.append(
            f'<line class="curve {s.role}" style="stroke:{_COLOURS[s.role]}" x1="{x:.0f}" x2="{x + 16:.0f}" y1="12" y2="12"/>'
            f'<text class="key" x="{x + 21:.0f}" y="16">{escape(s.label)}</text>'
        )
        x -= 12
    return drawn[::-1]


def _arc(x: float, top: float, bottom: float, longest: float) -> str:
    bulge = 16 + 96 * math.sqrt((bottom - top) / longest)
    return f'<path class="arc" fill="none" d="M{x - 6} {top:.0f} C{x - bulge:.0f} {top:.0f} {x - bulge:.0f} {bottom:.0f} {x - 6} {bottom:.0f}"/>'


def _tick(value: float) -> str:
    if abs(value) >= 1e9 or 0 < abs(value) < 1e-4:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    for size, suffix in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):g}{suffix}"
    return f"{value:,.10g}"


def _svg(height: float, title: str, body: Sequence[str], *, stretch: bool = False) -> Markup:
    ratio = ' preserveAspectRatio="none"' if stretch else ""
    return Markup(
        f'<svg class="chart" role="img" aria-label="{escape(title)}" viewBox="0 0 {WIDTH} {height}"{ratio}'
        f' xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )
