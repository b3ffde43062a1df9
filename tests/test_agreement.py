"""Agreement between raters: values by hand, other libraries as oracles, invariances, and raters of known error."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import krippendorff
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import fleiss_kappa as statsmodels_fleiss

from tastemaker.agreement import (
    Answers,
    Category,
    GroupAgreement,
    Undefined,
    agreement_between,
    agreement_by_rater,
    agreement_within,
    cohen_kappa,
    comparison_answers,
    fleiss_kappa,
    gwet_ac1,
    krippendorff_alpha,
    leave_one_out_agreement,
    pairwise_answers,
    rank_answers,
    ranking_agreement,
    raw_agreement,
    table_answers,
)
from tastemaker.errors import DataError
from tastemaker.intervals import Estimate, wilson
from tastemaker.records import About, Author, Message, Prompt, Ranking, Response, WeakOrder

# Krippendorff's own example (2011): 12 units, four raters, answers missing.
ROWS = ("11_1", "2232", "3333", "3333", "2222", "1234", "4444", "1121", "2222", "_555", "__11", "__3_")
KRIPPENDORFF = [[None if value == "_" else int(value) for value in row] for row in ROWS]

tables = st.integers(2, 5).flatmap(
    lambda raters: st.lists(
        st.lists(st.one_of(st.none(), st.integers(1, 4)), min_size=raters, max_size=raters), min_size=2, max_size=12
    )
)


def known(estimate: Estimate | Undefined) -> Estimate:
    assert isinstance(estimate, Estimate), estimate
    return estimate


def ranking(rater: str | None, order: WeakOrder, texts: str = "abc", prompt: str = "p") -> Ranking:
    return Ranking(
        prompt=Prompt(messages=(Message("user", "?"),), about=About(id=prompt)),
        responses=tuple(Response(text=text) for text in texts),
        order=order,
        author=Author(rater=rater),
    )


def counts(table: Sequence[Sequence[Category | None]]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return table_answers(table).count_UQ


# --------------------------------------------------------------------------------------------------- reading answers


def test_rankings_become_pairs_whatever_order_the_responses_were_stored_in() -> None:
    # r: c first, a and b tied. s, shown the responses as b, c, a: b first, then c, then a.
    answers = pairwise_answers([ranking("r", ((2,), (0, 1))), ranking("s", ((0,), (1,), (2,)), texts="bca")])
    assert answers.categories == (-1, 0, 1)
    assert answers.raters == ("r", "s")
    # Units a-b, a-c, b-c. r says tied, lost, lost; s says lost, lost, won.
    assert answers.count_UQ.tolist() == [[1, 1, 0], [2, 0, 0], [1, 0, 1]]
    assert answers.clusters == ("p", "p", "p")


def test_different_prompts_and_response_sets_do_not_mix() -> None:
    rows = [ranking("r", ((0,), (1,)), "ab"), ranking("s", ((0,), (1,)), "ac"), ranking("t", ((0,), (1,)), "ab", "q")]
    assert len(pairwise_answers(rows).clusters) == 3
    agreement = ranking_agreement(rows)
    assert isinstance(agreement.tie_is_half, Undefined)
    assert "none of the 3 units" in agreement.tie_is_half.reason


def test_identical_texts_are_not_compared_and_the_last_ranking_of_a_rater_counts() -> None:
    rows = [ranking("r", ((0,), (1,), (2,)), "aab"), ranking("r", ((2,), (1,), (0,)), "aab")]
    answers = pairwise_answers(rows)
    assert answers.count_UQ.tolist() == [[1, 0, 0], [1, 0, 0]]  # both a against b, lost
    assert isinstance(raw_agreement(answers), Undefined)  # a rater does not agree with himself


def test_tied_responses_share_their_mean_rank() -> None:
    answers = rank_answers([ranking("r", ((2,), (0, 1))), ranking("s", ((0,), (1,), (2,)))])
    # r: a 1.5, b 1.5, c 0. s: a 0, b 1, c 2.
    assert answers.categories == (0, 1, 1.5, 2)
    assert answers.count_UQ.tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]]


def test_named_categories_keep_their_order() -> None:
    answers = table_answers([["low", "high"], ["low", None]], categories=["low", "middle", "high"])
    assert answers.count_UQ.tolist() == [[1, 0, 1], [1, 0, 0]]


# ------------------------------------------------------------------------------------------------------ raw agreement


def test_ties_are_counted_three_ways() -> None:
    # Pairs a-b, a-c, b-c. r: won, won, tied. s: won, lost, tied. t: tied, won, won.
    rows = [
        ranking("r", ((0,), (1, 2))),
        ranking("s", ((1, 2), (0,)), prompt="q"),
        ranking("t", ((0,), (1,), (2,)), prompt="q"),
        ranking("s", ((0,), (2,), (1,))),
        ranking("t", ((0, 1), (2,))),
    ]
    # Prompt p: r won won tied; s won won lost; t tied won won.
    #   a-b: rs agree, rt half, st half; a-c: all agree; b-c: rs half, rt half, st oppose.
    # Prompt q: s lost lost tied; t won won won: a-b and a-c oppose, b-c half.
    result = ranking_agreement(rows)
    # Ties excluded: a-b rs; a-c three; b-c st against; q two against: 4 of 7.
    assert known(result.ties_excluded).value == pytest.approx(4 / 7, abs=1e-12)
    assert known(result.ties_excluded).n == 7
    # A tie as a class: 4 of the 12 rater pairs. As half: 4 + (2 + 2 + 1) / 2 of 12.
    assert known(result.tie_is_a_class).value == pytest.approx(4 / 12, abs=1e-12)
    assert known(result.tie_is_half).value == pytest.approx(6.5 / 12, abs=1e-12)
    assert known(result.tie_is_half).n == 12


def test_two_ties_agree_wholly_and_never_count_as_decided() -> None:
    result = ranking_agreement([ranking("r", ((0, 1),), "ab"), ranking("s", ((0, 1),), "ab")])
    assert isinstance(result.ties_excluded, Undefined)
    assert known(result.tie_is_a_class).value == 1
    assert known(result.tie_is_half).value == 1


def test_leave_one_out_by_hand() -> None:
    # x x y: each x faces one x and one y (half), y faces two x (0): 1 of 3. x x: 1, 1. y alone: not counted.
    answers = table_answers([["x", "x", "y"], ["x", "x", None], [None, None, "y"]])
    whole = known(leave_one_out_agreement(answers))
    assert whole.value == pytest.approx((0.5 + 0.5 + 0 + 1 + 1) / 5, abs=1e-12)
    assert whole.n == 5
    by_rater = agreement_by_rater(answers)
    assert [known(by_rater[name]).value for name in "012"] == pytest.approx([0.75, 0.75, 0], abs=1e-12)


def test_a_rater_without_company_has_no_agreement() -> None:
    by_rater = agreement_by_rater(table_answers([["x", "x", None], [None, None, "x"]], raters=["r", "s", "alone"]))
    assert known(by_rater["r"]).value == 1
    assert isinstance(by_rater["alone"], Undefined)


# --------------------------------------------------------------------------------------- agreement beyond chance


def test_alpha_of_krippendorffs_example() -> None:
    answers = table_answers(KRIPPENDORFF)
    # Published: 0.743 nominal, 0.815 ordinal.
    assert known(krippendorff_alpha(answers)).value == pytest.approx(0.743421, abs=5e-7)
    assert known(krippendorff_alpha(answers, "ordinal")).value == pytest.approx(0.815388, abs=5e-7)
    assert known(krippendorff_alpha(answers)).n == 11  # the last unit has one answer


@settings(deadline=None)  # a shared machine may be slow
@given(tables)
def test_alpha_is_the_librarys(table: list[list[int | None]]) -> None:
    pairable = [row for row in table if sum(value is not None for value in row) > 1]
    assume(len(pairable) > 1)
    found = {value for row in pairable for value in row if value is not None}
    answers = table_answers(table)
    if len(found) == 1:
        result = krippendorff_alpha(answers)
        assert isinstance(result, Undefined)
        assert "every answer was the same" in result.reason
        return
    reliability = [[np.nan if value is None else value for value in column] for column in zip(*table, strict=True)]
    for level in ("nominal", "ordinal"):
        oracle = krippendorff.alpha(np.array(reliability, dtype=float), level_of_measurement=level)
        estimate = known(krippendorff_alpha(answers, level))
        assert estimate.value == pytest.approx(oracle, abs=1e-9)
        assert -1 <= estimate.ci95.low <= estimate.ci95.high <= 1


@settings(deadline=None)  # a shared machine may be slow
@given(tables, st.permutations([0, 1, 2, 3]), st.randoms(use_true_random=False))
def test_names_of_raters_units_and_nominal_categories_do_not_matter(
    table: list[list[int | None]], rename: list[int], random: object
) -> None:
    columns = list(zip(*table, strict=True))
    random.shuffle(columns)  # type: ignore[attr-defined]
    rows = reversed([*zip(*columns, strict=True)])
    moved = [[None if value is None else rename[value - 1] for value in row] for row in rows]
    measures: list[Callable[[Answers], Estimate | Undefined]] = [
        raw_agreement, leave_one_out_agreement, krippendorff_alpha, fleiss_kappa, gwet_ac1,
    ]  # fmt: skip
    for measure in measures:
        before, after = measure(table_answers(table)), measure(table_answers(moved))
        if isinstance(before, Undefined):
            assert after == before
        else:
            assert known(after).value == pytest.approx(before.value, abs=1e-9)


def test_fleiss_is_statsmodels_where_all_units_have_as_many_answers() -> None:
    rng = np.random.default_rng(1)
    table = rng.integers(1, 4, size=(13, 5)).tolist()
    estimate = known(fleiss_kappa(table_answers(table)))
    assert estimate.value == pytest.approx(statsmodels_fleiss(counts(table)), abs=1e-9)
    table[4][2] = None
    assert known(fleiss_kappa(table_answers(table))).value != estimate.value


@pytest.mark.parametrize("weights", ["none", "linear", "quadratic"])
def test_cohen_is_scikit_learns(weights: str) -> None:
    rng = np.random.default_rng(2)
    first = rng.integers(1, 8, size=53)
    second = np.clip(first + rng.integers(-2, 3, size=53), 1, 7)
    estimate = known(cohen_kappa(first.tolist(), second.tolist(), categories=range(1, 8), weights=weights))  # type: ignore[arg-type]
    oracle = cohen_kappa_score(first, second, weights=None if weights == "none" else weights)
    assert estimate.value == pytest.approx(oracle, abs=1e-9)
    assert estimate.value in estimate.ci95


def test_ac1_keeps_its_senses_where_kappa_falls() -> None:
    # Gwet's paradox, 125 units: both no 118, only the first yes 2, only the second yes 5, both yes 0.
    # Observed 0.944; share of no (120 + 123)... the raters say no 123 and 120 times: 0.972. Kappa expects
    # (123 * 120 + 2 * 5) / 125^2 = 0.94528: (0.944 - 0.94528) / 0.05472 = -0.0233918.
    # AC1 expects 2 * 0.972 * 0.028 = 0.054432: (0.944 - 0.054432) / 0.945568 = 0.9407763.
    first = ["no"] * 118 + ["yes"] * 2 + ["no"] * 5
    second = ["no"] * 118 + ["no"] * 2 + ["yes"] * 5
    assert known(cohen_kappa(first, second)).value == pytest.approx(-0.0233918, abs=1e-6)
    estimate = known(gwet_ac1(table_answers(list(zip(first, second, strict=True)))))
    assert estimate.value == pytest.approx(0.9407763, abs=1e-6)
    assert 0.85 < estimate.ci95.low < 0.94 < estimate.ci95.high < 1


def test_unanimous_answers_have_no_alpha_but_have_ac1() -> None:
    answers = table_answers([["no", "no"]] * 20, categories=["no", "yes"])
    for result in (krippendorff_alpha(answers), fleiss_kappa(answers), cohen_kappa(["no"] * 20, ["no"] * 20)):
        assert isinstance(result, Undefined)
        assert "no variation" in result.reason
        assert result.to_json() == {"value": None, "reason": result.reason}
    assert known(raw_agreement(answers)).value == 1
    assert known(gwet_ac1(answers)).value == 1
    unnamed = gwet_ac1(table_answers([["no", "no"]] * 20))
    assert isinstance(unnamed, Undefined)
    assert "name all the categories" in unnamed.reason


def test_perfect_agreement_is_not_certain() -> None:
    answers = table_answers([["x", "x"], ["y", "y"], ["x", "x"]])
    estimate = known(krippendorff_alpha(answers))
    assert estimate.value == 1
    assert estimate.ci95.low == pytest.approx(wilson(3, 3).ci95.low, abs=1e-12)
    assert estimate.ci95.high == 1


def test_one_cluster_gives_no_interval_and_so_no_estimate() -> None:
    result = krippendorff_alpha(table_answers([["x", "y"], ["x", "x"]], clusters=["p", "p"]))
    assert isinstance(result, Undefined)
    assert "one cluster" in result.reason


def test_nothing_at_all_is_undefined() -> None:
    for answers in (table_answers([]), pairwise_answers([]), rank_answers([])):
        assert isinstance(raw_agreement(answers), Undefined)
        assert isinstance(leave_one_out_agreement(answers), Undefined)
        assert isinstance(krippendorff_alpha(answers), Undefined)
        assert isinstance(fleiss_kappa(answers), Undefined)
    assert isinstance(cohen_kappa([], []), Undefined)


# ---------------------------------------------------------------------------------------- raters of known error


def noisy_table(rng: np.random.Generator, prompts: int, pairs: int, raters: int, flips: float) -> list[list[int]]:
    """Binary answers, `pairs` units a prompt, of raters who independently turn the truth over at rate `flips`."""
    truth_U = rng.integers(0, 2, size=prompts * pairs)
    table: list[list[int]] = (truth_U[:, None] ^ (rng.random((len(truth_U), raters)) < flips)).tolist()
    return table


def test_raters_of_known_error_agree_as_computed() -> None:
    # Flips e = 0.164: two raters agree (1-e)^2 + e^2 = 0.7258, alpha (1-2e)^2 = 0.4516; a rater and the majority of
    # three others: the majority is right with (1-e)^3 + 3 e (1-e)^2 = 0.9281, so 0.9281 * 0.836 + 0.0719 * 0.164.
    answers = table_answers(noisy_table(np.random.default_rng(0), 4000, 1, 4, 0.164))
    assert known(raw_agreement(answers)).value == pytest.approx(0.7258, abs=0.01)
    assert known(krippendorff_alpha(answers)).value == pytest.approx(0.4516, abs=0.02)
    assert known(leave_one_out_agreement(answers)).value == pytest.approx(0.7877, abs=0.01)


def test_intervals_of_agreement_cover_the_truth() -> None:
    rng, clusters = np.random.default_rng(3), np.repeat(np.arange(40), 3).tolist()
    alpha = raw = 0
    for _ in range(150):
        answers = table_answers(noisy_table(rng, 40, 3, 3, 0.164), clusters=clusters)
        alpha += 0.45158 in known(krippendorff_alpha(answers)).ci95
        raw += 0.72579 in known(raw_agreement(answers)).ci95
    assert 0.90 <= alpha / 150 <= 0.99
    assert 0.90 <= raw / 150 <= 0.99


def test_units_of_one_prompt_are_not_independent() -> None:
    """Every pair of a prompt shares one rater's mood: clusters must widen the interval."""
    rng = np.random.default_rng(5)
    prompts = np.repeat(np.arange(60), 5)
    agree_U = (rng.random(60) < 0.7)[prompts]
    table = [[0, 0 if agree else 1] if unit % 2 else [1, 1 if agree else 0] for unit, agree in enumerate(agree_U)]
    as_rows = known(krippendorff_alpha(table_answers(table)))
    clustered = known(krippendorff_alpha(table_answers(table, clusters=prompts.tolist())))
    assert clustered.value == pytest.approx(as_rows.value, abs=1e-12)
    assert clustered.ci95.width > 1.7 * as_rows.ci95.width


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pairwise_answers([ranking(None, ((0,), (1,), (2,)))]), "names no rater"),
        (lambda: rank_answers([ranking("r", ((0,), (1,)), "ab"), ranking("r", ((0,), (1,), (2,)))]), "one size a time"),
        (lambda: table_answers([["x"], ["x", "y"]]), "one column each"),
        (lambda: table_answers([["x", "y"]], clusters=["p", "q"]), "2 clusters for 1 units"),
        (lambda: table_answers([["x", "y"]], raters=["r"]), "1 raters for 2 columns"),
        (lambda: table_answers([["x", "z"]], categories=["x", "y"]), "hold z; the categories given are x, y"),
        (lambda: krippendorff_alpha(table_answers(KRIPPENDORFF), "interval"), "'nominal' or 'ordinal'"),  # type: ignore[arg-type]
        (lambda: cohen_kappa(["x"], ["x", "y"]), "1 and 2 units"),
        (lambda: cohen_kappa(["x"], ["y"], weights="cubic"), "'none', 'linear' or 'quadratic'"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_refused_in_words(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


# ------------------------------------------------------------------------------------------- groups against each other


def two_groups() -> Answers:
    """Pairs a-b, a-c, b-c of prompt p, and a-b of q; r and s are a group, t, u and v the other."""
    return pairwise_answers(
        [
            ranking("r", ((0,), (1,), (2,))),  # won won won
            ranking("s", ((0, 1), (2,))),  # tied won won
            ranking("t", ((0,), (2,), (1,))),  # won won lost
            ranking("u", ((0,), (1, 2))),  # won won tied
            ranking("v", ((2,), (0,), (1,))),  # won lost lost
            ranking("r", ((1,), (0,)), "ab", "q"),  # lost
            ranking("t", ((0,), (1,)), "ab", "q"),  # won
        ]
    )


def test_one_group_with_another_by_hand() -> None:
    found = agreement_between(two_groups(), {"r", "s"})
    # a-b: r agrees with t, u, v; s, who ties, with nobody (three halves). a-c: r and s agree with t, u, not with v.
    # b-c: r and s meet lost, tied, lost: one half each. q: r against t.
    assert known(found.pairwise.ties_excluded).value == pytest.approx((3 + 4) / (3 + 6 + 4 + 1), abs=1e-12)
    assert known(found.pairwise.ties_excluded).n == 14
    assert known(found.pairwise.tie_is_a_class).value == pytest.approx(7 / 19, abs=1e-12)
    assert known(found.pairwise.tie_is_half).value == pytest.approx((3 + 1.5 + 4 + 1) / 19, abs=1e-12)
    # The others prefer a over b, a over c, c over b; in q only one was asked. r: yes yes no; s: no word, yes, no.
    assert known(found.majority).value == pytest.approx(3 / 5, abs=1e-12)
    assert known(found.majority).n == 5
    assert (found.raters, found.others, found.alpha) == (2, 3, None)
    # The other way round the pairs are the same; r and s agree among themselves on a-c and on b-c alone.
    back = agreement_between(two_groups(), {"t", "u", "v"})
    assert back.pairwise == found.pairwise
    assert known(back.majority).value == pytest.approx((1 + 1 + 0 + 0 + 0) / 5, abs=1e-12)
    assert (back.raters, back.others) == (3, 2)


def test_a_group_with_itself_by_hand() -> None:
    answers = two_groups()
    found = agreement_within(answers)
    # The others' majority. a-b: won, for all five: r t u v agree. a-c: won, but v, who is against it: 4 of 5.
    # b-c: r's others say won, lost, tied, lost: no majority; s alike; t's won won tied lost, u's won won lost lost and
    # v's won won lost tied: none, as two of four are not more than half.
    assert known(found.majority).value == pytest.approx((4 + 4) / (4 + 5), abs=1e-12)
    assert found.raters == 5
    assert known(found.alpha or Undefined(reason="")).value == known(krippendorff_alpha(answers)).value
    assert known(found.pairwise.tie_is_a_class).value == known(raw_agreement(answers)).value


def test_groups_that_never_met() -> None:
    answers = pairwise_answers([ranking("r", ((0,), (1,), (2,))), ranking("s", ((0,), (1,), (2,)), prompt="q")])
    for found in (agreement_between(answers, {"r"}), agreement_within(answers), agreement_within(pairwise_answers([]))):
        assert found.raters == 0
        assert isinstance(found.pairwise.ties_excluded, Undefined)
        assert isinstance(found.majority, Undefined)


def test_who_met_nobody_is_not_counted() -> None:
    answers = pairwise_answers([*(ranking(who, ((0,), (1,), (2,))) for who in "rst"), ranking("x", ((0,), (1,)), "de")])
    assert agreement_within(answers).raters == 3
    found = agreement_between(answers, {"r", "x"})
    assert (found.raters, found.others) == (1, 2)
    assert agreement_between(answers, {"r"}).others == 2, "x is none of them"
    assert json.loads(json.dumps(found.to_json()))["other_raters"] == 2


def test_comparisons_become_answers() -> None:
    rows = [("x", "p", "r", 1.0), ("y", "q", "r", 0.5), ("x", "p", "s", 0.0), ("x", "p", "r", 0.5)]
    answers = comparison_answers(rows)
    assert answers.clusters == ("p", "q")
    assert answers.count_UQ.tolist() == [[1, 1, 0], [0, 1, 0]], "the last of r's two answers counts"


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from("rstuv"), st.sampled_from([0.0, 0.5, 1.0])), max_size=40),
    st.sets(st.sampled_from("rstuv")),
)
def test_the_pairs_of_all_raters_are_those_within_the_groups_and_between_them(
    said: list[tuple[int, str, float]], group: set[str]
) -> None:
    def answers(raters: set[str]) -> Answers:
        return comparison_answers((unit, unit, rater, value) for unit, rater, value in said if rater in raters)

    def half(found: GroupAgreement) -> tuple[float, int]:
        estimate = found.pairwise.tie_is_half
        return (estimate.value * estimate.n, estimate.n) if isinstance(estimate, Estimate) else (0.0, 0)

    everybody = set("rstuv")
    parts = [agreement_within(answers(group)), agreement_within(answers(everybody - group))]
    parts.append(agreement_between(answers(everybody), group))
    agreed, pairs = half(agreement_within(answers(everybody)))
    assert sum(half(part)[0] for part in parts) == pytest.approx(agreed, abs=1e-9)
    assert sum(half(part)[1] for part in parts) == pairs


