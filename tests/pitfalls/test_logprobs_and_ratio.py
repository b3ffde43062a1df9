"""Pitfalls 16 to 22: the ratio that PPO clips, and what makes it wrong before anything is trained.

Dimensions in names: N packed tokens, M selected places, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.float64 import response_logprobs, response_values
from tests.models import ARCHITECTURES, make_library, make_policy, random_sequences, save_model
from tests.stages.test_ppo import config, experience_of, run_of
from tests.stages.test_ppo_equations import SCORES, Given, away, made_up
from torch import Tensor
from transformers import GenerationConfig

from tastemaker.checkpoint import load_policy, new_reward_model, save_reward_model
from tastemaker.corpus import next_token_places
from tastemaker.errors import ConfigError, TrainingError
from tastemaker.generation import Rollout
from tastemaker.model import RewardModel
from tastemaker.packing import pack
from tastemaker.responses import sampling_for
from tastemaker.settings import Precision
from tastemaker.stages import ppo
from tastemaker.stages.ppo import PpoRun
from tastemaker.training import StepReport

EXACT = 5e-6  # fp32 against float64
COOL: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.7}
LONG: dict[str, Any] = {"max_new_tokens": 11}  # what the made up rollouts need


@pytest.fixture(scope="module")
def reward_model(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random reward model."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    save_reward_model(folder, new_reward_model(base, seed=5))
    return str(folder)


def optimizer(precision: Precision = "float32", rate: float = 0.05) -> dict[str, Any]:
    """Steps proportional to gradients, as Adam's epsilon is so large."""
    return {"learning_rate": rate, "schedule": "constant", "epsilon": 1.0, "precision": precision}


def policy_steps(run: PpoRun, monkeypatch: pytest.MonkeyPatch, iteration: int = 0) -> list[StepReport]:
    """What the policy's optimizer steps of an iteration report, one after another."""
    reports, apply = list[StepReport](), run.policy_trainer.apply

    def spy(loss: float, sums: Mapping[str, float]) -> StepReport:
        reports.append(apply(loss, sums))
        return reports[-1]

    with monkeypatch.context() as patched:
        patched.setattr(run.policy_trainer, "apply", spy)
        run.step(iteration)
    return reports


def per_token(report: StepReport, name: str) -> float:
    return report.sums[name] / report.sums["tokens"]


# --- 16: the ratio is 1 at first --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.02)])
def test_16_the_ratio_is_not_1_before_anything_is_trained(
    base: str, monkeypatch: pytest.MonkeyPatch, precision: Precision, tolerance: float
) -> None:
    """Old log-probs are of other rows, another law or another mode than the new ones, so PPO clips and weights by
    what is no change of the policy; the curves still rise, only worse.

    Source: CarperAI/trlx#107, huggingface/trl#454; "The 37 Implementation Details of PPO"; slime's debugging notes.
    Here: both are read by `LanguageModel.predict` under one precision and temperature, and `PpoRun._check_ratio` stops
    the run at an iteration's first minibatch (allowed: 2e-4 nats a token in fp32, 0.1 in bf16).
    """
    run = run_of(base, minibatches=1, inner_epochs=3, policy=optimizer(precision))
    for iteration in range(2):
        first, *later = policy_steps(run, monkeypatch, iteration)
        assert per_token(first, "abs_log_ratio") < tolerance
        assert per_token(first, "ratio") == pytest.approx(1, abs=tolerance)
        assert 0.5 * per_token(first, "square_log_ratio") < tolerance**2
        assert len(later) == 2
        assert per_token(later[-1], "abs_log_ratio") > 1e-5


@pytest.mark.parametrize("iteration", [0, 7])
def test_16_it_is_asserted_in_every_iteration(base: str, iteration: int) -> None:
    """Ratios are too high in three rows and too low in the others, by as much in all: their mean says nothing."""
    run = run_of(base, minibatches=1)
    experience = experience_of(run, iteration)
    count_B1 = experience.mask_BT.sum(1, keepdim=True)
    sign_B1 = torch.tensor([-1.0, 1.0] * 3)[:, None]
    stale = replace(experience, old_logprob_BT=experience.old_logprob_BT + 0.005 * sign_B1 / count_B1)
    with pytest.raises(TrainingError, match=rf"first minibatch of iteration {iteration} .* \(allowed: 2e-04\)"):
        run.update(stale, iteration)


