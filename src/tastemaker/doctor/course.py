"""What PPO that goes well does not do: KL, entropy, length, truncation, reward and value function over its course.

These thresholds are judgements. Each stands with its reason; they were set on PPO broken on purpose at some strengths
and on healthy runs, and tried on other strengths and other runs (`tests/doctor`). A course is judged by its first and
its last quarter, and not before `LEAST` iterations are there; steps that are too large, responses that are all cut off
and a reward that is constant show in `QUICK`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from tastemaker.doctor.findings import Check, Finding, Kind, Measured, Series, ends, number

LEAST = 8  # iterations; two quarters of fewer are two values each
QUICK = 3  # consecutive iterations; one alone may be a bad batch

# The usual 0.01 to 0.1 leaves room. Where the clip holds for a quarter of the tokens, or log-probs move by 0.3 at each
# token (half the square is 0.05), the update is no small step, and old advantages say little of the new policy.
CLIP_FRACTION = 0.25
APPROX_KL = 0.05  # nats a token
# The paper's policies are some tens of nats from the reference over a few hundred tokens, 0.1 to 0.3 a token; at half a
# nat a token the reference gives each of the policy's words 0.61 of the probability that the policy does.
KL_PER_TOKEN = 0.5  # nats a token
# As far as the best of 55 samples is from their law (log n - (n-1)/n): a short response may well change by a word.
KL_PER_RESPONSE = 3.0  # nats a response
KL_ERRORS = 3.0  # of the difference of two iterations: a few responses scatter by nats
# The demo's healthy runs keep more than a third of their entropy, larger models nearly all of it.
ENTROPY_LEFT = 0.2  # of the first iteration's
ENTROPY_GROWN = 1.5  # times the first iteration's
ENTROPY_GAINED = 0.5  # nats a token, beside the factor: little entropy is multiplied easily
# Raters' liking of length makes healthy responses longer by tenths, not by half.
LENGTH_GROWN = 1.5
LENGTH_LEFT = 1 / 3
# Short limits cut off nine responses in ten of a healthy run; where all are cut off no end token is ever credited.
TRUNCATED = 0.98
SAME_SCORE = 1e-6  # of the scores' size: rounding
SPREAD_LEFT = 0.1  # of the first quarter's: nine tenths of what told responses apart are gone
REWARD_ERRORS = 3.0  # standard errors, and
REWARD_FALLEN = 0.25  # standard deviations of the scores: less is no harm
REWARD_LOST = 0.5  # of its best stretch, which of many stretches is the best by chance too
KL_COEF_RISEN = 1.2  # an adaptive coefficient that rises takes from the reward, rightly
# A value function that says nothing has an explained variance of 0; of a working one it is 0.3 to 0.9.
EXPLAINED = 0.05
EXPLAINED_GAINED = 0.2  # one that began far below 0 and comes up is learning
VALUE_LOSS_LEFT = 0.8  # of the first quarter's: a loss that fell by more is falling
VALUE_CLIPPED = 0.8  # beyond the first quarter; early on healthy runs reach 0.4
TAX = 0.3  # nats a token: text is a third more surprising at each token

UPDATE = Kind(
    name="update-too-large",
    severity="warning",
    title="The policy's steps are too large",
    when=f"over {QUICK} iterations a mean `clip_fraction` above {CLIP_FRACTION:g}, or a mean `approx_kl` above "
    f"{APPROX_KL:g} nats a token; or `kl` up by more than {KL_PER_TOKEN:g} nats a token, {KL_PER_RESPONSE:g} a "
    f"response and {KL_ERRORS:g} standard errors (`kl_error`) from one iteration to the next",
    causes=(
        "a learning rate that is too high",
        "too many optimizer steps on one rollout (`minibatches` times `inner_epochs`)",
        "gradients that are not clipped, or a batch too small for the rate",
    ),
    tries=("`policy.learning_rate` lower by a factor of 3", "`inner_epochs = 1`", "more episodes in an iteration"),
)
EXPLODING = Kind(
    name="kl-exploding",
    severity="warning",
    title="The policy is far from the reference",
    when=f"`kl` above {KL_PER_TOKEN:g} nats a token and {KL_PER_RESPONSE:g} a response in the last quarter",
    causes=(
        "no KL penalty, or one too small for the scale of the scores",
        "a reward that can be hacked: what scores high is not what was meant",
        "a learning rate that is too high",
    ),
    tries=(
        "a higher `kl_coef`: at the best score the penalty is of the size of the gain",
        "read twenty responses: what they have in common is what the reward pays for",
        "`policy.learning_rate` lower by a factor of 3",
    ),
)
COLLAPSE = Kind(
    name="entropy-collapse",
    severity="warning",
    title="The policy says nearly the same every time",
    when=f"`entropy` in the last quarter below {ENTROPY_LEFT:g} of the first iteration's",
    causes=(
        "a reward that is highest for one response to everything",
        "no KL penalty, or one too small for the scale of the scores",
        "a learning rate that is too high for so many iterations",
    ),
    tries=("a higher `kl_coef`", "read responses to different prompts", "stop at an earlier model (`keep_every`)"),
)
RANDOM = Kind(
    name="entropy-rising",
    severity="warning",
    title="The policy becomes more random",
    when=f"`entropy` in the last quarter above {ENTROPY_GROWN:g} times the first iteration's, and by "
    f"{ENTROPY_GAINED:g} nats a token",
    causes=(
        "updates that destroy what the model knew: a learning rate that is too high",
        "a reward for what is improbable, or advantages of the wrong sign",
    ),
    tries=("`policy.learning_rate` lower by a factor of 3", "a higher `kl_coef`", "pretraining text (`ptx_coef`)"),
)
GROWTH = Kind(
    name="length-growth",
    severity="warning",
    title="Responses grow longer and longer",
    when=f"`response_tokens` in the last quarter above {LENGTH_GROWN:g} times those of the first",
    causes=(
        "the reward likes length: the reward model learned it from raters, or the function counts words",
        "responses that never end cost nothing (`truncated` is not `penalty`, or `truncation_penalty` is small)",
    ),
    tries=(
        "compare at equal length: is the longer response better?",
        "pairs in the reward model's data in which the shorter response is the better one",
        "a `truncation_penalty` of the size of the scores' spread",
    ),
)
SHRINKING = Kind(
    name="length-collapse",
    severity="warning",
    title="Responses shrink to almost nothing",
    when=f"`response_tokens` in the last quarter below {LENGTH_LEFT:.2g} of those of the first",
    causes=(
        "the reward likes brevity, or is negative for each word",
        "a KL penalty that outweighs the score: the shortest response pays least",
        "a `truncation_penalty` far larger than the scores' spread",
    ),
    tries=(
        "a lower `kl_coef` or `truncation_penalty`",
        "scores centred on 0, as of a reward model with demonstrations",
    ),
)
CUT_OFF = Kind(
    name="all-truncated",
    severity="warning",
    title="Nearly all responses are cut off",
    when=f"`truncated_rate` above {TRUNCATED:g} in the last quarter, {QUICK} iterations at least",
    causes=(
        "`decoding.max_new_tokens` is too small for what the model says",
        "the model has not learned to end: its demonstrations had no end token",
        "the policy learned that ending does not pay",
    ),
    tries=("a higher `decoding.max_new_tokens`", "a look at the SFT model's responses", "`truncated = penalty`"),
)
CONSTANT = Kind(
    name="reward-constant",
    severity="warning",
    title="The reward says the same of every response",
    when="`score_spread` 0 up to rounding in every iteration (where it was not measured: one `score` throughout)",
    causes=(
        "a reward function that looks for something that no response has",
        "a reward model whose head was not trained or not loaded, or that cuts off the response and reads the prompt",
    ),
    tries=("score a good and a bad response by hand", "a reward that gives part of the way some credit"),
)
SATURATED = Kind(
    name="reward-saturated",
    severity="warning",
    title="The reward no longer tells responses apart",
    when=f"`score_spread` in the last quarter below {SPREAD_LEFT:g} of the first's",
    causes=(
        "all responses reach the highest score there is; what is left of the gradient is noise and KL",
        "the policy gives the same response to everything",
    ),
    tries=("stop here, or at an earlier model", "a reward with more to tell at its upper end", "harder prompts"),
)
FALLING = Kind(
    name="reward-falling",
    severity="warning",
    title="The reward falls, which is what is trained for",
    when=f"`reward` in the last quarter lower than in the first by {REWARD_ERRORS:g} standard errors and "
    f"{REWARD_FALLEN:g} standard deviations of the scores, or than in the best stretch of that length by as many "
    f"errors and {REWARD_LOST:g}; `kl_coef` not risen since by more than {KL_COEF_RISEN - 1:.0%}",
    causes=(
        "the sign of the reward or of the advantages is turned",
        "updates that destroy the policy, at once or after it had learned: a learning rate that is too high",
        "a pretraining gradient that outweighs the reward",
    ),
    tries=(
        "score a good and a bad response by hand: the good one must be higher",
        "`policy.learning_rate` lower by a factor of 3",
        "a lower `ptx_coef`",
    ),
)
VALUES = Kind(
    name="value-not-learning",
    severity="warning",
    title="The value function does not learn",
    when=f"`explained_variance` in the last quarter below {EXPLAINED:g} and not {EXPLAINED_GAINED:g} above the "
    f"first's, and `value_loss` not below {VALUE_LOSS_LEFT:g} of the first quarter's",
    causes=(
        "`value.learning_rate` is 0 or too low, or the value function's parameters are frozen",
        "returns far larger than `value_clip`, which holds each step back",
        "values read at the wrong places, or of another model's tokens",
    ),
    tries=(
        "`value.learning_rate` tenfold",
        "a `value_clip` of the size of the returns",
        "start the value function from the reward model",
    ),
)
VALUE_CLIP = Kind(
    name="value-clip-binds",
    severity="warning",
    title="The value clip holds the value function back",
    when=f"`value_clip_fraction` above {VALUE_CLIPPED:g} in the last quarter",
    causes=("scores that are large beside `value_clip`",),
    tries=("a `value_clip` of the size of the scores' spread", "scores divided by their standard deviation"),
)
FORGETTING = Kind(
    name="forgetting",
    severity="warning",
    title="The policy forgets what it knew of text",
    when=f"`heldout_text_loss` up by more than {TAX:g} nats a token since it was first measured",
    causes=("an alignment tax that nothing holds back", "a policy that has left its language"),
    tries=("pretraining text: a higher `ptx_coef`", "a higher `kl_coef`", "a lower `policy.learning_rate`"),
)


def update_too_large(measured: Measured) -> Finding | None:
    for name, limit in (("clip_fraction", CLIP_FRACTION), ("approx_kl", APPROX_KL)):
        series = measured.series(name)
        if len(series) >= QUICK and (worst := series.worst_mean(QUICK)).mean > limit:
            return UPDATE.seen(f"Mean {name} {number(worst.mean)} over iterations {worst.span} (limit {limit:g}).")
    error = measured.series("kl_error")
    error_of = dict(zip(error.steps, error.values, strict=True))
    for (last, (before, _)), (step, (after, tokens)) in pairwise(measured.together("kl", "response_tokens")):
        chance = KL_ERRORS * math.hypot(error_of.get(last, 0.0), error_of.get(step, 0.0))
        if after - before > max(KL_PER_RESPONSE, KL_PER_TOKEN * tokens, chance):
            return UPDATE.seen(
                f"The KL rose from {number(before)} to {number(after)} nats a response at iteration {step}."
            )
    return None


def kl_exploding(measured: Measured) -> Finding | None:
    per_token = _kl_per_token(measured)
    if len(per_token) < LEAST:
        return None
    first, last = ends(per_token)
    whole = ends(measured.series("kl"))[1].mean
    if last.mean <= KL_PER_TOKEN or whole <= KL_PER_RESPONSE:
        return None
    coefficient = ends(measured.series("kl_coef"))[1].mean if measured.series("kl_coef") else math.nan
    return EXPLODING.seen(
        f"{number(last.mean)} nats a token over iterations {last.span} ({number(whole)} a response), from "
        f"{number(first.mean)} over {first.span}; kl_coef is {number(coefficient)}."
    )


def entropy_collapse(measured: Measured) -> Finding | None:
    found = _since_the_start(measured, "entropy")
    if found is None:
        return None
    start, last = found
    if start <= 0 or last.mean >= ENTROPY_LEFT * start:
        return None
    return COLLAPSE.seen(
        f"{number(last.mean)} nats a token over iterations {last.span}, from {number(start)} at first."
    )


def entropy_rising(measured: Measured) -> Finding | None:
    found = _since_the_start(measured, "entropy")
    if found is None:
        return None
    start, last = found
    if last.mean <= max(ENTROPY_GROWN * start, start + ENTROPY_GAINED):
        return None
    return RANDOM.seen(_nats(start, last))


def _nats(start: float, last: Series) -> str:
    return f"{number(last.mean)} nats a token over iterations {last.span}, from {number(start)} at first."


def length_growth(measured: Measured) -> Finding | None:
    return _length(measured, GROWTH, lambda first, last: last > LENGTH_GROWN * first)


def length_collapse(measured: Measured) -> Finding | None:
    return _length(measured, SHRINKING, lambda first, last: last < LENGTH_LEFT * first)


def _length(measured: Measured, kind: Kind, is_wrong: Callable[[float, float], bool]) -> Finding | None:
    tokens = measured.series("response_tokens")
    if len(tokens) < LEAST:
        return None
    first, last = ends(tokens)
    if not is_wrong(first.mean, last.mean):
        return None
    limit = measured.setting("decoding.max_new_tokens")
    of = f" of {limit} allowed" if limit else ""
    return kind.seen(
        f"{last.mean:.1f} tokens{of} over iterations {last.span}, from {first.mean:.1f} over {first.span}."
    )


def all_truncated(measured: Measured) -> Finding | None:
    rate = measured.series("truncated_rate")
    if len(rate) < QUICK:
        return None
    _, last = ends(rate)
    if last.mean <= TRUNCATED:
        return None
    limit = measured.setting("decoding.max_new_tokens")
    at = f" at the limit of {limit} tokens" if limit else ""
    return CUT_OFF.seen(f"{100 * last.mean:.0f} % are cut off{at} over iterations {last.span}.")


def reward_constant(measured: Measured) -> Finding | None:
    score = measured.series("score")
    if len(score) < QUICK:
        return None
    spread = measured.series("score_spread")
    apart = max([*spread.values, max(score.values) - min(score.values)])
    if apart > SAME_SCORE * max(1.0, abs(score.mean)):
        return None
    return CONSTANT.seen(f"Every response of {len(score)} iterations scores {number(score.mean)}.")


def reward_saturated(measured: Measured) -> Finding | None:
    spread = measured.series("score_spread")
    if len(spread) < LEAST or reward_constant(measured) is not None:
        return None
    first, last = ends(spread)
    if last.mean >= SPREAD_LEFT * first.mean:
        return None
    score = ends(measured.series("score"))[1].mean
    return SATURATED.seen(
        f"Scores spread by {number(last.mean)} over iterations {last.span}, by {number(first.mean)} over {first.span}; "
        f"their mean is {number(score)}."
    )


def reward_falling(measured: Measured) -> Finding | None:
    reward = measured.series("reward")
    if len(reward) < LEAST or reward_constant(measured) is not None:  # nothing is trained for but the penalty
        return None
    first, last = ends(reward)
    best = reward.worst_mean(len(last))  # the highest
    spread = measured.series("score_spread")
    # An older run's spread is told by how its means scatter.
    told = first.error * math.sqrt(len(first) * int(measured.setting("batch_size", 1)))
    deviation = ends(spread)[0].mean if spread else told
    for before, share in ((first, REWARD_FALLEN), (best, REWARD_LOST)):
        chance = REWARD_ERRORS * math.hypot(before.error, last.error)
        paid = _mean_at(measured, "kl_coef", last) > KL_COEF_RISEN * _mean_at(measured, "kl_coef", before)
        if before.mean - last.mean > max(chance, share * deviation) and not paid:
            was, now = (_mean_at(measured, "score", part) for part in (before, last))
            scores = "" if math.isnan(was) else f"; the score {number(was)}, then {number(now)}"
            return FALLING.seen(
                f"Reward {number(before.mean)} over iterations {before.span}, {number(last.mean)} over "
                f"{last.span}{scores}."
            )
    return None


def _mean_at(measured: Measured, name: str, part: Series) -> float:
    """Another metric's mean over the same iterations; NaN where it was not measured."""
    series = measured.series(name)
    values = [value for step, value in zip(series.steps, series.values, strict=True) if step in part.steps]
    return math.fsum(values) / len(values) if values else math.nan


