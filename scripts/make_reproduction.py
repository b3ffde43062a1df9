"""Write docs/reproduction.md from finished runs: `python scripts/make_reproduction.py out/demo-0 out/demo-1 ...`.

Every number in that page comes from a run's results.json; the prose around the tables is in this file.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "reproduction.md"
INTRODUCTION = """\
# What the laboratory runs showed

Each table is one recipe on the [tiny world](tinyworld.md); each column a training seed (data order, sampling, raters'
noise; the base models are the same). A claim holds if every interval it names lies wholly beyond its bound, and for no
other reason; the numbers of the claims are those of the paper's list in `claims`. Intervals are 95 % over prompts, and
say nothing of the variation between seeds: compare the columns for that.

The settings of `tiny` (how many rankings, the reward model's epochs and learning rate, the KL coefficient, the
checks of claim 7) were settled by looking at runs of seed 0, its test prompts included, the reward model's epochs
at the validation prompts of seed 2; then each seed was run once. Seed 1 is the fairest test. `LOG.md` has what was
tried.

Made by `python scripts/make_reproduction.py RUN...` from the runs' own `results.json`. The engines have changed since,
so that sums come in another order: `make demo` with the new ones shows the same claims for seed 0.

## What does not hold, and why

- **Claim 10, seed 2 of tiny:** PPO-ptx keeps more constraints than the supervised model by 9 points [-1, 18], which
  is not enough to tell; seeds 0 and 1 gave 26 and 13. How much is won depends on what that seed's reward model can
  see: counting the items of a list is the hardest.
- All other claims hold in all three seeds of tiny. They did not with one epoch on 3,000 prompts' rankings and a KL
  coefficient of 0.05: PPO then used the reward model's blind spots (it stopped counting the items of a list, and in
  one run answered every request for a tool with the same tool), claim 10 failed in all seeds, and seed 2 failed
  claims 1 to 3 too. Twice the rankings, three epochs and a coefficient of 0.2 mended it.
- **The default coefficient, overoptimization:** 0.4 may be better than 0.2 by more than a tenth (gold +0.07 [-0.02,
  0.16]); the two cannot be told apart. 0.05, which the recipes had before, is worse by 0.70, and 0.1 by 0.15.
- **Greedy decoding, at equal length:** against the few-shot large base the policy's advantage is one of manner; see the
  length-controlled figures in the win rates.
- **Asked plainly, the large base replies no better than the small one**, though its held-out text loss is clearly lower
  (by 0.034 nats [0.026, 0.044]): both imitate a web that is unhelpful. Behind few-shot prompts it is the better one.
- **Claim 8, small:** it is not borne out. On held-out pairs one pass over shuffled pairs is better than one over
  grouped ones (log loss -0.031 [-0.044, -0.017]) and three passes are as good. A model of half a million parameters on
  6,000 prompts is far from overfitting even after three passes, and grouping, which only makes an optimizer step's
  pairs more alike, then costs something. With 3,000 prompts, a higher learning rate and four passes shuffled pairs
  did overfit and grouped ones did not (log loss .626 against .575): the paper's finding, with more passes than it took
  there.
- **DPO, small:** at beta 0.1, from PPO's starting point, it ended 10 nats from its reference with much text that nobody
  would write, and was not preferred to the supervised model (49 % [47, 52], on the same test prompts). Where it
  starts, and 0.3 for beta, were then chosen by the score on validation prompts. It started from the supervised model's
  last epoch; since then policies start from the epoch that is selected, and this has not been run again.

The runs had one thread of a processor whose other core was busy. The large base was trained further after the runs of
tiny, and their evaluations were made again with it; nothing else in them depends on it. All evaluations were computed
once more from the kept responses and answers after two mends of their statistics (`CHANGELOG.md`), so the minutes
below lack their first time: 1.2 to 1.5 for tiny, 4.2 for small, 0.6 for overoptimization.

## Over-optimisation

Without a KL penalty the reward model's score rises to the end, while the true worth is soon below where it began,
and falls for good after a third of the run:

![Scores along one run without a KL penalty](images/overoptimization-over-optimisation-course.svg)

Over the penalties the true worth has its best at 0.2 to 0.4 (1 to 2 nats from the reference), and falls on both sides:

![Scores against KL, one point a penalty](images/overoptimization-over-optimisation-sweep.svg)
"""
REWARD_COLUMNS = (
    "accuracy, training raters",
    "accuracy, held-out raters",
    "by folds of raters: those trained on",
    "by folds of raters: those left out",
    "log loss",
)


def main(folders: list[Path]) -> None:
    """Write the page."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for folder in folders:
        results = json.loads((folder / "results.json").read_text("utf-8"))
        runs[results["recipe"]].append(results | {"folder": folder})
    parts = [INTRODUCTION]
    for recipe, results in runs.items():
        parts.append(section(recipe, sorted(results, key=lambda run: int(run["seed"]))))
    PAGE.write_text("\n".join(parts), "utf-8")
    print(f"wrote {PAGE}")


