"""Values that other projects' tests and formulas hold to, where no other test of ours holds to them yet.

From TRL's tests of 2024 and 2026 (Apache-2.0; inputs and expected values only). Others of these stand beside what they
are about, in test_losses, test_clipping and test_statistics.

Left out are values of what this project does not have: RLOO, DFT, a margin or a centring term in the reward loss, the
best of four as one choice (Ziegler et al.; here all pairs of a ranking count), best-fit packing into rows (here tokens
have no rows), masks of off-policy sequences and of likely tokens; and curves of GPUs and checkpoints that tests here
cannot have (TRL's trajectories, GPT-2's sentiment, Pythia's TL;DR, Adam as TensorFlow wrote it).

Dimensions in names: B rows, T tokens, M places, V vocabulary, H hidden size, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from tests.stages.conftest import ranking
from tests.test_losses import all_true, t
from torch import Tensor
from torch.nn.functional import cross_entropy

from tastemaker import head
from tastemaker.head import target_logprobs
from tastemaker.losses import kl_estimate, sft_loss
from tastemaker.packing import Packed, pack
from tastemaker.stages.reward import ScoredPair, measure

# --- log-probs and entropies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_gathered_log_softmax(dtype: torch.dtype) -> None:
    """trl test_utils: logits of 4 rows of 32 places and 1024 tokens; here a product with the identity gives them."""
    generator = torch.Generator().manual_seed(0)
    logit_MV = torch.randn(4 * 32, 1024, generator=generator).to(dtype)
    target_M = torch.randint(1024, (4 * 32,), generator=generator)
    found_M, _ = target_logprobs(logit_MV, torch.eye(1024, dtype=dtype), target_M)
    exact_M = logit_MV.double().log_softmax(1).gather(1, target_M[:, None])[:, 0]
    assert found_M.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found_M.double(), exact_M, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(768,), (32, 768), (8, 16, 768), (2, 4, 8, 768)])
@pytest.mark.parametrize("rows", [1, 16])
def test_entropy_in_chunks(shape: tuple[int, ...], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """trl test_utils: -sum p log p of logits of these shapes, 1 or 16 places at a time."""
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", rows * 768)
    logit_MV = torch.randn(shape, generator=torch.Generator().manual_seed(1)).reshape(-1, 768)
    target_M = torch.zeros(len(logit_MV), dtype=torch.long)
    _, found_M = target_logprobs(logit_MV, torch.eye(768), target_M, entropy=True)
    logprob_MV = logit_MV.double().log_softmax(1)
    assert found_M is not None
    torch.testing.assert_close(found_M.double(), -(logprob_MV.exp() * logprob_MV).sum(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_log_probs_in_chunks(
    temperature: float, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trl test_utils: 64 places, 32 wide, 128 tokens, seed 42; values and gradients, in chunks of 8."""
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", 8 * 128)
    generator = torch.Generator().manual_seed(42)
    hidden_MH, weight_VH = torch.randn(64, 32, generator=generator), torch.randn(128, 32, generator=generator)
    leaves = [hidden_MH.to(dtype).requires_grad_(), (weight_VH / 32**0.5).to(dtype).requires_grad_()]
    target_M = torch.randint(128, (64,), generator=generator)
    found_M, _ = target_logprobs(leaves[0], leaves[1], target_M, temperature=temperature)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_M = ((exact[0] @ exact[1].T) / temperature).log_softmax(1).gather(1, target_M[:, None])[:, 0]
    torch.testing.assert_close(found_M.double(), exact_M, rtol=0, atol=tolerance)
    found_M.mean().backward()  # type: ignore[no-untyped-call]
    exact_M.mean().backward()
    for leaf, other in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        assert other.grad is not None
        assert float((leaf.grad.double() - other.grad).norm() / other.grad.norm()) < tolerance


