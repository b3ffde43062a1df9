"""Pitfalls 65 to 70: resuming, modes, DPO's reference, which model is judged and on what, and over-optimisation."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.float64 import response_logprobs
from tests.models import save_model
from tests.pitfalls.watching import values_of
from tests.stages.conftest import demonstration, ranking
from tests.stages.test_ppo import CPU, PROMPTS, TEXTS, config, count_of, run_of

from tastemaker.artefacts import hash_path
from tastemaker.checkpoint import load_policy, load_state, save_state
from tastemaker.config import from_mapping, load_recipe
from tastemaker.errors import DataError
from tastemaker.files import read_demonstrations, read_rankings, write_records
from tastemaker.inputs import Inputs
from tastemaker.losses import dpo_loss
from tastemaker.metrics import MetricsWriter, read_metrics
from tastemaker.recipe import Recipe
from tastemaker.recompute import layers_recomputed
from tastemaker.records import About, Message, Messages, Prompt
from tastemaker.report.distance import distance
from tastemaker.report.families import Inks
from tastemaker.report.reading import read_run
from tastemaker.responses import DecodingConfig, engine_for, sampling_for
from tastemaker.round import Round
from tastemaker.stages.dpo import DpoConfig, as_pairs, pair_logprobs, train_dpo
from tastemaker.stages.ppo import PpoRun, train_ppo
from tastemaker.stages.prompts import PromptsConfig, overlap, take_in
from tastemaker.stages.reward import RewardConfig, train_reward_model
from tastemaker.stages.sft import SftConfig, select_epoch, train_sft
from tastemaker.training import Trainer

RANKINGS = [ranking(f"w{n} w3", ["w7 w8", "w9", f"w{n} w{n} w{n}"], ((0,), (1, 2))) for n in range(20, 31)]
SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.toml"


# --- resuming -------------------------------------------------------------------------------------------------------


def state_of(run: PpoRun) -> dict[str, Any]:
    return {name: state.state() for name, state in run.states().items()}


def flat(state: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """The tensors and numbers of a nested state, by the path to each."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        inner = dict(enumerate(value)) if isinstance(value, list) else value
        found |= flat(inner, f"{place}/{name}") if isinstance(inner, dict) else {f"{place}/{name}": inner}
    return found


def test_65_a_resumed_run_samples_from_the_weights_it_began_with(base: str, tmp_path: Path) -> None:
    """After a resume the first rollout comes from the engine's own, older copy of the weights, or the controller, the
    average or the data's position begins anew; nothing fails, and the run is another one.

    Source: allenai/open-instruct#1627, PrimeIntellect-ai/prime-rl#3004, volcengine/verl#7401.
    Here: `PpoRun.roll_out` hands the engine the weights before each rollout; a step is a function of the checkpointed
    states and of its own number (`training.loop.run_steps`).
    """
    adam = {"learning_rate": 0.01, "schedule": "constant"}
    settings: dict[str, Any] = {
        "decoding": {"max_new_tokens": 5, "precision": "bfloat16"},  # the engine has a copy of its own
        "policy": adam,
        "value": adam,
        "kl_coef": 0.3,
        "adaptive_kl": {"target": 0.05, "horizon": 20.0},
        "ptx_coef": 0.5,
        "ema_decay": 0.5,
        "iterations": 3,
    }
    whole, resumed = (run_of(base, texts=TEXTS, **settings) for _ in range(2))
    chosen = list(range(6))
    fresh = resumed.roll_out(chosen, 1)
    whole.step(0)
    save_state(tmp_path / "state.pt", state_of(whole))
    saved = load_state(tmp_path / "state.pt")
    assert saved is not None
    for name, state in resumed.states().items():
        state.load_state(saved[name])
    now = resumed.roll_out(chosen, 1)
    assert now == whole.roll_out(chosen, 1)
    assert {rollout.weights_version for rollout in now} == {1}
    assert [rollout.logprobs for rollout in now] != [rollout.logprobs for rollout in fresh]
    assert whole.step(1) == resumed.step(1)
    assert whole.kl_coef == resumed.kl_coef != 0.3
    assert whole.average is not None
    assert resumed.average is not None
    for name, tensor in whole.average.weights.items():
        assert torch.equal(tensor, resumed.average.weights[name]), name
    one, other = (flat(state_of(run)) for run in (whole, resumed))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


