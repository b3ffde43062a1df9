"""The dashboard: figures by hand, and simulated raters among whom the bad stand out and the good do not."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from tests.store.people import LEAD, know_secrets, open_accounts, work

from tastemaker import raters
from tastemaker.agreement import Undefined
from tastemaker.intervals import Estimate
from tastemaker.raters import RaterProfile, SimulatedRater, calibrate_noise, noiseless_utilities, pair_agreement
from tastemaker.records import About, Message, Prompt, Response
from tastemaker.store import LabelService, Store
from tastemaker.store import rater_figures as figures
from tastemaker.store.dashboard import Dashboard, RaterReport, rater_reports
from tastemaker.store.desk import Desk
from tastemaker.store.given import Given, Item
from tastemaker.store.importing import GoldItem
from tastemaker.store.lead import LeadService
from tastemaker.store.tasks import (
    LETTERS,
    Answer,
    NewOutput,
    OutputRating,
    RankingAnswer,
    RatingAnswer,
)

if TYPE_CHECKING:
    from tests.store.conftest import Clock, Make

# What the documentation's figures are about: groups of ten raters, forty rankings of four outputs each, three raters
# an item, at the agreement of InstructGPT's training labelers.
GROUPS, RATERS, ANSWERS, OUTPUTS, OVERLAP, AGREEMENT = 30, 10, 40, 4, 3, 0.726
WEEK = 7 * 24 * 3600.0
Profile = Callable[..., RaterProfile]


def value(figure: Estimate | Undefined) -> float:
    assert isinstance(figure, Estimate)
    assert figure.ci95.low <= figure.value <= figure.ci95.high
    return figure.value


def item(number: int, texts: Sequence[str]) -> Item:
    prompt = Prompt(messages=(Message("user", f"Question {number}?"),), about=About(id=f"key-{number}"))
    outputs = tuple(NewOutput(response=Response(text=text), source="model") for text in texts)
    return Item(
        id=number, study="s", kind="ranking", key=f"key-{number}", position=number, prompt=prompt, outputs=outputs,
    )  # fmt: skip


def given(
    asked: Item, rater: str, answer: Answer, *, order: Sequence[int] = (), seconds: float = 60.0, at: float = 0.0
) -> Given:
    return Given(
        id=0,
        item=asked,
        answer=answer,
        order_shown=tuple(order or range(len(asked.outputs))),
        counts=True,
        rater=rater,
        rater_group="team",
        origin="simulated",
        guideline_version="v1",
        seconds=seconds,
        submitted_at=at,
    )


def ranked(letters: str) -> RankingAnswer:
    """`C AB` says that C is best and that A and B tie."""
    return RankingAnswer(tuple(tuple(group) for group in letters.split()))


# --- by hand --------------------------------------------------------------------------------------------------------


def test_preferences_by_hand() -> None:
    """Three raters of two items; the first shown, the longer and the ties are counted on untied pairs."""
    long = "x" * 50
    first, second = item(1, ["a", "b", long]), item(2, ["c", "d"])
    answers = [
        given(first, "ann", ranked("A B C"), order=(2, 0, 1)),
        given(first, "bob", ranked("A BC"), order=(0, 1, 2)),
        given(first, "eve", ranked("C B A"), order=(1, 2, 0)),
        given(second, "ann", ranked("A B"), order=(1, 0)),
        given(second, "bob", ranked("B A"), order=(1, 0)),
    ]
    pairs = figures.preferences(answers)
    agreement = figures.preference_agreement(pairs)
    # ann on item 1 with bob: AB, AC alike (BC he ties); with eve: none of three. On item 2 with bob: no. 2 of 6.
    assert value(agreement["ann"]) == pytest.approx(2 / 6, abs=1e-9)
    # bob with ann 2 of 2, with eve 0 of 2, and 0 of 1.
    assert value(agreement["bob"]) == pytest.approx(2 / 5, abs=1e-9)
    assert value(agreement["eve"]) == pytest.approx(0.0, abs=1e-9)
    bob = pairs.of("bob")
    assert value(figures.tie_rate(pairs, bob)) == pytest.approx(1 / 4, abs=1e-9)
    # ann: of item 1 C was shown first and lost to A and B, A before B won; of item 2 B was shown first and lost.
    assert value(figures.first_shown_rate(pairs, pairs.of("ann"))) == pytest.approx(1 / 4, abs=1e-9)
    # bob: A before B and C won twice; B shown first of item 2 won: 3 of 3.
    assert value(figures.first_shown_rate(pairs, bob)) == pytest.approx(1.0, abs=1e-9)
    # The longer output is C alone: ann never prefers it (0 of 2), eve always (2 of 2), bob in none of 1.
    assert value(figures.longer_rate(pairs, pairs.of("eve"))) == pytest.approx(1.0, abs=1e-9)
    assert value(figures.longer_rate(pairs, pairs.of("ann"))) == pytest.approx(0.0, abs=1e-9)


def test_ratings_by_hand() -> None:
    asked = [item(number, ["a", "b"]) for number in (1, 2)]
    rated = RatingAnswer({"A": OutputRating(5), "B": OutputRating(2, ("hallucination",))})
    other = RatingAnswer({"A": OutputRating(4), "B": OutputRating(4)})
    answers = [given(one, rater, each) for one in asked for rater, each in (("ann", rated), ("bob", other))]
    judged = figures.qualities(answers)
    assert value(figures.quality_agreement(judged)["ann"]) == pytest.approx(1 / 2, abs=1e-9)
    # (5 - 4 + 2 - 4) / 2
    assert value(figures.quality_shift(judged, "ann")) == pytest.approx(-0.5, abs=1e-9)
    assert value(figures.one_quality_rate(judged, judged.of("bob"))) == pytest.approx(1.0, abs=1e-9)
    assert value(figures.flag_agreement(figures.flags(answers))["bob"]) == pytest.approx(21 / 22, abs=1e-9)
    # Qualities 5, 2, 4, 4: 2 stands alone, the others are near each other: (3/4)^2 + (1/4)^2.
    assert figures.chance_of_quality(judged) == pytest.approx(10 / 16, abs=1e-9)


def test_times_by_hand() -> None:
    found = figures.quantile([5.0, 1.0, 4.0, 2.0, 6.0, 3.0], 0.5, least=6)
    assert isinstance(found, Estimate)
    # Six values: the interval of the median from the lowest to the highest misses it in 2 of 64 samples.
    assert (found.value, found.ci95.low, found.ci95.high) == (3.5, 1.0, 6.0)
    fifth = figures.quantile(list(range(1, 21)), 0.05, least=20)
    assert isinstance(fifth, Estimate)
    assert fifth.ci95.low == 0.0  # not one of twenty is surely below the 5th percentile
    assert isinstance(figures.quantile([1.0] * 5, 0.5, least=6), Undefined)


def test_what_is_undefined_says_why() -> None:
    (report,) = rater_reports([given(item(1, ["a", "b"]), "ann", ranked("A B"))], {})
    assert isinstance(report.agreement, Undefined)
    assert report.agreement.reason == "nobody else has answered the same questions"
    undefined = [figure for figure in (report.gold, report.seconds_median, report.quality_shift, report.flag_agreement)]
    assert all(isinstance(figure, Undefined) and figure.reason for figure in undefined)
    assert report.concerns == ()


def test_drift_and_speed_are_noticed() -> None:
    """ann agrees with everybody for a week and with nobody in the next, in a tenth of the time."""
    answers = []
    for number in range(60):
        late = number >= 30
        asked = item(number, ["a", "b"])
        for rater in ("ann", "bob", "cleo"):
            turned = late and rater == "ann"
            answers.append(
                given(asked, rater, ranked("B A" if turned else "A B"), order=(number % 2, 1 - number % 2),
                      seconds=3.0 if rater == "ann" else 30.0, at=WEEK * (1 + late))
            )  # fmt: skip
    ann, bob, _ = rater_reports(answers, {"bob": 80})
    assert {concern.kind for concern in ann.concerns} >= {"drift", "speed"}
    assert [concern.kind for concern in bob.concerns] == ["skips"]
    assert [(week.week, week.answers) for week in ann.weeks] == [("1970-W02", 30), ("1970-W03", 30)]


# --- simulated raters -----------------------------------------------------------------------------------------------


def features(prompt: Prompt, response: Response) -> Mapping[str, float]:
    return {"quality": float(response.text.split()[0])}


def responses(number: int, seed: int) -> list[Response]:
    """Outputs of some quality, and of a length that says nothing of it."""
    draw = random.Random(f"{seed} {number}")
    texts = [f"{draw.gauss(0, 1):.6f} " + "word " * draw.randint(5, 60) for _ in range(OUTPUTS)]
    return [Response(text=text) for text in texts]


@cache
def noise() -> float:
    profile = raters.average("x", group="team", weights={"quality": 1.0}, noise=1.0)
    two = [SimulatedRater(profile, 0, features)] * 2
    items = [(Prompt(messages=(), about=About(id=str(n))), responses(n, 0)) for n in range(300)]
    return calibrate_noise(noiseless_utilities(two, items), target=AGREEMENT, lapse=0.02)


def group(odd: Sequence[Profile], seed: int, *, each: int = ANSWERS) -> tuple[dict[str, str], list[RaterReport]]:
    """What each rater is, and their reports: the odd ones, two careful, a lenient one, and average ones."""
    good: list[Profile] = [raters.careful, raters.careful, raters.lenient]
    makers = [*odd, *good, *[raters.average] * (RATERS - len(odd) - len(good))]
    names = {f"rater-{index}": make.__name__ for index, make in enumerate(makers)}
    return names, reports_of(makers, seed, noise=noise(), each=each)


def reports_of(makers: Sequence[Profile], seed: int, *, noise: float, each: int = ANSWERS) -> list[RaterReport]:
    """The reports of raters who give about `each` answers, over four weeks."""
    team = [
        SimulatedRater(make(f"rater-{index}", group="team", weights={"quality": 1.0}, noise=noise), seed, features)
        for index, make in enumerate(makers)
    ]
    answers: list[Given] = []
    draw = random.Random(seed)
    count = RATERS * each // OVERLAP
    for number in range(count):
        asked = item(number, [response.text for response in responses(number, seed)])
        texts = [output.response for output in asked.outputs]
        for rater in draw.sample(team, OVERLAP):
            order = draw.sample(range(OUTPUTS), OUTPUTS)
            shown = rater.rank(asked.prompt, [texts[index] for index in order], place=number)
            answer = RankingAnswer(tuple(tuple(LETTERS[order[place]] for place in tied) for tied in shown))
            answers.append(given(asked, rater.profile.name, answer, order=order, at=WEEK * (4 * number // count)))
    return rater_reports(answers, {})


def caught(odd: Sequence[Profile]) -> dict[str, float]:
    """How often a rater of each kind gives cause for concern."""
    concerned, seen = Counter[str](), Counter[str]()
    for seed in range(GROUPS):
        names, reports = group(odd, seed)
        for report in reports:
            seen[names[report.rater]] += 1
            concerned[names[report.rater]] += bool(report.concerns)
    return {name: concerned[name] / seen[name] for name in seen}


def test_random_clickers_and_adversaries_are_caught_and_careful_raters_are_not() -> None:
    found = caught([raters.random_clicker, raters.adversary])
    assert found["adversary"] == 1.0
    assert found["random_clicker"] >= 0.9
    assert found["careful"] <= 0.02
    assert max(found["average"], found["lenient"]) <= 0.05


def test_the_biased_are_caught_by_their_bias() -> None:
    found = caught([raters.position_biased, raters.length_lover, raters.straight_liner])
    assert found["straight_liner"] == 1.0
    assert found["length_lover"] >= 0.7
    assert found["position_biased"] >= 0.35  # four outputs stand close together: it takes more answers than forty
    assert found["careful"] <= 0.02
    assert max(found["average"], found["lenient"]) <= 0.05
    kinds = dict[str, set[str]]()
    for seed in range(5):
        names, reports = group([raters.position_biased, raters.length_lover, raters.straight_liner], seed)
        for report in reports:
            kinds.setdefault(names[report.rater], set()).update(concern.kind for concern in report.concerns)
    assert "side" in kinds["position_biased"]
    assert "length" in kinds["length_lover"]
    assert "ties" in kinds["straight_liner"]


def test_who_drifts_is_caught_by_their_last_week() -> None:
    """They agree less than others by then, too; the drift tells why."""
    kinds: dict[str, list[str]] = {}
    for seed in range(8):
        names, reports = group([raters.drifting], seed, each=120)
        for report in reports:
            kinds.setdefault(names.pop(report.rater), []).extend(concern.kind for concern in report.concerns)
    assert kinds["drifting"].count("agreement") == 8
    assert kinds["drifting"].count("drift") >= 4
    assert "drift" not in kinds["careful"] + kinds["average"] + kinds["lenient"]


@pytest.mark.parametrize("times", [0.5, 1.0, 2.0])
def test_known_parameters_lie_within_their_intervals(times: float) -> None:
    """Raters who tie nothing, at three levels of noise. How often two agree is known in closed form from the outputs'
    worth; which output is shown first and which is longer plays no part, so both rates are a half."""

    def sure(name: str, **others: Any) -> RaterProfile:
        return replace(raters.average(name, **others), tie_threshold=0.0)

    within, seen = Counter[str](), Counter[str]()
    level = times * noise()
    profile = sure("x", group="team", weights={"quality": 1.0}, noise=level)
    for seed in range(GROUPS):
        count = RATERS * ANSWERS // OVERLAP
        asked = [(Prompt(messages=(), about=About(id=str(n))), responses(n, seed)) for n in range(count)]
        utility = noiseless_utilities([SimulatedRater(profile, 0, features)] * 2, asked)
        truth = {
            "agreement": pair_agreement(utility, level, lapse=profile.lapse),
            "first_shown_rate": 0.5,
            "longer_rate": 0.5,
        }
        for report in reports_of([sure] * RATERS, seed, noise=level):
            for name, true in truth.items():
                figure = getattr(report, name)
                assert isinstance(figure, Estimate)
                seen[name] += 1
                within[name] += figure.ci95.low <= true <= figure.ci95.high
    for name, count in seen.items():  # of 300 intervals of 95 %, not all of them independent
        assert 0.92 <= within[name] / count <= 0.985, name


# --- from the store -------------------------------------------------------------------------------------------------


def test_the_dashboard_reads_the_store(store: Store, service: LabelService, make: Make, clock: Clock) -> None:
    open_accounts(store)
    make.raters(service, "ann", "bob")
    lead = LeadService(store, clock=clock)
    lead.create_study(make.study("ranking", overlap=2), actor=LEAD, gold_share=0.5)
    know_secrets(store)
    lead.import_items("study", make.items(8), actor=LEAD)
    gold = GoldItem(item=make.item("gold"), expected=RankingAnswer((("C",), ("A",), ("B",))))
    lead.add_gold("study", [gold], actor=LEAD)
    desk = Desk(store, clock=clock)
    alike: dict[str, object] = {f"key-{index}": [[1], [0], [2]] for index in range(8)}
    work(desk, "ann", "study", alike | {"gold": [[2], [0], [1]]}, seconds=50.0, clock=clock)
    view = desk.next_task("bob", "study")
    assert view is not None
    desk.skip("bob", view.task.id, "unclear")
    work(desk, "bob", "study", alike | {"gold": [[1], [0], [2]], "key-3": [[1], [2], [0]]}, seconds=70.0, clock=clock)
    ann, bob = Dashboard(store, clock=clock).raters("study")
    assert (ann.rater, ann.answers, bob.rater) == ("ann", 9, "bob")
    # bob's gold answer is the reverse, whatever order it was shown in.
    assert (value(ann.gold), value(bob.gold)) == (1.0, 0.0)
    assert value(ann.seconds_median) == pytest.approx(50.0, abs=1e-9)
    assert value(bob.skip_rate) == pytest.approx(1 / (1 + bob.answers), abs=1e-9)
    report = Dashboard(store, clock=clock).study("study")
    assert (report.kind, report.raters, report.answers) == ("ranking", 2, ann.answers + bob.answers)
    # One pair of the shared items' three is ordered otherwise on key-3, if bob did not skip that one.
    shared = bob.answers - 1
    assert isinstance(report.agreement.ties_excluded, Estimate)
    assert report.agreement.ties_excluded.value in (pytest.approx(1.0), pytest.approx(1 - 1 / (3 * shared)))
    assert value(report.gold) == pytest.approx(0.5, abs=1e-9)
    assert isinstance(report.quality_alpha, Undefined)
