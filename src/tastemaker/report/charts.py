"""The charts of a report as inline SVG: lines with bands, win rates with whiskers, calibration, bars, and the flow.

A chart is a function of what it shows. Drawings are about as wide as a phone, so that their letters keep their size
when the page stacks them; labels stand beside what they name, and there are no legends. Where a value has an
interval, the interval is drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tastemaker.report.fields import Measured
from tastemaker.report.notes import Box, Note, place_notes
from tastemaker.report.svg import (
    LETTER_WIDTH,
    Scale,
    drawing,
    element,
    group,
    line,
    nice_ticks,
    path,
    share_labels,
    spread,
    text,
    text_width,
    tick_labels,
)
from tastemaker.report.words import percent, percent_range, shortened

FONT = 11.5
NAME_SIZE = 12.5
LABEL_GAP = 13.5
ROOT_TICK_GAP = 34.0
NOTE_SIZE = 10.5
DOT = 4.0
DOT_ROOM = 7.0  # about a point, out of which the notes of other points keep
LINE_PIECE = 3.0  # how finely a line is followed when notes keep clear of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point of a line; `low` and `high` are its band or whisker, `note` is written beside it where there is room."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    hollow: bool = False  # where a line begins and not what it is about


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line with its direct label (none where it is empty) and its CSS classes."""

    label: str
    ink: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LineChart:
    """What a line chart shows and how its axes read."""

    title: str
    description: str
    series: tuple[Series, ...]
    x_label: str = "step"
    unit: str = ""
    y_text: Callable[[float], str] | None = None
    is_share: bool = False  # the values are shares; the axis counts in per cent
    x_by_root: bool = False
    marked: bool = False  # draw each point, with a whisker instead of a band, and join them in the order given


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a win-rate chart; `controlled` is the same measurement with length taken out."""

    label: str
    ink: str
    value: Measured
    controlled: Measured | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WhiskerAxis:
    """The range of shares that a win-rate chart shows, and where its labels end."""

    low: float
    high: float
    left: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """One bin of a calibration chart."""

    predicted: float
    observed: Measured
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """One stage in the flow diagram. `count` and `time` are written under its name; `done` draws it filled."""

    name: str
    count: str
    time: str
    done: bool


def line_chart(chart: LineChart, *, width: float = 360, height: float = 208) -> Markup:
    """Lines over steps (or over KL), each labelled at its end."""
    points = [point for series in chart.series for point in series.points]
    ys = [y for point in points for y in (point.y, point.low, point.high) if y is not None]
    low, high = _padded(min(ys), max(ys))
    ticks = [tick for tick in nice_ticks(low, high, 6) if low <= tick <= high]
    labels = share_labels(ticks) if chart.is_share else tick_labels(ticks, chart.y_text)
    left = max(text_width(label, FONT) for label in labels) + 8
    right = width - max(
        min(104.0, max(text_width(series.label, FONT) for series in chart.series) + 14),
        text_width(chart.x_label, FONT) + 10,
    )
    xs = [point.x for point in points]
    x = Scale(
        (0.0 if chart.x_by_root else min(xs), max(xs)), (left + 4, right - (8 if chart.marked else 2)), chart.x_by_root
    )
    y = Scale((low, high), (height - 26, 28))
    frame = [
        *_heading(chart.title, chart.unit, width),
        *(line(left, y(tick), right, y(tick), "grid") for tick in ticks),
        *(text(left - 6, y(tick) + 4, label, "tick", anchor="end") for tick, label in zip(ticks, labels, strict=True)),
        *_x_axis(chart, x, height),
    ]
    marks = [_series(series, x, y, marked=chart.marked) for series in chart.series]
    names = _end_labels(chart, x, y, right)
    return drawing(
        *frame,
        *marks,
        *_notes(chart.series, x, y, labels=[name.box for name in names], bounds=Box(left, 20, width, height - 26)),
        *(name.drawn for name in names),
        width=width,
        height=height,
        title=chart.title,
        description=chart.description,
    )


def _heading(title: str, unit: str, width: float) -> list[Markup]:
    title = shortened(title, int(width / (LETTER_WIDTH * NAME_SIZE)))
    room = int((width - text_width(title, NAME_SIZE)) / (LETTER_WIDTH * FONT)) - 1
    unit_part = element("tspan", shortened(unit, room), class_="unit", dx=7.0) if unit and room > 0 else Markup("")
    return [element("text", element("tspan", title), unit_part, x=0.0, y=13.0, class_="heading")]


def _x_axis(chart: LineChart, x: Scale, height: float) -> list[Markup]:
    low, high = x.domain
    if x.by_root:
        ticks = _root_ticks(x)
        labels = [f"{tick:g}" for tick in ticks]
    else:
        ticks = [tick for tick in nice_ticks(low, high, 5) if low <= tick <= high and tick == round(tick)]
        labels = tick_labels(ticks)
    drawn = [
        text(x(tick), height - 7, label, "tick", anchor="middle") for tick, label in zip(ticks, labels, strict=True)
    ]
    return [*drawn, text(x.range[1] + 14, height - 7, chart.x_label, "tick axis")]


def _root_ticks(x: Scale) -> list[float]:
    """1, 2, 3, 5 and 8 times powers of ten, from the far end inward, as many as have room."""
    power = math.floor(math.log10(x.domain[1])) if x.domain[1] > 0 else 0
    steps = (factor * 10.0**exponent for exponent in (power, power - 1) for factor in (8, 5, 3, 2, 1))
    ticks: list[float] = []
    for tick in steps:
        far_enough = not ticks or x(ticks[-1]) - x(tick) >= ROOT_TICK_GAP
        if tick <= x.domain[1] and far_enough and x(tick) - x.range[0] >= ROOT_TICK_GAP:
            ticks.append(tick)
    return [0.0, *reversed(ticks)]


def _padded(low: float, high: float) -> tuple[float, float]:
    """The range of the values with a little air; a constant gets a range of its own size."""
    air = 0.06 * (high - low) or abs(high) / 2 or 1.0
    return (0.0 if 0 <= low < air else low - air), high + air


def _series(series: Series, x: Scale, y: Scale, *, marked: bool) -> Markup:
    ordered = list(series.points) if marked else sorted(series.points, key=lambda point: point.x)
    parts: list[Markup] = []
    banded = [(point.x, point.low, point.high) for point in ordered if point.low is not None and point.high is not None]
    if banded and not marked:
        lower = [(x(at), y(low)) for at, low, _ in banded if low is not None]
        upper = [(x(at), y(high)) for at, _, high in banded if high is not None]
        parts.append(path([*lower, *reversed(upper)], "band", closed=True))
    if marked:
        parts.extend(line(x(at), y(low), x(at), y(high), "whisker") for at, low, high in banded if low != high)
    if len(ordered) > 1:
        parts.append(path([(x(point.x), y(point.y)) for point in ordered], "line thin" if marked else "line"))
    if marked or len(ordered) == 1:
        parts.extend(_marked_point(series, point, x, y) for point in ordered)
    return group(*parts, class_=series.ink)


def _marked_point(series: Series, point: Point, x: Scale, y: Scale) -> Markup:
    told = element("title", f"{series.label} {point.note}".strip() + f": {point.y:.3g} at {point.x:.3g}")
    return element("circle", told, cx=x(point.x), cy=y(point.y), r=DOT, class_="dot hollow" if point.hollow else "dot")


def _notes(series: Sequence[Series], x: Scale, y: Scale, *, labels: Sequence[Box], bounds: Box) -> list[Markup]:
    """The notes of all lines; those at the ends of a line choose their places first."""
    noted = [
        (one.ink, point)
        for one in series
        for point in sorted(one.points, key=lambda point: point not in (one.points[0], one.points[-1]))
        if point.note
    ]
    if not noted:
        return []
    points = [point for one in series for point in one.points]
    whiskers = [
        Box(x(at.x) - 2, y(at.y if at.high is None else at.high), x(at.x) + 2, y(at.y if at.low is None else at.low))
        for at in points
    ]
    dots = [Box(x(at.x) - DOT_ROOM, y(at.y) - DOT_ROOM, x(at.x) + DOT_ROOM, y(at.y) + DOT_ROOM) for at in points]
    places = place_notes(
        [_note(point, x, y) for _, point in noted],
        points=[*dots, *labels],
        lines=[*whiskers, *(box for one in series for box in _along(one.points, x, y))],
        bounds=bounds,
    )
    return [
        group(text(*at, point.note, "note", anchor="middle"), class_=ink)
        for (ink, point), at in zip(noted, places, strict=True)
        if at is not None
    ]


def _note(point: Point, x: Scale, y: Scale) -> Note:
    return Note(
        x=x(point.x),
        y=y(point.y),
        high=min(y(point.y) - DOT, y(point.y if point.high is None else point.high)),
        low=max(y(point.y) + DOT, y(point.y if point.low is None else point.low)),
        width=text_width(point.note, NOTE_SIZE),
        size=NOTE_SIZE,
    )


def _along(points: Sequence[Point], x: Scale, y: Scale) -> list[Box]:
    """Small boxes along the line that joins the points."""
    found: list[Box] = []
    for one, other in itertools.pairwise(points):
        start, end = (x(one.x), y(one.y)), (x(other.x), y(other.y))
        pieces = max(1, math.ceil(math.dist(start, end) / LINE_PIECE))
        for piece in range(pieces):
            share = (piece + 0.5) / pieces
            at = [a + share * (b - a) for a, b in zip(start, end, strict=True)]
            half = LINE_PIECE / 2
            found.append(Box(at[0] - half, at[1] - half, at[0] + half, at[1] + half))
    return found


@dataclass(frozen=True, slots=True)
class _EndLabel:
    drawn: Markup
    box: Box


def _end_labels(chart: LineChart, x: Scale, y: Scale, right: float) -> list[_EndLabel]:
    named = [one for one in chart.series if one.label]
    ends = [one.points[-1] if chart.marked else max(one.points, key=lambda point: point.x) for one in named]
    places = spread([y(end.y) for end in ends], LABEL_GAP, 34, y.range[0] - 2)
    labels = []
    for one, end, place in zip(named, ends, places, strict=True):
        name = shortened(one.label, 14)
        label = text(right + 7, place + 4, name, "label")
        drawn = group(*_leader(x(end.x), y(end.y), right, place), label, class_=one.ink)
        box = Box(right + 4, place - FONT / 2, right + 7 + text_width(name, FONT), place + FONT / 2)
        labels.append(_EndLabel(drawn, box))
    return labels


def _leader(x: float, y: float, right: float, place: float) -> list[Markup]:
    """Leads from a line's end to its label where the two are not side by side."""
    if x < right - 24:
        return [path([(x + 7, y), (right - 2, y), (right + 4, place)], "leader far")]
    return [line(right + 1, y, right + 5, place, "leader")] if abs(place - y) > 3 else []


