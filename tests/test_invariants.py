"""What must change nothing: micro-batches, order, who stands beside whom, padding, the order of K, a cache.

Each is a property of the stages' own functions, in float64, so that "nothing" can mean 1e-10.

Dimensions in names: B rows, T tokens, S sequences, K responses of one prompt, P parameters.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.exact import in_float64, set_head
from tests.models import ARCHITECTURES, VOCABULARY, make_library, make_policy, random_sequences, save_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from tastemaker import losses
from tastemaker.checkpoint import load_reward_model, new_reward_model, save_reward_model
from tastemaker.config import from_mapping
from tastemaker.generation import FinishReason, Generator, Rollout, Sampling
from tastemaker.generation.sampling import draw_uniforms
from tastemaker.model import RewardModel, Trunk
from tastemaker.packing import microbatches, pack
from tastemaker.records import Message, Prompt, Response, Text
from tastemaker.scoring import FunctionScorer, ModelScorer
from tastemaker.stages import dpo, sft
from tastemaker.stages.ppo import Experience, PpoConfig, PpoRun
from tastemaker.stages.reward import Element, element_loss
from tastemaker.training import Loss, OptimizerConfig, Trainer

CPU = torch.device("cpu")
OPTIMIZER = OptimizerConfig(learning_rate=1e-5)
TOLERANCE = 1e-10
FEW = settings(max_examples=15)


def drawn(shape: Sequence[int], *, seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: Tensor, expected: Tensor, within: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, rtol=within, atol=within)


# --- a step's loss and gradient -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a stage's optimizer step is made of: rows by number, what each costs, and the loss of some of them."""

    module: nn.Module
    costs: Sequence[int]
    loss: Callable[[Sequence[int], float], Loss]

    def taken(self, rows: Sequence[int], budget: int) -> tuple[float, Tensor, dict[str, float]]:
        """Loss, gradient `[P]` and sums of these rows, in micro-batches of a budget."""
        trainer = Trainer(self.module, OPTIMIZER, total_steps=1)
        groups = microbatches([self.costs[row] for row in rows], budget=budget)
        parts = [[rows[place] for place in group] for group in groups]
        loss, sums = trainer.accumulate(parts, self.loss, 7.0)
        found = [one.grad if one.grad is not None else torch.zeros_like(one) for one in trainer.parameters]
        gradient_P = torch.cat([each.flatten() for each in found])
        trainer.optimizer.zero_grad(set_to_none=True)
        return loss, gradient_P, sums


def sft_step() -> Step:
    policy = in_float64(make_policy())
    lengths = [5, 13, 2, 7, 3, 11]
    rows = [
        sft.Example(tuple(ids), 1 + number % 3 if len(ids) > 4 else 1)
        for number, ids in enumerate(random_sequences(lengths))
    ]
    loss = partial(sft._example_loss, policy)
    return Step(module=policy, costs=lengths, loss=lambda chosen, n: loss([rows[row] for row in chosen], n))


def elements() -> list[Element]:
    """K of 2 to 5 responses that share their prompt, one to three raters, ties among them."""
    draw, found = random.Random(3), []
    for number, responses in enumerate((4, 2, 5, 3, 2)):
        prompt = random_sequences([2 + number], seed=number)[0]
        tails = random_sequences([1 + draw.randrange(6) for _ in range(responses)], seed=50 + number)
        ranks = [tuple(draw.randrange(3) for _ in range(responses)) for _ in range(1 + number % 3)]
        found.append(Element(tuple((*prompt, *tail) for tail in tails), (tuple(range(responses)), *ranks)))
    return found


@cache
def reward_model(*, seed: int = 3) -> RewardModel:
    shape = {"vocab_size": VOCABULARY, "num_labels": 1, "pad_token_id": 0} | ARCHITECTURES["llama"]
    torch.manual_seed(seed)
    library = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("llama", **shape)).eval()
    return set_head(in_float64(RewardModel(library, make_policy().tokenizer)), seed=seed)


def reward_step() -> Step:
    model, rows = reward_model(), elements()
    loss = partial(element_loss, model, "pairs")
    costs = [element.cost for element in rows]
    return Step(module=model, costs=costs, loss=lambda chosen, n: loss([rows[row] for row in chosen], n))


