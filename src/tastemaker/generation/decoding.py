"""One batch being decoded by a model: read the prompts once, then step, and pick and add rows between steps.

There are two ways, and `choose_path` finds out by trying which one a model allows, so that no list of architectures has
to be kept:

- `FastDecoding` runs the library's modules over our own cache and attention (`cache.py`).
- `LibraryDecoding` uses the library's own cache and attention, which is slower and right for everything else:
  soft-capped attention, attention sinks, ALiBi, state-space layers, sequences longer than a sliding window.

A path is taken only if it gives the logits of the plain forward pass for a short left-padded batch. Models whose layers
do not support padding are decoded in batches of equal lengths. On a GPU the steps of the fast path become CUDA graphs
(`graphs.py`), if that passes the same trial.

Dimensions: U distinct prompts, B rows, T tokens, S tokens so far (cached and new), V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from tastemaker import llama
from tastemaker.errors import ModelError
from tastemaker.generation.cache import PreallocatedCache, decoding_attention
from tastemaker.generation.graphs import ALIGNMENT, Forward, Graphs, StaticSteps, rounded_up
from tastemaker.generation.llama import LiveWeights, LlamaForward
from tastemaker.packing import sent_to

log = logging.getLogger(__name__)

Ids = Sequence[int]


class Decoding(Protocol):
    """A batch of sequences that grow by one token a step."""

    @property
    def full(self) -> bool:
        """Whether there is no room for a step until rows are dropped."""

    def prefill(self, prompts: Sequence[Ids]) -> Tensor:
        """Read the prompts; returns the logits after each, `[U, V]`."""

    def branch(self, rows_B: Tensor) -> None:
        """Go on with these rows (repeats allowed) in place of the prompts that were read."""

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these rows only."""

    def join(self, others: Self, rows_B: Tensor) -> None:
        """Go on with these rows (repeats allowed) of prompts that were read as another batch too, below one's own."""

    def step(self, token_B: Tensor) -> Tensor:
        """Append one token to every row; returns the logits after it, `[B, V]`."""


