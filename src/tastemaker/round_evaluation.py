"""The evaluation of a round: load the contestants, sample, have them judged, and write it all down."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tastemaker import sources
from tastemaker.artefacts import read_json
from tastemaker.checkpoint import model_source
from tastemaker.corpus import encode_texts, text_loss
from tastemaker.errors import ConfigError, DataError
from tastemaker.files import atomic_write, read_demonstrations, write_json
from tastemaker.functions import load_function
from tastemaker.model import LanguageModel, count_parameters
from tastemaker.panel import Panel
from tastemaker.raters import RaterProfile, SimulatedRater
from tastemaker.records import Demonstration, Prompt, Response
from tastemaker.responses import DecodingConfig
from tastemaker.scoring import FunctionScorer, Scorer
from tastemaker.stages.evaluation import (
    Contestant,
    EvaluationConfig,
    Field,
    Judged,
    Responses,
    Sampled,
    Tables,
    best_prefix,
    judge,
    judge_claims,
    tabulate,
)
from tastemaker.stages.evaluation.contestants import respond
from tastemaker.stages.evaluation.judging import rate
from tastemaker.stages.ppo import PpoConfig

if TYPE_CHECKING:
    from tastemaker.round import Round

TEXT_BUDGET = 8192
MAX_TEXT_TOKENS = 512
SAMPLES_PER_CATEGORY = 3


def evaluate(round_: Round) -> None:
    """Run the stage `7-evaluation`."""
    config = round_.recipe.evaluation
    assert config is not None
    inputs: dict[str, Path | str] = {
        "prompts": round_.file("1-prompts/test.jsonl"),
        "validation": round_.file("1-prompts/validation.jsonl"),
        "people": round_.people,
        "seed": round_.seed,
    }
    for name, contestant in config.contestants.items():
        inputs[name] = source_of(round_, contestant.model)
        if contestant.reference is not None:
            inputs[f"{name}, reference"] = source_of(round_, contestant.reference)
    for name in round_.recipe.reward:
        inputs[f"reward/{name}"] = round_.model_folder(f"reward/{name}")

    def work(folder: Path) -> None:
        _Evaluation(round_, config, inputs).write(folder)

    round_.run("7-evaluation", config, inputs, work)


def source_of(round_: Round, name: str) -> Path | str:
    """A contestant's model: "base", a variant of this run, or any model source."""
    if name == "base":
        return model_source(round_.recipe.base.model)
    if name.partition("/")[0] in ("sft", "policy"):
        return round_.model_folder(name)
    return model_source(name)


