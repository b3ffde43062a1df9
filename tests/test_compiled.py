"""torch.compile changes no gradient, and compiles a layer once, whatever the batch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import pytest
import torch
from tests.models import make_library, make_tokenizer, random_sequences
from torch import Tensor, nn

from tastemaker.errors import ConfigError, ModelError
from tastemaker.llama import layers_of
from tastemaker.losses import sft_loss
from tastemaker.model import LanguageModel
from tastemaker.packing import pack
from tastemaker.settings import OptimizerConfig
from tastemaker.tokenizer import wrap_tokenizer
from tastemaker.training import Loss, Trainer

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler"),
    pytest.mark.filterwarnings("default"),  # the compiler's own warnings are no errors of ours
]
BATCHES = [random_sequences(lengths) for lengths in ([11, 5, 17], [3, 2], [7, 13, 19, 2])]


def gradients(*, compile: bool) -> tuple[dict[str, Tensor], LanguageModel]:
    """Of three batches of unlike shapes, added up."""
    policy = LanguageModel(make_library("llama", num_hidden_layers=5), wrap_tokenizer(make_tokenizer()))
    trainer = Trainer(policy, OptimizerConfig(learning_rate=1e-3, compile=compile), total_steps=1)

    def loss_fn(batch: Sequence[Sequence[int]], num_tokens: float) -> Loss:
        packed = pack(batch)
        logprob_M = policy.predict(packed, *packed.predicted([1] * len(batch))).logprob_M
        return Loss(sft_loss(logprob_M, torch.ones_like(logprob_M, dtype=torch.bool), num_tokens=num_tokens))

    trainer.accumulate(BATCHES, loss_fn, 71.0)
    return {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}, policy


def test_gradients_are_the_same_by_layers_that_are_compiled_once() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, policy = gradients(compile=False)
    assert layers_of(policy.library) is not None, "it runs by layers of ours, unless compiled"
    compiled, policy = gradients(compile=True)
    assert layers_of(policy.library) is None
    assert compiled.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    pieces = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    most = 4 if torch.__version__ >= "2.12" else 8  # of one layer, however many there are
    assert pieces <= most, "those of one layer: attention and what it is called from cut it up"


def test_it_does_not_go_with_recomputation() -> None:
    with pytest.raises(ConfigError, match="compile and gradient_checkpointing"):
        OptimizerConfig(learning_rate=1e-3, compile=True, gradient_checkpointing=True)


def test_it_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="compile is for one process"):
        Trainer(nn.Linear(3, 2), OptimizerConfig(learning_rate=1e-3, compile=True), total_steps=1)


def test_an_architecture_without_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="compile does not know this architecture"):
        Trainer(nn.Linear(3, 2), OptimizerConfig(learning_rate=1e-3, compile=True), total_steps=1)
