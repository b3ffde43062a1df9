"""How far is too far: a sweep over beta and the course of one policy are told apart, and notes keep clear."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.report.conftest import measured

from tastemaker.errors import DataError
from tastemaker.report.distance import UNJUDGED, View, distance
from tastemaker.report.families import Inks
from tastemaker.report.notes import Box, Note, place_notes
from tastemaker.report.reading import read_run


def views_of(out: Path) -> dict[str, View]:
    run = read_run(out)
    inks = Inks.for_models((model.name, model.kind) for model in run.results.models)
    return {view.name: view for view in distance(run, inks)}


def change_rows(out: Path, changes: dict[str, object], *, only: Sequence[str] = ()) -> None:
    path = out / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    for row in results["over_optimization"]:
        if not only or row["policy"] in only:
            row |= changes
    path.write_text(json.dumps(results), encoding="utf-8")


def notes(view: View, panel: int) -> list[str | None]:
    drawn = ElementTree.fromstring(view.panels[panel])
    return [node.text for node in drawn.iter("text") if node.get("class") == "note"]


def places(view: View, panel: int) -> list[tuple[float, float]]:
    """The points in the order in which they are joined."""
    path = next(
        node for node in ElementTree.fromstring(view.panels[panel]).iter("path") if "line" in str(node.get("class"))
    )
    pairs = (pair.split() for pair in str(path.get("d"))[1:].split("L"))
    return [(float(x), float(y)) for x, y in pairs]


def test_a_checkpoint_is_no_point_of_the_sweep(course_run: Path) -> None:
    views = views_of(course_run)
    assert list(views) == ["sweep", "course"]
    for panel in (0, 1):
        assert sorted(map(str, notes(views["sweep"], panel))) == ["sft", "β 0", "β 0.1", "β 1.5"]
        # The average of the weights was never a station of training.
        assert sorted(map(str, notes(views["course"], panel))) == ["120", "30", "60", "sft"]


def test_a_course_is_joined_in_the_order_of_training(course_run: Path) -> None:
    # KL 0, 4, 9.4, 9: by root 0, 2, 3.066, 3, so that the path turns back at its end.
    xs = [x for x, _ in places(views_of(course_run)["course"], 0)]
    zero, far = xs[0], xs[2]
    assert xs[1] - zero == pytest.approx((far - zero) * 2 / 9.4**0.5, abs=0.11)
    assert xs[3] - zero == pytest.approx((far - zero) * 3 / 9.4**0.5, abs=0.11)
    sweep = [x for x, _ in places(views_of(course_run)["sweep"], 0)]
    assert sweep == sorted(sweep)


def test_where_training_began_is_drawn_hollow_and_once(course_run: Path) -> None:
    for view in views_of(course_run).values():
        for panel in view.panels:
            dots = [node.get("class") for node in ElementTree.fromstring(panel).iter("circle")]
            assert dots.count("dot hollow") == 1
            assert dots[0] == "dot hollow"
        assert "the hollow one is the start, sft" in view.note
    change_rows(course_run, {"start": None})
    for view in views_of(course_run).values():
        assert not any("hollow" in panel for panel in view.panels)
        assert "hollow" not in view.note


def test_what_the_course_shows_in_words(course_run: Path) -> None:
    course = views_of(course_run)["course"]
    assert course.title == "While b0 trains"
    # An interval of half width 0.1 gives the numbers two decimals.
    assert course.finding == (
        "Gold is highest (1.60) after 30 iterations, at 4 nats; at the end, 9 nats, it is 0.40: it has over-optimised."
    )
    change_rows(course_run, {"proxy": 0.8}, only=["b0"])
    assert "by the reward model's score too" in views_of(course_run)["course"].finding
    change_rows(course_run, {"gold": {"value": 0.4, "ci95": [-1.0, 3.0]}}, only=["b0"])
    assert "may be chance" in views_of(course_run)["course"].finding
    change_rows(course_run, {"gold": 1.9}, only=["b0"])
    assert views_of(course_run)["course"].finding == "b0 is at its best by the gold score at the end."
    change_rows(course_run, {"gold": 0.0}, only=["b0", "b0-030", "b0-060"])
    assert "Gold is highest (1.10) at the beginning, at 0 nats" in views_of(course_run)["course"].finding


def test_policies_of_one_beta_are_no_sweep(course_run: Path) -> None:
    change_rows(course_run, {"beta": 0.1})
    assert list(views_of(course_run)) == ["course"]
    change_rows(course_run, {"state": "finished"})
    views = views_of(course_run)
    assert list(views) == ["models"]
    assert len(ElementTree.fromstring(views["models"].panels[0]).findall(".//circle")) == 7


def test_policies_of_another_reward_are_another_sweep(course_run: Path) -> None:
    """Their scores are on another scale: not joined, and the furthest is held against the best of its own reward."""
    results = json.loads((course_run / "results.json").read_text(encoding="utf-8"))
    finished = [row | {"reward": "main"} for row in results["over_optimization"] if row["state"] == "finished"]
    # Further away than all of `main`, with a lower gold and, on its own scale, a far lower score.
    others = [
        row | {"policy": f"{row['policy']}-o", "reward": "other", "start": None, "kl": 2 * row["kl"], "proxy": proxy}
        for row, proxy in zip(finished, (-7.0, -8.0, -9.0), strict=True)
    ]
    results["models"] |= {row["policy"]: {"kind": "policy"} for row in others}
    (course_run / "results.json").write_text(json.dumps(results | {"over_optimization": finished + others}))
    sweep = views_of(course_run)["sweep"]
    assert sweep.finding == (
        "With the reward main gold is highest (1.70) at 2 nats; the policy that went furthest, 9 nats, is at 0.40: "
        "it has over-optimised. "
        "With the reward other gold is highest (1.70) at 4 nats; the policy that went furthest, 18 nats, is at 0.40: "
        "it has over-optimised."
    )
    drawn = ElementTree.fromstring(sweep.panels[0])
    points = [(group.get("class"), len(group.findall("circle"))) for group in drawn.iter("g")]
    assert [one for one in points if one[1]] == [("f-ppo v0", 4), ("f-ppo v1", 3)], "sft is on the scale of main alone"
    assert [node.text for node in drawn.iter("text") if node.get("class") == "label"] == ["ppo, main", "ppo, other"]
    alike = [row | {"beta": 0.1 if row["reward"] == "main" else 0.2} for row in finished + others]
    (course_run / "results.json").write_text(json.dumps(results | {"over_optimization": alike}))
    assert "sweep" not in views_of(course_run), "one coefficient a reward is none"


def test_two_points_are_no_finding(course_run: Path) -> None:
    """One of two is always the better; from three on there is a shape to speak of."""
    results = json.loads((course_run / "results.json").read_text(encoding="utf-8"))

    def keep(*names: str) -> None:
        rows = [row for row in results["over_optimization"] if row["policy"] in names]
        changed = results | {"over_optimization": [row | {"start": None} for row in rows]}
        (course_run / "results.json").write_text(json.dumps(changed), encoding="utf-8")

    keep("b0", "b0_1", "b1_5", "b0-030", "b0-060")
    assert all(view.finding for view in views_of(course_run).values())
    keep("b0", "b0_1", "b0-030")
    assert [view.finding for view in views_of(course_run).values()] == ["", ""]
    change_rows(course_run, {"gold": None})
    assert [view.finding for view in views_of(course_run).values()] == [UNJUDGED, UNJUDGED]


def test_a_policy_and_its_average_are_neither_joined_nor_compared(course_run: Path) -> None:
    """One policy, 0.306 nats away, and the average of its weights, which has hardly moved and has the higher gold."""
    results = json.loads((course_run / "results.json").read_text(encoding="utf-8"))
    rows = [row for row in results["over_optimization"] if row["policy"] in {"b0", "b0-ema"}]
    rows[0] |= {"kl": 0.306, "gold": measured(0.2, 0.5), "proxy": measured(-0.66, 0.4)}
    rows[1] |= {"kl": 0.0, "gold": measured(0.5, 0.5), "proxy": measured(-0.52, 0.4)}
    models = {row["policy"]: {"kl": row["kl"], "proxy_score": row["proxy"], "gold": row["gold"]} for row in rows}
    (course_run / "results.json").write_text(
        json.dumps({"models": models, "over_optimization": rows}), encoding="utf-8"
    )
    views = views_of(course_run)
    assert list(views) == ["models"]
    assert views["models"].finding == ""
    for panel in views["models"].panels:
        classes = [str(node.get("class")) for node in ElementTree.fromstring(panel).iter("path")]
        assert not [name for name in classes if name.startswith("line")]
    assert_texts_keep_clear(views["models"])


def test_names_of_many_models_keep_clear_of_the_axis(course_run: Path) -> None:
    results = json.loads((course_run / "results.json").read_text(encoding="utf-8"))
    models = {f"model-{place}": {"kl": 0.1 * place, "proxy_score": 0.01 * place} for place in range(29)}
    (course_run / "results.json").write_text(json.dumps(results | {"models": models, "over_optimization": []}))
    assert_texts_keep_clear(views_of(course_run)["models"])


def assert_texts_keep_clear(view: View) -> None:
    for panel in view.panels:
        drawn = ElementTree.fromstring(panel)
        height = float(str(drawn.get("viewBox")).split()[3])
        boxes = [box_of_text(node) for node in drawn.iter("text")]
        assert all(box.top >= 0 and box.bottom <= height for box in boxes)
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlap(other)


def box_of_text(node: ElementTree.Element) -> Box:
    """About where a text's letters are: 0.58 of the size wide each and 0.72 high, above the line they stand on."""
    words, size = "".join(node.itertext()), 11.5
    x, y, width = float(str(node.get("x"))), float(str(node.get("y"))), 0.58 * size * len(words)
    left = {"end": x - width, "middle": x - width / 2}.get(str(node.get("text-anchor")), x)
    return Box(left, y - 0.72 * size, left + width, y)


