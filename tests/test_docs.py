"""The documentation says what is so: links, command lines, settings, metrics, names of functions and dependencies.

When a test here fails after a change of the code, the page is usually what is wrong.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tastemaker.cli import COMMANDS
from tastemaker.commands.options import parse
from tastemaker.config import from_mapping, load_recipe
from tastemaker.metrics import METRICS
from tastemaker.ranges import parse_size

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
CONFIGS = {
    "sft": "tastemaker.stages.sft:SftConfig",
    "reward": "tastemaker.stages.reward:RewardConfig",
    "ppo": "tastemaker.stages.ppo:PpoConfig",
    "dpo": "tastemaker.stages.dpo:DpoConfig",
    "evaluation": "tastemaker.stages.evaluation:EvaluationConfig",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)

Row = list[str]


def text_of(page: Path) -> str:
    return COMMENT.sub("", page.read_text(encoding="utf-8"))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fenced(page: Path, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(text_of(page)) if found == language]


def prose(page: Path) -> str:
    """A page without its code blocks; lines set in that hold links belong to lists."""
    text = FENCE.sub("", text_of(page))
    return "\n".join(line for line in text.splitlines() if not re.match(r"^ {4}(?!.*\]\()", line))


def section(page: Path, title: str) -> str:
    """What stands under a heading, up to the next one of its level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text_of(page), re.MULTILINE | re.DOTALL)
    assert found, f"{name_of(page)} has no section {title!r}"
    return found[1]


def table_rows(text: str) -> list[Row]:
    """The cells of every table row of a text, without headers and the rules below them."""
    lines = text.splitlines()
    rules = {place for place, line in enumerate(lines) if re.fullmatch(r"\|[-|: ]+\|", line)}
    headers = {place - 1 for place in rules}
    rows = [line for place, line in enumerate(lines) if line.startswith("|") and place not in rules | headers]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def quoted(cell: str) -> list[str]:
    """The words in backticks of a cell."""
    return re.findall(r"`([^`]+)`", cell)


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_lines(page: Path) -> Iterator[str]:
    """Lines of code that begin with `tastemaker`, continuations joined. Those with [options] are synopses."""
    code = [*FENCE.findall(text_of(page))]
    lines = "\n".join(body for _, body in code) + "\n"
    lines += "\n".join(line for line in text_of(page).splitlines() if line.startswith("    "))
    for line in lines.replace("\\\n", " ").splitlines():
        words = line.strip().removeprefix("$ ")
        if words.startswith("tastemaker ") and "[" not in words and "..." not in words:
            yield words


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    for label, target in LINK.findall(prose(page)):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{name_of(page)} links [{label}] to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(place), f"{name_of(page)} links to {target}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_functions_exist(page: Path) -> None:
    """A link such as [`losses.gae`](../src/tastemaker/losses.py) names something that is defined in that file."""
    for label, target in LINK.findall(text_of(page)):
        name = label.strip("`")
        if not label.startswith("`") or not target.endswith(".py") or "/" in name or name.endswith(".py"):
            continue
        module = ".".join((page.parent / target).resolve().relative_to(ROOT / "src/tastemaker").with_suffix("").parts)
        assert name.startswith(f"{module}."), f"{name_of(page)}: {name} is linked to {target}"
        inside = name.removeprefix(f"{module}.")
        defined = set(definitions((page.parent / target).read_text(encoding="utf-8")))
        assert inside in defined, f"{name_of(page)} speaks of {name}, which {target} does not define"


def definitions(source: str) -> Iterator[str]:
    """The names of functions and classes, and of methods as Class.method."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef))


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "line"),
    [pytest.param(page, line, id=f"{name_of(page)}: {line[:60]}") for page in PAGES for line in command_lines(page)],
)
def test_command_lines_parse(page: Path, line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    assert name in COMMANDS, f"{name_of(page)} shows `{line}`; there is no such command"
    if name == "run":
        parse_run(arguments)
    else:
        parse(options_of(name), arguments, name)


def options_of(name: str) -> type[Any]:
    """A command's dataclass of options: `_SftOptions` for `sft`."""
    module = importlib.import_module(f"tastemaker.commands.{COMMANDS[name][1]}")
    found = getattr(module, f"_{name.capitalize()}Options")
    assert isinstance(found, type)
    return found


def parse_run(arguments: list[str]) -> None:
    """A recipe, --out, and fields of the recipe. A recipe of the reader's own is taken to have the demo's fields."""
    from tastemaker.recipe import Recipe

    recipe, *rest = arguments
    assert recipe.endswith(".toml")
    if recipe.startswith("recipes/"):
        assert (ROOT / recipe).is_file()
    if "--max-memory" in rest:
        limit = rest.index("--max-memory")
        parse_size(rest[limit + 1], "max_memory")
        rest = rest[:limit] + rest[limit + 2 :]
    place = rest.index("--out")
    overrides = [word for word in rest[:place] + rest[place + 2 :] if word != "--fields"]
    known = ROOT / recipe if (ROOT / recipe).is_file() else ROOT / "recipes/tiny.toml"
    if overrides:
        parse(Recipe, overrides, "run", default=load_recipe(known, Recipe))