class Killed(BaseException):
    """Stands for the end of the process."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Within the block a run ends before it writes the metrics of that step."""
    with pytest.MonkeyPatch.context() as patched:
        write = MetricsWriter.write

        def dies(writer: MetricsWriter, number: int, values: Mapping[str, float]) -> None:
            if number == step:
                raise Killed
            write(writer, number, values)

        patched.setattr(MetricsWriter, "write", dies)
        yield


def train(stage: str, folder: Path, base: str) -> None:
    """Six steps or more, with a checkpoint after every second."""
    rate = {"learning_rate": 1e-3, "schedule": "linear"}
    small: dict[str, Any] = {"optimizer": rate, "checkpoint_every": 2}
    if stage == "sft":
        rows = [demonstration(f"w{n} w{n + 1}", f"w{n + 2} w{n}") for n in range(5, 14)]
        settings = from_mapping(SftConfig, small | {"epochs": 2, "batch_size": 3}, where="test")
        train_sft(folder, config=settings, base=base, demonstrations=rows, device=CPU, seed=2)
    elif stage == "reward":
        chosen = from_mapping(RewardConfig, small | {"epochs": 2, "batch_size": 4}, where="test")
        train_reward_model(folder, config=chosen, init=base, rankings=RANKINGS, device=CPU, seed=2)
    else:
        config = from_mapping(DpoConfig, small | {"init": "", "epochs": 2, "batch_size": 7}, where="test")
        train_dpo(folder, config=config, init=base, rankings=RANKINGS, device=CPU, seed=2)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_65_every_stage_goes_on_as_though_it_had_not_stopped(stage: str, tmp_path: Path) -> None:
    """GPT-2 has the residual dropout of SFT, whose noise must be that of the step and not of the process."""
    gpt2 = str(save_model(tmp_path / "base", "gpt2"))
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    train(stage, whole, gpt2)
    with killed_at(3), pytest.raises(Killed):
        train(stage, torn, gpt2)
    assert len(read_metrics(torn / "metrics.jsonl")) == 3
    train(stage, torn, gpt2)
    rows = [[row | {"seconds": 0} for row in read_metrics(folder / "metrics.jsonl")] for folder in (whole, torn)]
    assert rows[0] == rows[1]
    assert len(rows[0]) >= 6
    assert hash_path(whole / "model") == hash_path(torn / "model")


# --- modes ----------------------------------------------------------------------------------------------------------


