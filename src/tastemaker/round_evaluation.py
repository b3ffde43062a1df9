"""The evaluation of a round: have the contestants respond, have them judged, and write it all down."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tastemaker.evaluation_sampling import Sampling, sampled_decoding
from tastemaker.files import atomic_write, write_json
from tastemaker.functions import function_fingerprint, load_function
from tastemaker.inputs import Input, Inputs
from tastemaker.intervals import mean_ci
from tastemaker.kept import Kept
from tastemaker.panel import Panel
from tastemaker.raters import RaterProfile, SimulatedRater
from tastemaker.recipe import start_model
from tastemaker.records import Prompt, Response
from tastemaker.scoring import FunctionScorer, Scorer, scores_together
from tastemaker.stages.evaluation import (
    Contestant,
    EvaluationConfig,
    Judged,
    Responses,
    Tables,
    check_prompts,
    check_rewards,
    judge,
    judge_claims,
    tabulate,
)
from tastemaker.stages.evaluation.judging import rate
from tastemaker.stages.ppo import PpoConfig
from tastemaker.stages.prompts import say_shortfall
from tastemaker.store.tasks import Rating

if TYPE_CHECKING:
    from tastemaker.round import Round

SAMPLES_PER_CATEGORY = 3
SAMPLED = "sampled.jsonl"
HELD_OUT = "held-out"  # as results call those who judge and trained nothing
REWARD_MODELS = "reward models"  # their group in the label store, where people and programs share none

Scores = Mapping[tuple[str, str], list[float]]


def evaluate(round_: Round) -> None:
    """Run the stage `7-evaluation`."""
    config, inputs = round_.recipe.evaluation, round_.inputs()
    assert config is not None
    evaluation = _Evaluation(round_, config, inputs)
    round_.run("7-evaluation", config, inputs, evaluation.write, keep=SAMPLED)


def over_optimization(
    round_: Round,
    config: EvaluationConfig,
    models: Mapping[str, Mapping[str, Any]],
    own: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """KL against proxy and gold score, a row for every PPO policy that was evaluated.

    "state" tells a finished policy, which is held against those of other coefficients, from a checkpoint kept after
    "iteration", which belongs to the course of "variant"; "start" is the contestant which that course began with.

    "proxy" is by "reward", which the policy was optimised for. Where that is not the reward model of everybody's
    `proxy_score`, `own` has the policy's score, and there is no start: its score is by another model.
    """
    rows, main = [], _proxy_name(round_)
    for name, contestant in config.contestants.items():
        policy, model = _optimised(round_, contestant), models[name]
        if policy is None or model["kl"] is None or "gold" not in model:
            continue
        variant, _, which = contestant.model.removeprefix("policy/").partition(":")
        comparable = policy.reward == main
        rows.append(
            {
                "policy": name,
                "variant": variant,
                "state": "checkpoint" if which.isdigit() else which or "finished",
                "iteration": int(which) if which.isdigit() else policy.iterations,
                "start": _start_of(config, policy, contestant.reference) if comparable else None,
                "beta": policy.kl_coef,
                "reward": policy.reward,
                "kl": max(0.0, model["kl"]),
                "proxy": model["proxy_score"] if comparable else (own or {})[name],
                "gold": model["gold"],
            }
        )
    return rows


def _optimised(round_: Round, contestant: Contestant) -> PpoConfig | None:
    """How the contestant was optimised, if it is a PPO policy of this run as it is."""
    variant = contestant.model.removeprefix("policy/").partition(":")[0]
    policy = round_.recipe.policy.get(variant)
    return policy if isinstance(policy, PpoConfig) and _is_plain(contestant) else None


def _start_of(config: EvaluationConfig, policy: PpoConfig, reference: str | None) -> str | None:
    """The contestant that is the model which PPO started from, if there is one whose KL is from the same reference."""
    starts = (
        name
        for name, other in config.contestants.items()
        if _is_plain(other) and other.reference == reference and other.model == start_model(policy.init)
    )
    return next(starts, None)


def _proxy_name(round_: Round) -> str | None:
    """The reward model that scores everybody, chooses few-shot prefixes and the best of n: the recipe's first."""
    return next(iter(round_.recipe.reward), None)


