"""The reward model: Eq. 1 through the whole stage, ties and raters, the offset, accuracy, folds of raters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.conftest import demonstration, prompt, ranking
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from tastemaker.checkpoint import load_reward_model, new_reward_model
from tastemaker.config import from_mapping
from tastemaker.errors import DataError, ModelError
from tastemaker.metrics import read_metrics
from tastemaker.model import RewardModel
from tastemaker.packing import Packed, pack
from tastemaker.records import Messages, Prompt, Ranking, Response, with_about
from tastemaker.scoring import ModelScorer
from tastemaker.stages import reward
from tastemaker.stages.reward import (
    Element,
    HeldOut,
    RewardConfig,
    as_elements,
    as_pairs,
    element_loss,
    measure,
    scored_pairs,
    train_reward_model,
    write_pairs,
)
from tastemaker.tokenizer import Tokenizer
from tastemaker.training import OptimizerConfig, Trainer

CPU = torch.device("cpu")
RANKINGS = [
    ranking(f"w{n} w3", ["w5 w7", f"w6 w{n}", "w6"], ((0,), (1, 2)), rater=f"rater {n % 3}") for n in range(20, 51)
]


def with_row_ids(rows: Sequence[Ranking]) -> list[Ranking]:
    """An `id` that belongs to the row, as many files have it, and not to the prompt."""
    return [replace(row, prompt=with_about(row.prompt, id=str(number))) for number, row in enumerate(rows, 1)]


def config(**changes: Any) -> RewardConfig:
    small: dict[str, Any] = {"batch_size": 5, "optimizer": {"learning_rate": 3e-3}}
    return from_mapping(RewardConfig, small | changes, where="test")


def train(folder: Path, base: str, settings: RewardConfig, rows: Sequence[Ranking] = RANKINGS, **more: Any) -> Any:
    train_reward_model(folder, config=settings, init=base, rankings=rows, device=CPU, seed=4, **more)
    return json.loads((folder / "results.json").read_text())


def test_validation_runs_in_the_precision_of_training(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, set[bool]] = {True: set(), False: set()}

    scores = RewardModel.scores

    def spied(*arguments: Any) -> Any:
        seen[torch.is_grad_enabled()].add(torch.is_autocast_enabled("cpu"))
        return scores(*arguments)

    monkeypatch.setattr(RewardModel, "scores", spied)
    settings = config(optimizer={"learning_rate": 3e-3, "precision": "bfloat16"})
    train(tmp_path / "rm", base, settings, validation=RANKINGS[:5])
    assert seen == {True: {True}, False: {True}}


def gradient(model: RewardModel) -> Tensor:
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat


@pytest.mark.parametrize(("normalize", "divisor"), [("pairs", 2 + 6), ("all", 2 * 6)])
def test_the_gradient_through_the_stage_is_the_enumerated_sum(base: str, normalize: Any, divisor: int) -> None:
    """Four responses, two raters: the first ties two pairs of them away, the second none. 2 + 6 pairs of 2 * 6."""
    model = new_reward_model(base, seed=0)
    texts = ["w5", "w6 w7 w8", "w9 w10", "w11"]
    orders = (((2,), (0, 1, 3)), ((3,), (1,), (0,), (2,)))
    first, second = (ranking("w3 w4", texts, order, rater=str(place)) for place, order in enumerate(orders))
    one_tie_group = ranking("w3 w4", texts, ((0, 2), (1, 3)), rater="c")
    rows = [first, second] if normalize == "all" else [one_tie_group, second]
    (element,) = as_elements(rows, model)
    read, scores = list[int](), model.scores
    model.scores = lambda packed: (read.append(len(packed.id_N)), scores(packed))[1]  # type: ignore[method-assign, func-returns-value]
    loss = element_loss(model, normalize, [element], 3.0)
    model.scores = scores  # type: ignore[method-assign]
    assert read[0] < sum(map(len, element.sequences)), "the prompt is read once for all its responses"
    loss.value.backward()  # type: ignore[no-untyped-call]
    found = gradient(model)

    alone = [model.scores(pack([ids]))[0] for ids in element.sequences]
    kept = []
    for row in rows:
        for i, j in combinations(range(4), 2):
            if row.ranks[i] != row.ranks[j]:
                better, worse = (i, j) if row.ranks[i] < row.ranks[j] else (j, i)
                kept.append(-logsigmoid(alone[better] - alone[worse]))
    pairs = len(kept) if normalize == "pairs" else divisor
    expected = torch.stack(kept).sum() / pairs / 3.0
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss.value.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(found, gradient(model), rtol=1e-4, atol=1e-6)
    assert loss.sums["pairs"] == len(kept)


def test_several_raters_of_the_same_responses_are_one_element(base: str) -> None:
    model = new_reward_model(base, seed=0)
    rows = [
        ranking("w3", ["w5", "w6"], ((0,), (1,)), rater="a"),
        ranking("w3", ["w5", "w6"], ((1,), (0,)), rater="b"),
        ranking("w3", ["w5", "w6"], ((0, 1),), rater="c"),
        ranking("w3", ["w5", "w7"], ((0,), (1,)), rater="a"),
        ranking("w4", ["w5", "w6"], ((0, 1),), rater="a"),
    ]
    expected = [((0, 1), (1, 0), (0, 0)), ((0, 1),)]
    assert [element.ranks for element in as_elements(rows, model)] == expected
    assert [element.ranks for element in as_elements(with_row_ids(rows), model)] == expected


def test_responses_may_stand_in_another_order_in_every_row(base: str) -> None:
    """Of equal responses the first is the first; another end, and another number of the same, are other responses."""
    model = new_reward_model(base, seed=0)
    cut = replace(
        ranking("w3", ["w6", "w5"], ((0,), (1,))), responses=(Response(text="w6", finished=False), Response(text="w5"))
    )
    rows = [
        ranking("w3", ["w7", "w5", "w6", "w5"], ((0,), (1, 2), (3,)), rater="a"),
        ranking("w3", ["w5", "w6", "w5", "w7"], ((0,), (2,), (1, 3)), rater="b"),
        ranking("w3", ["w5", "w6"], ((0,), (1,)), rater="a"),
        cut,
        ranking("w3", ["w5", "w6", "w6"], ((0,), (1, 2)), rater="a"),
    ]
    elements = as_elements(rows, model)
    assert [element.ranks for element in elements] == [((0, 1, 1, 2), (2, 0, 2, 1)), ((0, 1),), ((0, 1),), ((0, 1, 1),)]
    alone = [as_elements([row], model)[0] for row in rows]
    assert elements[0].sequences == alone[0].sequences
    assert elements[2] == alone[3]


def test_held_out_responses_are_scored_once_in_whatever_order_rows_name_them(base: str) -> None:
    """Two raters of three prefer the same response, and each names the preferred one first."""
    rows = [
        ranking("w3", texts, ((0,), (1,)), rater=str(place))
        for place, texts in enumerate((["w5", "w6"], ["w5", "w6"], ["w6", "w5"]))
    ]
    held_out = HeldOut(rows, ModelScorer(new_reward_model(base, seed=0), budget=64))
    ((shown, score_K),) = held_out.scores().items()
    gap = score_K[0] - score_K[1]
    expected = (2 * math.log1p(math.exp(-gap)) + math.log1p(math.exp(gap))) / 3
    assert held_out.curve({shown: score_K}, "pairs")["validation_loss"] == pytest.approx(expected, abs=1e-6)
    assert [pair.gap for pair in held_out.pairs({shown: score_K})] == [gap, gap, -gap]


@pytest.mark.parametrize(("normalize", "divisor"), [("pairs", 3), ("all", 3 * 3)])
def test_a_wholly_tied_ranking_counts_among_all_pairs(base: str, normalize: Any, divisor: int) -> None:
    """Three responses, three raters: the first ties none of the three pairs, the others all of them."""
    model = new_reward_model(base, seed=0)
    texts = ["w5", "w6 w7 w8", "w9 w10"]
    orders = (((1,), (0,), (2,)), ((0, 1, 2),), ((2, 1, 0),))
    rows = [ranking("w3 w4", texts, order, rater=str(place)) for place, order in enumerate(orders)]
    (element,) = as_elements(rows, model)
    loss = element_loss(model, normalize, [element], 1.0)
    score_K = [model.scores(pack([ids]))[0] for ids in element.sequences]
    kept = [-logsigmoid(score_K[better] - score_K[worse]) for better, worse in ((1, 0), (1, 2), (0, 2))]
    assert loss.value.item() == pytest.approx(torch.stack(kept).sum().item() / divisor, abs=1e-6)


def test_pairs_of_one_text_count_nowhere(base: str) -> None:
    """`w5` twice, in between `w6`: of three untied pairs two are of different texts, once in each direction. Tied with
    `w6`, and its better half alone, the second `w5` leaves one of two pairs. Two of one text are no element."""
    model = new_reward_model(base, seed=0)
    rows = [
        ranking("w3", ["w5", "w6", "w5"], ((0,), (1,), (2,))),
        ranking("w4", ["w5", "w6", "w5"], ((0,), (1, 2))),
        ranking("w7", ["w5", "w5"], ((0,), (1,))),
    ]
    three, tied = as_elements(rows, model)
    loss = element_loss(model, "pairs", [three], 1.0)
    assert loss.sums["pairs"] == 2
    assert loss.sums["correct"] == 1, "w6 scores either higher or lower than both"
    once, other = (model.scores(pack([ids])).item() for ids in three.sequences[:2])
    both = math.log1p(math.exp(other - once)) + math.log1p(math.exp(once - other))
    assert loss.value.item() == pytest.approx(both / 2, abs=1e-6)
    once, other = (model.scores(pack([ids])).item() for ids in tied.sequences[:2])
    for normalize, pairs in (("pairs", 1), ("all", 2)):
        found = element_loss(model, normalize, [tied], 1.0).value.item()  # type: ignore[arg-type]
        assert found == pytest.approx(math.log1p(math.exp(other - once)) / pairs, abs=1e-6)
    held_out = HeldOut(rows, ByLength())  # type: ignore[arg-type]
    found = held_out.curve(held_out.scores(), "all")["validation_loss"]
    assert found == pytest.approx((2 / 2 + 1 / 2) / 2 * math.log(2), abs=1e-9), "the texts are of one length"
    with pytest.raises(DataError, match="nothing to learn"):
        train_reward_model(Path(), config=config(), init=base, rankings=rows[2:], device=CPU, seed=0)


def test_responses_are_read_where_they_end(base: str) -> None:
    """A finished response is closed by the end token, a cut one is not: the score is read at another place."""
    model = new_reward_model(base, seed=0)
    cut = Ranking(
        prompt=prompt("w3"), responses=(Response(text="w5"), Response(text="w5 w6", finished=False)), order=((0,), (1,))
    )
    (element,) = as_elements([cut], model)
    assert [ids[-2:] for ids in element.sequences] == [(9, 2), (9, 10)]


def test_shuffled_pairs_are_every_untied_pair_alone(base: str) -> None:
    model = new_reward_model(base, seed=0)
    elements = as_elements(RANKINGS[:4], model)
    pairs = as_pairs(elements, seed=0)
    assert len(pairs) == 4 * 2
    assert all(pair.ranks == ((0, 1),) and len(pair.sequences) == 2 for pair in pairs)
    inside = {(element.sequences[0], element.sequences[other]) for element in elements for other in (1, 2)}
    assert {pair.sequences for pair in pairs} == inside
    assert pairs != as_pairs(elements, seed=1)


def test_shuffled_pairs_leave_out_pairs_of_one_text(base: str) -> None:
    elements = as_elements([ranking("w3", ["w5", "w6", "w5"], ((0,), (1,), (2,)))], new_reward_model(base, seed=0))
    once, twice = elements[0].sequences[:2]
    assert sorted(pair.sequences for pair in as_pairs(elements, seed=0)) == [(once, twice), (twice, once)]


def test_shuffled_pairs_take_as_many_steps_as_prompts(base: str, tmp_path: Path) -> None:
    train(tmp_path / "prompt", base, config())
    train(tmp_path / "pairs", base, config(grouping="pairs"))
    grouped, shuffled = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("prompt", "pairs"))
    assert len(grouped) == len(shuffled) == math.ceil(31 / 5)
    assert grouped[1]["loss"] != shuffled[1]["loss"]


def test_demonstrations_score_0_and_the_offset_is_applied_once(base: str, tmp_path: Path) -> None:
    shown = [demonstration(f"w{n}", f"w{n + 1} w{n + 2}") for n in range(5, 12)]
    results = train(tmp_path, base, config(), demonstrations=shown)
    model = load_reward_model(str(tmp_path / "model"))
    scores = ModelScorer(model, budget=99)([d.prompt for d in shown], [Response(text=d.response) for d in shown])
    assert sum(scores) / 7 == pytest.approx(0, abs=1e-5)
    assert max(scores) - min(scores) > 1e-3
    assert results["demonstrations_centred"] == 7
    assert abs(results["offset"]) > 1e-3
    library = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "model"))
    assert library.config.reward_offset == pytest.approx(results["offset"], abs=1e-7)
    ids = [1, 4, 9, 10, 5, 11, 2]
    with torch.no_grad():
        logit = library(input_ids=torch.tensor([ids])).logits.item()
        assert model.scores(pack([ids])).item() == pytest.approx(logit - results["offset"], abs=1e-5)


def test_a_taste_is_learned_and_measured_on_other_prompts_and_raters(base: str, tmp_path: Path) -> None:
    held_out = [ranking(f"w{n} w4", ["w6 w9", "w5 w8"], ((1,), (0,)), rater="other") for n in range(60, 71)]
    results = train(tmp_path, base, config(epochs=3), validation=RANKINGS[:9], held_out_raters=held_out)
    assert results["n"] == 18
    assert results["accuracy"] == 1.0
    assert results["held_out_raters"]["n"] == 11
    assert results["held_out_raters"]["accuracy"] > 0.8
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["validation_accuracy"] == 1.0
    assert rows[-1]["loss"] < 0.3 < rows[0]["loss"]


class ByLength:
    """Scores a response by its number of words; what was scored is kept."""

    def __init__(self) -> None:
        self.scored = list[str]()

    def read(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Callable[[], list[float]]:
        def scores() -> list[float]:
            self.scored += [response.text for response in responses]
            return [float(len(response.text.split())) for response in responses]

        return scores


def test_accuracy_counts_untied_pairs_of_different_texts() -> None:
    """Right: w1 w2 > w1. Wrong: w1 > w1 w2 w3. Equal scores count half. Tied or equal texts do not count."""
    rows = [
        ranking("w1", ["w1 w2", "w1"], ((0,), (1,))),
        ranking("w2", ["w1", "w1 w2 w3"], ((0,), (1,))),
        ranking("w3", ["w1", "w2"], ((0,), (1,))),
        ranking("w4", ["w1 w2", "w3"], ((0, 1),)),
        ranking("w5", ["w1", "w1", "w2 w3"], ((2,), (0,), (1,))),
    ]
    found = measure(scored_pairs(ByLength(), rows))  # type: ignore[arg-type]
    assert found["n"] == 5
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5 + 1 + 1) / 5)
    gaps = (1, -2, 0, 1, 1)
    assert found["log_loss"] == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in gaps) / 5, abs=1e-9)
    assert found["ci95"][0] < found["accuracy"] < found["ci95"][1]


def test_the_curve_of_held_out_rankings() -> None:
    """Gap 1, seen by two raters in both ways: one prompt. Lengths 1, 2, 4, where the first and last are tied: another.

    Its two untied pairs have gaps of 2 - 1 = 1 and 2 - 4 = -2. The loss is the mean over prompts of means over pairs,
    or of sums over pairs divided by all three. What two raters ranked is scored once, in whatever order it stands.
    """
    rows = [
        ranking("w1", ["w1 w2", "w1"], ((0,), (1,)), rater="one"),
        ranking("w1", ["w1", "w1 w2"], ((0,), (1,)), rater="other"),
        ranking("w2", ["w3", "w3 w4", "w3 w4 w5 w6"], ((1,), (0, 2))),
    ]
    scorer = ByLength()
    held_out = HeldOut(rows, scorer)  # type: ignore[arg-type]
    scores = held_out.scores()
    assert scorer.scored == ["w1 w2", "w1", "w3", "w3 w4", "w3 w4 w5 w6"]
    loss = [math.log1p(math.exp(-gap)) for gap in (1, -1, 1, -2)]
    for normalize, count in (("pairs", 2), ("all", 3)):
        found = held_out.curve(scores, normalize)  # type: ignore[arg-type]
        expected = ((loss[0] + loss[1]) / 2 + (loss[2] + loss[3]) / count) / 2
        assert found["validation_loss"] == pytest.approx(expected, abs=1e-9)
        assert found["validation_accuracy"] == pytest.approx(2 / 4)
    assert [pair.gap for pair in held_out.pairs(scores)] == [1, -1, 1, -2]


def test_held_out_rankings_are_read_once_an_epoch_and_centring_once(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, read = RewardModel.scores, list[int]()

    def spied(model: RewardModel, packed: Packed) -> Tensor:
        if not torch.is_grad_enabled():
            read.append(len(packed.lengths))
        return scores(model, packed)

    monkeypatch.setattr(RewardModel, "scores", spied)
    examples = [demonstration("w3", f"w{n}") for n in range(5, 8)]
    results = train(tmp_path, base, config(epochs=2), validation=RANKINGS[:5], demonstrations=examples)
    distinct = {(row.prompt.messages, response.text) for row in RANKINGS[:5] for response in row.responses}
    assert sum(read) == 2 * len(distinct) + len(examples)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["validation_accuracy"] == pytest.approx(results["accuracy"], abs=1e-12)


@pytest.mark.parametrize("group", ["validation", "held_out_raters"])
def test_held_out_rankings_that_cannot_be_read_are_refused_before_training(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    def refusing(tokenizer: Tokenizer, messages: Messages, **more: Any) -> list[int]:
        if messages[0].content == "w80":
            raise ModelError("the chat template refuses it")
        return prompt_ids(tokenizer, messages, **more)

    prompt_ids = Tokenizer.prompt_ids
    monkeypatch.setattr(Tokenizer, "prompt_ids", refusing)
    with pytest.raises(ModelError, match="refuses"):
        train(tmp_path, base, config(), **{group: [ranking("w80", ["w5", "w6 w7"], ((0,), (1,)))]})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_ids_of_rows_do_not_make_one_prompt_several(tmp_path: Path) -> None:
    """Four raters of five prompts who all agree about one prompt: five clusters, however the rows are called."""
    rows = [
        ranking(f"w{n}", ["w1 w2", "w1"], ((n % 2,), (1 - n % 2,)), rater=f"rater {rater}")
        for n in range(20, 25)
        for rater in range(4)
    ]
    pairs, named = (scored_pairs(ByLength(), given) for given in (rows, with_row_ids(rows)))  # type: ignore[arg-type]
    assert measure(named) == measure(pairs)
    write_pairs(tmp_path / "pairs.jsonl", named)
    written = [json.loads(line)["prompt"] for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert written == [str(4 * place + 1) for place in range(5) for _ in range(4)]


def test_folds_hold_out_raters_and_prompts(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained_on: list[list[Ranking]] = []
    measured_on: list[list[Ranking]] = []

    def no_training(folder: Path, settings: Any, model: Any, rows: list[Ranking], *rest: Any, name: str) -> None:
        trained_on.append(rows)

    def no_scoring(scorer: ModelScorer, rows: list[Ranking]) -> list[Ranking]:
        return rows

    def no_measuring(rows: list[Ranking]) -> dict[str, float]:
        measured_on.append(rows)
        return {"accuracy": 0.5 + len(measured_on) / 100}

    monkeypatch.setattr(reward, "_train", no_training)
    monkeypatch.setattr(reward, "scored_pairs", no_scoring)
    monkeypatch.setattr(reward, "measure", no_measuring)
    folds = reward.rater_folds(RANKINGS, 3)
    results = reward.cross_validate(tmp_path, config(cross_validation_folds=3), base, folds, CPU, 0)
    assert len(results["folds"]) == len(trained_on) == 3
    held_out = []
    for fold in range(3):
        own, others = measured_on[2 * fold], measured_on[2 * fold + 1]
        inside = {row.author.rater for row in trained_on[fold]}
        outside = {row.author.rater for row in others}
        assert not inside & outside
        assert not {row.prompt.key for row in trained_on[fold]} & {row.prompt.key for row in own}
        assert own
        held_out += sorted(outside, key=str)
    assert sorted(held_out, key=str) == ["rater 0", "rater 1", "rater 2"]
    assert results["held_out_raters"]["mean"] == pytest.approx(0.5 + (2 + 4 + 6) / 300)
    assert results["training_raters"]["mean"] == pytest.approx(0.5 + (1 + 3 + 5) / 300)


@pytest.mark.parametrize("prompts", [5, 20, 31])
def test_no_fold_trains_on_a_prompt_that_it_measures_though_every_rater_ranked_it(prompts: int) -> None:
    rows = [
        ranking(f"w{n}", ["w5", f"w6 w{n}"], ((0,), (1,)), rater=f"rater {rater}")
        for n in range(20, 20 + prompts)
        for rater in range(5)
    ]
    asides = []
    for number, fold in enumerate(reward.rater_folds(rows, 5)):
        trained, own, held_out = ({row.prompt.key for row in part} for part in (fold.train, fold.own, fold.held_out))
        assert own == held_out, "both groups are measured on the same prompts"
        assert own
        assert not trained & own
        assert trained | own == {row.prompt.key for row in rows}
        assert {row.author.rater for row in fold.held_out} == {f"rater {number}"}
        assert {row.author.rater for row in fold.own} == {f"rater {n}" for n in range(5) if n != number}
        asides.append(frozenset(own))
    assert len(set(asides)) == 5, "every fold sets others aside"


def test_folds_are_of_conversations_and_not_of_rows() -> None:
    """20 prompts, each ranked by 5 raters, in 100 rows with ids of their own."""
    rows = [
        ranking(f"w{n}", ["w5", f"w6 w{n}"], ((0,), (1,)), rater=f"rater {rater}")
        for n in range(20, 40)
        for rater in range(5)
    ]
    for fold in reward.rater_folds(with_row_ids(rows), 5):
        trained, own, held_out = (
            {row.prompt.messages for row in part} for part in (fold.train, fold.own, fold.held_out)
        )
        assert len(own) == 2
        assert own == held_out
        assert not trained & own
        assert len(trained | own) == 20


def test_the_prompts_set_aside_are_a_tenth_in_the_order_of_their_ids() -> None:
    rows = [
        replace(row, prompt=with_about(row.prompt, id=f"p{99 - n}"))
        for n in range(20)
        for rater in range(2)
        for row in [ranking(f"w{n + 20}", ["w5", f"w6 w{n}"], ((0,), (1,)), rater=f"rater {rater}")]
    ]
    asides = [{row.prompt.key for row in fold.own} for fold in reward.rater_folds(rows, 2)]
    assert asides == [{"p80", "p90"}, {"p81", "p91"}]


TIED = ranking("w3", ["w5", "w6"], ((0, 1),))
ONE_TEXT = ranking("w3", ["w5", "w5"], ((0,), (1,)))


@pytest.mark.parametrize("kind", ["validation", "held_out_raters"])
@pytest.mark.parametrize("row", [TIED, ONE_TEXT], ids=["tied", "one text"])
def test_rankings_that_measure_nothing_are_refused_before_training(
    base: str, tmp_path: Path, kind: str, row: Ranking
) -> None:
    with pytest.raises(DataError, match="none of the 1 rankings to measure on has an untied pair"):
        train(tmp_path, base, config(), **{kind: [row]})
    assert list(tmp_path.iterdir()) == []


def test_a_fold_that_could_compare_nothing_but_one_text_is_refused() -> None:
    rows = [ranking(f"w{n}", ["w5", "w5"], ((0,), (1,)), rater=f"rater {n % 2}") for n in range(20, 40)]
    with pytest.raises(DataError, match="fold 1 has no untied ranking left to train on"):
        reward.rater_folds(rows, 2)


def test_folds_that_leave_nothing_to_measure_are_refused_before_training(base: str, tmp_path: Path) -> None:
    rows = [ranking("w3", ["w5", "w6"], ((0,), (1,)), rater=f"rater {n}") for n in range(2)]
    with pytest.raises(DataError, match="fold 1 has no untied ranking left to train on"):
        train(tmp_path, base, config(cross_validation_folds=2), rows)
    assert list(tmp_path.iterdir()) == []


def test_more_folds_than_raters_are_refused_before_training(base: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cross_validation_folds is 4, but the rankings name only 3 raters"):
        train(tmp_path, base, config(cross_validation_folds=4))
    assert list(tmp_path.iterdir()) == []


def test_pairs_in_rows_of_their_own_are_said_to_weigh_like_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [ranking("w3", [f"w{n}", "w9"], ((0,), (1,))) for n in (5, 6, 7)]
    reward._say_if_apart([*pairs, ranking("w4", ["w5", "w6"], ((0,), (1,)))])
    assert capsys.readouterr().err == "", "four of two prompts"
    reward._say_if_apart(pairs)
    said = "3 rankings of different responses have 1 prompts between them"
    assert said in " ".join(capsys.readouterr().err.split())


def test_scores_are_waited_for_once(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and metrics are worked out of them on the processor."""

    class OnAnotherDevice:
        def __init__(self, score_S: Tensor) -> None:
            self.score_S = score_S

        def cpu(self) -> Tensor:
            fetched.append(len(self.score_S))
            return self.score_S

    model, fetched, scores = new_reward_model(base, seed=0), list[int](), RewardModel.scores
    elements = as_elements(RANKINGS[:3], model)
    monkeypatch.setattr(RewardModel, "scores", lambda self, packed: OnAnotherDevice(scores(self, packed)))
    element_loss(model, "pairs", elements, 3.0)
    assert fetched == [sum(len(element.sequences) for element in elements)]


