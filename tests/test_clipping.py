"""What PPO reports of its clips and of the ratio, on the rollout worked through by hand."""

from __future__ import annotations

import pytest
import torch
from tests.test_losses import ADVANTAGE, LOGPROB, NEW_LOGPROB, NEW_VALUE, VALUE, all_true, t

from tastemaker.clipping import correlation, explained_variance, ratio_sums, value_sums
from tastemaker.losses import whiten

MASK = all_true(2, 4)


def test_the_rollout_by_hand() -> None:
    """Ratios 1.105 .741 1.350 1 | .819 1.221 .951 1.105; advantages + | -.

    Beyond the clip are three, .741, 1.350 and 1.221; only at 1.350, a good token made much likelier, is the clipped
    loss the larger. Log ratios squared sum to .2825, and half their mean is .017656. The values that moved by .4 and
    -.3 are clipped, and both were nearer to their returns without: 2 of 8.
    """
    advantage_BT = t(ADVANTAGE)
    sums = ratio_sums(t(NEW_LOGPROB), t(LOGPROB), whiten(advantage_BT, MASK), MASK, clip=0.2)
    assert sums["clipped"] / 8 == 0.125
    assert 0.5 * sums["square_log_ratio"] / 8 == pytest.approx(0.017656, abs=5e-7)
    assert sums["abs_log_ratio"] == pytest.approx(1.25, abs=1e-9)
    assert sums["largest"] == pytest.approx(1.349859, abs=1e-6)
    value = value_sums(t(NEW_VALUE), t(VALUE), advantage_BT + t(VALUE), MASK, clip=0.2)
    assert value["value_clipped"] / 8 == 0.25


@pytest.mark.parametrize(
    ("logprob", "advantage", "clipped"),
    [(0.3, 1.0, 1), (0.3, -1.0, 0), (-0.3, 1.0, 0), (-0.3, -1.0, 1), (0.1, 1.0, 0), (-0.1, -1.0, 0), (0.3, 0.0, 0)],
)
def test_a_ratio_counts_where_the_clip_stops_its_gradient(logprob: float, advantage: float, clipped: int) -> None:
    sums = ratio_sums(t([[logprob]]), t([[0.0]]), t([[advantage]]), all_true(1, 1), clip=0.2)
    assert sums["clipped"] == clipped


@pytest.mark.parametrize(
    ("value", "target", "clipped"), [(0.5, 1.0, 1), (0.5, 0.1, 0), (-0.5, -1.0, 1), (-0.5, 0.3, 0), (0.1, 1.0, 0)]
)
def test_a_value_counts_where_its_clipped_error_is_larger(value: float, target: float, clipped: int) -> None:
    """The old value is 0: .5 is clipped to .2, which is farther from 1 and nearer to .1."""
    sums = value_sums(t([[value]]), t([[0.0]]), t([[target]]), all_true(1, 1), clip=0.2)
    assert sums["value_clipped"] == clipped


def test_masked_places_do_not_count() -> None:
    mask_BT = torch.tensor([[False, True, False]])
    junk = float("nan")
    sums = ratio_sums(t([[junk, 0.3, 9]]), t([[0, 0, 0]]), t([[1, 1, junk]]), mask_BT, clip=0.2)
    assert sums["clipped"] == 1
    assert sums["abs_log_ratio"] == pytest.approx(0.3)
    assert value_sums(t([[9, 0.5, 9]]), t([[0, 0, 0]]), t([[9, 1, junk]]), mask_BT, clip=0.2)["value_clipped"] == 1


def test_nothing_counts() -> None:
    nothing_BT = torch.zeros(1, 2, dtype=torch.bool)
    sums = ratio_sums(t([[1, 2]]), t([[0, 0]]), t([[1, 1]]), nothing_BT, clip=0.2)
    assert {name: float(amount) for name, amount in sums.items()} == dict.fromkeys(sums, 0.0)


def test_explained_variance_by_hand() -> None:
    # returns 0, 2, 4 vary by 8/3; what is left of them, 0, 1, 2, by 2/3
    assert explained_variance(t([0, 1, 2]), t([0, 2, 4])) == pytest.approx(0.75)
    assert explained_variance(t([1, 2]), t([3, 3])) == 0.0


def test_correlation_by_hand() -> None:
    # 1, 2, 6 less 3 and 4, 0, 5 less 3: (-2, -1, 3) . (1, -3, 2) = 7, and both squares sum to 14
    assert correlation(t([1, 2, 6]), torch.tensor([4, 0, 5])) == pytest.approx(0.5, abs=1e-12)
    assert correlation(t([1, 2, 6]), t([-1, -2, -6])) == pytest.approx(-1, abs=1e-12)
    assert correlation(t([0.1, 0.1, 0.1]), t([1, 2, 3])) == correlation(t([1, 2]), t([7, 7])) == 0


def test_rounding_is_no_clipping() -> None:
    """Within the range old + (value - old) is the value but for its last bit, which may lie on either side."""
    generator = torch.Generator().manual_seed(0)
    old, value, target = (torch.randn(7, 101, generator=generator) for _ in range(3))
    within = old + (value - old)
    assert bool((within != value).any())
    sums = value_sums(value, old, target, torch.ones(7, 101, dtype=torch.bool), clip=100.0)
    assert int(sums["value_clipped"]) == 0
