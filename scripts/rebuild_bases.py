"""Train the two base language models that are shipped with the tiny world, from its web alone.

    scripts/rebuild-bases                 train both, write them and their figures into the package's data folder
    scripts/rebuild-bases --size small    one of them
    scripts/rebuild-bases --check         only measure the held-out loss and compare it with the recorded one

Plain next-token training of `LlamaForCausalLM`: documents are `<bos> text <eos>`, packed into rows, and attention never
crosses from one document into another. Matrices are trained by Muon, everything else by AdamW, in fp32; the result is
saved in bfloat16. Rebuilding gives the same held-out loss within 0.01, not the same bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tastemaker.tinyworld import (
    BASES,
    HELD_OUT_SEED,
    STOP_TOKENS,
    TRAINING_SEED,
    copying_drills,
    tokenizer_vocabulary,
    web_documents,
)

CONTEXT = 512
HELD_OUT_ROWS, HELD_OUT_LENGTH = 96, 512  # about 49,000 tokens
TOLERANCE = 0.01
# One turn of a conversation is what the web writes: `q: ... a: ...`. The template alone adds the one <bos>.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "a: {% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}q: {{ message['content'] }} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One base model and how it is trained."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    drill_tokens: int  # of repeated word lists before the web: without them no small model learned to copy
    tokens: int  # in all later steps; a few rows of them are still word lists
    rows: int  # rows of a batch, of `length` tokens each
    length: int
    muon_lr: float
    adam_lr: float
    seed: int
    bf16: bool  # products in bfloat16; worth it only for large matrices


SIZES = {
    "small": Size(
        hidden=96,
        layers=4,
        heads=4,
        ffn=256,
        drill_tokens=2_200_000,
        tokens=13_000_000,
        rows=16,
        length=256,
        muon_lr=0.02,
        adam_lr=4e-3,
        seed=1,
        bf16=False,
    ),
    "large": Size(
        hidden=256,
        layers=6,
        heads=8,
        ffn=768,
        drill_tokens=1_000_000,
        tokens=15_000_000,
        rows=16,
        length=256,
        muon_lr=0.02,
        adam_lr=3e-3,
        seed=2,
        bf16=True,
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words split at blanks. The specials are no words of the model, so text can never spell them."""
    words = ["<unk>", *tokenizer_vocabulary()]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def packed_rows(
    tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Rows of token ids, and for each token the number of its document within the row."""
    ids: list[int] = []
    documents: list[int] = []
    words = tokenizer.get_vocab()
    bos, eos = words["<bos>"], words["<eos>"]
    for number, text in enumerate(texts):
        document = [bos, *(words[word] for word in text.split()), eos]
        ids += document
        documents += [number] * len(document)
        while len(ids) > length:
            yield ids[: length + 1], documents[: length + 1]
            ids, documents = ids[length:], documents[length:]


def batch_loss(model: torch.nn.Module, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean next-token loss within documents, each document seen alone."""
    ids_BT = torch.tensor([row[0] for row in rows])
    document_BT = torch.tensor([row[1] for row in rows])
    inputs_BT, inside_BT = ids_BT[:, :-1], document_BT[:, :-1] == document_BT[:, 1:]
    length = inputs_BT.shape[1]
    same_BTT = document_BT[:, :-1, None] == document_BT[:, None, :-1]
    mask = (same_BTT & torch.ones(length, length, dtype=torch.bool).tril()).unsqueeze(1)
    logits = model(input_ids=inputs_BT, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits[inside_BT].float(), ids_BT[:, 1:][inside_BT])


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, rows: int = HELD_OUT_ROWS) -> float:
    """Nats per token on web text of another seed."""
    stream = packed_rows(tokenizer, web_documents(HELD_OUT_SEED), HELD_OUT_LENGTH)
    losses = [batch_loss(model, [next(stream) for _ in range(8)]).item() for _ in range(rows // 8)]
    return sum(losses) / len(losses)


@torch.no_grad()
def copying_loss(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> float:
    """Nats per token on the second half of repeated word lists; a model that does not copy pays about 6."""
    losses = []
    for text in islice(copying_drills(HELD_OUT_SEED), 16):
        ids_T = torch.tensor(tokenizer.convert_tokens_to_ids(["<bos>", *text.split()]))
        second = (len(ids_T) + 1) // 2  # its first word is a guess for every model
        logits = model(input_ids=ids_T[None, :-1], use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits[second:], ids_T[second + 1 :]).item())
    return sum(losses) / len(losses)


def schedule(step: int, steps: int) -> float:
    """Warm up over 50 steps, then a cosine down to 2 %."""
    return min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(size: Size, tokenizer: PreTrainedTokenizerFast, label: str) -> LlamaForCausalLM:
    torch.manual_seed(size.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=CONTEXT,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=size.muon_lr, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=size.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    peaks = [size.muon_lr, size.adam_lr]
    seed = TRAINING_SEED + size.seed
    drills = packed_rows(tokenizer, copying_drills(seed), size.length)
    web = packed_rows(tokenizer, web_documents(seed), size.length)
    batch = size.rows * size.length
    drill_steps, steps = size.drill_tokens // batch, (size.drill_tokens + size.tokens) // batch
    started = time.perf_counter()
    for step in range(steps):
        drill_rows = size.rows if step < drill_steps else size.rows // 4 if step < steps // 2 else size.rows // 16
        rows = [next(drills if row < drill_rows else web) for row in range(size.rows)]
        with torch.autocast("cpu", torch.bfloat16, enabled=size.bf16):
            loss = batch_loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            speed = (step + 1) * batch / (time.perf_counter() - started)
            copying = copying_loss(model, tokenizer)
            print(
                f"{label} step {step}/{steps} loss {loss.item():.3f} copying {copying:.2f} {speed:,.0f} tokens/s",
                flush=True,
            )
    return model


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    stops = tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *stops]
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def check(bases: Path) -> bool:
    """Whether each shipped model still has the held-out loss that was recorded for it."""
    recorded = json.loads((bases / "bases.json").read_text())
    right = True
    for name, record in recorded.items():
        measured = held_out_loss(*load(bases / name))
        agrees = abs(measured - record["heldout_loss"]) <= TOLERANCE
        verdict = "ok" if agrees else f"differs by more than {TOLERANCE}"
        print(f"{name}: held-out loss {measured:.4f}, recorded {record['heldout_loss']:.4f}: {verdict}")
        right = right and agrees
    return right


def build(label: str, bases: Path, tokens: int | None) -> None:
    """Train one base, save it and write its figures beside it."""
    size, tokenizer = SIZES[label], make_tokenizer()
    if tokens is not None:
        size = Size(**{field: getattr(size, field) for field in Size.__slots__} | {"tokens": tokens})
    started = time.perf_counter()
    model = train(size, tokenizer, label)
    seconds = time.perf_counter() - started
    name = f"base-{label}"
    save(model, tokenizer, bases / name)
    saved, tokenizer = load(bases / name)
    figures = {
        "parameters": sum(weight.numel() for weight in saved.parameters()),
        "tokens": size.drill_tokens + size.tokens,
        "heldout_loss": round(held_out_loss(saved, tokenizer), 4),
        "training_seconds": round(seconds),
    }
    print(f"{name}: {figures}")
    path = bases / "bases.json"
    recorded = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(recorded | {name: figures}, indent=2, sort_keys=True) + "\n")


def fast_arithmetic() -> None:
    """fp32 products through oneDNN (about twice as fast here, same accuracy), and memory that glibc keeps."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)
    except OSError:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), help="only this one")
    parser.add_argument("--out", type=Path, default=BASES, help="where to write (default: the package's data folder)")
    parser.add_argument("--tokens", type=int, help="train on another number of tokens than is usual for the size")
    parser.add_argument("--check", action="store_true", help="compare held-out losses with the recorded ones")
    arguments = parser.parse_args()
    fast_arithmetic()
    if arguments.check:
        raise SystemExit(0 if check(arguments.out) else 1)
    for label in [arguments.size] if arguments.size else list(SIZES):
        build(label, arguments.out, arguments.tokens)


if __name__ == "__main__":
    main()
