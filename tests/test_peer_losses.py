"""The comparison with TRL: how two sides are held beside each other, and that the committed page is what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.pages import between
from benchmarks.peer_losses import page
from benchmarks.peer_losses.cases import CASES
from benchmarks.peer_losses.results import compared, of_case
from torch import Tensor


def figures(**changes: Tensor) -> dict[str, Tensor]:
    given = {
        "gradient/b": torch.tensor([[0.0, -4.0]]),
        "loss": torch.tensor(2.0),
        "gradient/a": torch.tensor([3.0]),
        "log-probs": torch.tensor([-1.0, -3.0]),
    }
    return given | changes


def test_gradients_are_one_figure_and_the_largest_difference_is_told() -> None:
    """The norm of (3, 0, -4) is 5, that of (3, 0, -4.5) 5.408327; half of the largest number's eighth."""
    found = compared(figures(), figures(**{"gradient/b": torch.tensor([[0.0, -4.5]]), "loss": torch.tensor(2.25)}))
    assert [figure["name"] for figure in found] == ["loss", "log-probs", "gradient"]
    loss, logprobs, gradient = found
    assert (loss["ours"], loss["peer"], loss["difference"], loss["share"]) == (2.0, 2.25, 0.25, 0.125)
    assert (logprobs["ours"], logprobs["peer"], logprobs["count"], logprobs["difference"]) == (-2.0, -2.0, 2, 0.0)
    assert (gradient["count"], gradient["ours"], gradient["difference"], gradient["share"]) == (3, 5.0, 0.5, 0.125)
    assert gradient["peer"] == pytest.approx(5.408327, abs=1e-6)


def test_small_numbers_are_held_to_1_and_gradients_to_their_own_size() -> None:
    ours, peer = {"loss": torch.tensor(0.0), "gradient/a": torch.tensor([1e-3])}, {}
    peer = {"loss": torch.tensor(1e-7), "gradient/a": torch.tensor([2e-3])}
    loss, gradient = compared(ours, peer)
    assert loss["share"] == pytest.approx(1e-7, rel=1e-5)
    assert gradient["share"] == pytest.approx(1.0, rel=1e-5)


def test_sides_that_measured_different_things_are_refused() -> None:
    with pytest.raises(SystemExit, match="different things"):
        compared(figures(), {"loss": torch.tensor(2.0)})
    with pytest.raises(SystemExit, match="2 numbers on our side and 3"):
        compared(figures(), figures(**{"log-probs": torch.zeros(3)}))


def test_a_case_has_its_own_figures() -> None:
    found = of_case("dpo", {"dpo/loss": torch.zeros(1), "dpo-smoothed/loss": torch.ones(1), "ipo/loss": torch.ones(1)})
    assert found == {"loss": torch.zeros(1)}


def result(share: float) -> dict[str, Any]:
    figure = {"name": "loss", "count": 1, "ours": 0.5, "peer": 0.5, "largest": 0.5, "difference": share, "share": share}
    return {"versions": {"TRL": "1.16.0"}, "cases": {"sft": [figure]}}


def test_what_is_apart_is_named(tmp_path: Path) -> None:
    assert "All 1 figures are within 1e-05" in page.render(result(9e-6))
    assert "More than 1e-05 apart: SFT, prompt masked, loss." in page.render(result(2e-5))
    text = tmp_path / "page.md"
    text.write_text("no marks\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="lacks the marks"):
        page.write(result(0.0), text)


def test_the_committed_figures_agree() -> None:
    results = page.load()
    assert results["cases"].keys() == CASES.keys()
    for name, found in results["cases"].items():
        for figure in found:
            assert figure["share"] <= page.WITHIN, f"{name}: {figure}"
    assert {figure["name"] for found in results["cases"].values() for figure in found} >= {"loss", "gradient"}


def test_the_committed_page_is_what_the_committed_results_give() -> None:
    made = between(page.PAGE, page.BEGIN, page.END)
    assert made == page.render(page.load()).strip(), "run python -m benchmarks.peer_losses.page"
