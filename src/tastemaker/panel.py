"""Who answers a study: people through the label store, or simulated raters through the very same service.

With people, tasks are queued and the stage stops (exit code 3) until they are answered; the same command continues.
With simulated raters the tasks are answered at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tastemaker.console import progress, say
from tastemaker.errors import AnswersMissing
from tastemaker.raters import SimulatedRater, answer_all
from tastemaker.store import LabelService
from tastemaker.store.tasks import NewItem, StudyConfig

Answered = TypeVar("Answered")


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A group of raters. `simulated` is empty for people, who answer at `address`.

    `invitation` is the command that lets another person in.
    """

    group: str
    address: str
    invitation: str = ""
    simulated: tuple[SimulatedRater, ...] = ()

    @property
    def of_people(self) -> bool:
        return not self.simulated


def collect(
    service: LabelService,
    study: StudyConfig,
    items: Sequence[NewItem],
    panel: Panel,
    *,
    read: Callable[[str], list[Answered]],
    slot: Callable[[Answered], tuple[str, str | None]],
) -> list[Answered]:
    """Queue `items` and return their answers, in the order of the items, once every slot of theirs is answered.

    `read` gives all answers of a study, `slot` the key of an answer's item and its rater. A study may hold items that
    were asked for once and are not wanted now: their answers stay there, and are neither waited for nor returned.

    Raises:
        AnswersMissing: people still have to answer.
    """
    service.queue(study, items)
    place = {item.key: number for number, item in enumerate(items)}

    def answers() -> list[Answered]:
        wanted = [answer for answer in read(study.name) if slot(answer)[0] in place]
        return sorted(wanted, key=lambda answer: place[slot(answer)[0]])

    # Read before the answers: one that comes in between is still missed then, and never left out as if all were there.
    open_slots = service.progress(study.name).missing  # an item made gold meanwhile waits for nobody
    found = answers()
    answered = Counter(key for key, _ in set(map(slot, found)))  # a rating answers for each of its item's outputs
    unanswered = sum(max(0, study.overlap - answered[key]) for key in place)
    missing = min(unanswered, open_slots)
    if not missing:
        return found
    if panel.of_people:
        raise AnswersMissing(
            missing=missing,
            task=study.kind,
            group=panel.group,
            address=panel.address,
            invitation=panel.invitation,
            overlap=study.overlap,
        )
    service.release_simulated(study.name)
    for rater in panel.simulated:
        service.add_rater(rater.profile.name, group=panel.group, origin="simulated")
    with progress(f"{study.kind}s by {panel.group} raters", missing) as ticker:
        answer_all(service, study.name, panel.simulated, progress=lambda count: ticker.advance(count))
    say(f"  {missing} {study.kind} answers from {len(panel.simulated)} simulated raters ({panel.group})")
    return answers()
