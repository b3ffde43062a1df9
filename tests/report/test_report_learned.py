"""What it learned: the table of agreement, what stands in the figure, and measures that have no value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tastemaker.report.families import Inks
from tastemaker.report.learned import Learned, learned
from tastemaker.report.page import render
from tastemaker.report.reading import read_run

SHARE = {"ties_excluded": 0.75, "tie_is_half": 0.7, "tie_is_a_class": 0.6}


def measured(value: float, n: int) -> dict[str, Any]:
    return {"value": value, "ci95": [value - 0.02, value + 0.03], "n": n}


def row(n: int, **more: Any) -> dict[str, Any]:
    """Of n pairs, a seventh with a tie."""
    return {name: measured(value, n - n // 7 if name == "ties_excluded" else n) for name, value in SHARE.items()} | more


def learned_from(run: Path, agreement: dict[str, Any]) -> Learned:
    path = run / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"agreement": agreement}))
    found = learned(read_run(run), Inks())
    assert found is not None
    return found


@pytest.fixture
def whole(demo_run: Path) -> Learned:
    nobody = {"value": None, "reason": "nobody met two others"}
    return learned_from(
        demo_run,
        {
            "noise": 0.57,
            "training": row(2800, raters=8, alpha=measured(0.4, 2800), majority=nobody),
            "held_out": row(2100, raters=20, alpha=measured(0.413, 2100), majority=nobody),
            "training_against_held_out": row(9100, raters=8, other_raters=19, majority=measured(0.85, 3000)),
            "evaluation": {"held_out": row(11200, raters=17, majority=nobody)},
        },
    )


def test_a_row_a_pair_of_groups_and_a_column_a_measure(whole: Learned) -> None:
    assert whole.table is not None
    assert whole.table.columns == ("ties aside", "ties half", "ties as a class", "majority", "Krippendorff's \u03b1")
    rows = {(one.who, one.where): one for one in whole.table.rows}
    training = rows["Training raters with one another", ""]
    assert (training.raters, training.pairs) == ("8", "2,800"), (
        "pairs with ties too, though one measure leaves them out"
    )
    assert training.cells == (
        ("75%", "73\u201378%"),
        ("70%", "68\u201373%"),
        ("60%", "58\u201363%"),
        ("\u2013", ""),
        ("0.40", "0.38 to 0.43"),
    )
    across = rows["Training raters with held-out raters", ""]
    assert (across.raters, across.pairs) == ("8 with 19", "9,100")
    assert across.cells[3:] == (("85%", "83\u201388%"), ("", "")), "nothing was to be measured: no dash"
    final = rows["Held-out raters with one another", "the final comparisons"]
    assert (final.raters, final.pairs) == ("17", "11,200")
    models = [one for one in whole.table.rows if one.who.startswith(("Reward model", "RM "))]
    assert [one.who.partition(" with ")[2] for one in models[:2]] == ["training raters", "held-out raters"]
    assert all(cell == ("", "") for cell in models[0].cells[1:])
    assert whole.table.undefined == ("A dash under majority: nobody met two others",)
    assert whole.others == (("Noise of the simulated raters", "0.570"),)


def test_the_figure_holds_what_was_asked_of_the_same_responses(whole: Learned) -> None:
    assert whole.ladder is not None
    for label in ("Training raters", "Held-out raters", "Training with held-out", "new raters"):
        assert label in whole.ladder
    assert "final" not in whole.ladder
    assert whole.ladder.count(">Held-out raters<") == 1, "the judges of the evaluation saw other responses"


def test_the_page_shows_the_table(whole: Learned, demo_run: Path) -> None:
    page = render(read_run(demo_run))
    assert "Who agrees with whom" in page
    assert page.count("Training raters with held-out raters") == 1
    assert "A dash under majority: nobody met two others." in page


def test_a_run_of_before_has_the_measures_that_it_has(demo_run: Path) -> None:
    found = learned_from(demo_run, {"training": row(700)})
    assert found.table is not None
    assert found.table.columns == ("ties aside", "ties half", "ties as a class")
    assert found.table.rows[0].raters == ""


def test_one_way_of_counting_needs_no_table(bare_run: Path) -> None:
    found = learned_from(bare_run, {"training": measured(0.73, 500), "kappa": measured(0.4, 500), "spread": 0.3})
    assert found.table is None
    assert found.ladder is not None
    assert "Training raters: 73%" in found.ladder
    assert found.others == (("Kappa", "0.40 (0.38 to 0.43)"), ("Spread", "0.300"))


def test_nothing_measured_is_no_section(bare_run: Path) -> None:
    assert learned(read_run(bare_run), Inks()) is None