def dpo_step(**changes: Any) -> Step:
    policy = in_float64(make_policy())
    pairs = []
    for number in range(5):
        lengths = [3 + number, 1 + 3 * number % 5, 5 - number]
        pairs.append(dpo.Pair((), *map(tuple, random_sequences(lengths, seed=number))))
    config = from_mapping(dpo.DpoConfig, {"init": "", "beta": 0.05} | changes, where="test")
    reference_P2 = -10 * drawn((len(pairs), 2), seed=1).abs()
    loss = partial(dpo._pair_loss, policy, config, pairs, reference_P2)
    return Step(module=policy, costs=[pair.cost for pair in pairs], loss=loss)


# --- PPO ------------------------------------------------------------------------------------------------------------

EPISODES = (
    (2, 5, FinishReason.STOP),
    (5, 1, FinishReason.STOP),
    (3, 7, FinishReason.LENGTH),
    (4, 2, FinishReason.STOP),
)


def words(count: int, first: int) -> str:
    return " ".join(f"w{2 + (first + 7 * place) % 90}" for place in range(count))


def score(prompts: Any, responses: Sequence[str], records: Any) -> list[float]:
    """Of each response alone; both signs."""
    return [float(len(response)) % 7 - 3 for response in responses]


def ppo_run(base: str, **changes: Any) -> PpoRun:
    small: dict[str, Any] = {
        "init": base,
        "reward": "",
        "batch_size": 4,
        "minibatches": 2,
        "decoding": {"max_new_tokens": 7},
        "whiten_advantages": False,
        "ptx_coef": 0.4,
    }
    run = PpoRun(
        from_mapping(PpoConfig, small | changes, where="test"),
        base,
        None,
        FunctionScorer(score, name="score"),
        [Prompt(messages=(Message("user", words(count, number)),)) for number, (count, _, _) in enumerate(EPISODES)],
        [Text(text=words(3 + 4 * number, number)) for number in range(4)],
        (),
        CPU,
        3,
    )
    in_float64(run.policy)
    in_float64(run.reference)
    if isinstance(run.value, RewardModel):
        in_float64(run.value)
    else:
        run.value.double()
    return run


def observed(run: PpoRun, rows: Sequence[int]) -> Experience:
    """What the rollouts of these rows become, in this order."""
    rollouts = []
    for row in rows:
        _, count, finish = EPISODES[row]
        ids = [11 + (13 * row + 3 * place) % 80 for place in range(count)]
        ids += [run.policy.tokenizer.end_id] if finish is FinishReason.STOP else []
        rollouts.append(Rollout(tuple(run.prompt_ids[row]), ids, [0.0] * len(ids), finish, 0))
    return run.observe(list(rows), rollouts, 1)[0]


@torch.no_grad()
def move(module: nn.Module) -> None:
    """Other weights than those that the experience was made with, so that ratios leave 1 and some are clipped."""
    for number, parameter in enumerate(module.parameters()):
        parameter.add_(0.02 * drawn(parameter.shape, seed=number))


def ppo_steps(base: str) -> dict[str, Step]:
    run = ppo_run(base)
    experience = observed(run, range(len(EPISODES)))
    assert isinstance(run.value, RewardModel)
    move(run.policy)
    move(run.value)
    costs, texts = [experience.cost(row) for row in range(len(EPISODES))], run.texts

    def read_texts(rows: Sequence[int], num_tokens: float) -> Loss:
        return run._ptx_loss(pack([texts[row] for row in rows]), num_tokens)

    return {
        "policy": Step(module=run.policy, costs=costs, loss=partial(run._policy_loss, experience)),
        "value": Step(module=run.value, costs=costs, loss=partial(run._value_loss, experience)),
        "ptx": Step(module=run.policy, costs=[len(text) for text in texts], loss=read_texts),
    }


def shared_step(base: str) -> Step:
    run = ppo_run(base, value_function="shared")
    experience = observed(run, range(len(EPISODES)))
    move(run.policy_trainer.module)
    costs = [experience.cost(row) for row in range(len(EPISODES))]
    return Step(module=run.policy_trainer.module, costs=costs, loss=partial(run._policy_loss, experience))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture(scope="module")
