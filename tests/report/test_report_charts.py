"""The charts: positions derived by hand, labels that keep clear, and nothing of the run's text taken as markup."""

# ruff: noqa: RUF001 - the signs of the page: a true minus and an en dash

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tastemaker.report import charts, svg
from tastemaker.report.charts import Bin, LineChart, Point, Row, Series, Stop
from tastemaker.report.curves import smoothed
from tastemaker.report.fields import Measured

FINITE = st.floats(-1e6, 1e6, allow_nan=False)


def test_scales() -> None:
    # A quarter of the way from 2 to 10 is 4; a quarter of the way from 300 down to 100 is 250.
    assert svg.Scale((2, 10), (300, 100))(4) == pytest.approx(250, abs=1e-9)
    # By root: sqrt(1) / sqrt(16) = 1/4.
    assert svg.Scale((0, 16), (0, 100), by_root=True)(1) == pytest.approx(25, abs=1e-9)
    assert svg.Scale((3, 3), (0, 10))(3) == 5


def test_ticks_by_hand() -> None:
    # (1 - 0) / 4 = 0.25 is itself round; (13 - 0) / 4 = 3.25 rounds up to 5.
    assert svg.nice_ticks(0, 1, 5) == [0, 0.25, 0.5, 0.75, 1.0]
    assert svg.nice_ticks(0, 13, 5) == [0, 5, 10, 15]
    assert svg.nice_ticks(-0.3, 0.1, 5) == [-0.3, -0.2, -0.1, 0.0, 0.1]
    assert svg.tick_labels([0.25, 0.5, 0.75]) == ["0.25", "0.50", "0.75"]
    assert svg.tick_labels([0.0, 2.5, 5.0]) == ["0.0", "2.5", "5.0"]
    assert svg.tick_labels([-1.0, 0.0, 1.0]) == ["−1", "0", "1"]
    assert svg.share_labels([0.7, 0.725]) == ["70.0%", "72.5%"]


@given(FINITE, FINITE, st.integers(2, 9))
def test_ticks_cover_the_domain_and_tell_themselves_apart(one: float, other: float, count: int) -> None:
    low, high = min(one, other), max(one, other)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-3):
        high = low + 1
    ticks = svg.nice_ticks(low, high, count)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + step * 1e-6
    assert ticks[-1] >= high - step * 1e-6
    assert len(ticks) <= count + 2
    labels = svg.tick_labels(ticks)
    if step < 1000:
        assert len(set(labels)) == len(labels)


@given(st.lists(st.floats(0, 200), min_size=1, max_size=12), st.floats(1, 15))
def test_spread_keeps_order_and_distance_and_stays_inside(wanted: list[float], gap: float) -> None:
    placed = svg.spread(wanted, gap, 0, 200)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    in_order = [placed[index] for index in order]
    assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(in_order))
    assert in_order[0] >= -1e-6
    assert in_order[-1] <= 200 + 1e-6 or (len(wanted) - 1) * gap > 200
    if all(b - a >= gap for a, b in itertools.pairwise(sorted(wanted))):
        assert placed == pytest.approx(wanted)


def test_spread_by_hand() -> None:
    # 10 and 12 must be 6 apart: least squares moves each by 2.
    assert svg.spread([12, 10, 50], 6, 0, 100) == pytest.approx([14, 8, 50], abs=1e-9)


def test_text_is_escaped() -> None:
    hostile = '</text><script>alert("1")</script>'
    drawn = str(svg.text(1, 2, hostile, hostile))
    assert "<script" not in drawn
    assert ElementTree.fromstring(drawn).text == hostile


def line_chart(**changes: object) -> ElementTree.Element:
    points = tuple(Point(x=float(x), y=2.0 * x, low=2.0 * x - 1, high=2.0 * x + 1) for x in range(5))
    series = (
        Series(label="ppo", ink="f-ppo v0", points=points),
        Series(label="dpo", ink="f-dpo v0", points=points[:3]),
    )
    chart = LineChart(title="Score", description="Rises.", series=series, **changes)  # type: ignore[arg-type]
    return ElementTree.fromstring(str(charts.line_chart(chart)))


def test_line_chart_labels_each_line_and_draws_its_band() -> None:
    drawn = line_chart()
    labels = [node.text for node in drawn.iter("text") if node.get("class") == "label"]
    assert labels == ["ppo", "dpo"]
    assert sum(node.get("class") == "band" for node in drawn.iter("path")) == 2
    assert drawn.find("title") is not None
    assert drawn.findtext("desc") == "Rises."
    assert {f"{drawn.find(name).get('id')}" for name in ("title", "desc")} == set(  # type: ignore[union-attr]
        str(drawn.get("aria-labelledby")).split()
    )


def test_marked_chart_has_a_whisker_for_each_interval() -> None:
    drawn = line_chart(marked=True, x_by_root=True)
    assert sum(node.get("class") == "whisker" for node in drawn.iter("line")) == 8
    assert not [node for node in drawn.iter("path") if node.get("class") == "band"]


def test_a_constant_and_a_single_point_can_be_drawn() -> None:
    for points in ((Point(x=0, y=0),), (Point(x=0, y=3), Point(x=1, y=3))):
        chart = LineChart(title="t", description="d", series=(Series(label="a", ink="i", points=points),))
        assert "nan" not in str(charts.line_chart(chart))


def whiskers(drawn: ElementTree.Element) -> list[tuple[float, float]]:
    lines = (node for node in drawn.iter("line") if str(node.get("class")).startswith("whisker"))
    return [(float(str(node.get("x1"))), float(str(node.get("x2")))) for node in lines]