# --- 17: no KL at step 0 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"policy": optimizer("bfloat16")}),
        ("llama", {"decoding": COOL}),
        ("llama", {"lora": {"rank": 3, "alpha": 7, "targets": ["q_proj", "down_proj"]}}),
        ("gpt2", {"policy": optimizer("bfloat16")}),
    ],
)
def test_17_the_policy_is_not_its_reference_at_step_0(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    """The reference is another checkpoint, or the same in another precision, so there is a KL before the first step,
    and the penalty pulls the policy away from where it started.

    Source: documentation of THUDM/slime ("KL at step 0 must be 0").
    Here: the reference is the folder that the policy starts from, or the policy with its adapters off
    (`PpoRun._freeze_reference`). `freeze` rounds nothing that autocast would not, so the KL is 0 to the last bit; what
    differs stops the run (`PpoRun._check_reference`).
    """
    if "lora" in changes:
        pytest.importorskip("peft")
    run = run_of(str(save_model(tmp_path / "base", architecture)), truncated="score", **changes)
    metrics = run.step(0)
    assert metrics["kl"] == 0.0
    assert metrics["reward"] == pytest.approx(metrics["score"], abs=1e-6), "no penalty"
    assert run.step(1)["kl"] != 0.0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_17_another_reference_is_refused_before_the_first_step(base: str, precision: str) -> None:
    """In bf16 too: policy and reference are read by one kind of pass, so that nothing is rounding."""
    optimizer = {"learning_rate": 1e-3, "precision": precision}
    run = run_of(base, policy=optimizer, value=optimizer)
    with torch.no_grad():
        run.reference.library.lm_head.weight[5] += 0.01
    with pytest.raises(TrainingError, match="before the first step, policy and reference differ by"):
        run.step(0)


# --- 18: dropout ------------------------------------------------------------------------------------------------------


def test_18_dropout_is_on_while_log_probs_and_values_are_read(tmp_path: Path) -> None:
    """A model is put into training mode before old log-probs, the reference's or values are read, so each reading is of
    another random subnetwork: ratios scatter around 1, and several inner epochs diverge.

    Source: microsoft/DeepSpeedExamples (DeepSpeed-Chat calls `self.train()` before the scoring pass);
    volcengine/verl#4708; huggingface/trl#744, huggingface/trl#1540.
    Here: `checkpoint.load_policy` and `new_reward_model` set every dropout of the config to 0, whatever its name, and
    leave the model in evaluation mode. Either alone would do, so a model in training mode reads the same.
    """
    dropouts: dict[str, Any] = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    run = run_of(str(save_model(tmp_path / "base", "gpt2", **dropouts)), minibatches=1)
    assert isinstance(run.value, RewardModel)
    for model in (run.policy, run.reference, run.value):
        assert not any(module.training for module in model.modules())
        model.train()
    metrics = run.step(0)
    assert metrics["kl"] == 0.0
    assert metrics["approx_kl"] < 1e-12
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5)
    chosen, rollouts = made_up(run)
    first, again = (run.observe(chosen, rollouts, 1)[0] for _ in range(2))
    assert torch.equal(first.old_logprob_BT, again.old_logprob_BT)
    assert torch.equal(first.value_BT, again.value_BT)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_18_a_model_in_training_mode_reads_the_same_whatever_its_dropouts_are_called(
    architecture: str, tmp_path: Path
) -> None:
    plain = make_library(architecture).config.to_dict()
    dropouts: dict[str, Any] = {
        name: 0.5 for name, value in plain.items() if "drop" in name and isinstance(value, float)
    }
    policy = load_policy(str(save_model(tmp_path / "base", architecture, **dropouts)))
    ids_BT = torch.tensor(random_sequences([11], seed=1))
    expected = policy.library(input_ids=ids_BT, use_cache=False).logits
    policy.library.train()
    for _ in range(3):  # half of the layers would be left out each time
        assert torch.equal(policy.library(input_ids=ids_BT, use_cache=False).logits, expected)


