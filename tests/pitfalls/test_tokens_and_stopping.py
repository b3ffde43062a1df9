"""Pitfalls 1 to 8: what the loss covers, where the score is read, how responses end, where padding stands.

The models are random and tiny; their pad token is their end token, as it is in many base models. Ids by hand: a prompt
is <bos> (1), w0 (4) before a user's words, and w1 (5), where the assistant speaks; the id of wN is N + 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import VOCABULARY, make_library, make_policy, make_tokenizer, random_sequences, save_model
from tests.stages.conftest import demonstration, prompt, ranking
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tastemaker.checkpoint import load_policy, load_reward_model, new_reward_model, save_policy, save_reward_model
from tastemaker.config import from_mapping
from tastemaker.generation import FinishReason, Generator, Rollout, Sampling
from tastemaker.generation.decoding import Path as DecodingPath
from tastemaker.model import LanguageModel, RewardModel, Trunk
from tastemaker.packing import Packed, pack, pad_rows
from tastemaker.records import Message, Prompt, Ranking, Response, Text
from tastemaker.responses import as_response, sample_responses
from tastemaker.scoring import FunctionScorer, ModelScorer, encode_for_reward
from tastemaker.settings import DecodingConfig, DpoConfig, PpoConfig, SftConfig
from tastemaker.shapes import rankings_in
from tastemaker.stages.dpo import as_pairs, pair_logprobs
from tastemaker.stages.ppo import PpoRun
from tastemaker.stages.reward import as_elements
from tastemaker.stages.sft import demonstration_loss, encode_demonstrations, train_sft
from tastemaker.tokenizer import wrap_tokenizer
from tastemaker.training import Trainer

CPU = torch.device("cpu")
END = 2
OTHER_STOPS = range(20, 40)  # so many that a random model soon samples one
PROMPTS = [prompt(f"w{number} w{number + 1}" + " w9" * (number % 3)) for number in range(3, 10)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random policy of 97 words with a context of 64 tokens."""
    folder = tmp_path_factory.mktemp("base") / "model"
    return str(save_model(folder, pad_is_eos=True, max_position_embeddings=64))


def run_of(base: str, *, prompts: Sequence[Prompt] = PROMPTS, texts: Sequence[Text] = (), **changes: Any) -> PpoRun:
    """A run in which every response scores 2 and the reward is the score: no KL, discount, lambda or whitening."""
    steady = {"learning_rate": 0.05, "schedule": "constant", "epsilon": 1.0}
    plain: dict[str, Any] = {
        "init": "",
        "reward": "",
        "iterations": 2,
        "batch_size": 6,
        "minibatches": 1,
        "decoding": {"max_new_tokens": 5},
        "policy": steady,
        "value": steady,
        "warmup_iterations": 0,
        "kl_coef": 0.0,
        "lam": 1.0,
        "whiten_advantages": False,
    }
    scorer = FunctionScorer(lambda prompts, responses, records: [2.0] * len(responses), name="two")
    config = from_mapping(PpoConfig, plain | changes, where="test")
    return PpoRun(config, base, None, scorer, prompts, texts, (), CPU, 3)


@torch.no_grad()
def logprobs_by_hand(library: Any, ids: Sequence[int], start: int) -> list[float]:
    """Of the tokens from `start` on, by the library on this sequence alone, in float64, over the words only."""
    logit_TV = library(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, :, :VOCABULARY].double()
    logprob_TV = logit_TV.log_softmax(-1)
    return [float(logprob_TV[place - 1, ids[place]]) for place in range(start, len(ids))]


@torch.no_grad()
def score_by_hand(model: RewardModel, ids: Sequence[int]) -> float:
    """The head on the last hidden state of this sequence alone, by the library, minus the offset."""
    hidden_TD = model.library.base_model(input_ids=torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0]
    return float(hidden_TD[-1].double() @ model.library.score.weight[0].double()) - float(model.offset)


# --- 1: the end token and the pad token ------------------------------------------------------------------------------


