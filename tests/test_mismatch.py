"""The benchmark of sampler against trainer: its figures by hand, and the committed page."""

from __future__ import annotations

import json
import math

import pytest
import torch
from benchmarks import mismatch
from benchmarks.pages import between
from tests.models import make_policy

from tastemaker.records import Prompt
from tastemaker.tokenizer import as_messages


def test_figures_by_hand() -> None:
    """Differences of 0.1, -0.3 and 0.2: their absolute mean is 0.2; ratios are e to the power of them."""
    found = mismatch.compared(torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-0.9, -2.3, -0.3]))
    ratios = [math.exp(0.1), math.exp(-0.3), math.exp(0.2)]
    mean = sum(ratios) / 3
    assert found["tokens"] == 3
    assert found["mean"] == pytest.approx(0.2, abs=1e-6)
    assert found["max"] == pytest.approx(0.3, abs=1e-6)
    assert found["ratio_mean"] == pytest.approx(mean, abs=1e-6)
    assert found["ratio_std"] == pytest.approx(math.sqrt(sum((one - mean) ** 2 for one in ratios) / 3), abs=1e-6)


def test_in_fp32_sampler_and_trainer_agree_and_in_bf16_they_do_not() -> None:
    prompts = [Prompt(messages=as_messages(f"w{place} w{place + 1}")) for place in range(3, 8)]
    rows = mismatch.measure("tiny", make_policy(), prompts, 5)
    assert [(row["sampler"], row["trainer"]) for row in rows] == [
        (sampler, trainer) for sampler in mismatch.PRECISIONS for trainer in mismatch.PRECISIONS
    ]
    assert rows[0]["max"] < 5e-5
    assert all(row["max"] > 1e-3 for row in rows[1:])


def test_the_committed_page_is_what_the_committed_results_give() -> None:
    made = between(mismatch.PAGE, mismatch.BEGIN, mismatch.END)
    results = json.loads(mismatch.RESULTS.read_text(encoding="utf-8"))
    assert made == mismatch.render(results).strip(), "run python -m benchmarks.mismatch --page"
