"""Pitfalls 57 to 63: reward models, their scale, length, and what they are given to read."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.float64 import Floats, score
from tests.models import make_library, random_sequences
from tests.stages.conftest import demonstration, prompt, ranking
from tests.stages.test_ppo import CPU, config, run_of
from tests.test_tokenizer import train_bpe
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from tastemaker.checkpoint import load_policy, load_reward_model, new_reward_model, save_reward_model
from tastemaker.config import from_mapping
from tastemaker.generation import FinishReason, Rollout
from tastemaker.losses import policy_loss, ranking_loss
from tastemaker.model import RewardModel
from tastemaker.packing import pack
from tastemaker.records import Message, Prompt, Ranking, Response
from tastemaker.scoring import FunctionScorer, ModelScorer, encode_for_reward
from tastemaker.stages import reward
from tastemaker.stages.ppo import PpoRun
from tastemaker.stages.reward import RewardConfig, as_elements, element_loss, measure, scored_pairs, train_reward_model
from tastemaker.tokenizer import Tokenizer

SHOWN = [demonstration(f"w{n}", f"w{n + 1} w{n + 2}") for n in range(5, 12)]
RANKINGS = [ranking(f"w{n} w3", ["w5 w7", f"w6 w{n}", "w6"], ((0,), (1, 2))) for n in range(20, 33)]
PROMPT = prompt("w3 w4")


def train(folder: Path, base: str, rows: Sequence[Ranking] = RANKINGS, **changes: Any) -> dict[str, Any]:
    small: dict[str, Any] = {"batch_size": 5, "optimizer": {"learning_rate": 3e-3}, "checkpoint_every": 1}
    settings = from_mapping(RewardConfig, small | changes, where="test")
    train_reward_model(folder, config=settings, init=base, rankings=rows, demonstrations=SHOWN, device=CPU, seed=4)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def scores_of(model: RewardModel) -> list[float]:
    """Of the demonstrations."""
    return ModelScorer(model, budget=99)([one.prompt for one in SHOWN], [Response(text=one.response) for one in SHOWN])


def given(scores: Sequence[float]) -> FunctionScorer:
    return FunctionScorer(lambda prompts, responses, records: list(scores), name="given")


def rolled_out(run: PpoRun, lengths: Sequence[int]) -> tuple[list[int], list[Rollout]]:
    """Finished responses of these lengths."""
    chosen = list(range(len(lengths)))
    ends = [run.policy.tokenizer.end_id]
    bodies = random_sequences([length - 1 for length in lengths], seed=3)
    return chosen, [
        Rollout(tuple(run.prompt_ids[row]), [*body, *ends], [-0.5] * (len(body) + 1), FinishReason.STOP, 0)
        for row, body in enumerate(bodies)
    ]


# --- scale ----------------------------------------------------------------------------------------------------------


def test_57_the_centring_is_lost_or_done_twice(base: str, tmp_path: Path) -> None:
    """The mean that centres demonstrations on 0 is not saved with the model, or is subtracted by the model and again by
    whoever queries it, so scores are shifted and a KL penalty or a truncation penalty means something else.

    Source: the paper, section 3.5; arXiv 2403.17031.
    Here: `train_reward_model` puts it into the model's `offset`, which `save_reward_model` writes as `reward_offset`;
    `RewardModel.at` alone subtracts it.
    """
    offset = train(tmp_path / "rm", base)["offset"]
    assert abs(offset) > 0.01
    model = load_reward_model(str(tmp_path / "rm" / "model"))
    assert sum(scores_of(model)) / len(SHOWN) == pytest.approx(0, abs=1e-5)
    for copy_number in ("once", "twice"):
        save_reward_model(tmp_path / copy_number, model)
        model = load_reward_model(str(tmp_path / copy_number))
        assert float(model.offset) == pytest.approx(offset, abs=1e-7)
    assert sum(scores_of(model)) / len(SHOWN) == pytest.approx(0, abs=1e-5)
    library = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "twice"))
    ids = encode_for_reward(model, SHOWN[0].prompt, Response(text=SHOWN[0].response))
    logit = float(library(input_ids=torch.tensor([ids])).logits.detach())
    assert scores_of(model)[0] == pytest.approx(logit - offset, abs=1e-5)


def test_57_a_kill_after_the_centring_does_not_centre_twice(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path, model: RewardModel) -> None:
        raise KeyboardInterrupt

    whole = train(tmp_path / "whole", base)
    with monkeypatch.context() as patched:
        patched.setattr(reward, "save_reward_model", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "torn", base)
    assert train(tmp_path / "torn", base)["offset"] == whole["offset"]


@torch.no_grad()
def test_58_the_heads_first_scores_are_next_to_nothing(base: str) -> None:
    """The head is drawn with variance 1/(d+1)^2 instead of 1/(d+1), so first scores are smaller by a factor of
    sqrt(d+1) and the ranking loss starts on a plateau.

    Source: arXiv 2403.17031 (standard deviation 1/sqrt(d+1)); OpenRLHF divides by d+1.
    Here: `checkpoint.new_reward_model` draws with standard deviation 1/sqrt(d+1).
    """
    # d = 48; hidden states leave an RMS norm with squared length 48, so a score has variance 48/49
    models = [new_reward_model(base, seed=seed) for seed in range(11)]
    weight = torch.cat([model.library.score.weight.flatten() for model in models]).double()
    assert float(weight.std()) == pytest.approx(1 / 7, rel=0.1)  # of 528 draws it is known to 3 %
    assert abs(float(weight.mean())) < 4 / 7 / 528**0.5
    packed = pack(random_sequences([5, 2, 7]))
    squares = torch.stack([model.scores(packed).square() for model in models])
    assert 0.5 < float(squares.mean()) < 2


# --- rankings -------------------------------------------------------------------------------------------------------

FIVE = ranking("w3 w4", ["w5", "w6 w7", "w8 w9 w10", "w11", "w12 w13"], ((1,), (0, 3), (2,), (4,)))
TWO = ranking("w8", ["w5 w6", "w7"], ((1,), (0,)))


def last_hidden(model: RewardModel, ids: Sequence[int]) -> Floats:
    trunk = copy.deepcopy(model.library.base_model).double()
    with torch.no_grad():
        hidden_TD: Tensor = trunk(input_ids=torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0]
    return hidden_TD[-1].numpy()


@pytest.mark.parametrize(("normalize", "divisor"), [("pairs", 9), ("all", 10)])
def test_59_prompts_with_more_responses_weigh_more(base: str, normalize: Any, divisor: int) -> None:
    """The loss sums a prompt's pairs, or shuffles them as independent examples: a prompt with nine responses weighs 36
    times one with two, and each response is trained on K - 1 times in one epoch, which overfits.

    Source: the paper, section 3.5.
    Here: all pairs of a prompt are one batch element, `losses.ranking_loss` is their mean, and ties have no pair.
    """
    # With a head of zeros every pair's loss is log 2, and its gradient for the head -1/2 (better - worse hidden state).
    model = new_reward_model(base, seed=0)
    torch.nn.init.zeros_(model.library.score.weight)
    elements = as_elements([FIVE, TWO], model)
    loss = element_loss(model, normalize, elements, 2.0)
    loss.value.backward()  # type: ignore[no-untyped-call]
    slope, kept = np.zeros(48), 0
    for row, element, share in zip((FIVE, TWO), elements, (divisor, 1), strict=True):
        hidden = [last_hidden(model, ids) for ids in element.sequences]
        for i, j in combinations(range(len(hidden)), 2):
            if row.ranks[i] != row.ranks[j]:
                better, worse = (i, j) if row.ranks[i] < row.ranks[j] else (j, i)
                slope -= 0.5 * (hidden[better] - hidden[worse]) / share / 2
                kept += 1
    assert kept == 9 + 1, "one of the ten pairs of five responses is tied"
    assert loss.value.item() == pytest.approx(math.log(2) * (9 / divisor + 1) / 2, abs=1e-6)
    found = model.library.score.weight.grad[0].tolist()
    assert found == pytest.approx(slope.tolist(), abs=1e-5)
    assert np.abs(slope).max() > 0.1


def test_59_a_response_is_read_once_in_the_one_epoch(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [replace(FIVE, prompt=prompt(f"w{n}")) for n in range(20, 27)]
    read, scores = list[int](), RewardModel.scores

    def watched(model: RewardModel, packed: Any) -> Tensor:
        if torch.is_grad_enabled():
            read.append(len(packed.lengths))
        return scores(model, packed)

    monkeypatch.setattr(RewardModel, "scores", watched)
    train(tmp_path / "rm", base, rows)
    assert sum(read) == 7 * 5, "by default one epoch, in which every response is read once and not in four pairs"


def test_59_rows_of_raters_who_disagree_are_one_element(base: str) -> None:
    """Written chosen first, a vote of two to one is learned as such and weighs as one prompt: with a head of zeros its
    gradient is -1/2 (h5 - h6) (2 - 1) / 3, and at the optimum h5 scores log 2 more than h6."""
    model = new_reward_model(base, seed=0)
    torch.nn.init.zeros_(model.library.score.weight)
    votes = [("w5", "w6"), ("w5", "w6"), ("w6", "w5")]
    rows = [ranking("w3", both, ((0,), (1,)), rater=str(number)) for number, both in enumerate(votes)]
    elements = as_elements([*rows, TWO], model)
    assert [element.ranks for element in elements] == [((0, 1), (0, 1), (1, 0)), ((1, 0),)]
    element_loss(model, "pairs", elements[:1], 1.0).value.backward()  # type: ignore[no-untyped-call]
    hidden = [last_hidden(model, ids) for ids in elements[0].sequences]
    found = model.library.score.weight.grad[0].tolist()
    assert found == pytest.approx((-0.5 * (hidden[0] - hidden[1]) / 3).tolist(), abs=1e-6)
    gap = torch.tensor(math.log(2), requires_grad=True)
    ranking_loss(torch.stack([gap, torch.zeros(())]), torch.tensor(elements[0].ranks)).backward()  # type: ignore[no-untyped-call]
    assert float(gap.grad) == pytest.approx(0, abs=1e-6)  # type: ignore[arg-type]


@torch.no_grad()
def test_60_ties_are_counted_as_right(base: str) -> None:
    """Accuracy counts pairs of one text, or equal scores as right; and scores rounded to bf16 tie where they should
    not, or depend on what shares their batch.

    Source: no system is named.
    Here: `reward.measure` leaves out pairs of one text and counts equal scores half; `RewardModel.at` has its head in
    fp32 whatever the trunk runs in.
    """
    model = new_reward_model(base, seed=0)
    torch.nn.init.zeros_(model.library.score.weight)
    rows = [*RANKINGS[:5], ranking("w9", ["w5", "w5", "w6"], ((0,), (1,), (2,)))]
    found = measure(scored_pairs(ModelScorer(model, budget=99), rows))
    assert (found["accuracy"], found["n"]) == (0.5, 5 * 2 + 2)


@torch.no_grad()
def test_60_scores_in_bf16_are_not_rounded_to_bf16(base: str) -> None:
    model = new_reward_model(base, seed=0)
    responses = [Response(text=f"w{n}") for n in range(5, 16)]
    scores = ModelScorer(model, budget=999, precision="bfloat16")([PROMPT] * 11, responses)
    packed = pack([encode_for_reward(model, PROMPT, response) for response in responses], groups=[11])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden_SD = model.trunk.hidden(packed).index_select(0, packed.last_S)
    exact_S = hidden_SD.double() @ model.library.score.weight[0].double()
    assert scores == pytest.approx(exact_S.tolist(), abs=1e-5)
    rounded = torch.tensor(scores).bfloat16().float()
    assert (rounded - torch.tensor(scores)).abs().max() > 1e-4


@torch.no_grad()
def test_60_a_score_does_not_depend_on_what_shares_its_batch(base: str) -> None:
    model = new_reward_model(base, seed=0)
    responses = [Response(text=" ".join(f"w{n}" for n in range(5, 5 + length))) for length in (1, 13, 2, 7)]
    prompts = [PROMPT, PROMPT, SHOWN[0].prompt, PROMPT]
    exact = [score(model, encode_for_reward(model, *both)) for both in zip(prompts, responses, strict=True)]
    for budget in (1, 40, 999):
        assert ModelScorer(model, budget=budget)(prompts, responses) == pytest.approx(exact, abs=1e-5)


# --- scores in PPO --------------------------------------------------------------------------------------------------


def test_61_a_clip_hides_scores_of_another_scale(base: str) -> None:
    """Scores are clipped to a few units and nobody is told how many were, so a reward model of another scale trains the
    policy on signs alone.

    Source: DeepSpeed-Chat clips at 5, PKU safe-rlhf at 50.
    Here: no score is clipped (`losses.shaped_rewards`); `score` is logged as it is, and the clips that there are (of
    ratios and values) log the share of tokens that they stopped.
    """
    run = run_of(base, kl_coef=0.0, minibatches=1, batch_size=5, inner_epochs=1)
    lengths, scores = (2, 3, 5, 7, 4), [300.0, -170.0, 0.25, 900.0, -40.0]
    run.scorer = given(scores)
    experience, metrics = run.observe(*rolled_out(run, lengths), 1)
    last = [float(experience.return_BT[row, length - 1]) for row, length in enumerate(lengths)]
    assert last == pytest.approx(scores, rel=1e-5)
    assert metrics["score"] == pytest.approx(198.05)
    # Had values risen by .5 since the rollout, the clip of .2 would stop those with high returns and no others.
    risen = replace(experience, value_BT=experience.value_BT - 0.5)
    found = run.update(risen, 0)["value_clip_fraction"]
    # The clipped value, .2 above the old one, is farther from returns beyond the middle of it and the value now.
    high_M = (experience.return_BT > experience.value_BT - 0.15)[experience.mask_BT]
    assert found == pytest.approx(float(high_M.float().mean()), abs=1e-6)
    assert 0 < found < 1


def test_62_a_mean_per_response_favours_the_short_and_right(base: str) -> None:
    """The loss is a mean over each response's tokens and then over responses, so a token of a long bad response is
    punished less than one of a short one, and wrong answers grow.

    Source: arXiv 2503.20783 (Dr. GRPO); huggingface/trl#3138, volcengine/verl#2435; OpenRLHF/OpenRLHF#236.
    Here: `losses.policy_loss` is a mean over all response tokens of the minibatch (`PpoRun` counts them), so a token
    weighs the same in every response; `length_correlation` logs how scores go with length. A mean over responses is no
    option: nothing in the paper or its predecessors asks for one.
    """
    # Two tokens of advantage 1, five of -1: as a mean over tokens -(2 - 5) / 7 = 3/7, as one over responses 0.
    mask_BT = torch.arange(5) < torch.tensor([[2], [5]])
    advantage_BT, old_BT = torch.tensor([[1.0], [-1.0]]).expand(2, 5), torch.full((2, 5), -0.5)
    logprob_BT = old_BT.clone().requires_grad_()
    loss = policy_loss(logprob_BT, old_BT, advantage_BT, mask_BT, clip=0.2, num_tokens=7)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(3 / 7, abs=1e-6)
    assert logprob_BT.grad is not None
    torch.testing.assert_close(logprob_BT.grad, -advantage_BT * mask_BT / 7, rtol=0, atol=1e-7)
    run = run_of(base)
    run.scorer = given([1.0, 2.0])
    experience, _ = run.observe(*rolled_out(run, (2, 5)), 1)
    experience = replace(experience, advantage_BT=advantage_BT * experience.mask_BT)
    report, _ = run._policy_step(experience, [0, 1], 0)
    assert report.sums["policy_loss"] == pytest.approx(3 / 7, abs=1e-4)


@pytest.mark.parametrize("scores", [(1.5, -2.0, 0.5, 4.0, 3.0), (3.0, 2.0, 1.0, -2.0, 2.5), (2.0, 2.0, 2.0, 2.0, 2.0)])
def test_62_length_is_logged_beside_score(base: str, scores: Sequence[float]) -> None:
    run, lengths = run_of(base), (2, 3, 5, 7, 4)
    run.scorer = given(scores)
    _, metrics = run.observe(*rolled_out(run, lengths), 1)
    assert metrics["response_tokens"] == pytest.approx(4.2)
    expected = 0.0 if len(set(scores)) == 1 else float(np.corrcoef(scores, lengths)[0, 1])
    assert metrics["length_correlation"] == pytest.approx(expected, abs=1e-6)


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy of byte pairs: it can write any text, spaces and control tokens too."""
    folder: Path = tmp_path_factory.mktemp("bytes") / "model"
    tokenizer = train_bpe()
    make_library(vocabulary=len(tokenizer), max_position_embeddings=256).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def sampled_as(tokenizer: Tokenizer, text: str, *, finished: bool) -> list[int]:
    """Ids that a policy might have sampled for a text, its control tokens as such."""
    ids = tokenizer.library.encode(text, add_special_tokens=False)
    return [*ids, tokenizer.end_id] if finished else list(ids)