def test_01_the_end_token_is_learned_though_it_is_the_pad_token(base: str) -> None:
    """The mask is made of the pad token's id, which is the end token's too, so the model never learns to stop.

    Source: arXiv 2403.17031, microsoft/DeepSpeedExamples#490, huggingface/trl#5303.
    Here: `packing.Packed.predicted` goes by the lengths of sequences; no mask is made of ids.
    """
    policy = load_policy(base)
    assert policy.tokenizer.library.pad_token_id == policy.tokenizer.end_id == END
    (example,) = encode_demonstrations([demonstration("w5 w6", "w7 w8 w9")], policy.tokenizer, context=64)
    of_response = logprobs_by_hand(policy.library, [1, 4, 9, 10, 5, 11, 12, 13, END], start=5)
    assert demonstration_loss(policy, [example], budget=99) == pytest.approx(-sum(of_response) / 4, abs=1e-5)


def test_01_the_end_tokens_own_embedding_learns_though_it_is_the_pad_tokens(base: str, tmp_path: Path) -> None:
    """The library gives the padding's embedding no gradient. Where that is the end token's, the place at which a reward
    model is read, and at which turns of a conversation end, is an input that stays as it was.

    Here: `model._let_every_row_learn`; no padding has a gradient anyhow, whatever its id.
    """
    policy = load_policy(base)
    assert policy.library.config.pad_token_id == END
    reward = new_reward_model(base, seed=1)
    save_reward_model(tmp_path, reward)
    for model in (policy, reward, load_reward_model(str(tmp_path))):
        packed, weight = pack([[5, END, 6, 7, END]]), model.library.get_input_embeddings().weight
        read = model.scores(packed) if isinstance(model, RewardModel) else policy.hidden(packed)[-1]
        (gradient,) = torch.autograd.grad(read.square().sum(), weight)
        assert gradient[END].abs().max() > 1e-6


def test_01_after_overfitting_one_sample_generation_stops(base: str, tmp_path: Path) -> None:
    """One demonstration learned by heart is said again and ended, where the end token is the pad token."""
    small = {"epochs": 40, "batch_size": 1, "residual_dropout": 0.0, "optimizer": {"learning_rate": 1e-2}}
    config = from_mapping(SftConfig, small | {"keep_epochs": "last"}, where="test")
    rows = [demonstration("w5 w6", "w7 w8 w7")]
    model = train_sft(tmp_path, config=config, base=base, demonstrations=rows, device=CPU, seed=2)
    decoding = DecodingConfig(max_new_tokens=11, greedy=True)
    ((response,),) = sample_responses(
        load_policy(str(model)), [prompt("w5 w6")], n=1, decoding=decoding, seed=0, purpose="test"
    )
    assert response == Response(text="w7 w8 w7", finished=True)


def test_01_ppo_trains_on_the_end_token_though_it_is_the_pad_token(base: str) -> None:
    run = run_of(base, prompts=[prompt("w5 w6")])
    ids = tuple(run.prompt_ids[0])
    rollouts = [
        Rollout(ids, [12, END], [-1.0] * 2, FinishReason.STOP, 0),
        Rollout(ids, [12, 13, 14, 15], [-1.0] * 4, FinishReason.LENGTH, 0),
    ]
    experience, _ = run.observe([0, 0], rollouts, 1)
    assert experience.mask_BT.tolist() == [[True, True, False, False], [True] * 4]


def test_01_dpo_reads_the_end_token_though_it_is_the_pad_token(base: str) -> None:
    policy = load_policy(base)
    pairs = as_pairs([ranking("w5 w6", ["w7 w8", "w9"], ((0,), (1,)))], policy)
    adam = from_mapping(DpoConfig, {"init": ""}, where="test")
    trainer = Trainer(policy, adam.optimizer, total_steps=1)
    ends = ([11, 12, END], [13, END])
    by_hand = [sum(logprobs_by_hand(policy.library, [1, 4, 9, 10, 5, *ids], start=5)) for ids in ends]
    assert pair_logprobs(policy, pairs, adam, trainer)[0].tolist() == pytest.approx(by_hand, abs=1e-5)