# ------------------------------------------------------------------------------------- what is easily a little wrong


def test_two_who_both_say_lost_agree_wholly_in_each_way() -> None:
    result = ranking_agreement([ranking("r", ((1,), (0,)), "ab"), ranking("s", ((1,), (0,)), "ab")])
    for found in (result.ties_excluded, result.tie_is_a_class, result.tie_is_half):
        assert known(found).value == 1


def test_two_ties_beside_two_who_decided_earn_nothing() -> None:
    # won lost tied tied: of six pairs of raters one decided twice, and disagreed; that both others tied is none of it.
    orders: list[WeakOrder] = [((0,), (1,)), ((1,), (0,)), ((0, 1),), ((0, 1),)]
    result = ranking_agreement([ranking(who, order, "ab") for who, order in zip("rstu", orders, strict=True)])
    assert known(result.ties_excluded).value == 0
    assert known(result.ties_excluded).n == 1


def test_ones_own_answer_is_none_of_the_others() -> None:
    # r won; s and t lost. r's others lost: r is against them. s has won and lost before them, so no majority; so has t.
    answers = comparison_answers([("x", "p", "r", 1.0), ("x", "p", "s", 0.0), ("x", "p", "t", 0.0)])
    assert answers.count_UQ.tolist() == [[2, 0, 1]]
    found = known(agreement_within(answers).majority)
    assert (found.value, found.n) == (0, 1)


