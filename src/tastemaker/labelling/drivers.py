"""Simulated raters at work over HTTP: they ask for tasks and hand in answers as people's browsers do.

A simulated rater may know what a person may not, the prompt's private record: it is asked for by the token of an
account made by `AccessService.create_service`, whose answers are marked as simulated for ever. What a rater thinks of
an item does not depend on how it is asked (`raters`), so an answer over HTTP is the answer that `raters.answer_all`
stores for the same rater and item; only which rater meets which item depends on who asks first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tastemaker.errors import ConfigError
from tastemaker.labelling.client import LabellingClient
from tastemaker.raters import SimulatedRater
from tastemaker.store.tasks import Answer, Standing, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged:
    """An answer that the server has said it stored."""

    task: Task
    answer: Answer
    standing: Standing


def answer_study(
    client: LabellingClient,
    study: str,
    rater: SimulatedRater,
    *,
    pace: float = 0.0,
    acknowledged: Callable[[Acknowledged], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Answer all that a study has for a rater; returns how many answers that were.

    The rater takes `pace` times as long as a person would; the server believes no more seconds than have passed.
    `acknowledged` is told of each answer.
    """
    name = client.me().rater
    if name != rater.profile.name:
        raise ConfigError(f"The token is that of rater {name!r}, and the rater {rater.profile.name!r}; give its own.")
    answered = 0
    while (view := client.next_task(study)) is not None:
        private = client.private_prompt(view.task.id)
        answer = rater.answer(view.task, private, study=study)
        seconds = rater.seconds(private, answer, study=study) * pace
        if seconds > 0:
            sleep(seconds)
        standing = client.submit(
            view.task.id, answer, seconds=seconds or None, guideline_version=view.task.guideline_version
        )
        answered += 1
        if acknowledged is not None:
            acknowledged(Acknowledged(task=view.task, answer=answer, standing=standing))
    return answered


def answer_together(
    address: str,
    study: str,
    raters: Sequence[tuple[SimulatedRater, str]],
    *,
    pace: float = 0.0,
    acknowledged: Callable[[Acknowledged], None] | None = None,
    patience: float = 120.0,
) -> int:
    """Have raters, each with its token, answer a study at the same time; returns how many answers that were.

    `acknowledged` is called by several threads.
    """

    def work(each: tuple[SimulatedRater, str]) -> int:
        rater, token = each
        with LabellingClient(address, token, patience=patience) as client:
            return answer_study(client, study, rater, pace=pace, acknowledged=acknowledged)

    if not raters:
        raise ConfigError("No simulated rater was given; give at least one, with its token.")
    with ThreadPoolExecutor(max_workers=len(raters)) as threads:
        return sum(threads.map(work, raters))
