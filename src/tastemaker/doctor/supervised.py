"""What training on demonstrations, rankings and pairs does not do when it goes well: SFT, the reward model, DPO.

First and last are the first and the last epoch where there are several, which have seen the same data, and otherwise
the first and the last quarter of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tastemaker.doctor.exact import LOG_2
from tastemaker.doctor.findings import Check, Finding, Kind, Measured, Series, ends, number

LEAST = 12  # steps; a step's loss is of its own batch, and batches differ
ERRORS = 3.0  # standard errors
FALLEN = 0.005  # of the loss: less is no learning, if no more than chance is in it
RISEN = 0.02  # of the loss, beside the errors
# The first step's loss is of the model as it was given. Batches differ, by half in the demo; three in a row by less.
BLOWN_UP = 2.0
LARGE = 8  # a batch whose loss alone says where training began; of smaller ones three do
QUICK = 3  # consecutive steps
OVERFIT = 0.1  # of the lowest validation loss
# A model that knows nothing of the raters' taste is right in half of the pairs. That is said where it is sure: where
# the whole interval lies near a half.
CHANCE = 0.55
MEASURED_PAIRS = 50  # fewer say nothing either way
# A gap of 5 gives one response 99.3 % of the raters; two people agree in some 73 %.
GAP = 5.0
LOG_PROB_LOST = 20.0  # nats a response, and
SHARE_LOST = 0.2  # of what it was

NOT_FALLING = Kind(
    name="loss-not-falling",
    severity="warning",
    title="The loss does not fall",
    when=f"the mean `loss` of the last epoch less than {FALLEN:.1%} below that of the first, and within two standard "
    "errors; with one epoch, that of the last quarter so little below that of the first that two standard errors more "
    "do not reach it either; or every `validation_loss` the same",
    causes=(
        "a learning rate of 0 or too low, or frozen parameters",
        "a mask that leaves nothing to learn from",
        "a model that was trained on this data before",
    ),
    tries=("look at `learning_rate` and `grad_norm`", "raise `optimizer.learning_rate` tenfold"),
)
RISING = Kind(
    name="loss-rising",
    severity="warning",
    title="The loss rises",
    when=f"the mean `loss` of the last epoch (with one, the last quarter) above that of the first by {ERRORS:g} "
    f"standard errors and {RISEN:.0%}; or {QUICK} steps in a row with a mean above {BLOWN_UP:g} times the first "
    f"step's (of pairs, at least log 2; in SFT with batches below {LARGE}, the mean of the first {QUICK})",
    causes=("a learning rate that is too high", "a warm-up that is too short"),
    tries=("`optimizer.learning_rate` lower by a factor of 3", "`optimizer.warmup_steps`"),
)
ABOVE_CHANCE = Kind(
    name="loss-above-log-2",
    severity="warning",
    title="The loss is above that of a model that cannot tell responses apart",
    when=f"the mean `loss` of the last epoch (with one, the last quarter) above log 2 by {ERRORS:g} standard errors "
    f"and {RISEN:.0%} (not for IPO)",
    causes=(
        "a learning rate that is too high",
        "a model so sure of its training pairs that it pays for every other",
        "labels turned around in a part of the data",
    ),
    tries=("`optimizer.learning_rate` lower by a factor of 3", "one epoch"),
)
AT_CHANCE = Kind(
    name="accuracy-at-chance",
    severity="warning",
    title="The model is right about as often as a coin",
    when=f"the 95 % interval of the accuracy in `results.json` wholly between {1 - CHANCE:g} and {CHANCE:g}, or, where "
    "that is missing, of the training `accuracy` in the last epoch (with one, the last quarter)",
    causes=(
        "labels at random: rankings joined with the wrong responses, or raters who do not agree",
        "a learning rate of 0 or too low, or too few pairs",
        "the response is cut off and the prompt alone is read",
    ),
    tries=("read twenty pairs with their labels", "the raters' agreement with one another", "a higher learning rate"),
)
REVERSED = Kind(
    name="labels-reversed",
    severity="warning",
    title="The model prefers what raters reject in held-out pairs",
    when=f"the 95 % interval of the accuracy in `results.json` wholly below {1 - CHANCE:g}",
    causes=("chosen and rejected are exchanged in one of the files", "ranks are read best last in one of them"),
    tries=("read five pairs of each file with their labels",),
)
GAP_EXPLODING = Kind(
    name="margin-exploding",
    severity="warning",
    title="The model is surer than any rater could be",
    when=f"`score_gap` (in DPO `margin`) above {GAP:g} in the last epoch (with one, the last quarter)",
    causes=(
        "pairs learned by heart: too many epochs",
        "a feature that gives every label away, such as the end token or a signature",
        "in DPO: a `beta` that holds too loosely, or a rate that is too high",
    ),
    tries=("one epoch", "a lower learning rate", "look for what all chosen responses have and no rejected one has"),
)
OVERFITTING = Kind(
    name="overfitting",
    severity="warning",
    title="The loss on held-out data rises",
    when=f"the last `validation_loss` above the lowest by more than {OVERFIT:.0%}",
    causes=("more epochs than the data bears",),
    tries=("stop at the epoch of the lowest validation loss", "more data, or a lower learning rate"),
)
SFT_OVERFITTING = Kind(
    name="validation-loss-rising",
    severity="note",
    title="The loss on held-out demonstrations rises",
    when=f"in SFT, the last `validation_loss` above the lowest by more than {OVERFIT:.0%}",
    causes=("more epochs than the loss bears; the paper goes on all the same, because the score still rises",),
    tries=("choose the epoch by the reward model's score (`keep_epochs = all`)",),
)
UNLEARNED = Kind(
    name="chosen-less-likely",
    severity="warning",
    title="DPO makes the chosen responses improbable too",
    when="`chosen_logprob` lower in the last epoch than in the first (with one, the last quarter than the first) by "
    f"{LOG_PROB_LOST:g} nats a response, by {SHARE_LOST:.0%} and by {ERRORS:g} standard errors",
    causes=(
        "a learning rate that is too high, or a `beta` too low",
        "chosen and rejected responses that begin alike: pushing one down takes the other with it",
    ),
    tries=("a lower learning rate", "a higher `beta`", "SFT on the chosen responses first"),
)


def loss_not_falling(measured: Measured) -> Finding | None:
    validation = measured.series("validation_loss")
    if len(validation) > 1 and max(validation.values) - min(validation.values) <= 1e-6 * abs(validation.values[0]):
        return NOT_FALLING.seen(f"The validation loss is {number(validation.values[0])} after every epoch.")
    found = _first_and_last(measured, "loss")
    if found is None:
        return None
    first, last = found
    fallen, chance, least = first.mean - last.mean, 2 * math.hypot(first.error, last.error), FALLEN * abs(first.mean)
    # Two epochs have seen the same. Quarters have not, so what was learned may hide behind a last one that is harder.
    of_same_data = _epochs(measured, "loss") is not None
    if fallen > least or (fallen > chance if of_same_data else fallen + chance > least):
        return None
    return None if _has_risen(first, last) else NOT_FALLING.seen(_course(first, last))


def loss_rising(measured: Measured) -> Finding | None:
    loss = measured.series("loss")
    if len(loss) > QUICK:
        pairs, large = _is_of_pairs(measured), measured.setting("batch_size", LARGE) >= LARGE
        begun = max(abs(loss.part(0, 1 if pairs or large else QUICK).mean), LOG_2 if pairs else 0.0)
        if (worst := loss.worst_mean(QUICK)).mean > BLOWN_UP * begun:
            return RISING.seen(f"Mean loss {number(worst.mean)} over steps {worst.span}, {number(begun)} at first.")
    found = _first_and_last(measured, "loss")
    if found is None or not _has_risen(*found):
        return None
    return RISING.seen(_course(*found))


def loss_above_log_2(measured: Measured) -> Finding | None:
    found = _first_and_last(measured, "loss")
    if found is None or not _is_of_pairs(measured):
        return None
    _, last = found
    if last.mean <= (1 + RISEN) * LOG_2 + ERRORS * last.error:
        return None
    return ABOVE_CHANCE.seen(f"Loss {number(last.mean)} over steps {last.span}; log 2 is {LOG_2:.3f}.")


def accuracy_at_chance(measured: Measured) -> Finding | None:
    interval = _interval(measured.results)
    if interval is not None:
        low, high = interval
        if not 1 - CHANCE < low <= high < CHANCE:
            return None
        return AT_CHANCE.seen(f"95 % interval of the accuracy: {100 * low:.1f} to {100 * high:.1f} %.")
    found = _first_and_last(measured, "accuracy")
    if found is None:
        return None
    _, last = found
    low, high = last.mean - 2 * last.error, last.mean + 2 * last.error
    if not 1 - CHANCE < low <= high < CHANCE:
        return None
    return AT_CHANCE.seen(f"Accuracy {100 * last.mean:.1f} % (+- {200 * last.error:.1f}) over steps {last.span}.")


def labels_reversed(measured: Measured) -> Finding | None:
    for raters, results in (("the training", measured.results), ("held-out", measured.results.get("held_out_raters"))):
        interval = _interval(results or {})
        if interval is not None and interval[1] < 1 - CHANCE:
            low, high = (f"{100 * bound:.1f}" for bound in interval)
            return REVERSED.seen(f"95 % interval of the accuracy by {raters} raters: {low} to {high} %.")
    return None


def margin_exploding(measured: Measured) -> Finding | None:
    name = "margin" if measured.stage == "dpo" else "score_gap"
    found = _first_and_last(measured, name)
    if found is None or found[1].mean <= GAP:
        return None
    return GAP_EXPLODING.seen(f"Mean {name} {number(found[1].mean)} over steps {found[1].span}.")


def overfitting(measured: Measured) -> Finding | None:
    return _overfitting(measured, OVERFITTING)


def sft_overfitting(measured: Measured) -> Finding | None:
    return _overfitting(measured, SFT_OVERFITTING)


def _overfitting(measured: Measured, kind: Kind) -> Finding | None:
    loss = measured.series("validation_loss")
    if len(loss) < 2 or loss.values[-1] <= (1 + OVERFIT) * min(loss.values):
        return None
    lowest = min(range(len(loss)), key=lambda place: loss.values[place])
    return kind.seen(
        f"{number(loss.values[lowest])} at step {loss.steps[lowest]}, {number(loss.values[-1])} at {loss.steps[-1]}."
    )


def chosen_less_likely(measured: Measured) -> Finding | None:
    found = _first_and_last(measured, "chosen_logprob")
    if found is None:
        return None
    first, last = found
    lost = first.mean - last.mean
    errors = ERRORS * math.hypot(first.error, last.error)
    if lost <= max(LOG_PROB_LOST, SHARE_LOST * abs(first.mean), errors):
        return None
    return UNLEARNED.seen(
        f"{number(first.mean)} nats a response over steps {first.span}, {number(last.mean)} over {last.span}."
    )


def _first_and_last(measured: Measured, name: str) -> tuple[Series, Series] | None:
    series = measured.series(name)
    return None if len(series) < LEAST else _epochs(measured, name) or ends(series)


def _epochs(measured: Measured, name: str) -> tuple[Series, Series] | None:
    """The first and the last epoch, if there are several of some steps each."""
    series = measured.series(name)
    epochs = [math.ceil(epoch - 1e-9) for _, (_, epoch) in measured.together(name, "epoch")]
    if len(epochs) != len(series) or not epochs or epochs[-1] < 2:
        return None
    end, start = epochs.count(epochs[0]), len(series) - epochs.count(epochs[-1])
    if start < end or min(end, len(series) - start) < 3:
        return None
    return series.part(0, end), series.part(start, len(series))


def _has_risen(first: Series, last: Series) -> bool:
    risen = last.mean - first.mean
    return risen > ERRORS * math.hypot(first.error, last.error) and risen > RISEN * abs(first.mean)


def _course(first: Series, last: Series) -> str:
    return f"Mean loss {number(first.mean)} over steps {first.span}, {number(last.mean)} over {last.span}."


def _is_of_pairs(measured: Measured) -> bool:
    """Whether the loss of two equal models is log 2; without its config nobody can tell of DPO's."""
    return measured.stage == "reward" or (measured.stage == "dpo" and measured.setting("variant") == "sigmoid")