def test_two_raters_are_enough_to_be_counted() -> None:
    answers = comparison_answers([("x", "p", "r", 1.0), ("x", "p", "s", 0.0)])
    assert agreement_within(answers).raters == 2
    between = agreement_between(answers, {"r"})
    assert (between.raters, between.others) == (1, 1)


def test_a_row_of_the_table_holds_every_figure_by_its_name() -> None:
    def figures(group: GroupAgreement) -> dict[str, object]:
        row: dict[str, object] = {
            "ties_excluded": group.pairwise.ties_excluded.to_json(),
            "tie_is_a_class": group.pairwise.tie_is_a_class.to_json(),
            "tie_is_half": group.pairwise.tie_is_half.to_json(),
            "majority": group.majority.to_json(),
            "raters": group.raters,
        }
        assert len({json.dumps(figure) for figure in row.values()}) == len(row), "no two are alike"
        return row

    within, between = agreement_within(two_groups()), agreement_between(two_groups(), {"r", "s"})
    assert isinstance(within.alpha, Estimate)
    assert within.to_json() == figures(within) | {"alpha": within.alpha.to_json()}
    assert between.to_json() == figures(between) | {"other_raters": 3}


def test_categories_found_are_in_order_numbers_before_words() -> None:
    assert table_answers([[2, "b"], ["a", 1.5]]).categories == (1.5, 2, "a", "b")


