"""`like = "OTHER"` in a recipe: a variant takes another's settings and says only what is different."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tastemaker.commands.options import parse
from tastemaker.commands.whole import run
from tastemaker.config import from_mapping, load_recipe, resolve_likes, to_json
from tastemaker.errors import ConfigError
from tastemaker.recipe import Recipe
from tastemaker.stages.ppo import PpoConfig

Tables = dict[str, dict[str, Any]]

RECIPE = """
name = "r"
base.model = "./m"
prompts.source = "p.jsonl"
comparisons.sources = ["sft/plain"]
text = { source = "t.txt", held_out = "h.txt" }

[sft.plain]
epochs = 2
optimizer.learning_rate = 1e-4
optimizer.precision = "bfloat16"

[sft.mixed]
like = "plain"
pretraining_mix = 0.1
optimizer.learning_rate = 3e-4

[reward.main]
init = "plain"
batch_size = 8

[reward.pairs]
like = "main"
grouping = "pairs"

[policy.without]
like = "b0_01"
kl_coef = 0.0
keep_every = 5

[policy.b0_01]
kind = "ppo"
init = "mixed"
reward = "main"
iterations = 10
kl_coef = 0.01
decoding = { max_new_tokens = 32 }

[policy.hot]
like = "without"
decoding.temperature = 1.5

[evaluation]
pairs = [["policy", "shown"]]

[evaluation.contestants]
policy = { model = "policy/hot", stop_texts = ["q:", "z:"] }

[evaluation.contestants.shown]
like = "policy"
stop_texts = ["a:"]
few_shot = { template = "{prompt} {response} ", shots = 3 }
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_every_section_of_variants_has_it(recipe: Path) -> None:
    read = load_recipe(recipe, Recipe)
    mixed, pairs, evaluation = read.sft["mixed"], read.reward["pairs"], read.evaluation
    assert (mixed.epochs, mixed.pretraining_mix) == (2, 0.1)
    assert (mixed.optimizer.learning_rate, mixed.optimizer.precision) == (3e-4, "bfloat16")  # merged key by key
    assert (pairs.init, pairs.batch_size, pairs.grouping) == ("plain", 8, "pairs")
    assert evaluation is not None
    shown = evaluation.contestants["shown"]
    assert (shown.model, shown.stop_texts) == ("policy/hot", ("a:",))  # a list is replaced whole
    assert shown.few_shot is not None
    assert shown.few_shot.shots == 3


def test_like_of_a_like_and_of_what_comes_later(recipe: Path) -> None:
    policies = load_recipe(recipe, Recipe).policy
    assert list(policies) == ["without", "b0_01", "hot"]  # the order of the file is the order of the run
    without, plain, hot = (policies[name] for name in ("without", "b0_01", "hot"))
    assert isinstance(without, PpoConfig)
    assert isinstance(plain, PpoConfig)
    assert isinstance(hot, PpoConfig)
    assert [(one.init, one.kl_coef, one.keep_every) for one in (without, plain, hot)] == [
        ("mixed", 0.0, 5),
        ("mixed", 0.01, None),
        ("mixed", 0.0, 5),
    ]
    assert (hot.decoding.max_new_tokens, hot.decoding.temperature) == (32, 1.5)
    assert (without.decoding.temperature, plain.decoding.temperature) == (1.0, 1.0)