class FastDecoding:
    """Decoding over a preallocated cache. Every sequence may begin with one shared prefix, whose cache is given.

    The shared prefix lies in the first columns of every row, and all rows end at the same column. Rows that join begin
    at a later one than those before them, so the batch would walk out of its columns; whenever rows are dropped,
    columns that no row needs any more are dropped with them. `spare` columns are those that it may walk in between.

    With `graphs`, steps have fixed shapes and are recorded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        new_tokens: int,
        prefix: PreallocatedCache | None = None,
        spare: int = 0,
        graphs: Graphs | None = None,
        forward: Forward | None = None,
    ) -> None:
        self._room, self._prefix, self._device = new_tokens + spare, prefix, model.device
        self._graphs = graphs
        self._static: StaticSteps | None = None
        self._shared = 0 if prefix is None else prefix.get_seq_length()
        self._forward = _forward_function(model) if forward is None else forward
        self._bias_dtype = torch.float32 if model.device.type == "cpu" else model.dtype

    @property
    def full(self) -> bool:
        return self._length == self._bias_BS.shape[1]

    @staticmethod
    def read_prefix(model: PreTrainedModel, prefix: Ids, forward: Forward | None = None) -> PreallocatedCache:
        """The cache of a prefix, for any number of batches."""
        reading = FastDecoding(model, new_tokens=0, forward=forward)
        reading.prefill([prefix])
        return reading._cache

    def prefill(self, prompts: Sequence[Ids]) -> Tensor:
        ids_UT, mask_UT = _left_padded(prompts, self._device)
        shared = self._shared
        self._length = shared + ids_UT.shape[1]
        if self._prefix is None:
            self._cache = PreallocatedCache(self._length)
        else:
            self._cache = self._prefix.branch(ids_UT.new_zeros(len(prompts)), self._length)

        seen_US = pad(mask_UT, (shared, 0), value=True)
        position_US = _positions(seen_US)
        self._position_B1 = position_US[:, -1:]
        self._bias_BS = pad(self._bias(seen_US), (0, self._room))

        column_S = torch.arange(self._length, device=self._device)
        query_T1 = column_S[shared:, None]
        # Padding sees itself, and nothing else sees it: a row of scores that is wholly masked would turn into NaN.
        visible_UTS = (column_S <= query_T1) & seen_US[:, None, :] | (column_S == query_T1)
        return self._logits(ids_UT, position_US[:, shared:], self._bias(visible_UTS)[:, None])

    def _bias(self, visible: Tensor) -> Tensor:
        """What is added to the scores: 0 where a token is visible, minus infinity where it is not."""
        return torch.zeros_like(visible, dtype=self._bias_dtype).masked_fill_(~visible, float("-inf"))

    def branch(self, rows_B: Tensor) -> None:
        records = self._graphs is not None and self._graphs.failure is None
        capacity = rounded_up(self._length + self._room, ALIGNMENT if records else 1)
        self._cache = self._cache.branch(rows_B, capacity)
        self._bias_BS, self._position_B1 = self._bias_BS[rows_B], self._position_B1[rows_B]
        if self._graphs is not None and records:
            self._static = StaticSteps(
                self._forward,
                self._cache,
                rows=len(rows_B),
                columns=capacity,
                like=self._bias_BS,
                graphs=self._graphs,
            )
            self._load_static()

    def _load_static(self) -> None:
        """Tell the fixed steps which rows and columns there are now."""
        if self._static is not None:
            self._static.load(self._position_B1, self._bias_BS[:, : self._length])

    def keep(self, rows_B: Tensor) -> None:
        self._position_B1 = self._position_B1[rows_B]
        gap = self._length - 1 - int(self._position_B1.max())  # before the longest of these sequences
        self._cache.keep(rows_B, self._shared, gap)
        self._bias_BS = pad(self._bias_BS[rows_B, self._shared + gap :], (self._shared, gap))
        self._length -= gap
        self._load_static()

    def join(self, others: FastDecoding, rows_B: Tensor) -> None:
        self._cache.join(others._cache, rows_B, self._shared)
        before, after = self._length - others._length, self._bias_BS.shape[1] - self._length
        bias_BS = pad(others._bias_BS[rows_B, self._shared : others._length], (before, 0), value=float("-inf"))
        self._bias_BS = torch.cat([self._bias_BS, pad(bias_BS, (self._shared, after))])
        self._position_B1 = torch.cat([self._position_B1, others._position_B1[rows_B]])
        self._load_static()

    def step(self, token_B: Tensor) -> Tensor:
        self._length += 1
        self._position_B1 = self._position_B1 + 1
        if self._static is not None:
            self._cache.count_column()
            return self._static(token_B)
        return self._logits(token_B[:, None], self._position_B1, self._bias_BS[:, None, None, : self._length])

    def _logits(self, ids_BT: Tensor, position_BT: Tensor, bias_B1TS: Tensor) -> Tensor:
        output = self._forward(
            input_ids=ids_BT, position_ids=position_BT, attention_mask=bias_B1TS, past_key_values=self._cache
        )
        return _last_logits(output)


class LibraryDecoding:
    """Decoding with the cache and the attention that the library has for the model."""

    full = False

    def __init__(self, model: PreTrainedModel, new_tokens: int, prefix: Ids = ()) -> None:
        self._new_tokens, self._prefix, self._device = new_tokens, tuple(prefix), model.device
        self._forward = _forward_function(model)

    def prefill(self, prompts: Sequence[Ids]) -> Tensor:
        ids_UT, mask_UT = _left_padded([(*self._prefix, *prompt) for prompt in prompts], self._device)
        self._length = ids_UT.shape[1]
        self._mask_BS = pad(mask_UT.long(), (0, self._new_tokens), value=1)
        position_UT = _positions(mask_UT)
        self._position_B1 = position_UT[:, -1:]
        return self._logits(ids_UT, position_UT, {})

    def branch(self, rows_B: Tensor) -> None:
        self.keep(rows_B)

    def join(self, others: LibraryDecoding, rows_B: Tensor) -> None:
        raise NotImplementedError("The library's caches of two batches cannot be joined.")

    def keep(self, rows_B: Tensor) -> None:
        for cache in self._caches.values():
            cache.reorder_cache(rows_B)
        self._mask_BS, self._position_B1 = self._mask_BS[rows_B], self._position_B1[rows_B]

    def step(self, token_B: Tensor) -> Tensor:
        self._length += 1
        self._position_B1 = self._position_B1 + 1
        return self._logits(token_B[:, None], self._position_B1, self._caches)

    def _logits(self, ids_BT: Tensor, position_BT: Tensor, caches: dict[str, Cache]) -> Tensor:
        # Attention layers call their cache one name and state-space layers another. The latter need the mask of the
        # tokens that they are given, which is that of the prompts at first and nothing later.
        names = ("past_key_values", "cache_params")
        mask_BS = None if "cache_params" in caches else self._mask_BS[:, : self._length]
        output = self._forward(input_ids=ids_BT, position_ids=position_BT, attention_mask=mask_BS, **caches)
        self._caches = {name: output[name] for name in names if output.get(name) is not None}
        if not self._caches:
            raise ModelError(f"The forward pass returns no cache (looked for {' and '.join(names)}).")
        return _last_logits(output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """How a model can be decoded: over our own cache or the library's, in batches of what lengths, by what graphs.

    `forward` is a forward pass of ours in place of the model's.
    """

    fast: bool
    padding: bool
    graphs: Graphs | None = field(default=None, compare=False)
    forward: LlamaForward | None = field(default=None, compare=False)

    def __str__(self) -> str:
        more = "" if self.graphs is None else " with recorded steps"
        more += "" if self.forward is None else " by layers of our own"
        return f"the {'fast' if self.fast else 'library'} path{'' if self.padding else ' without padding'}{more}"

    def attention(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """The attention that this path decodes under."""
        return decoding_attention(model) if self.fast else nullcontext()

    def starter(self, model: PreTrainedModel, *, new_tokens: int, prefix: Ids = ()) -> Callable[[int], Decoding]:
        """A function that starts a batch. All its batches share the prefix and have room for `new_tokens` more.

        Its argument is how many spare columns the batch has, which one that others will join needs.
        """
        if not self.fast:
            return lambda _spare: LibraryDecoding(model, new_tokens, prefix)
        forward = self.forward if self.forward is not None and self.forward.weights.ready() else None
        cache = FastDecoding.read_prefix(model, prefix, forward) if prefix else None
        return lambda spare: FastDecoding(model, new_tokens, cache, spare, self.graphs, forward)


def choose_path(model: PreTrainedModel) -> Path:
    """The fastest path that gives the logits of `model`'s plain forward pass. The model must be in evaluation mode."""
    path = _choose_modules_path(model)
    if path.fast and model.device.type == "cuda":
        return try_graphs(model, path, Graphs())
    return _try_own_layers(model, path) if path.fast and model.device.type == "cpu" else path