def test_the_size_of_micro_batches_changes_nothing(base: str) -> None:
    model = new_reward_model(base, seed=0)
    elements = as_elements(RANKINGS[:7], model)
    found = []
    for budget in (1, 40, 10_000):
        trainer = Trainer(model, OptimizerConfig(learning_rate=1.0), total_steps=1)
        groups: list[list[Element]] = reward._groups(elements, budget)
        loss, sums = trainer.accumulate(groups, partial(element_loss, model, "pairs"), 7.0)
        found.append((loss, sums, gradient(model)))
    for loss, sums, grad in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-5)
        assert sums == pytest.approx(found[0][1], abs=1e-4)
        torch.testing.assert_close(grad, found[0][2], rtol=1e-4, atol=1e-5)


def test_equal_scores_are_half_right_while_it_trains_as_well(base: str) -> None:
    model = new_reward_model(base, seed=0)
    torch.nn.init.zeros_(model.library.score.weight)
    sums = element_loss(model, "pairs", as_elements([ranking("w3", ["w5", "w6"], ((0,), (1,)))], model), 1.0).sums
    assert float(sums["correct"]) == 0.5


def test_without_held_out_rankings_there_are_no_held_out_pairs(base: str, tmp_path: Path) -> None:
    """The file is there all the same: an evaluation reads it."""
    rows = [ranking(f"w{number}", ["w5", "w6"], ((0,), (1,))) for number in range(7, 14)]
    train_reward_model(tmp_path, config=config(), init=base, rankings=rows, device=CPU, seed=0)
    assert (tmp_path / "pairs.jsonl").read_text() == ""
    assert json.loads((tmp_path / "results.json").read_text())["on"] == "training rankings"