def test_nothing_of_it_is_left(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert '"like"' not in json.dumps(to_json(load_recipe(recipe, Recipe)))
    run([str(recipe), "--out", "out", "--fields"])
    printed = capsys.readouterr().out
    assert "[policy.hot.decoding]" in printed
    assert "like =" not in printed


def test_an_option_changes_the_one_that_it_names(recipe: Path) -> None:
    """By then nothing is known of who was like whom."""
    read = parse(Recipe, ["--sft.plain.epochs", "7"], "run", default=load_recipe(recipe, Recipe))
    assert (read.sft["plain"].epochs, read.sft["mixed"].epochs) == (7, 2)


def test_a_hyphen_is_the_same_key() -> None:
    tables: Tables = {
        "a": {"kl_coef": 1, "policy": {"learning-rate": 2}},
        "b": {"like": "a", "kl-coef": 3, "policy": {"learning_rate": 4}},
        "c": {"like": "b", "kl_coef": 5},
    }
    resolved = resolve_likes(tables, where="policy")
    assert resolved["b"] == {"kl_coef": 3, "policy": {"learning-rate": 4}}
    assert resolved["c"] == {"kl_coef": 5, "policy": {"learning-rate": 4}}


def test_a_table_and_a_value_replace_each_other() -> None:
    tables: Tables = {"a": {"x": 1, "y": {"z": 2}}, "b": {"like": "a", "x": {"z": 3}, "y": 4}}
    assert resolve_likes(tables, where="t")["b"] == {"x": {"z": 3}, "y": 4}


@pytest.mark.parametrize(
    ("policies", "says"),
    [
        (
            'b0_1.like = "b0_01"\nb0_001.kind = "ppo"',
            "policy: b0_1: like: 'b0_01' was given; it must name another of these tables. Did you mean 'b0_001'?",
        ),
        (
            'a.like = "zzzz"\nbb.kind = "ppo"\ncc.kind = "dpo"',
            "policy: a: like: 'zzzz' was given; it must name another of these tables. Known: bb, cc.",
        ),
        ('a.like = ["b"]\nb.kind = "ppo"', "policy: a: like: ['b'] was given; it must name another of these tables."),
        ('a.like = "b"', "policy: a: like: 'b' was given; it must name another of these tables. There is no other."),
        ('a.like = "b"\nb = 3', "policy: a: like: 'b' was given; it must name another of these tables. There is no"),
        ('a.like = "a"', "policy: 'a' is like 'a', a circle; one of them must do without 'like'."),
        (
            'a.like = "b"\nb.like = "c"\nc.like = "b"',
            "policy: 'b' is like 'c' is like 'b', a circle; one of them must do without 'like'.",
        ),
        (
            'a = { kind = "dpo", init = "s" }\nb = { like = "a", bta = 1 }',
            "policy: b: unknown key 'bta'. Did you mean 'beta'?",
        ),
        ('a = { kind = "dpo", init = "s", optimizer = { like = "b" } }', "policy: a: optimizer: unknown key 'like'."),
    ],
)
def test_what_is_wrong_is_said(policies: str, says: str) -> None:
    data = tomllib.loads(f'name = "r"\nbase.model = "m"\nprompts.source = "p"\n[policy]\n{policies}\n')
    with pytest.raises(ConfigError) as raised:
        from_mapping(Recipe, data, where="r.toml")
    assert str(raised.value).startswith(f"r.toml: {says}")


@pytest.mark.parametrize("section", ["base", "evaluation", "comparisons"])
def test_a_section_that_is_no_variant_has_no_like(section: str) -> None:
    data = tomllib.loads(f'name = "r"\nbase.model = "m"\nprompts.source = "p"\n{section}.like = "x"\n')
    with pytest.raises(ConfigError, match=f"r.toml: {section}: unknown key 'like'"):
        from_mapping(Recipe, data, where="r.toml")


NAMES = ["a", "b", "c", "d", "e"]
LEAF = st.one_of(st.integers(-3, 3), st.lists(st.integers(0, 2), max_size=3))
INNER = st.dictionaries(st.sampled_from(["x", "y"]), LEAF)
TABLE = st.fixed_dictionaries({}, optional={"p": LEAF, "q": LEAF, "inside": INNER, "other": INNER})
LIKES = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(NAMES))


def leaves(table: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in table.items():
        flat |= (
            {(key, *path): leaf for path, leaf in leaves(value).items()} if isinstance(value, dict) else {(key,): value}
        )
    return flat


@given(st.fixed_dictionaries({name: TABLE for name in NAMES}), LIKES, st.permutations(NAMES))
def test_settings_are_the_others_and_over_them_its_own(own: Tables, likes: dict[str, str], order: list[str]) -> None:
    """Written down flat, a variant is the union of its line, the later winning; a line without end is refused."""
    lines = {name: [name] for name in NAMES}
    for line in lines.values():
        while line[0] in likes and len(line) <= len(NAMES):
            line.insert(0, likes[line[0]])
    tables = {name: own[name] | ({"like": likes[name]} if name in likes else {}) for name in order}
    given = copy.deepcopy(tables)
    if any(len(line) > len(NAMES) for line in lines.values()):
        with pytest.raises(ConfigError, match="a circle"):
            resolve_likes(tables, where="t")
        return
    resolved = resolve_likes(tables, where="t")
    assert list(resolved) == order
    for name, line in lines.items():
        expected: dict[tuple[str, ...], Any] = {}
        for link in line:
            expected |= leaves(own[link])
        assert leaves(resolved[name]) == expected
    assert tables == given  # nothing was changed in place
    assert resolve_likes(resolved, where="t") == resolved
