"""PPO: what must hold exactly at every step, what each option does, and that it learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.bases import save_random_base
from tests.models import save_model
from tests.stages.conftest import prompt
from tests.work import counting
from torch import Tensor

from tastemaker.checkpoint import load_policy, load_reward_model, new_reward_model, save_reward_model
from tastemaker.config import from_mapping
from tastemaker.errors import ConfigError, DataError, TrainingError
from tastemaker.generation import FinishReason, Rollout
from tastemaker.lora import adapters_off
from tastemaker.metrics import read_metrics
from tastemaker.model import RewardModel
from tastemaker.packing import pack
from tastemaker.records import Messages, Text
from tastemaker.responses import as_response
from tastemaker.scoring import FunctionScorer, ModelScorer
from tastemaker.shared_value import SharedValue
from tastemaker.stages.ppo import Experience, PpoConfig, PpoRun, train_ppo

CPU = torch.device("cpu")
PROMPTS = [prompt(f"w{number} w{number + 1}" + " w9" * (number % 3)) for number in range(3, 10)]
TEXTS = [Text(text=" ".join(f"w{(7 * place + number) % 90}" for place in range(11))) for number in range(13)]
HELD_OUT = [Text(text=f"w{number} {text.text}") for number, text in enumerate(TEXTS[:3], 91)]


def count_of(word: str) -> FunctionScorer:
    def score(prompts: list[Messages], responses: list[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
        return [float(response.split().count(word)) for response in responses]

    return FunctionScorer(score, name=f"count of {word}")


def config(**changes: Any) -> PpoConfig:
    """6 episodes in 3 minibatches; Adam's epsilon is so large that steps are proportional to gradients."""
    steady = {"learning_rate": 0.05, "schedule": "constant", "epsilon": 1.0}
    small: dict[str, Any] = {
        "init": "",
        "reward": "",
        "iterations": 2,
        "batch_size": 6,
        "minibatches": 3,
        "decoding": {"max_new_tokens": 5},
        "policy": steady,
        "value": steady,
        "warmup_iterations": 0,
    }
    given = small | changes
    if given.get("value_function") == "shared":
        del given["value"]  # the policy's optimizer trains it
    return from_mapping(PpoConfig, given, where="test")


def run_of(
    base: str, reward: str | None = None, *, texts: Sequence[Text] = (), seed: int = 3, **changes: Any
) -> PpoRun:
    return PpoRun(config(**changes), base, reward, count_of("w7"), PROMPTS, texts, (), CPU, seed)


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def experience_of(run: PpoRun, iteration: int = 0) -> Experience:
    chosen = run.draw_prompt(0, run.config.batch_size)
    return run.observe(chosen, run.roll_out(chosen, iteration), iteration)[0]


def made_up(run: PpoRun, finishes: Sequence[FinishReason]) -> tuple[list[int], list[Rollout]]:
    """Rollouts of 1, 2, ... tokens with given endings; what they say is fixed."""
    chosen = list(range(len(finishes)))
    stop = run.policy.tokenizer.end_id
    rollouts = []
    for place, finish in enumerate(finishes):
        body = [11 + place + step for step in range(place + 1)]
        ids = [*body, stop] if finish is FinishReason.STOP else [*body, 40]
        prompt_ids = tuple(run.prompt_ids[place])
        rollouts.append(Rollout(prompt_ids, ids, [0.0] * len(ids), finish, 0))
    return chosen, rollouts


# --- what holds before anything is trained -------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_at_step_0_the_policy_is_the_reference_and_the_sampler_the_trainer(base: str, temperature: float) -> None:
    run = run_of(base, decoding={"max_new_tokens": 5, "temperature": temperature})
    chosen = run.draw_prompt(0, 6)
    experience, metrics = run.observe(chosen, run.roll_out(chosen, 0), 0)
    assert metrics["kl"] == 0.0
    assert metrics["sampler_mismatch"] < 1e-5
    later = run.step(0)
    assert later["kl"] == 0.0
    assert experience.old_logprob_BT[experience.mask_BT].max() < 0