def test_01_the_mix_is_trained_on_the_end_of_a_document_though_it_is_the_pad_token(base: str) -> None:
    run = run_of(base, texts=[Text(text="w3 w4 w5 " * 9)], ptx_coef=0.5)
    by_hand = logprobs_by_hand(run.policy.library, [10, 11, END], start=1)
    loss = run._ptx_loss(pack([[10, 11, END]]), 2.0).value.item()
    assert loss == pytest.approx(-0.5 * sum(by_hand) / 2, abs=1e-5)


# --- 2: where the score is read --------------------------------------------------------------------------------------

# The assistant's turn is closed by the end token, which is the pad token, in the middle of the prompt.
TALK = Prompt(messages=(Message("user", "w5"), Message("assistant", "w6"), Message("user", "w7")))
SCORED = [
    (TALK, Response(text="w8"), [1, 4, 9, 5, 10, END, 4, 11, 5, 12, END]),
    (TALK, Response(text="w9 w10 w11 w12", finished=False), [1, 4, 9, 5, 10, END, 4, 11, 5, 13, 14, 15, 16]),
    (prompt("w3"), Response(text="w14 w15"), [1, 4, 7, 5, 18, 19, END]),
]


def judge_from(base: str, **options: Any) -> RewardModel:
    model = new_reward_model(base, seed=5, **options)
    model.offset += 0.375
    return model


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", [1, 29, 1000])
def test_02_the_score_is_that_of_the_sequence_alone(base: str, budget: int, padded: bool) -> None:
    """The score is read at the padding, one token too early, or at the first pad token, in the middle of a prompt.

    Source: microsoft/DeepSpeedExamples#672, OpenRLHF/OpenRLHF#300, huggingface/trl#2778, huggingface/trl#6952.
    Here: `packing.Packed.last_S` is worked out from the lengths, in whatever layout the model is run.
    """
    model = judge_from(base)
    if padded:
        model.trunk = Trunk(model.library, padded=True)
    prompts, responses, sequences = zip(*SCORED, strict=True)
    expected = [score_by_hand(model, ids) for ids in sequences]
    assert ModelScorer(model, budget=budget)(prompts, responses) == pytest.approx(expected, abs=1e-5)
    assert all(abs(one - other) > 0.01 for one, other in pairwise(sorted(expected)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [13, 19])
@torch.no_grad()
def test_02_the_library_reads_a_saved_model_at_the_same_token(base: str, tmp_path: Path, side: str, width: int) -> None:
    """Padded on either side by any amount, with the pad id that the saved config names."""
    model = judge_from(base)
    save_reward_model(tmp_path / "saved", model)
    library = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "saved"))
    for _, _, ids in SCORED:
        padding, ones = [library.config.pad_token_id] * (width - len(ids)), [1] * len(ids)
        zeros = [0] * len(padding)
        row, mask = (padding + ids, zeros + ones) if side == "left" else (ids + padding, ones + zeros)
        logit = library(input_ids=torch.tensor([row]), attention_mask=torch.tensor([mask])).logits[0, 0]
        assert float(logit) - 0.375 == pytest.approx(score_by_hand(model, ids), abs=1e-5)


# --- 3: the same ending in training and at the rollout ---------------------------------------------------------------


