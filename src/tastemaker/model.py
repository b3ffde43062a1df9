"""Policies and reward models: Hugging Face models, run on packed tokens, read from and written to ordinary folders.

A policy is any causal language model of the `transformers` library. A reward or value model is the same trunk with a
linear head of one output (`AutoModelForSequenceClassification`, `num_labels=1`); its score is the library's logit minus
`reward_offset`, which lies in the saved config, since the library's head has no bias (section 3.5 of the paper sets it
so that demonstrations score 0 on average).

Whether the packed path gives the library's own logits is checked when a model is loaded, on a short probe: an
architecture that it does not know runs through the library's padded attention instead, with a log line.

Dimensions in names: N packed tokens, S sequences, M selected places, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tastemaker import llama
from tastemaker.attention import packed_attention_on
from tastemaker.errors import ModelError
from tastemaker.head import LOGITS_PER_CHUNK, target_logprobs
from tastemaker.packing import Packed, pack
from tastemaker.tokenizer import Tokenizer

log = logging.getLogger(__name__)

PROBE_TOLERANCE = 1e-4  # of the largest value of a probe in fp32; a wrong mask or scale is off by far more


@dataclass(frozen=True, slots=True)
class Trunk:
    """How a library model is run on packed tokens: our attention, or (`padded`) the library's own on `[S, T]`.

    Or (`fused`) layers of ours, for batches that these are made for.
    """

    library: Any
    padded: bool = False
    fused: bool = False

    def hidden(self, packed: Packed) -> Tensor:
        """Final hidden states `hidden_ND` of all packed tokens."""
        if self.fused and llama.fits(packed):
            layers = llama.layers_of(self.library)
            if layers is not None:
                return llama.hidden_states(self.library, layers, packed)
        if self.padded:
            output = self.library.base_model(**_padded_inputs(packed), use_cache=False)
            return _as_tensor(output.last_hidden_state).flatten(0, 1).index_select(0, packed.flat_N)
        with packed_attention_on(self.library.config):
            output = self.library.base_model(
                input_ids=packed.id_N[None],
                attention_mask=_all_seen(packed),
                position_ids=packed.position_N[None],
                use_cache=False,
                packed=packed,
            )
        return _as_tensor(output.last_hidden_state)[0]


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a policy says at M places: the log-prob of the token that follows, and the entropy there if asked for."""

    logprob_M: Tensor
    entropy_M: Tensor | None = None