def whisker_axis(rows: Sequence[Row], *, widest_label: float = 138) -> WhiskerAxis:
    """An axis that shows every interval of `rows`, always with the middle in view, and gives the labels room."""
    ends = [end for row in rows for one in (row.value, row.controlled) if one is not None for end in one.bounds]
    low, high = math.floor(10 * min(ends) + 1e-9) / 10, math.ceil(10 * max(ends) - 1e-9) / 10
    longest = max(text_width(row.label, NAME_SIZE) for row in rows) + 12
    return WhiskerAxis(low=max(0.0, min(0.4, low)), high=min(1.0, max(0.6, high)), left=min(widest_label, longest))


def whisker_chart(
    rows: Sequence[Row],
    *,
    title: str,
    description: str,
    axis: WhiskerAxis | None = None,
    unit: str = "",
    middle: str = "50%",
) -> Markup:
    """Shares as dots with their intervals around the 50 % line, in the order given.

    Panels that are to be compared are given one `axis`.
    """
    axis = axis or whisker_axis(rows)
    width, top = 390.0, 30.0
    tall = 37.0 if any(row.controlled for row in rows) else 25.0
    right, bottom = width - 88.0, top + tall * len(rows)
    x = Scale((axis.low, axis.high), (axis.left, right))
    ticks = [tenth / 10 for tenth in (1, 3, 5, 7, 9) if axis.low - 1e-9 <= tenth / 10 <= axis.high + 1e-9]
    frame = [
        *_heading(title, unit, width),
        *(line(x(tick), top, x(tick), bottom, "middle" if tick == 0.5 else "grid") for tick in ticks),
        *_share_ticks(x, ticks, bottom + 15, middle),
    ]
    drawn = [_whisker_row(row, x, top + tall * (place + 0.5)) for place, row in enumerate(rows)]
    return drawing(*frame, *drawn, width=width, height=bottom + 22, title=title, description=description)


