"""The committed figures of two processes beside one, and the page that shows them."""

from __future__ import annotations

import json

from benchmarks import several_processes
from benchmarks.pages import between


def test_the_committed_page_is_what_the_committed_results_give() -> None:
    made = between(several_processes.PAGE, several_processes.BEGIN, several_processes.END)
    found = json.loads(several_processes.RESULTS.read_text(encoding="utf-8"))
    rendered = several_processes.render(found["processes"], found["versions"], found["stages"])
    assert made == rendered.strip(), "run python -m benchmarks.several_processes"
    assert [row["stage"] for row in found["stages"]] == ["sft", "reward", "dpo", "ppo"]
    assert all(row["difference"] < 1e-5 < row["moved"] for row in found["stages"])
