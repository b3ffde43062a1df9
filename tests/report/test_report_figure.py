"""Figures that stand alone: well-formed, whole in themselves, the same for the same run."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tastemaker.errors import ConfigError
from tastemaker.report.figure import figure, standalone
from tastemaker.report.reading import read_run

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_figures.py"
SVG = "{http://www.w3.org/2000/svg}"
NAMES = ("over-optimisation", "training-ppo-ptx", "training-dpo", "wins", "wins-sft")


def drawn(run: Path, name: str) -> ElementTree.Element:
    return ElementTree.fromstring(standalone(figure(read_run(run), name)))


def size(node: ElementTree.Element) -> tuple[float, float, float, float]:
    x, y, width, height = (float(node.get(name, "0")) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_whole_in_itself(demo_run: Path, name: str) -> None:
    text = standalone(figure(read_run(demo_run), name))
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert {node.tag.removeprefix(SVG) for node in root.iter()} <= {
        *("svg", "title", "desc", "style", "rect", "text", "tspan", "g", "line", "path", "circle")
    }
    # The only address is the name of the language.
    assert re.findall(r"\w+://[^\"\s]*", text) == ["http://www.w3.org/2000/svg"]
    for outside in ("@import", "url(", "href", "src=", "@font-face"):
        assert outside not in text
    style = "".join(node.text or "" for node in root.iter(f"{SVG}style"))
    assert "prefers-color-scheme: dark" in style
    assert len(text) < 60_000


@pytest.mark.parametrize("name", NAMES)
def test_every_class_of_a_figure_has_its_style(demo_run: Path, name: str) -> None:
    root = drawn(demo_run, name)
    style = root.findtext(f"{SVG}style") or ""
    used = {one for node in root.iter() for one in str(node.get("class") or "").split()}
    unstyled = {one for one in used if not re.search(rf"\.{re.escape(one)}\b", style)}
    assert unstyled == set()
    declared = set(re.findall(r"(--[\w-]+):", style))
    assert set(re.findall(r"var\((--[\w-]+)\)", style)) <= declared


@pytest.mark.parametrize("name", NAMES)
def test_drawings_lie_inside_and_beside_each_other(demo_run: Path, name: str) -> None:
    root = drawn(demo_run, name)
    panels = [size(node) for node in root.iter(f"{SVG}svg") if node is not root]
    assert len(panels) > 1
    _, _, right, bottom = size(root)
    assert root.get("viewBox") == f"0 0 {right:.1f} {bottom:.1f}"
    for one in panels:
        assert one[0] >= 0
        assert one[2] <= right
        assert one[3] <= bottom
    for place, one in enumerate(panels):
        for other in panels[place + 1 :]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    words = [node for node in root if node.tag == f"{SVG}text"]
    assert all(0 < float(str(node.get("y"))) < bottom for node in words)


def test_the_same_run_gives_the_same_bytes(demo_run: Path) -> None:
    for name in NAMES:
        assert standalone(figure(read_run(demo_run), name)) == standalone(figure(read_run(demo_run), name))


def test_what_each_figure_shows(demo_run: Path, course_run: Path) -> None:
    def headings(root: ElementTree.Element) -> list[str]:
        return [
            "".join(node.itertext()) for node in root.iter(f"{SVG}text") if node.get("class") in {"heading", "part"}
        ]

    assert headings(drawn(demo_run, "training-ppo-ptx")) == [
        "Score",
        "Reward",
        "KL from the referencenats a response",
        "Response lengthtokens",
        "Entropynats a token",
    ]
    # One policy needs no name beside each of its lines.
    assert not [node for node in drawn(demo_run, "training-ppo").iter(f"{SVG}text") if node.get("class") == "label"]
    assert [one for one in headings(drawn(demo_run, "wins")) if one.startswith("Against")] == [
        "Against base-large",
        "Against base-small",
        "Against base-large-4-shot",
        "Against sft",
    ]
    both = headings(drawn(course_run, "over-optimisation"))
    assert (both[0], both[3]) == ("At several strengths of the KL penalty", "While b0 trains")
    assert headings(drawn(course_run, "over-optimisation-course"))[0] == "While b0 trains"


def test_text_of_the_run_is_never_markup(demo_run: Path) -> None:
    path = demo_run / "results.json"
    hostile = "a</text><script>1</script>&b"
    path.write_text(path.read_text(encoding="utf-8").replace('"sft"', f'"{hostile}"'), encoding="utf-8")
    root = drawn(demo_run, "wins")
    assert not [node for node in root.iter() if "script" in node.tag]
    assert f"Against {hostile}" in [node.text for node in root.iter(f"{SVG}text")]


def test_a_figure_that_the_run_does_not_have(demo_run: Path, bare_run: Path) -> None:
    with pytest.raises(ConfigError, match=r"no figure 'pie'; there are over-optimisation"):
        figure(read_run(demo_run), "pie")
    with pytest.raises(ConfigError, match=r"'ppx'; it has those of dpo, ppo and ppo-ptx"):
        figure(read_run(demo_run), "training-ppx")
    with pytest.raises(ConfigError, match=r"'wins-nobody'; it has wins-base-large,"):
        figure(read_run(demo_run), "wins-nobody")
    for name in ("wins", "over-optimisation"):
        with pytest.raises(ConfigError, match="the run has nothing for"):
            figure(read_run(bare_run), name)


def test_the_script_writes_them(demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    out = tmp_path / "new" / "images"
    run(demo_run, "wins", "training-ppo", "--out", out)
    assert sorted(path.name for path in out.iterdir()) == ["tiny-training-ppo.svg", "tiny-wins.svg"]
    assert ElementTree.parse(out / "tiny-wins.svg").getroot().tag == f"{SVG}svg"
    with pytest.raises(SystemExit, match=r"^make_figures: there is no figure 'pie'"):
        run(demo_run, "pie", "--out", out)