def steps(base: str) -> dict[str, Step]:
    return {
        "sft": sft_step(),
        "reward": reward_step(),
        "dpo": dpo_step(),
        "dpo, smoothed": dpo_step(label_smoothing=0.1),
        "ipo": dpo_step(variant="ipo"),
        **ppo_steps(base),
        "policy and value": shared_step(base),
    }


STEPS = ("sft", "reward", "dpo", "dpo, smoothed", "ipo", "policy", "value", "ptx", "policy and value")


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_sum_of_its_rows_alone(steps: dict[str, Step], name: str) -> None:
    """Whichever rows a batch has, in whatever order, packed into whatever micro-batches."""
    step = steps[name]
    count = len(step.costs)
    alone = [step.taken([row], 1) for row in range(count)]
    assert all(float(gradient_P.abs().max()) > 1e-4 for _, gradient_P, _ in alone)

    @FEW
    @given(
        rows=st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True),
        budget=st.integers(1, sum(step.costs)) | st.just(10_000),
    )
    def check(rows: list[int], budget: int) -> None:
        loss, gradient_P, sums = step.taken(rows, budget)
        assert loss == pytest.approx(sum(alone[row][0] for row in rows), abs=TOLERANCE)
        close(gradient_P, torch.stack([alone[row][1] for row in rows]).sum(0))
        for key, total in sums.items():
            assert total == pytest.approx(sum(alone[row][2][key] for row in rows), abs=1e-8)

    check()


@pytest.mark.parametrize("value_function", ["separate", "shared"])
def test_an_episode_is_observed_alike_whoever_stands_beside_it(base: str, value_function: str) -> None:
    """Log-probs, values, advantages and returns of a rollout, in whatever batch and order."""
    run = ppo_run(base, value_function=value_function)
    names = ("old_logprob_BT", "value_BT", "advantage_BT", "return_BT")
    alone = [observed(run, [row]) for row in range(len(EPISODES))]

    @FEW
    @given(
        rows=st.lists(st.integers(0, len(EPISODES) - 1), min_size=1, max_size=6),
        budget=st.integers(1, 60),
    )
    def check(rows: list[int], budget: int) -> None:
        run.config = replace(run.config, microbatch_tokens=budget)
        experience = observed(run, rows)
        for place, row in enumerate(rows):
            width = int(alone[row].mask_BT.sum())
            assert int(experience.mask_BT[place].sum()) == width
            assert bool(experience.mask_BT[place, :width].all())
            for name in names:
                found_T, expected_T = getattr(experience, name)[place], getattr(alone[row], name)[0]
                close(found_T[:width], expected_T)
                assert not found_T[width:].any()

    check()


# --- K responses ----------------------------------------------------------------------------------------------------


@FEW
@given(data=st.data(), normalize=st.sampled_from(["pairs", "all"]))
def test_the_order_of_responses_and_of_raters_is_inert(data: st.DataObject, normalize: Any) -> None:
    """Nothing is learned from which response was shown first, nor from who ranked first."""
    model, element = reward_model(), data.draw(st.sampled_from(elements()))
    order = data.draw(st.permutations(range(len(element.sequences))))
    raters = data.draw(st.permutations(range(len(element.ranks))))
    other = Element(
        tuple(element.sequences[place] for place in order),
        tuple(tuple(element.ranks[rater][place] for place in order) for rater in raters),
    )

    def taken(one: Element) -> tuple[float, Tensor, dict[str, float]]:
        return Step(module=model, costs=[1], loss=lambda _, n: element_loss(model, normalize, [one], n)).taken([0], 1)

    found = taken(element), taken(other)
    assert found[0][0] == pytest.approx(found[1][0], abs=TOLERANCE)
    close(found[0][1], found[1][1])
    assert found[0][2] == pytest.approx(found[1][2], abs=1e-8)


PROMPTS = [Prompt(messages=(Message("user", words(count, count)),)) for count in (2, 5, 1, 9)]
RESPONSES = [Response(text=words(3, 4)), Response(text="w9", finished=False), Response(text=words(8, 1))]