def _try_own_layers(model: PreTrainedModel, path: Path) -> Path:
    """The same path by layers of our own, if these are the model's and give the right logits too."""
    if llama.layers_of(model) is None:
        return path
    own = replace(path, forward=LlamaForward(model, LiveWeights(model)))
    problem = _problem(model, own)
    if problem is not None:
        log.warning("%s is decoded by the library's layers: %s.", type(model).__name__, problem)
    return own if problem is None else path


def try_graphs(model: PreTrainedModel, path: Path, graphs: Graphs) -> Path:
    """The same path with recorded steps, if that gives the right logits too."""
    recorded = replace(path, graphs=graphs)
    problem = _problem(model, recorded)
    if problem is not None:
        graphs.give_up(problem)
    return recorded if graphs.failure is None else path


def _choose_modules_path(model: PreTrainedModel) -> Path:
    """The fastest path whose steps are run as they are."""
    reasons: list[str] = []
    for path in (Path(fast=True, padding=True), Path(fast=False, padding=True), Path(fast=False, padding=False)):
        problem = _problem(model, path)
        if problem is None:
            if reasons:
                log.warning("%s is decoded more slowly: %s.", type(model).__name__, "; ".join(reasons))
            return path
        reasons.append(f"{path} fails with {problem}")
    raise ModelError(
        f"{type(model).__name__} cannot be decoded token by token: {'; '.join(reasons)}. "
        "Give a causal language model that keeps a key/value or state cache and has finite weights."
    )


