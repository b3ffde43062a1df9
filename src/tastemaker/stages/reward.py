"""The reward model (sections 3.5 and C.2): a scalar head on a language model, trained on rankings by Eq. 1.

All pairs of one prompt's responses form one batch element, so each response goes through the model once per epoch; the
paper found that shuffling the pairs as independent examples overfits in a single pass. Several raters' rankings of the
same responses, in whatever order these stand, are one element too. Ties are dropped. One epoch, cosine to 10 %, 64
prompts a batch. What is one prompt is told by its messages here: an `id` may be the row's, and the rows of several
raters then have several.

After training the offset is set so that the demonstrations score 0 on average (section 3.5; no scaling of variance).
The score is read at the last token: the end token, or the last token of a response that was cut off.

`grouping = "pairs"` trains on shuffled independent pairs instead: the comparison that section 3.5 reports.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tastemaker import processes
from tastemaker.artefacts import CHECKPOINT
from tastemaker.checkpoint import Reader, new_reward_model, save_reward_model
from tastemaker.console import say
from tastemaker.corpus import permutation
from tastemaker.errors import DataError
from tastemaker.files import atomic_write, write_json
from tastemaker.halves import in_part
from tastemaker.losses import ranking_loss
from tastemaker.model import RewardModel
from tastemaker.packing import microbatches, pack
from tastemaker.records import Demonstration, Messages, Prompt, Ranking, Response
from tastemaker.scoring import ModelScorer, encode_all_for_reward
from tastemaker.settings import RewardConfig as RewardConfig
from tastemaker.statistics import accuracy, calibration_curve
from tastemaker.training import Loss, Trainer
from tastemaker.training.loop import ModuleState, run_steps

Shown = tuple[Messages, tuple[Response, ...]]  # what a rater ranked: a prompt and its responses
Scores = Mapping[Shown, Sequence[float]]
GROUPS = ("training_raters", "held_out_raters")


@dataclass(frozen=True, slots=True)
class Element:
    """One batch element: K encoded responses of a prompt, and the ranks that R raters gave them (0 is best)."""

    sequences: tuple[tuple[int, ...], ...]
    ranks: tuple[tuple[int, ...], ...]

    @property
    def cost(self) -> int:
        return max(map(len, self.sequences)) * len(self.sequences)


def train_reward_model(
    folder: Path,
    *,
    config: RewardConfig,
    init: str,
    rankings: Sequence[Ranking],
    validation: Sequence[Ranking] = (),
    held_out_raters: Sequence[Ranking] = (),
    demonstrations: Sequence[Demonstration] = (),
    device: torch.device,
    seed: int,
) -> Path:
    """Train a reward model from `init`; writes `model` and `results.json`. Returns the path of `model`.

    `validation` are rankings of other prompts by the training raters, `held_out_raters` by raters who trained nothing;
    both are only measured on.

    Raises:
        DataError: no ranking has an untied pair, or none of those to measure on.
    """
    rankings = [ranking for ranking in rankings if in_part(ranking.prompt, config.part)]
    if not any(ranking.untied_pairs for ranking in rankings):
        raise DataError("no ranking prefers one response to another, so there is nothing to learn; give untied ones.")
    check_measurable(validation or rankings)
    if held_out_raters:
        check_measurable(held_out_raters)
    folds = rater_folds(rankings, config.cross_validation_folds)
    _say_if_apart(rankings)
    model = new_reward_model(init, seed=seed, max_prompt_tokens=config.max_prompt_tokens).to(device)
    scorer = _scorer(model, config)
    held_out = HeldOut(validation, scorer) if validation else None
    others = HeldOut(held_out_raters, scorer) if held_out_raters else None
    demonstrated = scorer.read([one.prompt for one in demonstrations], [_as_response(one) for one in demonstrations])
    scores = _train(folder, config, model, rankings, held_out, seed, name=f"reward {folder.name}")
    pairs = scored_pairs(scorer, rankings) if held_out is None else held_out.pairs(scores)
    if demonstrations:
        model.offset += float(np.mean(demonstrated()))
    results: dict[str, Any] = {"demonstrations_centred": len(demonstrations), "offset": float(model.offset)}
    results |= measure(pairs)
    write_pairs(folder / "pairs.jsonl", [] if held_out is None else pairs)
    if held_out is None:
        results["on"] = "training rankings"
    if others is not None:
        results["held_out_raters"] = measure(others.pairs(others.scores()))
    if folds:
        results["cross_validation"] = cross_validate(folder, config, init, folds, device, seed)
    save_reward_model(folder / "model", model)
    write_json(folder / "results.json", results)
    return folder / "model"


def as_elements(rankings: Sequence[Ranking], model: RewardModel | Reader) -> list[Element]:
    """Rankings of the same responses to the same prompt together, each response encoded once."""
    groups = grouped(rankings)
    shown = [(group[0].prompt, response) for group in groups for response in group[0].responses]
    encoded = iter(encode_all_for_reward(model, [prompt for prompt, _ in shown], [response for _, response in shown]))
    return [
        Element(tuple(tuple(next(encoded)) for _ in group[0].responses), tuple(ranking.ranks for ranking in group))
        for group in groups
    ]


def grouped(rankings: Sequence[Ranking]) -> list[list[Ranking]]:
    """Rankings of the same responses to the same prompt, together and in one order.

    A wholly tied ranking stays beside others, since `normalize = "all"` counts its pairs; alone it teaches nothing and
    is left out, and so is one that tells responses of one text apart alone.
    """
    groups: dict[Shown, list[Ranking]] = {}
    for ranking in in_one_order(rankings):
        groups.setdefault(_shown(ranking), []).append(ranking)
    return [group for group in groups.values() if any(ranking.untied_pairs for ranking in group)]


def in_one_order(rankings: Sequence[Ranking]) -> list[Ranking]:
    """Rankings of the same responses to the same prompt name these in the order in which the first of them does.

    The rows of raters who disagree about a pair name it chosen first, and so in both orders.
    """
    first: dict[tuple[Messages, frozenset[tuple[Response, int]]], tuple[Response, ...]] = {}
    ordered = []
    for ranking in rankings:
        same = ranking.prompt.messages, frozenset(Counter(ranking.responses).items())
        responses = first.setdefault(same, ranking.responses)
        places = defaultdict[Response, list[int]](list)  # of equal responses in the order in which they come
        for place, response in enumerate(responses):
            places[response].append(place)
        moved = [places[response].pop(0) for response in ranking.responses]
        order = tuple(tuple(moved[index] for index in group) for group in ranking.order)
        ordered.append(replace(ranking, responses=responses, order=order))
    return ordered


def _shown(ranking: Ranking) -> Shown:
    return ranking.prompt.messages, ranking.responses


def _say_if_apart(rankings: Sequence[Ranking]) -> None:
    """Pairs of a prompt in rows of their own are no ranking of it (section 3.5): it is met as often as it has pairs."""
    elements, prompts = len(grouped(rankings)), len({ranking.prompt.messages for ranking in rankings})
    if elements > 2 * prompts:
        say(
            f"  {elements} rankings of different responses have {prompts} prompts between them, and each weighs like a "
            "prompt; where all responses of a prompt were ranked together, give them as one row"
        )


def as_pairs(elements: Sequence[Element], *, seed: int) -> list[Element]:
    """Every untied pair of different responses as an element of its own, shuffled: the wrong way, for comparison."""
    pairs = [
        Element((element.sequences[better], element.sequences[worse]), ((0, 1),))
        for element in elements
        for ranks in element.ranks
        for better in range(len(ranks))
        for worse in range(len(ranks))
        if ranks[better] < ranks[worse] and element.sequences[better] != element.sequences[worse]
    ]
    random.Random(seed).shuffle(pairs)
    return pairs


def _as_response(demonstration: Demonstration) -> Response:
    return Response(text=demonstration.response)


def _train(
    folder: Path,
    config: RewardConfig,
    model: RewardModel,
    rankings: Sequence[Ranking],
    held_out: HeldOut | None,
    seed: int,
    *,
    name: str,
) -> Scores:
    """Train the model; returns the scores of what is held out as they were after the last step."""
    elements, batch_size = as_elements(rankings, model), config.batch_size
    if config.grouping == "pairs":
        pairs = as_pairs(elements, seed=seed)
        batch_size = max(1, round(config.batch_size * len(pairs) / len(elements)))  # as many steps as by prompt
        elements = pairs
    steps_per_epoch = -(-len(elements) // batch_size)
    trainer = Trainer(model, config.optimizer, total_steps=steps_per_epoch * config.epochs)
    scores: Scores = {}

    def step(number: int) -> dict[str, float]:
        nonlocal scores
        epoch, place = divmod(number, steps_per_epoch)
        order = permutation(len(elements), seed=seed, epoch=epoch)
        batch = [elements[index] for index in order[place * batch_size : (place + 1) * batch_size]]
        report = trainer.step(
            _groups(batch, config.microbatch_tokens), partial(element_loss, model, config.normalize), float(len(batch))
        )
        metrics = {
            "loss": report.loss,
            "accuracy": report.sums["correct"] / max(report.sums["pairs"], 1),
            "score_gap": report.sums["gap"] / max(report.sums["pairs"], 1),
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "epoch": (number + 1) / steps_per_epoch,
        }
        if held_out is not None and place == steps_per_epoch - 1:
            scores = held_out.scores()
            metrics |= held_out.curve(scores, config.normalize)
        return metrics

    run_steps(
        folder,
        description=name,
        total=steps_per_epoch * config.epochs,
        states={"model": ModuleState(model), "trainer": trainer},
        step=step,
        checkpoint_every=config.checkpoint_every,
    )
    return scores


def _scorer(model: RewardModel, config: RewardConfig) -> ModelScorer:
    return ModelScorer(model, budget=config.microbatch_tokens, precision=config.optimizer.precision)


def _groups(batch: Sequence[Element], budget: int) -> list[list[Element]]:
    groups = microbatches([element.cost for element in batch], budget=budget, shares=processes.count())
    return [[batch[index] for index in group] for group in groups]


def element_loss(
    model: RewardModel, normalize: Literal["pairs", "all"], batch: Sequence[Element], num_prompts: float
) -> Loss:
    """Eq. 1 summed over the batch's prompts, divided by `num_prompts`; sums of correct pairs, pairs and score gaps.

    All are over untied pairs that the model can tell apart: equal sequences have equal scores.
    """
    groups = [len(element.sequences) for element in batch]
    packed = pack([ids for element in batch for ids in element.sequences], groups=groups).to(model.device)
    score_S = model.scores(packed).cpu()  # a few numbers a prompt, all waited for at once
    total = score_S.new_zeros(())
    sums = dict.fromkeys(("correct", "pairs", "gap"), torch.zeros((), dtype=torch.double))
    score_of: tuple[Tensor, ...] = torch.split(score_S, groups)
    for element, score_K in zip(batch, score_of, strict=True):
        rank_RK = torch.tensor(element.ranks)
        distinct_KK = _distinct(element.sequences)
        total = total + ranking_loss(score_K, rank_RK, distinct_KK, normalize=normalize)
        with torch.no_grad():
            better_KK = (rank_RK[:, :, None] < rank_RK[:, None, :]).sum(0) * distinct_KK
            gap_KK = score_K[:, None] - score_K[None, :]
            sums["correct"] = sums["correct"] + (better_KK * ((gap_KK > 0) + 0.5 * (gap_KK == 0))).sum()
            sums["pairs"] = sums["pairs"] + better_KK.sum()
            sums["gap"] = sums["gap"] + (better_KK * gap_KK).sum()
    return Loss(total / num_prompts, sums)


def _distinct(items: Sequence[object]) -> Tensor:
    """True where two of them differ."""
    return torch.tensor([[one != other for other in items] for one in items])


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPair:
    """An untied pair of responses with different texts, better one first: the gap of their scores."""

    ranking: Ranking
    better: Response
    worse: Response
    gap: float

    @property
    def agreed(self) -> float:
        """1 where the model agrees with the rater, half where the scores are equal."""
        return 1.0 if self.gap > 0 else 0.5 if self.gap == 0 else 0.0


class HeldOut:
    """Rankings that are only measured on, encoded when this is made, so that none is refused after training."""

    def __init__(self, rankings: Sequence[Ranking], scorer: ModelScorer) -> None:
        self.rankings = in_one_order(rankings)
        self._distinct = {_shown(ranking): ranking for ranking in self.rankings}  # several raters may have ranked them
        shown = self._distinct.values()
        prompts: list[Prompt] = [ranking.prompt for ranking in shown for _ in ranking.responses]
        self._score = scorer.read(prompts, [response for ranking in shown for response in ranking.responses])

    def scores(self) -> Scores:
        """Every response's, by the weights of now."""
        scores = iter(self._score())
        return {shown: [next(scores) for _ in ranking.responses] for shown, ranking in self._distinct.items()}

    def pairs(self, scores: Scores) -> list[ScoredPair]:
        """The pairs that raters did not tie."""
        pairs = []
        for ranking in self.rankings:
            score_K = scores[_shown(ranking)]
            for better, worse in ranking.untied_pairs:
                first, second = ranking.responses[better], ranking.responses[worse]
                gap = score_K[better] - score_K[worse]
                pairs.append(ScoredPair(ranking=ranking, better=first, worse=second, gap=gap))
        return pairs

    def curve(self, scores: Scores, normalize: Literal["pairs", "all"]) -> dict[str, float]:
        """Eq. 1, and the share of pairs that the model ranks as their raters did."""
        losses = []
        for group in grouped(self.rankings):
            score_K = torch.tensor(scores[_shown(group[0])], dtype=torch.double)
            rank_RK = torch.tensor([ranking.ranks for ranking in group])
            distinct_KK = _distinct([response.text for response in group[0].responses])
            losses.append(float(ranking_loss(score_K, rank_RK, distinct_KK, normalize=normalize)))
        agreed = [pair.agreed for pair in self.pairs(scores)]
        return {"validation_loss": float(np.mean(losses)), "validation_accuracy": float(np.mean(agreed))}