# --- 19: temperature --------------------------------------------------------------------------------------------------


def test_19_the_temperature_is_missing_in_the_trainers_log_probs(base: str) -> None:
    """Tokens are drawn at temperature 0.7 and trained as if at 1, or the reference is left at 1: ratio, KL and entropy
    are then of a law that nothing was drawn from.

    Source: OpenRLHF/OpenRLHF#857; NVIDIA-NeMo/RL#316, #714, #935, #660; volcengine/verl#3133, volcengine/verl#6935 (a
    division in place on a view); THUDM/slime#2085, THUDM/slime#2297, THUDM/slime#1928 (the critic's output divided).
    Here: there is one temperature, `decoding.temperature`, which the sampler, the policy and the reference divide
    their logits by (`PpoRun._logprobs`, `LanguageModel.predict`), and values are never divided.
    """
    at_first = run_of(base, minibatches=1, decoding=COOL).step(0)
    assert at_first["kl"] == 0.0
    assert at_first["approx_kl"] < 1e-12
    assert at_first["sampler_mismatch_max"] < 1e-4

    run = away(run_of(base, decoding=COOL))
    chosen = run.draw_prompt(0, 6)
    rollouts = run.roll_out(chosen, 1)
    experience, metrics = run.observe(chosen, rollouts, 1)
    penalties = []
    for row, rollout in enumerate(rollouts):
        ids = rollout.prompt_ids, rollout.response_ids
        ours, theirs = (response_logprobs(m.library, *ids, temperature=0.7) for m in (run.policy, run.reference))
        assert experience.old_logprob_BT[row, : len(ours)].tolist() == pytest.approx(ours.tolist(), abs=EXACT)
        penalties.append(float((ours - theirs).sum()))
    assert max(map(abs, penalties)) > 0.1
    assert metrics["kl"] == pytest.approx(np.mean(penalties), abs=EXACT)
    assert metrics["sampler_mismatch_max"] < 1e-4
    run.update(experience, 1)  # and the loss's log-probs are of the same law, else this is refused


def test_19_values_are_not_divided_by_the_temperature(base: str, reward_model: str) -> None:
    run = run_of(base, reward_model, decoding=COOL | LONG)
    run.scorer = Given(SCORES)
    chosen, rollouts = made_up(run)
    assert isinstance(run.value, RewardModel)
    experience, _ = run.observe(chosen, rollouts, 1)
    for row, rollout in enumerate(rollouts):
        exact = response_values(run.value, rollout.prompt_ids, rollout.response_ids).tolist()
        assert max(map(abs, exact)) > 0.05
        assert experience.value_BT[row, : len(exact)].tolist() == pytest.approx(exact, abs=EXACT)


def test_19_dividing_overwrites_nothing_that_is_used_again() -> None:
    """Neither the hidden states, which a shared value head reads too, nor the logits that the gradient needs."""
    policy, packed = make_policy(), pack(random_sequences([5, 3, 7]))
    source_M, target_M = next_token_places(packed)
    hidden_ND = policy.hidden(packed).detach().requires_grad_()
    before_ND, gradient_M = hidden_ND.detach().clone(), torch.linspace(-1, 1, len(source_M))
    found_M = policy.predict(packed, source_M, target_M, temperature=0.7, hidden_ND=hidden_ND).logprob_M
    again_M = policy.predict(packed, source_M, target_M, temperature=0.7, hidden_ND=hidden_ND).logprob_M
    assert torch.equal(found_M, again_M)
    weight_VD = policy.library.lm_head.weight
    ours = torch.autograd.grad(found_M, [hidden_ND, weight_VD], gradient_M)
    assert torch.equal(hidden_ND.detach(), before_ND)

    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_ND, weight_VD)]
    logprob_MV = (exact[0][source_M] @ exact[1].T / 0.7).log_softmax(1)
    exact_M = logprob_MV.gather(1, target_M[:, None])[:, 0]
    torch.testing.assert_close(found_M.double(), exact_M, rtol=0, atol=EXACT)
    for our, their in zip(ours, torch.autograd.grad(exact_M, exact, gradient_M.double()), strict=True):
        torch.testing.assert_close(our.double(), their, rtol=0, atol=EXACT)