@FEW
@given(
    asked=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=9),
    budget=st.integers(1, 120),
)
def test_a_score_is_of_its_response_alone(asked: list[tuple[int, int]], budget: int) -> None:
    """Not of the batch, its order, its padding, nor of the other responses that share its prompt."""
    model = reward_model()
    given_ = [PROMPTS[prompt] for prompt, _ in asked], [RESPONSES[response] for _, response in asked]
    found = ModelScorer(model, budget=budget)(*given_)
    alone = {
        one: ModelScorer(model, budget=1)([PROMPTS[one[0]]], [RESPONSES[one[1]]])[0] for one in dict.fromkeys(asked)
    }
    assert found == pytest.approx([alone[one] for one in asked], abs=TOLERANCE)


# --- padding --------------------------------------------------------------------------------------------------------

ROWS, LONGEST = 3, 5
JUNK = (0.0, -7.5, float("nan"), float("inf"))


def all_losses(mask_BT: Tensor, *of_BT: Tensor) -> dict[str, Tensor]:
    """Every function of rows with a mask, with what it needs from `of_BT`; those that give rows keep their shape."""
    one_BT, two_BT, three_BT = of_BT
    score_B = torch.tensor([0.7, -1.3, 2.1], dtype=torch.float64)
    advantage_BT = losses.gae(one_BT, two_BT, mask_BT, gamma=0.97, lam=0.9)
    return {
        "sft": losses.sft_loss(one_BT, mask_BT, num_tokens=7.0),
        "ptx": losses.ptx_loss(one_BT, mask_BT, gamma=27.8, num_tokens=7.0),
        "rewards": losses.shaped_rewards(score_B, one_BT, two_BT, mask_BT, kl_coef=0.3),
        "advantages": advantage_BT,
        "whitened": losses.whiten(one_BT, mask_BT),
        "policy": losses.policy_loss(one_BT, two_BT, three_BT, mask_BT, clip=0.2, num_tokens=7.0),
        "value": losses.value_loss(one_BT, two_BT, three_BT, mask_BT, clip=0.2, num_tokens=7.0),
        "k3": losses.kl_estimate(one_BT, two_BT, mask_BT, estimator="k3"),
    }


@FEW
@given(
    lengths=st.lists(st.integers(1, LONGEST), min_size=ROWS, max_size=ROWS),
    left=st.integers(0, 4),
    right=st.integers(0, 4),
    junk=st.sampled_from(JUNK),
    seed=st.integers(0, 99),
)
def test_padding_of_any_amount_on_either_side_is_inert(
    lengths: list[int], left: int, right: int, junk: float, seed: int
) -> None:
    mask_BT = torch.arange(LONGEST) < torch.tensor(lengths)[:, None]
    rows_BT = [drawn((ROWS, LONGEST), seed=seed + place) for place in range(3)]
    expected = all_losses(mask_BT, *rows_BT)
    padded_BT = [nn.functional.pad(x_BT.where(mask_BT, junk), (left, right), value=junk) for x_BT in rows_BT]
    found = all_losses(nn.functional.pad(mask_BT, (left, right), value=False), *padded_BT)
    for name, value in expected.items():
        inner = found[name][:, left : left + LONGEST] if value.ndim else found[name]
        close(inner, value)
        if value.ndim:
            assert float(found[name].sum()) == pytest.approx(float(value.sum()), abs=1e-9), "padding is 0"


@FEW
@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=5), budget=st.integers(1, 45), seed=st.integers(0, 99))
@torch.no_grad()
def test_models_that_do_pad_give_each_sequence_its_own_states(lengths: list[int], budget: int, seed: int) -> None:
    """An architecture that does not run packed goes through the library's padded attention."""
    policy, sequences = make_policy(seed=1).double(), random_sequences(lengths, seed=seed)
    policy.trunk = Trunk(policy.library, padded=True)
    for group in microbatches(lengths, budget=budget):
        together = pack([sequences[index] for index in group])
        alone = torch.cat([policy.hidden(pack([sequences[index]])) for index in group])
        close(policy.hidden(together), alone, 1e-5)  # the library's norms and angles are fp32