class Listener:
    """A scorer that remembers what it was given."""

    def __init__(self) -> None:
        self.prompts, self.responses = list[Prompt](), list[Response]()

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        self.prompts, self.responses = list(prompts), list(responses)
        return [1.0] * len(responses)


TEXTS = ("  the cat\n\n", "the cat<|endoftext|> sat ", "a  b , c .", "naïve ☃ <b>", "")


def test_63_the_reward_model_reads_another_text(bytes_base: str) -> None:
    """The text that is scored is stripped of spaces and control tokens, or its prompt is cut off, so the reward is for
    something that the policy did not write.

    Source: no system is named; see OpenRLHF's remote reward models.
    Here: `responses.as_response` decodes exactly the sampled ids without the stop token that ends them, and
    `scoring.encode_for_reward` encodes the prompt, its end where the model was trained on no more, and all of that
    text, control tokens in it as text.
    """
    talk = Prompt(messages=(Message("system", " Be kind.\n"), Message("user", " the mat?  <|im_end|>\n")))
    asked, heard = [talk] * 5, Listener()
    run = PpoRun(config(batch_size=5, minibatches=1), bytes_base, None, heard, asked, (), (), CPU, 3)
    tokenizer = run.policy.tokenizer
    rollouts = list[Rollout]()
    for row, text in enumerate(TEXTS):
        ids = sampled_as(tokenizer, text, finished=row % 2 == 0)
        finish = FinishReason.STOP if row % 2 == 0 else FinishReason.LENGTH
        rollouts.append(Rollout(tuple(run.prompt_ids[row]), ids, [-1.0] * len(ids), finish, 0))
    run.observe(list(range(5)), rollouts, 1)
    assert [response.text for response in heard.responses] == list(TEXTS)
    assert [response.finished for response in heard.responses] == [True, False, True, False, True]
    assert heard.prompts == asked

    model = new_reward_model(bytes_base, seed=0)
    opening = (
        "<|im_start|>system\n Be kind.\n<|im_end|>\n<|im_start|>user\n the mat?  <|im_end|>\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    for response in heard.responses:
        ids = encode_for_reward(model, talk, response)
        assert tokenizer.decode(ids) == opening + response.text + ("<|im_end|>" if response.finished else "")
        control = [token for token in ids if token in tokenizer.library.all_special_ids or token == ids[0]]
        assert len(control) == 5 + response.finished, "what users and the policy wrote is text"


def test_63_a_tail_of_bytes_is_decoded_as_it_stands(bytes_base: str) -> None:
    """A response that is cut off amid a character's bytes, and a stop token that stands inside, are shown."""
    policy = load_policy(bytes_base)
    snow = sampled_as(policy.tokenizer, "☃", finished=False)
    assert len(snow) == 3
    assert policy.tokenizer.response_text([*snow, *snow[:2]]) == "☃�"
    end = policy.tokenizer.end_id
    assert policy.tokenizer.response_text([snow[0], end, *snow, end]) == "�<|im_end|>☃"


def test_63_what_the_context_cuts_off_is_said(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompt <bos> w0 w3 w4 w1 has 5 ids; with four words and an end token that is 10, beyond a context of 9."""
    model = new_reward_model(base, seed=0)
    model.library.config.max_position_embeddings = 9
    texts = ["w5 w6 w7 w8", "w5 w6 w7"]
    said = "1 of 2 prompts with a response are longer than the reward model's context of 9; of those it reads the end"
    ModelScorer(model, budget=99)([PROMPT] * 2, [Response(text=text) for text in texts])
    assert said in capsys.readouterr().err
    (element,) = as_elements([ranking("w3 w4", texts, ((0,), (1,)))], model)
    assert said in capsys.readouterr().err
    assert element.sequences == ((1, 7, 8, 5, 9, 10, 11, 12, 2), (1, 4, 7, 8, 5, 9, 10, 11, 2))
    ModelScorer(model, budget=99)([PROMPT], [Response(text=texts[1])])
    assert capsys.readouterr().err == ""