# --- cross-entropy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("num_items", [None, 5, 7])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_cross_entropy_in_chunks(
    biased: bool, num_items: int | None, ignored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trl test_sft_trainer: 2 rows of 8 places, 4 wide, 16 tokens, in chunks of 3: a mean, or a sum over 5 or 7."""
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", 3 * 16)
    generator = torch.Generator().manual_seed(0)
    hidden_MH, weight_VH, bias_V = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in ((16, 4), (16, 4), (16,))
    )
    target_M = torch.randint(16, (16,), generator=generator)
    counts_M = {
        "none": torch.ones(16, dtype=torch.bool),
        "some": torch.rand(16, generator=generator) < 0.6,
        "all": torch.zeros(16, dtype=torch.bool),
    }[ignored]
    wanted = [hidden_MH, weight_VH, *([bias_V] if biased else [])]

    logprob_M, _ = target_logprobs(hidden_MH, weight_VH, target_M, bias_V=bias_V if biased else None)
    divisor = max(1, int(counts_M.sum())) if num_items is None else num_items
    found = sft_loss(logprob_M.view(2, 8), counts_M.view(2, 8), num_tokens=divisor)
    gradients = torch.autograd.grad(found, wanted)

    logit_MV = hidden_MH @ weight_VH.T + (bias_V if biased else 0)
    labels_M = torch.where(counts_M, target_M, -100)
    expected = cross_entropy(logit_MV, labels_M, ignore_index=-100, reduction="sum") / divisor
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for gradient, exact in zip(gradients, torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-5)
    if ignored == "all":
        assert float(found.detach()) == 0
        assert not any(gradient.any() for gradient in gradients)


# --- batches of preferences -----------------------------------------------------------------------------------------


def padded_rows(packed: Packed) -> list[list[int]]:
    """The padded layout as attention sees it, with zeros where there is no token."""
    id_ST = packed.id_N[packed.padded_ST]
    is_token_ST = torch.arange(id_ST.shape[1]) < torch.tensor(packed.lengths)[:, None]
    rows: list[list[int]] = (id_ST * is_token_ST).tolist()
    return rows


def test_rewards_are_collated() -> None:
    """trl reward_trainer: chosen (1 2 3), (6 7) and rejected (4 5), (8)."""
    assert padded_rows(pack([[1, 2, 3], [6, 7], [4, 5], [8]])) == [[1, 2, 3], [6, 7, 0], [4, 5, 0], [8, 0, 0]]


@pytest.mark.parametrize("groups", [None, [2, 2]])
def test_pairs_are_collated(groups: Sequence[int] | None) -> None:
    """trl dpo_trainer: prompts (1 2 3), (7 8), chosen (4 5), (9 10), rejected (6), (11 12 13); ours pair by pair."""
    packed = pack([[1, 2, 3, 4, 5], [1, 2, 3, 6], [7, 8, 9, 10], [7, 8, 11, 12, 13]], groups=groups)
    assert padded_rows(packed) == [[1, 2, 3, 4, 5], [1, 2, 3, 6, 0], [7, 8, 9, 10, 0], [7, 8, 11, 12, 13]]
    source_M, target_M = packed.predicted([3, 3, 2, 2])
    assert target_M.tolist() == [4, 5, 6, 9, 10, 11, 12, 13]
    assert packed.id_N[source_M].tolist() == [3, 4, 3, 8, 9, 8, 11, 12]


def test_accuracy_of_two_pairs() -> None:
    """trl test_reward_trainer: scores (.1, .9) and (.9, .1), the better response first: one of two is right."""
    pairs = []
    for number, (better, worse) in enumerate(((0.1, 0.9), (0.9, 0.1))):
        one = ranking(f"w{number}", ["w5", "w6"], ((0,), (1,)))
        pairs.append(ScoredPair(ranking=one, better=one.responses[0], worse=one.responses[1], gap=better - worse))
    found = measure(pairs)
    assert found["accuracy"] == 0.5
    # log(1 + exp(.8)) = 1.171101 and log(1 + exp(-.8)) = .371101
    assert found["log_loss"] == pytest.approx(0.771101, abs=1e-6)


# --- divergences ----------------------------------------------------------------------------------------------------


def divergence(p: Sequence[float], q: Sequence[float]) -> float:
    """KL(p || q): k1 of every token, weighed by how often p draws it."""
    logprob_1V, ref_1V = t(p).log()[None], t(q).log()[None]
    estimate_1V: Tensor = kl_estimate(logprob_1V, ref_1V, all_true(1, len(p)), estimator="k1")
    return float((t(p) * estimate_1V[0]).sum())


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        ((0.98, 0.01, 0.01), (0.01, 0.01, 0.98), 0.97 * math.log(98)),  # 4.447418
        ((0.49, 0.02, 0.49), (0.01, 0.98, 0.01), 3.736147),
        ((0.1, 0.9), (0.9, 0.1), 0.8 * math.log(9)),  # 1.757780
        ((0.9, 0.1), (0.1, 0.9), 1.757780),
        ((0.25, 0.05, 0.7), (0.25, 0.05, 0.7), 0.0),
    ],
)
def test_divergences(p: Sequence[float], q: Sequence[float], expected: float) -> None:
    """trl test_ppo_trainer (2024) and test_gkd_trainer."""
    assert divergence(p, q) == pytest.approx(expected, abs=1e-6)
