"""Comparisons and demonstrations: who responds, what is shown, and what comes back from the raters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.models import save_model
from tests.stages.conftest import by_length, prompt

from tastemaker.checkpoint import load_policy
from tastemaker.config import from_mapping
from tastemaker.errors import AnswersMissing, ConfigError
from tastemaker.guidelines import GUIDELINES
from tastemaker.kept import Kept
from tastemaker.panel import Panel
from tastemaker.raters import RaterProfile, SimulatedRater
from tastemaker.records import Prompt, Response
from tastemaker.responses import DecodingConfig, sample_responses
from tastemaker.stages.comparisons import (
    Candidates,
    ComparisonsConfig,
    collect_rankings,
    kept_candidates,
    sample_candidates,
)
from tastemaker.stages.demonstrations import collect_demonstrations
from tastemaker.store import LabelService
from tastemaker.store.tasks import DemonstrationAnswer

TRAINING = GUIDELINES["training"]
PROMPTS = [prompt(f"w{number} w{number + 1}") for number in range(5, 12)]


def echo(prompt: Prompt, seed: int) -> str:
    return f"so {prompt.messages[-1].content}"


def panel(count: int = 3) -> Panel:
    profiles = [RaterProfile(name=f"r{n}", group="training", weights={"words": 1.0}, noise=0.0) for n in range(count)]
    raters = tuple(SimulatedRater(profile, 0, by_length, write=echo) for profile in profiles)
    return Panel(group="training", address="", simulated=raters)


def config(**changes: object) -> ComparisonsConfig:
    whole = {"responses_per_prompt": 5, "sources": ["sft/a", "sft/b"], "decoding": {"max_new_tokens": 4}}
    return from_mapping(ComparisonsConfig, whole | changes, where="test")


def test_sources_take_turns(base: str, tmp_path: Path) -> None:
    """K = 5 from two policies: a b a b a; each policy's responses are its own samples, in order."""
    policies = {"sft/a": load_policy(base), "sft/b": load_policy(str(save_model(tmp_path / "other", seed=1)))}
    law = DecodingConfig(max_new_tokens=4)
    own = {
        name: sample_responses(policy, PROMPTS, n=n, decoding=law, seed=3, purpose=f"comparisons/{name}")
        for (name, policy), n in zip(policies.items(), (3, 2), strict=True)
    }
    for place, drawn in enumerate(sample_candidates(policies, PROMPTS, config(), seed=3)):
        a, b = own["sft/a"][place], own["sft/b"][place]
        expected = dict.fromkeys(response.text for response in (a[0], b[0], a[1], b[1], a[2]))
        assert [response.text for response in drawn.responses] == list(expected)
        assert set(drawn.sources) == {"sft/a", "sft/b"}


def test_a_source_that_would_never_respond_is_refused() -> None:
    with pytest.raises(ConfigError, match="responses_per_prompt is 2, but there are 3 sources"):
        config(responses_per_prompt=2, sources=["sft/a", "sft/b", "sft/c"])
    assert config(responses_per_prompt=3, sources=["sft/a", "sft/b", "sft/c"]).responses_per_prompt == 3


def test_what_is_said_twice_is_shown_once_and_a_single_response_is_not_ranked(base: str) -> None:
    greedy = config(decoding={"max_new_tokens": 4, "greedy": True}, sources=["sft/a"])
    assert sample_candidates({"sft/a": load_policy(base)}, PROMPTS, greedy, seed=0) == []


def test_candidates_do_not_depend_on_the_prompts_beside_them(base: str) -> None:
    policies = {"sft/a": load_policy(base)}
    settings = config(sources=["sft/a"])
    together = sample_candidates(policies, PROMPTS, settings, seed=3)
    assert sample_candidates(policies, PROMPTS[2:3], settings, seed=3) == together[2:3]
    assert sample_candidates(policies, PROMPTS, settings, seed=4) != together


