"""Simulated raters: the formula's probabilities, its invariances, and profiles that do what their names say."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tastemaker import raters
from tastemaker.errors import ConfigError
from tastemaker.raters import RaterProfile, SimulatedRater, calibrate_noise, pair_agreement, weak_order
from tastemaker.records import About, Message, Prompt, Response, WeakOrder
from tastemaker.store.tasks import FLAGS, DemonstrationAnswer, OutputRating, PrivatePrompt

PROMPTS = 4000
WEIGHTS = {"quality": 1.0}


def prompt(index: int) -> Prompt:
    return Prompt(messages=(Message("user", "What is it?"),), about=About(id=f"prompt-{index}"))


def worth(value: float, words: int = 1) -> Response:
    """A response whose quality is its first word."""
    return Response(text=" ".join([repr(value)] + ["word"] * (words - 1)))


def quality(prompt: Prompt, response: Response) -> Mapping[str, float]:
    return {"quality": float(response.text.split()[0])}


def rater(noise: float = 1.0, seed: int = 5, **fields: object) -> SimulatedRater:
    profile = RaterProfile(name="ann", group="team", weights=WEIGHTS, noise=noise)
    return SimulatedRater(replace(profile, **fields), seed, quality)  # type: ignore[arg-type]


def share(successes: float, n: int = PROMPTS) -> tuple[float, float]:
    """A share and five of its standard errors, at their largest."""
    return successes / n, 5 * 0.5 / math.sqrt(n)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("utility", "threshold", "order"),
    [
        ([0.0, 3.0, 1.0], 0.0, ((1,), (2,), (0,))),
        ([-1.0, -3.0, -2.0], 0.0, ((0,), (2,), (1,))),
        ([1.0, 1.0, 2.0], 0.0, ((2,), (0, 1))),
        ([0.0, 0.4, 2.0, 0.8], 0.5, ((2,), (0, 1, 3))),  # neighbours within 0.5 chain: 0 and 0.8 tie through 0.4
        ([0.0, 0.75, 2.0, 1.5], 0.5, ((2, 3), (1,), (0,))),
        ([5.0, -5.0], math.inf, ((0, 1),)),
        ([1.5], 0.0, ((0,),)),
    ],
)
def test_weak_orders(utility: list[float], threshold: float, order: WeakOrder) -> None:
    assert weak_order(utility, tie_threshold=threshold) == order


@pytest.mark.parametrize(
    ("gap", "noise", "lapse"), [(1.0, 1.0, 0.0), (-0.7, 0.5, 0.0), (2.0, 1.3, 0.3), (0.4, 0.4, 1.0), (0.0, 1.0, 0.0)]
)
def test_preferences_follow_the_formula(gap: float, noise: float, lapse: float) -> None:
    """P(A over B) = (1 - lapse) sigmoid(gap / noise) + lapse / 2."""
    ann = rater(noise, lapse=lapse)
    # A further word keeps the texts apart where the gap is nought.
    first, second = worth(3.0 + gap, 2), worth(3.0)
    wins, margin = share(sum(ann.compare(prompt(index), first, second) for index in range(PROMPTS)))
    assert wins == pytest.approx((1 - lapse) * sigmoid(gap / noise) + lapse / 2, abs=margin)


def test_ties_follow_the_threshold() -> None:
    """Gap 0.8, noise 1, threshold 0.5: A wins if 0.8 + L > 0.5, B if 0.8 + L < -0.5, for logistic L."""
    ann = rater(tie_threshold=0.5)
    counts = Counter(ann.compare(prompt(index), worth(1.8), worth(1.0)) for index in range(PROMPTS))
    for preference, expected in ((1.0, sigmoid(0.3)), (0.0, sigmoid(-1.3)), (0.5, 1 - sigmoid(0.3) - sigmoid(-1.3))):
        found, margin = share(counts[preference])
        assert found == pytest.approx(expected, abs=margin)


def test_noise_is_gumbel() -> None:
    """Mean 0.5772 and variance pi^2 / 6, times the noise (squared); seen through one cut after the other."""
    cuts = (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0)
    ann = rater(1.5, likert_cuts=cuts)
    likert = Counter(ann.rate(prompt(index), worth(0.0)).likert for index in range(PROMPTS))
    for place, cut in enumerate(cuts):
        below, margin = share(sum(likert[point] for point in range(1, place + 2)))
        assert below == pytest.approx(math.exp(-math.exp(-cut / 1.5)), abs=margin)


@pytest.mark.parametrize(("bias", "noise"), [(1.0, 1.0), (-0.8, 0.5)])
def test_position_bias_prefers_what_is_shown_first(bias: float, noise: float) -> None:
    ann = rater(noise, position_bias=bias)
    wins = sum(ann.compare(prompt(index), worth(1.0), worth(1.0, 2)) for index in range(PROMPTS))
    swapped = sum(ann.compare(prompt(index), worth(1.0, 2), worth(1.0)) for index in range(PROMPTS))
    for first_wins in (wins, swapped):
        found, margin = share(first_wins)
        assert found == pytest.approx(sigmoid(bias / noise), abs=margin)


def test_position_bias_runs_evenly_from_first_to_last() -> None:
    """Without noise, places of five outputs are worth +b/2, +b/4, 0, -b/4, -b/2: 0.9 = 3.6 / 4 a step."""
    ann = rater(0.0, position_bias=3.6)
    order = ann.rank(prompt(0), [worth(value, words) for words, value in enumerate((0.0, 0.88, 1.83, 2.69, 3.64), 1)])
    assert order == ((4,), (2,), (0,), (3,), (1,))


@pytest.mark.parametrize("bias", [1.5, -1.0])
def test_length_bias_is_on_the_log_ratio(bias: float) -> None:
    """11 words against 5: log((1 + 11) / (1 + 5)) = log 2."""
    ann = rater(length_bias=bias)
    wins, margin = share(sum(ann.compare(prompt(i), worth(1.0, 11), worth(1.0, 5)) for i in range(PROMPTS)))
    assert wins == pytest.approx(sigmoid(bias * math.log(2)), abs=margin)


@pytest.mark.parametrize(
    ("value", "likert"), [(-9.0, 1), (-2.5, 1), (-2.4, 2), (-0.5, 3), (0.0, 4), (0.5, 4), (0.6, 5), (2.6, 7), (9.0, 7)]
)
def test_likert_cuts(value: float, likert: int) -> None:
    assert rater(0.0, position_bias=50.0).rate(prompt(0), worth(value)) == OutputRating(likert)


def test_flags_are_the_truth_seen_dimly() -> None:
    true = frozenset(("hallucination", "violent_content"))
    ann = replace(rater(sensitivity=0.7, specificity=0.9), latent_flags=lambda prompt, response: true)
    counts: Counter[str] = Counter()
    for index in range(PROMPTS):
        counts.update(ann.rate(prompt(index), worth(0.0)).flags)
    for flag in FLAGS:
        found, margin = share(counts[flag])
        assert found == pytest.approx(0.7 if flag in true else 0.1, abs=margin)


def test_without_a_truth_no_flags_are_set() -> None:
    assert all(rater(specificity=0.0).rate(prompt(index), worth(0.0)).flags == () for index in range(5))


def test_seconds_by_words() -> None:
    """8 words read of the prompt and outputs, 4 written: 8 / 4 + 4 * 1.5 = 8 seconds in the middle."""
    private = PrivatePrompt(prompt=prompt(0), responses=(worth(0.0, 2), worth(0.0, 3)))
    written = DemonstrationAnswer("one two three four")
    times = [rater().seconds(replace(private, prompt=prompt(index)), written, study="s") for index in range(PROMPTS)]
    logs = [math.log(each) for each in times]
    # Standard errors: 0.3 / sqrt(4000) = 0.0047, and 0.3 / sqrt(8000) = 0.0034.
    assert statistics.mean(logs) == pytest.approx(math.log(8), abs=0.025)
    assert statistics.stdev(logs) == pytest.approx(0.3, abs=0.017)


def test_weights_are_summed_over_features() -> None:
    """2 * 0.5 - 3 * 0.25 + log(1 + 2) * 0.1 = 0.25 + 0.10986."""
    profile = RaterProfile(name="ann", group="team", weights={"harm": -3.0, "help": 2.0}, noise=1.0, length_bias=0.1)
    ann = SimulatedRater(profile, 0, lambda prompt, response: {"help": 0.5, "harm": 0.25, "unweighed": 99.0})
    assert ann.utility(prompt(0), Response(text="two words")) == pytest.approx(0.3598612289, abs=1e-9)


# --- invariances ----------------------------------------------------------------------------------------------------

OUTPUTS = [worth(value / 3, words) for words, value in enumerate((1, -2, 4, 0, 3), 1)]


@given(seed=st.integers(0, 2**40), order=st.permutations(range(5)), threshold=st.sampled_from([0.0, 0.7]))
@settings(max_examples=50, deadline=None)
def test_what_is_shown_where_does_not_matter(seed: int, order: list[int], threshold: float) -> None:
    ann = rater(seed=seed, tie_threshold=threshold)
    shown = ann.rank(prompt(1), [OUTPUTS[index] for index in order])
    queued = {frozenset(order[place] for place in group) for group in shown}
    assert queued == {frozenset(group) for group in ann.rank(prompt(1), OUTPUTS)}


@given(seed=st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_pairs_agree_with_the_ranking_they_come_from(seed: int) -> None:
    ann = rater(seed=seed)
    place = {index: rank for rank, group in enumerate(ann.rank(prompt(2), OUTPUTS)) for index in group}
    for a, b in combinations(range(5), 2):
        assert ann.compare(prompt(2), OUTPUTS[a], OUTPUTS[b]) == float(place[a] < place[b])


def test_the_same_text_ties_with_itself() -> None:
    ann = rater(noise=2.0)
    assert ann.rank(prompt(0), [OUTPUTS[0], OUTPUTS[1], OUTPUTS[0]]) in (((0, 2), (1,)), ((1,), (0, 2)))


def test_everything_named_changes_the_draw() -> None:
    def orders(ann: SimulatedRater, first_prompt: int = 0, study: str = "one") -> list[WeakOrder]:
        return [ann.rank(prompt(first_prompt + index), OUTPUTS, study=study) for index in range(20)]

    ann = rater()
    different = [
        orders(ann),
        orders(ann, first_prompt=1),
        orders(ann, study="two"),
        orders(rater(seed=6)),
        orders(rater(name="bob")),
    ]
    assert orders(rater()) == different[0]
    for one, other in combinations(different, 2):
        assert one != other


def test_parts_of_a_seed_do_not_run_together() -> None:
    one = rater(name="ann", seed=1)
    assert one.rank(prompt(0), OUTPUTS, study="1:a") != rater(name="a:ann", seed=1).rank(prompt(0), OUTPUTS, study="1")


def test_a_lapse_is_a_uniform_order_whatever_the_quality() -> None:
    ann = rater(lapse=1.0)
    orders = Counter(ann.rank(prompt(index), OUTPUTS[:3]) for index in range(PROMPTS))
    assert set(orders) == {tuple((index,) for index in order) for order in permutations(range(3))}
    for count in orders.values():
        found, margin = share(count)
        assert found == pytest.approx(1 / 6, abs=margin)
    likert = Counter(ann.rate(prompt(index), worth(9.0)).likert for index in range(PROMPTS))
    assert sorted(likert) == list(range(1, 8))
    for count in likert.values():
        found, margin = share(count)
        assert found == pytest.approx(1 / 7, abs=margin)


def test_demonstrations_are_written_from_a_seed_of_their_own() -> None:
    ann = replace(rater(), write=lambda prompt, seed: f"{prompt.key} {seed}")
    texts = {ann.demonstrate(prompt(index), study=study) for index in range(3) for study in ("one", "two")}
    assert len(texts) == 6
    assert ann.demonstrate(prompt(0), study="one") in texts
    assert all(0 <= int(text.split()[1]) < 2**63 for text in texts)


def test_draws_are_the_same_for_ever() -> None:
    """Published results name a seed."""
    ann = replace(rater(seed=7), write=lambda prompt, seed: str(seed))
    assert [ann.rank(prompt(index), OUTPUTS, study="golden") for index in range(3)] == GOLDEN_ORDERS
    assert ann.demonstrate(prompt(0), study="golden") == GOLDEN_SEED


# --- agreement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("utility", "noise", "tie_threshold", "lapse", "agreement"),
    [
        # sigmoid(1) = .7310586; .7310586^2 + .2689414^2
        ([[1.0, 0.0], [1.0, 0.0]], 1.0, 0.0, 0.0, 0.6067761335),
        # sigmoid(2) = .8807971, sigmoid(-1) = .2689414: .8807971 * .2689414 + .1192029 * .7310586
        ([[1.0, 0.0], [0.0, 0.5]], 0.5, 0.0, 0.0, 0.3240271368),
        # sigmoid(.5) = .6224593 and sigmoid(-1.5) = .1824255: (.6224593^2 + .1824255^2) / (.6224593 + .1824255)^2
        ([[1.0, 0.0], [1.0, 0.0]], 1.0, 0.5, 0.0, 0.6494426574),
        # lapse .2: .8 * .7310586 + .1 = .6848469; .6848469^2 + .3151531^2
        ([[1.0, 0.0], [1.0, 0.0]], 1.0, 0.0, 0.2, 0.5683367254),
        # three raters, two of whom lean one way and one the other by as much: (.6067761 + 2 * .3932239) / 3
        ([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], 1.0, 0.0, 0.0, 0.4644079555),
    ],
)
def test_pair_agreement(
    utility: list[list[float]], noise: float, tie_threshold: float, lapse: float, agreement: float
) -> None:
    found = pair_agreement([np.array(utility)], noise, tie_threshold=tie_threshold, lapse=lapse)
    assert found == pytest.approx(agreement, abs=1e-9)


def test_pair_agreement_is_pooled_over_prompts() -> None:
    """One pair of gap 1 and, from three outputs, pairs of gaps 0, 1 and 1: (3 * .6067761 + .5) / 4."""
    utility = [np.array([[1.0, 0.0]] * 2), np.array([[0.0, 0.0, 1.0]] * 2)]
    assert pair_agreement(utility, 1.0) == pytest.approx((3 * 0.6067761335 + 0.5) / 4, abs=1e-9)


@pytest.mark.parametrize("target", [0.60, 0.73, 0.80])
def test_calibration_is_recovered_on_fresh_draws(target: float) -> None:
    """Six raters of different tastes rank four outputs a prompt, with ties and lapses; count how often two agree."""
    count, outputs, ties, lapse = 6, 4, 0.1, 0.02
    rng = np.random.default_rng(11)
    items = [
        (prompt(index), [worth(float(value), words) for words, value in enumerate(rng.normal(size=outputs), 1)])
        for index in range(1200)
    ]
    profiles = raters.population(WEIGHTS, group="team", count=count, noise=1.0, seed=3)
    team = [SimulatedRater(replace(each, tie_threshold=ties, lapse=lapse), 17, quality) for each in profiles]
    utility = raters.noiseless_utilities(team, items[:400])
    noise = calibrate_noise(utility, target=target, tie_threshold=ties, lapse=lapse)
    team = [replace(each, profile=replace(each.profile, noise=noise)) for each in team]
    agree = both = 0
    for each_prompt, responses in items[400:]:
        signs = []
        for each in team:
            order = each.rank(each_prompt, responses)
            place = {index: rank for rank, group in enumerate(order) for index in group}
            signs.append([np.sign(place[a] - place[b]) for a, b in combinations(range(outputs), 2)])
        for one, other in combinations(np.array(signs), 2):
            agree += int(((one == other) & (one != 0)).sum())
            both += int(((one != 0) & (other != 0)).sum())
    assert both > 40_000
    assert agree / both == pytest.approx(target, abs=0.01)


@pytest.mark.parametrize(
    ("utility", "target", "message"),
    [
        ([[[1.0, 0.0], [1.0, 0.0]]], 0.5, "must lie between 0.5"),
        ([[[1.0, 0.0], [1.0, 0.0]]], 1.0, "must lie between 0.5"),
        ([[[1.0, 0.0], [0.0, 1.0]]], 0.7, "agree on 0.000 of pairs even without noise"),
        ([[[1.0, 1.0], [2.0, 2.0]]], 0.7, "equally good"),
        ([[[1.0], [2.0]]], 0.7, "no prompt has two outputs"),
        ([[[1.0, 2.0]]], 0.7, "same two or more raters"),
        ([[[1.0, 2.0]] * 2, [[1.0, 2.0]] * 3], 0.7, "same two or more raters"),
        ([], 0.7, "same two or more raters"),
    ],
)
def test_what_cannot_be_calibrated(utility: list[list[list[float]]], target: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate_noise([np.array(values) for values in utility], target=target)


# --- profiles -------------------------------------------------------------------------------------------------------


def seen(make: object, gap: float, words: int = 1) -> Counter[float]:
    """How a profile compares, over many prompts, a first output that is better by `gap` and has this many words."""
    profile = make("ann", group="team", weights=WEIGHTS, noise=1.0)  # type: ignore[operator]
    ann = SimulatedRater(profile, 5, quality)
    return Counter(ann.compare(prompt(index), worth(gap, words), worth(0.0)) for index in range(2000))


def right(counts: Counter[float]) -> float:
    """The share of untied pairs won by the first."""
    return counts[1.0] / (counts[0.0] + counts[1.0])


def test_careful_raters_err_less_and_adversaries_err_on_purpose() -> None:
    careful, average = seen(raters.careful, 1.0), seen(raters.average, 1.0)
    random, adversary = seen(raters.random_clicker, 1.0), seen(raters.adversary, 1.0)
    assert right(careful) > right(average) + 0.05 > right(random) + 0.1
    assert right(random) == pytest.approx(0.5, abs=0.06)
    # As often wrong as the careful are right.
    assert right(adversary) == pytest.approx(1 - right(careful), abs=0.05)
    assert careful[0.5] > 0
    assert random[0.5] == 0


def test_biased_raters_prefer_by_position_and_by_length() -> None:
    assert right(seen(raters.position_biased, 0.0, words=2)) == pytest.approx(0.9, abs=0.03)
    # (1 + 3) / (1 + 1) words: twice as long.
    assert right(seen(raters.length_lover, 0.0, words=3)) == pytest.approx(0.8, abs=0.03)
    assert right(seen(raters.average, 0.0, words=3)) == pytest.approx(0.5, abs=0.06)


def test_who_drifts_looks_at_less_and_less() -> None:
    """Of 2,000 tasks each, at random 2 % of the first, 2 % + 100 * 0.005 of the hundred and first, in the end all."""
    profile = raters.drifting("ann", group="team", weights=WEIGHTS, noise=1e-6)
    ann = SimulatedRater(profile, 5, quality)
    for place, expected in ((0, 0.99), (100, 0.74), (400, 0.5)):
        chosen = Counter(ann.compare(prompt(index), worth(1.0), worth(0.0), place=place) for index in range(2000))
        assert right(chosen) == pytest.approx(expected, abs=0.05)
        orders = Counter(ann.rank(prompt(index), (worth(1.0), worth(0.0)), place=place) for index in range(2000))
        assert orders[(0,), (1,)] == chosen[1.0]
    points = {
        place: {ann.rate(prompt(index), worth(9.0), place=place).likert for index in range(50)} for place in (0, 400)
    }
    assert len(points[400]) == 7 > 2 >= len(points[0])


def test_a_minority_cares_for_other_things() -> None:
    weights = {"help": 2.0, "harm": -3.0, "style": 0.5}
    profile = raters.minority("ann", group="team", weights=weights, noise=1.0)
    assert profile.weights == {"help": 2.0, "harm": -0.5, "style": 3.0}
    assert replace(profile, weights=weights) == raters.average("ann", group="team", weights=weights, noise=1.0)


def test_straight_liners_give_everything_the_same() -> None:
    profile = raters.straight_liner("ann", group="team", weights=WEIGHTS, noise=1.0)
    ann = SimulatedRater(profile, 5, quality, latent_flags=lambda prompt, response: frozenset(FLAGS))
    for index in range(20):
        assert ann.rank(prompt(index), OUTPUTS) == ((0, 1, 2, 3, 4),)
        assert ann.rate(prompt(index), worth(9.0)) == OutputRating(4)


def test_lenient_raters_give_more_points_and_the_same_order() -> None:
    ratings = []
    for make in (raters.average, raters.lenient):
        ann = SimulatedRater(make("ann", group="team", weights=WEIGHTS, noise=0.5), 5, quality)
        ratings.append(statistics.mean(ann.rate(prompt(index), worth(0.0)).likert for index in range(1000)))
    assert 1 < ratings[1] - ratings[0] < 2
    assert seen(raters.lenient, 1.0) == seen(raters.average, 1.0)


def test_a_population_differs_in_taste() -> None:
    weights = {"help": 2.0, "harm": -3.0}
    team = raters.population(weights, group="team", count=400, noise=0.5, seed=1, spread=0.3)
    assert len({each.name for each in team}) == 400
    for feature, weight in weights.items():
        logs = [math.log(each.weights[feature] / weight) for each in team]
        # Standard errors: 0.3 / 20 = 0.015 and 0.3 / sqrt(800) = 0.011.
        assert statistics.mean(logs) == pytest.approx(0.0, abs=0.075)
        assert statistics.stdev(logs) == pytest.approx(0.3, abs=0.055)
    again = raters.population(weights, group="team", count=3, noise=0.5, seed=1)
    assert again == team[:3]
    assert raters.population(weights, group="team", count=3, noise=0.5, seed=2)[0].weights != again[0].weights
    assert raters.population(weights, group="judges", count=3, noise=0.5, seed=1)[0].weights != again[0].weights


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"noise": -1.0}, "noise is -1.0"),
        ({"tie_threshold": -0.1}, "tie_threshold -0.1"),
        ({"lapse": 1.1}, "lapse is 1.1; it is a share"),
        ({"sensitivity": -0.1}, "sensitivity is -0.1"),
        ({"likert_cuts": (1.0, 2.0)}, "give 6 utilities, rising"),
        ({"likert_cuts": (1.0, 2.0, 3.0, 4.0, 6.0, 5.0)}, "give 6 utilities, rising"),
    ],
)
def test_profiles_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rater(**fields)  # type: ignore[arg-type]


def test_raters_say_what_they_lack() -> None:
    with pytest.raises(ConfigError, match="weighs wit, but the features are quality"):
        rater(weights={"quality": 1.0, "wit": 2.0}).rank(prompt(0), OUTPUTS)
    with pytest.raises(ConfigError, match="cannot write demonstrations"):
        rater().demonstrate(prompt(0))


GOLDEN_ORDERS: list[WeakOrder] = [
    ((4,), (0,), (3,), (2,), (1,)),
    ((4,), (0,), (3,), (2,), (1,)),
    ((0,), (2,), (4,), (1,), (3,)),
]
GOLDEN_SEED = "6207936304409196518"
