"""`tastemaker inspect` shows what the stages do: every mark is held beside the batch that the stage itself packs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import save_model
from tests.runs import SMOKE
from tests.stages.conftest import demonstration, prompt, ranking
from tests.test_tokenizer import train_bpe
from torch import Tensor

from tastemaker.artefacts import run_stage
from tastemaker.checkpoint import Reader, load_reader, load_reward_model, new_reward_model, save_reward_model
from tastemaker.cli import main
from tastemaker.commands.token_lines import legend, lines_of, visible
from tastemaker.config import from_mapping, load_recipe, to_json
from tastemaker.files import write_json, write_records
from tastemaker.inspection import Seen, Subject, look, of_demonstrations, of_pairs, of_rankings, token_texts
from tastemaker.model import LanguageModel, RewardModel
from tastemaker.packing import Packed
from tastemaker.recipe import Recipe
from tastemaker.records import Message, Prompt, Response, Text
from tastemaker.scoring import ModelScorer
from tastemaker.settings import DpoConfig, PpoConfig, RewardConfig, SftConfig
from tastemaker.stages.dpo import train_dpo
from tastemaker.stages.ppo import PpoRun
from tastemaker.stages.reward import train_reward_model
from tastemaker.stages.sft import train_sft
from tastemaker.tokenizer import wrap_tokenizer

CPU = torch.device("cpu")
Marks = dict[tuple[int, ...], frozenset[int]]

DEMONSTRATIONS = [demonstration(f"w{n} w{n + 2}", "w7 " * (n % 3) + f"w{n}") for n in range(3, 10)]
TEXTS = [Text(text=" ".join(f"w{(5 * n + place) % 90}" for place in range(n))) for n in (2, 11, 13)]
RANKINGS = [
    ranking("w5 w6 w7 w8", ["w9 w10", "w11", "w12 w13 w14"], ((1,), (0, 2))),
    ranking("w3", ["w4 w5 w6", "w7"], ((0, 1),)),
    ranking("w15 w16", ["w17", "w18 w19"], ((1,), (0,)), rater="ann"),
    ranking("w15 w16", ["w17", "w18 w19"], ((0,), (1,)), rater="bob"),
]
PROMPTS = [prompt(f"w{number} w{number + 1}" + " w9" * (number % 3)) for number in range(3, 10)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random policy of 97 words and a context of 64."""
    return str(save_model(tmp_path_factory.mktemp("base") / "model", max_position_embeddings=64))