def test_with_one_minibatch_the_ratio_is_1(base: str) -> None:
    metrics = run_of(base, minibatches=1).step(0)
    assert metrics["approx_kl"] < 1e-10
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["clip_fraction"] == 0


def test_in_the_second_inner_epoch_the_ratio_is_not_1(base: str) -> None:
    metrics = run_of(base, minibatches=1, inner_epochs=2).step(0)
    assert metrics["approx_kl"] > 1e-8
    assert metrics["ratio_max"] > 1.0001


def test_dropout_that_was_left_on_is_caught(tmp_path: Path) -> None:
    run = run_of(str(save_model(tmp_path / "gpt2", "gpt2")))
    for module in run.policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
            module.train()
    with pytest.raises(TrainingError, match="before the first step, policy and reference differ"):
        run.step(0)


def test_another_temperature_for_the_reference_is_caught(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(base)

    def at_one_half(model: Any, packed: Any, source_M: Tensor, target_M: Tensor) -> Tensor:
        temperature = 0.5 if model is run.reference else 1.0
        logprob_M: Tensor = model.predict(packed, source_M, target_M, temperature=temperature).logprob_M
        return logprob_M

    monkeypatch.setattr(run, "_logprobs", at_one_half)
    with pytest.raises(TrainingError, match="policy and reference differ"):
        run.step(0)


def test_old_log_probs_of_other_weights_are_caught(base: str) -> None:
    run = run_of(base)
    stale = experience_of(run)
    with pytest.raises(TrainingError, match="at the first minibatch of iteration 1 new and old log-probs differ"):
        run.update(replace(stale, old_logprob_BT=stale.old_logprob_BT + 0.01), 1)


def test_the_value_function_is_the_reward_model(base: str, reward_model: str) -> None:
    run = run_of(base, reward_model)
    rows = [[3, 5, 7, 11], [4, 6]]
    expected_S = load_reward_model(reward_model).scores(pack(rows))
    assert isinstance(run.value, torch.nn.Module)
    at_the_end_S = run.value.at(pack(rows), torch.tensor([3, 5]))
    torch.testing.assert_close(at_the_end_S, expected_S, rtol=0, atol=1e-6)
    scorer = ModelScorer(load_reward_model(reward_model), budget=99)
    run.scorer = scorer
    chosen = run.draw_prompt(0, 6)
    rollouts = run.roll_out(chosen, 0)
    sequences = [(*rollout.prompt_ids, *rollout.response_ids) for rollout in rollouts]
    values = [run.value.at(pack([ids]), torch.tensor([len(ids) - 1])).item() for ids in sequences]
    scores = scorer([run.prompts[i] for i in chosen], [as_response(run.policy, rollout) for rollout in rollouts])
    assert values == pytest.approx(scores, abs=1e-5)


# --- rewards, endings, advantages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("truncated", "lost"), [("penalty", 1.5), ("score", 0.0), ("mask", 0.0)])
def test_the_score_lands_on_the_last_token_whatever_the_ending(base: str, truncated: str, lost: float) -> None:
    """Without KL, discount and lambda every return of a row is what the row's score comes to."""
    settings: dict[str, Any] = {
        "truncated": truncated,
        "truncation_penalty": 1.5,
        "kl_coef": 0.0,
        "lam": 1.0,
        "whiten_advantages": False,
    }
    run = run_of(base, **settings)
    run.scorer = FunctionScorer(lambda prompts, responses, records: [2.0, -3.0, 5.0], name="given")
    endings = [FinishReason.STOP, FinishReason.LENGTH, FinishReason.STOP]
    experience, metrics = run.observe(*made_up(run, endings), 1)
    assert experience.response_lengths == [2, 3, 4]
    for row, (score, count) in enumerate(((2.0, 2), (-3.0 - lost, 3), (5.0, 4))):
        assert experience.return_BT[row, :count].tolist() == pytest.approx([score] * count, abs=1e-5)
        assert experience.return_BT[row, count:].tolist() == [0.0] * (4 - count)
    trains = [2, 0, 4] if truncated == "mask" else [2, 3, 4]
    assert experience.mask_BT.sum(1).tolist() == trains
    assert metrics["score"] == pytest.approx(4 / 3)
    assert metrics["truncated_rate"] == pytest.approx(1 / 3)


def test_the_losses_of_a_minibatch_are_not_read_on_the_way(base: str) -> None:
    """Reading a number between forward and backward would let a GPU wait."""
    run = run_of(base)
    chosen, rollouts = made_up(run, [FinishReason.STOP, FinishReason.LENGTH, FinishReason.STOP])
    experience, _ = run.observe(chosen, rollouts, 1)
    with counting() as work:
        loss = run._policy_loss(experience, [2, 0], 7.0)
        error = run._value_loss(experience, [2, 0], 7.0)
    assert work.operators["_local_scalar_dense"] == 0
    assert all(amount.ndim == 0 for amount in (*loss.sums.values(), *error.sums.values()))


def test_a_masked_response_trains_nothing(base: str) -> None:
    """With one finished and one cut response, the gradient is that of the finished one alone."""
    grads = []
    for endings in ([FinishReason.STOP], [FinishReason.STOP, FinishReason.LENGTH]):
        run = run_of(base, truncated="mask", whiten_advantages=False)
        run.scorer = FunctionScorer(lambda prompts, responses, records: [2.0, -3.0][: len(responses)], name="given")
        chosen, rollouts = made_up(run, endings)
        experience, _ = run.observe(chosen, rollouts, 1)
        tokens = float(experience.mask_BT.sum())
        run.policy_trainer.accumulate([chosen], partial(run._policy_loss, experience), tokens)
        grads.append(torch.cat([p.grad.flatten() for p in run.policy_trainer.parameters if p.grad is not None]))
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-5)
    assert grads[0].norm() > 1e-3


