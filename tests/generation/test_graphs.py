"""Decoding steps of fixed shape against those that grow, and when they are recorded.

Without a GPU a recorded step is the step itself: what it reads and writes is the same, and only how its kernels are
launched is not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.models import make_library, random_sequences
from torch import Tensor

from tastemaker.generation import Generator, Sampling, graphs
from tastemaker.generation.cache import _grouped_head_attention, _grouped_head_attention_by_kernel
from tastemaker.generation.decoding import FastDecoding, Path, choose_path, try_graphs
from tastemaker.generation.graphs import Graphs, Run, StaticStep, StepInputs, columns_of_step, rows_of_step

FAST = Path(fast=True, padding=True)


class Recorder:
    """Counts what is recorded, and runs it as it is."""

    def __init__(self) -> None:
        self.steps: list[StaticStep] = []
        self.memories: list[object] = []

    def __call__(self, step: StaticStep, memory: object) -> tuple[Run, object]:
        assert all(step is not other for other in self.steps), "a step is recorded once"
        self.steps.append(step)
        self.memories.append(memory)
        return step, memory or object()


def recorded(record: Callable[..., Any] | None = None) -> Graphs:
    return Graphs(record=record or Recorder(), watch=nullcontext)


def out_of_memory(step: StaticStep, memory: object) -> tuple[Run, object]:
    raise RuntimeError("CUDA out of memory.\nTry this and that.")


def decode(start: Callable[[], FastDecoding], lengths: list[int], device: str = "cpu") -> list[Tensor]:
    """The logits of a batch of ragged prompts through steps, a drop, a join and a second drop."""

    def numbers(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), device=device)

    def step(times: int) -> Iterator[Tensor]:
        for time in range(times):
            yield decoding.step(numbers((17 * row + 5 * len(found) + time) % 97 for row in range(rows)))

    decoding, rows, found = start(), 2 * len(lengths), list[Tensor]()
    found.append(decoding.prefill(random_sequences(lengths)))
    decoding.branch(numbers(row % len(lengths) for row in range(rows)))
    found += step(3)
    rows = len(lengths)
    decoding.keep(numbers(range(0, 2 * rows, 2)))
    found += step(3)
    later, joining = start(), [1, 0, 1][:rows]
    found.append(later.prefill(random_sequences([1, 2], seed=1)))
    decoding.join(later, numbers(joining))
    rows += len(joining)
    found += step(2)
    decoding.keep(numbers([rows - 1, 0]))
    rows = 2
    found += step(2)
    return found


@pytest.mark.parametrize("columns_at_a_time", [3, 256])
@pytest.mark.parametrize("fewest", [1, 8])
@pytest.mark.parametrize("lengths", [[5, 1, 3], [2, 7, 1, 4, 6], [4]])
@torch.no_grad()
def test_fixed_steps_give_the_logits_of_growing_ones(
    lengths: list[int], fewest: int, columns_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows and columns at a time, so that tiny batches come by steps of many kinds with dead rows."""
    monkeypatch.setattr(graphs, "FEWEST_ROWS", fewest)
    monkeypatch.setattr(graphs, "COLUMNS_AT_A_TIME", columns_at_a_time)
    model, record = make_library("llama"), Recorder()
    found = []
    with FAST.attention(model):
        for way in (None, recorded(record)):

            def start(way: Graphs | None = way) -> FastDecoding:
                return FastDecoding(model, new_tokens=9, spare=5, graphs=way)

            found.append(decode(start, lengths))
    for plain, fixed in zip(*found, strict=True):
        torch.testing.assert_close(fixed, plain, rtol=0, atol=1e-5)
    assert record.steps
    assert record.memories[0] is None
    assert len(set(map(id, record.memories[1:]))) <= 1  # all of a batch share the first one's memory
    assert None not in record.memories[1:]


@torch.no_grad()
def test_responses_are_the_same_with_recorded_steps() -> None:
    """A whole call of the engine: 14 responses with room for 5, some of which finish early and make way for others."""
    model = make_library("llama")
    prompts = random_sequences([6, 2, 4, 1, 3, 5, 2], seed=3)
    sampling = Sampling(max_new_tokens=11, stop_token_ids=tuple(range(4, 20)))
    found, record = [], Recorder()
    for way in (None, recorded(record)):
        generator = Generator(model, vocabulary=97, max_batch_tokens=17 * 5)
        generator._path = Path(fast=True, padding=True, graphs=way)
        found.append(generator.generate(prompts, 2, sampling, list(range(7))))
    assert [[one.response_ids for one in row] for row in found[0]] == [
        [one.response_ids for one in row] for row in found[1]
    ]
    assert len({len(one.response_ids) for row in found[0] for one in row}) > 3
    assert record.steps


