"""The tiny models and the batch: `python -m benchmarks.peer_losses.batch FOLDER`.

The models are random (two layers of width 48, 6 and 3 heads), the policy and its reference different ones. Lengths are
unequal, so padding is on TRL's side of every batch; ids are given, so nobody's tokenizer plays a part.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.peer_losses.cases import RESPONSE_TOKENS
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tastemaker.checkpoint import new_reward_model, save_policy, save_reward_model
from tastemaker.files import write_json
from tastemaker.model import LanguageModel
from tastemaker.tokenizer import wrap_tokenizer

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
VOCABULARY = 97
TEMPLATE = "<bos>{% for message in messages %} {{ message['content'] }}{% endfor %}"
SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make(folder: Path) -> None:
    """`policy`, `reference`, `reward` and `value`, and `batch.json`."""
    for seed, name in enumerate(("policy", "reference")):
        save_policy(folder / name, random_policy(seed))
    for seed, name in enumerate(("reward", "value")):
        save_reward_model(folder / name, new_reward_model(str(folder / "policy"), seed=seed))
    write_json(folder / "batch.json", batch())


def random_policy(seed: int) -> LanguageModel:
    """With weights four times as large as the library draws them, else all tokens are about as likely."""
    words = [*SPECIAL, *(f"w{number}" for number in range(VOCABULARY - len(SPECIAL)))]
    inner = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    library = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    library.chat_template = TEMPLATE
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SHAPE)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return LanguageModel(model, wrap_tokenizer(library))


def batch() -> dict[str, Any]:
    """Rows of a prompt's ids and its responses' ids, best first; all but PPO's end in the end token."""
    draw = random.Random(11)

    def ids(count: int) -> list[int]:
        return [draw.randrange(len(SPECIAL), VOCABULARY) for _ in range(count)]

    def rows(count: int, responses: int, length: int | None = None) -> list[dict[str, Any]]:
        found = []
        for _ in range(count):
            prompt = [1, *ids(draw.randrange(2, 9))]
            found.append(
                {
                    "prompt": prompt,
                    "responses": [[*ids(length or draw.randrange(1, 12)), 2] for _ in range(responses)],
                }
            )
        return found

    rollouts = [{"prompt": [1, *ids(2 + number)], "response": ids(RESPONSE_TOKENS)} for number in (3, 0, 5, 1, 4)]
    return {
        "sft": rows(7, 1),
        "reward-2": rows(5, 2),
        "reward-4": rows(3, 4),
        "dpo": rows(5, 2),
        "ipo": rows(5, 2, 6),
        "ppo": rollouts,
    }


if __name__ == "__main__":
    make(Path(sys.argv[1]))
    print(json.dumps({"made": sys.argv[1]}))
