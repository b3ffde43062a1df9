"""Pitfalls 38 to 41, 43, 45 and 46: how many optimizer steps there are, and what each does to the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import make_library, make_policy, make_tokenizer, random_sequences, save_model
from tests.parallel import jobs
from tests.parallel.driver import clipping
from tests.parallel.launching import drive
from tests.pitfalls.watching import Step, apart, values_of, watch
from tests.stages import test_dpo, test_reward, test_sft
from tests.stages.test_ppo import TEXTS, run_of
from torch import Tensor, nn

from tastemaker.artefacts import read_manifest, run_stage
from tastemaker.checkpoint import load_policy, load_reward_model, new_reward_model, save_policy, save_reward_model
from tastemaker.config import from_mapping
from tastemaker.corpus import next_token_places
from tastemaker.lora import LoraConfig, add_adapters
from tastemaker.losses import sft_loss
from tastemaker.model import LanguageModel, RewardModel
from tastemaker.packing import pack
from tastemaker.scoring import ModelScorer
from tastemaker.settings import SftConfig
from tastemaker.training import Loss, OptimizerConfig, Trainer, learning_rate_factor

STILL = {"learning_rate": 1e-12, "schedule": "constant"}  # moves no weight that a float32 tells from another
STEADY = {"learning_rate": 0.01, "schedule": "constant"}
BUDGETS = (1, 40, 10_000)  # every row alone, a few together, all at once


def sizes(steps: Iterable[Step]) -> list[int]:
    """How many rows each step was taken on."""
    return [sum(map(len, step.microbatches)) for step in steps]


def adam_steps(trainer: Trainer) -> set[int]:
    """The steps that Adam itself has counted, for each parameter."""
    return {int(state["step"]) for state in trainer.optimizer.state.values()}


# --- 38: how many steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("minibatches", [1, 2, 4])
def test_38_the_number_of_steps_depends_on_micro_batches(
    base: str, monkeypatch: pytest.MonkeyPatch, minibatches: int, budget: int
) -> None:
    """Gradient accumulation is counted across minibatches, or restarts with the data, so that fewer (or more)
    optimizer steps are taken than epochs times minibatches, and a last incomplete batch is never learned from.

    Source: huggingface/trl#5645 (4 steps where 4, 8 or 16 are meant).
    Here: a minibatch is one call of `Trainer.step`, whatever it is cut into; a last batch is as small as it is.
    """
    steps, count = watch(monkeypatch), 4 * minibatches
    run = run_of(base, batch_size=8, minibatches=minibatches, inner_epochs=4, iterations=1, microbatch_tokens=budget)
    run.step(0)
    assert run.value_trainer is not None
    for trainer in (run.policy_trainer, run.value_trainer):
        own = [step for step in steps if step.trainer is trainer]
        assert sizes(own) == [8 // minibatches] * count
        assert trainer.steps_taken == trainer.total_steps == count
        assert adam_steps(trainer) == {count}
        if budget == 1:
            assert {len(step.microbatches) for step in own} == {8 // minibatches}, "every episode alone"


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_38_the_last_batch_of_an_epoch_is_a_step(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, budget: int
) -> None:
    """7 demonstrations in batches of 3, 31 rankings in batches of 9 and 22 pairs in batches of 5 leave a remainder."""
    steps, settings = watch(monkeypatch), {"epochs": 2, "microbatch_tokens": budget, "optimizer": STILL}
    if stage == "sft":
        test_sft.train(tmp_path, base, test_sft.config(batch_size=3, **settings))
        expected = [3, 3, 1]
    elif stage == "reward":
        test_reward.train(tmp_path, base, test_reward.config(batch_size=9, **settings))
        expected = [9, 9, 9, 4]
    else:
        test_dpo.train(tmp_path, base, test_dpo.config(batch_size=5, **settings))
        expected = [5, 5, 5, 5, 2]
    assert sizes(steps) == expected * 2
    trainer = steps[-1].trainer
    assert trainer.steps_taken == trainer.total_steps == len(steps)
    assert adam_steps(trainer) == {len(steps)}


# --- 39: in which order -----------------------------------------------------------------------------------------------


def test_39_a_minibatch_is_trained_on_several_times_in_a_row(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inner epochs run inside the loop over minibatches, B1 B1 B1 B2 B2 B2: each minibatch is overfitted before the
    next is seen, and its later visits are clipped away.

    Source: CarperAI/trlx#522.
    Here: `PpoRun.update` visits all minibatches before any again, and draws them anew in each inner epoch.
    """
    steps = watch(monkeypatch)
    run = run_of(base, batch_size=6, minibatches=3, inner_epochs=3, microbatch_tokens=12)
    run.step(0)
    assert [step.trainer is run.policy_trainer for step in steps] == [True, False] * 9
    visited = [sorted(index for group in step.microbatches for index in group) for step in steps]
    policy, value = visited[::2], visited[1::2]
    assert policy == value
    epochs = [policy[start : start + 3] for start in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(index for minibatch in epoch for index in minibatch) == list(range(6))
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 3


def test_39_iterations_shuffle_anew(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is drawn from seed, iteration and inner epoch: another for each, and the same again."""
    orders = []
    for seed in (3, 3, 4):
        with monkeypatch.context() as patched:
            steps = watch(patched)
            run = run_of(base, seed=seed, batch_size=6, minibatches=3, policy=STILL, value=STILL)
            run.step(0)
            run.step(1)
        orders.append([sorted(step.microbatches[0]) for step in steps[::2]])
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:3] != orders[0][3:]


# --- 40: at which rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
def test_40_the_rate_is_counted_in_other_units_than_the_warm_up(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """The schedule steps with every micro-batch or rollout and its lengths are counted in optimizer steps, or the
    other way round: the warm-up never ends, or the rate is at its floor in the middle of the run.

    Source: NVIDIA-NeMo/RL#305, #685; THUDM/slime#1152, #1775.
    Here: `learning_rate_factor` is a function of the optimizer step from 0 to `total_steps`; `Trainer.apply` alone
    counts them, and PPO turns its iterations into steps.
    """
    steps = watch(monkeypatch)
    optimizer = {"learning_rate": 0.002, "schedule": "cosine", "floor": 0.2, "warmup_steps": 2}
    test_sft.train(tmp_path, base, test_sft.config(epochs=2, optimizer=optimizer, microbatch_tokens=budget))
    # Of 6 steps 2 are warm-up, from a tenth. Then cos(0), cos(pi/4), cos(pi/2), cos(3 pi/4) of the way down to a fifth:
    # 0.2 + 0.4 (1 + cos), where the floor itself is the rate behind the last step.
    root = math.sqrt(0.5)
    expected = [0.1, 0.55, 1.0, 0.2 + 0.4 * (1 + root), 0.6, 0.2 + 0.4 * (1 - root)]
    assert [step.report.learning_rate / 0.002 for step in steps] == pytest.approx(expected, abs=1e-9)
    trainer = steps[-1].trainer
    assert learning_rate_factor(trainer.config, trainer.steps_taken, trainer.total_steps) == pytest.approx(
        0.2, abs=1e-9
    )


def test_40_ppo_counts_its_warm_up_in_iterations(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two iterations of three minibatches, one of warm-up: each rate rises from a tenth over three steps; the policy's
    then falls to 0 over three more, the value function's stays. Text is no step."""
    steps = watch(monkeypatch)
    run = run_of(
        base,
        texts=TEXTS,
        ptx_coef=0.5,
        warmup_iterations=1,
        policy={"learning_rate": 0.002, "schedule": "linear", "floor": 0.0},
        value={"learning_rate": 0.003, "schedule": "constant"},
    )
    run.step(0)
    run.step(1)
    policy = [step.report.learning_rate / 0.002 for step in steps if step.trainer is run.policy_trainer]
    value = [step.report.learning_rate / 0.003 for step in steps if step.trainer is run.value_trainer]
    assert policy == pytest.approx([0.1, 0.4, 0.7, 1, 2 / 3, 1 / 3], abs=1e-9)
    assert value == pytest.approx([0.1, 0.4, 0.7, 1, 1, 1], abs=1e-9)


# --- 41: clipping -----------------------------------------------------------------------------------------------------

# With so large an epsilon Adam's first step is the rate times the gradient over epsilon: here the gradient, 100 times.
PROPORTIONAL = {"learning_rate": 1e8, "epsilon": 1e6, "schedule": "constant"}


@pytest.mark.parametrize(("largest", "clipped"), [(0.25, True), (1e6, False)])
def test_41_gradients_are_not_clipped(
    base: str, reward_model: str, monkeypatch: pytest.MonkeyPatch, largest: float, clipped: bool
) -> None:
    """The setting is read and nothing is clipped; or every tensor is, or every process's part, by its own norm, which
    turns the step; or the norm is logged after clipping, so that it never shows what is wrong.

    Source: huggingface/trl (PPO never clipped); NVIDIA-NeMo/RL#1158, #1693.
    Here: `Trainer.apply` takes the norm over all parameters, of all processes' parts (`parallel.total_norm`), once
    everything is accumulated (pretraining text too), scales what is above it, and reports the norm as it was.
    """
    optimizer = PROPORTIONAL | {"max_grad_norm": largest}
    steps = watch(monkeypatch)
    run = run_of(
        base, reward_model, texts=TEXTS, ptx_coef=2.0, minibatches=1, policy=optimizer, value=optimizer, iterations=1
    )
    before = values_of(run.policy.parameters()), values_of(run.value.parameters())
    metrics = run.step(0)
    after = values_of(run.policy.parameters()), values_of(run.value.parameters())
    for step, was, now, name in zip(steps, before, after, ("grad_norm", "value_grad_norm"), strict=True):
        norm = float(step.gradient.double().norm())
        assert norm > 0.3
        assert step.report.grad_norm == metrics[name] == pytest.approx(norm, rel=1e-5), "as it was before clipping"
        scale = min(1.0, largest / norm)
        assert (scale < 1) is clipped
        assert apart((was.double() - now.double()) / 100, scale * step.gradient) < 1e-5


def test_41_processes_clip_by_the_norm_of_all_parts(tmp_path: Path) -> None:
    """Two processes and one take the same step along a clipped gradient."""
    models = tmp_path / "models"
    save_model(models / "base", max_position_embeddings=64)
    drive(tmp_path, "clipping")
    clipping(tmp_path / "one", models)
    one, several = (jobs.weights(tmp_path / place / "model") for place in ("one", "several/clipping"))
    assert jobs.largest_difference(one, several) < 1e-6
    assert jobs.moved(one, jobs.weights(models / "base")) > 1e-3


# --- 43: what is trained ----------------------------------------------------------------------------------------------


def kept(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: Mapping[str, Tensor], after: nn.Module) -> dict[str, bool]:
    """Which parameters and buffers differ."""
    now = after.state_dict()
    return {name: not torch.equal(tensor, now[name]) for name, tensor in before.items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # the one by layers of our own; the other ties embeddings
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_43_parts_of_the_model_stay_frozen(tmp_path: Path, architecture: str, stage: str) -> None:
    """Parameters that should train never do (wrapped before their hooks, or their gradients dropped), and the loss
    falls all the same; or a part that should be frozen moves.

    Source: OpenRLHF (under ZeRO-3 with leaf hooks 390 of its 417 parameters stayed frozen).
    Here: `Trainer` takes every parameter that requires a gradient, and adapters leave no others that do.
    """
    model = str(save_model(tmp_path / "base", architecture))
    whole: dict[str, Any] = {"epochs": 1, "batch_size": 99, "optimizer": STEADY}
    before: nn.Module
    after: nn.Module
    if stage == "reward":
        test_reward.train(tmp_path / "run", model, test_reward.config(**whole))
        before, after = new_reward_model(model, seed=4), load_reward_model(str(tmp_path / "run" / "model"))
    else:
        if stage == "sft":
            test_sft.train(tmp_path / "run", model, test_sft.config(**whole))
        else:
            test_dpo.train(tmp_path / "run", model, test_dpo.config(**whole))
        before, after = load_policy(model), load_policy(str(tmp_path / "run" / "model"))
    moved = changed(kept(before), after)
    assert [name for name in dict(before.named_parameters()) if not moved[name]] == []


def test_43_ppo_trains_policy_and_value_function_alone(base: str, reward_model: str) -> None:
    """All of these two, nothing of the reference or the reward model that scores, and not the value's offset."""
    run = run_of(base, reward_model, minibatches=1, policy=STEADY, value=STEADY)
    scoring = load_reward_model(reward_model)
    run.scorer = ModelScorer(scoring, budget=99)
    before = [kept(module) for module in (run.policy, run.value, run.reference, scoring)]
    run.step(0)
    policy, value, reference, scorer = (
        changed(was, now) for was, now in zip(before, (run.policy, run.value, run.reference, scoring), strict=True)
    )
    assert all(policy.values())
    assert {name for name, moved in value.items() if not moved} == {"offset"}
    assert not any(reference.values())
    assert not any(scorer.values())


SEQUENCES = random_sequences([5, 3, 8])


def likelihood(policy: LanguageModel) -> Tensor:
    packed = pack(SEQUENCES)
    return policy.predict(packed, *next_token_places(packed)).logprob_M


def train_adapters(policy: LanguageModel, steps: int = 2) -> None:
    """An adapter's second factor starts at 0, so its first has a gradient from the second step on."""
    trainer = Trainer(policy, OptimizerConfig(learning_rate=0.02, schedule="constant"), total_steps=steps)

    def loss(_: int, num_tokens: float) -> Loss:
        logprob_M = likelihood(policy)
        return Loss(sft_loss(logprob_M, torch.ones_like(logprob_M, dtype=torch.bool), num_tokens=num_tokens))

    for _ in range(steps):
        trainer.step([0], loss, 13.0)


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [("llama", ("q_proj", "down_proj")), ("gpt2", ("c_attn", "c_fc")), ("llama", ("lm_head",))],
)
def test_43_adapters_train_and_tied_embeddings_stay(
    architecture: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    """Also where the tied head itself has an adapter: saved, the two are no longer one tensor."""
    policy = make_policy(architecture, tie_word_embeddings=True)
    add_adapters(policy.library, LoraConfig(rank=3, alpha=7, targets=targets), seed=0)
    before = kept(policy)
    train_adapters(policy)
    moved = changed(before, policy)
    assert {name for name, now in moved.items() if now} == {name for name in moved if ".lora_" in name}
    assert policy.library.get_output_embeddings().weight is policy.library.get_input_embeddings().weight
    save_policy(tmp_path / "model", policy)
    with torch.no_grad():
        torch.testing.assert_close(
            likelihood(load_policy(str(tmp_path / "model"))), likelihood(policy), rtol=0, atol=1e-5
        )


# --- 45: Adam's epsilon -----------------------------------------------------------------------------------------------


def first_move(epsilon: float, gradients: Sequence[float]) -> list[float]:
    """By how much of the learning rate Adam's first step moves weights with these gradients."""
    module = nn.Linear(len(gradients), 1, bias=False)
    nn.init.zeros_(module.weight)
    config = OptimizerConfig(learning_rate=0.001, schedule="constant", epsilon=epsilon)
    trainer = Trainer(module, config, total_steps=1)
    trainer.step([torch.tensor(gradients)], lambda batch, denominator: Loss(module(batch)[0] / denominator), 1.0)
    return [float(weight) / -0.001 for weight in module.weight.detach()[0]]


@pytest.mark.parametrize(
    ("epsilon", "expected"),
    [  # g / (|g| + epsilon) for gradients of 1e-6, -1e-5 and 1e-3
        (1e-8, [100 / 101, -1000 / 1001, 100_000 / 100_001]),
        (1e-5, [1 / 11, -1 / 2, 100 / 101]),
    ],
)
def test_45_adam_has_another_epsilon(epsilon: float, expected: list[float]) -> None:
    """OpenAI's code had 1e-5 where libraries default to 1e-8, so that a weight with a gradient of 1e-6 moves eleven
    times as far in the first step; and TensorFlow puts epsilon inside the bias correction.

    Source: openai/lm-human-preferences, utils/core.py:627; arXiv 2403.17031; "The N Implementation Details of RLHF".
    Here: `OptimizerConfig.epsilon` reaches `torch.optim.AdamW`, outside the bias correction, and is in every manifest.
    """
    found = first_move(epsilon, [1e-6, -1e-5, 1e-3])
    assert found == pytest.approx(expected, rel=1e-5)
    # TensorFlow's first step, with beta_2 = 0.95: sqrt(0.05) g / (sqrt(0.05) |g| + epsilon).
    inside = math.sqrt(0.05) * 1e-6
    assert abs(found[0] - inside / (inside + epsilon)) > 0.03


def test_45_each_network_has_its_own_and_the_run_records_it(base: str, tmp_path: Path) -> None:
    run = run_of(base, policy=STEADY | {"epsilon": 1e-5}, value=STEADY | {"epsilon": 1e-7})
    assert run.value_trainer is not None
    epsilons = [trainer.optimizer.param_groups[0]["eps"] for trainer in (run.policy_trainer, run.value_trainer)]
    assert epsilons == [1e-5, 1e-7]
    for optimizer, epsilon in (({"learning_rate": 0.1, "epsilon": 1e-5}, 1e-5), ({"learning_rate": 0.1}, 1e-8)):
        config = from_mapping(SftConfig, {"optimizer": optimizer}, where="test")
        run_stage(tmp_path / str(epsilon), stage="sft", config=config, inputs={}, work=lambda folder: None)
        manifest = read_manifest(tmp_path / str(epsilon))
        assert manifest is not None
        assert manifest["config"]["optimizer"]["epsilon"] == epsilon


# --- 46: weights in fp32 ----------------------------------------------------------------------------------------------


def by_adam(weights: Tensor, gradients: Sequence[Tensor], rate: float) -> Tensor:
    """How far AdamW moves weights in float64: betas 0.9 and 0.95, epsilon 1e-8."""
    mean, square = np.zeros(len(weights)), np.zeros(len(weights))
    moved = np.zeros(len(weights))
    for number, gradient in enumerate(gradients, 1):
        g = gradient.double().numpy()
        mean, square = 0.9 * mean + 0.1 * g, 0.95 * square + 0.05 * g**2
        moved -= rate * (mean / (1 - 0.9**number)) / (np.sqrt(square / (1 - 0.95**number)) + 1e-8)
    return torch.from_numpy(moved)


def test_46_small_steps_are_lost_in_bf16_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models come in bf16, and a step of 1e-6 is less than half the distance between two bf16 numbers: without a copy
    in fp32 the weights do not move at all, or only the largest steps are rounded up.

    Source: arXiv 2510.26788; volcengine/verl#7485 (gradients reduced in bf16).
    Here: `checkpoint` loads every model in fp32; `Trainer.autocast` rounds products alone, not weights, gradients or
    Adam's averages.
    """
    folder = tmp_path / "base"
    make_library().to(torch.bfloat16).save_pretrained(str(folder))
    make_tokenizer().save_pretrained(str(folder))
    optimizer = {"learning_rate": 1e-6, "schedule": "constant", "precision": "bfloat16", "max_grad_norm": 1e9}
    config = test_sft.config(epochs=10, batch_size=99, optimizer=optimizer, keep_epochs="last")
    steps = watch(monkeypatch)
    test_sft.train(tmp_path / "run", str(folder), config)
    assert len(steps) == 10
    assert {step.gradient.dtype for step in steps} == {torch.float32}
    assert {state["exp_avg"].dtype for state in steps[-1].trainer.optimizer.state.values()} == {torch.float32}
    start, end = (values_of(load_policy(str(one)).parameters()) for one in (folder, tmp_path / "run" / "model"))
    predicted = by_adam(start, [step.gradient for step in steps], 1e-6)
    # Each step rounds a weight once, by at most 2^-24 of it.
    error = (end.double() - start.double() - predicted).abs()
    assert bool((error <= 10 * 2.0**-24 * start.double().abs() + 1e-9).all())
    moved = predicted.abs() > 5e-6
    assert moved.sum() > 10_000
    assert (end != start)[moved].float().mean() > 0.99
    stuck = end.bfloat16() == start.bfloat16()
    assert stuck[moved].float().mean() > 0.9, "in bf16 hardly any of them would have moved"


@pytest.mark.parametrize("part", ["reward", "value"])
def test_46_nor_in_those_of_reward_models_and_value_functions(base: str, tmp_path: Path, part: str) -> None:
    """A reward model kept in bf16, as many are shared, is loaded in fp32 whatever it is for."""
    model = new_reward_model(base, seed=2)
    save_reward_model(tmp_path / "fp32", model)
    model.library.to(torch.bfloat16)
    save_reward_model(tmp_path / "rm", model)
    if part == "reward":
        loaded = load_reward_model(str(tmp_path / "rm"))
    else:
        run = run_of(base, str(tmp_path / "rm"), value=STEADY | {"precision": "bfloat16"})
        assert isinstance(run.value, RewardModel)
        loaded = run.value
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