@torch.no_grad()
def test_a_step_writes_its_own_column_and_can_be_run_again() -> None:
    model = make_library("llama")
    with FAST.attention(model):
        decoding = FastDecoding(model, new_tokens=3, graphs=recorded())
        decoding.prefill([[11, 12, 13], [21]])
        decoding.branch(torch.tensor([0, 1]))
        layer = decoding._cache.layers[0]
        layer.keys[:, :, 3:] = 7.0
        first = decoding.step(torch.tensor([14, 22]))
        written = layer.keys.clone()
        assert decoding._static is not None
        (step,) = decoding._static._steps.values()
        assert torch.equal(step()[:2], first)
    assert torch.equal(layer.keys, written)
    assert (written[:, :, 4:] == 7.0).all()
    assert (written[:, :, 3] != 7.0).any()


def test_what_a_step_reads_by_hand() -> None:
    inputs = StepInputs(rows=3, columns=5, dtype=torch.float32, device=torch.device("cpu"))
    hidden = -torch.inf
    # two rows of which the second begins a column later, at column 2 of 5; the third is dead
    inputs.load(torch.tensor([[1], [0]]), torch.tensor([[0.0, 0.0], [hidden, 0.0]]))
    inputs.move_on(torch.tensor([41, 51]))
    assert inputs.token_R1.tolist() == [[41], [51], [0]]
    assert inputs.position_R1.tolist() == [[2], [1], [1]]
    assert inputs.column_1.tolist() == [2]
    assert inputs.bias_RC.tolist() == [
        [0, 0, 0, hidden, hidden],
        [hidden, 0, 0, hidden, hidden],
        [hidden, hidden, 0, hidden, hidden],
    ]
    inputs.load(torch.tensor([[7]]), torch.tensor([[0.0, 0.0, hidden, 0.0]]))
    inputs.move_on(torch.tensor([61]))
    assert inputs.token_R1.tolist() == [[61], [51], [0]]
    assert inputs.position_R1.tolist() == [[8], [1], [1]]
    assert inputs.column_1.tolist() == [4]
    assert inputs.bias_RC[0].tolist() == [0, 0, hidden, 0, 0]
    assert inputs.bias_RC[1:].tolist() == [[hidden] * 4 + [0]] * 2


@pytest.mark.parametrize(
    ("rows", "most", "expected"),
    [(1, 48, 8), (8, 48, 8), (9, 48, 16), (33, 48, 48), (33, 100, 64), (3, 5, 5), (1, 1, 1)],
)
def test_rows_are_rounded_up(rows: int, most: int, expected: int) -> None:
    assert rows_of_step(rows, most) == expected


@pytest.mark.parametrize(
    ("columns", "most", "expected"), [(1, 800, 256), (256, 800, 256), (257, 800, 512), (513, 528, 528), (12, 16, 16)]
)
def test_columns_are_rounded_up(columns: int, most: int, expected: int) -> None:
    assert columns_of_step(columns, most) == expected


@given(st.integers(1, 3000), st.integers(0, 3000))
def test_steps_have_few_kinds_that_are_large_enough(used: int, more: int) -> None:
    most = used + more
    for rounded in (rows_of_step(used, most), columns_of_step(used, most)):
        assert used <= rounded <= most
    assert len({rows_of_step(rows, most) for rows in range(1, most + 1)}) <= 11


@torch.no_grad()
def test_a_kind_of_step_is_recorded_when_it_comes_again() -> None:
    model, record = make_library("llama"), Recorder()
    with FAST.attention(model):
        decoding = FastDecoding(model, new_tokens=9, graphs=recorded(record))
        decoding.prefill([[11, 12], [21]])
        decoding.branch(torch.tensor([0, 1]))
        seen = []
        for _ in range(4):
            decoding.step(torch.tensor([14, 22]))
            seen.append(len(record.steps))
    assert seen == [0, 1, 1, 1]


@torch.no_grad()
def test_where_nothing_can_be_recorded_steps_are_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model, way = make_library("llama"), recorded(out_of_memory)

    def start() -> FastDecoding:
        return FastDecoding(model, new_tokens=9, spare=5, graphs=way)

    with caplog.at_level(logging.WARNING), FAST.attention(model):
        found = decode(start, [5, 1, 3])
        plain = decode(lambda: FastDecoding(model, 9, spare=5), [5, 1, 3])
        another = start()
        another.prefill([[11]])
        another.branch(torch.tensor([0]))
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert way.failure == "CUDA out of memory."
    assert [record.getMessage() for record in caplog.records] == [
        "Decoding goes on without CUDA graphs: CUDA out of memory."
    ]
    assert another._static is None