def test_a_table_without_rows_has_no_raters_and_takes_none() -> None:
    for answers in (table_answers([]), table_answers([], raters=[])):
        assert answers.raters == ()
        assert {array.dtype for array in (answers.unit_N, answers.rater_N, answers.category_N)} == {np.dtype(np.int64)}


def test_ac1_of_three_categories_by_hand() -> None:
    # Shares 3/8, 3/8, 2/8: by chance (15 + 15 + 12) / 64 / 2 = 21/64. Observed 3/4: (48 - 21) / (64 - 21).
    answers = table_answers([["a", "a"], ["b", "b"], ["a", "b"], ["c", "c"]])
    assert known(gwet_ac1(answers)).value == pytest.approx(27 / 43, abs=1e-12)


def test_weights_go_by_the_order_of_the_categories_that_are_named() -> None:
    first, second = ["low", "high", "middle", "low"], ["middle", "high", "low", "high"]
    # In that order the gaps are 1, 0, 1, 2: mean 1. By chance: low 1/2, middle 1/4, high 1/4 against 1/4, 1/4, 1/2:
    # 1/2 (1/4 + 2/2) + 1/4 (1/4 + 1/2) + 1/4 (2/4 + 1/4) = 5/8 + 3/16 + 3/16 = 1, so kappa is 0.
    named = cohen_kappa(first, second, categories=["low", "middle", "high"], weights="linear")
    assert known(named).value == pytest.approx(0, abs=1e-12)
    assert known(cohen_kappa(first, second, weights="linear")).value != pytest.approx(0, abs=0.05)