def modes(module: torch.nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


@pytest.mark.parametrize("streamed", [False, True])
def test_66_generation_leaves_the_model_evaluating(base: str, streamed: bool) -> None:
    """Sampling switches to evaluation and does not switch back, or not when it is interrupted, so training goes on
    without dropout; or gradient checkpointing stays on and takes the cache away from decoding.

    Source: no system is named.
    Here: `Generator` and `recompute.layers_recomputed` change modes in context managers that restore each module's own
    mode, whatever ends the block.
    """
    policy, decoding = load_policy(base), DecodingConfig(max_new_tokens=5)
    policy.train()
    policy.library.model.layers[0].eval()  # modules in unlike modes are restored one by one
    before = modes(policy.library)
    assert len(set(before)) == 2
    arguments: tuple[Any, ...] = ([[1, 4, 9, 5]] * 3, 1, sampling_for(policy, decoding), [3, 5, 7])
    engine = engine_for(policy, decoding)
    if streamed:
        for piece in engine.stream(*arguments):
            assert piece.token >= 0
            assert modes(policy.library) == before, "between two pieces the model is its owner's"
        return

    def interrupt(finished: int) -> None:
        assert not any(modes(policy.library))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(*arguments, progress=interrupt)
    assert modes(policy.library) == before


def test_66_layers_are_recomputed_within_their_block_alone(base: str) -> None:
    """Though the block ends in an error; what is decoded after it is what was decoded before."""
    policy, decoding = load_policy(base), DecodingConfig(max_new_tokens=7)
    engine, before = engine_for(policy, decoding), modes(policy.library)
    arguments: tuple[Any, ...] = ([[1, 4, 9, 5], [1, 4, 5]], 2, sampling_for(policy, decoding), [3, 5])
    first = engine.generate(*arguments)
    seen = list[list[bool]]()

    def interrupt() -> None:
        with layers_recomputed(policy):
            seen.append(modes(policy.library))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert seen != [before]
    assert modes(policy.library) == before
    assert not any(layer.gradient_checkpointing for layer in policy.library.model.layers)
    assert engine.generate(*arguments) == first


# --- DPO ------------------------------------------------------------------------------------------------------------


def dpo_config(**changes: Any) -> DpoConfig:
    rate = {"learning_rate": 1e-3, "schedule": "constant"}
    return from_mapping(DpoConfig, {"init": "", "batch_size": 22, "optimizer": rate} | changes, where="test")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_67_dpo_starts_away_from_its_reference(base: str, tmp_path: Path, precision: str) -> None:
    """The reference's log-probs are computed in another precision or by another kernel than the policy's, so before the
    first step the loss is not log 2 and the first gradients are rounding.

    Source: NVIDIA/NeMo-Aligner.
    Here: `stages.dpo.pair_logprobs` takes the reference's by the same forward pass and in the same precision; log-probs
    are sums over the response and its end token.
    """
    rate = {"learning_rate": 1e-3, "schedule": "constant", "precision": precision}
    settings = dpo_config(optimizer=rate, beta=5.0)  # so large that a difference of .01 nats would be seen
    train_dpo(tmp_path, config=settings, init=base, rankings=RANKINGS, device=CPU, seed=1)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert row["margin"] == pytest.approx(0, abs=1e-4)


def test_67_log_probs_are_sums_over_the_response_alone(base: str) -> None:
    """Chosen and rejected go through the model together, and come out as each does alone."""
    policy = load_policy(base)
    pairs = as_pairs([ranking("w5 w3", ["w7 w8 w9 w10", "w7 w8", "w6"], ((1,), (0,), (2,)))], policy)
    found_P2 = pair_logprobs(policy, pairs, dpo_config(), Trainer(policy, dpo_config().optimizer, total_steps=1))
    for pair, found in zip(pairs, found_P2.tolist(), strict=True):
        exact = [
            float(response_logprobs(policy.library, pair.prompt_ids, ids).sum())
            for ids in (pair.chosen_ids, pair.rejected_ids)
        ]
        assert found == pytest.approx(exact, abs=1e-4)
    assert [len(pair.chosen_ids) for pair in pairs] == [5, 3, 3]


def test_67_the_variants_are_those_of_the_papers() -> None:
    """Margins of 7 and 2 nats: h = 5, and log sigmoid(.5) = -.474077, log sigmoid(-.5) = -.974077."""
    margin_B, ref_B = torch.tensor([7.0]), torch.tensor([2.0])
    assert float(dpo_loss(margin_B, ref_B, beta=0.1)) == pytest.approx(0.474077, abs=1e-6)
    smooth = float(dpo_loss(margin_B, ref_B, beta=0.1, label_smoothing=0.2))
    assert smooth == pytest.approx(0.8 * 0.474077 + 0.2 * 0.974077, abs=1e-6)
    assert float(dpo_loss(margin_B, ref_B, beta=0.25, variant="ipo")) == pytest.approx((5 - 2) ** 2, abs=1e-5)
    assert float(dpo_loss(ref_B, margin_B, beta=0.25, variant="ipo")) == pytest.approx((-5 - 2) ** 2, abs=1e-5)


# --- which model ----------------------------------------------------------------------------------------------------


def test_68_another_model_is_exported_than_was_chosen(tmp_path: Path) -> None:
    """The weights that are exported are the last ones, or the average's, and the score that is reported for them was
    measured on others.

    Source: no system is named.
    Here: `select_epoch` writes the very epoch that scored best; a contestant names model, average or iteration, and the
    evaluation's manifest holds the hash of the folder that was loaded (`Inputs.model`).
    """
    epochs = tmp_path / "epochs"
    for number in (1, 2, 3):
        save_model(epochs / f"{number:02d}", seed=number)
    model = select_epoch(tmp_path / "selected", scores={"01": -0.5, "02": 0.25, "03": 0.0}, epochs=epochs)
    chosen, best = (load_policy(str(folder)).library.state_dict() for folder in (model, epochs / "02"))
    assert all(torch.equal(chosen[name], tensor) for name, tensor in best.items())
    assert json.loads((tmp_path / "selected" / "choice.json").read_text())["chosen"] == "02"


def test_68_the_exported_average_is_the_average(base: str, tmp_path: Path) -> None:
    """With a decay of a half for each iteration, of which there is one."""
    settings = config(iterations=1, ema_decay=0.5 ** (512 / 6))  # it is meant for 512 episodes; an iteration has 6
    given: dict[str, Any] = {"scorer": count_of("w7"), "prompts": PROMPTS, "device": CPU, "seed": 3}
    train_ppo(tmp_path, config=settings, init=base, reward=None, **given)
    folders = (base, tmp_path / "model", tmp_path / "model-ema")
    start, end, average = (values_of(load_policy(str(folder)).parameters()) for folder in folders)
    assert (end - start).abs().max() > 1e-4
    torch.testing.assert_close(average, 0.5 * start + 0.5 * end, rtol=0, atol=1e-6)


def test_68_an_evaluation_remembers_the_weights_that_it_judged(tmp_path: Path) -> None:
    recipe = load_recipe(SMOKE, Recipe)
    places = {
        "policy/ppo-ptx": "6-policy/ppo-ptx/model",
        "policy/ppo-ptx:ema": "6-policy/ppo-ptx/model-ema",
        "policy/ppo-ptx:40": "6-policy/ppo-ptx/iterations/0040",
        "sft/baseline": "3-sft/baseline-selected/model",
        "sft/ppo-init": "3-sft/ppo-init/model",
    }
    for name, place in places.items():
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "model.safetensors").write_text(f"the weights of {name}")
    inputs = Inputs(recipe, tmp_path, CPU)
    for name, place in places.items():
        found = inputs.model(name)
        assert found.load() == str(tmp_path / place)
        assert found.fingerprint == inputs.known[place] == hash_path(tmp_path / place)
    assert len(set(inputs.known.values())) == len(places)
    (tmp_path / places["policy/ppo-ptx:ema"] / "model.safetensors").write_text("other weights")
    assert Inputs(recipe, tmp_path, CPU).model("policy/ppo-ptx:ema").fingerprint not in inputs.known.values()


