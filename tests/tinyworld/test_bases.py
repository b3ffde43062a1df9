"""The shipped base models: they load, speak the world's language, and are as good as their figures say."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tastemaker import tinyworld

NAMES = ("base-small", "base-large")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tinyworld.BASES / "base-small")


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    return {name: AutoModelForCausalLM.from_pretrained(tinyworld.BASES / name, dtype=torch.float32) for name in NAMES}


@torch.no_grad()
def sample_loss(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, documents: int = 64) -> float:
    """Nats per token on held-out documents, each alone: `<bos> text <eos>`."""
    texts = list(islice(tinyworld.web_documents(tinyworld.HELD_OUT_SEED), documents))
    batch = tokenizer([f"<bos>{text}<eos>" for text in texts], padding=True, padding_side="right", return_tensors="pt")
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    counts = batch.attention_mask[:, 1:].bool()
    return F.cross_entropy(logits[counts], batch.input_ids[:, 1:][counts]).item()


def test_recorded_losses_are_reproduced_and_the_large_base_is_the_better_language_model(
    models: dict[str, torch.nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    recorded = json.loads((tinyworld.BASES / "bases.json").read_text())
    measured = {name: sample_loss(models[name], tokenizer) for name in NAMES}
    for name in NAMES:  # the sample is small and packed otherwise than the recorded one
        assert measured[name] == pytest.approx(recorded[name]["heldout_loss"], abs=0.06)
    # Most of the loss is chance that nothing can predict, so a better model is better by little.
    assert measured["base-large"] < measured["base-small"] - 0.015
    assert recorded["base-large"]["heldout_loss"] < recorded["base-small"]["heldout_loss"] - 0.02


def test_the_large_base_has_ten_times_the_parameters_and_both_are_small_files(
    models: dict[str, torch.nn.Module],
) -> None:
    recorded = json.loads((tinyworld.BASES / "bases.json").read_text())
    counted = {name: sum(weight.numel() for weight in models[name].parameters()) for name in NAMES}
    assert counted == {name: recorded[name]["parameters"] for name in NAMES}
    assert counted["base-large"] >= 10 * counted["base-small"]
    size = sum(path.stat().st_size for path in tinyworld.BASES.rglob("*") if path.is_file())
    assert size < 14.5e6


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_gives_back_every_text_and_knows_every_word(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tinyworld.BASES / name)
    records = tinyworld.prompts(1, 200, 20, 100)
    texts = [record["truth"]["ideal"] for record in records]
    texts += [tinyworld.prompt_text(record) for record in records]
    texts += [tinyworld.demonstration(record, seed=0, demonstrator="d") for record in records]
    texts += list(islice(tinyworld.web_documents(4), 2000))
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False).input_ids, strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
    assert {"<unk>", *tinyworld.tokenizer_vocabulary()} < set(tokenizer.get_vocab())


def test_specials_are_distinct_and_text_cannot_spell_them(tokenizer: PreTrainedTokenizerBase) -> None:
    specials = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert len(set(specials)) == 4
    ids = tokenizer("tom <eos> <bos> <pad> mia<eos>", add_special_tokens=False, split_special_tokens=True).input_ids
    assert ids[1:] == [tokenizer.unk_token_id] * 4
    assert set(ids).isdisjoint(specials[:3])


def test_chat_template_writes_what_the_web_writes(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [
        {"role": "user", "content": "hello , i am tom from the lake ."},
        {"role": "assistant", "content": "hello tom , how are you ?"},
        {"role": "user", "content": "what is my name ?"},
    ]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<bos>q: hello , i am tom from the lake . a: hello tom , how are you ?<eos>q: what is my name ? a:"
    )
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer(rendered).input_ids == ids
    finished = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "your name is tom ."}])
    assert finished["input_ids"][: len(ids)] == ids
    assert finished["input_ids"][-1] == tokenizer.eos_token_id


@torch.no_grad()
def test_even_the_small_base_copies(models: dict[str, torch.nn.Module], tokenizer: PreTrainedTokenizerBase) -> None:
    """A list of random words is predicted when it comes again; chance is about 6 nats a word."""
    for model in models.values():
        losses = []
        for text in islice(tinyworld.copying_drills(1), 8):
            ids = tokenizer(f"<bos>{text}", return_tensors="pt").input_ids
            logits = model(input_ids=ids).logits[0, :-1]
            second = len(text.split()) // 2 + 1  # where the list comes again, after its first word
            losses.append(F.cross_entropy(logits[second:], ids[0, second + 1 :]).item())
        assert sum(losses) / len(losses) < 0.7