@pytest.fixture(scope="module")
def reward(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random reward model that reads 4 tokens of a prompt."""
    folder: Path = tmp_path_factory.mktemp("reward") / "model"
    save_reward_model(folder, new_reward_model(model, seed=5, max_prompt_tokens=4))
    return str(folder)


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> Marks:
    """Every sequence of which a policy was asked log-probs, with the places of the tokens that they are of."""
    marks, predict = Marks(), LanguageModel.predict

    def spy(self: LanguageModel, packed: Packed, source_M: Tensor, target_M: Tensor, **options: Any) -> Any:
        marks.update(places_of(packed, source_M, target_M))
        return predict(self, packed, source_M, target_M, **options)

    monkeypatch.setattr(LanguageModel, "predict", spy)
    return marks


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Marks:
    """Every sequence that a reward model has scored, with the place where the score was read."""
    marks, at = Marks(), RewardModel.at

    def spy(self: RewardModel, packed: Packed, source_M: Tensor) -> Tensor:
        if len(source_M) == len(packed.lengths):  # a value function is read at every response token
            for (ids, index), source in zip(rows_of(packed), source_M.tolist(), strict=True):
                marks[ids] = frozenset({index.index(source)})
        return at(self, packed, source_M)

    monkeypatch.setattr(RewardModel, "at", spy)
    return marks


def rows_of(packed: Packed) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Each sequence's ids and where they lie in the packed row."""
    for row, length in enumerate(packed.lengths):
        index = packed.padded_ST[row, :length].tolist()
        yield tuple(packed.id_N[index].tolist()), index


def places_of(packed: Packed, source_M: Tensor, target_M: Tensor) -> Marks:
    """The predicted places of each sequence: a packed batch lists them sequence after sequence, each in order."""
    found, left = Marks(), list(zip(source_M.tolist(), target_M.tolist(), strict=True))
    for ids, index in rows_of(packed):
        places = list[int]()
        while left and left[0][0] in index and (not places or index.index(left[0][0]) >= places[-1]):
            source, target = left.pop(0)
            places.append(index.index(source) + 1)
            assert ids[places[-1]] == target
        found[ids] = frozenset(places)
    assert left == []
    return found


def reader_of_bytes() -> Reader:
    """A byte-level tokenizer with the control tokens of ChatML, in a context of 200."""
    return Reader(wrap_tokenizer(train_bpe()), 200, 200)


def shown(seen: Sequence[Seen], *, ids: bool = False, width: int = 200) -> list[str]:
    return [line.plain.rstrip() for line in lines_of(seen, ids=ids, width=width)]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- the marks are what the stages train on -------------------------------------------------------------------------


def test_of_demonstrations_and_text_what_fine_tuning_trains_on(model: str, tmp_path: Path, predicted: Marks) -> None:
    config = SftConfig(epochs=2, batch_size=4, pretraining_mix=0.5, max_text_tokens=5, keep_epochs="last")
    train_sft(
        tmp_path,
        config=config,
        base=model,
        demonstrations=DEMONSTRATIONS,
        pretraining=TEXTS,
        device=CPU,
        seed=3,
    )
    subject = Subject(config=config, model=model, demonstrations=DEMONSTRATIONS, texts=TEXTS)
    seen = look(subject, first=99)
    assert {one.ids: one.trained for one in seen} == predicted
    # the pieces of texts of 2 + 1, 11 + 1 and 13 + 1 tokens: 3 | 5 5 2 | 5 5 4
    assert [len(one.ids) for one in seen[len(DEMONSTRATIONS) :]] == [3, 5, 5, 2, 5, 5, 4]
    for one in seen[: len(DEMONSTRATIONS)]:
        assert one.stop == len(one.ids) - 1
        assert one.trained == frozenset(range(one.prompt, len(one.ids)))
        assert one.score is None
    cut = [bool(one.notes) for one in seen[len(DEMONSTRATIONS) :]]
    assert cut == [one.stop is None for one in seen[len(DEMONSTRATIONS) :]]
    assert cut == [False, True, True, False, True, True, False]


@pytest.mark.parametrize("limit", [None, 3])
def test_of_rankings_where_the_reward_model_reads_its_score(
    model: str, tmp_path: Path, scored: Marks, limit: int | None
) -> None:
    config = RewardConfig(batch_size=2, max_prompt_tokens=limit)
    train_reward_model(tmp_path, config=config, init=model, rankings=RANKINGS, device=CPU, seed=3)
    seen = look(Subject(config=config, model=model, rankings=RANKINGS), first=99)
    assert [one.title for one in seen] == [
        "response 1, rank 1",
        "response 2, rank 0",
        "response 3, rank 1",
        "response 1, rank 1 and 0",
        "response 2, rank 0 and 1",
    ]
    tied = [ids for ids in scored if ids not in {one.ids for one in seen}]
    assert len(tied) == 2, "a wholly tied ranking is only measured on"
    for one in seen:
        assert scored[one.ids] == {one.score}
        assert one.stop == one.score == len(one.ids) - 1
        assert one.trained == frozenset()
        assert one.prompt == (limit or 7 if one.example == "ranking 1" else limit or 5)


def test_of_pairs_what_dpo_trains_on(model: str, tmp_path: Path, predicted: Marks) -> None:
    for limit in (None, 3):
        predicted.clear()
        config = DpoConfig(init=model, batch_size=2, max_prompt_tokens=limit)
        train_dpo(tmp_path / str(limit), config=config, init=model, rankings=RANKINGS, device=CPU, seed=3)
        seen = look(Subject(config=config, model=model, rankings=RANKINGS), first=99)
        assert {one.ids: one.trained for one in seen} == predicted
        assert [one.title for one in seen] == ["chosen", "rejected"] * 4
        assert [len(one.left_out) for one in seen] == ([0] * 8 if limit is None else [4] * 4 + [2] * 4)
    first = look(Subject(config=config, model=model, rankings=RANKINGS), first=1)
    assert [one.example for one in first] == ["pair 1"] * 2


@pytest.mark.parametrize("truncated", ["penalty", "mask"])
def test_of_rollouts_what_ppo_trains_on_and_its_reward_model_reads(
    model: str, reward: str, scored: Marks, truncated: str
) -> None:
    """The responses are those that training begins with: sampled under the same seed, of the same prompts."""
    fields = {"init": model, "reward": reward, "batch_size": 6, "minibatches": 2, "truncated": truncated}
    config = from_mapping(PpoConfig, fields | {"decoding": {"max_new_tokens": 5}}, where="test")
    scorer = ModelScorer(load_reward_model(reward), budget=512)
    run = PpoRun(config, model, None, scorer, PROMPTS, (), (), CPU, 3)
    chosen = run.draw_prompt(0, 6)
    scored.clear()
    experience, _ = run.observe(chosen, run.roll_out(chosen, 0), 0)
    marks = places_of(*run._pack(experience.sequences, experience.prompt_lengths, range(6)))
    subject = Subject(config=config, model=model, reward=reward, prompts=PROMPTS, seed=3)
    seen = look(subject, first=4, sample=True)
    assert len(seen) == 8
    for row, (policy, judge) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        assert policy.ids == experience.sequences[row]
        trains = experience.mask_BT[row, : len(policy.ids) - policy.prompt]
        assert policy.trained == {place for place in marks[policy.ids] if trains[place - policy.prompt]}
        assert scored[judge.ids] == {judge.score}
        assert judge.prompt == 4, "the reward model reads no more of a prompt"
        assert judge.left_out == policy.ids[1 : policy.prompt - 3], "the beginning-of-text id stays"
        finished = policy.stop is not None
        assert finished == (judge.stop is not None) == (not policy.notes) == (not judge.notes)
        assert finished or (policy.trained == frozenset()) == (truncated == "mask")


def test_before_anything_is_sampled_ppo_shows_prompts_and_those_that_are_never_asked(model: str) -> None:
    config = from_mapping(PpoConfig, {"init": model, "reward": "m:f", "decoding": {"max_new_tokens": 57}}, where="")
    rows = [prompt("w5 w6 w7 w8"), prompt("w5 w6 w7 w8 w9")]  # 7 and 8 tokens of 64
    fits, does_not = look(Subject(config=config, model=model, prompts=rows), first=9)
    assert (len(fits.ids), fits.prompt, len(does_not.ids)) == (7, 7, 8)
    assert fits.notes == ("up to 57 tokens are sampled here, and each of them trains; --sample shows some",)
    assert does_not.notes == ("never asked: with 57 new tokens it does not fit into the context of 64",)


# --- what is cut off, and text that looks like control tokens --------------------------------------------------------


def test_what_is_left_out_and_what_is_seen_make_up_the_whole() -> None:
    reader = replace(reader_of_bytes(), context=50)
    long = ranking("the cat " * 12, ["sat", "the hat " * 9], ((0,), (1,)))
    whole = reader.tokenizer.prompt_ids(long.prompt.messages)
    short, longer = of_rankings([long], reader, RewardConfig(max_prompt_tokens=40), first=1)
    for one, text in ((short, "sat"), (longer, "the hat " * 9)):
        ending = reader.tokenizer.response_ids(text, finished=True)
        assert [*one.left_out, *one.ids] == [*whole, *ending]
        assert one.ids[one.prompt :] == tuple(ending)
        assert one.prompt == min(40, 50 - len(ending))
    assert longer.prompt < short.prompt == 40
    chosen, rejected = of_pairs([long], reader, DpoConfig(init="", max_prompt_tokens=20), first=1)
    assert [*chosen.left_out, *chosen.ids[:20]] == whole
    assert chosen.prompt == rejected.prompt == 20
    lines = shown([short, longer])
    assert f"  response 1, rank 0: {len(short.ids)} tokens, 0 of them trained, " in lines[2]
    assert f"{len(short.left_out)} before them left out" in lines[2]
    assert any(line.startswith("left out ") for line in lines)


def test_a_response_that_was_cut_off_has_no_stop_and_a_score_all_the_same(model: str) -> None:
    responses = (Response(text="w5 w6", finished=False), Response(text="w7"))
    cut = replace(ranking("w3", ["w5", "w7"], ((1,), (0,))), responses=responses)
    one, other = of_rankings([cut], load_reader(model), RewardConfig(), first=1)
    assert (one.stop, one.score, one.ids[-1]) == (None, 5, 10)  # <bos> w0 w3 w1, then w5 w6, which is 10
    assert (other.stop, other.score, other.ids[-1]) == (5, 5, 2)
    assert one.notes
    assert not other.notes


def test_control_tokens_in_peoples_texts_are_seen_to_be_text() -> None:
    reader = reader_of_bytes()
    messages = (Message("user", "say <|im_end|>"),)
    row = replace(demonstration("", "the <|im_end|> cat"), prompt=Prompt(messages=messages))
    (one,) = of_demonstrations([row], reader)
    end = reader.tokenizer.end_id
    assert [place for place, token in enumerate(one.ids) if token == end and place >= one.prompt] == [one.stop]
    assert list(one.ids[: one.prompt]).count(end) == 1, "the template's own"
    text = "".join(line[22:] for line in shown([one])).replace("│", "")
    assert text.count("⟪<|im_end|>⟫") == 2
    assert text.count("<|im_end|>") == 4
    assert "the·<|im_end|>·cat⟪<|im_end|>⟫" in text


def test_every_token_has_its_share_of_the_text() -> None:
    tokenizer = reader_of_bytes().tokenizer
    ids = tokenizer.response_ids("the caté\n\x1b[31m ", finished=True)
    texts = token_texts(ids, tokenizer)
    assert "".join(texts) == "the caté\n\x1b[31m <|im_end|>"
    assert len(texts) == len(ids)
    assert "" in texts, "the first byte of é"
    assert token_texts([], tokenizer) == []


def test_no_sign_is_hidden_and_none_is_obeyed() -> None:
    assert visible("a b\tc\n\x1b[31m\u200b\u00a0é") == "a·b→c⏎\\x1b[31m\\u200b\\xa0é"


# --- how it looks ----------------------------------------------------------------------------------------------------

SHOWN = """
demonstration 1: 8 tokens, 3 of them trained
prompt                ⟪<bos>⟫│·w0│·w3│·w5│·w1
trained               ·w6│·w7
trained, stop         ⟪·<eos>⟫

prompt                read, and not learned from
trained               learned from: the loss is on this token's log-prob behind all those before it
stop                  the end token: the response was finished, and ends here
│ between tokens; · a space, ⏎ a new line, → a tabulator, ⟪ ⟫ a control token, … a part of a character
"""


def test_the_command_shows_a_demonstration(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": "w3 w5", "completion": "w6 w7"}] * 2)
    command = ["inspect", "sft", "--model", model, "--data", data, "--first", "1"]
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert main(command) == 0
    assert capsys.readouterr().out == SHOWN
    assert main([*command, "--ids"]) == 0
    assert "⟪<bos>⟫=1│·w0=4│·w3=7│·w5=9│·w1=5\n" in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(command) == 0
    assert "\x1b[32m·w6│·w7\x1b[0m" in capsys.readouterr().out
    assert main([*command, "--plain"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(command) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_lines_are_broken_between_tokens_and_behind_new_lines(model: str) -> None:
    (one,) = of_demonstrations([demonstration(" ".join(["w5"] * 30), "w6")], load_reader(model))
    lines = shown([one], width=60)
    assert max(map(len, lines)) <= 60
    assert [line[:8].strip() for line in lines[2:]] == ["prompt", "", "", "", "trained", "trained,"]
    reader = reader_of_bytes()
    (two,) = of_demonstrations([demonstration("the\ncat", "sat")], reader)
    assert any(line.endswith("⏎") and not line.startswith("prompt") for line in shown([two]))


def test_a_prompt_is_shown_once_for_all_its_responses(model: str) -> None:
    seen = look(Subject(config=RewardConfig(), model=model, rankings=RANKINGS), first=1)
    lines = shown(seen)
    assert sum("·w5│·w6│·w7│·w8" in line for line in lines) == 1
    assert lines.count("prompt                (the same 7 tokens)") == 2
    words = [line.plain.split("  ")[0] for line in legend(seen)]
    assert words[:5] == ["", "prompt", "read", "stop", "score"]


# --- what is looked at -----------------------------------------------------------------------------------------------


def test_no_weights_are_read(model: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "model.safetensors").unlink()
    data = write(tmp_path / "r.jsonl", [{"prompt": "w3", "chosen": "w4", "rejected": "w5"}])
    for stage in ("reward", "dpo", "ppo"):
        assert main(["inspect", stage, "--model", str(bare), "--data", data]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sft"], "sft needs --model and --data"),
        (["no-such"], "'no-such' is neither a stage (sft, reward, dpo, ppo, text) nor a folder of one"),
        (["sft", "--model", "MODEL", "--data", "DATA", "--max-new-tokens", "9"], "--max-new-tokens is no setting of"),
        (["dpo", "--model", "MODEL", "--data", "DATA", "--truncated", "mask"], "--truncated is no setting of dpo"),
        (["dpo", "--model", "MODEL", "--data", "DATA", "--sample"], "--sample is for ppo"),
        (["reward", "--model", "MODEL", "--data", "DATA"], "there is nothing to learn from"),
        (["MODEL"], "holds no stage that has finished"),
    ],
)
def test_mistakes_are_said(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": "w3", "responses": ["w4", "w5"], "ranking": [[0, 1]]}])
    if arguments[0] == "sft":
        data = write(tmp_path / "d.jsonl", [{"prompt": "w3", "completion": "w4"}])
    given = {"MODEL": model, "DATA": data}
    assert main(["inspect", *(given.get(word, word) for word in arguments)]) == 2
    assert says in capsys.readouterr().err


def test_a_stage_of_a_run_names_its_models_and_data(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(SMOKE, Recipe)
    recipe = replace(recipe, base=replace(recipe.base, model=model))
    round_folder = tmp_path / "out/round-1"
    write_records(round_folder / "2-demonstrations/train.jsonl", DEMONSTRATIONS)
    folder = round_folder / "3-sft/baseline"
    run_stage(folder, stage="3-sft/baseline", config=recipe.sft["baseline"], inputs={}, work=lambda place: None)
    assert main(["inspect", str(folder)]) == 2
    assert "recipe.json is missing" in capsys.readouterr().err
    write_json(tmp_path / "out/recipe.json", to_json(recipe))
    assert main(["inspect", str(folder), "--first", "2"]) == 0
    said = capsys.readouterr().out
    assert "demonstration 2: " in said
    assert "·w7│·w4" in said
    assert main(["inspect", str(folder), "--data", "x"]) == 2
    assert "names its own models and data" in capsys.readouterr().err


def test_a_stage_alone_is_looked_at_with_its_own_settings(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "r.jsonl", [{"prompt": "w3 w4 w5", "chosen": "w7", "rejected": "w8"}] * 2)
    out = tmp_path / "rm"
    assert main(["reward", "--model", model, "--data", data, "--out", str(out), "--max-prompt-tokens", "4"]) == 0
    assert main(["inspect", str(out)]) == 2
    assert "does not name its data; give --data" in capsys.readouterr().err
    assert main(["inspect", str(out), "--data", data]) == 0
    assert "6 tokens, 0 of them trained, 2 before them left out" in capsys.readouterr().out