def value_not_learning(measured: Measured) -> Finding | None:
    explained, loss = measured.series("explained_variance"), measured.series("value_loss")
    if len(explained) < LEAST or len(loss) < LEAST or reward_constant(measured) is not None:
        return None
    (first, last), (first_loss, last_loss) = ends(explained), ends(loss)
    if last.mean >= EXPLAINED or last.mean > first.mean + EXPLAINED_GAINED:
        return None
    if last_loss.mean < VALUE_LOSS_LEFT * first_loss.mean:
        return None
    return VALUES.seen(
        f"Explained variance {number(last.mean)} over iterations {last.span}; value loss {number(first_loss.mean)} "
        f"over {first_loss.span}, {number(last_loss.mean)} over {last_loss.span}."
    )


def value_clip_binds(measured: Measured) -> Finding | None:
    share = measured.series("value_clip_fraction")
    if len(share) < LEAST:
        return None
    _, last = ends(share)
    if last.mean <= VALUE_CLIPPED:
        return None
    clip = measured.setting("value_clip")
    return VALUE_CLIP.seen(
        f"{100 * last.mean:.0f} % of the tokens over iterations {last.span}"
        f"{f' with value_clip {clip:g}' if clip else ''}."
    )


def forgetting(measured: Measured) -> Finding | None:
    loss = measured.series("heldout_text_loss")
    if len(loss) < 2 or loss.values[-1] - loss.values[0] <= TAX:
        return None
    return FORGETTING.seen(
        f"{number(loss.values[0])} nats a token at iteration {loss.steps[0]}, {number(loss.values[-1])} at "
        f"{loss.steps[-1]}."
    )


def _kl_per_token(measured: Measured) -> Series:
    rows = measured.together("kl", "response_tokens")
    return Series(tuple(step for step, _ in rows), tuple(kl / max(1.0, tokens) for _, (kl, tokens) in rows))


def _since_the_start(measured: Measured, name: str) -> tuple[float, Series] | None:
    """The first iteration's value, when the policy still is the reference, and the last quarter."""
    series = measured.series(name)
    return None if len(series) < LEAST else (series.values[0], ends(series)[1])


OF_PPO: Sequence[tuple[Kind, Check]] = (
    (UPDATE, update_too_large),
    (CONSTANT, reward_constant),
    (CUT_OFF, all_truncated),
    (EXPLODING, kl_exploding),
    (COLLAPSE, entropy_collapse),
    (RANDOM, entropy_rising),
    (GROWTH, length_growth),
    (SHRINKING, length_collapse),
    (FALLING, reward_falling),
    (SATURATED, reward_saturated),
    (VALUES, value_not_learning),
    (VALUE_CLIP, value_clip_binds),
    (FORGETTING, forgetting),
)
