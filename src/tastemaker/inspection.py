"""What a stage sees of its data, token by token: `tastemaker inspect` shows it.

Nothing is encoded here. Each function below hands records to the stage's own encoder, packs a sequence as it is packed
for training, and asks the packed batch where tokens are predicted (`Packed.predicted`) and where the score is read
(`Packed.last_S`). So a mask that is wrong is wrong here too, and can be seen. No weights are loaded, except to sample
the responses that PPO trains on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from tastemaker.artefacts import read_json, read_manifest
from tastemaker.checkpoint import Reader, load_policy, load_reader
from tastemaker.config import from_mapping
from tastemaker.corpus import FIRST_PREDICTED, encode_pieces, shuffled_forever
from tastemaker.errors import ConfigError, DataError
from tastemaker.functions import is_function_path
from tastemaker.generation import FinishReason, GrowingText
from tastemaker.halves import in_part
from tastemaker.inputs import FOLDERS, Inputs
from tastemaker.packing import pack
from tastemaker.recipe import Recipe, start_model
from tastemaker.records import Demonstration, Prompt, Ranking, Response, Text
from tastemaker.responses import as_response, engine_for, fitting_prompts, leaves_room
from tastemaker.scoring import encode_for_reward, halves_for_reward
from tastemaker.settings import DpoConfig, PpoConfig, RewardConfig, SftConfig
from tastemaker.stages.dpo import as_pairs
from tastemaker.stages.ppo import lay_out, sample_iteration
from tastemaker.stages.reward import as_elements, grouped
from tastemaker.stages.sft import encode_demonstrations
from tastemaker.tokenizer import Tokenizer

Role = Literal["prompt", "trained", "read"]
Config = SftConfig | RewardConfig | DpoConfig | PpoConfig
CONFIGS: dict[str, type[Config]] = {"sft": SftConfig, "reward": RewardConfig, "dpo": DpoConfig, "ppo": PpoConfig}
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A sequence as a stage sees it."""

    example: str
    """What it belongs to, as "ranking 2"; several sequences may belong to the same."""
    title: str = ""
    """Which of them it is, as "response 1, rank 0"."""
    tokenizer: Tokenizer
    ids: tuple[int, ...]
    prompt: int
    """How many of the ids are the prompt's."""
    trained: frozenset[int] = frozenset()
    """Places of the ids whose log-prob the loss is on."""
    stop: int | None = None
    """The place of the end token, where the response has one."""
    score: int | None = None
    """The place at which the score is read."""
    left_out: tuple[int, ...] = ()
    """Ids before these that the stage cuts off."""
    notes: tuple[str, ...] = ()

    def role(self, place: int) -> Role:
        """What a token is to the stage, but for stop and score."""
        if place in self.trained:
            return "trained"
        return "prompt" if place < self.prompt else "read"


# --- what each stage sees --------------------------------------------------------------------------------------------


def of_demonstrations(rows: Sequence[Demonstration], reader: Reader) -> list[Seen]:
    """Supervised fine-tuning: the loss is on the responses."""
    return [
        Seen(
            example=f"demonstration {number}",
            tokenizer=reader.tokenizer,
            ids=example.ids,
            prompt=example.start,
            trained=_predicted(example.ids, example.start),
            stop=_stop(example.ids, example.start, reader.tokenizer),
        )
        for number, example in enumerate(encode_demonstrations(rows, reader.tokenizer, context=reader.context), 1)
    ]


def of_texts(rows: Sequence[Text], reader: Reader, *, max_tokens: int) -> list[Seen]:
    """Pretraining text, in the mix of supervised fine-tuning and in PPO-ptx: all but a piece's first token."""
    seen = []
    for number, piece in enumerate(encode_pieces(rows, reader, max_tokens=max_tokens), 1):
        stop = _stop(piece, FIRST_PREDICTED, reader.tokenizer)
        cut = f"cut after {len(piece)} tokens; what follows is a piece of its own, which does not see this one"
        seen.append(
            Seen(
                example=f"piece of text {number}",
                tokenizer=reader.tokenizer,
                ids=tuple(piece),
                prompt=FIRST_PREDICTED,
                trained=_predicted(piece, FIRST_PREDICTED),
                stop=stop,
                notes=() if stop is not None else (cut,),
            )
        )
    return seen