def test_readme_lists_every_command() -> None:
    listed = [
        quoted(row[0])[0].removeprefix("tastemaker ") for row in table_rows(section(ROOT / "README.md", "Commands"))
    ]
    assert sorted(listed) == sorted(COMMANDS)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


# --- code in pages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_blocks_are_valid(page: Path) -> None:
    from tastemaker.recipe import Recipe

    for code in fenced(page, "python"):
        compile(code, name_of(page), "exec")
    for code in fenced(page, "toml"):
        data = tomllib.loads(code)
        if {"name", "base", "prompts"} <= data.keys():
            from_mapping(Recipe, data, where=name_of(page))
    for code in fenced(page, "json"):
        rest = code.strip()
        while rest:  # several values may follow one another
            _, end = json.JSONDecoder().raw_decode(rest)
            rest = rest[end:].strip()


# --- settings and metrics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_settings_are_all_there_with_their_defaults(algorithm: str) -> None:
    module, name = CONFIGS[algorithm].split(":")
    config = getattr(importlib.import_module(module), name)
    page = ROOT / "docs/algorithms" / f"{algorithm}.md"
    rows = {quoted(row[0])[0]: row[1] for row in table_rows(section(page, "Settings"))}
    for setting, shown in rows.items():
        default = default_of(config, setting)
        expected = (
            "required" if default is dataclasses.MISSING else "unset" if default is None else f"`{spelled(default)}`"
        )
        assert shown == expected, f"{name_of(page)}: {setting} is {expected}, not {shown}"
    nested = {setting.partition(".")[0] for setting in rows}
    missing = [field.name for field in dataclasses.fields(config) if field.name not in nested]
    missing = [name for name in missing if f"`{name}" not in section(page, "Settings")]
    assert not missing, f"{name_of(page)} does not list {', '.join(missing)}"


def default_of(config: Any, setting: str) -> object:
    """A field's default; `policy.learning_rate` is a field of the default of `policy`."""
    head, _, rest = setting.partition(".")
    fields = {field.name: field for field in dataclasses.fields(config)}
    assert head in fields, f"there is no setting {setting}"
    value = fields[head].default if isinstance(config, type) else getattr(config, head)
    return default_of(value, rest) if rest else value


def spelled(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value).replace("'", '"')


@pytest.mark.parametrize("algorithm", [name for name in CONFIGS if name != "evaluation"])
def test_metrics_are_declared(algorithm: str) -> None:
    page = ROOT / "docs/algorithms" / f"{algorithm}.md"
    named = [name for row in table_rows(section(page, "Metrics")) for name in quoted(row[0])]
    assert named
    undeclared = [name for name in named if name not in METRICS]
    assert not undeclared, f"{name_of(page)} explains {', '.join(undeclared)}, which nothing writes"
    stage = (ROOT / f"src/tastemaker/stages/{algorithm}.py").read_text(encoding="utf-8")
    written = [name for name in METRICS if f'"{name}"' in stage]
    unexplained = [name for name in written if name not in named]
    assert not unexplained, f"{name_of(page)} does not explain {', '.join(unexplained)}"


# --- dependencies ---------------------------------------------------------------------------------------------------


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def package(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found
    return found[0].lower().replace("_", "-")


def test_every_dependency_has_its_reason() -> None:
    page = ROOT / "docs/dependencies.md"
    extras: dict[str, list[str]] = project()["project"]["optional-dependencies"]
    wanted = {
        "To run": sorted(package(line) for line in project()["project"]["dependencies"]),
        "Extras": sorted(package(line) for name, lines in extras.items() if name != "dev" for line in lines),
        "To develop": sorted(package(line) for line in extras["dev"]),
        "To build": sorted(package(line) for line in project()["build-system"]["requires"]),
    }
    for title, packages in wanted.items():
        rows = table_rows(section(page, title))
        assert sorted(quoted(row[0])[0] for row in rows) == packages, title
        assert all(len(row[-1]) > 10 for row in rows), f"{title}: a package without a reason"
    named = {quoted(row[0])[0]: quoted(row[1])[0] for row in table_rows(section(page, "Extras"))}
    for name, extra in named.items():
        assert name in [package(line) for line in extras[extra]]


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in pins)
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins.values()), "a local version or a path"
    asked = [*project()["project"]["dependencies"], *project()["build-system"]["requires"]]
    for extra in project()["project"]["optional-dependencies"].values():
        asked += extra
    assert not [name for name in map(package, asked) if name not in pins]
    assert list(pins) == sorted(pins)