def test_rankings_come_back_with_ties_and_their_rater(service: LabelService) -> None:
    texts = ["one two", "one", "one two three", "two one"]
    drawn = [
        Candidates(prompt=one, responses=tuple(Response(text=text) for text in texts), sources=("sft/a",) * 4)
        for one in PROMPTS
    ]
    found = collect_rankings(service, drawn, panel(), study="s", guideline=TRAINING, overlap=2)
    assert len(found) == 2 * len(PROMPTS)
    for ranking in found:
        assert [response.text for response in ranking.responses] == texts
        assert ranking.order == ((2,), (0, 3), (1,))
        assert ranking.author.origin == "simulated"
        assert ranking.author.guideline_version == TRAINING.version
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first.prompt == second.prompt
        assert first.author.rater != second.author.rater
    assert len({ranking.author.rater for ranking in found}) == 3
    again = collect_rankings(service, drawn, panel(), study="s", guideline=TRAINING, overlap=2)
    assert again == found, "nothing is asked twice"


def test_answers_are_of_what_is_asked_now_in_its_order(service: LabelService) -> None:
    """A study keeps what was asked once; five prompts, then three of them, the other way round."""
    everyone = collect_demonstrations(service, PROMPTS[:5], panel(), study="d", guideline=TRAINING)
    fewer = list(reversed(PROMPTS[:3]))
    found = collect_demonstrations(service, fewer, panel(), study="d", guideline=TRAINING)
    assert [one.prompt.key for one in found] == [one.key for one in fewer]
    assert found == list(reversed(everyone[:3]))


def test_people_are_waited_for_only_where_it_matters_now(service: LabelService) -> None:
    people = Panel(group="training", address="here")
    with pytest.raises(AnswersMissing) as waiting:
        collect_demonstrations(service, PROMPTS[:5], people, study="d", guideline=TRAINING)
    assert waiting.value.missing == 5
    service.add_rater("ann", group="training", origin="human")
    for task in service.claim("d", "ann", limit=2):
        service.submit(task.id, task.token, DemonstrationAnswer("so"))
    assert len(collect_demonstrations(service, PROMPTS[:2], people, study="d", guideline=TRAINING)) == 2
    with pytest.raises(AnswersMissing) as waiting:
        collect_demonstrations(service, PROMPTS[:3], people, study="d", guideline=TRAINING)
    assert waiting.value.missing == 1


def test_candidates_that_are_kept_are_not_drawn_again(tmp_path: Path) -> None:
    asked: list[str] = []

    def draw(prompts: Sequence[Prompt]) -> list[Candidates]:
        asked.extend(prompt.key for prompt in prompts)
        responses = tuple(Response(text=f"{len(asked)} {n}", finished=n > 0) for n in range(2))
        drawn = [Candidates(prompt=one, responses=responses, sources=("sft/a", "sft/b")) for one in prompts]
        return [one for one in drawn if one.prompt != PROMPTS[1]]  # its responses were all the same

    path = tmp_path / "candidates.jsonl"
    first = kept_candidates(Kept(path), PROMPTS[:3], draw, depends="x")
    assert [one.prompt for one in first] == [PROMPTS[0], PROMPTS[2]]
    assert kept_candidates(Kept(path), PROMPTS[:3], draw, depends="x") == first
    assert asked == [one.key for one in PROMPTS[:3]]
    assert kept_candidates(Kept(path), PROMPTS[:4], draw, depends="x")[:2] == first
    assert asked == [one.key for one in PROMPTS[:4]]
    assert kept_candidates(Kept(path), PROMPTS[:3], draw, depends="other settings") != first


@pytest.mark.parametrize(
    "more",
    [{"train": 5}, {"validation": 5}, {"overlap": 2}, {"validation_overlap": 1}, {"sources": ["sft/a"]}],
    ids=str,
)
def test_what_ready_rankings_would_ignore_is_refused(more: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(more))} would have no effect"):
        from_mapping(ComparisonsConfig, {"source": "rankings.jsonl"} | more, where="test")


def test_every_prompt_gets_one_demonstration(service: LabelService) -> None:
    found = collect_demonstrations(service, PROMPTS, panel(), study="d", guideline=TRAINING)
    assert [(one.prompt.messages, one.response) for one in found] == [
        (one.messages, f"so {one.messages[-1].content}") for one in PROMPTS
    ]
    assert {one.author.rater_group for one in found} == {"training"}
