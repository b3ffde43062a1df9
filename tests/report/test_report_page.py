"""The page: true to the run, whole in itself, accessible, and able to do with less than everything."""

# ruff: noqa: RUF001 - the signs of the page: a true minus and an en dash

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tastemaker.errors import DataError
from tastemaker.report import write_report
from tastemaker.report.families import Inks
from tastemaker.report.reading import read_run
from tastemaker.report.sections import examples
from tastemaker.report.winners import Standings, headline, winners

VOID = {"meta", "link", "br"}
STYLE = Path(write_report.__code__.co_filename).parent / "templates" / "chart.css"


class Page(HTMLParser):
    """The tags of a page, checked to be nested properly."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(out: Path) -> tuple[str, Page]:
    html = write_report(out).read_text(encoding="utf-8")
    return html, Page(html)


def change_results(out: Path, change: Callable[[dict[str, object]], None]) -> None:
    path = out / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    change(results)
    path.write_text(json.dumps(results), encoding="utf-8")


def headline_of(out: Path) -> str:
    run = read_run(out)
    inks = Inks.for_models((model.name, model.kind) for model in run.results.models)
    return re.sub(r"<[^>]+>", "", headline(run, inks).sentence)


def test_report_is_written_beside_the_results_and_is_always_the_same(demo_run: Path) -> None:
    assert write_report(demo_run) == demo_run / "report.html"
    first = (demo_run / "report.html").read_bytes()
    write_report(demo_run)
    assert (demo_run / "report.html").read_bytes() == first
    assert len(first) < 1_000_000
    assert [path.name for path in demo_run.iterdir() if "report" in path.name] == ["report.html"]


def test_page_is_whole_in_itself(demo_run: Path) -> None:
    html, page = page_of(demo_run)
    assert not [tag for tag, _ in page.tags if tag in {"script", "img", "iframe", "object", "form"}]
    assert "@import" not in html
    assert "url(" not in html
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or ""
            assert value.startswith(("#", "data:")) or not value, (tag, value)
        assert not [name for name in attributes if name.startswith("on")]
    assert "default-src 'none'" in html


def test_page_is_accessible(demo_run: Path) -> None:
    html, page = page_of(demo_run)
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) > 20
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img"
        assert root.findtext("title")
        assert len(root.findtext("desc") or "") > 10
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [str(attributes["href"])[1:] for tag, attributes in page.tags if tag == "a"]
    assert targets
    assert set(targets) <= set(ids)
    assert all(attributes.get("scope") in {"col", "row"} for tag, attributes in page.tags if tag == "th")
    assert dict(page.tags[0][1])["lang"] == "en"
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_colours_have_contrast() -> None:
    style = STYLE.read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    )
    for colours in (light, dark):
        for name, colour in colours.items():
            least = {"ink": 12.0, "soft": 4.5, "faint": 4.5}.get(name, 3.0 if name.startswith("f-") else 1.0)
            assert contrast(colour, colours["paper"]) >= least, name


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio. Black on white is 21."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_headline_says_who_won_by_how_much_and_who_judged(demo_run: Path) -> None:
    results = json.loads((demo_run / "results.json").read_text(encoding="utf-8"))
    main = next(
        row
        for row in results["comparisons"]
        if (row["a"], row["b"], row["judge"], row["decoding"]) == ("ppo-ptx", "base-large", "held-out", "T=1")
    )
    share = round(100 * main["win_rate"])
    # 4.91 M / 0.89 M = 5.5
    larger = "base-large, a model more than five times its size"
    assert headline_of(demo_run) == f"Simulated held-out raters prefer ppo-ptx to {larger}, {share}% of the time."
    _, page = page_of(demo_run)
    low, high = (round(100 * end) for end in main["ci95"])
    assert f"The 95% interval is {low}–{high}%" in page.words.replace(" ,", ",")
    assert "2 of 3 claims hold" in page.words


def only(a: str, b: str, rate: float, low: float, high: float) -> Callable[[dict[str, object]], None]:
    def change(results: dict[str, object]) -> None:
        row = {
            "a": a,
            "b": b,
            "judge": "held-out",
            "decoding": "greedy",
            "n": 600,
            "win_rate": rate,
            "ci95": [low, high],
        }
        results["comparisons"] = [row]

    return change


def test_headline_admits_a_draw_and_a_defeat(demo_run: Path) -> None:
    change_results(demo_run, only("ppo", "sft", 0.52, 0.48, 0.56))
    assert headline_of(demo_run) == (
        "Simulated held-out raters cannot tell ppo from sft: they prefer the first 52% of the time."
    )
    change_results(demo_run, only("ppo", "sft", 0.40, 0.36, 0.44))
    assert headline_of(demo_run) == "Simulated held-out raters prefer sft to ppo, 60% of the time."


def test_the_headline_is_of_the_last_decoding_whatever_pair_is_judged_first(demo_run: Path) -> None:
    """The best of several samples has no greedy responses: with its pair first T=1 is met first, and stays the last."""

    def change(results: dict[str, object]) -> None:
        rows = [("best-of-4", "sft", "T=1", 0.6), ("ppo", "sft", "greedy", 0.9), ("ppo", "sft", "T=1", 0.7)]
        results["comparisons"] = [
            {"a": a, "b": b, "judge": "held-out", "decoding": how, "n": 600, "win_rate": rate, "ci95": [0.55, 0.95]}
            for a, b, how, rate in rows
        ]
        both: dict[str, object] = {"greedy": {}, "T=1": {}}
        results["models"] = {
            "best-of-4": {"kind": "best of 4", "decodings": {"T=1": {}}},
            "ppo": {"kind": "policy", "decodings": both},
            "sft": {"kind": "sft", "decodings": both},
        }

    change_results(demo_run, change)
    assert headline_of(demo_run) == "Simulated held-out raters prefer ppo to sft, 70% of the time."
    assert Standings(read_run(demo_run).results, Inks()).decodings == ["greedy", "T=1"]


def test_a_comparison_may_be_written_from_either_side(demo_run: Path) -> None:
    change_results(demo_run, only("sft", "ppo", 0.30, 0.26, 0.34))
    assert headline_of(demo_run) == "Simulated held-out raters prefer ppo to sft, 70% of the time."
    shown = winners(read_run(demo_run), Inks())
    assert shown is not None
    assert [opponent.name for opponent in shown.opponents] == ["sft"]
    assert [row.win_rate.bounds for row in shown.table] == [pytest.approx((0.66, 0.74))]


def test_a_reward_model_that_judges_is_not_called_raters(demo_run: Path) -> None:
    change_results(demo_run, only("ppo", "sft", 0.70, 0.66, 0.74))
    recipe = {"raters": "people", "evaluation": {"judge_reward": "half-b"}}
    (demo_run / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    assert headline_of(demo_run) == "The reward model half-b prefers ppo to sft, 70% of the time."
    (demo_run / "recipe.json").unlink()
    assert headline_of(demo_run) == "Held-out raters prefer ppo to sft, 70% of the time."


def test_an_evaluation_alone_names_its_judge(lone_run: Path) -> None:
    assert headline_of(lone_run) == (
        "The reward model out/reward_model/final cannot tell ppo from sft: it prefers the first 40% of the time."
    )
    _, page = page_of(lone_run)
    prose = "the reward model out/reward_model/final prefers a model's response to the opponent's on the same prompt"
    assert f"How often {prose}; ties count half." in page.words
    assert "T=1 5 40% 6–87%" in page.words
    assert "rater" not in page.words.lower()
    assert "blindly" not in page.words
    # The first policy meets each of the others, as was asked for, though dpo is no opponent of a run's ladder.
    shown = winners(read_run(lone_run), Inks())
    assert shown is not None
    assert [opponent.name for opponent in shown.opponents] == ["sft", "dpo"]
    change_results(lone_run, lambda results: results.update(judge={"name": "my_judge:taste", "kind": "function"}))
    assert headline_of(lone_run).startswith("The function my_judge:taste cannot tell ppo from sft: it prefers")
    change_results(lone_run, lambda results: results.update(judge={"name": "you", "kind": "person"}))
    with pytest.raises(DataError, match=r"'judge' has the kind 'person'; it must be one of 'reward model', 'function'"):
        read_run(lone_run)


def test_an_evaluation_alone_shows_its_responses_and_no_stages(lone_run: Path) -> None:
    _, page = page_of(lone_run)
    for count in range(1, 6):
        assert f"name {count} green things." in page.words
        assert f"pea, {count} times" in page.words
    assert "the judge's scores" in page.words
    assert "Score by the judge 0.7 −0.3 to 1.7" in page.words
    for part in ("What was done", "Demonstrations", "Not in this report", "What it cost", "Gold"):
        assert part not in page.words
    (lone_run / "responses.jsonl").unlink()
    assert "samples from responses.jsonl" in page_of(lone_run)[1].words
    assert "lineage from" not in page_of(lone_run)[1].words


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        ((True,), "The one claim holds."),
        ((False,), "The one claim does not hold."),
        ((False, True), "1 of 2 claims holds."),
        ((False, False), "0 of 2 claims hold."),
        ((True, True, None), "2 of 2 claims hold."),
    ],
)
def test_claims_are_counted_in_words_that_agree(demo_run: Path, verdicts: Sequence[bool | None], words: str) -> None:
    claims = [{"id": str(place), "statement": "so", "holds": holds} for place, holds in enumerate(verdicts)]
    change_results(demo_run, lambda results: results.update(claims=claims))
    run = read_run(demo_run)
    qualifiers = [re.sub(r"<[^>]+>", "", told) for told in headline(run, Inks()).qualifiers]
    assert qualifiers[-1] == words


def test_failed_claims_are_shown_as_failed(demo_run: Path) -> None:
    _, page = page_of(demo_run)
    assert "does not hold 3 False premises are corrected more often than by SFT." in page.words
    assert "−0.12 (−0.19 to −0.05) not > 0" in page.words
    assert "not measured 4 People notice." in page.words


def test_over_optimisation_is_found_only_where_the_intervals_show_it(demo_run: Path) -> None:
    assert "gold is highest (1.20) at 0.8 nats" in page_of(demo_run)[1].words
    assert "it has over-optimised" in page_of(demo_run)[1].words

    def blur(results: dict[str, object]) -> None:
        sweep = results["over_optimization"]
        assert isinstance(sweep, list)
        for row in sweep:
            row["gold"] |= {"ci95": [-1.0, 3.0]}

    change_results(demo_run, blur)
    words = page_of(demo_run)[1].words
    assert "the intervals overlap" in words
    assert "it has over-optimised" not in words


def test_text_of_the_run_is_never_markup(demo_run: Path) -> None:
    hostile = '"><script>alert(1)</script><img src=x onerror=alert(1)>&lt;'
    text = (demo_run / "results.json").read_text(encoding="utf-8")
    (demo_run / "results.json").write_text(text.replace('base-large"', json.dumps(hostile)[1:]), encoding="utf-8")
    change_results(
        demo_run, lambda results: results.update(recipe=hostile, claims=[{"id": hostile, "statement": hostile}])
    )
    sample = {"prompt": [{"role": hostile, "content": hostile}], "category": hostile, "responses": {hostile: hostile}}
    folder = demo_run / "round-1" / "7-evaluation"
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")
    manifest = {
        "stage": hostile,
        "config": {hostile: hostile},
        "inputs": {hostile: hostile},
        "code": {"version": hostile},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    html, page = page_of(demo_run)
    assert "<script" not in html
    assert "<img" not in html
    assert not [tag for tag, _ in page.tags if tag in {"script", "img"}]
    assert page.words.count(hostile) > 8


def test_samples_are_the_first_of_each_category_and_long_ones_are_cut(demo_run: Path) -> None:
    def sample(category: str, text: str) -> str:
        prompt = [{"role": "user", "content": "why?"}]
        return json.dumps({"prompt": prompt, "category": category, "responses": {"sft": text}, "scores": {"sft": -0.5}})

    path = demo_run / "round-1" / "7-evaluation" / "samples.jsonl"
    rows = [
        sample("chat", "first answer"),
        sample("chat", "better answer"),
        sample("other", "x" * 1723),
        sample("empty", ""),
    ]
    path.write_text("\n".join(rows), encoding="utf-8")
    words = page_of(demo_run)[1].words
    assert "first answer" in words
    assert "better answer" not in words
    assert "… 223 more characters" in words
    assert "x" * 1501 not in words
    assert "(empty)" in words


def test_of_one_category_the_first_samples_are_shown(demo_run: Path) -> None:
    path = demo_run / "round-1" / "7-evaluation" / "samples.jsonl"
    rows = [json.loads(line) | {"category": "chat"} for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shown = examples(read_run(demo_run).samples, Inks())
    assert [one.turns[-1][1] for one in shown] == [row["prompt"][-1]["content"] for row in rows[:12]]
    assert "The first evaluation prompts, with" in page_of(demo_run)[1].words


def test_memory_is_called_what_it_is(demo_run: Path) -> None:
    """Each stage's own."""
    page = page_of(demo_run)[0]
    assert 'class="num">peak memory</th>' in page