def of_rankings(rows: Sequence[Ranking], reader: Reader, config: RewardConfig, *, first: int) -> list[Seen]:
    """The reward model: the loss is on the scores, each read at a response's last token."""
    limited = replace(reader, prompt_limit=config.max_prompt_tokens or reader.context)
    groups = grouped([row for row in rows if in_part(row.prompt, config.part)])[:first]
    seen = []
    for number, group in enumerate(groups, 1):
        (element,) = as_elements(group, limited)
        for place, (response, ids) in enumerate(zip(group[0].responses, element.sequences, strict=True)):
            ranks = " and ".join(str(ranks[place]) for ranks in element.ranks)
            one = _for_reward(limited, group[0].prompt, response, ids)
            seen.append(replace(one, example=f"ranking {number}", title=f"response {place + 1}, rank {ranks}"))
    return seen


def of_pairs(rows: Sequence[Ranking], reader: Reader, config: DpoConfig, *, first: int) -> list[Seen]:
    """DPO: the loss is on the summed log-probs of a chosen and a rejected response."""
    seen = list[Seen]()
    for row in rows:
        if not in_part(row.prompt, config.part):
            continue
        whole = reader.tokenizer.prompt_ids(row.prompt.messages)
        for pair in as_pairs([row], reader, config.max_prompt_tokens):
            if len(seen) == 2 * first:
                return seen
            start = len(pair.prompt_ids)
            seen += [
                Seen(
                    example=f"pair {len(seen) // 2 + 1}",
                    title=title,
                    tokenizer=reader.tokenizer,
                    ids=ids,
                    prompt=start,
                    trained=_predicted(ids, start),
                    stop=_stop(ids, start, reader.tokenizer),
                    left_out=_left_out(whole, pair.prompt_ids),
                )
                for title, ids in zip(("chosen", "rejected"), pair.sequences, strict=True)
            ]
    return seen


def of_prompts(rows: Sequence[Prompt], reader: Reader, config: PpoConfig) -> list[Seen]:
    """PPO before anything is sampled: the prompts, and whether a whole response fits behind each."""
    seen, new = [], config.decoding.max_new_tokens
    for number, row in enumerate(rows, 1):
        ids = tuple(reader.tokenizer.prompt_ids(row.messages))
        fits = leaves_room(len(ids), reader, new)
        sampled = f"up to {new} tokens are sampled here, and each of them trains; --sample shows some"
        dropped = f"never asked: with {new} new tokens it does not fit into the context of {reader.context}"
        seen.append(
            Seen(
                example=f"prompt {number}",
                tokenizer=reader.tokenizer,
                ids=ids,
                prompt=len(ids),
                notes=(sampled if fits else dropped,),
            )
        )
    return seen


