"""Simulated raters: one latent utility behind demonstrations, rankings, comparisons and ratings.

Rater r finds output m of prompt i worth

    u(r, i, m) = sum_k w_rk feature_k(i, m) + length_r log(1 + words) + position_r shown + Gumbel(0, noise_r)

with the noise drawn once per (study, rater, prompt, output text). So a rater's pairs within one ranking hang together
as a person's do, the same text is worth the same wherever it is shown, and P(A over B) = sigmoid(du / noise).
`shown` runs from +1/2 (shown first) to -1/2 (shown last). Outputs that lie within the tie threshold of their neighbour
in the order tie; with probability `lapse`, which grows by `drift` with every item of the study that came before, a task
is answered at random instead; the quality from 1 to 7 is read off cut-points on u; flags are the truth, seen through
the rater's sensitivity and specificity. Position matters only where outputs stand side by side, not in ratings, where
each is judged alone.

Every draw is a hash of (seed, study, rater, prompt, text, purpose): answers do not depend on batches, on the order in
which tasks are handed out, or on the database.

Departs from AlpacaFarm (Dubois et al. 2023), whose noise is keyed by prompt alone: there all raters err together.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from tastemaker.errors import ConfigError, StoreError
from tastemaker.records import Prompt, Response, WeakOrder
from tastemaker.store.service import LabelService
from tastemaker.store.tasks import (
    FLAGS,
    LIKERT_POINTS,
    Answer,
    Choice,
    ComparisonAnswer,
    DemonstrationAnswer,
    OutputRating,
    PrivatePrompt,
    RankingAnswer,
    RatingAnswer,
    Submission,
    Task,
    Turn,
)

Features = Callable[[Prompt, Response], Mapping[str, float]]
Writer = Callable[[Prompt, int], str]
LatentFlags = Callable[[Prompt, Response], AbstractSet[str]]

LIKERT_CUTS = (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5)

# People read some 240 words a minute and write some 40.
SECONDS_PER_WORD_READ = 0.25
SECONDS_PER_WORD_WRITTEN = 1.5
TIME_SPREAD = 0.3

# Tasks claimed at once: the cost of a transaction is spread over many answers, and an interrupted run loses few.
BATCH = 256

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True, kw_only=True)
class RaterProfile:
    """A rater's taste and failings; the fields are those of the formula above, in units of utility."""

    name: str
    group: str
    weights: Mapping[str, float]
    noise: float
    lapse: float = 0.0
    drift: float = 0.0  # what `lapse` gains with every item of a study
    tie_threshold: float = 0.0
    position_bias: float = 0.0
    length_bias: float = 0.0
    likert_cuts: tuple[float, ...] = LIKERT_CUTS
    sensitivity: float = 0.9  # how often a flag that is true is set
    specificity: float = 0.98  # how often a flag that is false is left alone

    def __post_init__(self) -> None:
        if self.noise < 0 or self.tie_threshold < 0:
            raise ConfigError(
                f"rater {self.name!r}: noise is {self.noise} and tie_threshold {self.tie_threshold}; neither may be "
                "below 0."
            )
        for name in ("lapse", "drift", "sensitivity", "specificity"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"rater {self.name!r}: {name} is {getattr(self, name)}; it is a share, from 0 to 1.")
        if len(self.likert_cuts) != LIKERT_POINTS - 1 or list(self.likert_cuts) != sorted(self.likert_cuts):
            raise ConfigError(
                f"rater {self.name!r}: likert_cuts are {self.likert_cuts}; give {LIKERT_POINTS - 1} utilities, rising."
            )