def section(recipe: str, runs: list[dict[str, Any]]) -> str:
    """One recipe: its cost, its claims by seed, its win rates by seed."""
    seeds = [f"seed {run['seed']}" for run in runs]
    lines = [f"## recipes/{recipe}.toml", "", cost(runs), "", "### Claims", ""]
    lines += table(["claim", *seeds], [claim_row(claim["id"], runs) for claim in runs[0]["claims"]])
    for claim in runs[0]["claims"]:
        lines += ["", f"**{claim['id']}. {claim['statement']}**", ""]
        checks = [check["description"].partition(":")[0] for check in claim["checks"]]
        lines += table(
            ["measured", *seeds], [check_row(claim["id"], place, runs, checks) for place in range(len(checks))]
        )
    lines += ["", "### Win rates (held-out raters; ties half)", ""]
    pairs = [(one["a"], one["b"], one["decoding"]) for one in runs[0]["comparisons"] if one["judge"] == "held-out"]
    lines += table(["a over b, decoding", *seeds], [win_row(pair, runs) for pair in pairs])
    for run in runs:
        lines += ["", f"### Models and reward models, seed {run['seed']}", ""]
        lines += table(
            ["model", "held-out text loss", "KL from the reference", "reward model's score", "gold", "tokens"],
            [model_row(name, model) for name, model in run["models"].items()],
        )
        lines += ["", *table(["reward model", *REWARD_COLUMNS], reward_rows(run["folder"]))]
    return "\n".join([*lines, ""])


def cost(runs: list[dict[str, Any]]) -> str:
    times = ", ".join(f"{sum(stage['seconds'] for stage in run['stages']) / 60:.1f}" for run in runs)
    memory = max(float(run["peak_memory_mb"]) for run in runs)
    return f"Minutes in all stages, by seed: {times}. Peak memory {memory / 1024:.1f} GiB."


def claim_row(claim_id: str, runs: list[dict[str, Any]]) -> list[str]:
    return [claim_id, *("holds" if find(run, claim_id)["holds"] else "does not hold" for run in runs)]


def check_row(claim_id: str, place: int, runs: list[dict[str, Any]], names: list[str]) -> list[str]:
    cells = []
    for run in runs:
        check = find(run, claim_id)["checks"][place]
        low, high = check["ci95"]
        cells.append(f"{check['value']:.3f} [{low:.3f}, {high:.3f}]{'' if check['holds'] else ' ✗'}")
    bound = find(runs[0], claim_id)["checks"][place]["description"].rpartition("needed ")[2]
    return [f"{names[place]} (needed {bound})", *cells]


def win_row(pair: tuple[str, str, str], runs: list[dict[str, Any]]) -> list[str]:
    cells = []
    for run in runs:
        one = next(
            row
            for row in run["comparisons"]
            if (row["a"], row["b"], row["decoding"], row["judge"]) == (*pair, "held-out")
        )
        low, high = one["ci95"]
        cells.append(
            f"{one['win_rate']:.3f} [{low:.3f}, {high:.3f}], at equal length {one['length_controlled']['win_rate']:.3f}"
        )
    return [f"{pair[0]} over {pair[1]}, {pair[2]}", *cells]


def model_row(name: str, model: dict[str, Any]) -> list[str]:
    score, gold = model["proxy_score"], model["gold"]
    cells = [model.get("heldout_text_loss"), model["kl"], score and score["value"], gold and gold["value"]]
    shown = ["" if cell is None else f"{abs(cell) if abs(cell) < 5e-4 else cell:.3f}" for cell in cells]
    return [name, *shown, f"{model['mean_tokens']:.1f}"]


def reward_rows(folder: Path) -> list[list[str]]:
    """One row a reward model: its accuracy on validation prompts, and by cross-validation where that was done."""
    rows = []
    for path in sorted(folder.glob("round-1/5-reward/*/results.json")):
        found = json.loads(path.read_text("utf-8"))
        held_out, folds = found["held_out_raters"], found.get("cross_validation")
        cells = [f"{one['accuracy']:.3f} [{one['ci95'][0]:.3f}, {one['ci95'][1]:.3f}]" for one in (found, held_out)]
        for group in ("training_raters", "held_out_raters"):
            cells.append(f"{folds[group]['mean']:.3f} ± {folds[group]['standard_error']:.3f}" if folds else "")
        rows.append([path.parent.name, *cells, f"{found['log_loss']:.3f}"])
    return rows


def find(run: dict[str, Any], claim_id: str) -> dict[str, Any]:
    return next(claim for claim in run["claims"] if claim["id"] == claim_id)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