def of_rollouts(
    rows: Sequence[Prompt], init: str, judge: Reader | None, config: PpoConfig, *, seed: int, first: int
) -> list[Seen]:
    """PPO: the first responses of the first iteration, as the policy trains on them and as the reward model reads them.

    They are drawn on a processor, with the seeds of those that training begins with: there the same up to rounding, on
    a GPU, where rounding is another, soon others.
    """
    policy = load_policy(init)
    fitting, prompt_ids = fitting_prompts(rows, policy, config.decoding.max_new_tokens)
    chosen = shuffled_forever(len(fitting), seed=seed)(0, min(first, config.batch_size))
    engine = engine_for(policy, config.decoding, precision=config.policy.precision)
    asked = [prompt_ids[index] for index in chosen]
    every = range(len(asked))
    rollouts = sample_iteration(engine, policy, asked, config, every, seed=seed, iteration=0)
    layout, seen = lay_out(rollouts, config, CPU), []
    for row, (index, rollout) in enumerate(zip(chosen, rollouts, strict=True)):
        ids, start = layout.sequences[row], layout.prompt_lengths[row]
        places, trains = sorted(_predicted(ids, start)), layout.trains_BT[row].tolist()
        cut = bool(layout.truncated_B[row])
        one = Seen(
            example=f"episode {row + 1}, of prompt {index + 1} of {len(fitting)}",
            title="as the policy trains on it",
            tokenizer=policy.tokenizer,
            ids=ids,
            prompt=start,
            trained=frozenset(place for place, mark in zip(places, trains, strict=False) if mark),
            stop=len(ids) - 1 if rollout.finish is FinishReason.STOP else None,
            notes=(_of_truncated(config),) if cut else (),
        )
        seen.append(one)
        if judge is not None:
            response = as_response(policy, rollout)
            read = _for_reward(judge, fitting[index], response, encode_for_reward(judge, fitting[index], response))
            seen.append(replace(read, example=one.example, title="as the reward model reads it"))
    return seen


def _of_truncated(config: PpoConfig) -> str:
    what = {
        "penalty": f"its score is lowered by {config.truncation_penalty:g}",
        "score": "its score is taken as it is",
        "mask": "it trains nothing",
    }
    return f"cut off at {config.decoding.max_new_tokens} tokens, without an end token: {what[config.truncated]}"


def _for_reward(reader: Reader, prompt: Prompt, response: Response, ids: Sequence[int]) -> Seen:
    opening, _ = halves_for_reward(reader, prompt, response)
    ending = reader.tokenizer.response_ids(response.text, finished=response.finished)
    whole = [*reader.tokenizer.prompt_ids(prompt.messages), *ending]
    score = int(pack([ids]).last_S)
    cut = "cut off, so it has no end token; the score is read at its last token all the same"
    return Seen(
        example="",
        tokenizer=reader.tokenizer,
        ids=tuple(ids),
        prompt=len(opening),
        stop=score if response.finished else None,
        score=score,
        left_out=_left_out(whole, ids),
        notes=() if response.finished else (cut,),
    )