@dataclass(frozen=True, slots=True)
class SimulatedRater:
    """A profile that answers. `features` may use the prompt's private record; so may `write`, which gets a seed."""

    profile: RaterProfile
    seed: int
    features: Features
    write: Writer | None = None
    latent_flags: LatentFlags | None = None

    def utility(self, prompt: Prompt, response: Response) -> float:
        """What the rater would think of a response without noise, alone on the page."""
        features = self.features(prompt, response)
        lacking = [name for name in self.profile.weights if name not in features]
        if lacking:
            raise ConfigError(
                f"rater {self.profile.name!r} weighs {', '.join(lacking)}, but the features are "
                f"{', '.join(features) or 'none'}."
            )
        # Summed in the features' own order, so that equal weights written in another order give the same bits.
        taste = math.fsum(self.profile.weights.get(name, 0.0) * value for name, value in features.items())
        return taste + self.profile.length_bias * math.log1p(_words(response.text))

    def rank(self, prompt: Prompt, responses: Sequence[Response], *, study: str = "", place: int = 0) -> WeakOrder:
        """A weak order of responses given in the order shown; `place` is the item's in its study."""
        count = len(responses)
        if self._lapses(study, prompt, place):
            chance = [self._uniform(study, prompt, "random order", response) for response in responses]
            return tuple((index,) for index in sorted(range(count), key=lambda index: chance[index]))
        utility = [
            self._felt(study, prompt, response) + self.profile.position_bias * _shown(index, count)
            for index, response in enumerate(responses)
        ]
        return weak_order(utility, tie_threshold=self.profile.tie_threshold)

    def compare(self, prompt: Prompt, first: Response, second: Response, *, study: str = "", place: int = 0) -> float:
        """1.0 where the first, which is shown first, is better, 0.5 for a tie, else 0.0."""
        order = self.rank(prompt, (first, second), study=study, place=place)
        return 0.5 if len(order) == 1 else float(order[0] == (0,))

    def rate(self, prompt: Prompt, response: Response, *, study: str = "", place: int = 0) -> OutputRating:
        """Overall quality and flags of a response shown alone."""
        if self._lapses(study, prompt, place):
            likert = 1 + int(LIKERT_POINTS * self._uniform(study, prompt, "random quality", response))
            chance = {flag: 0.5 for flag in FLAGS}
        else:
            felt = self._felt(study, prompt, response)
            likert = 1 + sum(felt > cut for cut in self.profile.likert_cuts)
            true = self.latent_flags(prompt, response) if self.latent_flags is not None else frozenset()
            chance = {
                flag: self.profile.sensitivity if flag in true else 1 - self.profile.specificity for flag in FLAGS
            }
        # Without a truth there is nothing to see: no flags rather than false ones.
        asked = FLAGS if self.latent_flags is not None else ()
        flags = [flag for flag in asked if self._uniform(study, prompt, f"flag {flag}", response) < chance[flag]]
        return OutputRating(likert, tuple(flags))

    def demonstrate(self, prompt: Prompt, *, study: str = "") -> str:
        """A response of the rater's own."""
        if self.write is None:
            raise ConfigError(f"rater {self.profile.name!r} cannot write demonstrations; give the rater a writer.")
        return self.write(prompt, self._bits(study, prompt, "demonstration"))

    def answer(self, task: Task, private: PrivatePrompt, *, study: str) -> Answer:
        """Answer a task of any kind."""
        prompt, responses, place = private.prompt, private.responses, private.place
        letters = [output.letter for output in task.outputs]
        if task.kind == "demonstration":
            return DemonstrationAnswer(self.demonstrate(prompt, study=study))
        if task.kind == "ranking":
            order = self.rank(prompt, responses, study=study, place=place)
            return RankingAnswer(tuple(tuple(letters[index] for index in group) for group in order))
        if task.kind == "comparison":
            preference = self.compare(prompt, responses[0], responses[1], study=study, place=place)
            choice: Mapping[float, Choice] = {1.0: "A", 0.5: "tie", 0.0: "B"}
            return ComparisonAnswer(choice[preference])
        rated = (self.rate(prompt, response, study=study, place=place) for response in responses)
        return RatingAnswer(dict(zip(letters, rated, strict=True)))

    def seconds(self, private: PrivatePrompt, answer: Answer, *, study: str) -> float:
        """How long the task took: by the words read and written, log-normal about it."""
        texts = [message.content for message in private.prompt.messages] + [each.text for each in private.responses]
        expected = SECONDS_PER_WORD_READ * sum(map(_words, texts))
        if isinstance(answer, DemonstrationAnswer):
            expected += SECONDS_PER_WORD_WRITTEN * _words(answer.text)
        return expected * math.exp(TIME_SPREAD * _NORMAL.inv_cdf(self._uniform(study, private.prompt, "seconds")))

    def _felt(self, study: str, prompt: Prompt, response: Response) -> float:
        utility = self.utility(prompt, response)
        if self.profile.noise == 0:
            return utility
        return utility - self.profile.noise * math.log(-math.log(self._uniform(study, prompt, "noise", response)))

    def _lapses(self, study: str, prompt: Prompt, place: int) -> bool:
        return self._uniform(study, prompt, "lapse") < self.profile.lapse + self.profile.drift * place

    def _uniform(self, study: str, prompt: Prompt, purpose: str, response: Response | None = None) -> float:
        """A number strictly between 0 and 1, of 53 bits."""
        return ((self._bits(study, prompt, purpose, response) >> 10) + 0.5) * 2.0**-53

    def _bits(self, study: str, prompt: Prompt, purpose: str, response: Response | None = None) -> int:
        """63 hashed bits: as many as every kind of seed takes."""
        text = "" if response is None else response.text
        parts = (str(self.seed), study, self.profile.name, prompt.key, purpose, text)
        # Each part with its length before it: no two different lists give the same text.
        joined = "".join(f"{len(part)}:{part}" for part in parts)
        digest = hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