def _interval(held: Mapping[str, Any]) -> tuple[float, float] | None:
    """Of the accuracy on held-out pairs, if there are enough of them."""
    interval = held.get("ci95")
    if not isinstance(interval, list) or len(interval) != 2 or int(held.get("n", 0)) < MEASURED_PAIRS or "on" in held:
        return None
    return float(interval[0]), float(interval[1])


OF_SFT: Sequence[tuple[Kind, Check]] = (
    (RISING, loss_rising),
    (NOT_FALLING, loss_not_falling),
    (SFT_OVERFITTING, sft_overfitting),
)
OF_REWARD: Sequence[tuple[Kind, Check]] = (
    (RISING, loss_rising),
    (REVERSED, labels_reversed),
    (AT_CHANCE, accuracy_at_chance),
    (ABOVE_CHANCE, loss_above_log_2),
    (GAP_EXPLODING, margin_exploding),
    (OVERFITTING, overfitting),
)
OF_DPO: Sequence[tuple[Kind, Check]] = (
    (RISING, loss_rising),
    (REVERSED, labels_reversed),
    (AT_CHANCE, accuracy_at_chance),
    (ABOVE_CHANCE, loss_above_log_2),
    (GAP_EXPLODING, margin_exploding),
    (UNLEARNED, chosen_less_likely),
)