# --- on which prompts -----------------------------------------------------------------------------------------------


def by(user: str, text: str, split: Any = None) -> Prompt:
    return Prompt(messages=(Message("user", text),), about=About(user=user, split=split))


def test_69_test_prompts_were_trained_on() -> None:
    """Prompts that are trained on come back in the evaluation, word for word or in another case, or from a user whose
    other prompts were trained on, so what is measured is memory.

    Source: allenai/open-instruct (decontamination scripts).
    Here: the intake keeps one of several equal prompts, a test prompt before others, and splits users and not prompts
    (`stages.prompts.take_in`); PPO is given training prompts alone; ready demonstrations of test prompts are refused,
    ready rankings of them only measure; conversations that begin with one count as it. The examples of a few-shot
    contestant's own file (`FewShot.source`) are not checked.
    """
    text = "Name seven green things, and say where each of them grows."
    rows = [by("ann", text.upper(), "train"), by("bob", text, "test"), by("cem", f"  {text}\n ", "validation")]
    kept, report = take_in(rows, PromptsConfig(source=""))
    assert [row.about.user for row in kept] == ["bob"]
    assert report.dropped["duplicate"] == 2
    assert len(overlap(rows[:2], rows[2:])) == 2
    many = [by(f"user {n % 7}", f"{n} {text}") for n in range(70)]
    kept, _ = take_in(many, PromptsConfig(source="", test_share=0.3, validation_share=0.3))
    assert len(kept) == 70
    assert len({row.about.split for row in kept}) > 1
    for user in range(7):
        assert len({row.about.split for row in kept if row.about.user == f"user {user}"}) == 1


