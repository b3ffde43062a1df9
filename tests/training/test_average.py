"""The exponential moving average of the weights, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tastemaker.training import WeightAverage, decay_for


def module_with(*values: float) -> nn.Module:
    module = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([values]))
    return module


def set_to(module: nn.Module, *values: float) -> None:
    with torch.no_grad():
        next(module.parameters()).copy_(torch.tensor([values]))


def test_three_updates_by_hand() -> None:
    module = module_with(1.0, -2.0, 4.0)
    average = WeightAverage(module)
    set_to(module, 3.0, 2.0, 4.0)
    average.update(module, 0.75)  # .75 * 1 + .25 * 3 = 1.5; .75 * -2 + .25 * 2 = -1
    assert average.weights["weight"].tolist() == [[1.5, -1.0, 4.0]]
    set_to(module, -0.5, 3.0, 0.0)
    average.update(module, 0.5)  # halfway: .5, 1 and 2
    assert average.weights["weight"].tolist() == [[0.5, 1.0, 2.0]]
    average.update(module, 0.0)
    assert average.weights["weight"].tolist() == [[-0.5, 3.0, 0.0]]
    average.update(module_with(9.0, 9.0, 9.0), 1.0)
    assert average.weights["weight"].tolist() == [[-0.5, 3.0, 0.0]]


def test_it_is_a_copy_of_what_is_trained() -> None:
    module = nn.Sequential(module_with(1.0), module_with(2.0))
    module[1].requires_grad_(False)
    average = WeightAverage(module)
    set_to(module[0], 5.0)
    assert {name: tensor.item() for name, tensor in average.weights.items()} == {"0.weight": 1.0}


def test_the_decay_looks_back_over_as_many_episodes() -> None:
    # .992 per 512 episodes: 64 episodes have the eighth root, and eight such updates make one
    assert decay_for(0.992, 512) == pytest.approx(0.992)
    assert decay_for(0.992, 64) == pytest.approx(0.9989965, abs=1e-7)  # exp(ln(.992) / 8)
    assert decay_for(0.992, 64) ** 8 == pytest.approx(0.992)
    assert decay_for(0.992, 1024) == pytest.approx(0.992**2)
    assert decay_for(0.9, 30, per_episodes=10) == pytest.approx(0.729)


def test_a_state_is_put_back_in_place() -> None:
    module = module_with(1.0, 2.0)
    average = WeightAverage(module)
    saved = {name: tensor.clone() for name, tensor in average.state().items()}
    set_to(module, 7.0, 8.0)
    average.update(module, 0.5)
    other = WeightAverage(module_with(0.0, 0.0))
    other.load_state(saved)
    assert other.weights["weight"].tolist() == [[1.0, 2.0]]
