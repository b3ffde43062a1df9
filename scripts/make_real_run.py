"""Print the measured tables of docs/real-run.md from a finished run: `python scripts/make_real_run.py out/smollm2`.

What they mean is written in the page by hand; every number in them comes from the run's own files. The table of reward
models is by `benchmarks/reward_baselines.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tastemaker.files import read_prompts

SAMPLE_EVERY = 28  # prompts of the list, from which mild ones are chosen for the page
SAMPLE_CHARACTERS = 160


def main(run: Path) -> None:
    """Print the tables of the run in the folder `run`."""
    results = json.loads((run / "results.json").read_text("utf-8"))
    parts = [wins(results["comparisons"]), models(results["models"]), stages(results), samples(run)]
    print("\n\n".join("\n".join(lines) for lines in parts))


def wins(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """How often one contestant is preferred to another, plainly and at equal length."""
    rows = []
    for one in comparisons:
        equal_length = one["length_controlled"]
        rows.append(
            [f"{one['a']} over {one['b']}", percent(one["win_rate"], one["ci95"]), percent(*equal_length.values())]
        )
    return table(["a over b", "preferred (95 %)", "at equal length"], rows)


def models(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was measured of every contestant; a cell is empty where it was not."""
    columns: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
        "score of `main` (what PPO optimises)": lambda model: measured(model.get("proxy_score")),
        "KL from SFT, nats a response": lambda model: number(model["kl"], 2),
        "tokens": lambda model: number(model["mean_tokens"], 0),
        "ended by itself": lambda model: f"{100 * model['eos_rate']:.0f} %",
        "entropy, nats a token": lambda model: number(model["entropy"], 2),
        "held-out text loss": lambda model: number(model.get("heldout_text_loss"), 3),
    }
    rows = [[name, *(cell(model) for cell in columns.values())] for name, model in models.items()]
    return table(["model", *columns], rows)


def stages(results: Mapping[str, Any]) -> list[str]:
    """How long every stage took, and what the process held."""
    rows = [[stage["name"], f"{stage['seconds'] / 60:.0f}"] for stage in results["stages"]]
    peak = f"Peak memory {results['peak_memory_mb'] / 1024:.1f} GiB."
    return [*table(["stage", "minutes"], rows), "", peak, "", f"Versions: {json.dumps(results['versions'])}"]


def samples(run: Path) -> list[str]:
    """What each contestant responded to every so manieth prompt, in its first words."""
    evaluation = sorted(run.glob("round-*/7-evaluation"))[-1]
    asked = {one.key: one.messages[-1].content for one in read_prompts(evaluation.parent / "1-prompts/test.jsonl")}
    responses: dict[str, dict[str, str]] = {}
    for line in (evaluation / "responses.jsonl").read_text("utf-8").splitlines():
        one = json.loads(line)
        responses.setdefault(one["prompt"], {})[one["contestant"]] = one["response"]
    shown = []
    for key in list(responses)[::SAMPLE_EVERY]:
        shown += [f"**{one_line(asked[key])}**", "", *table(["", ""], [])]
        shown += [f"| {name} | {shortened(text)} |" for name, text in responses[key].items()] + [""]
    return shown


def one_line(text: str) -> str:
    """The text in one line that may stand in a table."""
    return " ".join(text.split()).replace("|", "\\|")


def shortened(text: str) -> str:
    """The first words of a text."""
    line = one_line(text)
    return line if len(line) <= SAMPLE_CHARACTERS else line[:SAMPLE_CHARACTERS].rsplit(" ", 1)[0] + " …"


def percent(value: float, ci95: Sequence[float]) -> str:
    """A share with its interval."""
    return f"{100 * value:.1f} % [{100 * ci95[0]:.1f}, {100 * ci95[1]:.1f}]"


def measured(estimate: Mapping[str, Any] | None) -> str:
    """A mean with its interval."""
    if estimate is None:
        return ""
    low, high = estimate["ci95"]
    return f"{estimate['value']:.2f} [{low:.2f}, {high:.2f}]"


def number(value: float | None, digits: int) -> str:
    """The number, if there is one; no minus before a zero."""
    return "" if value is None else f"{round(value, digits) + 0:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/make_real_run.py OUT, the folder of a finished run of recipes/smollm2.toml")
    main(Path(sys.argv[1]))