def test_69_a_conversation_that_goes_on_from_a_test_prompt_is_not_trained_on() -> None:
    """Whoever learns from it learns what was replied to the test prompt. Up to any user turn; a short one, too."""
    turns = [Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Why?"), Message("assistant", "So.")]
    rows = [
        Prompt(messages=tuple(turns[:1]), about=About(user="ann", split="test")),
        Prompt(messages=(Message("user", " hI "), *turns[1:3]), about=About(user="bob", split="train")),
        Prompt(messages=(*turns[:1], *turns[1:4], Message("user", "Oh")), about=About(user="cem", split="validation")),
        Prompt(messages=(Message("user", "Ho"),), about=About(user="dee", split="train")),
    ]
    kept, report = take_in(rows, PromptsConfig(source=""))
    assert [row.about.user for row in kept] == ["ann", "dee"]
    assert report.dropped["begins_with_test_prompt"] == 2
    assert take_in(kept, PromptsConfig(source=""))[0] == kept
    longer = [replace(rows[1], about=About(user="eve", split="test")), replace(rows[0], about=About(user="fay"))]
    assert len(take_in(longer, PromptsConfig(source="", test_share=0, validation_share=0))[0]) == 2, "not the reverse"


def a_round(folder: Path, base: str, changes: Mapping[str, Any]) -> Round:
    """A round with two training prompts, a test prompt, and what else it is given."""
    asked = [by("ann", "w20 w3", "train"), by("ann", "w21 w3", "train"), by("bob", "w22 w3", "test")]
    write_records(folder / "prompts.jsonl", asked)
    prompts = {"source": str(folder / "prompts.jsonl")}
    whole = {"name": "leak", "threads": 1, "base": {"model": base}, "prompts": prompts, **changes}
    return Round(from_mapping(Recipe, whole, where="test"), folder / "out")


# A conversation that begins with the test prompt.
LATER = Prompt(messages=(Message("user", "w22 w3"), Message("assistant", "w4"), Message("user", "w5")))


def test_69_demonstrations_of_test_prompts_are_refused(base: str, tmp_path: Path) -> None:
    source = tmp_path / "demonstrations.jsonl"
    write_records(source, [demonstration("w20 w3", "w5"), demonstration(" W22  w3 ", "w6")])
    later = [*LATER.messages, Message("assistant", "w6"), Message("user", "w7")]
    with a_round(tmp_path, base, {"demonstrations": {"source": str(source)}}) as round_:
        round_.prompts()
        with pytest.raises(DataError, match="1 test prompts also occur in the demonstrations"):
            round_.demonstrations()
        write_records(source, [demonstration("w20 w3", "w5"), replace(demonstration("w22 w3", "w6"), prompt=LATER)])
        with pytest.raises(DataError, match="1 test prompts also occur in the demonstrations"):
            round_.demonstrations()
        for test in (LATER, replace(LATER, messages=LATER.messages[:1])):
            with pytest.raises(DataError, match="1 test prompts also occur in the x"):
                round_.refuse_test_prompts([replace(LATER, messages=tuple(later))], [test], "x")
        write_records(source, [demonstration("w20 w3", "w5")])
        round_.demonstrations()
    written = read_demonstrations(tmp_path / "out" / "round-1" / "2-demonstrations" / "train.jsonl")
    assert [one.response for one in written] == ["w5"]


def test_69_rankings_of_test_prompts_train_nothing(base: str, tmp_path: Path) -> None:
    """Nor do those of conversations that begin with one."""
    rows = [ranking(text, ["w5", "w6"], ((0,), (1,))) for text in ("w20 w3", "w22 w3")]
    rows.append(replace(ranking("w22 w3", ["w7", "w8"], ((1,), (0,))), prompt=LATER))
    write_records(tmp_path / "rankings.jsonl", rows)
    with a_round(tmp_path, base, {"comparisons": {"source": str(tmp_path / "rankings.jsonl")}}) as round_:
        round_.prompts()
        round_.comparisons()
    folder = tmp_path / "out" / "round-1" / "4-comparisons"
    train_rows, test_rows = (read_rankings(folder / f"{split}.jsonl") for split in ("train", "test"))
    assert [row.prompt.messages[0].content for row in train_rows] == ["w20 w3"]
    assert [len(row.prompt.messages) for row in test_rows] == [1, 3]


def test_69_ppo_trains_on_no_test_prompt(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the prompts whose responses it asks a score for."""
    asked, module = list[str](), ModuleType("asked_of_reward")

    def score(prompts: Sequence[Messages], responses: Sequence[str], records: Any) -> list[float]:
        asked.extend(messages[-1].content for messages in prompts)
        return [float(len(response)) for response in responses]

    monkeypatch.setattr(module, "score", score, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    small = {"iterations": 1, "batch_size": 4, "minibatches": 1, "decoding": {"max_new_tokens": 3}}
    policy = {"p": {"kind": "ppo", "init": "base", "reward": "asked_of_reward:score", "ptx_coef": 0.0, **small}}
    with a_round(tmp_path, base, {"policy": policy}) as round_:
        round_.prompts()
        round_.policy("p")
    assert sorted(asked) == ["w20 w3", "w20 w3", "w21 w3", "w21 w3"]


# --- over-optimisation ----------------------------------------------------------------------------------------------


def finding(
    folder: Path, golds: Sequence[float], *, proxies: Sequence[float] = (0.2, 0.7, 1.1, 1.3), sweep: bool = False
) -> str:
    """What the report finds in a policy's checkpoints, or a `sweep` of finished policies, of these scores."""

    def measured(value: float) -> dict[str, Any]:
        return {"value": value, "ci95": [value - 0.1, value + 0.1], "n": 300}

    rows = [
        {
            "policy": f"ppo-{place}",
            "variant": "ppo",
            "state": "finished" if sweep or place == 3 else "checkpoint",
            "iteration": 30 * (place + 1),
            "start": None,
            "beta": (0.2, 0.1, 0.05, 0.02)[place] if sweep else 0.02,
            "kl": (1.0, 4.0, 9.0, 16.0)[place],
            "proxy": measured(proxy),
            "gold": measured(gold),
        }
        for place, (proxy, gold) in enumerate(zip(proxies, golds, strict=True))
    ]
    models = {row["policy"]: {"kind": "policy", "kl": row["kl"]} for row in rows}
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"models": models, "over_optimization": rows}))
    run = read_run(folder)
    inks = Inks.for_models((model.name, model.kind) for model in run.results.models)
    (view,) = distance(run, inks)
    assert len(view.panels) == 2, "proxy and gold, each against the KL"
    return view.finding