def test_cohens_interval_is_over_clusters() -> None:
    result = cohen_kappa(["x", "y"], ["x", "x"], clusters=["p", "p"])
    assert isinstance(result, Undefined)
    assert "one cluster" in result.reason


def test_resamples_without_variation_may_be_anything() -> None:
    # Of four units one differs. A third of the resamples lack it, and say nothing of agreement beyond chance.
    table = [["x", "x"], ["x", "x"], ["x", "x"], ["x", "y"]]
    for measure in (krippendorff_alpha, fleiss_kappa):
        interval = known(measure(table_answers(table))).ci95
        assert (interval.low, interval.high) == (-1, 1)


def test_every_measure_resamples_by_its_seed_and_by_0_if_none_is_given() -> None:
    table = np.random.default_rng(4).integers(0, 3, size=(31, 2)).tolist()
    first, second = ([row[column] for row in table] for column in (0, 1))
    measures: list[Callable[..., Estimate | Undefined]] = [
        lambda **seed: krippendorff_alpha(table_answers(table), **seed),
        lambda **seed: fleiss_kappa(table_answers(table), **seed),
        lambda **seed: gwet_ac1(table_answers(table), **seed),
        lambda **seed: cohen_kappa(first, second, **seed),
    ]
    for measure in measures:
        plain, zero, one = (known(measure(**seed)).ci95 for seed in ({}, {"seed": 0}, {"seed": 1}))
        assert plain == zero
        assert plain != one


def test_the_coefficients_of_chance_have_intervals_alike() -> None:
    # Two raters and many units: Fleiss' kappa and alpha differ by 1 in the number of answers alone.
    answers = table_answers(noisy_table(np.random.default_rng(6), 307, 1, 2, 0.2))
    alpha, fleiss = known(krippendorff_alpha(answers)).ci95, known(fleiss_kappa(answers)).ci95
    assert fleiss.low == pytest.approx(alpha.low, abs=0.01)
    assert fleiss.high == pytest.approx(alpha.high, abs=0.01)
