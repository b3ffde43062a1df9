"""Decoding steps whose shapes and places never change, and CUDA graphs of them.

On a GPU a step of a small model is spent on launching its kernels one by one: some hundreds, of microseconds each. A
CUDA graph launches all of them at once, but only the same kernels on the same memory. So a `StaticStep` reads its
tokens, positions, mask and column from tensors that stay where they are, and attends over columns that may not be in
use yet, which the mask hides.

How many rows and columns a step has changes as rows finish and responses grow. Both are rounded up (dead rows are
computed for nobody), so a batch has few kinds of steps, and each is captured when it is run for the second time: the
first run warms it up, and a kind that occurs once is not worth a capture.

Nothing in here but `record_graph` and `no_waiting` needs a GPU: the steps are the same when they are run as they are.

Dimensions: R rows and C columns of a step, B rows in use, S columns in use, V vocabulary.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from tastemaker.generation.cache import PreallocatedCache

log = logging.getLogger(__name__)

# Fewer rows than this take as long: all weights are read for one row too.
FEWEST_ROWS = 8
# Columns are added so many at a time. A step reads all of them, so fewer would save memory traffic and cost captures.
COLUMNS_AT_A_TIME = 256
# Rows of a mask begin at multiples of so many numbers, or the fused kernels would copy it.
ALIGNMENT = 16

Forward = Callable[..., Mapping[str, Tensor]]  # logits by name, as the library's models give them
Run = Callable[[], Tensor]
Memory = Any  # what `torch.cuda.CUDAGraph.pool` gives


def rows_of_step(rows: int, most: int) -> int:
    """How many rows a step has for so many: a power of two, or `most`."""
    return min(most, max(FEWEST_ROWS, 1 << (rows - 1).bit_length()))


def columns_of_step(columns: int, most: int) -> int:
    """How many columns a step reads for so many that are in use: a multiple of 256, or `most`."""
    return min(most, rounded_up(columns, COLUMNS_AT_A_TIME))


def rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


class StepInputs:
    """What a batch's steps read, for as many rows and columns as there can be. It is written between steps only."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.token_R1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.position_R1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.bias_RC = torch.full((rows, columns), -torch.inf, dtype=dtype, device=device)
        self.column_1 = torch.zeros(1, dtype=torch.long, device=device)

    def load(self, position_B1: Tensor, bias_BS: Tensor) -> None:
        """Begin with these rows, before the next column. The others are dead: they see what comes, and nothing else."""
        rows, columns = bias_BS.shape
        self.bias_RC.fill_(-torch.inf)
        self.bias_RC[:rows, :columns] = bias_BS
        self.position_R1[:rows] = position_B1
        self.position_R1[rows:] = 0
        self.column_1.fill_(columns - 1)

    def move_on(self, token_B: Tensor) -> None:
        """To the next column, with a token for each row that is in use."""
        self.token_R1[: len(token_B), 0] = token_B
        self.position_R1 += 1  # a dead row began at 0, so its position never passes that of a live one
        self.column_1 += 1
        # Dead rows see it too: one that saw nothing would have NaN in its cache, for a row that takes its place.
        self.bias_RC.index_fill_(1, self.column_1, 0.0)


class StaticStep:
    """A forward pass for the next token of R rows over C columns; the same again if it is run again."""

    def __init__(self, forward: Forward, cache: PreallocatedCache, inputs: StepInputs, rows: int, columns: int) -> None:
        self._forward, self._cache = forward, cache.fixed(rows, columns, inputs.column_1)
        self._token_R1, self._position_R1 = inputs.token_R1[:rows], inputs.position_R1[:rows]
        self._mask_R11C = inputs.bias_RC[:rows, None, None, :columns]

    def __call__(self) -> Tensor:
        """The logits, `[R, V]`."""
        output = self._forward(
            input_ids=self._token_R1,
            position_ids=self._position_R1,
            attention_mask=self._mask_R11C,
            past_key_values=self._cache,
        )
        logits_R1V: Tensor = output["logits"]
        return logits_R1V[:, -1]


def record_graph(step: StaticStep, memory: Memory | None) -> tuple[Run, Memory]:
    """A CUDA graph of a step that has been run before, and the memory that it works in.

    Graphs of one batch work in the same memory, as no two of them are ever run at once and what a run returns is a
    copy.
    """
    graph = torch.cuda.CUDAGraph()
    # The outer block brings the current stream back where the inner one fails to.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"),
    ):
        logits_RV = step()

    def replay() -> Tensor:
        graph.replay()
        return logits_RV.clone()

    return replay, graph.pool()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within the block, what makes the program wait for the GPU is an error: a capture would fail on it.

    A capture that fails leaves PyTorch's random numbers unusable in some versions, so it is found out before.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(action="ignore"):  # that it does not find all of them
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Graphs:
    """Records the steps of a model, batch by batch, until one cannot be; `failure` says why."""

    def __init__(
        self,
        record: Callable[[StaticStep, Memory | None], tuple[Run, Memory]] = record_graph,
        watch: Callable[[], AbstractContextManager[None]] = no_waiting,
    ) -> None:
        self.record, self._watch, self._watched = record, watch, False
        self.failure: str | None = None

    def give_up(self, reason: str) -> None:
        """Record no more, and say so once."""
        if self.failure is None:
            self.failure = reason
            log.warning("Decoding goes on without CUDA graphs: %s", reason)

    def run_first(self, step: StaticStep) -> Tensor:
        """Run a step as it is; the first of all must not wait for anything on its way."""
        if not self._watched:
            self._watched = True
            try:
                with self._watch():
                    return step()
            except RuntimeError as error:
                self.give_up(_reason(error))
        return step()


class StaticSteps:
    """The steps of one batch: one of each kind, made when it is needed."""

    def __init__(
        self, forward: Forward, cache: PreallocatedCache, *, rows: int, columns: int, like: Tensor, graphs: Graphs
    ) -> None:
        self._forward, self._cache, self._graphs = forward, cache, graphs
        self._most_rows, self._most_columns = rows, columns
        self._inputs = StepInputs(rows, columns, like.dtype, like.device)
        self._columns = 0
        self._steps: dict[tuple[int, int], StaticStep] = {}
        self._recorded: dict[tuple[int, int], Run] = {}
        self._memory: Memory | None = None

    def load(self, position_B1: Tensor, bias_BS: Tensor) -> None:
        """Go on with these rows, of so many columns."""
        self._columns = bias_BS.shape[1]
        self._inputs.load(position_B1, bias_BS)

    def __call__(self, token_B: Tensor) -> Tensor:
        """Append a token to every row; returns the logits after it, `[B, V]`."""
        self._columns += 1
        self._inputs.move_on(token_B)
        rows = rows_of_step(len(token_B), self._most_rows)
        kind = rows, columns_of_step(self._columns, self._most_columns)
        if kind not in self._steps:
            self._steps[kind] = StaticStep(self._forward, self._cache, self._inputs, *kind)
            return self._graphs.run_first(self._steps[kind])[: len(token_B)]
        self._record(kind)
        return self._recorded.get(kind, self._steps[kind])()[: len(token_B)]

    def _record(self, kind: tuple[int, int]) -> None:
        if kind in self._recorded or self._graphs.failure is not None:
            return
        try:
            self._recorded[kind], self._memory = self._graphs.record(self._steps[kind], self._memory)
        except RuntimeError as error:
            # Graphs of a batch share a stream and its memory, which PyTorch may free with the one that failed.
            self._recorded.clear()
            self._graphs.give_up(_reason(error))


def _reason(error: RuntimeError) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
