"""Pretraining text as token sequences: for the pretraining mix of Eq. 2 and for the held-out loss (alignment tax).

Documents are cut into pieces of at most `max_tokens`; each piece is a sequence of its own, so no token attends across
documents. All tokens but a piece's first are predicted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tastemaker import parallel, processes
from tastemaker.checkpoint import Reader
from tastemaker.errors import DataError
from tastemaker.model import LanguageModel
from tastemaker.packing import Packed, microbatches, pack
from tastemaker.records import Text
from tastemaker.tokenizer import Tokenizer

FIRST_PREDICTED = 1  # all tokens of a piece but its first are predicted


def check_held_out(texts: Sequence[Text], held_out: Sequence[Text]) -> None:
    """Refuse to measure on documents that are trained on.

    Raises:
        DataError: some stand in both.
    """
    both = {one.text for one in texts} & {one.text for one in held_out}
    if both:
        raise DataError(
            f"{len(both)} of {len(held_out)} held-out documents are trained on too; leave them out. "
            f"One begins: {min(both)[:60]!r}."
        )


def encode_texts(texts: Sequence[Text], tokenizer: Tokenizer, *, max_tokens: int) -> list[list[int]]:
    """The pieces of all documents, in order. Pieces of a single token are left out: they predict nothing."""
    pieces = []
    for text in texts:
        ids = tokenizer.text_ids(text.text)
        pieces += [ids[start : start + max_tokens] for start in range(0, len(ids), max_tokens)]
    kept = [piece for piece in pieces if len(piece) > 1]
    if not kept:
        raise DataError("the pretraining text has no document of at least two tokens; give more text.")
    return kept


def encode_pieces(texts: Sequence[Text], model: LanguageModel | Reader, *, max_tokens: int) -> list[list[int]]:
    """The same in pieces that fit a model, by its tokenizer."""
    return encode_texts(texts, model.tokenizer, max_tokens=min(max_tokens, model.context))


def shuffled_forever(count: int, *, seed: int) -> Callable[[int, int], list[int]]:
    """Draw indices without replacement, pass after pass, as a pure function of position.

    The returned function gives `amount` indices from position `start` of the endless sequence of shuffled passes.
    """

    def draw(start: int, amount: int) -> list[int]:
        drawn: list[int] = []
        while len(drawn) < amount:
            epoch, offset = divmod(start + len(drawn), count)
            drawn += permutation(count, seed=seed, epoch=epoch)[offset : offset + amount - len(drawn)]
        return drawn

    return draw


def permutation(count: int, *, seed: int, epoch: int) -> list[int]:
    """The order of one pass over `count` items."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def next_token_places(packed: Packed) -> tuple[Tensor, Tensor]:
    """`(source_M, target_M)`: every packed place that predicts a token of its own sequence, and that token's id."""
    return packed.predicted([FIRST_PREDICTED] * len(packed.lengths))


def text_batches(sequences: Sequence[Sequence[int]], *, budget: int, device: torch.device) -> Iterator[Packed]:
    """Pack sequences into micro-batches of about `budget` tokens."""
    for group in microbatches([len(ids) for ids in sequences], budget=budget, shares=processes.count()):
        yield pack([sequences[index] for index in group]).to(device)


@torch.no_grad()
def text_loss(
    model: LanguageModel,
    sequences: Sequence[Sequence[int]],
    *,
    budget: int,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> float:
    """Mean negative log-likelihood per predicted token, in nats."""
    total, count = 0.0, sum(len(ids) - 1 for ids in sequences)
    for turn in parallel.turns(text_batches(sequences, budget=budget, device=model.device)):
        source_M, target_M = next_token_places(turn.item)
        with autocast():
            logprob_M = model.predict(turn.item, source_M, target_M).logprob_M
        total -= float(logprob_M.double().sum()) if turn.counts else 0.0
    return parallel.summed_amounts([total])[0] / count