def test_03_a_reward_model_is_asked_as_it_was_trained(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained with the end token behind every response and asked without it, or the other way round, a reward model
    scores texts that it has never seen.

    Source: OpenRLHF/OpenRLHF#300.
    Here: `scoring.encode_for_reward` makes the ids of both, from a response that carries whether it was finished.
    """
    run, judge, asked = run_of(base, prompts=[prompt("w5")]), judge_from(base), list[tuple[int, ...]]()
    scores = judge.scores

    def spy(packed: Packed) -> torch.Tensor:
        rows = zip(packed.padded_ST, packed.lengths, strict=True)
        asked.extend(tuple(packed.id_N[row_T[:length]].tolist()) for row_T, length in rows)
        return scores(packed)

    monkeypatch.setattr(judge, "scores", spy)
    opening = (1, 4, 9, 5)
    assert tuple(run.prompt_ids[0]) == opening
    stopped = Rollout(opening, [12, 13, 14, END], [-1.0] * 4, FinishReason.STOP, 0)
    cut = Rollout(opening, [15, 16], [-1.0] * 2, FinishReason.LENGTH, 0)
    responses = tuple(as_response(run.policy, rollout) for rollout in (stopped, cut))
    ranking = Ranking(prompt=prompt("w5"), responses=responses, order=((1,), (0,)))
    (trained_on,) = as_elements(rankings_in(ranking.to_json()), judge)  # as raters' answers lie in a file
    run.scorer = ModelScorer(judge, budget=1)
    run.observe([0, 0], [stopped, cut], 1)
    assert list(trained_on.sequences) == asked == [(*opening, 12, 13, 14, END), (*opening, 15, 16)]


# --- 4: responses that were cut off ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("truncated", "lost"), [("penalty", 1.5), ("score", 0.0), ("mask", 0.0)])
def test_04_only_a_response_that_was_cut_off_is_treated_as_one(base: str, truncated: str, lost: float) -> None:
    """A response that was cut off is credited as though it were whole; or one that ended with another stop token than
    the tokenizer's, or at the limit, counts as cut off.

    Source: arXiv 2403.17031, huggingface/trl#5338.
    Here: `truncated` says what becomes of one: it loses `truncation_penalty` (the default), is scored as it is, or
    trains nothing (`ppo.lay_out`). Why a response ended the engine says (`Rollout.finish`), and nothing else is asked.
    """
    run = run_of(base, batch_size=30, truncated=truncated, truncation_penalty=1.5)
    run.policy.tokenizer = replace(run.policy.tokenizer, stop_ids=(END, *OTHER_STOPS))
    chosen = run.draw_prompt(0, 30)
    rollouts = run.roll_out(chosen, 0)
    last = [rollout.response_ids[-1] for rollout in rollouts]
    cut = [token != END and token not in OTHER_STOPS for token in last]
    assert [rollout.finish is FinishReason.LENGTH for rollout in rollouts] == cut
    assert any(cut)
    assert any(token in OTHER_STOPS for token in last)
    at_the_limit = [len(rollout.response_ids) == 5 for rollout in rollouts]
    assert any(reached and not was_cut for reached, was_cut in zip(at_the_limit, cut, strict=True))
    experience, metrics = run.observe(chosen, rollouts, 0)
    expected = [2.0 - lost * was_cut for was_cut in cut]
    assert experience.return_BT[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert experience.mask_BT.any(dim=1).tolist() == [truncated != "mask" or not was_cut for was_cut in cut]
    assert metrics["truncated_rate"] == pytest.approx(sum(cut) / 30)


def test_04_the_reward_model_reads_its_own_end_behind_another_stop_token(base: str) -> None:
    """The stop token is no part of the text, and a finished text is closed by the end token."""
    policy = load_policy(base, stop_texts=["w7"])
    stopped = Rollout((1, 4, 9, 5), [12, 11], [-1.0, -2.0], FinishReason.STOP, 0)
    response = as_response(policy, stopped)
    assert response == Response(text="w8", finished=True)
    assert encode_for_reward(judge_from(base), prompt("w5"), response) == [1, 4, 9, 5, 12, END]


# --- 5: no end token is forced ---------------------------------------------------------------------------------------


def test_05_no_token_is_trained_on_that_was_not_sampled(base: str) -> None:
    """An end token is put where a response is cut; the policy gave it a tiny probability, and its ratio and gradient
    are those of a token that nobody sampled.

    Source: OpenRLHF/OpenRLHF#238.
    Here: `Growing.take` of `generation.pool` says that a response was cut off and adds nothing to it.
    """
    run = run_of(base, decoding={"max_new_tokens": 3})
    chosen = run.draw_prompt(0, 6)
    rollouts = run.roll_out(chosen, 0)
    cut = [rollout for rollout in rollouts if rollout.finish is FinishReason.LENGTH]
    assert cut
    assert all(len(rollout.response_ids) == 3 and END not in rollout.response_ids for rollout in cut)
    experience, _ = run.observe(chosen, rollouts, 0)
    assert experience.sequences == [(*rollout.prompt_ids, *rollout.response_ids) for rollout in rollouts]
    sampled = [logprob for rollout in rollouts for logprob in rollout.logprobs]
    assert experience.old_logprob_BT[experience.mask_BT].tolist() == pytest.approx(sampled, abs=1e-5)


def test_05_a_response_ends_in_training_with_what_the_model_itself_ends_with(tmp_path: Path) -> None:
    """The template of a chat model closes turns by a token that is not the tokenizer's end token, which such a model
    never says: demonstrations that end with the latter, and margins that count it, are about a token nobody sampled.

    Here: `Tokenizer.end_id` is the template's closing token where there is one; saved models name it as an end.
    """
    library = make_tokenizer()
    library.add_special_tokens({"additional_special_tokens": ["<turn>"]}, replace_extra_special_tokens=False)
    library.chat_template = library.chat_template.replace("<eos>", "<turn>")
    closing = library.convert_tokens_to_ids("<turn>")
    policy = LanguageModel(make_library(vocabulary=closing + 1), wrap_tokenizer(library))
    assert set(policy.tokenizer.stop_ids) == {closing, END}
    (example,) = encode_demonstrations([demonstration("w5 w6", "w7")], policy.tokenizer, context=64)
    (pair,) = as_pairs([ranking("w5 w6", ["w7", "w8"], ((0,), (1,)))], policy)
    assert {example.ids[-1], pair.chosen_ids[-1], pair.rejected_ids[-1]} == {closing}
    save_policy(tmp_path, policy)
    assert set(AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id) == {END, closing}


# --- 6: nothing behind the first stop token --------------------------------------------------------------------------


def test_06_a_response_ends_with_its_first_stop_token(base: str) -> None:
    """A row that has ended is drawn from until the whole batch has, and what it is given then enters its loss.

    Source: arXiv 2403.17031, l294265421/alpaca-rlhf#9.
    Here: `Decoder._sample` of `generation.pool` hands a finished row nothing; masks follow from lengths (`pad_rows`).
    """
    library = load_policy(base).library
    stops = (END, *OTHER_STOPS)
    sampling = Sampling(max_new_tokens=13, stop_token_ids=stops)
    generator = Generator(library, vocabulary=VOCABULARY, drop_share=1.0)  # rows stay until all have finished
    groups = generator.generate(random_sequences([5, 1, 11, 3]), 3, sampling, [7, -2, 5, 11])
    rollouts = [rollout for group in groups for rollout in group]
    for rollout in rollouts:
        places = [place for place, token in enumerate(rollout.response_ids) if token in stops]
        assert places == ([len(rollout.response_ids) - 1] if rollout.finish is FinishReason.STOP else [])
        assert len(rollout.logprobs) == len(rollout.response_ids)
    assert len({len(rollout.response_ids) for rollout in rollouts}) > 2


def test_06_what_stands_behind_a_response_moves_no_loss(base: str) -> None:
    """Log-probs, values, advantages and returns at masked places may be anything; the ids are what was sampled."""
    found = []
    for behind in (0.0, 1000.0, -1000.0):
        run = run_of(base, decoding={"max_new_tokens": 7})
        run.policy.tokenizer = replace(run.policy.tokenizer, stop_ids=(END, *OTHER_STOPS))
        chosen = run.draw_prompt(0, 6)
        rollouts = run.roll_out(chosen, 0)
        experience, _ = run.observe(chosen, rollouts, 0)
        assert not experience.mask_BT.all()
        assert experience.sequences == [(*rollout.prompt_ids, *rollout.response_ids) for rollout in rollouts]
        names = ("old_logprob_BT", "value_BT", "advantage_BT", "return_BT")
        spoilt: dict[str, Any] = {
            name: torch.where(experience.mask_BT, getattr(experience, name), behind) for name in names
        }
        found.append(run.update(replace(experience, **spoilt), 0))
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert found[2] == pytest.approx(found[0], abs=1e-6)
    assert found[0]["value_grad_norm"] > 1e-3


# --- 7: positions under padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@torch.no_grad()
def test_07_positions_begin_anew_with_every_sequence(architecture: str, tmp_path: Path) -> None:
    """Positions count the padding on the left, so a padded row has other logits, scores and values than the row alone.

    Source: OpenRLHF/OpenRLHF#217, OpenRLHF/OpenRLHF#218, CarperAI/trlx#509, CarperAI/trlx#451, THUDM/slime#1809,
    huggingface/transformers#22161, huggingface/trl#469.
    Here: `packing.pack` counts each token's place in its own sequence, for policy, reference, reward model and value
    function alike; when a model is loaded it is tried whether that gives what it gives on each sequence alone.
    """
    base = str(save_model(tmp_path, architecture))
    policy, critic = load_policy(base), judge_from(base)
    policy.trunk, critic.trunk = Trunk(policy.library), Trunk(critic.library)  # packed, whatever the trial has found
    sequences = random_sequences([5, 2, 11, 3])
    packed = pack(sequences)
    logprob_M = policy.predict(packed, *packed.predicted([1] * 4)).logprob_M
    by_hand = [logprob for ids in sequences for logprob in logprobs_by_hand(policy.library, ids, start=1)]
    assert logprob_M.tolist() == pytest.approx(by_hand, abs=1e-5)
    value_N = critic.at(packed, torch.arange(21))
    by_hand = [score_by_hand(critic, ids[: place + 1]) for ids in sequences for place in range(len(ids))]
    assert value_N.tolist() == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@torch.no_grad()
def test_07_left_padding_moves_no_position_in_generation(architecture: str, fast: bool) -> None:
    """The next token's logits after prompts of 7, 1 and 3 tokens, and after one token more, are those of each alone."""
    library, prompts, more = make_library(architecture), random_sequences([7, 1, 3]), [61, 41, 51]
    path = DecodingPath(fast=fast, padding=True)
    with path.attention(library):
        batch = path.starter(library, new_tokens=1)(0)
        found_BV = [batch.prefill(prompts)]
        batch.branch(torch.arange(3))
        found_BV.append(batch.step(torch.tensor(more)))
    grown = [[*ids, token] for ids, token in zip(prompts, more, strict=True)]
    for logit_BV, sequences in zip(found_BV, (prompts, grown), strict=True):
        for logit_V, ids in zip(logit_BV, sequences, strict=True):
            alone_V = library(input_ids=torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(logit_V, alone_V, rtol=0, atol=1e-5)


# --- 8: from left padding to right padding ---------------------------------------------------------------------------


@torch.no_grad()
def test_08_log_probs_survive_the_way_from_left_to_right_padding() -> None:
    """Prompts are padded on the left to generate and sequences on the right to train; a row that is turned from one
    into the other keeps padding in its middle, or loses tokens at its end.

    Source: huggingface/trl#2778.
    Here: the engine hands back ids without padding (`Rollout`), and `Packed.predicted` and `pad_rows` go by lengths.
    """
    policy = make_policy("gpt2")
    generator = Generator(policy.library, vocabulary=VOCABULARY)
    sampling = Sampling(max_new_tokens=7, stop_token_ids=(END, *OTHER_STOPS))

    @settings(max_examples=25)
    @given(lengths=st.lists(st.integers(1, 13), min_size=1, max_size=7), seed=st.integers(0, 2**32))
    def check(lengths: list[int], seed: int) -> None:
        prompts = random_sequences(lengths, seed=seed)
        seeds = [seed + row for row in range(len(prompts))]
        rollouts = [rollout for (rollout,) in generator.generate(prompts, 1, sampling, seeds)]
        sequences = [[*rollout.prompt_ids, *rollout.response_ids] for rollout in rollouts]
        packed = pack(sequences)
        logprob_M = policy.predict(packed, *packed.predicted(lengths)).logprob_M
        logprob_BT, mask_BT = pad_rows(logprob_M, [len(rollout.response_ids) for rollout in rollouts])
        for row, (rollout, ids) in enumerate(zip(rollouts, sequences, strict=True)):
            count = len(rollout.response_ids)
            by_hand = logprobs_by_hand(policy.library, ids, start=lengths[row])
            assert ids[: lengths[row]] == prompts[row]
            assert rollout.logprobs == pytest.approx(by_hand, abs=1e-5)
            assert logprob_BT[row, :count].tolist() == pytest.approx(by_hand, abs=1e-5)
            assert mask_BT[row].tolist() == [place < count for place in range(mask_BT.shape[1])]
            assert not logprob_BT[row, count:].any()

    check()