def test_a_state_that_does_not_exist_is_an_error(course_run: Path) -> None:
    change_rows(course_run, {"state": "halfway"})
    with pytest.raises(DataError, match=r"'halfway'; it must be one of 'finished', 'checkpoint', 'ema'"):
        read_run(course_run)


def box_of(note: Note, at: tuple[float, float]) -> Box:
    return Box(at[0] - note.width / 2, at[1] - 0.8 * note.size, at[0] + note.width / 2, at[1] + 0.24 * note.size)


def test_notes_by_hand() -> None:
    # A whisker from 40 to 60 about (50, 50): above it, the baseline is 7 off its end.
    one = Note(x=50, y=50, high=40, low=60, width=20, size=10)
    wide = Box(0, 0, 100, 100)
    assert place_notes([one], points=[], lines=[], bounds=wide) == [(50, 33)]
    # Where something is drawn there, below: 7 off, and the letters' height of 8.
    assert place_notes([one], points=[], lines=[Box(48, 20, 52, 34)], bounds=wide) == [(50, 75)]
    # Two notes of one point: the second takes the other side; a third has 11 to the right, on the middle line.
    assert place_notes([one] * 3, points=[], lines=[], bounds=wide) == [(50, 33), (50, 75), (71, 52.8)]
    # No room at all: left out.
    assert place_notes([one], points=[wide], lines=[], bounds=wide) == [None]
    assert place_notes([one], points=[], lines=[], bounds=Box(45, 45, 55, 55)) == [None]


POINTS = st.lists(st.tuples(st.integers(20, 380), st.integers(30, 220), st.integers(0, 20)), min_size=1, max_size=15)


@given(POINTS, st.integers(6, 40))
def test_notes_never_lie_on_each_other_or_outside(points: list[tuple[int, int, int]], width: int) -> None:
    wanted = [Note(x=x, y=y, high=y - up - 4, low=y + up + 4, width=width, size=10.5) for x, y, up in points]
    dots = [Box(x - 4, y - 4, x + 4, y + 4) for x, y, _ in points]
    bounds = Box(0, 20, 400, 240)
    placed = place_notes(wanted, points=dots, lines=[], bounds=bounds)
    assert placed[0] is not None or len(points) > 1
    boxes = [box_of(note, at) for note, at in zip(wanted, placed, strict=True) if at is not None]
    assert all(box.inside(bounds) for box in boxes)
    assert all(one.overlap(other) < 1.0001 for one, other in itertools.combinations([*boxes], 2))
    assert all(box.overlap(dot) < 1.0001 for box in boxes for dot in dots)
