from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from stages import charts
from stages.charts import (
    Node,
    Series,
    histogram,
    line_chart,
    lineage_graph,
    log_ticks,
    nice_ticks,
    smooth,
    stacked_bar,
    thin,
)

SVG = "{http://www.w3.org/2000/svg}"
numbers = st.floats(-1e12, 1e12, allow_nan=False)


def parse(svg: Markup) -> ElementTree.Element:
    assert isinstance(svg, Markup)
    return ElementTree.fromstring(str(svg))


def chart(*points: tuple[float, float], log_y: bool = False) -> ElementTree.Element:
    return parse(
        line_chart(
            [Series(label="loss", points=points)], title="t", x_label="step", y_label="loss", log_y=log_y
        )
    )


def coordinates(svg: ElementTree.Element) -> list[tuple[float, float]]:
    return [
        tuple(map(float, pair.split(",")))
        for line in svg.iter(f"{SVG}polyline")
        for pair in line.attrib["points"].split()
    ]


def texts(svg: ElementTree.Element, kind: str) -> list[str]:
    return [text.text or "" for text in svg.iter(f"{SVG}text") if text.attrib["class"] == kind]


def test_a_curve_has_axes_ticks_labels_and_a_legend() -> None:
    svg = chart(*[(float(step), 1.0 / step) for step in range(1, 101)])
    assert texts(svg, "label") == ["step", "loss"]
    assert texts(svg, "key") == ["loss"]
    assert texts(svg, "tick") == ["0", "0.2", "0.4", "0.6", "0.8", "1", "0", "20", "40", "60", "80", "100"]
    assert svg.attrib["role"] == "img" and svg.attrib["aria-label"] == "t"


def test_larger_values_lie_higher_and_later_steps_further_right() -> None:
    first, second, third = coordinates(chart((0, 1.0), (10, 3.0), (20, 2.0)))
    assert first[0] < second[0] < third[0]
    assert second[1] < third[1] < first[1]
    assert second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.2)


def test_equal_ratios_are_equally_far_apart_on_a_logarithmic_axis() -> None:
    high, middle, low = (y for _, y in coordinates(chart((0, 10.0), (1, 1.0), (2, 0.1), log_y=True)))
    assert middle - high == pytest.approx(low - middle, abs=0.2)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30))
def test_every_point_lies_inside_the_picture(points: list[tuple[float, float]]) -> None:
    svg = chart(*points)
    width, height = map(float, svg.attrib["viewBox"].split()[2:])
    assert all(-0.1 <= x <= width + 0.1 and -0.1 <= y <= height + 0.1 for x, y in coordinates(svg))


def test_points_that_are_not_finite_are_left_out() -> None:
    assert len(coordinates(chart((0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)))) == 2


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="no finite point"):
        chart((0, math.nan))
    with pytest.raises(ValueError, match="log_y=False"):
        chart((0, 1.0), (1, 0.0), log_y=True)
    with pytest.raises(ValueError, match="no counts"):
        histogram({}, title="t", x_label="x", y_label="y")
    with pytest.raises(ValueError, match="no part above zero"):
        stacked_bar([("written", 0, "ok")], title="t")


def test_labels_are_escaped() -> None:
    hostile = '<script>"&'
    series = [Series(label=hostile, points=[(0, 1.0), (1, 2.0)])]
    svg = parse(line_chart(series, title=hostile, x_label=hostile, y_label=hostile))
    assert svg.attrib["aria-label"] == hostile
    assert texts(svg, "key") == [hostile]
    assert texts(parse(lineage_graph([Node(name=hostile, note=hostile)], title="t")), "name") == [hostile]
    assert not list(svg.iter(f"{SVG}script"))


@given(numbers, st.floats(1e-6, 1e12))
def test_nice_ticks_are_few_evenly_spaced_and_inside(low: float, span: float) -> None:
    if low + span - low < 1e-9 * abs(low) or low + span == low:
        return
    ticks = nice_ticks(low, low + span)
    assert 1 <= len(ticks) <= 8
    assert all(low - 1e-6 * span <= tick <= low + span + 1e-6 * span for tick in ticks)