# --- 20: other laws ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def ranks(library: Any, rollout: Rollout) -> list[int]:
    """How many tokens were likelier than the one that was drawn, token by token."""
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
    logits_TV, first = library(input_ids=ids, use_cache=False).logits[0], len(rollout.prompt_ids) - 1
    return [
        int((logits_TV[first + place] > logits_TV[first + place, token]).sum())
        for place, token in enumerate(rollout.response_ids)
    ]


def test_20_tokens_are_drawn_from_another_law_than_the_softmax(tmp_path: Path) -> None:
    """Rollouts are greedy, or cut to the likeliest tokens, or penalised for repetition, often by a generation config
    that came with the model. Their probabilities are not the policy's, so the ratio is of two different laws.

    Source: microsoft/DeepSpeedExamples (DeepSpeed-Chat samples Llama with `do_sample=False`);
    allenai/open-instruct#1678; NVIDIA-NeMo/RL#3297, NVIDIA-NeMo/RL#3392.
    Here: PPO's decoding has a length limit and a temperature and nothing else (`settings.DecodingConfig`), a model's
    own generation config is not read, and `ppo.sample_iteration` refuses what is not `Sampling.is_policy_law`.
    """
    folder = save_model(tmp_path / "base", max_position_embeddings=64)
    GenerationConfig(
        do_sample=True, top_k=2, top_p=0.5, temperature=0.3, repetition_penalty=1.7, eos_token_id=2
    ).save_pretrained(str(folder))
    run = run_of(str(folder))
    assert run.policy.library.generation_config.top_k == 2, "the folder's config is there"
    rollouts = run.roll_out(run.draw_prompt(0, 6), 0)
    for rollout in rollouts:
        exact = response_logprobs(run.policy.library, rollout.prompt_ids, rollout.response_ids)
        assert rollout.logprobs == pytest.approx(exact.tolist(), abs=EXACT)
    drawn = [rank for rollout in rollouts for rank in ranks(run.policy.library, rollout)]
    assert max(drawn) > 10
    assert np.mean([rank >= 2 for rank in drawn]) > 0.5, "most tokens are none of the two likeliest"