def _share_ticks(x: Scale, ticks: Sequence[float], y: float, middle: str) -> list[Markup]:
    """The middle's label, and those of the other ticks that have room beside it."""
    room = (text_width(middle, FONT) + text_width("30%", FONT)) / 2 + 4
    shown = [tick for tick in ticks if tick == 0.5 or abs(x(tick) - x(0.5)) >= room]
    return [text(x(at), y, middle if at == 0.5 else percent(at), "tick", anchor="middle") for at in shown]


def _whisker_row(row: Row, x: Scale, y: float) -> Markup:
    left, right = x.range
    main = y - 6 if row.controlled else y
    told = f"{row.label}: {percent(row.value.value)} {percent_range(row.value)}".strip()
    interval = element("tspan", percent_range(row.value).removesuffix("%"), class_="unit", dx=6.0)
    parts = [
        text(left - 10, main + 4, shortened(row.label, int(left / (LETTER_WIDTH * NAME_SIZE))), "name", anchor="end"),
        *_whisker(row.value, x, main, "whisker", "dot", 4.6, told),
        element("text", element("tspan", percent(row.value.value)), interval, x=right + 12, y=main + 4, class_="value"),
    ]
    if row.controlled:
        told = f"{row.label}, length-controlled: {percent(row.controlled.value)} {percent_range(row.controlled)}"
        parts.extend(_whisker(row.controlled, x, main + 13, "whisker thin", "dot hollow", 3.3, told.strip()))
        parts.append(text(right + 12, main + 17.5, percent(row.controlled.value), "value lesser"))
    return group(*parts, class_=row.ink)