def longest_fast_sequence(model: PreTrainedModel) -> int | None:
    """Tokens up to which every layer sees the whole sequence, as the fast path assumes; None if that has no limit."""
    names = ("sliding_window", "attention_chunk_size", "local_attention", "window_size")
    text = model.config.get_text_config()
    limits = [getattr(text, name, None) for name in names]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def _problem(model: PreTrainedModel, path: Path) -> str | None:
    """Why `path` does not suit the model, or None where its logits are right."""
    # Two sequences of a prompt and two more tokens. The step between the ids is prime to most vocabulary sizes.
    vocabulary = model.config.get_text_config().vocab_size
    ids = [(11 + 31 * place) % vocabulary for place in range(14)]
    sequences = (ids[:7], ids[7:12] if path.padding else ids[7:])
    expected = torch.stack([_plain_logits(model, sequence)[-3:] for sequence in sequences])
    try:
        with path.attention(model):
            found = _decode_two(path.starter(model, new_tokens=2)(0), *sequences).float()
    except Exception as error:  # a model may fail in any way at all on a path that was not made for it
        return f"{type(error).__name__}: {error}"
    # In bf16 two right ways to compute the same logits differ by some percent, in fp32 by some millionths.
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    difference = ((found - expected).square().mean().sqrt() / expected.std().clamp_(min=1e-6)).item()
    return None if difference <= tolerance else f"logits that are off by {difference:.2g} standard deviations"


def _plain_logits(model: PreTrainedModel, ids: Ids) -> Tensor:
    logits_TV: Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    return logits_TV.float()


def _decode_two(decoding: Decoding, first: Ids, second: Ids) -> Tensor:
    """Logits after the last three tokens of two sequences, `[2, 3, V]`, by prefill, branch, step, keep and step."""
    after_prompt = decoding.prefill([first[:-2], second[:-2]])
    as_tensor = after_prompt.new_tensor
    decoding.branch(as_tensor([1, 0, 1], dtype=torch.long))
    after_one = decoding.step(as_tensor([second[-2], first[-2], second[-2]], dtype=torch.long))
    decoding.keep(as_tensor([1, 2], dtype=torch.long))
    after_two = decoding.step(as_tensor([first[-1], second[-1]], dtype=torch.long))
    return torch.stack([after_prompt, after_one[1:], after_two], dim=1)


def _left_padded(prompts: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as one tensor of ids and its mask, `[U, T]`. Which id stands in the padding plays no part."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return sent_to(device, torch.tensor(ids)), sent_to(device, torch.tensor(mask))


def _positions(mask_UT: Tensor) -> Tensor:
    """The position of each token in its own sequence, whatever padding stands before it."""
    return (mask_UT.cumsum(dim=1) - 1).clamp_(min=0)


def _forward_function(model: PreTrainedModel) -> Callable[..., ModelOutput]:
    """`model`'s forward pass with the head on the last position only, given the arguments that this model takes.

    Asking the model for its logits, rather than its trunk and its head apart, keeps whatever it does to them after the
    head (Gemma-2's soft cap, Granite's scale).
    """
    accepted = inspect.signature(model.forward).parameters.keys()

    def forward(input_ids: Tensor, **arguments: object) -> ModelOutput:
        # The place as a tensor, because of a slice the head would be computed with a copy of its weights for each row.
        # Filled where it is: a number that is sent to a GPU is waited for.
        last = torch.full((1,), input_ids.shape[1] - 1, device=input_ids.device)
        arguments |= {"use_cache": True, "logits_to_keep": last}
        return model(input_ids=input_ids, **{name: value for name, value in arguments.items() if name in accepted})

    return forward


def _last_logits(output: ModelOutput) -> Tensor:
    logits_BTV: Tensor = output["logits"]
    return logits_BTV[:, -1]