def scored_pairs(scorer: ModelScorer, rankings: Sequence[Ranking]) -> list[ScoredPair]:
    """Score every response once, and list the pairs that raters did not tie."""
    held_out = HeldOut(rankings, scorer)
    return held_out.pairs(held_out.scores())


def check_measurable(rankings: Sequence[Ranking]) -> None:
    """Refuse rankings with nothing to `measure`, before anything is trained.

    Raises:
        DataError: they have no untied pair of different responses.
    """
    if not any(ranking.untied_pairs for ranking in rankings):
        raise DataError(
            f"none of the {len(rankings)} rankings to measure on has an untied pair of different responses, so there "
            "is no accuracy to tell; give rankings of which one at least prefers a response to another."
        )


def measure(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """Accuracy on untied pairs of responses with different texts, its interval by prompt, and calibration."""
    gaps, agreed = [pair.gap for pair in pairs], [pair.agreed for pair in pairs]
    clusters = [pair.ranking.prompt.messages for pair in pairs]
    estimate = accuracy(agreed, clusters)
    curve = calibration_curve(gaps, agreed, bins=min(8, max(1, len(gaps) // 25)), cluster_N=clusters)
    return {
        "accuracy": estimate.value,
        "n": estimate.n,
        "ci95": [estimate.ci95.low, estimate.ci95.high],
        "log_loss": float(np.mean(np.logaddexp(0, -np.array(gaps)))),
        "calibration": [
            {"predicted": part.predicted, "observed": part.observed.value, "n": part.observed.n} for part in curve.bins
        ],
        "calibration_error": {"expected": curve.expected_error, "by_chance": curve.chance_error},
    }


def write_pairs(path: Path, pairs: Sequence[ScoredPair]) -> None:
    """The held-out pairs with their score gaps, for paired tests against other models."""
    name_of = prompt_names([pair.ranking for pair in pairs])
    with atomic_write(path) as file:
        for pair in pairs:
            row = {
                "prompt": name_of[pair.ranking.prompt.messages],
                "rater": pair.ranking.author.rater,
                "gap": pair.gap,
                "better": pair.better.text,
                "worse": pair.worse.text,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def raters_of(rankings: Sequence[Ranking]) -> list[str]:
    """Who ranked; rankings without a rater's name count as one rater's."""
    return sorted({ranking.author.rater or "" for ranking in rankings})


def prompt_names(rankings: Sequence[Ranking]) -> dict[Messages, str]:
    """One name for each prompt: the key that it first has."""
    name_of: dict[Messages, str] = {}
    for ranking in rankings:
        name_of.setdefault(ranking.prompt.messages, ranking.prompt.key)
    return name_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """One group of raters held out: what is trained on, and on whose rankings of other prompts it is measured."""

    train: list[Ranking]
    own: list[Ranking]
    held_out: list[Ranking]


def rater_folds(rankings: Sequence[Ranking], count: int) -> list[Fold]:
    """Every rater in one of `count` groups, each group held out once.

    No prompt that is measured on is trained on, by whomever it was ranked. So a tenth of the prompts is set aside: of
    those that both groups ranked, and of those that only the training raters did.

    Raises:
        DataError: there are fewer raters than folds, or nothing is left to train or to measure on.
    """
    raters, name_of, folds = raters_of(rankings), prompt_names(rankings), []
    if len(raters) < count:
        raise DataError(
            f"cross_validation_folds is {count}, but the rankings name only {len(raters)} raters; give fewer folds or "
            "more raters."
        )
    for number in range(count):
        out = set(raters[number::count])
        inside = [ranking for ranking in rankings if (ranking.author.rater or "") not in out]
        outside = [ranking for ranking in rankings if (ranking.author.rater or "") in out]
        of_inside, of_outside = prompt_names(inside), prompt_names(outside)
        prompts = sorted(of_inside, key=lambda messages: name_of[messages])
        shared, alone = [one for one in prompts if one in of_outside], [one for one in prompts if one not in of_outside]
        aside = {*_tenth(shared, number), *_tenth(alone, number)}
        trained = {one for one in prompts if one not in aside}
        fold = Fold(
            train=[ranking for ranking in inside if ranking.prompt.messages in trained],
            own=[ranking for ranking in inside if ranking.prompt.messages in aside],
            held_out=[ranking for ranking in outside if ranking.prompt.messages not in trained],
        )
        if not all(any(row.untied_pairs for row in rows) for rows in (fold.train, fold.own, fold.held_out)):
            raise DataError(
                f"cross_validation_folds is {count}, but with a tenth of the prompts set aside fold {number + 1} has "
                "no untied ranking left to train on, or to measure a group of raters on; give more rankings or fewer "
                "folds."
            )
        folds.append(fold)
    return folds


def _tenth(prompts: Sequence[Messages], number: int) -> Sequence[Messages]:
    """Another one for every number up to ten; at least one of them."""
    return prompts[number % min(10, len(prompts)) :: 10] if prompts else ()


def cross_validate(
    folder: Path, config: RewardConfig, init: str, folds: Sequence[Fold], device: torch.device, seed: int
) -> dict[str, Any]:
    """Accuracy on raters who were held out (E.2): does the model learn taste or these people?

    Each fold trains on the rankings of the other folds' raters, and is measured on the held-out raters' rankings and,
    for comparison, on the training raters' own, both of prompts that it did not train on.
    """
    found = []
    for number, fold in enumerate(folds):
        place = folder / CHECKPOINT / f"fold-{number + 1}"
        model = new_reward_model(init, seed=seed + number, max_prompt_tokens=config.max_prompt_tokens).to(device)
        _train(place, config, model, fold.train, None, seed + number, name=f"fold {number + 1}")
        scorer = _scorer(model, config)
        rows_of = zip(GROUPS, (fold.own, fold.held_out), strict=True)
        found.append({group: measure(scored_pairs(scorer, rows))["accuracy"] for group, rows in rows_of})
    return {
        "folds": found,
        **{
            group: {
                "mean": float(np.mean([row[group] for row in found])),
                "standard_error": float(np.std([row[group] for row in found], ddof=1) / len(found) ** 0.5),
            }
            for group in GROUPS
        },
    }
