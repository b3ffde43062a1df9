"""Small random models in folders, as a user has them, and records of the words they know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from tests.models import save_model

from tastemaker.checkpoint import new_reward_model, save_reward_model
from tastemaker.records import Author, Demonstration, Message, Prompt, Ranking, Response, WeakOrder
from tastemaker.store import LabelService, Store


def prompt(text: str) -> Prompt:
    return Prompt(messages=(Message("user", text),))


def demonstration(text: str, response: str) -> Demonstration:
    return Demonstration(prompt=prompt(text), response=response)


def ranking(text: str, responses: Sequence[str], order: WeakOrder, *, rater: str = "ann") -> Ranking:
    shown = tuple(Response(text=response) for response in responses)
    return Ranking(prompt=prompt(text), responses=shown, order=order, author=Author(rater=rater))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random policy of 97 words."""
    return str(save_model(tmp_path_factory.mktemp("base") / "model", max_position_embeddings=64))


@pytest.fixture(scope="session")
def reward_model(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random reward model with an offset."""
    folder: Path = tmp_path_factory.mktemp("reward") / "model"
    model = new_reward_model(base, seed=5)
    model.offset += 0.375
    save_reward_model(folder, model)
    return str(folder)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[LabelService]:
    store = Store.open(tmp_path / "labels.db")
    yield LabelService(store)
    store.close()


def by_length(prompt: Prompt, response: Response) -> Mapping[str, float]:
    return {"words": float(len(response.text.split()))}