def weak_order(utility: Sequence[float], *, tie_threshold: float) -> WeakOrder:
    """Indices best first; one that lies within the threshold of the one before it joins that one's group."""
    best_first = sorted(range(len(utility)), key=lambda index: -utility[index])
    groups: list[list[int]] = []
    for index in best_first:
        if groups and utility[groups[-1][-1]] - utility[index] <= tie_threshold:
            groups[-1].append(index)
        else:
            groups.append([index])
    return tuple(tuple(sorted(group)) for group in groups)


def answer_all(
    service: LabelService,
    study: str,
    raters: Sequence[SimulatedRater],
    *,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Have simulated raters answer all that a study still lacks; returns how many answers that were.

    Which rater answers which slot follows from the slot's place in the study and the order of `raters` alone, so a run
    that was interrupted and started again gives the same answers. `progress` is called with the number of answers
    just stored.
    """
    names = [rater.profile.name for rater in raters]
    if not raters or len(set(names)) < len(names):
        raise ConfigError(f"the simulated raters are {names}; give at least one, each with a name of its own.")
    for rater in raters:
        service.add_rater(rater.profile.name, group=rater.profile.group, origin="simulated")
    # A run that was killed could not give back what its raters held.
    service.release_simulated(study)
    answered = 0
    try:
        while True:
            before = answered
            for index, rater in enumerate(raters):
                stored = _answer_batch(service, study, rater, Turn(index=index, of=len(raters)))
                answered += stored
                if progress is not None and stored:
                    progress(stored)
            if answered == before:
                break
    finally:
        service.release_simulated(study)
    missing = service.progress(study).missing
    if missing:
        raise StoreError(
            f"{missing} slots of study {study!r} are left that none of the {len(raters)} raters may answer: others "
            "answered a part of it before. Continue with the raters it was begun with, in the same order."
        )
    return answered


def _answer_batch(service: LabelService, study: str, rater: SimulatedRater, turn: Turn) -> int:
    tasks = service.claim(study, rater.profile.name, limit=BATCH, turn=turn)
    private = service.private_prompts([task.id for task in tasks])
    submissions: list[Submission] = []
    for task in tasks:
        answer = rater.answer(task, private[task.id], study=study)
        seconds = rater.seconds(private[task.id], answer, study=study)
        submissions.append(Submission(task_id=task.id, token=task.token, answer=answer, seconds=seconds))
    service.submit_many(submissions)
    return len(submissions)


# --- how much raters agree ----------------------------------------------------------------------------------------


def pair_agreement(
    utility: Sequence[NDArray[np.float64]], noise: float, *, tie_threshold: float = 0.0, lapse: float = 0.0
) -> float:
    """How often two different raters prefer the same output of a pair, among pairs on which neither ties.

    `utility` holds an array of raters by outputs for each prompt: what each rater thinks without noise. Pooled over
    prompts, pairs of outputs and pairs of raters; in expectation over the noise, not by drawing it. Ties are those of
    a pair by itself: in a ranking, a third output between two can tie them as well.
    """
    return _agreement(_gaps(utility), noise, tie_threshold, lapse)


def calibrate_noise(
    utility: Sequence[NDArray[np.float64]], *, target: float = 0.73, tie_threshold: float = 0.0, lapse: float = 0.0
) -> float:
    """The noise at which `pair_agreement` is `target`: 0.73 is the paper's (72.6 % among its training labelers)."""
    if not 0.5 < target < 1:
        raise ConfigError(f"the agreement aimed at is {target}; it must lie between 0.5 (chance) and 1.")
    gaps = _gaps(utility)
    scale = float(np.abs(gaps).mean())
    if scale == 0:
        raise ConfigError("the raters find all outputs equally good, so no noise makes them agree; vary the outputs.")
    low, high = scale * 1e-4, scale * 1e4
    best = _agreement(gaps, low, tie_threshold, lapse)
    if best < target:
        raise ConfigError(
            f"the raters agree on {best:.3f} of pairs even without noise, less than the {target} aimed at; make their "
            "weights more alike, or their lapses rarer."
        )
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        if _agreement(gaps, middle, tie_threshold, lapse) > target:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def noiseless_utilities(
    raters: Sequence[SimulatedRater], items: Sequence[tuple[Prompt, Sequence[Response]]]
) -> list[NDArray[np.float64]]:
    """What `calibrate_noise` takes: for each prompt, raters by outputs."""
    return [
        np.array([[rater.utility(prompt, response) for response in responses] for rater in raters], dtype=np.float64)
        for prompt, responses in items
    ]


def _gaps(utility: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Raters by pairs of outputs, over all prompts: by how much each rater prefers the pair's first."""
    raters = {values.shape[0] for values in utility}
    if len(raters) != 1 or min(raters) < 2:
        raise ConfigError(
            f"agreement was asked for {sorted(raters)} raters a prompt; give the same two or more raters for each."
        )
    pairs = [
        values[:, first] - values[:, second]
        for values in utility
        for first, second in combinations(range(values.shape[1]), 2)
    ]
    if not pairs:
        raise ConfigError("no prompt has two outputs, so there is nothing to agree on; give at least two.")
    return np.stack(pairs, axis=1)


def _agreement(gaps: NDArray[np.float64], noise: float, tie_threshold: float, lapse: float) -> float:
    # The difference of two Gumbel draws is logistic; a lapse prefers either with probability a half and never ties.
    first = (1 - lapse) * expit((gaps - tie_threshold) / noise) + lapse / 2
    second = (1 - lapse) * expit((-gaps - tie_threshold) / noise) + lapse / 2
    return float((_both(first) + _both(second)).sum() / _both(first + second).sum())


def _both(chance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Summed over pairs of different raters: the chance that both do it."""
    total: NDArray[np.float64] = (chance.sum(axis=0) ** 2 - (chance**2).sum(axis=0)) / 2
    return total


# --- profiles by name ---------------------------------------------------------------------------------------------


def careful(name: str, *, group: str, weights: Mapping[str, float], noise: float) -> RaterProfile:
    """Errs half as much as others, and ties what is close."""
    return RaterProfile(
        name=name, group=group, weights=weights, noise=noise / 2, tie_threshold=noise / 4, sensitivity=0.97
    )


def average(name: str, *, group: str, weights: Mapping[str, float], noise: float) -> RaterProfile:
    """Errs, ties what is close, and sometimes answers without looking."""
    return RaterProfile(name=name, group=group, weights=weights, noise=noise, tie_threshold=noise / 4, lapse=0.02)


def lenient(name: str, *, group: str, weights: Mapping[str, float], noise: float) -> RaterProfile:
    """Average, and gives one to two points more."""
    cuts = tuple(cut - 1.5 for cut in LIKERT_CUTS)
    return replace(average(name, group=group, weights=weights, noise=noise), likert_cuts=cuts)


def position_biased(name: str, *, group: str, weights: Mapping[str, float], noise: float) -> RaterProfile:
    """Average, and prefers what is shown first: of two equals in nine cases of ten."""
    return replace(average(name, group=group, weights=weights, noise=noise), position_bias=2 * noise)


def length_lover(name: str, *, group: str, weights: Mapping[str, float], noise: float) -> RaterProfile:
    """Average, and prefers the longer: of two that are equal else, the one twice as long in four cases of five."""
    return replace(average(name, group=group, weights=weights, noise=noise), length_bias=2 * noise)


def random_clicker(name: str, *, group: str, weights: Mapping[str, float], noise: float) -> RaterProfile:
    """Never looks."""
    return replace(average(name, group=group, weights=weights, noise=noise), lapse=1.0)


def straight_liner(name: str, *, group: str, weights: Mapping[str, float], noise: float) -> RaterProfile:
    """Gives everything a 4 and ties everything. Taste and noise are given for the sake of one signature, not used."""
    del noise
    indifferent = dict.fromkeys(weights, 0.0)
    return RaterProfile(
        name=name,
        group=group,
        weights=indifferent,
        noise=0.0,
        tie_threshold=math.inf,
        sensitivity=0.0,
        specificity=1.0,
    )


def drifting(name: str, *, group: str, weights: Mapping[str, float], noise: float) -> RaterProfile:
    """Average at first, and looks at less and less: after a hundred items of a study at half of what is shown."""
    return replace(average(name, group=group, weights=weights, noise=noise), drift=0.005)


def minority(name: str, *, group: str, weights: Mapping[str, float], noise: float) -> RaterProfile:
    """Average, with other values: likes and dislikes what all do, and cares most for what the others care least for."""
    by_size = sorted(weights, key=lambda feature: abs(weights[feature]))
    sizes = reversed([abs(weights[feature]) for feature in by_size])
    own = {feature: math.copysign(size, weights[feature]) for feature, size in zip(by_size, sizes, strict=True)}
    return average(name, group=group, weights=own, noise=noise)


def adversary(name: str, *, group: str, weights: Mapping[str, float], noise: float) -> RaterProfile:
    """Careful, and prefers what others do not."""
    opposite = {feature: -weight for feature, weight in weights.items()}
    return careful(name, group=group, weights=opposite, noise=noise)


def population(
    weights: Mapping[str, float], *, group: str, count: int, noise: float, seed: int, spread: float = 0.3
) -> tuple[RaterProfile, ...]:
    """Average raters of one group who differ in taste: each weight is scaled by a log-normal factor of that spread."""

    def scaled(rater: int, feature: str, weight: float) -> float:
        digest = hashlib.blake2b(f"{seed}|{group}|{rater}|{feature}".encode(), digest_size=8).digest()
        return weight * math.exp(spread * _NORMAL.inv_cdf(((int.from_bytes(digest, "big") >> 11) + 0.5) * 2.0**-53))

    return tuple(
        average(
            f"{group}-{rater + 1}",
            group=group,
            weights={feature: scaled(rater, feature, weight) for feature, weight in weights.items()},
            noise=noise,
        )
        for rater in range(count)
    )


def _shown(index: int, count: int) -> float:
    return 0.0 if count == 1 else 0.5 - index / (count - 1)


def _words(text: str) -> int:
    return len(text.split())
