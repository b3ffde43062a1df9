"""How much memory training takes at its peak, worked out from the shapes of what is held at once.

A stage that trains goes through phases (rolling out, a pass forward and back, writing models); the peak is that of the
largest. What a phase holds, in bytes, with 4 for fp32 and e = 2 where products are of bf16, else 4:

    weights        4 for each parameter of each network that is loaded, and of each average of weights
    optimizer      8 for each trained parameter: AdamW's two moments
    gradients      4 for each trained parameter; where a step is a single micro-batch, they grow while activations fall,
                   so the larger of the two counts
    bf16 copies    2 for each parameter of a matrix, which autocast keeps from the forward to the backward pass
    activations    what the backward pass needs, see below
    logits         see below
    cache          8 for each key's number of each token and layer that is being decoded: fp32 keys and values
    process        the interpreter and its libraries

**Activations.** A layer of width D with queries Q = heads * head size, keys K and an inner width F keeps for each token
its two norms' inputs and normalised inputs (4 D numbers of fp32), and the inputs of its products: the norms' outputs
(2 D; in bf16 5 D, since autocast rounds them anew for each product), queries, keys and values as attention has them
(Q + 2 K, for padding too), attention's output (Q), and in the feed-forward part gate, activation, product and the other
branch (4 F):

    bytes a token and layer = 16 D + e (2 D or 5 D + Q + 4 F)  +  e (Q + 2 K) padded / tokens

Layers of our own (`llama`) keep the inputs of both norms, what comes out of them, attention's output, gate and branch:

    bytes a token and layer = 8 D + e (2 D + Q + 2 F)  +  e (Q + 2 K) padded / tokens

Attention by products (`attention`, up to 512 tokens on a processor) keeps its weights besides: e * S * H * T * T for S
sequences of at most T tokens. While one layer is computed, as much again as its largest intermediate results. With
gradient checkpointing a layer keeps its input alone (4 D), and one layer at a time keeps the rest.

**Logits** (`head`): at M predicted places, e * M * V up to a bound, three chunks of fp32 while one is worked on, and
twice the head's weight, for its gradient and what is added to it.

The terms are those of Llama-like models with gates; those without keep less, those with many small operations in their
activation (GPT-2) about as much. `SLACK` is what the allocator loses between blocks, measured on a processor; where
micro-batches of several sizes follow one another it is more, and for sequences of 900 tokens more than that. A GPU's
figures are of its own memory: no process, and attention always by the library's kernel.

Dimensions in names: N packed tokens, S sequences, T tokens of the longest, M predicted places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tastemaker import llama, processes
from tastemaker.attention import LONGEST_BY_PRODUCTS
from tastemaker.head import KEPT_BYTES, LOGITS_PER_CHUNK

FP32, BF16 = 4, 2
PROCESS = 500_000_000  # Python with torch, transformers and what they load for training
SLACK, SPLIT_SLACK = 1.12, 1.4  # what the allocator loses between blocks: in one micro-batch, and in several


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of a network's architecture its memory depends on."""

    parameters: int
    matrices: int
    """Parameters that stand in products."""
    layers: int
    width: int
    queries: int
    """Query heads times their size."""
    keys: int
    """Key heads times their size."""
    heads: int
    inner: int
    """Width inside the feed-forward part."""
    vocabulary: int
    """Rows of the head; 0 for a network that scores."""
    own_layers: bool = False
    """Whether its layers are such as `llama` has, for short sequences on a processor."""

    @property
    def inner_matrices(self) -> int:
        """Parameters that stand in products of the layers, not of the head."""
        return self.matrices - self.vocabulary * self.width

    def adapters(self, rank: int) -> int:
        """Parameters of low-rank adapters on queries and values, peft's choice for most architectures."""
        return self.layers * rank * (2 * self.width + self.queries + self.keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What a micro-batch is made of: one sequence, or several that share their beginning."""

    lengths: tuple[int, ...]
    tokens: int
    """A shared beginning counted once."""
    predicted: int = 0
    """Places whose logits are computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """How training passes a micro-batch through a network."""

    bfloat16: bool = False
    recompute: bool = False
    """Gradient checkpointing."""
    by_products: bool = True
    """Attention by plain products where sequences are short: on a processor, not on a GPU."""
    compiled: bool = False
    """By the library's layers through torch.compile, never by layers of ours."""

    @property
    def size(self) -> int:
        """Bytes of a number that enters a product."""
        return BF16 if self.bfloat16 else FP32


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes at the peak, by what holds them."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        largest = sorted(self.parts.items(), key=lambda part: -part[1])
        named = ", ".join(f"{name} {in_words(size)}" for name, size in largest if size >= 0.01 * self.total)
        return f"{in_words(self.total)} ({named})"


def in_words(size: float) -> str:
    """A number of bytes, to about three figures."""
    if size < 0.9995e9:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.2f} GB" if size < 9.995e9 else f"{size / 1e9:.1f} GB"


