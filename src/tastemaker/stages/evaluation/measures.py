"""From answers to numbers: win rates, shares, differences, each with a 95 % interval clustered by prompt.

Win rates count ties half, and are also given under length control (a logistic regression on the log ratio of lengths,
as in Stiennon et al.), because raters like long responses and a policy finds that out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from tastemaker.agreement import Answers, agreement_between, agreement_within, comparison_answers
from tastemaker.errors import ConfigError, DataError
from tastemaker.intervals import Estimate, Floats, Interval, bootstrap_interval, mean_ci
from tastemaker.records import Prompt
from tastemaker.stages.evaluation.claims import FIELDS, Check
from tastemaker.stages.evaluation.contestants import Responses, Sampled, finished_rate
from tastemaker.stages.evaluation.judging import SAME_TEXT, EvaluationConfig, Judged
from tastemaker.statistics import (
    accuracy,
    distinct_n,
    length_controlled_win_rate,
    paired_share_difference,
    win_rate,
)
from tastemaker.store.tasks import Rating

Row = TypeVar("Row")


def check_prompts(config: EvaluationConfig, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that are too few for the evaluation, or for one of its claims, before anybody responds to them.

    Raises:
        DataError, ConfigError: there are not the two that an interval needs, of all or of such as a claim speaks of.
    """
    if len({prompt.key for prompt in prompts}) < 2:
        raise DataError(
            f"an evaluation needs two test prompts for an interval, and there are {len(prompts)}; give more users, "
            "or prompts with split 'test'."
        )
    for claim in config.claims:
        for check in claim.checks:
            count = sum(_fits(prompt, check.where) for prompt in prompts)
            if "where" in FIELDS[check.measure] and count < 2:
                about = f" with {dict(check.where)}" if check.where else ""
                raise ConfigError(
                    f"claim {claim.id}: {check.measure} of {check.a!r} needs two test prompts{about}, and there are "
                    f"{count}; give more, or another 'where'."
                )


