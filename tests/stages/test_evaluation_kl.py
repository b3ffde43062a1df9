"""The KL divergence that an evaluation reports: its sign, its tokens, and when there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.float64 import response_logprobs
from tests.stages.conftest import prompt

from tastemaker.checkpoint import load_policy
from tastemaker.config import from_mapping
from tastemaker.responses import DecodingConfig, sample_rollouts
from tastemaker.stages.evaluation import Contestant, EvaluationConfig, Field, Tables, contestants, tabulate
from tastemaker.stages.evaluation.contestants import respond

PROMPTS = [prompt(f"w{number}" + " w3" * (number % 3)) for number in range(5, 16)]
ENDINGS = tuple(f"w{number}" for number in range(40, 60))  # a fifth of all words end a response
GREEDY, SAMPLED = DecodingConfig(max_new_tokens=7, greedy=True), DecodingConfig(max_new_tokens=7, temperature=0.7)


def test_the_reported_kl_is_log_pi_less_log_ref_of_the_sampled_tokens(base: str) -> None:
    """A mean over responses of sums over tokens, both models at the temperature that was sampled with. Greedy responses
    are no samples, so they have no KL."""
    policy, reference = load_policy(base, stop_texts=ENDINGS), load_policy(base)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape))
    field = Field(contestant=Contestant(model="m", reference="n"), policy=policy, reference=reference)
    groups = sample_rollouts(policy, PROMPTS, n=1, decoding=SAMPLED, seed=3, purpose="evaluation/p/T=0.7")
    exact = []
    for (rollout,) in groups:
        ids = rollout.prompt_ids, rollout.response_ids
        ours, theirs = (response_logprobs(m.library, *ids, temperature=0.7) for m in (policy, reference))
        exact.append(float((ours - theirs).sum()))
    assert len({len(rollout.response_ids) for (rollout,) in groups}) > 1, "ragged"
    assert min(exact) < -0.1 < 0.1 < max(exact)
    assert abs(np.mean(exact)) > 0.05

    responses = {("p", law.name): respond("p", field, PROMPTS, law, None, seed=3) for law in (GREEDY, SAMPLED)}
    assert responses["p", "T=0.7"].kl == pytest.approx(exact, abs=5e-6)
    assert responses["p", "greedy"].kl is None
    settings = from_mapping(
        EvaluationConfig,
        {
            "contestants": {"p": {"model": "m", "reference": "n"}},
            "pairs": [],
            "decodings": [{"max_new_tokens": 7, "greedy": True}, {"max_new_tokens": 7, "temperature": 0.7}],
        },
        where="test",
    )
    tables = Tables(
        config=settings, prompts=PROMPTS, responses=responses, judged=(), ratings=(), held_out_group="held-out"
    )
    reported = tabulate(tables)["models"]["p"]
    assert reported["kl"] == pytest.approx(np.mean(exact), abs=5e-6)
    assert reported["decodings"]["greedy"]["kl"] is None


def test_where_the_sampler_rounds_both_are_read_by_the_same_pass(base: str) -> None:
    """In bf16 the sampler's own log-probs are another model's: from itself a policy is no distance at all."""
    policy = load_policy(base, stop_texts=ENDINGS)
    field = Field(contestant=Contestant(model="m", reference="m"), policy=policy, reference=policy)
    rounded = respond("p", field, PROMPTS, replace(SAMPLED, precision="bfloat16"), None, seed=3)
    assert rounded.kl == pytest.approx([0.0] * len(PROMPTS), abs=1e-9)
    assert rounded.logprob is not None
    assert rounded.reference_logprob is not None
    assert max(abs(np.subtract(rounded.logprob, rounded.reference_logprob))) > 1e-4, "it does round"


def test_a_kl_that_cannot_be_is_said(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the reference were likelier by 2 nats at each of 11 responses, they would not be the policy's own."""
    policy = load_policy(base, stop_texts=ENDINGS)
    field = Field(contestant=Contestant(model="m", reference="m"), policy=policy, reference=policy)
    read = contestants.response_logprobs
    for far, said in ((1.5, False), (2.0, True)):
        monkeypatch.setattr(
            contestants, "response_logprobs", lambda *given, far=far: [one + far for one in read(*given)]
        )
        respond("p", field, PROMPTS, SAMPLED, None, seed=3)
        assert ("the KL of 'p' from its reference is -2.00 nats a response" in capsys.readouterr().err) == said
