"""Metrics are declared with unit and meaning, written once a step, and survive a kill."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest

import tastemaker
from tastemaker.errors import TrainingError
from tastemaker.metrics import METRICS, MetricsWriter, read_metrics


def test_an_undeclared_name_is_refused(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(0, {"loss": 1.5})
    with pytest.raises(TrainingError, match="lost are not declared"):
        writer.write(1, {"loss": 1.0, "lost": 2.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.5}]


def test_resuming_writes_the_steps_after_the_checkpoint_anew(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    first = MetricsWriter(path)
    for step in range(5):
        first.write(step, {"loss": float(step)})
    second = MetricsWriter(path, resume_at=3)
    second.write(3, {"loss": 30.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    assert read_metrics(path) == [{"step": 0, "loss": 1.0}]
    MetricsWriter(path, resume_at=1).write(1, {"loss": 2.0})
    assert [row["loss"] for row in read_metrics(path)] == [1.0, 2.0]


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_every_row_is_standard_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(TrainingError, match="loss is nan"):
        MetricsWriter(path).write(0, {"loss": math.nan})
    assert read_metrics(path) == []


def test_every_metric_that_a_stage_writes_is_declared_and_every_declared_one_is_written() -> None:
    """Names are string literals in the layers that train, so they can be read off the source."""
    package = Path(tastemaker.__file__).parent
    files = [*(package / "stages").rglob("*.py"), *(package / "training").rglob("*.py")]
    written = {
        node.value
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert set(METRICS) - written == set()


def test_every_metric_has_a_unit_and_a_meaning() -> None:
    for name, metric in METRICS.items():
        assert metric.unit, name
        assert len(metric.meaning) > 10, name
        assert json.dumps(name).isascii()
