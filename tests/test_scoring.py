"""Scores of responses by a reward model and by Python functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tests.models import ARCHITECTURES, VOCABULARY, make_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from tastemaker.errors import TrainingError
from tastemaker.model import RewardModel
from tastemaker.packing import Packed, pack
from tastemaker.records import About, Message, Messages, Prompt, Response
from tastemaker.scoring import FunctionScorer, ModelScorer, encode_for_reward, scores_together
from tastemaker.tokenizer import as_messages, wrap_tokenizer

PROMPTS = [
    Prompt(messages=as_messages("w3 w5 w6 w7")),
    Prompt(messages=as_messages("w9"), about=About(id="b", category="qa", extra={"fact": 7})),
    Prompt(messages=(Message("user", "w1"), Message("assistant", "w2"), Message("user", "w4"))),
]
RESPONSES = [Response(text="w11 w12"), Response(text="w13", finished=False), Response(text="", finished=False)]


def make_reward_model(context: int = 2048, prompt_limit: int | None = None) -> RewardModel:
    torch.manual_seed(1)
    settings = {"vocab_size": VOCABULARY, "num_labels": 1, "pad_token_id": 0, "max_position_embeddings": context}
    config = AutoConfig.for_model("llama", **settings | ARCHITECTURES["llama"])
    library = AutoModelForSequenceClassification.from_config(config).eval()
    library.config.reward_offset = 0.5
    library.config.reward_max_prompt_tokens = prompt_limit
    with torch.no_grad():
        library.score.weight.normal_()
    return RewardModel(library, wrap_tokenizer(make_tokenizer()))


@pytest.mark.parametrize(
    ("response", "context", "prompt_limit", "expected"),
    [  # the prompt is <bos> w0 w3 w5 w1, which are 1 4 7 9 5; w11 is 15, <eos> 2
        (Response(text="w11"), 99, None, [1, 4, 7, 9, 5, 15, 2]),
        (Response(text="w11", finished=False), 99, None, [1, 4, 7, 9, 5, 15]),
        (Response(text="w11"), 7, None, [1, 4, 7, 9, 5, 15, 2]),
        (Response(text="w11"), 5, None, [1, 9, 5, 15, 2]),  # <bos> stays, what follows it goes first
        (Response(text="w11"), 2, None, [15, 2]),
        (Response(text="w11"), 3, None, [5, 15, 2]),  # no room for more than the prompt's last
        (Response(text="w11 w12"), 2, None, [16, 2]),
        (Response(text="w11"), 99, 5, [1, 4, 7, 9, 5, 15, 2]),
        (Response(text="w11"), 99, 3, [1, 9, 5, 15, 2]),
        (Response(text="w11 w12 w13"), 99, 3, [1, 9, 5, 15, 16, 17, 2]),  # as much of the prompt as the shorter one's
        (Response(text="w11 w12"), 5, 3, [1, 5, 15, 16, 2]),
    ],
)
def test_what_a_reward_model_reads(
    response: Response, context: int, prompt_limit: int | None, expected: list[int]
) -> None:
    prompt = Prompt(messages=as_messages("w3 w5"))
    assert encode_for_reward(make_reward_model(context, prompt_limit), prompt, response) == expected


@pytest.mark.parametrize("budget", [1, 16, 1000])
def test_scores_come_in_order_however_they_are_batched(budget: int) -> None:
    model = make_reward_model()
    scores = ModelScorer(model, budget=budget)(PROMPTS, RESPONSES)
    with torch.no_grad():
        for prompt, response, score in zip(PROMPTS, RESPONSES, scores, strict=True):
            ids = encode_for_reward(model, prompt, response)
            assert score == pytest.approx(float(model.scores(pack([ids]))), abs=1e-5)
    assert len(set(scores)) == 3


@pytest.mark.parametrize("budget", [1, 16, 30, 1000])
def test_responses_to_one_prompt_read_it_once_and_score_as_alone(budget: int) -> None:
    model, read = make_reward_model(), list[int]()
    prompts = [PROMPTS[0]] * 3 + [PROMPTS[1]] + [PROMPTS[0]]
    responses = [*RESPONSES, RESPONSES[0], Response(text="w14", finished=False)]
    scores = ModelScorer(model, budget=budget)(prompts, responses)
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        assert [score] == pytest.approx(ModelScorer(model, budget=1000)([prompt], [response]), abs=1e-5)
    model.scores = lambda packed: read.append(len(packed.id_N)) or torch.zeros(len(packed.lengths))  # type: ignore[method-assign, func-returns-value]
    ModelScorer(model, budget=budget)(prompts, responses)
    lengths = [len(encode_for_reward(model, *given)) for given in zip(prompts, responses, strict=True)]
    # <bos> w0 w3 w5 w6 w7 w1 is the prompt: 7 tokens that the second and the third response need not read again
    saved = {1: 0, 16: 7, 30: 14, 1000: 14}[budget]  # two of 8 and 7 tokens fit into 16, three of up to 10 into 30
    assert sum(read) == sum(lengths) - saved


def test_a_reward_model_reads_a_prompt_once_for_several_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, read = ModelScorer(make_reward_model(), budget=1000), list[int]()
    by_name = {"sft": RESPONSES, "ppo": RESPONSES[1:] + RESPONSES[:1]}
    expected = {name: scorer(PROMPTS, given) for name, given in by_name.items()}
    scores = RewardModel.scores

    def spied(model: RewardModel, packed: Packed) -> Tensor:
        read.append(len(packed.id_N))
        return scores(model, packed)

    monkeypatch.setattr(RewardModel, "scores", spied)
    found = scores_together(scorer, PROMPTS, by_name)
    for name in by_name:
        assert found[name] == pytest.approx(expected[name], abs=1e-5)
    apart = sum(
        len(encode_for_reward(scorer.model, prompt, response))
        for given in by_name.values()
        for prompt, response in zip(PROMPTS, given, strict=True)
    )
    openings = sum(len(scorer.model.tokenizer.prompt_ids(prompt.messages)) for prompt in PROMPTS)
    assert sum(read) == apart - openings


def test_a_function_is_asked_policy_by_policy() -> None:
    asked = list[list[str]]()

    def by_rank(_: list[Messages], texts: list[str], __: list[Mapping[str, Any]]) -> Sequence[float]:
        asked.append(texts)
        return [sorted(texts).index(text) for text in texts]

    by_name = {"sft": RESPONSES[:2], "ppo": RESPONSES[1:]}
    found = scores_together(FunctionScorer(by_rank, name="rank"), PROMPTS[:2], by_name)
    assert found == {"sft": [0, 1], "ppo": [1, 0]}
    assert asked == [["w11 w12", "w13"], ["w13", ""]]


@pytest.mark.parametrize("budget", [1, 30, 1000])
def test_equal_responses_tie_whatever_shares_their_batches(budget: int) -> None:
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2], PROMPTS[0]]
    responses = [RESPONSES[0], RESPONSES[1], RESPONSES[1], RESPONSES[2], RESPONSES[0]]
    scores = ModelScorer(make_reward_model(), budget=budget)(prompts, responses)
    assert scores[0] == scores[4]
    assert len(set(scores)) == 4


def test_what_was_read_is_scored_by_the_weights_of_now() -> None:
    model = make_reward_model()
    scores = ModelScorer(model, budget=99).read(PROMPTS, RESPONSES)
    before = scores()
    with torch.no_grad():
        model.library.score.weight.mul_(2)
    assert [score + 0.5 for score in scores()] == pytest.approx([2 * (score + 0.5) for score in before], abs=1e-5)


def test_a_prompt_beyond_the_context_is_scored_by_its_end() -> None:
    model = make_reward_model(context=5)
    [score] = ModelScorer(model, budget=100)(PROMPTS[:1], RESPONSES[:1])
    with torch.no_grad():  # <bos> and the last id of the prompt, w1
        assert score == pytest.approx(float(model.scores(pack([[1, 5, 15, 16, 2]]))), abs=1e-5)


def test_a_function_is_told_what_is_known() -> None:
    seen: list[tuple[list[Messages], list[str], list[Mapping[str, Any]]]] = []

    def score(prompts: list[Messages], responses: list[str], records: list[Mapping[str, Any]]) -> Sequence[float]:
        seen.append((prompts, responses, records))
        return [len(response) for response in responses]

    assert FunctionScorer(score, name="length")(PROMPTS[:2], RESPONSES[:2]) == [7.0, 3.0]
    [(prompts, responses, records)] = seen
    assert prompts == [PROMPTS[0].messages, PROMPTS[1].messages]
    assert responses == ["w11 w12", "w13"]
    assert records[1]["fact"] == 7
    assert records[1]["category"] == "qa"
    assert [record["finished"] for record in records] == [True, False]


@pytest.mark.parametrize(
    ("scores", "message"),
    [([1.0], "1 scores for 2"), ([1.0, float("nan")], "nan as a score"), ([float("-inf"), 1.0], "-inf as a score")],
)
def test_a_function_that_answers_wrongly_is_refused(scores: list[float], message: str) -> None:
    with pytest.raises(TrainingError, match=f"mine returned {message}"):
        FunctionScorer(lambda *_: scores, name="mine")(PROMPTS[:2], RESPONSES[:2])


def test_as_many_responses_as_prompts() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ModelScorer(make_reward_model(), budget=10)(PROMPTS, RESPONSES[:1])