@torch.no_grad()
def test_once_one_step_cannot_be_recorded_none_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a failed capture leaves to PyTorch may take along the memory that the batch's other graphs read.

    Steps of eight rows are recorded, those of four cannot be, and then there are eight rows again.
    """
    monkeypatch.setattr(graphs, "FEWEST_ROWS", 1)
    model, replayed = make_library("llama"), list[bool]()

    def record(step: StaticStep, memory: object) -> tuple[Run, object]:
        if memory is not None:
            raise RuntimeError("CUDA out of memory.")

        def replay() -> Tensor:
            replayed.append(way.failure is None)
            return step()

        return replay, object()

    way = recorded(record)
    with FAST.attention(model):
        decode(lambda: FastDecoding(model, new_tokens=9, spare=5, graphs=way), [5, 1, 3])
    assert way.failure is not None
    assert replayed == [True, True]


@torch.no_grad()
def test_a_step_that_waits_for_the_gpu_is_never_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """The first step of all is watched; it is run again without, since what it waits for does no harm then."""
    watched, record = [], Recorder()

    @contextmanager
    def watch() -> Iterator[None]:
        watched.append(True)
        yield
        raise RuntimeError("called a synchronizing CUDA operation")

    model, way = make_library("llama"), Graphs(record=record, watch=watch)
    with caplog.at_level(logging.WARNING), FAST.attention(model):
        decoding = FastDecoding(model, new_tokens=3, graphs=way)
        decoding.prefill([[11, 12]])
        decoding.branch(torch.tensor([0]))
        found = [decoding.step(torch.tensor([token])) for token in (13, 14)]
    expected = [model(input_ids=torch.tensor([ids])).logits[:, -1] for ids in ([11, 12, 13], [11, 12, 13, 14])]
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=0, atol=2e-5)
    assert (len(watched), record.steps) == (1, [])
    assert caplog.text.count("synchronizing") == 1


@torch.no_grad()
def test_recorded_steps_are_tried_before_they_are_used() -> None:
    model, record = make_library("llama"), Recorder()
    way = recorded(record)
    found = try_graphs(model, FAST, way)
    assert found.graphs is way
    assert record.steps, "the trial runs a recorded step"
    assert way.failure is None


@torch.no_grad()
@pytest.mark.parametrize("fault", ["wrong", "fails"])
def test_recorded_steps_that_fail_the_trial_are_not_used(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    def stale(step: StaticStep, memory: object) -> tuple[Run, object]:
        logits = step().roll(1, dims=1)
        return (lambda: logits), memory

    with caplog.at_level(logging.WARNING):
        way = recorded(stale if fault == "wrong" else out_of_memory)
        found = try_graphs(make_library("llama"), FAST, way)
    assert (found, found.graphs) == (FAST, None)
    assert ("standard deviations" if fault == "wrong" else "out of memory") in caplog.text
    assert len(caplog.records) == 1


@torch.no_grad()
def test_without_a_gpu_nothing_is_recorded() -> None:
    assert choose_path(make_library("llama")).graphs is None


@pytest.mark.parametrize("heads", [6, 3])
def test_fused_attention_of_grouped_heads_is_that_of_plain_products(heads: int) -> None:
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(5, heads, 1, 8, generator=generator)
    key, value = (torch.randn(5, 3, 11, 8, generator=generator) for _ in range(2))
    bias = torch.zeros(5, 1, 1, 11).masked_fill_(torch.rand(5, 1, 1, 11, generator=generator) < 0.4, -torch.inf)
    bias[..., 0] = 0.0
    plain, fused = (
        attend(query, key, value, bias, 0.3) for attend in (_grouped_head_attention, _grouped_head_attention_by_kernel)
    )
    assert fused.shape == (5, 1, heads, 8)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-6)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_on_a_gpu_replayed_steps_give_the_logits_of_growing_ones(dtype: torch.dtype) -> None:
    model = make_library("llama").to("cuda", dtype)
    path = choose_path(model)
    assert path.graphs is not None
    found = []
    with path.attention(model):
        for way in (None, path.graphs):

            def start(way: Graphs | None = way) -> FastDecoding:
                return FastDecoding(model, new_tokens=9, spare=5, graphs=way)

            found.append(decode(start, [5, 1, 3], device="cuda"))
    assert path.graphs.failure is None
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for plain, replayed in zip(*found, strict=True):
        torch.testing.assert_close(replayed.float(), plain.float(), rtol=0, atol=tolerance * float(plain.std()))


@needs_gpu
def test_on_a_gpu_what_waits_is_an_error_within_the_block_alone() -> None:
    tensor = torch.ones(3, device="cuda")
    block: AbstractContextManager[None] = graphs.no_waiting()
    with pytest.raises(RuntimeError, match="synchronizing"), block:
        tensor.sum().item()
    assert tensor.sum().item() == 3
