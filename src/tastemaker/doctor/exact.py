"""What no correct run shows, whatever it is trained on: identities and bounds that hold by arithmetic.

Their thresholds are rounding alone, so there is nothing to be tuned in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tastemaker.doctor.findings import Check, Finding, Kind, Measured, Series, number
from tastemaker.metrics import KL_ROUNDING, KL_SURPRISE

# Both are what `stages.ppo` itself refuses to train through.
RATIO_LIMIT = {"float32": 2e-4, "bfloat16": 0.1}  # nats a token
# Sampler and trainer agree to 5e-5 nats a token in fp32. In bf16 the mean difference is 0.035 on a 135M model
# (`benchmarks/results/mismatch.json`), and was 0.058 with an older engine; of the largest token it is 0.2.
SAMPLER_LIMIT = {"float32": 1e-3, "bfloat16": 0.1}
STALE_GROWTH = 3.0  # rounding does not grow with training; a distance from old weights does

# Sums of some hundred fp32 numbers are right to 1e-5 of their size.
REWARD_TOLERANCE = 1e-3  # of the largest term, and of 1
# Policy and reference with the same weights differ by rounding: 1e-7 nats a token.
SAME_WEIGHTS = 1e-6
MOVES = 1e-6  # `approx_kl` of a policy that does train, nats a token
UNMOVED_ITERATIONS = 4  # the warm-up begins with a tenth of the rate
LOG_2 = math.log(2)
# Nats by which the margin of two equal models may be off 0; in bf16 two passes of a response differ by some tenths.
DPO_START = {"float32": 1e-3, "bfloat16": 0.5}
LOSS_ROUNDING = 1e-4  # of the loss, and of 1: how many digits are kept of it

STOPPED = Kind(
    name="stopped",
    severity="fault",
    title="A check of the stage stopped the run",
    when="the stage has left behind why it stopped",
    causes=("what the message says",),
    tries=("what the message says; the same command then goes on from the last checkpoint",),
)
NOT_FINITE = Kind(
    name="not-finite",
    severity="fault",
    title="A loss, a gradient or a metric is not finite",
    when="the stage stopped for it, or a value of `metrics.jsonl` is NaN or infinite",
    causes=("a learning rate that is too high", "extreme lengths, scores or values in the data"),
    tries=("a learning rate lower by a factor of 3", "a longer warm-up", "look at the longest and highest-scored rows"),
)
RATIO = Kind(
    name="ratio-not-1",
    severity="fault",
    title="The ratio is off 1 at an iteration's first minibatch",
    when=f"`first_log_ratio` above {RATIO_LIMIT['float32']:g} nats a token in fp32, {RATIO_LIMIT['bfloat16']:g} in "
    "bf16, or the stage stopped for it",
    causes=(
        "old log-probs of other weights: those of an earlier rollout, or of a sampler that was not updated",
        "another temperature in sampling than in training, or dropout left on",
        "log-probs shifted by a token",
    ),
    tries=(
        "`old_logprobs = trainer`",
        "compare the log-probs of one response, token by token, from both passes before anything is trained",
    ),
)
SAMPLER_LAW = Kind(
    name="sampler-law",
    severity="fault",
    title="The sampler draws from another law than the trainer scores",
    when="the logarithm of `sampler_ratio` (`sampler_mismatch` where that was not measured) at the first iteration "
    f"above {SAMPLER_LIMIT['float32']:g} nats a token in fp32, {SAMPLER_LIMIT['bfloat16']:g} in bf16",
    causes=(
        "another temperature, top-k or top-p in sampling than in the log-probs",
        "a sampler of another precision, or quantised",
        "another chat template, or prompts cut differently, on one side",
    ),
    tries=("the same temperature and no top-k or top-p on both sides", "`decoding.precision` as `policy.precision`"),
)
SAMPLER_STALE = Kind(
    name="sampler-stale",
    severity="fault",
    title="The sampler's weights are not the policy's",
    when="`sampler_mismatch` within its limit at the first iteration, above it later, and grown to "
    f"{STALE_GROWTH:g} times",
    causes=(
        "the sampler is not given the new weights after an update, or a part of them (adapters, tied embeddings)",
        "rollouts are taken from an earlier iteration",
    ),
    tries=("load the weights into the sampler before each rollout", "merge adapters before the weights are handed on"),
)
KL_NEGATIVE = Kind(
    name="kl-negative",
    severity="fault",
    title="The KL from the reference is negative",
    when=f"`kl` summed over the responses of consecutive iterations below -{KL_SURPRISE:g} nats, the mean below "
    f"-{KL_ROUNDING:g} a response: by chance less than once in a million runs",
    causes=(
        "responses are not drawn from the policy whose log-probs are taken: stale weights, another temperature",
        "padding or the end token is counted on one side only",
        "the difference is taken the wrong way round",
    ),
    tries=(
        "look at `sampler_mismatch` (with `old_logprobs = sampler`, which does not measure it, at `first_log_ratio`): "
        "near 0, the sampler is right and the sum is wrong",
        "sum log pi - log ref of one response by hand, over its tokens with the end token and without padding",
    ),
)
REWARD_SUM = Kind(
    name="reward-does-not-add-up",
    severity="fault",
    title="The reward is not the score less the penalties",
    when="`reward` differs from `score` - `kl_coef` `kl` - the truncation penalty by more than "
    f"{REWARD_TOLERANCE:g} of the largest of them",
    causes=(
        "the KL penalty has the wrong sign: the policy is paid for leaving the reference",
        "the penalty counts padding, or the score is added at more places than one",
    ),
    tries=("hold the rewards of one response against Eq. 2: the KL term at each token, the score once, at the last",),
)
REFERENCE = Kind(
    name="reference-moves",
    severity="fault",
    title="The reference moves with the policy",
    when=f"`kl` stays below {SAME_WEIGHTS:g} nats a token while `approx_kl` shows that the policy is trained",
    causes=(
        "reference and policy share their weights",
        "the reference is loaded anew from the policy, or adapters are left on in it",
    ),
    tries=("load the reference as a model of its own, freeze it, and compare its weights before and after a step",),
)
UNMOVED = Kind(
    name="policy-not-moving",
    severity="fault",
    title="The policy does not change",
    when=f"`kl` below {SAME_WEIGHTS:g} nats a token in all of {UNMOVED_ITERATIONS} iterations or more; in DPO every "
    "`margin` 0",
    causes=(
        "a learning rate of 0, or so low that fp32 weights do not take it up",
        "the parameters are frozen, or the optimizer holds others than those of the model",
        "the advantages are all 0: every response has the same score",
        "with one optimizer step an iteration, whose `approx_kl` is 0 always: the reference moves with the policy",
    ),
    tries=("look at `learning_rate` and `grad_norm`", "raise `policy.learning_rate` tenfold"),
)
DPO_BEGINS = Kind(
    name="dpo-start",
    severity="fault",
    title="DPO does not begin with the loss of two equal models",
    when="the first `loss` is not log 2 (for IPO, 1 / (2 beta)^2), though policy and reference are one model: off by "
    f"more than a margin H of {DPO_START['float32']:g} nats in fp32, {DPO_START['bfloat16']:g} in bf16, makes of it: "
    "H beta / 2 (for IPO, H / beta + H^2)",
    causes=(
        "the reference is another model, or dropout is on in one pass",
        "log-probs are means in one place and sums in the other, or the prompt is counted",
    ),
    tries=("compare policy and reference log-probs of one pair before the first step: they must be equal",),
)


def stopped(measured: Measured) -> Finding | None:
    """What stopped the stage, by the name of the finding where the check knows it."""
    if measured.stopped is None:
        return None
    known = {kind.name: kind for kind, _ in (*OF_EVERY_STAGE, *OF_PPO)}
    after = f" after step {measured.rows[-1]['step']}" if measured.rows else ""
    kind = known.get(measured.stopped.get("finding", ""), STOPPED)
    return kind.seen(f"The run stopped{after}: {measured.stopped['message']}")


def not_finite(measured: Measured) -> Finding | None:
    for row in measured.rows:
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                return NOT_FINITE.seen(f"{name} is {value} at step {row['step']}.")
    return None


def ratio_not_1(measured: Measured) -> Finding | None:
    drift, limit = measured.series("first_log_ratio"), _limit(RATIO_LIMIT, measured)
    bad = [(step, value) for step, value in zip(drift.steps, drift.values, strict=True) if value > limit]
    if not bad:
        return None
    step, worst = max(bad, key=lambda found: found[1])
    return RATIO.seen(
        f"In {len(bad)} of {len(drift)} iterations log-probs had changed before anything was trained, by "
        f"{number(worst)} nats a token at iteration {step} (allowed: {limit:g})."
    )


def sampler_law(measured: Measured) -> Finding | None:
    """Another law is far off at some tokens, rounding a little at all: the mean of the ratios weighs the former."""
    ratio, limit = measured.series("sampler_ratio"), _limit(SAMPLER_LIMIT, measured)
    apart = Series(ratio.steps, tuple(math.log(value) for value in ratio.values if value > 0))
    apart = apart or measured.series("sampler_mismatch")
    if not apart or apart.values[0] <= limit:
        return None
    return SAMPLER_LAW.seen(
        f"At iteration {apart.steps[0]}, with the same weights, sampler and trainer are "
        f"{number(apart.values[0])} nats a token apart (allowed: {limit:g})."
    )


def sampler_stale(measured: Measured) -> Finding | None:
    mismatch, limit = measured.series("sampler_mismatch"), _limit(SAMPLER_LIMIT, measured)
    if not mismatch or mismatch.values[0] > limit:
        return None
    most = mismatch.worst_mean(1)
    if most.mean <= max(limit, STALE_GROWTH * mismatch.values[0]):
        return None
    return SAMPLER_STALE.seen(
        f"The log-probs of sampler and trainer differ by {number(mismatch.values[0])} nats a token at iteration "
        f"{mismatch.steps[0]} and by {number(most.mean)} at iteration {most.span} (allowed: {limit:g})."
    )


def kl_negative(measured: Measured) -> Finding | None:
    kl, each = measured.series("kl"), int(measured.setting("batch_size", 1))
    lowest = _lowest_sum(kl)
    if not lowest or lowest.mean > -KL_ROUNDING or each * sum(lowest.values) > -KL_SURPRISE:
        return None
    return KL_NEGATIVE.seen(
        f"Mean {number(lowest.mean)} nats a response over iterations {lowest.span}: over {each * len(lowest)} "
        f"responses that is {number(each * sum(lowest.values))} nats, where chance reaches -{KL_SURPRISE:g}."
    )


def _lowest_sum(series: Series) -> Series:
    """The consecutive values with the lowest sum (Kadane)."""
    best, lowest, start, total = (0, 0), 0.0, 0, 0.0
    for place, value in enumerate(series.values):
        if total > 0:
            start, total = place, 0.0
        total += value
        if total < lowest:
            best, lowest = (start, place + 1), total
    return series.part(*best)


def reward_does_not_add_up(measured: Measured) -> Finding | None:
    if not measured.config:
        return None
    penalty = 0.0
    if measured.setting("truncated", "penalty") == "penalty":
        penalty = float(measured.setting("truncation_penalty", 0.0))
    wrong = list[tuple[float, int, float, float]]()
    turned = 0
    rows = measured.together("reward", "score", "kl_coef", "kl", "truncated_rate")
    for step, (reward, score, kl_coef, kl, truncated) in rows:
        judged = score - penalty * truncated
        allowed = REWARD_TOLERANCE * max(1.0, abs(score), abs(kl_coef * kl), abs(reward))
        off = abs(reward - (judged - kl_coef * kl))
        if off > allowed:
            wrong.append((off, step, reward, judged - kl_coef * kl))
            turned += abs(reward - (judged + kl_coef * kl)) <= allowed
    if not wrong:
        return None
    _, step, reward, expected = max(wrong)
    sign = " With the KL penalty's sign turned it adds up." if turned == len(wrong) else ""
    return REWARD_SUM.seen(
        f"In {len(wrong)} of {len(rows)} iterations; at iteration {step} the reward is {number(reward)}, where score, "
        f"KL and truncation come to {number(expected)}.{sign}"
    )


def reference_moves(measured: Measured) -> Finding | None:
    kl, step_size = _still_kl(measured), measured.series("approx_kl")
    if kl is None or not step_size or step_size.mean <= MOVES:
        return None
    return REFERENCE.seen(
        f"In {len(kl)} iterations the KL stays within {number(max(map(abs, kl.values)))} nats a response, though each "
        f"changes log-probs (approx_kl {number(step_size.mean)} nats a token)."
    )


def policy_not_moving(measured: Measured) -> Finding | None:
    if measured.stage == "dpo":
        margin = measured.series("margin")
        if len(margin) < UNMOVED_ITERATIONS or max(map(abs, margin.values)) > SAME_WEIGHTS:
            return None
        return UNMOVED.seen(f"The margin is 0 in all of {len(margin)} steps.")
    kl, step_size = _still_kl(measured), measured.series("approx_kl")
    if kl is None or (step_size and step_size.mean > MOVES):
        return None
    rate = measured.series("learning_rate")
    at = f" at a learning rate of up to {number(max(rate.values))}" if rate else ""
    single = measured.setting("minibatches", 0) * measured.setting("inner_epochs", 0) == 1
    either = " Or the reference moves with the policy: approx_kl, taken before the only step, cannot tell."
    return UNMOVED.seen(
        f"In {len(kl)} iterations the KL stays within {number(max(map(abs, kl.values)))} nats a response{at}."
        + (either if single else "")
    )


def _still_kl(measured: Measured) -> Series | None:
    """The KL, if it never leaves rounding."""
    rows = measured.together("kl", "response_tokens")
    if len(rows) < UNMOVED_ITERATIONS or any(abs(kl) > SAME_WEIGHTS * max(1.0, tokens) for _, (kl, tokens) in rows):
        return None
    return measured.series("kl")


def dpo_start(measured: Measured) -> Finding | None:
    loss = measured.series("loss")
    if not loss or loss.steps[0] != 0 or not measured.config:  # which loss it is, its config alone says
        return None
    beta, margin = float(measured.setting("beta", 0.1)), _limit(DPO_START, measured)
    expected, limit = LOG_2, margin * beta / 2
    if measured.setting("variant") == "ipo":  # (h - 1 / (2 beta))^2
        expected, limit = (1 / (2 * beta)) ** 2, margin / beta + margin**2
    if abs(loss.values[0] - expected) <= max(limit, LOSS_ROUNDING * max(1.0, expected)):
        return None
    return DPO_BEGINS.seen(f"The loss of step 0 is {loss.values[0]:.4f}, where two equal models have {expected:.4f}.")


def _limit(limits: dict[str, float], measured: Measured) -> float:
    return limits["bfloat16" if measured.in_bfloat16 else "float32"]


# In the order in which to look at them: what is wrong further up explains what is wrong below.
OF_EVERY_STAGE: Sequence[tuple[Kind, Check]] = ((STOPPED, stopped), (NOT_FINITE, not_finite))
OF_PPO: Sequence[tuple[Kind, Check]] = (
    (RATIO, ratio_not_1),
    (SAMPLER_LAW, sampler_law),
    (SAMPLER_STALE, sampler_stale),
    (REWARD_SUM, reward_does_not_add_up),
    (KL_NEGATIVE, kl_negative),
    (REFERENCE, reference_moves),
    (UNMOVED, policy_not_moving),
)
OF_DPO: Sequence[tuple[Kind, Check]] = ((DPO_BEGINS, dpo_start), (UNMOVED, policy_not_moving))