def test_logarithmic_ticks_are_powers_of_ten_once_there_are_many() -> None:
    assert log_ticks(0.03, 1.2) == [0.05, 0.1, 0.2, 0.5, 1.0]
    assert log_ticks(1e-6, 1.0) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_the_moving_average_of_a_constant_is_that_constant() -> None:
    assert [y for _, y in smooth([(float(x), 3.5) for x in range(50)])] == pytest.approx([3.5] * 50)


def test_the_moving_average_weighs_the_newest_by_two_over_span_plus_one() -> None:
    assert smooth([(0, 1.0), (1, 4.0)], span=3) == [(0, 1.0), (1, pytest.approx((0.5 * 1 + 4) / 1.5))]
    assert smooth([(0, 1.0), (1, math.nan), (2, 2.0)], span=1) == [(0, 1.0), (2, 2.0)]


def test_thinning_keeps_spikes_and_order() -> None:
    points = [(float(x), 1.0) for x in range(10_000)]
    points[4321] = (4321.0, 99.0)
    kept = thin(points, 400)
    assert len(kept) <= 400 and (4321.0, 99.0) in kept
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert thin(points[:10], 400) == points[:10]


@given(st.dictionaries(st.integers(0, 500), st.integers(1, 1000), min_size=1))
def test_a_histogram_has_at_most_the_bins_asked_for_and_areas_in_proportion(counts: dict[int, int]) -> None:
    svg = parse(histogram(counts, title="t", x_label="characters", y_label="captions", most_bins=12))
    heights = [float(bar.attrib["height"]) for bar in svg.iter(f"{SVG}rect")]
    assert 1 <= len(heights) <= 12
    assert all(height >= 0 for height in heights) and max(heights) > 50


def test_a_stacked_bar_is_proportional_but_never_hides_a_part() -> None:
    svg = parse(
        stacked_bar([("written", 30_000, "ok"), ("filtered", 0, "warn"), ("failed", 1, "bad")], title="t")
    )
    written, failed = (float(part.attrib["width"]) for part in svg.iter(f"{SVG}rect"))
    assert failed > 1 and written > 350 - failed
    assert [title.text for title in svg.iter(f"{SVG}title")] == ["written: 30,000", "failed: 1"]


def test_the_lineage_has_a_row_per_artifact_and_an_arc_per_parent() -> None:
    nodes = [Node(name="shard", note="a1"), Node(name="clip", note="b2", parents=("shard",))]
    nodes.append(Node(name="embed", note="c3", parents=("shard", "clip")))
    svg = parse(lineage_graph(nodes, title="t"))
    assert texts(svg, "name") == ["shard", "clip", "embed"]
    assert texts(svg, "note") == ["a1", "b2", "c3"]
    assert len(list(svg.iter(f"{SVG}path"))) == 3


def test_a_parent_that_does_not_come_first_is_refused() -> None:
    for parent in ("embed", "nowhere", "clip"):
        nodes = [Node(name="clip", note="", parents=(parent,)), Node(name="embed", note="")]
        with pytest.raises(ValueError, match="order nodes from parents to children"):
            lineage_graph(nodes, title="t")


def test_a_trade_off_joins_its_front_rings_its_best_and_names_every_point():
    marks = [
        charts.Mark(label="1", at=(0.2, 5.0)),
        charts.Mark(label="2", at=(0.3, 3.0), joined=True, ringed=True),
        charts.Mark(label="<8>", at=(0.5, 4.0), joined=True),
    ]
    svg = charts.tradeoff(marks, title="fd over guidance", x_label="CLIP score", y_label="fd_clip")
    assert svg.count('class="ring"') == 1 and svg.count("<polyline") == 1
    assert "&lt;8&gt;" in svg and "<8>" not in svg
    assert svg.count('r="3.6"') == 3


def test_a_trade_off_of_one_point_has_no_line_and_one_that_is_not_finite_is_refused():
    alone = charts.Mark(label="2", at=(0.3, 3.0), joined=True)
    assert "<polyline" not in charts.tradeoff([alone], title="t", x_label="x", y_label="y")
    for marks in ([], [charts.Mark(label="2", at=(0.3, float("nan")))]):
        with pytest.raises(ValueError, match="leave the chart out"):
            charts.tradeoff(marks, title="t", x_label="x", y_label="y")