@pytest.fixture(scope="module")
def saved_reward_model(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "model"
    model = new_reward_model(base, seed=5)
    model.offset += 0.375
    save_reward_model(folder, model)
    return folder


def test_a_saved_reward_model_scores_alike_in_the_library_however_it_pads(saved_reward_model: Path) -> None:
    """Right or left, any amount; its pad id occurs in no text. The offset is ours to apply."""
    library = AutoModelForSequenceClassification.from_pretrained(saved_reward_model, dtype=torch.float64).eval()
    ours = load_reward_model(str(saved_reward_model)).double()
    pad_id = library.config.pad_token_id

    @FEW
    @given(
        lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
        more=st.integers(0, 5),
        side=st.sampled_from(["left", "right"]),
    )
    @torch.no_grad()
    def check(lengths: list[int], more: int, side: str) -> None:
        sequences = random_sequences(lengths)
        width = max(lengths) + more
        rows, masks = [], []
        for ids in sequences:
            pad, ones = [pad_id] * (width - len(ids)), [1] * len(ids)
            rows.append([*pad, *ids] if side == "left" else [*ids, *pad])
            masks.append([0] * len(pad) + ones if side == "left" else ones + [0] * len(pad))
        logit_S = library(input_ids=torch.tensor(rows), attention_mask=torch.tensor(masks)).logits[:, 0]
        score_S = ours.scores(pack(sequences))
        close(logit_S - 0.375, score_S, 2e-5)  # the library's norms and angles are fp32

    check()


# --- decoding -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def uncached_logits(library: Any, ids: Sequence[int]) -> Tensor:
    """Logits after `ids`, by a forward pass over all of them."""
    logits_V: Tensor = library(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1].double()
    return logits_V


LIBRARY = make_library(seed=4)
LAW = Sampling(max_new_tokens=6, stop_token_ids=(2, 3, 5))


@FEW
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    n=st.integers(1, 2),
    seed=st.integers(-9, 9),
    temperature=st.sampled_from([1.0, 0.6]),
    budget=st.sampled_from([1, 30, 10_000]),
)
def test_cached_decoding_draws_what_whole_passes_would(
    lengths: list[int], n: int, seed: int, temperature: float, budget: int
) -> None:
    """Every token is where its random number falls among the probabilities that a pass over all tokens gives."""
    prompts = random_sequences(lengths, seed=seed + 20)
    law = Sampling(max_new_tokens=6, stop_token_ids=LAW.stop_token_ids, temperature=temperature)
    seeds = [seed + 100 * place for place in range(len(prompts))]
    groups = Generator(LIBRARY, vocabulary=VOCABULARY, max_batch_tokens=budget).generate(prompts, n, law, seeds)
    for prompt, own, group in zip(prompts, seeds, groups, strict=True):
        for number, rollout in enumerate(group):
            uniforms = draw_uniforms([own], [number], 6)[:, 0]
            for step, token in enumerate(rollout.response_ids):
                logits_V = uncached_logits(LIBRARY, [*prompt, *rollout.response_ids[:step]]) / temperature
                share_V = logits_V.softmax(0)
                upper = float(share_V[: token + 1].sum())
                assert upper - float(share_V[token]) - 1e-5 <= float(uniforms[step]) <= upper + 1e-5
                assert rollout.logprobs[step] == pytest.approx(float(share_V[token].log()), abs=5e-5)


@FEW
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    budget=st.sampled_from([1, 30, 10_000]),
    seed=st.integers(0, 9),
)
def test_cached_greedy_decoding_takes_what_whole_passes_find_likeliest(
    lengths: list[int], budget: int, seed: int
) -> None:
    prompts = random_sequences(lengths, seed=seed)
    greedy = Sampling(max_new_tokens=6, stop_token_ids=LAW.stop_token_ids, greedy=True)
    engine = Generator(LIBRARY, vocabulary=VOCABULARY, max_batch_tokens=budget)
    groups = engine.generate(prompts, 1, greedy, [0] * len(prompts))
    for prompt, (rollout,) in zip(prompts, groups, strict=True):
        for step, token in enumerate(rollout.response_ids):
            assert token == int(uncached_logits(LIBRARY, [*prompt, *rollout.response_ids[:step]]).argmax())
        assert (rollout.finish is FinishReason.STOP) == (rollout.response_ids[-1] in greedy.stop_token_ids)