def _whisker(value: Measured, x: Scale, y: float, line_class: str, dot_class: str, r: float, told: str) -> list[Markup]:
    low, high = (min(max(end, x.domain[0]), x.domain[1]) for end in value.bounds)
    bar = [line(x(low), y, x(high), y, line_class)] if value.has_interval else []
    dot = element("circle", element("title", told), cx=x(value.value), cy=y, r=r, class_=dot_class)
    return [*bar, dot]


def calibration_chart(bins: Sequence[Bin], *, title: str, description: str, ink: str, width: float = 360) -> Markup:
    """Predicted against observed probabilities; on the diagonal, a prediction means what it says."""
    height, left, right = 300.0, 36.0, width - 30.0
    x = Scale((0.5 if all(one.predicted >= 0.5 for one in bins) else 0.0, 1), (left, right))
    low = 0.4 if x.domain[0] == 0.5 and all(one.observed.bounds[0] >= 0.4 for one in bins) else 0.0
    y = Scale((low, 1), (height - 40, 34))
    ticks_x, ticks_y = (
        [tick for tick in nice_ticks(*axis.domain, 5) if axis.domain[0] <= tick <= axis.domain[1]] for axis in (x, y)
    )
    start = max(x.domain[0], y.domain[0])
    frame = [
        *_heading(title, "observed % by predicted %", width),
        *(line(left, y(tick), right, y(tick), "grid") for tick in ticks_y),
        *(text(left - 6, y(tick) + 4, label, "tick", anchor="end") for tick, label in _shares(ticks_y)),
        *(text(x(tick), height - 24, label, "tick", anchor="middle") for tick, label in _shares(ticks_x)),
        line(x(start), y(start), x(1), y(1), "diagonal"),
    ]
    marks = group(*(_calibration_mark(one, x, y) for one in bins), class_=ink)
    return drawing(*frame, marks, width=width, height=height - 14, title=title, description=description)


def _calibration_mark(one: Bin, x: Scale, y: Scale) -> Markup:
    at, (low, high) = x(one.predicted), one.observed.bounds
    told = f"predicted {percent(one.predicted)}, observed {percent(one.observed.value)} of {one.observed.n or 0} pairs"
    dot = element(
        "circle",
        element("title", told),
        cx=at,
        cy=y(one.observed.value),
        r=3.0 + 5.0 * math.sqrt(one.share),
        class_="dot",
    )
    return group(line(at, y(low), at, y(high), "whisker"), dot) if one.observed.has_interval else dot


