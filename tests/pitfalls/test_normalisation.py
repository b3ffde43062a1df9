"""Pitfalls 35 to 37, 44 and 47: what a loss, its gradient and its metrics are divided by.

Dimensions in names: T tokens of one sequence, V vocabulary, D hidden size, B rollouts, M tokens end to end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.pitfalls.watching import Step, apart, gradient_of, values_of, watch
from tests.stages import test_dpo, test_reward, test_sft
from tests.stages.conftest import demonstration, ranking
from tests.stages.test_ppo import CPU, made_up, run_of
from torch import Tensor

from tastemaker.checkpoint import load_policy, new_reward_model
from tastemaker.corpus import shuffled_forever
from tastemaker.generation import FinishReason
from tastemaker.metrics import read_metrics
from tastemaker.model import RewardModel
from tastemaker.packing import Packed
from tastemaker.records import Text
from tastemaker.scoring import FunctionScorer, ModelScorer
from tastemaker.settings import PpoConfig
from tastemaker.shared_value import SharedValue
from tastemaker.stages.dpo import train_dpo
from tastemaker.stages.ppo import Experience, PpoRun
from tastemaker.stages.reward import Element, element_loss, measure, scored_pairs
from tastemaker.stages.sft import Example, encode_demonstrations

EXACT = 5e-6  # a gradient in fp32 against one in float64, as a share of its length
STILL = {"learning_rate": 1e-12, "schedule": "constant"}  # moves no weight that a float32 tells from another
BUDGETS = (1, 40, 10_000)  # every row alone, a few together, all at once
CUT, STOP = FinishReason.LENGTH, FinishReason.STOP

# Rows of very different lengths: a mean of their means is far from the mean over their tokens.
DEMONSTRATIONS = [demonstration(f"w{n} w{n + 1}", " ".join(["w9"] * (n * n % 11))) for n in range(5, 12)]
RANKINGS = [
    ranking(
        f"w{n} w3",
        ["w7", f"w{n} w8 w6 w5", "w9 w9", f"w{n}"][: 2 + n % 3],
        ((n % 2,), (1 - n % 2, *range(2, 2 + n % 3))),
    )
    for n in range(20, 27)
]
TEXTS = [Text(text=" ".join(f"w{(7 * place + n) % 90}" for place in range(3 + n * n % 13))) for n in range(7)]


def one_step(stage: str, folder: Path, base: str, budget: int, *, way: int = 1) -> None:
    """A stage's only optimizer step, on all its rows, given forwards or (`way` -1) backwards."""
    settings = {"epochs": 1, "batch_size": 99, "optimizer": STILL, "microbatch_tokens": budget}
    if stage == "sft":
        test_sft.train(folder, base, test_sft.config(**settings), DEMONSTRATIONS[::way])
    elif stage == "reward":
        test_reward.train(folder, base, test_reward.config(**settings), RANKINGS[::way])
    else:
        config = test_dpo.config(**settings)
        train_dpo(folder, config=config, init=base, rankings=RANKINGS[::way], device=CPU, seed=1)


def text_gradient(base: str, rows: Sequence[Example]) -> tuple[float, Tensor]:
    """The mean negative log-likelihood of all predicted tokens and its gradient: the library in float64, row by row."""
    library, count = load_policy(base).library.double(), sum(row.num_predicted for row in rows)
    total = 0.0
    for row in rows:
        ids_T = torch.tensor(row.ids)
        logprob_TV = library(input_ids=ids_T[None], use_cache=False).logits[0].log_softmax(-1)
        loss = -logprob_TV[row.start - 1 : -1].gather(1, ids_T[row.start :, None]).sum() / count
        loss.backward()
        total += float(loss.detach())
    return total, gradient_of(library.parameters())