def check_rewards(config: EvaluationConfig, reward: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse claims about reward models that nothing was held out for, before anybody responds.

    Raises:
        ConfigError: a claim speaks of a reward model that was measured on its training rankings alone.
    """
    for claim in config.claims:
        for check in claim.checks:
            names = [name for name in (check.a, check.b) if check.measure.startswith("reward_") and name is not None]
            for name in names:
                if "on" in reward.get(name, {}):
                    raise ConfigError(
                        f"claim {claim.id}: {check.measure} of {name!r} needs held-out rankings, and there are none; "
                        "raise comparisons.validation, or leave the claim out."
                    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Everything that was measured, ready to be asked by a claim or written out."""

    config: EvaluationConfig
    prompts: Sequence[Prompt]
    responses: Responses
    judged: Sequence[Judged]
    ratings: Sequence[Rating]
    held_out_group: str
    text_losses: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Per contestant: the loss of each held-out document, nats a token."""
    proxy: Mapping[tuple[str, str], Sequence[float]] = field(default_factory=dict)
    gold: Mapping[tuple[str, str], Sequence[float]] = field(default_factory=dict)
    reward: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Per reward variant: its results.json."""
    reward_pairs: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Per reward variant: its held-out pairs with their score gaps (pairs.jsonl)."""

    def find(self, check: Check) -> Estimate:
        """The number that a check is about."""
        if check.measure in ("win_rate", "length_controlled_win_rate"):
            return self._win_rate(check)
        if check.measure in ("reward_accuracy", "reward_accuracy_drop"):
            return self._reward(check)
        if check.measure in ("reward_accuracy_difference", "reward_log_loss_difference"):
            return self._reward_difference(check)
        if check.measure == "text_loss_difference":
            ours, theirs = self._both(check, self.text_losses)
            return mean_ci(np.subtract(ours, theirs), range(len(ours)))
        if check.measure == "text_loss_recovered":
            return self._recovered(check)
        by_response = {
            "gold_difference": self.gold,
            "proxy_difference": self.proxy,
            "reference_loss_difference": self._reference_losses(),
        }
        if check.measure in by_response:
            return self._difference(check, by_response[check.measure])
        return self._rating(check)

    def _difference(self, check: Check, table: Mapping[tuple[str, str], Sequence[float]]) -> Estimate:
        """The mean over prompts of a number that every response has."""
        decoding = check.decoding or self.config.decodings[-1].name
        ours, theirs = self._both(check, {name: row for (name, how), row in table.items() if how == decoding})
        kept = [place for place, prompt in enumerate(self.prompts) if _fits(prompt, check.where)]
        return mean_ci([ours[place] - theirs[place] for place in kept], [self.prompts[place].key for place in kept])

    def _reference_losses(self) -> dict[tuple[str, str], list[float]]:
        """How unlikely the reference finds each response, nats a token."""
        return {
            who: [-logprob / count for logprob, count in zip(one.reference_logprob, one.num_tokens, strict=True)]
            for who, one in self.responses.items()
            if one.reference_logprob is not None
        }

    def _recovered(self, check: Check) -> Estimate:
        """Of the text loss that `a` adds to `base`, the share that `b` does not add; 0 where `a` adds none."""
        ours, theirs = self._both(check, self.text_losses)
        if check.base is None or check.base not in self.text_losses:
            raise ConfigError(f"a claim speaks of {check.base!r}, for which there is no {check.measure}.")
        base = self.text_losses[check.base]
        sum_CF = np.stack([np.subtract(ours, theirs), np.subtract(ours, base)], axis=1)

        def share(sum_RF: Floats) -> Floats:
            saved_R, added_R = sum_RF[:, 0], sum_RF[:, 1]
            return np.divide(saved_R, added_R, out=np.zeros_like(added_R), where=added_R > 0)

        value = float(share(sum_CF.sum(0, keepdims=True))[0])
        return Estimate(value=value, ci95=bootstrap_interval(sum_CF, share), n=len(base))

    def _win_rate(self, check: Check) -> Estimate:
        a, b = self._names(check)
        rows = self.rows(a, b, check.decoding or self.config.decodings[-1].name, check.judge)
        rows = [row for row in rows if _fits(row.prompt, check.where)]
        if not rows:
            raise ConfigError(f"a claim speaks of {a!r} against {b!r}, but that pair was not judged; add it to pairs.")
        return controlled(rows) if check.measure == "length_controlled_win_rate" else plain(rows)

    def rows(self, a: str, b: str, decoding: str, judge: str | None = None) -> list[Judged]:
        """The comparisons of a pair, by one group of judges."""
        group = judge or self.held_out_group
        return [row for row in self.judged if (row.a, row.b, row.decoding, row.judge) == (a, b, decoding, group)]

    def _rating(self, check: Check) -> Estimate:
        values = {name: self._rated(name, check) for name in (check.a, check.b) if name is not None}
        ours = values[check.a]
        if not ours:
            raise ConfigError(f"a claim speaks of ratings of {check.a!r}, which was not rated on such prompts.")
        if check.b is None:
            return accuracy(list(ours.values()), list(ours))
        shared = [key for key in ours if key in values[check.b]]
        if not shared:
            raise ConfigError(f"a claim compares ratings of {check.a!r} and {check.b!r}, but they share no prompt.")
        both = [ours[key] for key in shared], [values[check.b][key] for key in shared]
        return mean_ci(np.subtract(*both), shared) if check.flag is None else paired_share_difference(*both)

    def _rated(self, name: str, check: Check) -> dict[str, float]:
        return {
            rating.prompt.key: float(check.flag in rating.flags if check.flag else rating.likert)
            for rating in self.ratings
            if rating.source == name and _fits(rating.prompt, check.where)
        }

    def _reward(self, check: Check) -> Estimate:
        if check.a not in self.reward:
            raise ConfigError(f"a claim speaks of the reward model {check.a!r}; there are {', '.join(self.reward)}.")
        own = _as_estimate(self.reward[check.a])
        if check.measure == "reward_accuracy":
            return own
        held_out = self.reward[check.a].get("held_out_raters")
        if held_out is None:
            raise ConfigError(f"a claim needs held-out raters' rankings for the reward model {check.a!r}.")
        other = _as_estimate(held_out)
        drop = own.value - other.value
        reach = math.hypot(own.ci95.width / 2, other.ci95.width / 2)
        return Estimate(value=drop, ci95=Interval(drop - reach, drop + reach), n=own.n + other.n)

    def _reward_difference(self, check: Check) -> Estimate:
        """Two reward models on the same held-out pairs."""
        ours, theirs = self._both(check, self.reward_pairs)
        if [row["prompt"] for row in ours] != [row["prompt"] for row in theirs]:
            raise ConfigError(f"{check.a!r} and {check.b!r} were not measured on the same pairs.")
        gap_2N = np.array([[float(row["gap"]) for row in rows] for rows in (ours, theirs)])
        if check.measure == "reward_accuracy_difference":
            value_2N = np.where(gap_2N == 0, 0.5, gap_2N > 0)
        else:
            value_2N = np.logaddexp(0, -gap_2N)
        return mean_ci(value_2N[0] - value_2N[1], [row["prompt"] for row in ours])

    def _both(self, check: Check, table: Mapping[str, Sequence[Row]]) -> tuple[Sequence[Row], Sequence[Row]]:
        a, b = self._names(check)
        for name in (a, b):
            if name not in table:
                raise ConfigError(f"a claim speaks of {name!r}, for which there is no {check.measure}.")
        return table[a], table[b]

    def _names(self, check: Check) -> tuple[str, str]:
        if check.b is None:
            raise ConfigError(f"a check of {check.measure} compares two; give 'b'.")
        return check.a, check.b


def plain(rows: Sequence[Judged]) -> Estimate:
    """The win rate of `a`, ties half."""
    return win_rate([row.preference for row in rows], [row.prompt.key for row in rows])


def controlled(rows: Sequence[Judged]) -> Estimate:
    """The win rate that `a` would have at equal length."""
    return length_controlled_win_rate(
        [row.preference for row in rows],
        [row.length_a for row in rows],
        [row.length_b for row in rows],
        [row.prompt.key for row in rows],
    )


def tabulate(tables: Tables) -> dict[str, Any]:
    """What `results.json` holds of an evaluation: `comparisons`, `models` and the judges' `agreement`."""
    return {
        "comparisons": list(_comparisons(tables)),
        "models": _models(tables),
        "agreement": judges_agreement(tables.judged),
    }


def judges_agreement(judged: Sequence[Judged]) -> dict[str, Any]:
    """How far judges agree on the comparisons that several of them made: each group, and the first with the second.

    Nothing is said of those who share no comparison, as judges of one group do where each comparison has one of them.
    """
    asked = [row for row in judged if row.rater != SAME_TEXT]

    def answers(rows: Sequence[Judged]) -> Answers:
        return comparison_answers(
            ((row.prompt.key, row.a, row.b, row.decoding), row.prompt.key, row.rater, row.preference) for row in rows
        )

    names = {group: {row.rater for row in asked if row.judge == group} for group in ("training", "held-out")}
    found = {
        group.replace("-", "_"): agreement_within(answers([row for row in asked if row.judge == group]))
        for group in names
    }
    found["training_against_held_out"] = agreement_between(answers(asked), names["training"])
    return {name: row.to_json() for name, row in found.items() if row.raters}


def _comparisons(tables: Tables) -> Iterable[dict[str, Any]]:
    judges = sorted({row.judge for row in tables.judged})
    for a, b in tables.config.pairs:
        for decoding in tables.config.decodings:
            for judge in judges:
                rows = tables.rows(a, b, decoding.name, judge)
                if not rows:
                    continue
                estimate, equal_length = plain(rows), controlled(rows)
                yield {
                    "a": a,
                    "b": b,
                    "judge": judge,
                    "decoding": decoding.name,
                    "n": estimate.n,
                    "win_rate": estimate.value,
                    "ci95": estimate.ci95.to_json(),
                    "length_controlled": {
                        "win_rate": equal_length.value,
                        "ci95": equal_length.ci95.to_json(),
                    },
                }


def _models(tables: Tables) -> dict[str, dict[str, Any]]:
    main = tables.config.decodings[-1].name
    models: dict[str, dict[str, Any]] = {}
    for name in tables.config.contestants:
        decodings = {
            decoding: _of_responses(tables, name, decoding, sampled)
            for (contestant, decoding), sampled in tables.responses.items()
            if contestant == name
        }
        if not decodings:
            raise DataError(f"the contestant {name!r} has no responses.")
        row: dict[str, Any] = dict(decodings.get(main) or next(iter(decodings.values())))
        row["decodings"] = decodings
        losses = tables.text_losses.get(name, ())
        if losses:
            row["heldout_text_loss"] = float(np.mean(losses))
        likert = [(rating.likert, rating.prompt.key) for rating in tables.ratings if rating.source == name]
        if likert:
            row["likert"] = mean_ci([value for value, _ in likert], [key for _, key in likert]).to_json()
            row["flags"] = _flags(tables, name)
        row["by_category"] = _by_category(tables, name, main)
        models[name] = row
    return models


def _of_responses(tables: Tables, name: str, decoding: str, sampled: Sampled) -> dict[str, Any]:
    words = [response.text.split() for response in sampled.responses]
    keys = [prompt.key for prompt in tables.prompts]
    row: dict[str, Any] = {
        "mean_tokens": float(np.mean(sampled.num_tokens)),
        "eos_rate": finished_rate(sampled),
        "distinct_1": distinct_n(words, 1),
        "distinct_2": distinct_n(words, 2),
        "entropy": sampled.entropy,
        "kl": None if sampled.kl is None else float(np.mean(sampled.kl)),
    }
    for label, table in (("proxy_score", tables.proxy), ("gold", tables.gold)):
        if (name, decoding) in table:
            row[label] = mean_ci(table[name, decoding], keys).to_json()
    return row


def _flags(tables: Tables, name: str) -> dict[str, float]:
    mine = [rating for rating in tables.ratings if rating.source == name]
    names = sorted({flag for rating in mine for flag in rating.flags})
    return {flag: float(np.mean([flag in rating.flags for rating in mine])) for flag in names}


def _by_category(tables: Tables, name: str, decoding: str) -> dict[str, Any]:
    baseline = tables.config.baseline
    if baseline is None or baseline == name:
        return {}
    rows = tables.rows(name, baseline, decoding)
    groups: dict[str, list[Judged]] = {}
    for row in rows:
        groups.setdefault(row.prompt.about.category or "other", []).append(row)
    table = {}
    for category, mine in sorted(groups.items()):
        estimate = plain(mine)
        table[category] = {"win_rate": estimate.value, "ci95": estimate.ci95.to_json(), "n": estimate.n}
    return table


def _fits(prompt: Prompt, where: Mapping[str, str] | None) -> bool:
    if not where:
        return True
    record = prompt.about.to_json()
    return all(str(record.get(name)) == value for name, value in where.items())


def _as_estimate(results: Mapping[str, Any]) -> Estimate:
    low, high = results["ci95"]
    return Estimate(value=float(results["accuracy"]), ci95=Interval(float(low), float(high)), n=int(results["n"]))