class _Evaluation:
    """One evaluation in progress."""

    def __init__(self, round_: Round, config: EvaluationConfig, inputs: Mapping[str, Path | str]) -> None:
        self.round, self.config, self.inputs = round_, config, inputs
        self.prompts = round_.split("test")[: config.prompts]
        if not self.prompts:
            raise DataError("there are no test prompts to evaluate on; give more users, or prompts with split 'test'.")
        self.scorer = self._main_scorer()
        self._loaded: dict[tuple[str, tuple[str, ...]], LanguageModel] = {}

    def write(self, folder: Path) -> None:
        """Sample, judge, measure; write results, responses, answers and samples."""
        responses, losses, about, contests = self._sample()
        noise = self.round.raters_noise()
        judged: list[Judged] = []
        for panel in self._panels(responses, noise):
            study = self.round.study("evaluation", panel.group, self.inputs)
            judged += judge(self.round.service, self.prompts, responses, self.config, panel, study=study)
        tables = Tables(
            config=self.config,
            prompts=self.prompts,
            responses=responses,
            judged=judged,
            ratings=self._ratings(responses, noise),
            held_out_group="held-out",
            text_losses=losses,
            proxy=self._scores(responses, self.scorer),
            gold=self._scores(responses, self._gold()),
            reward={name: read_json(self._reward_results(name)) for name in self.round.recipe.reward},
            reward_pairs={name: self._reward_pairs(name) for name in self.round.recipe.reward},
        )
        found = tabulate(tables)
        for name, row in found["models"].items():
            row |= about[name]
        claims = judge_claims(self.config.claims, tables)
        found["over_optimization"] = self._over_optimization(found["models"])
        write_json(folder / "results.json", {**found, "claims": claims})
        write_json(folder / "few-shot.json", contests)
        write_lines(folder / "comparisons.jsonl", map(_judged_row, judged))
        write_lines(folder / "responses.jsonl", self._response_rows(responses))
        write_lines(folder / "samples.jsonl", self._samples(responses, tables))

    def _sample(
        self,
    ) -> tuple[dict[tuple[str, str], Sampled], dict[str, list[float]], dict[str, dict[str, Any]], dict[str, Any]]:
        responses: dict[tuple[str, str], Sampled] = {}
        losses: dict[str, list[float]] = {}
        about: dict[str, dict[str, Any]] = {}
        contests: dict[str, Any] = {}
        for name, contestant in self.config.contestants.items():
            field, contest = self._field(contestant)
            if contest:
                contests[name] = contest
            for decoding in self.config.decodings:
                if contestant.best_of is not None and decoding.greedy:
                    continue  # the best of n equal responses is that response
                responses[name, decoding.name] = respond(
                    name, field, self.prompts, decoding, self.scorer, seed=self.round.recipe.seed
                )
            if contestant.best_of is None and contestant.few_shot is None and self.round.recipe.text is not None:
                losses[name] = self._text_losses(field.policy)
            about[name] = {"parameters": count_parameters(field.policy), "kind": _kind(contestant)}
        return responses, losses, about, contests

    def _field(self, contestant: Contestant) -> tuple[Field, list[dict[str, Any]]]:
        policy = self._policy(contestant.model, contestant.stop_texts)
        reference = None if contestant.reference is None else self._policy(contestant.reference, ())
        prefix, contest = "", list[dict[str, Any]]()
        if contestant.few_shot is not None:
            if self.scorer is None:
                raise ConfigError("few_shot needs a reward model to choose the prefix by; train one, or leave it out.")
            prefix, contest = best_prefix(
                policy,
                contestant.few_shot,
                self._examples(contestant.few_shot.source),
                self.round.split("validation"),
                self.scorer,
                self._sampled_decoding(),
                seed=self.round.recipe.seed,
            )
        return Field(contestant=contestant, policy=policy, prefix=prefix, reference=reference), contest

    def _policy(self, name: str, stop_texts: tuple[str, ...]) -> LanguageModel:
        """Load a model; the last two are kept, since contestants share models and references."""
        wanted = str(source_of(self.round, name)), stop_texts
        if wanted not in self._loaded:
            if len(self._loaded) > 1:
                self._loaded.pop(next(iter(self._loaded)))
            self._loaded[wanted] = self.round.load_model(*wanted)
        return self._loaded[wanted]

    def _examples(self, source: str | None) -> list[Demonstration]:
        if source is None:
            return read_demonstrations(self.round.file("2-demonstrations/train.jsonl"))
        return sources.load(source, read_demonstrations, Demonstration, seed=self.round.recipe.seed)

    def _sampled_decoding(self) -> DecodingConfig:
        return next((d for d in self.config.decodings if not d.greedy), self.config.decodings[-1])

    def _text_losses(self, policy: LanguageModel) -> list[float]:
        limit = min(MAX_TEXT_TOKENS, policy.context)
        losses = []
        for text in self.round.held_out_text[: self.config.heldout_texts]:
            pieces = encode_texts([text], policy.tokenizer, max_tokens=limit)
            losses.append(text_loss(policy, pieces, budget=TEXT_BUDGET))
        return losses

    def _main_scorer(self) -> Scorer | None:
        """The reward model that the policies were optimised for: the proxy."""
        rewards = list(self.round.recipe.reward)
        return self.round.scorer(rewards[0]) if rewards else None

    def _gold(self) -> Scorer | None:
        path = self.config.gold
        return None if path is None else FunctionScorer(load_function(path), name=path)

    def _scores(self, responses: Responses, scorer: Scorer | None) -> dict[tuple[str, str], list[float]]:
        if scorer is None:
            return {}
        return {who: scorer(self.prompts, sampled.responses) for who, sampled in responses.items()}

    def _panels(self, responses: Responses, noise: float) -> list[Panel]:
        if self.config.judge_reward is not None:
            return [self._reward_panel(self.config.judge_reward, responses)]
        return [self.round.panel(group, noise=noise) for group in self.config.judges]

    def _reward_panel(self, name: str, responses: Responses) -> Panel:
        """A reward model as the only judge: it prefers what it scores higher."""
        scorer = self.round.scorer(name)
        score_of: dict[tuple[str, str], float] = {}
        for sampled in responses.values():
            for prompt, response, score in zip(
                self.prompts, sampled.responses, scorer(self.prompts, sampled.responses), strict=True
            ):
                score_of[prompt.key, response.text] = score

        def features(prompt: Prompt, response: Response) -> Mapping[str, float]:
            return {"score": score_of[prompt.key, response.text]}

        profile = RaterProfile(name=f"reward-model-{name}", group="held-out", weights={"score": 1.0}, noise=0.0)
        rater = SimulatedRater(profile, self.round.recipe.seed, features)
        return Panel(group="held-out", address="", simulated=(rater,))

    def _ratings(self, responses: Responses, noise: float) -> list[Any]:
        if not self.config.rated or self.config.judge_reward is not None:
            return []
        decoding = self._sampled_decoding().name
        study = self.round.study("evaluation", "ratings", self.inputs)
        panel = self.round.panel("held-out", noise=noise)
        return rate(self.round.service, self.prompts, responses, self.config, panel, decoding=decoding, study=study)

    def _reward_results(self, name: str) -> Path:
        return self.round.file(f"5-reward/{name}/results.json")

    def _reward_pairs(self, name: str) -> list[dict[str, Any]]:
        path = self.round.file(f"5-reward/{name}/pairs.jsonl")
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    def _over_optimization(self, models: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """KL against proxy and gold score, a row for every PPO policy that was evaluated."""
        rows = []
        for name, contestant in self.config.contestants.items():
            variant = contestant.model.removeprefix("policy/").partition(":")[0]
            policy = self.round.recipe.policy.get(variant)
            model = models[name]
            if isinstance(policy, PpoConfig) and model["kl"] is not None and "gold" in model:
                scores = {"proxy": model["proxy_score"], "gold": model["gold"]}
                rows.append({"policy": name, "beta": policy.kl_coef, "kl": max(0.0, model["kl"]), **scores})
        return rows

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
        decoding = self._sampled_decoding().name
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


def _kind(contestant: Contestant) -> str:
    if contestant.best_of is not None:
        return f"best of {contestant.best_of}"
    if contestant.few_shot is not None:
        return "few-shot"
    return contestant.model.partition("/")[0]


__all__ = ["evaluate", "source_of"]