def test_win_rates_stand_where_they_should() -> None:
    rows = [
        Row(
            label="ppo",
            ink="i",
            value=Measured(value=0.7, low=0.6, high=0.8),
            controlled=Measured(value=0.4, low=0.3, high=0.5),
        ),
        Row(label="sft", ink="i", value=Measured(value=0.45)),
    ]
    axis = charts.whisker_axis(rows)
    assert (axis.low, axis.high) == (0.3, 0.8)
    drawn = ElementTree.fromstring(str(charts.whisker_chart(rows, title="t", description="d", axis=axis)))
    dots = [float(str(node.get("cx"))) for node in drawn.iter("circle")]
    # The axis runs from axis.left at 0.3 to 302 (390 less 88) at 0.8: 0.7 is four fifths of the way, 0.4 one fifth.
    along = [axis.left + (302 - axis.left) * share for share in (0.8, 0.2, 0.3)]
    assert dots == pytest.approx(along, abs=0.06)
    assert len(whiskers(drawn)) == 2  # a rate without an interval has none
    middle = next(node for node in drawn.iter("line") if node.get("class") == "middle")
    assert float(str(middle.get("x1"))) == pytest.approx(axis.left + (302 - axis.left) * 0.4, abs=0.06)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=7))
@example([(0.9, 0.92, 0.95)])
@example([(0.05, 0.1, 0.2)])
def test_the_axis_shows_every_interval_and_the_middle(numbers: list[tuple[float, float, float]]) -> None:
    rows = [
        Row(label="m", ink="i", value=Measured(value=sorted(three)[1], low=min(three), high=max(three)))
        for three in numbers
    ]
    axis = charts.whisker_axis(rows)
    assert 0 <= axis.low <= 0.4
    assert 0.6 <= axis.high <= 1
    assert all(axis.low - 1e-9 <= end <= axis.high + 1e-9 for row in rows for end in row.value.bounds)


def test_calibration_on_the_diagonal() -> None:
    bins = [
        Bin(predicted=at, observed=Measured(value=at, low=at - 0.05, high=at + 0.05, n=9), share=0.5)
        for at in (0.6, 0.9)
    ]
    drawn = ElementTree.fromstring(str(charts.calibration_chart(bins, title="t", description="d", ink="i")))
    diagonal = next(node for node in drawn.iter("line") if node.get("class") == "diagonal")
    x1, y1, x2, y2 = (float(str(diagonal.get(name))) for name in ("x1", "y1", "x2", "y2"))
    for dot in drawn.iter("circle"):
        x, y = float(str(dot.get("cx"))), float(str(dot.get("cy")))
        assert y == pytest.approx(y1 + (y2 - y1) * (x - x1) / (x2 - x1), abs=0.2)


def test_flow_says_what_is_done_and_what_is_not() -> None:
    stops = [Stop(name=f"s{i}", count=f"{i} things", time="", done=i < 3) for i in range(7)]
    for upright in (False, True):
        drawn = ElementTree.fromstring(str(charts.flow_chart(stops, description="d", again=True, upright=upright)))
        classes = [node.get("class") for node in drawn.iter("circle")]
        assert classes == ["station"] * 3 + ["station absent"] * 4
        assert any("round again" in (node.text or "") for node in drawn.iter("text"))


def test_bars_are_proportional() -> None:
    drawn = ElementTree.fromstring(str(charts.bar_chart([("a", 30.0), ("b", 10.0)], title="t", description="d")))
    wide, narrow = (float(str(node.get("width"))) for node in drawn.iter("rect"))
    assert wide == pytest.approx(3 * narrow, abs=0.3)


@given(st.floats(-50, 50), st.floats(-3, 3), st.integers(31, 400))
def test_the_trend_of_a_straight_line_is_that_line(start: float, slope: float, steps: int) -> None:
    points = tuple((float(step), start + slope * step) for step in range(steps))
    drawn = smoothed(points)
    assert (drawn[0].x, drawn[-1].x) == (0.0, steps - 1)
    assert len(drawn) <= 161
    for point in drawn:
        assert point.y == pytest.approx(start + slope * point.x, abs=1e-6)
        assert point.low is not None
        assert point.high is not None
        assert point.low <= point.y <= point.high


def test_the_band_holds_the_middle_of_the_noise() -> None:
    # Noise that steps through -1, -0.5, 0, 0.5, 1: its deciles are about -1 and 1, at most the extremes.
    points = tuple((float(step), (step % 5 - 2) / 2) for step in range(200))
    inside = smoothed(points)[20]
    assert inside.y == pytest.approx(0, abs=0.1)
    assert 0.6 < (inside.high or 0) <= 1.1
    assert -1.1 <= (inside.low or 0) < -0.6


def test_few_points_are_drawn_as_they_are() -> None:
    points = tuple((float(step), math.sin(step)) for step in range(30))
    assert [(point.x, point.y, point.low) for point in smoothed(points)] == [(x, y, None) for x, y in points]


def test_long_labels_are_cut_and_told_in_full() -> None:
    name = "an-organisation/a-model-with-a-very-long-name-7b-instruct"
    drawn = str(
        charts.whisker_chart([Row(label=name, ink="i", value=Measured(value=0.5))], title=name * 3, description="d")
    )
    assert f"<title>{name}: 50%</title>" in drawn
    assert re.search(r'class="name"[^>]*>an-organisation[^<]*…<', drawn)