def shape_of(library: Any, *, scores: bool = False) -> Shape:
    """The shape of a model of the library, with or without weights; `scores`: of its trunk with a scalar head."""
    config = library.config.get_text_config()
    module = library.base_model if scores else library
    sizes = {id(parameter): (parameter.numel(), parameter.ndim) for parameter in module.parameters()}
    matrices = sum(count for count, dimensions in sizes.values() if dimensions > 1)
    embedding, head = library.get_input_embeddings().weight, library.get_output_embeddings()
    tied = not scores and head is not None and head.weight is embedding
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    named = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    return Shape(
        parameters=sum(count for count, _ in sizes.values()),
        matrices=matrices if tied else matrices - embedding.numel(),
        layers=int(config.num_hidden_layers),
        width=int(config.hidden_size),
        queries=heads * size,
        keys=int(getattr(config, "num_key_value_heads", None) or heads) * size,
        heads=heads,
        inner=int(next(filter(None, named), 4 * config.hidden_size)),
        vocabulary=0 if scores or head is None else int(head.weight.shape[0]),
        own_layers=llama.layers_of(library) is not None and not processes.several(),
    )


def kept_for_backward(shape: Shape, items: Sequence[Item], how: Pass) -> int:
    """Activations of one micro-batch that wait for the backward pass, and what the layer at work adds to them."""
    tokens, sequences, longest = _sizes(items)
    padded, size = sequences * longest, how.size
    by_products = how.by_products and longest <= LONGEST_BY_PRODUCTS
    if by_products and shape.own_layers and not how.compiled:
        exact, inputs = 2 * shape.width, 2 * shape.width + shape.queries + 2 * shape.inner
    else:
        exact, inputs = 4 * shape.width, (5 if how.bfloat16 else 2) * shape.width + shape.queries + 4 * shape.inner
    layer = tokens * (FP32 * exact + size * inputs)
    layer += padded * size * (shape.queries + 2 * shape.keys)
    scores = padded * shape.heads * longest
    layer += size * scores if by_products else FP32 * padded * (shape.queries + shape.heads)
    at_work = max(2 * size * tokens * shape.inner, 3 * FP32 * scores if by_products else 0)
    ends = 3 * FP32 * tokens * shape.width
    if how.recompute:
        return FP32 * tokens * shape.width * shape.layers + layer + at_work + ends
    return layer * shape.layers + at_work + ends


def logits(shape: Shape, items: Sequence[Item], how: Pass, *, backward: bool = True) -> int:
    """What the head holds for one micro-batch."""
    places, vocabulary = sum(item.predicted for item in items), shape.vocabulary
    if not places or not vocabulary:
        return 0
    chunk = min(places, max(1, LOGITS_PER_CHUNK // vocabulary)) * vocabulary
    held = how.size * places * vocabulary
    kept = held if backward and held <= KEPT_BYTES else 0
    of_weight = 2 * FP32 * vocabulary * shape.width if backward else 0
    return kept + 3 * FP32 * chunk + of_weight


def rollouts(shape: Shape, *, rows: int, prompt_tokens: int, new_tokens: int) -> int:
    """What a batch of rollouts holds: keys and values of the prompts as read, then of every row, and its logits."""
    held = 2 * FP32 * shape.layers * shape.keys
    read = rows * prompt_tokens * FP32 * (2 * shape.inner + 4 * shape.width)
    return (
        rows * (prompt_tokens + new_tokens) * held
        + rows * prompt_tokens * held
        + max(read, 4 * FP32 * rows * shape.vocabulary)
    )


def pass_phase(
    shape: Shape, groups: Sequence[Sequence[Item]], how: Pass, *, trained: int, held: Mapping[str, int]
) -> dict[str, int]:
    """One optimizer step over micro-batches, beside what is `held` anyway."""
    sizes = [(kept_for_backward(shape, group, how), logits(shape, group, how)) for group in groups]
    activations, of_head = max(sizes, key=sum)
    gradients, slack = FP32 * trained, SPLIT_SLACK
    if len(groups) == 1:  # as they grow, activations fall
        gradients, slack = max(0, gradients - activations - of_head), SLACK
    return {
        **held,
        "gradients": gradients,
        "activations": int(slack * activations),
        "logits": int(SLACK * of_head),
        "bf16 copies": BF16 * shape.matrices if how.bfloat16 else 0,
    }


def largest(phases: Sequence[Mapping[str, int]]) -> Estimate:
    """The estimate of a stage: that of its largest phase."""
    return Estimate(parts=max(phases, key=lambda parts: sum(parts.values())))


def _sizes(items: Sequence[Item]) -> tuple[int, int, int]:
    """N, S and T of a micro-batch."""
    return (
        sum(item.tokens for item in items),
        sum(len(item.lengths) for item in items),
        max(length for item in items for length in item.lengths),
    )
