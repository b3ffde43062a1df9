"""Figures as lines of a page: numbers in words, bars within their line, reasons where there is no value."""

from __future__ import annotations

import pytest
from tests.store.test_dashboard import given, item

from tastemaker.agreement import Undefined
from tastemaker.errors import StoreError
from tastemaker.intervals import Estimate, Interval
from tastemaker.labelling.figures import Bar, Line, Unit, line, lines_of_rater
from tastemaker.labelling.forms import answer_in, at, number, percent, whole
from tastemaker.store.dashboard import rater_reports
from tastemaker.store.tasks import ComparisonAnswer, OutputRating, RankingAnswer, RatingAnswer


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, ci95=Interval(low, high), n=7)


@pytest.mark.parametrize(
    ("unit", "figure", "shown"),
    [
        ("share", estimate(0.72, 0.5, 0.9), ("72 %", "50 % to 90 %", Bar(low=50, value=72, high=90))),
        # Below nothing there is no place on the bar; the number says it.
        (
            "chance-corrected",
            estimate(-0.1, -0.25, 0.5),
            ("\N{MINUS SIGN}0.10", "\N{MINUS SIGN}0.25 to 0.50", Bar(low=0, value=0, high=50)),
        ),
        ("seconds", estimate(41.4, 9.96, 90), ("41 s", "10.0 s to 90 s", None)),
        ("points", estimate(-0.5, -1, 0.25), ("\N{MINUS SIGN}0.50", "\N{MINUS SIGN}1.00 to +0.25", None)),
        ("grade", estimate(6.25, 5, 7), ("6.25", "5.00 to 7.00", None)),
    ],
)
def test_a_figure_in_words_and_as_a_bar(unit: Unit, figure: Estimate, shown: tuple[str, str, Bar | None]) -> None:
    value, interval, bar = shown
    assert line("x", figure, unit) == Line(label="x", value=value, interval=interval, n=7, bar=bar)


def test_a_figure_without_a_value_says_why() -> None:
    found = line("x", Undefined(reason="nobody answered"), mark=50.0)
    assert (found.reason, found.bar, found.n) == ("nobody answered", None, 0)


def test_the_most_frequent_quality_is_called_that() -> None:
    """Of the two outputs of an item never are two rated alike; 3 of 6 ratings are 5."""
    qualities = [("5", "4"), ("5", "3"), ("2", "5")]
    answers = [
        given(item(number, ["a", "b"]), "ann", answer_in("rating", "AB", {"likert-A": first, "likert-B": second}))
        for number, (first, second) in enumerate(qualities)
    ]
    (report,) = rater_reports(answers, {})
    shown = {each.label: each.value for each in lines_of_rater(report)}
    assert shown["Gives their most frequent quality"] == "50 %"
    assert not any("alike" in label for label in shown)


@pytest.mark.parametrize("text", ["", "x", "1e3", "-1", "8", "²", "٣", "1.5", "9" * 20])
def test_whole_numbers_are_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(StoreError, match=r"must be a whole number from 1 to 7\.$"):
        whole(text, "grade", least=1, most=7)


def test_numbers_as_they_are_typed() -> None:
    assert whole(" 7 ", "grade", least=1, most=7) == 7
    assert percent("7,5 %", "share") == pytest.approx(0.075, abs=1e-12)
    for text in ("nan", "inf", "-0.1", "100.1", ""):
        with pytest.raises(StoreError, match="in percent"):
            percent(text, "share")
    assert number("1e1", "x", least=0, most=10) == 10


def test_answers_as_they_are_filled_in() -> None:
    places = {"rank-A": "2", "rank-B": "3", "rank-C": "2"}
    assert answer_in("ranking", "ABC", places) == RankingAnswer((("A", "C"), ("B",)))
    assert answer_in("comparison", "AB", {"choice": "tie"}) == ComparisonAnswer("tie")
    rated = {"likert-A": "1", "likert-B": "7", "flag-B-hallucination": "yes", "flag-A-nothing": "yes"}
    expected = RatingAnswer({"A": OutputRating(1), "B": OutputRating(7, ("hallucination",))})
    assert answer_in("rating", "AB", rated) == expected


def test_names_in_addresses_may_hold_anything() -> None:
    assert at("/x", study="a/b & c?", item=3) == "/x?study=a%2Fb+%26+c%3F&item=3"