# --- 35: a mean over the whole step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
def test_35_a_step_is_a_mean_of_its_micro_batches_means(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Each micro-batch's loss is a mean over its own tokens, and the step a mean of these, so that a token in a short
    row weighs more than one in a long row, and how much memory there is changes what is learned.

    Source: huggingface/transformers#34191; axolotl-ai-cloud/axolotl#1100; volcengine/verl#3332, #3994, #5366, #5203;
    OpenRLHF/OpenRLHF#1249; allenai/open-instruct#1161; PrimeIntellect-ai/prime-rl#2562, #2034; THUDM/slime#987, #990;
    NVIDIA-NeMo/RL#266.
    Here: `Trainer.step` is given a denominator counted over the whole step; every loss in `losses` is a sum over it.
    """
    rows = encode_demonstrations(DEMONSTRATIONS, load_policy(base).tokenizer, context=64)
    loss, gradient = text_gradient(base, rows)
    alone = [text_gradient(base, [row]) for row in rows]
    assert abs(sum(loss for loss, _ in alone) / len(rows) - loss) > 0.01
    assert apart(torch.stack([gradient for _, gradient in alone]).mean(0), gradient) > 0.1

    steps = watch(monkeypatch)
    one_step("sft", tmp_path, base, budget)
    (step,) = steps
    assert len(step.microbatches) == {1: 7, 40: 3, 10_000: 1}[budget]
    assert step.report.loss == pytest.approx(loss, abs=EXACT)
    assert apart(step.gradient, gradient) < EXACT


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_35_neither_order_nor_micro_batches_change_a_step(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Of tokens, of prompts with 2 to 4 responses, and of pairs: the step is the same however they are packed."""
    steps = watch(monkeypatch)
    for budget in BUDGETS:
        for way in (1, -1):
            one_step(stage, tmp_path / f"{budget} {way}", base, budget, way=way)
    whole = steps[-1]
    assert whole.gradient.norm() > 0.01
    assert [len(step.microbatches) > 1 for step in steps] == [True] * 4 + [False] * 2
    for step in steps:
        assert apart(step.gradient, whole.gradient) < EXACT
        assert step.report.loss == pytest.approx(whole.report.loss, abs=1e-6)


def ppo_run(base: str, reward_model: str | None, budget: int, **changes: Any) -> tuple[PpoRun, Experience]:
    """A run whose steps move no weight, and six made up rollouts of 2 to 7 tokens, two of them cut off."""
    settings: dict[str, Any] = {"policy": STILL, "value": STILL, "minibatches": 2, "ptx_examples_per_episode": 1.0}
    run = run_of(base, reward_model, texts=TEXTS, microbatch_tokens=budget, **settings | changes)
    run.scorer = FunctionScorer(lambda prompts, responses, records: [2.0, -3.0, 5.0, 1.0, 0.5, -1.0], name="given")
    return run, run.observe(*made_up(run, [STOP, CUT, STOP, STOP, CUT, STOP]), 1)[0]


def update(run: PpoRun, experience: Experience, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Step], dict[str, float]]:
    """What the update's optimizer steps were taken on, and its metrics."""
    with monkeypatch.context() as patched:
        steps = watch(patched)
        return steps, run.update(experience, 1)