class LanguageModel(nn.Module):
    """A causal language model and its tokenizer."""

    def __init__(self, library: Any, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.library = library
        self.tokenizer = tokenizer
        _let_every_row_learn(library)
        self.trunk, self.linear_head = _choose_path(library)
        self.train(library.training)

    @property
    def device(self) -> torch.device:
        return device_of(self.library)

    @property
    def context(self) -> int:
        """The longest sequence the model takes, in tokens."""
        return context_length(self.library.config)

    def hidden(self, packed: Packed) -> Tensor:
        return self.trunk.hidden(packed)

    def predict(
        self,
        packed: Packed,
        source_M: Tensor,
        target_M: Tensor,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        hidden_ND: Tensor | None = None,
    ) -> Predictions:
        """Log-probs of `target_M` after the packed places `source_M`, under logits divided by `temperature`.

        Ids beyond the tokenizer's vocabulary are never sampled and have no probability here either. The log-softmax is
        taken in fp32 at least. Logits exist for these places only, and for a chunk of them at a time.
        """
        return Predictions(*self.read_logprobs(packed, source_M, target_M, temperature, entropy, hidden_ND))

    def read_logprobs(
        self,
        packed: Packed,
        source_M: Tensor,
        target_M: Tensor,
        temperature: float,
        entropy: bool,
        hidden_ND: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """What `predict` gives, as plain tensors: several processes put a model together around this (`parallel`)."""
        if self.linear_head:
            hidden_MD = (self.hidden(packed) if hidden_ND is None else hidden_ND).index_select(0, source_M)
            logits_of, size = self.library.get_output_embeddings(), hidden_MD.shape[0]
            if type(logits_of) is nn.Linear:
                known = self.tokenizer.vocabulary
                weight_VD, bias = _first_rows(logits_of.weight, known), logits_of.bias
                return target_logprobs(
                    hidden_MD,
                    weight_VD,
                    target_M,
                    bias_V=None if bias is None else _first_rows(bias, known),
                    temperature=temperature,
                    entropy=entropy,
                )
        else:
            hidden_MD = self._library_logits(packed, source_M)
            size, logits_of = hidden_MD.shape[0], nn.Identity()
        rows = max(1, LOGITS_PER_CHUNK // self.tokenizer.vocabulary)
        parts = list[tuple[Tensor, Tensor | None]]()
        for start in range(0, max(size, 1), rows):
            arguments = (logits_of, hidden_MD[start : start + rows], target_M[start : start + rows])
            options = (self.tokenizer.vocabulary, temperature, entropy)
            if size > rows and torch.is_grad_enabled():
                parts.append(checkpoint(_predict_chunk, *arguments, *options, use_reentrant=False))
            else:
                parts.append(_predict_chunk(*arguments, *options))
        entropies = [entropy_M for _, entropy_M in parts if entropy_M is not None]
        return torch.cat([logprob_M for logprob_M, _ in parts]), torch.cat(entropies) if entropy else None

    def _library_logits(self, packed: Packed, source_M: Tensor) -> Tensor:
        if self.trunk.padded:
            logits = self.library(**_padded_inputs(packed), use_cache=False).logits
            return _as_tensor(logits).flatten(0, 1).index_select(0, packed.flat_N[source_M])
        with packed_attention_on(self.library.config):
            output = self.library(
                input_ids=packed.id_N[None],
                attention_mask=_all_seen(packed),
                position_ids=packed.position_N[None],
                use_cache=False,
                packed=packed,
                logits_to_keep=source_M,
            )
        return _as_tensor(output.logits)[0]


class RewardModel(nn.Module):
    """A trunk with a scalar head: scores at a sequence's last token, or values at every place asked for."""

    def __init__(self, library: Any, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.library = library
        self.tokenizer = tokenizer
        _let_every_row_learn(library)
        self.trunk = _choose_trunk(library)
        self.register_buffer("offset", torch.tensor(float(getattr(library.config, "reward_offset", 0.0))))
        self.offset: Tensor
        self.train(library.training)

    @property
    def device(self) -> torch.device:
        return device_of(self.library)

    @property
    def context(self) -> int:
        """The longest sequence the model takes, in tokens."""
        return context_length(self.library.config)

    @property
    def prompt_limit(self) -> int:
        """The longest prompt that it was trained to read, in tokens; of a longer one it reads the end."""
        return prompt_limit(self.library.config)

    def at(self, packed: Packed, source_M: Tensor) -> Tensor:
        """The head's output minus the offset at the packed places `source_M`, in fp32 at least."""
        hidden_MD = self.trunk.hidden(packed).index_select(0, source_M)
        with torch.autocast(hidden_MD.device.type, enabled=False):
            exact = torch.promote_types(hidden_MD.dtype, torch.float32)
            value_M1 = nn.functional.linear(hidden_MD.to(exact), self.library.score.weight.to(exact))
        return value_M1[:, 0] - self.offset

    def scores(self, packed: Packed) -> Tensor:
        """`score_S`, read at each sequence's last token."""
        return self.at(packed, packed.last_S)


Frozen = TypeVar("Frozen", LanguageModel, RewardModel)


def freeze(model: Frozen, precision: str) -> Frozen:
    """The same model, never to be trained or saved: in bf16 it holds what matrix products round in any case.

    Under autocast the weights of linear layers are rounded each time they are used, so holding them rounded changes no
    result, and takes half the memory and no rounding. Embeddings, norms and heads stay in fp32.
    """
    model.requires_grad_(False)
    if precision == "bfloat16":
        for module in model.library.base_model.modules():
            if type(module) is nn.Linear:
                module.to(torch.bfloat16)
    return model


def _first_rows(rows: Tensor, count: int) -> Tensor:
    """Without a slice where all are wanted, whose gradient would be a copy."""
    return rows if len(rows) == count else rows[:count]


def _predict_chunk(
    logits_of: nn.Module, hidden_MD: Tensor, target_M: Tensor, vocabulary: int, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    logits_MV = logits_of(hidden_MD)[:, :vocabulary]
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    if temperature != 1.0:
        logits_MV = logits_MV / temperature
    normalizer_M = logits_MV.logsumexp(1)
    logprob_M = logits_MV.gather(1, target_M[:, None])[:, 0] - normalizer_M
    if not entropy:
        return logprob_M, None
    with torch.no_grad():
        logprob_MV = logits_MV - normalizer_M[:, None]
        entropy_M = -(logprob_MV.exp() * logprob_MV).sum(1)
    return logprob_M, entropy_M


def _let_every_row_learn(library: Any) -> None:
    """Have the input embedding of the padding's id trained like any other.

    The library leaves it out, since padding is not to be learned; but in many models that id is the end token's, which
    turns are closed by and reward models are read at. No padding gets a gradient here, whatever its id is.
    """
    embedding = library.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None


def _choose_path(library: Any) -> tuple[Trunk, bool]:
    """The trunk for a causal model, and whether its head is just the output embedding (no soft cap, no scale)."""
    trunk = _choose_trunk(library)
    packed = _probe(library)
    with _evaluating(library):
        ours = library.get_output_embeddings()(trunk.hidden(packed))
        whole = library(**_padded_inputs(packed), use_cache=False).logits.flatten(0, 1)
    # A soft cap is nearly linear on the small logits of an untrained model, so it is asked for by name.
    capped = getattr(library.config.get_text_config(), "final_logit_softcapping", None) is not None
    linear = not capped and _difference(ours, whole.index_select(0, packed.flat_N)) <= PROBE_TOLERANCE
    if not linear:
        log.info("%s changes its logits after the output embedding; all logits are computed", library.config.model_type)
    return trunk, linear


def _choose_trunk(library: Any) -> Trunk:
    """Packed where that gives the same hidden states as the library run on each sequence alone, else padded."""
    packed = _probe(library)
    try:
        with _evaluating(library):
            parts = torch.split(packed.id_N, list(packed.lengths))
            alone = [library.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in parts]
            together = Trunk(library).hidden(packed)
        difference = _difference(together, torch.cat(alone))
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        difference, reason = float("inf"), next(iter(str(error).splitlines()), type(error).__name__)
    else:
        reason = f"hidden states differ by {difference:.1e} of the largest"
    if difference <= PROBE_TOLERANCE:
        return Trunk(library, fused=_can_fuse(library, packed, together))
    log.warning("%s does not run packed (%s); using the library's own attention", library.config.model_type, reason)
    return Trunk(library, padded=True)


def _can_fuse(library: Any, packed: Packed, expected_ND: Tensor) -> bool:
    """Whether the layers are such as we have ourselves, and give the same."""
    if llama.layers_of(library) is None or not llama.fits(packed):
        return False
    with _evaluating(library):
        difference = _difference(Trunk(library, fused=True).hidden(packed), expected_ND)
    if difference > PROBE_TOLERANCE:
        log.warning("%s runs by the library's layers; ours differ by %.1e", library.config.model_type, difference)
    return difference <= PROBE_TOLERANCE


@contextmanager
def _evaluating(library: Any) -> Iterator[None]:
    """Evaluation mode without gradients, within the block."""
    was_training = library.training
    library.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        library.train(was_training)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9))


def _probe(library: Any) -> Packed:
    vocabulary = int(library.config.get_text_config().vocab_size)
    ids = [(7 * place + 3) % vocabulary for place in range(8)]
    return pack([ids[:5], ids[5:]]).to(device_of(library))


def _all_seen(packed: Packed) -> Tensor:
    """A mask that hides nothing. Given none, the library looks through the positions itself, and waits for a GPU."""
    return torch.ones(1, len(packed.id_N), dtype=torch.bool, device=packed.id_N.device)


def _padded_inputs(packed: Packed) -> dict[str, Tensor]:
    length_S = torch.tensor(packed.lengths, device=packed.id_N.device)
    mask_ST = torch.arange(packed.padded_ST.shape[1], device=length_S.device) < length_S[:, None]
    return {"input_ids": packed.id_N[packed.padded_ST], "attention_mask": mask_ST.long()}


def _as_tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def device_of(module: Any) -> torch.device:
    """Where a module's parameters are."""
    return _as_tensor(next(module.parameters())).device


def context_length(config: Any) -> int:
    """The longest sequence a model takes, in tokens; 1,048,576 where the config names no limit.

    Where the library turns positions otherwise for a batch with one long sequence in it (longrope), it is the length
    up to which it does not: what a sequence's log-probs are must not depend on its neighbours.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope["original_max_position_embeddings"])
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2**20


def prompt_limit(config: Any) -> int:
    """The longest prompt that a reward model reads, in tokens; its whole context where the config names no limit."""
    limit = getattr(config, "reward_max_prompt_tokens", None)
    return context_length(config) if limit is None else int(limit)


def check_fits(lengths: Sequence[int], context: int, *, what: str) -> None:
    """Refuse sequences that are longer than the model's context."""
    longest = max(lengths, default=0)
    if longest > context:
        count = sum(length > context for length in lengths)
        raise ModelError(
            f"{count} of {len(lengths)} {what} are longer than the model's context of {context} tokens "
            f"(the longest has {longest}). Shorten or drop them, or use a model with a longer context."
        )


def count_parameters(module: nn.Module) -> int:
    """Parameters, each shared tensor once."""
    return sum(parameter.numel() for parameter in module.parameters())