def test_the_kl_penalty_is_in_the_reward(base: str) -> None:
    """The reward of a row is its score minus kl_coef times log pi - log ref, summed."""
    run = run_of(base, kl_coef=0.5)
    run.step(0)
    chosen = run.draw_prompt(6, 6)
    _, metrics = run.observe(chosen, run.roll_out(chosen, 1), 1)
    assert abs(metrics["kl"]) > 1e-4
    penalty = metrics["truncated_rate"] * run.config.truncation_penalty
    assert metrics["reward"] == pytest.approx(metrics["score"] - penalty - 0.5 * metrics["kl"], abs=1e-5)


def test_the_adaptive_coefficient_is_steered_by_the_measured_kl(base: str) -> None:
    """KL is 0 at first, so the error is clipped to -0.2: 0.1 (1 - 0.2 * 6 / 300) = 0.0996."""
    run = run_of(base, kl_coef=0.1, adaptive_kl={"target": 2.0, "horizon": 300.0})
    assert run.step(0)["kl_coef"] == pytest.approx(0.1)
    assert run.kl_coef == pytest.approx(0.0996, abs=1e-9)
    assert run.step(1)["kl_coef"] == pytest.approx(0.0996, abs=1e-9)


# --- optimizer steps ------------------------------------------------------------------------------------------------