def test_35_nor_do_they_change_a_step_of_ppo(base: str, reward_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two minibatches of three ragged responses each, and of the texts that go with them."""
    found = []
    for budget in BUDGETS:
        run, experience = ppo_run(base, reward_model, budget, ptx_coef=0.5)
        steps, _ = update(run, experience, monkeypatch)
        found.append([step for step in steps if step.trainer is run.policy_trainer])
    for some, all_at_once in zip(zip(*found[:2], strict=True), found[2], strict=True):
        for step in some:
            assert len(step.microbatches) > len(all_at_once.microbatches) == 2
            assert apart(step.gradient, all_at_once.gradient) < EXACT
            assert step.report.loss == pytest.approx(all_at_once.report.loss, abs=1e-6)


# --- 36: the value function's loss ------------------------------------------------------------------------------------


def value_gradient(run: PpoRun, experience: Experience, rows: Sequence[int]) -> Tensor:
    """Of half the mean squared error over the rows' tokens, where values are still the old ones: the library's own."""
    assert isinstance(run.value, RewardModel)
    library, offset = run.value.library.double(), float(run.value.offset)
    count = sum(experience.response_lengths[row] for row in rows)
    for row in rows:
        ids, length = experience.sequences[row], experience.response_lengths[row]
        hidden_TD = library.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        value_T = (hidden_TD @ library.score.weight[0] - offset)[-1 - length : -1]
        (0.5 * (value_T - experience.return_BT[row, :length].double()).square().sum() / count).backward()
    gradient = gradient_of(library.parameters())
    library.zero_grad()
    library.float()
    return gradient


@pytest.mark.parametrize("budget", BUDGETS)
def test_36_the_value_loss_is_divided_by_other_tokens_than_the_policys(
    base: str, reward_model: str, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """The policy's loss is a mean over the minibatch and the value function's over each micro-batch, so that with four
    micro-batches the value function learns four times as fast as was asked for.

    Source: volcengine/verl#6957 (with 4 micro-batches the gradient is 4.06 times as large).
    Here: both networks step through `Trainer.step` on the same minibatch, with the same count of its tokens.
    """
    run, experience = ppo_run(base, reward_model, budget)
    steps, _ = update(run, experience, monkeypatch)
    steps = [step for step in steps if step.trainer is run.value_trainer]
    assert len(steps) == 2
    for step in steps:
        rows = [index for group in step.microbatches for index in group]
        assert apart(step.gradient, value_gradient(run, experience, rows)) < EXACT


def test_36_nor_by_others_on_a_shared_trunk(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head starts at 0, so the gradient of its weights is the value loss's alone."""
    gradients = []
    for budget in BUDGETS:
        run, experience = ppo_run(base, None, budget, value_function="shared")
        steps, _ = update(run, experience, monkeypatch)
        gradients.append(steps[0].gradient)
    assert isinstance(run.value, SharedValue)
    head = run.value.head.weight.numel()
    assert gradients[2][-head:].norm() > 0.01
    for gradient in gradients[:2]:
        assert apart(gradient, gradients[2]) < EXACT
        assert apart(gradient[-head:], gradients[2][-head:]) < EXACT


# --- 37: metrics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
def test_37_metrics_are_scaled_twice_or_diluted(
    base: str, reward_model: str, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """The loss is right and what is logged of it is not: divided a second time by the micro-batches, or averaged over
    a buffer that only some steps fill, so that a ratio of 1 reads 0.25.

    Source: volcengine/verl#4711; TRL's PPO trainer (the ratio reads 0.25).
    Here: `Trainer.accumulate` adds up sums over tokens, and `PpoRun._summary` divides by as many tokens, once.
    """
    settings: dict[str, Any] = {"minibatches": 3, "inner_epochs": 2, "whiten_advantages": False, "ptx_coef": 0.5}
    run, experience = ppo_run(base, reward_model, budget, **settings)
    steps, metrics = update(run, experience, monkeypatch)
    mask_BT = experience.mask_BT
    # By weights that stand still every ratio is 1. A mean over minibatches weighs each by its tokens.
    minibatches = [[row for group in step.microbatches for row in group] for step in steps[1::2]]
    error_BT = experience.value_BT - experience.return_BT
    means = [-float(experience.advantage_BT[rows][mask_BT[rows]].mean()) for rows in minibatches]
    squares = [0.5 * float(error_BT[rows][mask_BT[rows]].square().mean()) for rows in minibatches]
    assert min(squares) > 0.01
    counts = [float(mask_BT[rows].sum()) for rows in minibatches]
    assert len(counts) == 6
    assert len(set(counts)) > 1
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy_loss"] == pytest.approx(np.average(means, weights=counts), abs=EXACT)
    assert metrics["value_loss"] == pytest.approx(np.average(squares, weights=counts), rel=EXACT)
    texts = [texts_of(step) for step in steps[::2]]
    losses = [text_gradient(base, rows)[0] for rows in texts]
    assert metrics["ptx_loss"] == pytest.approx(sum(losses) / 6, abs=EXACT), "per token, and without gamma"


def test_37_micro_batches_change_no_metric_of_ppo(
    base: str, reward_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With steps that move the weights, so that ratios leave 1 and both clips take hold."""
    steady = {"learning_rate": 0.05, "schedule": "constant", "epsilon": 1.0}
    settings: dict[str, Any] = {"policy": steady, "value": steady, "inner_epochs": 3, "clip": 0.01, "value_clip": 0.01}
    rows = []
    for budget in BUDGETS:
        run, experience = ppo_run(base, reward_model, budget, ptx_coef=0.5, **settings)
        rows.append(update(run, experience, monkeypatch)[1])
    assert rows[2]["clip_fraction"] > 0
    assert rows[2]["value_clip_fraction"] > 0
    assert rows[2]["approx_kl"] > 1e-6
    for row in rows[:2]:
        assert row == pytest.approx(rows[2], rel=1e-4, abs=1e-6)


def test_37_shares_and_norms_are_not_diluted(base: str, reward_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As though every log-prob had risen by .01 since the rollout, and every value by .5: in six steps that move no
    weight, shares are those of the whole rollout and norms the mean of the six."""
    monkeypatch.setattr(PpoRun, "_check_ratio", lambda self, report, iteration: None)
    run, given = ppo_run(base, reward_model, 40, minibatches=3, inner_epochs=2, clip=0.005)
    moved = replace(given, old_logprob_BT=given.old_logprob_BT - 0.01, value_BT=given.value_BT - 0.5)
    steps, metrics = update(run, moved, monkeypatch)
    # The clip takes hold where a good token has become likelier, and where the return lies above the middle of the
    # value now and the one .3 below it, to which the clip of .2 keeps it.
    shares = {"clip_fraction": given.advantage_BT > 0, "value_clip_fraction": given.return_BT > given.value_BT - 0.15}
    for name, stopped_BT in shares.items():
        share = float(stopped_BT[given.mask_BT].float().mean())
        assert 0 < share < 1
        assert metrics[name] == pytest.approx(share, abs=1e-6)
    assert metrics["approx_kl"] == pytest.approx(0.5 * 0.01**2, rel=1e-2)
    assert metrics["ratio_mean"] == pytest.approx(math.exp(0.01), abs=1e-5)
    for name, trainer in (("grad_norm", run.policy_trainer), ("value_grad_norm", run.value_trainer)):
        norms = [float(step.gradient.norm()) for step in steps if step.trainer is trainer]
        assert len(norms) == 6
        assert metrics[name] == pytest.approx(sum(norms) / 6, rel=1e-5)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_37_nor_of_the_other_stages(base: str, tmp_path: Path, stage: str) -> None:
    """The three budgets give one row, and its means lie where means can lie."""
    rows = []
    for budget in BUDGETS:
        one_step(stage, tmp_path / str(budget), base, budget)
        (row,) = read_metrics(tmp_path / str(budget) / "metrics.jsonl")
        rows.append({name: value for name, value in row.items() if name != "seconds"})
    for row in rows[:2]:
        assert row == pytest.approx(rows[2], rel=1e-5, abs=5e-6)
    if stage == "dpo":
        assert rows[2]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert rows[2]["accuracy"] == 0.5
    if stage == "reward":
        scorer = ModelScorer(new_reward_model(base, seed=4), budget=99)
        assert rows[2]["accuracy"] == measure(scored_pairs(scorer, RANKINGS))["accuracy"]
        assert 0 < rows[2]["accuracy"] < 1


# --- 44: the pretraining gradient -------------------------------------------------------------------------------------


def texts_of(step: Step) -> list[Example]:
    """The pretraining texts among a step's micro-batches, all of whose tokens but the first are predicted."""
    return [
        Example(tuple(ids_T.tolist()), 1)
        for packed in step.microbatches
        if isinstance(packed, Packed)
        for ids_T in torch.split(packed.id_N, list(packed.lengths))
    ]


def test_44_pretraining_text_doubles_the_accumulation(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pretraining loss the accumulation and the optimizer's steps are doubled, so that PPO's own gradient is
    halved, or text takes steps of its own and the learning rate falls twice as fast.

    Source: PKU-Alignment/safe-rlhf, rl_trainer.py:317-320; microsoft/DeepSpeedExamples (27.8 did not converge there).
    Here: `PpoRun._policy_step` accumulates PPO's gradient and gamma times the text's mean per token, and steps once.
    """
    gamma, gradients = 27.8, list[list[Step]]()
    for coefficient in (0.0, gamma):
        run, experience = ppo_run(base, None, 40, minibatches=3, ptx_coef=coefficient)
        steps, _ = update(run, experience, monkeypatch)
        gradients.append([step for step in steps if step.trainer is run.policy_trainer])
    without, with_text = gradients
    assert len(without) == len(with_text) == 3
    for plain, mixed in zip(without, with_text, strict=True):
        _, of_text = text_gradient(base, texts_of(mixed))
        assert apart(mixed.gradient - plain.gradient, gamma * of_text) < 2 * EXACT
        assert plain.gradient.norm() > 0.01


def test_44_text_takes_no_step_and_changes_no_rate(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two iterations of two inner epochs of three minibatches are twelve steps with text and without."""
    rates = []
    for coefficient in (0.0, 0.5):
        cosine = {"learning_rate": 1e-12, "schedule": "cosine"}
        run, experience = ppo_run(
            base, None, 99, policy=cosine, minibatches=3, inner_epochs=2, warmup_iterations=1, ptx_coef=coefficient
        )
        steps = update(run, experience, monkeypatch)[0] + update(run, experience, monkeypatch)[0]
        own = [step for step in steps if step.trainer is run.policy_trainer]
        assert len(own) == run.policy_trainer.steps_taken == run.policy_trainer.total_steps == 12
        rates.append([step.report.learning_rate for step in own])
    assert rates[0] == rates[1]


def test_44_each_episode_brings_eight_texts_and_more_weigh_no_more(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the paper. By the mean per token, one text read once or five times has the same gradient."""
    paper = PpoConfig(init="", reward="").ptx_examples_per_episode
    found = {}
    for each in (paper, 1.0, 2.5):
        run, experience = ppo_run(base, None, 99, minibatches=3, ptx_coef=1.0, ptx_examples_per_episode=each)
        run.texts = run.texts[:1]
        run.draw_text = shuffled_forever(1, seed=0)
        steps, _ = update(run, experience, monkeypatch)
        found[each] = steps[0]
        assert len(texts_of(steps[0])) == round(2 * each), "a minibatch has two episodes"
    assert len(texts_of(found[paper])) == 16
    assert apart(found[2.5].gradient, found[1.0].gradient) < EXACT
    assert apart(found[paper].gradient, found[1.0].gradient) < EXACT


# --- 47: nothing that counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten", [True, False])
def test_47_a_fully_masked_minibatch_is_0_by_0(
    base: str, reward_model: str, monkeypatch: pytest.MonkeyPatch, whiten: bool
) -> None:
    """Where no token of a sample or of a batch may train, the mean over none is NaN, and one such batch makes every
    weight NaN.

    Source: allenai/open-instruct#1685; volcengine/verl#2377.
    Here: masks choose by `torch.where`, counts are at least 1, so the loss and its gradient are 0.
    """
    settings: dict[str, Any] = {"truncated": "mask", "whiten_advantages": whiten, "minibatches": 2}
    run = run_of(base, reward_model, **settings)
    run.scorer = FunctionScorer(lambda prompts, responses, records: [2.0, -3.0, 5.0, 1.0, 0.5, -1.0], name="given")
    before = values_of(run.policy.parameters()), values_of(run.value.parameters())
    experience, metrics = run.observe(*made_up(run, [CUT] * 6), 1)
    assert not experience.mask_BT.any()
    assert experience.advantage_BT.isfinite().all()
    metrics |= run.update(experience, 1)
    assert {name: value for name, value in metrics.items() if not math.isfinite(value)} == {}
    assert metrics["policy_loss"] == metrics["value_loss"] == metrics["grad_norm"] == metrics["value_grad_norm"] == 0
    assert torch.equal(values_of(run.policy.parameters()), before[0])
    assert torch.equal(values_of(run.value.parameters()), before[1])


@pytest.mark.parametrize("budget", BUDGETS)
def test_47_masked_samples_among_others_leave_their_mean_alone(
    base: str, reward_model: str, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Three finished responses have the same step with two masked ones in their minibatch as without."""
    found = []
    for endings in ([STOP] * 3, [STOP] * 3 + [CUT] * 2):
        settings: dict[str, Any] = {"truncated": "mask", "minibatches": 1, "batch_size": len(endings)}
        run = run_of(base, reward_model, policy=STILL, value=STILL, microbatch_tokens=budget, **settings)
        run.scorer = FunctionScorer(
            lambda prompts, responses, records: [2.0, -3.0, 5.0, 70.0, -90.0][: len(responses)], name="given"
        )
        experience, _ = run.observe(*made_up(run, endings), 1)
        steps, _ = update(run, experience, monkeypatch)
        found.append(steps)
    for alone, among in zip(*found, strict=True):
        assert alone.gradient.norm() > 0.01
        assert apart(among.gradient, alone.gradient) < EXACT
        assert among.report.loss == pytest.approx(alone.report.loss, abs=1e-6)


@pytest.mark.parametrize("normalize", ["pairs", "all"])
def test_47_a_wholly_tied_ranking_is_no_loss(base: str, normalize: Any) -> None:
    model = new_reward_model(base, seed=2)
    tied = Element(((5, 6, 7), (5, 8), (5, 9, 9, 2)), ((0, 0, 0), (0, 0, 0)))
    loss = element_loss(model, normalize, [tied], 1.0)
    loss.value.backward()  # type: ignore[no-untyped-call]
    assert float(loss.value.detach()) == 0
    assert not gradient_of(model.parameters()).any()


def test_47_an_empty_answer_is_its_end_token(base: str) -> None:
    """A demonstration without words still has one token that counts."""
    policy = load_policy(base)
    (row,) = encode_demonstrations([demonstration("w5 w6", "")], policy.tokenizer, context=64)
    assert row.num_predicted == 1
    assert row.ids[-1] == policy.tokenizer.end_id


def test_47_a_fully_masked_minibatch_dilutes_no_mean(base: str) -> None:
    """It has no tokens: means over those of the others are what they are without it."""
    run = run_of(base, minibatches=2, truncated="mask", decoding={"max_new_tokens": 3})
    stop, length = FinishReason.STOP, FinishReason.LENGTH
    experience, _ = run.observe(*made_up(run, [stop, stop, stop, length, length, length]), 0)
    trained, _ = run._policy_step(experience, [0, 1, 2], 0)
    masked, _ = run._policy_step(experience, [3, 4, 5], 1)
    assert (trained.sums["tokens"], masked.sums["tokens"]) == (9.0, 0.0)
    assert run.value_trainer is not None
    values = [run._value_step(run.value_trainer, experience, chosen) for chosen in ([0, 1, 2], [3, 4, 5])]
    alone, both = (run._summary([trained, masked][:n], values[:n], [0.0]) for n in (1, 2))
    assert both["ratio_mean"] == alone["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert both["approx_kl"] == alone["approx_kl"]