def _shares(ticks: Sequence[float]) -> list[tuple[float, str]]:
    return list(zip(ticks, share_labels(ticks), strict=True))


def bar_chart(bars: Sequence[tuple[str, float]], *, title: str, description: str, width: float = 420) -> Markup:
    """Amounts by category, in the order given, each with its number at the end of its bar."""
    left = min(150.0, max(text_width(label, NAME_SIZE) for label, _ in bars) + 12)
    x = Scale((0, max(amount for _, amount in bars) or 1.0), (left, width - 52))
    tall, top = 23.0, 28.0
    rows = [
        group(
            text(left - 10, top + tall * place + 15, shortened(label, 20), "name", anchor="end"),
            element("rect", x=left, y=top + tall * place + 5, width=x(amount) - left, height=13.0, class_="bar"),
            text(x(amount) + 7, top + tall * place + 15.5, f"{amount:,.0f}", "value lesser"),
        )
        for place, (label, amount) in enumerate(bars)
    ]
    return drawing(
        *_heading(title, "", width),
        *rows,
        width=width,
        height=top + tall * len(bars) + 6,
        title=title,
        description=description,
    )


def flow_chart(stops: Sequence[Stop], *, description: str, again: bool, upright: bool) -> Markup:
    """The stages as stations on a line, across for a page and upright for a phone."""
    return _flow_upright(stops, description, again) if upright else _flow_across(stops, description, again)


def _flow_across(stops: Sequence[Stop], description: str, again: bool) -> Markup:
    column, y = 128.0, 26.0
    width = column * len(stops)
    xs = [column * (place + 0.5) for place in range(len(stops))]
    tracks = [
        line(xs[place] + 17, y, xs[place + 1] - 17, y, "track" if stops[place + 1].done else "track absent")
        for place in range(len(stops) - 1)
    ]
    stations = [
        group(
            *_station(place, stop, xs[place], y),
            text(xs[place], y + 42, stop.name, "stop", anchor="middle"),
            text(xs[place], y + 61, stop.count, "stop-count", anchor="middle"),
            text(xs[place], y + 78, stop.time, "tick", anchor="middle"),
        )
        for place, stop in enumerate(stops)
    ]
    height = y + 88
    back: list[Markup] = []
    if again:
        turn, height = y + 96, y + 118
        back = [
            path([(xs[-1], turn - 8), (xs[-1], turn), (xs[0], turn), (xs[0], turn - 8)], "track back"),
            path([(xs[0] - 4, turn - 4), (xs[0], turn - 10), (xs[0] + 4, turn - 4)], "track back"),
            text(
                (xs[0] + xs[-1]) / 2, turn + 15, "and round again, from the best policy so far", "tick", anchor="middle"
            ),
        ]
    return drawing(
        *tracks,
        *stations,
        *back,
        width=width,
        height=height,
        title="The run, stage by stage",
        description=description,
        class_="across",
    )


def _flow_upright(stops: Sequence[Stop], description: str, again: bool) -> Markup:
    row, x, width = 50.0, 16.0, 350.0
    ys = [row * place + 20 for place in range(len(stops))]
    tracks = [
        line(x, ys[place] + 17, x, ys[place + 1] - 17, "track" if stops[place + 1].done else "track absent")
        for place in range(len(stops) - 1)
    ]
    stations = [
        group(
            *_station(place, stop, x, ys[place]),
            text(44.0, ys[place] - 1, stop.name, "stop"),
            text(44.0, ys[place] + 16, stop.count, "stop-count"),
            text(width, ys[place] - 1, stop.time, "tick", anchor="end"),
        )
        for place, stop in enumerate(stops)
    ]
    last = ys[-1] + 24
    back = [text(44.0, last + 12, "↺ and round again, from the best policy so far", "tick")] if again else []
    return drawing(
        *tracks,
        *stations,
        *back,
        width=width,
        height=last + (20 if again else 0),
        title="The run, stage by stage",
        description=description,
        class_="upright",
    )


def _station(place: int, stop: Stop, x: float, y: float) -> tuple[Markup, Markup]:
    state = "station" if stop.done else "station absent"
    return (
        element("circle", cx=x, cy=y, r=13.0, class_=state),
        text(x, y + 4.3, str(place + 1), "station-number" if stop.done else "station-number absent", anchor="middle"),
    )