def spread(prompts: list[Prompt], count: int | None) -> list[Prompt]:
    """`count` of the prompts, taken evenly from first to last: every source has its share. None, or too many: all."""
    if count is None or count >= len(prompts):
        return prompts
    return [prompts[place * len(prompts) // count] for place in range(count)]


class _Evaluation:
    """One evaluation. What it reads is declared when it is made; `write` is the stage's work."""

    def __init__(self, round_: Round, config: EvaluationConfig, inputs: Inputs) -> None:
        self.round, self.config = round_, config
        self._test = inputs.prompts("test")
        proxy = _proxy_name(round_)
        self._judge = None if config.judge_reward is None else inputs.scorer(config.judge_reward)
        self._own: dict[str, Input[Scorer]] = {}
        for name, contestant in config.contestants.items():
            policy = _optimised(round_, contestant)
            if policy is not None and policy.reward != proxy:
                self._own[name] = inputs.scorer(policy.reward)
        self._reward = {name: inputs.json(f"5-reward/{name}/results.json") for name in round_.recipe.reward}
        self._pairs = {name: inputs.lines(f"5-reward/{name}/pairs.jsonl") for name in round_.recipe.reward}
        self._raters, self._guideline = inputs.raters(), inputs.guideline("evaluation")
        comparisons = round_.recipe.comparisons
        collected = comparisons is not None and comparisons.source is None
        self._noise = inputs.json("4-comparisons/raters.json") if collected and self._raters.simulated else None
        self._sampling = Sampling(config, inputs, proxy, round_.load_model)
        if config.gold is not None:
            inputs.setting("gold", function_fingerprint(config.gold))

    def write(self, folder: Path) -> None:
        """Sample, judge, measure; write results, responses, answers and samples."""
        fitting = self._sampling.fitting(self._test.load())
        say_shortfall(fitting, self.config.prompts, "test prompts")
        self.prompts = spread(fitting, self.config.prompts)
        check_prompts(self.config, self.prompts)
        check_rewards(self.config, {name: results.load() for name, results in self._reward.items()})
        kept = Kept(folder / SAMPLED)
        responses = self._responses(kept)
        tables = Tables(
            config=self.config,
            prompts=self.prompts,
            responses=responses,
            judged=self._judged(responses),
            ratings=self._ratings(responses),
            held_out_group=HELD_OUT,
            text_losses=self._text_losses(kept),
            proxy=self._scores(responses, self._sampling.scorer),
            gold=self._scores(responses, self._gold()),
            reward={name: results.load() for name, results in self._reward.items()},
            reward_pairs={name: pairs.load() for name, pairs in self._pairs.items()},
        )
        found = tabulate(tables)
        for name, row in found["models"].items():
            row["parameters"] = self._sampling.parameters(name, kept)
            row["kind"] = _kind(self.config.contestants[name])
        claims = judge_claims(self.config.claims, tables)
        own = self._own_scores(responses)
        found["over_optimization"] = over_optimization(self.round, self.config, found["models"], own)
        contests = {name: self._sampling.contest(name, kept) for name in self.config.contestants}
        write_json(folder / "results.json", {**found, "claims": claims})
        write_json(folder / "few-shot.json", {name: contest for name, contest in contests.items() if contest})
        write_lines(folder / "comparisons.jsonl", map(_judged_row, tables.judged))
        write_lines(folder / "responses.jsonl", self._response_rows(responses))
        write_lines(folder / "samples.jsonl", self._samples(responses, tables))

    def _responses(self, kept: Kept) -> Responses:
        """Everybody's. What their models alone can tell is taken while they are loaded."""
        responses = {}
        for name, contestant in self.config.contestants.items():
            for decoding in self.config.decodings:
                if contestant.best_of is not None and decoding.greedy:
                    continue  # the best of n equal responses is that response
                responses[name, decoding.name] = self._sampling.responses(name, decoding, self.prompts, kept)
            self._sampling.parameters(name, kept)
            if self._has_text_loss(contestant):
                self._sampling.text_losses(name, kept)
        return responses

    def _has_text_loss(self, contestant: Contestant) -> bool:
        return contestant.best_of is None and contestant.few_shot is None and self.round.recipe.text is not None

    def _text_losses(self, kept: Kept) -> dict[str, list[float]]:
        contestants = self.config.contestants.items()
        return {name: self._sampling.text_losses(name, kept) for name, one in contestants if self._has_text_loss(one)}

    def _study(self, group: str) -> str:
        """The study of the comparisons that a group makes."""
        names = {name for pair in self.config.pairs for name in pair}
        shape = self._sampling.shape(names, self.config.decodings) | self._asked()
        shape |= {"overlap": self.config.judges_per_comparison}
        if self._judge is not None:
            shape["judge"] = self._judge.fingerprint
        return self.round.study(f"evaluation/{group}", shape)

    def _asked(self) -> dict[str, object]:
        """What shapes the questions and answers of this evaluation, beside the responses."""
        return {
            "prompts": self._test.fingerprint,
            "people": self._raters.fingerprint,
            "noise": self._raters_noise(),
            "guideline": self._guideline.version,
        }

    def _raters_noise(self) -> float:
        """The simulated raters' noise, as it was set when the comparisons were collected."""
        return 0.0 if self._noise is None else float(self._noise.load()["noise"] or 0.0)

    def _gold(self) -> Scorer | None:
        path = self.config.gold
        return None if path is None else FunctionScorer(load_function(path), name=path)

    def _scores(self, responses: Responses, scorer: Scorer | None) -> Scores:
        if scorer is None:
            return {}
        return scores_together(scorer, self.prompts, {who: sampled.responses for who, sampled in responses.items()})

    def _own_scores(self, responses: Responses) -> dict[str, dict[str, Any]]:
        """The mean score of policies by the reward that they were optimised for, where it is not everybody's proxy."""
        keys, decoding = [prompt.key for prompt in self.prompts], self.config.decodings[-1].name
        found: dict[str, dict[str, Any]] = {}
        for fingerprint, scorer in {one.fingerprint: one for one in self._own.values()}.items():
            names = [name for name, one in self._own.items() if one.fingerprint == fingerprint]
            scores = self._scores({(name, decoding): responses[name, decoding] for name in names}, scorer.load())
            found |= {name: mean_ci(scores[name, decoding], keys).to_json() for name in names}
        return found

    def _judged(self, responses: Responses) -> list[Judged]:
        """All comparisons. A reward model's are called held-out, as those of raters who trained nothing."""
        judged: list[Judged] = []
        for panel in self._panels(responses):
            judged += judge(
                self.round.service,
                self.prompts,
                responses,
                self.config,
                panel,
                study=self._study(panel.group),
                guideline=self._guideline,
            )
        return judged if self._judge is None else [replace(row, judge=HELD_OUT) for row in judged]

    def _panels(self, responses: Responses) -> list[Panel]:
        if self._judge is not None:
            return [self._reward_panel(self._judge.load(), responses)]
        noise = self._raters_noise()
        return [self._raters.panel(group, noise=noise) for group in self.config.judges]

    def _reward_panel(self, scorer: Scorer, responses: Responses) -> Panel:
        """A reward model as the only judge: it prefers what it scores higher."""
        score_of: dict[tuple[str, Response], float] = {}
        for who, scores in self._scores(responses, scorer).items():
            for prompt, response, score in zip(self.prompts, responses[who].responses, scores, strict=True):
                score_of[prompt.key, response] = score

        def features(prompt: Prompt, response: Response) -> Mapping[str, float]:
            return {"score": score_of[prompt.key, response]}

        profile = RaterProfile(
            name=f"reward model {self.config.judge_reward}", group=REWARD_MODELS, weights={"score": 1.0}, noise=0.0
        )
        rater = SimulatedRater(profile, self.round.recipe.seed, features)
        return Panel(group=REWARD_MODELS, address="", simulated=(rater,))

    def _ratings(self, responses: Responses) -> list[Rating]:
        if not self.config.rated or self.config.judge_reward is not None:
            return []
        decoding = sampled_decoding(self.config)
        shape = self._sampling.shape(self.config.rated, [decoding]) | self._asked()
        study = self.round.study("evaluation/ratings", shape | {"rated": list(self.config.rated)})
        panel = self._raters.panel(HELD_OUT, noise=self._raters_noise())
        return rate(
            self.round.service,
            self.prompts,
            responses,
            self.config,
            panel,
            decoding=decoding.name,
            study=study,
            guideline=self._guideline,
        )

    def _response_rows(self, responses: Responses) -> Iterable[dict[str, Any]]:
        for (name, decoding), sampled in responses.items():
            for prompt, response in zip(self.prompts, sampled.responses, strict=True):
                yield {
                    "prompt": prompt.key,
                    "contestant": name,
                    "decoding": decoding,
                    "response": response.text,
                    "finished": response.finished,
                }

    def _samples(self, responses: Responses, tables: Tables) -> Iterable[dict[str, Any]]:
        """A few prompts of every category with everybody's response under the sampled decoding."""
        decoding = sampled_decoding(self.config).name
        names = [name for name in self.config.contestants if (name, decoding) in responses]
        taken: dict[str, int] = {}
        for place, prompt in enumerate(self.prompts):
            category = prompt.about.category or "other"
            taken[category] = taken.get(category, 0) + 1
            if taken[category] > SAMPLES_PER_CATEGORY:
                continue
            yield {
                "prompt": [message.to_json() for message in prompt.messages],
                "category": category,
                "responses": {name: responses[name, decoding].responses[place].text for name in names},
                "scores": {
                    name: tables.proxy[name, decoding][place] for name in names if (name, decoding) in tables.proxy
                },
            }


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSONL whole."""

    with atomic_write(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _judged_row(row: Judged) -> dict[str, Any]:
    return {
        "prompt": row.prompt.key,
        "a": row.a,
        "b": row.b,
        "decoding": row.decoding,
        "preference": row.preference,
        "length_a": row.length_a,
        "length_b": row.length_b,
        "rater": row.rater,
        "judge": row.judge,
    }


def _is_plain(contestant: Contestant) -> bool:
    """Whether its responses are the model's own: one a prompt, after nothing but the prompt."""
    return contestant.best_of is None and contestant.few_shot is None


def _kind(contestant: Contestant) -> str:
    if contestant.best_of is not None:
        return f"best of {contestant.best_of}"
    if contestant.few_shot is not None:
        return "few-shot"
    return contestant.model.partition("/")[0]


__all__ = ["evaluate", "over_optimization"]