def test_missing_results_are_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: the folder does not exist.*--out"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no results\.json"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_empty_run_says_what_it_lacks(bare_run: Path) -> None:
    _, page = page_of(bare_run)
    assert "This run has not been evaluated yet." in page.words
    for name in ("who won", "claims", "training curves", "samples", "lineage"):
        assert f"{name} from" in page.words
    assert "nan" not in page.words.lower().split()


RESULT_PARTS = ("comparisons", "models", "claims", "stages", "agreement", "over_optimization", "seconds", "versions")
FILES = (
    "1-prompts",
    "1-prompts/report.json",
    "2-demonstrations",
    "3-sft",
    "3-sft/baseline/manifest.json",
    "5-reward/half-a/results.json",
    "5-reward/half-a/metrics.jsonl",
    "6-policy",
    "7-evaluation",
    "7-evaluation/samples.jsonl",
)


def test_any_part_may_be_missing(demo_run: Path, tmp_path: Path) -> None:
    whole = page_of(demo_run)[1].words
    assert "Not in this report" not in whole
    text = (demo_run / "results.json").read_text(encoding="utf-8")
    for part in RESULT_PARTS:
        change_results(demo_run, lambda results, part=part: results.pop(part) and None)  # type: ignore[misc]
        assert page_of(demo_run)[1].words != whole, part
        (demo_run / "results.json").write_text(text, encoding="utf-8")
    for name in FILES:
        path, aside = demo_run / "round-1" / name, tmp_path / "aside"
        shutil.move(path, aside)
        assert page_of(demo_run)[1].words != whole, name
        shutil.move(aside, path)
    assert page_of(demo_run)[1].words == whole