def test_70_the_reward_rises_while_the_work_gets_worse(tmp_path: Path) -> None:
    """The training reward rises to the end, and nobody sees that people would have preferred an earlier policy.

    Source: arXiv 2210.10760 (Gao et al.), arXiv 2307.04964, PKU-Alignment/safe-rlhf#43.
    Here: checkpoints (`keep_every`) and policies of several KL coefficients are evaluated by an independent gold score
    against their KL, and `report.distance` says in words where it was highest and whether the rest was over-optimised;
    `adaptive_kl` holds the KL to a budget. No rule stops a run at one: which of the checkpoints is best is told
    afterwards, by that score.
    """
    assert finding(tmp_path, [0.5, 1.5, 1.2, 0.4]) == (
        "Gold is highest (1.50) after 60 iterations, at 4 nats; at the end, 16 nats, it is 0.40: it has over-optimised."
    )
    assert finding(tmp_path, [0.5, 0.8, 1.2, 1.5]) == "ppo is at its best by the gold score at the end."
    assert "may be chance" in finding(tmp_path, [0.5, 1.5, 1.2, 1.4])
    falling = finding(tmp_path, [0.5, 1.5, 1.2, 0.4], proxies=(0.9, 0.7, 0.5, 0.1))
    assert "over-optimised" not in falling


def test_70_nor_among_policies_of_several_coefficients(tmp_path: Path) -> None:
    assert finding(tmp_path, [0.5, 1.5, 1.2, 0.4], sweep=True) == (
        "In this run gold is highest (1.50) at 4 nats; the policy that went furthest, 16 nats, is at 0.40: "
        "it has over-optimised."
    )
    assert "the best by the gold score" in finding(tmp_path, [0.5, 0.8, 1.2, 1.5], sweep=True)
    assert "may be chance" in finding(tmp_path, [0.5, 1.5, 1.2, 1.4], sweep=True)


def test_70_a_policy_beyond_its_budget_of_kl_is_pulled_back(base: str) -> None:
    """The coefficient grows by 1 + .2 * 6 / 3 = 1.4 where the KL of six episodes is above its target (horizon 3)."""
    adam = {"learning_rate": 0.02, "schedule": "constant"}
    run = run_of(base, policy=adam, kl_coef=0.1, adaptive_kl={"target": 1e-6, "horizon": 3.0})
    run.step(0)  # before it the KL is 0, far below the target: .1 (1 - .4)
    assert run.kl_coef == pytest.approx(0.06)
    metrics = run.step(1)
    assert metrics["kl"] > 1.2e-6
    assert run.kl_coef == pytest.approx(0.06 * 1.4)
