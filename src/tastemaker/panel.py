"""Who answers a study: people through the label store, or simulated raters through the very same service.

With people, tasks are queued and the stage stops (exit code 3) until they are answered; the same command continues.
With simulated raters the tasks are answered at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tastemaker.console import progress, say
from tastemaker.errors import AnswersMissing
from tastemaker.raters import SimulatedRater, answer_all
from tastemaker.store import LabelService
from tastemaker.store.tasks import NewItem, StudyConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A group of raters. `simulated` is empty for people, who answer at `address`."""

    group: str
    address: str
    simulated: tuple[SimulatedRater, ...] = ()

    @property
    def of_people(self) -> bool:
        return not self.simulated


def collect(service: LabelService, study: StudyConfig, items: Sequence[NewItem], panel: Panel) -> None:
    """Queue `items` and return once every slot is answered.

    Raises:
        AnswersMissing: people still have to answer.
    """
    service.queue(study, items)
    missing = service.progress(study.name).missing
    if not missing:
        return
    if panel.of_people:
        raise AnswersMissing(missing=missing, task=study.kind, address=panel.address)
    service.release_simulated(study.name)
    for rater in panel.simulated:
        service.add_rater(rater.profile.name, group=panel.group, origin="simulated")
    with progress(f"{study.kind}s by {panel.group} raters", missing) as ticker:
        answer_all(service, study.name, panel.simulated, progress=lambda count: ticker.advance(count))
    say(f"  {missing} {study.kind} answers from {len(panel.simulated)} simulated raters ({panel.group})")