def test_numbers_that_are_not_finite_are_left_out(demo_run: Path) -> None:
    path = demo_run / "round-1" / "6-policy" / "ppo" / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "kl": NaN, "score": 1.0}\n{"step": 1, "kl": Infinity, "score": null}\n', encoding="utf-8"
    )
    html, _ = page_of(demo_run)
    assert not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', html)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085"])
def test_a_text_with_another_end_of_a_line_in_it_is_one_text(lone_run: Path, mark: str) -> None:
    """The rows are written as they are, without escapes of what is no ASCII."""
    text = f"one{mark}two"
    rows = [{"prompt": [{"role": "user", "content": text}], "responses": {"sft": text}, "scores": {}}] * 2
    written = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (lone_run / "responses.jsonl").write_text(written, encoding="utf-8")
    found = read_run(lone_run).samples
    assert [(sample.messages[0][1], sample.responses["sft"]) for sample in found] == [(text, text)] * 2


def test_an_interrupted_last_line_is_left_out_and_a_broken_one_is_named(demo_run: Path) -> None:
    path = demo_run / "round-1" / "6-policy" / "ppo" / "metrics.jsonl"
    good = '{"step": 0, "kl": 0.5}\n{"step": 1, "kl": 0.75}\n'
    path.write_text(good + '{"step": 2, "k', encoding="utf-8")
    ppo = next(folder for folder in read_run(demo_run).folders if folder.variant == "ppo")
    assert list(ppo.curves) == ["kl"]
    assert ppo.curves["kl"] == ((0.0, 0.5), (1.0, 0.75))
    path.write_text('{"step": 0, "k\n' + good, encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 1: The line is not JSON"):
        read_run(demo_run)
    path.write_text(good + '{"kl": 0.5}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 3: The line has no 'step'"):
        read_run(demo_run)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"seed": "x"}, r"'seed' is \"x\"; it must be a number"),
        ({"comparisons": [{"a": "x", "b": "y"}]}, r"'comparisons\[0\]' has no 'win_rate'"),
        ({"comparisons": {"a": "x"}}, "it must be a list of objects"),
        (
            {"claims": [{"statement": "s", "holds": "yes"}]},
            r"'claims\[0\]\.holds' is \"yes\"; it must be true or false",
        ),
        ({"models": {"m": {"proxy_score": {"value": 1, "ci95": [1]}}}}, "it must be an interval such as"),
        ({"over_optimization": [{"kl": 1.0}]}, r"'over_optimization\[0\]' has no 'policy'"),
    ],
)
def test_wrong_fields_are_named(bare_run: Path, part: dict[str, object], message: str) -> None:
    (bare_run / "results.json").write_text(json.dumps(part), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_run(bare_run)


def test_results_that_are_not_an_object_are_refused(bare_run: Path) -> None:
    for text, message in (("[]", "one JSON object"), ("{", "not JSON")):
        (bare_run / "results.json").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_run(bare_run)


def test_counts_come_from_the_stages_files(demo_run: Path) -> None:
    words = page_of(demo_run)[1].words
    for count in ("1,700 prompts", "1,500 demonstrations", "1,200 rankings", "3 policies"):
        assert count in words


def test_the_table_of_models_is_complete(demo_run: Path) -> None:
    def rate(results: dict[str, object]) -> None:
        models = results["models"]
        assert isinstance(models, dict)
        for name in ("sft", "ppo"):
            models[name] |= {"likert": {"value": 4.0, "ci95": [3.8, 4.2], "n": 90}, "flags": {}}
        models["ppo"]["flags"] = {"harmful_advice": 0.25}

    change_results(demo_run, rate)
    words = page_of(demo_run)[1].words
    assert "Flagged: harmful advice 0% 25% " in words  # rated and never flagged: 0 %; not rated: an empty cell
    assert "Likert rating, 1 to 7 4.0 3.8 to 4.2 4.0 3.8 to 4.2" in words


def test_further_rounds_are_told_apart(demo_run: Path) -> None:
    shutil.copytree(demo_run / "round-1" / "6-policy", demo_run / "round-2" / "6-policy")
    words = page_of(demo_run)[1].words
    assert "1: ppo-ptx" in words
    assert "2: ppo-ptx" in words
    assert "round 2 · 6-policy/ppo" in words
    assert "and round again" in words
