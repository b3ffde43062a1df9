"""Evaluation: who judges what, what is a tie, what a claim rests on, and the controls that must turn claims false."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import save_model
from tests.stages.conftest import by_length, demonstration, prompt

from tastemaker.checkpoint import load_policy
from tastemaker.config import from_mapping
from tastemaker.errors import AnswersMissing, ConfigError, DataError
from tastemaker.guidelines import GUIDELINES
from tastemaker.intervals import Estimate, Interval
from tastemaker.packing import pack
from tastemaker.panel import Panel
from tastemaker.raters import RaterProfile, SimulatedRater
from tastemaker.records import Message, Prompt, Response
from tastemaker.responses import DecodingConfig, as_response, sample_rollouts
from tastemaker.stages.evaluation import (
    Check,
    Contestant,
    EvaluationConfig,
    FewShot,
    Field,
    Judged,
    Sampled,
    Tables,
    best_prefix,
    check_rewards,
    judge,
    judge_claims,
    tabulate,
)
from tastemaker.stages.evaluation.contestants import respond, response_logprobs
from tastemaker.stages.evaluation.judging import SAME_TEXT, rate
from tastemaker.stages.evaluation.measures import judges_agreement, plain
from tastemaker.statistics import best_of_n_kl
from tastemaker.store import LabelService

GUIDELINE = GUIDELINES["evaluation"]
PROMPTS = [prompt(f"question {number}") for number in range(61)]
LAWS = [DecodingConfig(greedy=True), DecodingConfig()]


def panel(group: str = "held-out", *, lapse: float = 0.0, noise: float = 0.0, count: int = 5) -> Panel:
    """Raters who like long responses, or (lapse 1) who answer at random."""
    raters = [
        SimulatedRater(
            RaterProfile(name=f"{group} {n}", group=group, weights={"words": 1.0}, noise=noise, lapse=lapse),
            0,
            by_length,
        )
        for n in range(count)
    ]
    return Panel(group=group, address="", simulated=tuple(raters))


def sampled(text: Callable[[int], str]) -> Sampled:
    texts = [text(place) for place in range(len(PROMPTS))]
    return Sampled(
        responses=tuple(Response(text=one) for one in texts),
        num_tokens=tuple(len(one.split()) for one in texts),
        logprob=None,
        kl=None,
    )


LONG, SHORT = sampled(lambda n: f"a long answer {n}"), sampled(lambda n: f"short {n}")


def config(**changes: Any) -> EvaluationConfig:
    whole: dict[str, Any] = {
        "contestants": {"policy": {"model": "m"}, "base": {"model": "n"}},
        "pairs": [["policy", "base"]],
        "decodings": [{}],
        "claims": [
            {
                "id": "1",
                "statement": "The policy is preferred.",
                "checks": [{"measure": "win_rate", "a": "policy", "b": "base", "above": 0.5}],
            }
        ],
    }
    return from_mapping(EvaluationConfig, whole | changes, where="test")


def holds(judged: Sequence[Judged], responses: Any, settings: EvaluationConfig | None = None) -> bool:
    tables = Tables(
        config=settings or config(),
        prompts=PROMPTS,
        responses=responses,
        judged=judged,
        ratings=(),
        held_out_group="held-out",
    )
    (claim,) = judge_claims((settings or config()).claims, tables)
    return bool(claim["holds"])


# --- judging --------------------------------------------------------------------------------------------------------


def test_a_claim_holds_where_the_judges_say_so(service: LabelService) -> None:
    responses = {("policy", "T=1"): LONG, ("base", "T=1"): SHORT}
    judged = judge(service, PROMPTS, responses, config(), panel(), study="s", guideline=GUIDELINE)
    assert [row.preference for row in judged] == [1.0] * 61
    assert {(row.length_a, row.length_b) for row in judged} == {(15, 7), (16, 8)}, "characters: 'short 5', 'short 15'"
    assert holds(judged, responses)


def test_control_the_policy_replaced_by_the_base(service: LabelService) -> None:
    responses = {("policy", "T=1"): SHORT, ("base", "T=1"): SHORT}
    judged = judge(service, PROMPTS, responses, config(), panel(), study="s", guideline=GUIDELINE)
    assert [(row.preference, row.rater) for row in judged] == [(0.5, "same text")] * 61
    assert service.progress("s").slots == 0, "nobody was asked"
    assert not holds(judged, responses)


@pytest.mark.parametrize("judges", [1, 2, 3])
def test_a_tie_counts_as_much_as_what_was_asked(service: LabelService, judges: int) -> None:
    """31 of 61 won, 30 of one text: (31 + 15) / 61, however many judges each comparison has."""
    policy = sampled(lambda n: f"short {n}" if n < 30 else f"a long answer {n}")
    responses = {("policy", "T=1"): policy, ("base", "T=1"): SHORT}
    settings = config(judges_per_comparison=judges)
    judged = judge(service, PROMPTS, responses, settings, panel(), study="s", guideline=GUIDELINE)
    assert len(judged) == 61 * judges
    assert plain(judged).value == pytest.approx(46 / 61, abs=1e-12)


def test_control_the_policy_replaced_by_one_as_good(service: LabelService) -> None:
    other = sampled(lambda n: f"another long answer {n}" if n % 2 else f"short {n} x")
    equal = sampled(lambda n: f"another long answer {n}" if n % 2 == 0 else f"short {n} x")
    responses = {("policy", "T=1"): other, ("base", "T=1"): equal}
    assert not holds(judge(service, PROMPTS, responses, config(), panel(), study="s", guideline=GUIDELINE), responses)


def test_control_judges_whose_answers_are_shuffled(service: LabelService) -> None:
    responses = {("policy", "T=1"): LONG, ("base", "T=1"): SHORT}
    judged = judge(service, PROMPTS, responses, config(), panel(lapse=1.0), study="s", guideline=GUIDELINE)
    assert {row.preference for row in judged} == {0.0, 1.0}
    assert not holds(judged, responses)


def test_control_the_pair_the_other_way_round(service: LabelService) -> None:
    responses = {("policy", "T=1"): SHORT, ("base", "T=1"): LONG}
    assert not holds(judge(service, PROMPTS, responses, config(), panel(), study="s", guideline=GUIDELINE), responses)


def test_each_comparison_is_shown_in_an_order_of_its_own(service: LabelService) -> None:
    """Judges who always take what is shown first prefer nobody."""
    biased = [
        SimulatedRater(
            RaterProfile(name=f"j{n}", group="held-out", weights={"words": 0.0}, noise=0.0, position_bias=9.0),
            0,
            by_length,
        )
        for n in range(5)
    ]
    responses = {("policy", "T=1"): LONG, ("base", "T=1"): SHORT}
    judged = judge(
        service,
        PROMPTS,
        responses,
        config(),
        Panel(group="held-out", address="", simulated=tuple(biased)),
        study="s",
        guideline=GUIDELINE,
    )
    shown_first = [row.shown_first for row in service.comparisons("s")]
    assert set(shown_first) == {"policy", "base"}
    assert 20 <= shown_first.count("policy") <= 41
    assert not holds(judged, responses)


def test_every_group_of_judges_answers_for_itself(service: LabelService) -> None:
    responses = {("policy", "T=1"): LONG, ("base", "T=1"): SHORT}
    judged = [
        row
        for group in ("held-out", "training")
        for row in judge(service, PROMPTS, responses, config(), panel(group), study=f"s/{group}", guideline=GUIDELINE)
    ]
    assert {(row.judge, row.rater.rpartition(" ")[0]) for row in judged} == {
        ("held-out", "held-out"),
        ("training", "training"),
    }
    assert len(judged) == 2 * 61


def test_judges_agreement_leaves_out_what_nobody_was_asked() -> None:
    def row(number: int, preference: float, rater: str, judge: str) -> Judged:
        rest = {"a": "policy", "b": "base", "decoding": "T=1", "length_a": 1, "length_b": 1}
        return Judged(prompt=PROMPTS[number], preference=preference, rater=rater, judge=judge, **rest)  # type: ignore[arg-type]

    rows = [row(0, 1.0, "h1", "held-out"), row(1, 0.0, "h2", "held-out"), row(2, 1.0, "h1", "held-out")]
    rows += [row(3, 0.5, SAME_TEXT, "held-out"), row(3, 0.5, SAME_TEXT, "training")]
    assert judges_agreement(rows) == {}, "each comparison has one judge"
    rows += [row(0, 1.0, "t1", "training"), row(1, 1.0, "t1", "training"), row(2, 0.5, "t2", "training")]
    found = judges_agreement(rows)
    assert list(found) == ["training_against_held_out"]
    across = found["training_against_held_out"]
    assert (across["ties_excluded"]["value"], across["ties_excluded"]["n"]) == (0.5, 2)
    assert (across["tie_is_half"]["value"], across["tie_is_half"]["n"]) == (0.5, 3)
    assert (across["raters"], across["other_raters"]) == (2, 2)
    again = judges_agreement([*rows, row(0, 1.0, "h2", "held-out")])
    assert again["held_out"]["tie_is_a_class"]["value"] == 1
    assert again["held_out"]["raters"] == 2
    assert "alpha" in again["held_out"]


def test_people_are_asked_and_waited_for(service: LabelService) -> None:
    responses = {("policy", "T=1"): LONG, ("base", "T=1"): SHORT}
    people = Panel(group="held-out", address="http://here")
    for _ in range(2):  # asking again asks nothing twice
        with pytest.raises(
            AnswersMissing,
            match=r"61 comparison answers by held-out raters .* http://here",
        ):
            judge(service, PROMPTS, responses, config(), people, study="s", guideline=GUIDELINE)
        assert service.progress("s").slots == 61


def test_a_prompts_key_may_hold_anything(service: LabelService) -> None:
    odd = [Prompt(messages=one.messages, about=type(one.about)(id=f"{n} | x | y | z")) for n, one in enumerate(PROMPTS)]
    responses = {("policy", "T=1"): LONG, ("base", "T=1"): SHORT}
    judged = judge(service, odd, responses, config(), panel(), study="s", guideline=GUIDELINE)
    assert {row.prompt.key for row in judged} == {one.key for one in odd}


def test_ratings_and_tables(service: LabelService) -> None:
    settings = config(rated=["policy", "base"], baseline="base", decodings=[{"greedy": True}, {}])
    responses = {(name, law): one for name, one in (("policy", LONG), ("base", SHORT)) for law in ("greedy", "T=1")}
    judged = judge(service, PROMPTS, responses, settings, panel(), study="s", guideline=GUIDELINE)
    ratings = rate(service, PROMPTS, responses, settings, panel(), decoding="T=1", study="r", guideline=GUIDELINE)
    assert len(ratings) == 2 * 61
    tables = Tables(
        config=settings, prompts=PROMPTS, responses=responses, judged=judged, ratings=ratings, held_out_group="held-out"
    )
    found = tabulate(tables)
    assert [(row["a"], row["b"], row["decoding"], row["judge"], row["n"]) for row in found["comparisons"]] == [
        ("policy", "base", "greedy", "held-out", 61),
        ("policy", "base", "T=1", "held-out", 61),
    ]
    for row in found["comparisons"]:
        assert row["win_rate"] == 1.0
        assert row["ci95"][0] > 0.9
        assert set(row["length_controlled"]) == {"win_rate", "ci95"}
    policy = found["models"]["policy"]
    assert policy["mean_tokens"] == 4
    assert policy["by_category"]["other"]["win_rate"] == 1.0
    assert policy["likert"]["value"] > found["models"]["base"]["likert"]["value"]


def test_answers_are_of_the_pairs_and_prompts_that_are_asked_now(service: LabelService) -> None:
    laws = config(decodings=[{"greedy": True}, {}])
    responses = {(name, law): one for name, one in (("policy", LONG), ("base", SHORT)) for law in ("greedy", "T=1")}
    assert len(judge(service, PROMPTS, responses, laws, panel(), study="s", guideline=GUIDELINE)) == 2 * 61
    sampled_alone = {who: one for who, one in responses.items() if who[1] == "T=1"}
    judged = judge(service, PROMPTS[:7], sampled_alone, config(), panel(), study="s", guideline=GUIDELINE)
    assert [(row.prompt.key, row.decoding) for row in judged] == [(one.key, "T=1") for one in PROMPTS[:7]]


def test_responses_are_kept_whole() -> None:
    """Entropy: (3 + 2) nats over 4 + 1 tokens."""
    whole = Sampled(
        responses=(Response(text="a b"), Response(text="", finished=False)),
        num_tokens=(4, 1),
        logprob=(-3.0, -2.0),
        kl=(0.5, -0.25),
        reference_logprob=None,
    )
    assert whole.entropy == pytest.approx(1.0, abs=1e-12)
    assert Sampled.of_rows(json.loads(json.dumps(whole.rows()))) == whole


# --- claims ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "interval", "expected"),
    [
        ({"above": 0.5}, (0.51, 0.9), True),
        ({"above": 0.5}, (0.5, 0.9), False),
        ({"above": 0.5}, (0.49, 0.9), False),
        ({"below": 0.5}, (0.1, 0.49), True),
        ({"below": 0.5}, (0.1, 0.5), False),
        ({"below": 0.5}, (0.1, 0.6), False),
    ],
)
def test_a_check_looks_at_the_interval_alone(bound: dict[str, Any], interval: Any, expected: bool) -> None:
    for value in (0.0, 0.7, 1.0):
        estimate = Estimate(value=value, ci95=Interval(*interval), n=9)
        check = Check(measure="win_rate", a="a", b="b", above=bound.get("above"), below=bound.get("below"))
        assert check.holds(estimate) is expected


def test_a_claim_needs_all_of_its_checks() -> None:
    class Measured:
        def find(self, check: Check) -> Estimate:
            value = {"a": 0.7, "b": 0.4}[check.a]
            return Estimate(value=value, ci95=Interval(value - 0.1, value + 0.1), n=9)

    good = {"measure": "win_rate", "a": "a", "b": "b", "above": 0.5}
    claims = [
        {"id": "1", "statement": "s", "checks": [good, good | {"above": 0.55}]},
        {"id": "2", "statement": "s", "checks": [good, good | {"a": "b", "b": "a"}]},
    ]
    settings = config(
        contestants={"a": {"model": "m"}, "b": {"model": "n"}}, pairs=[["a", "b"], ["b", "a"]], claims=claims
    )
    assert [claim["holds"] for claim in judge_claims(settings.claims, Measured())] == [True, False]


# --- contestants ----------------------------------------------------------------------------------------------------


def words_of(prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
    return [float(sum(ord(letter) for letter in response.text)) for response in responses]


def test_claims_about_reward_models_without_held_out_rankings_are_refused_before_anybody_responds() -> None:
    checks = [{"measure": "reward_log_loss_difference", "a": "main", "b": "other", "below": 0.0}]
    config = from_mapping(
        EvaluationConfig,
        {"contestants": {}, "pairs": [], "claims": [{"id": "8", "statement": "s", "checks": checks}]},
        where="test",
    )
    check_rewards(config, {"main": {"accuracy": 0.7}, "other": {"accuracy": 0.7}})
    with pytest.raises(ConfigError, match="claim 8: reward_log_loss_difference of 'other' needs held-out rankings"):
        check_rewards(config, {"main": {"accuracy": 0.7}, "other": {"accuracy": 0.7, "on": "training rankings"}})


def test_best_of_n_takes_the_highest_score(base: str) -> None:
    policy, asked, law = load_policy(base), [prompt(f"w{n}") for n in range(5, 10)], DecodingConfig(max_new_tokens=5)
    contestant = Contestant(model="m", best_of=4, reference="m")
    field = Field(contestant=contestant, policy=policy, reference=policy)
    chosen = respond("best", field, asked, law, words_of, seed=3)
    groups = sample_rollouts(policy, asked, n=4, decoding=law, seed=3, purpose="evaluation/best/T=1")
    for response, group in zip(chosen.responses, groups, strict=True):
        texts = [as_response(policy, rollout) for rollout in group]
        assert words_of([], [response])[0] == max(words_of([], texts))
    assert len({response.text for response in chosen.responses}) > 1
    assert chosen.kl == (best_of_n_kl(4),) * 5
    from_another = replace(field, contestant=replace(contestant, reference="n"))
    assert respond("best", from_another, asked, law, words_of, seed=3).kl is None, "no closed form from another model"
    assert chosen.entropy is None


def test_the_kl_is_of_the_sampled_tokens(base: str, tmp_path: Path) -> None:
    policy, reference = load_policy(base), load_policy(str(save_model(tmp_path / "other", seed=1)))
    asked, law = [prompt(f"w{n}") for n in range(5, 8)], DecodingConfig(max_new_tokens=5, temperature=0.7)
    rollouts = [group[0] for group in sample_rollouts(policy, asked, n=1, decoding=law, seed=0, purpose="x")]
    found = response_logprobs(reference, rollouts, law)
    for rollout, total in zip(rollouts, found, strict=True):
        packed = pack([(*rollout.prompt_ids, *rollout.response_ids)])
        with torch.no_grad():
            logits = reference.library(input_ids=packed.id_N[None]).logits[0] / 0.7
        places = range(len(rollout.prompt_ids) - 1, len(packed.id_N) - 1)
        by_hand = sum(float(logits[place].log_softmax(-1)[packed.id_N[place + 1]]) for place in places)
        assert total == pytest.approx(by_hand, abs=1e-4)
    itself = respond(
        "p", Field(contestant=Contestant(model="m"), policy=policy, reference=policy), asked, law, None, seed=0
    )
    assert itself.kl == pytest.approx((0.0, 0.0, 0.0), abs=1e-4)


def test_a_prefix_leaves_the_prompts_beginning_to_the_reference(base: str) -> None:
    policy, asked, law = load_policy(base), [prompt("w5"), prompt("w6 w7")], DecodingConfig(max_new_tokens=3)
    plain_ids = [policy.tokenizer.prompt_ids(one.messages) for one in asked]
    assert plain_ids[0][0] == policy.tokenizer.library.bos_token_id, "or there is nothing to see here"
    rollouts = sample_rollouts(policy, asked, n=2, decoding=law, seed=0, purpose="x", prefix="w9 w8 ")
    assert [list(one.prompt_ids) for group in rollouts for one in group] == [plain_ids[0]] * 2 + [plain_ids[1]] * 2


def test_the_best_prefix_is_the_one_that_scores_highest(base: str) -> None:
    policy, asked = load_policy(base), [prompt(f"w{n}") for n in range(5, 8)]
    examples = [demonstration(f"w{n}", f"w{n + 1}") for n in range(30, 36)]
    settings = FewShot(template="w0 {prompt} w1 {response} ", shots=2, candidates=4, prompts=2)
    law = DecodingConfig(max_new_tokens=4)
    prefix, contest = best_prefix(policy, settings, examples, asked, words_of, law, seed=0)
    assert len(contest) == 4
    assert prefix == max(contest, key=lambda row: row["score"])["prefix"]
    assert len({row["score"] for row in contest}) > 1
    assert prefix.count("w0 ") == 2
    turns = (*asked[0].messages, Message("assistant", "w1"), *asked[1].messages)
    of_two_turns = replace(examples[1], prompt=Prompt(messages=turns))
    with pytest.raises(DataError, match="a prefix has 2 worked examples, but there are 1 of a single turn"):
        best_prefix(policy, settings, [examples[0], of_two_turns], asked, words_of, law, seed=0)