def _left_out(whole: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
    """What is cut off of the beginning, or behind its first id where that stays."""
    count = len(whole) - len(kept)
    start = 0 if list(whole[count:]) == list(kept) else 1
    return tuple(whole[start : count + start])


def _predicted(ids: Sequence[int], start: int) -> frozenset[int]:
    """The places of the tokens whose log-probs a loss is on: behind those at which they are read."""
    source_M, _ = pack([ids]).predicted([start])
    return frozenset((source_M + 1).tolist())


def _stop(ids: Sequence[int], start: int, tokenizer: Tokenizer) -> int | None:
    return len(ids) - 1 if len(ids) > start and ids[-1] in tokenizer.stop_ids else None


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """What each id adds to the text of those before it: nothing, where it is a part of a character."""
    growing = GrowingText(tokenizer.decode)
    texts = [growing.add(token) for token in ids]
    return [*texts[:-1], texts[-1] + growing.rest()] if texts else []


# --- what is looked at -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A stage's config, the models that read, and the records; text alone has a config of supervised fine-tuning."""

    config: Config
    model: str
    reward: str | None = None
    """The reward model of PPO."""
    seed: int = 0
    demonstrations: Sequence[Demonstration] = ()
    rankings: Sequence[Ranking] = ()
    prompts: Sequence[Prompt] = ()
    texts: Sequence[Text] = ()


def look(subject: Subject, *, first: int, sample: bool = False) -> list[Seen]:
    """The first examples, as the stage sees them; `sample`: PPO's with responses, which takes the policy's weights.

    Raises:
        DataError: the stage would learn from none of the records.
    """
    config, reader = subject.config, load_reader(subject.model)
    if isinstance(config, SftConfig):
        seen = of_demonstrations(subject.demonstrations[:first], reader)
    elif isinstance(config, RewardConfig):
        seen = of_rankings(subject.rankings, reader, config, first=first)
    elif isinstance(config, DpoConfig):
        seen = of_pairs(subject.rankings, reader, config, first=first)
    elif sample:
        judge = None if subject.reward is None else load_reader(subject.reward)
        seen = of_rollouts(subject.prompts, subject.model, judge, config, seed=subject.seed, first=first)
    else:
        seen = of_prompts(subject.prompts[:first], reader, config)
    if subject.texts and isinstance(config, SftConfig | PpoConfig):
        seen += of_texts(subject.texts[:first], reader, max_tokens=config.max_text_tokens)[:first]
    if not seen:
        raise DataError("there is nothing to learn from: no record, or no ranking that prefers a response.")
    return seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A stage's folder, as its manifest describes it."""

    folder: Path
    stage: str
    """As the command line names it."""
    variant: str | None
    """Its name in the recipe; None for a stage alone."""
    config: Config
    inputs: dict[str, Any]


def read_finished(folder: Path) -> Finished:
    """What a finished stage's manifest tells of it.

    Raises:
        ConfigError: there is none, or of a stage that does not train.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ConfigError(f"{folder} holds no stage that has finished; give the folder that holds its manifest.json.")
    name, slash, variant = str(manifest["stage"]).partition("/")
    config = dict(manifest["config"])
    kinds = {place: stage for stage, place in FOLDERS.items()}
    stage = str(config.get("kind")) if kinds.get(name) == "policy" else kinds.get(name, name)
    if stage not in CONFIGS or "by" in config:
        raise ConfigError(f"{folder} holds {manifest['stage']!r}, which trains nothing, so no token is learned from.")
    return Finished(
        folder=folder,
        stage=stage,
        variant=variant if slash else None,
        config=from_mapping(CONFIGS[stage], config, where=str(folder)),
        inputs=dict(manifest["inputs"]),
    )


def subject_in_run(finished: Finished, config: Config, *, text: bool) -> Subject:
    """What a stage of a run read: the recipe says which models, its folder which records. `text`: the mix too."""
    round_folder = finished.folder.resolve().parents[1]
    path = round_folder.parent / "recipe.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing, which says what the run was given; name the stage, --model and --data.")
    recipe = from_mapping(Recipe, read_json(path), where=str(path))
    inputs = Inputs(recipe, round_folder, CPU)
    init = "base" if isinstance(config, SftConfig) else start_model(config.init)
    subject = Subject(
        config=config,
        model=inputs.place_of(init, selected=isinstance(config, PpoConfig | DpoConfig)),
        seed=recipe.seed,
        texts=inputs.texts().load() if text and _mixes_text(config) else (),
    )
    if isinstance(config, SftConfig):
        return replace(subject, demonstrations=inputs.demonstrations("train").load())
    if isinstance(config, PpoConfig):
        judge = inputs.place_of(f"reward/{config.reward}") if config.reward in recipe.reward else None
        return replace(subject, prompts=inputs.prompts("train").load(), reward=judge)
    return replace(subject, rankings=inputs.rankings("train").load())


def _mixes_text(config: Config) -> bool:
    if isinstance(config, PpoConfig):
        return config.ptx_coef > 0
    return isinstance(config, SftConfig) and config.pretraining_mix > 0


def models_alone(finished: Finished) -> tuple[str, str | None]:
    """The models that a stage alone read: where its config does not name it, its result has the same tokenizer."""
    config = finished.config
    model = config.init if isinstance(config, DpoConfig | PpoConfig) else str(finished.folder / "model")
    return model, config.reward if isinstance(config, PpoConfig) and not is_function_path(config.reward) else None