@pytest.mark.parametrize(
    ("law", "says"), [({"top_k": 5}, "top_k=5"), ({"top_p": 0.9}, r"top_p=0\.9"), ({"greedy": True}, "greedy=True")]
)
def test_20_a_sampler_of_another_law_is_refused(
    base: str, law: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(base)
    monkeypatch.setattr(ppo, "sampling_for", lambda *given: replace(sampling_for(*given), **law))
    with pytest.raises(TrainingError, match=says):
        run.roll_out(run.draw_prompt(0, 6), 0)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"greedy": True}, "policy gradients need sampled responses"),
        ({"temperature": 0.0}, "it must be above 0"),
        ({"top_p": 0.9}, "unknown key 'top_p'"),
        ({"top_k": 50}, "unknown key 'top_k'"),
        ({"repetition_penalty": 1.2}, "unknown key 'repetition_penalty'"),
    ],
)
def test_20_other_laws_cannot_be_asked_for(option: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(decoding={"max_new_tokens": 5} | option)


# --- 21: two engines --------------------------------------------------------------------------------------------------


def test_21_old_log_probs_are_those_of_the_rollout_engine(base: str) -> None:
    """Other kernels, batches and precisions give the engine's log-probs an error of their own. Taken as the old
    ones, they make ratios that spread around 1 with unchanged weights, beside a clip of 0.2.

    Source: volcengine/verl#2996, volcengine/verl#2953, volcengine/verl#6280; NVIDIA-NeMo/RL (`token_mult_prob_error`,
    alarm above 1.05); arXiv 2510.26788.
    Here: `old_logprobs = "trainer"` reads every response once more by the trainer's own forward pass, and "sampler" is
    refused in bf16. How far the engine is off is logged (`sampler_mismatch`, `sampler_mismatch_max`, `sampler_ratio`).
    In fp32 nothing is left then. In bf16 the samples still come from a slightly other law than the trainer's, which is
    logged and not corrected: there are no truncated importance weights.
    """
    run = run_of(base, minibatches=1, decoding={"max_new_tokens": 5, "precision": "bfloat16"})
    chosen = run.draw_prompt(0, 6)
    rollouts = run.roll_out(chosen, 0)
    experience, metrics = run.observe(chosen, rollouts, 0)
    for row, rollout in enumerate(rollouts):
        exact = response_logprobs(run.policy.library, rollout.prompt_ids, rollout.response_ids).tolist()
        assert experience.old_logprob_BT[row, : len(exact)].tolist() == pytest.approx(exact, abs=EXACT)
    assert metrics["sampler_mismatch"] > 1e-4
    assert run.update(experience, 0)["approx_kl"] < 1e-12
    with pytest.raises(ConfigError, match="in bf16 the two differ too much"):
        config(policy=optimizer("bfloat16"), old_logprobs="sampler")


def test_21_how_far_the_engine_is_off_by_hand(base: str) -> None:
    """The engine says 0.1 too much, 0.1 too little and 0.2 too little, over and over: 28 tokens are 9 of these rounds
    and 0.1 once more. Sums: 0.4 * 9 + 0.1 = 3.7; largest 0.2; (2 e^0.1 + e^0.2) 9 + e^0.1 = 31.990872."""
    run = run_of(base, decoding=LONG)
    run.scorer = Given(SCORES)
    chosen, rollouts = made_up(run)
    experience, _ = run.observe(chosen, rollouts, 1)
    offset_M = torch.tensor([0.1, -0.1, -0.2]).repeat(10)[:28]
    said_M = experience.old_logprob_BT[experience.mask_BT] + offset_M
    parts: Sequence[Tensor] = torch.split(said_M, experience.response_lengths)
    told = [replace(rollout, logprobs=part.tolist()) for rollout, part in zip(rollouts, parts, strict=True)]
    _, metrics = run.observe(chosen, told, 1)
    assert metrics["sampler_mismatch"] == pytest.approx(3.7 / 28, abs=1e-6)
    assert metrics["sampler_mismatch_max"] == pytest.approx(0.2, abs=2e-6)
    assert metrics["sampler_ratio"] == pytest.approx(31.990872 / 28, abs=1e-6)


# --- 22: micro-batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_22_what_a_micro_batch_is_made_of_changes_log_probs(
    base: str, reward_model: str, precision: Precision, tolerance: float
) -> None:
    """Sequences are sorted by length and put together; they see their neighbours, or come back in the order in which
    they were sorted, or lose more digits in bf16 than the clip can bear.

    Source: volcengine/verl#6280.
    Here: a packed sequence attends to its own tokens alone (`attention.packed_attention`), and `PpoRun._read_rows` puts
    every row back in its place, so one at a time, all together and in another order are the same up to rounding.
    """
    rates = optimizer(precision)
    run = run_of(base, reward_model, truncated="score", decoding=LONG, policy=rates, value=rates)
    chosen, rollouts = made_up(run)
    whole = run.config
    read = {}
    for name, budget, rows in (
        ("alone", 1, range(5)),
        ("some", 30, range(5)),
        ("all", 9999, range(5)),
        ("turned", 30, [3, 0, 4, 1, 2]),
    ):
        run.config, run.scorer = replace(whole, microbatch_tokens=budget), Given(SCORES)
        experience, _ = run.observe([chosen[row] for row in rows], [rollouts[row] for row in rows], 1)
        back = torch.tensor(list(rows)).argsort()
        read[name] = experience.old_logprob_BT[back], experience.value_BT[back]
    for found in read.values():
        for ours, alone in zip(found, read["alone"], strict=True):
            torch.testing.assert_close(ours, alone, rtol=0, atol=tolerance)
    spread = float(read["alone"][0].std())
    assert spread > 20 * tolerance, "rows differ by far more than that"