def test_every_episode_is_visited_once_in_each_inner_epoch(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(base, inner_epochs=2)
    visited: list[int] = []
    step = run._policy_step

    def spy(experience: Experience, chosen: Sequence[int], place: int) -> Any:
        visited.extend(chosen)
        return step(experience, chosen, place)

    monkeypatch.setattr(run, "_policy_step", spy)
    run.step(0)
    assert sorted(visited[:6]) == sorted(visited[6:]) == list(range(6))
    assert visited[:6] != visited[6:]
    assert run.policy_trainer.steps_taken == 2 * 3
    assert run.value_trainer is not None
    assert run.value_trainer.steps_taken == 2 * 3
    run.step(1)
    assert run.policy_trainer.steps_taken == 2 * 2 * 3 == run.policy_trainer.total_steps


def test_the_ptx_gradient_is_added_to_ppos_in_one_step(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(base, texts=TEXTS, ptx_coef=27.8, ptx_examples_per_episode=1.5, microbatch_tokens=30)
    experience, parameters = experience_of(run), run.policy_trainer.parameters
    chosen = [4, 1]

    def gradient() -> Tensor:
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        run.policy_trainer.optimizer.zero_grad()
        return flat

    tokens = float(experience.mask_BT[chosen].sum())
    run.policy_trainer.accumulate([chosen], partial(run._policy_loss, experience), tokens)
    of_ppo = gradient()
    batches, num_predicted = run._text_batch(len(chosen), 5)
    assert len(batches) == 2, "3 texts of 12 tokens do not fit one micro-batch of 30"
    assert num_predicted == 3 * 11, "11 words and the end token: 11 are predicted"
    run.policy_trainer.accumulate(batches, run._ptx_loss, num_predicted)
    of_text = gradient()
    caught: list[Tensor] = []
    apply = run.policy_trainer.apply

    def spy(loss: float, sums: Mapping[str, float]) -> Any:
        caught.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return apply(loss, sums)

    monkeypatch.setattr(run.policy_trainer, "apply", spy)
    run._policy_step(experience, chosen, 5)
    torch.testing.assert_close(caught[0], of_ppo + of_text, rtol=1e-5, atol=1e-6)
    assert of_text.norm() > 0
    assert of_ppo.norm() > 0


def test_the_size_of_micro_batches_changes_nothing(base: str, reward_model: str) -> None:
    results = []
    for budget in (12, 10_000):
        run = run_of(base, reward_model, texts=TEXTS, ptx_coef=0.5, microbatch_tokens=budget)
        metrics = run.step(0)
        assert isinstance(run.value, torch.nn.Module)
        results.append((weights(run.policy), weights(run.value), metrics))
    for one, other in zip(results[0][:2], results[1][:2], strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5)
    assert results[0][2] == pytest.approx(results[1][2], abs=1e-4)
    moved = weights(run_of(base).policy)
    assert any((results[0][0][name] - moved[name]).abs().max() > 1e-4 for name in moved)


# --- variants -------------------------------------------------------------------------------------------------------


def test_a_shared_trunk_trains_policy_and_value_together(base: str) -> None:
    run = run_of(base, value_function="shared")
    assert run.value_trainer is None
    assert float(experience_of(run).value_BT.abs().max()) == 0.0, "the head starts at zero"
    before = weights(run.policy)
    metrics = run.step(0)
    assert metrics["value_loss"] > 0
    assert any((before[name] != now).any() for name, now in weights(run.policy).items())
    assert float(experience_of(run, 1).value_BT.abs().max()) > 0


def test_the_policys_loss_is_reported_without_the_value_functions(base: str) -> None:
    """Before the only step of an iteration, how much the value's loss weighs does not touch the policy's."""
    light, heavy, separate = (
        run_of(base, minibatches=1, **changes).step(0)
        for changes in (
            {"value_function": "shared", "value_coef": 0.0},
            {"value_function": "shared", "value_coef": 50.0},
            {"value_function": "separate"},
        )
    )
    assert heavy["value_loss"] == light["value_loss"] > 0.01
    assert heavy["policy_loss"] == light["policy_loss"]
    assert heavy["grad_norm"] > light["grad_norm"]
    assert abs(separate["policy_loss"]) < 1e-5, "whitened advantages at ratio 1"


@pytest.mark.parametrize("value", ["float32", "bfloat16"])
def test_each_network_is_read_in_the_precision_that_it_is_trained_in(
    base: str, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """Else values are clipped around values of another precision, though nothing was trained in between."""
    policy = "float32" if value == "bfloat16" else "bfloat16"
    rates = {"learning_rate": 0.05, "schedule": "constant"}
    run = run_of(base, policy=rates | {"precision": policy}, value=rates | {"precision": value})
    seen: dict[str, set[bool]] = {"policy": set(), "value": set()}

    def spy(name: str, function: Any) -> Any:
        def spied(*arguments: Any) -> Tensor:
            seen[name].add(torch.is_autocast_enabled("cpu"))
            found: Tensor = function(*arguments)
            return found

        return spied

    monkeypatch.setattr(run, "_values", spy("value", run._values))
    monkeypatch.setattr(run, "_logprobs", spy("policy", run._logprobs))
    run.step(0)
    assert seen == {"policy": {policy == "bfloat16"}, "value": {value == "bfloat16"}}


def test_a_shared_value_is_not_rounded(base: str) -> None:
    run = run_of(base, value_function="shared")
    assert isinstance(run.value, SharedValue)
    torch.nn.init.normal_(run.value.head.weight, generator=torch.Generator().manual_seed(0))
    hidden_ND = torch.randn(7, 1, generator=torch.Generator().manual_seed(1)) * torch.ones(run.value.head.in_features)
    hidden_ND = hidden_ND.bfloat16()
    source_M = torch.tensor([0, 2, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value_M = run.value.read(hidden_ND, source_M)
    expected_M = hidden_ND[source_M].double() @ run.value.head.weight[0].double()
    torch.testing.assert_close(value_M.double(), expected_M, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["policy", "value"])
def test_a_warm_up_that_would_be_ignored_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}\.warmup_steps is 5.*warmup_iterations"):
        config(**{name: {"learning_rate": 0.05, "warmup_steps": 5}})


def test_lora_trains_adapters_alone_and_keeps_the_reference_exact(base: str) -> None:
    pytest.importorskip("peft")
    run = run_of(base, lora={"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]})
    frozen = {name: p.clone() for name, p in run.policy.named_parameters() if not p.requires_grad}
    trained = {name: p.clone() for name, p in run.policy.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    run.step(0)
    run.step(1)
    now = dict(run.policy.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert any(not torch.equal(now[name], value) for name, value in trained.items())
    packed, source_M = pack([[3, 5, 7, 11]]), torch.tensor([0, 1, 2])
    original = load_policy(base).predict(packed, source_M, packed.id_N[source_M + 1]).logprob_M
    with adapters_off(run.policy.library):
        off = run.reference.predict(packed, source_M, packed.id_N[source_M + 1]).logprob_M
    on = run.policy.predict(packed, source_M, packed.id_N[source_M + 1]).logprob_M
    torch.testing.assert_close(off, original, rtol=0, atol=0)
    assert (on - original).abs().max() > 1e-7


def test_a_reward_model_may_have_another_template(
    base: str, reward_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same words, which it reads in another form: its head has not seen what the policy's prompts look like."""
    assert run_of(base, reward_model).value is not None
    assert capsys.readouterr().err == ""
    model = load_reward_model(reward_model)
    library = model.tokenizer.library
    library.chat_template = library.chat_template.replace(" w0 ", " w2 ")
    save_reward_model(tmp_path, model)
    run_of(base, str(tmp_path))
    assert "has another tokenizer or template; the value function starts from the policy" in capsys.readouterr().err


def test_held_out_text_is_not_trained_on(base: str) -> None:
    with pytest.raises(DataError, match="2 of 3 held-out documents are trained on too; leave them out"):
        PpoRun(config(ptx_coef=1.0), base, None, count_of("w7"), PROMPTS, TEXTS, [*TEXTS[:2], *HELD_OUT[:1]], CPU, 3)


def test_a_reward_model_may_have_another_tokenizer(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_reward_model(tmp_path / "rm", new_reward_model(str(save_random_base(tmp_path / "base")), seed=1))
    reward = str(tmp_path / "rm")
    scorer = ModelScorer(load_reward_model(reward), budget=99)
    run = PpoRun(config(), base, reward, scorer, PROMPTS, (), (), CPU, 0)
    assert "another tokenizer" in capsys.readouterr().err
    assert isinstance(run.value, RewardModel)
    assert run.value.tokenizer.vocabulary == run.policy.tokenizer.vocabulary
    assert run.step(0)["score"] != 0


def test_prompts_too_long_are_left_out_loudly(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    long = prompt("w5 " * 70)
    run = PpoRun(config(), base, None, count_of("w7"), [*PROMPTS, long], (), (), CPU, 0)
    assert len(run.prompts) == len(PROMPTS)
    assert "1 of 8 prompts are left out: with 5 new tokens they do not fit" in capsys.readouterr().err
    with pytest.raises(DataError, match="none of the 1 prompts leaves room for 5 new tokens"):
        PpoRun(config(), base, None, count_of("w7"), [long], (), (), CPU, 0)


def test_sampler_log_probs_give_the_same_update(base: str) -> None:
    """What the sampler's own are held against is the first minibatch alone: a distance of 0 is not written down."""
    results = []
    for source in ("trainer", "sampler"):
        run = run_of(base, old_logprobs=source)
        metrics = run.step(0)
        named = {"sampler_mismatch", "sampler_mismatch_max", "sampler_ratio"} & metrics.keys()
        assert len(named) == (3 if source == "trainer" else 0)
        assert metrics["first_log_ratio"] < 1e-5
        results.append(weights(run.policy))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("per_paper_batch", [0.5, 0.0])
def test_files_of_a_run(base: str, tmp_path: Path, per_paper_batch: float) -> None:
    """After one iteration the average is d w0 + (1 - d) w1 with d = 0.5 ** (6 / 512); with 0 it is the policy."""
    settings = config(iterations=1, ema_decay=per_paper_batch, keep_every=1)
    assert ("average" in run_of(base, ema_decay=per_paper_batch).states()) is (per_paper_batch > 0)
    texts = TEXTS[:3]
    train_ppo(
        tmp_path,
        config=settings,
        init=base,
        reward=None,
        scorer=count_of("w7"),
        prompts=PROMPTS,
        heldout_text=texts,
        device=CPU,
        seed=3,
    )
    start, end, average, kept = (
        weights(load_policy(str(folder)).library)
        for folder in (base, tmp_path / "model", tmp_path / "model-ema", tmp_path / "iterations" / "0001")
    )
    decay = per_paper_batch ** (6 / 512)
    for name in start:
        torch.testing.assert_close(average[name], decay * start[name] + (1 - decay) * end[name], rtol=0, atol=1e-6)
        assert torch.equal(kept[name], end[name])
    assert any((start[name] - end[name]).abs().max() > 1e-4 for name in start)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["heldout_text_loss"] > 0
    assert {"score", "reward", "kl", "kl_coef", "entropy", "policy_loss", "value_loss", "ratio_max"} <= set(row)


def test_held_out_text_is_measured_after_the_first_iteration_and_every_tenth_of_all(base: str) -> None:
    run = PpoRun(config(iterations=20), base, None, count_of("w7"), PROMPTS, (), TEXTS[:2], CPU, 3)
    measured = ["heldout_text_loss" in run.step(iteration) for iteration in range(5)]
    assert measured == [True, True, False, True, False]


def test_ppo_learns_to_say_a_word(base: str) -> None:
    """The reward counts a word that the policy says about once in a hundred tokens."""
    adam = {"learning_rate": 4e-3, "schedule": "constant"}
    settings = {
        "iterations": 25,
        "batch_size": 32,
        "minibatches": 2,
        "policy": adam,
        "value": adam,
        "truncated": "score",
    }
    run = PpoRun(config(**settings, kl_coef=0.0), base, None, count_of("w7"), PROMPTS, (), (), CPU, 0)
    scores = [run.step(iteration)["score"] for iteration in range(25)]
    assert sum(scores[:3]) / 3 < 0.5
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 1.5
