"""Write docs/configuration.md and docs/metrics.md from the code: commands, config fields, metrics.

In docs/doctor.md the table of findings is made, between two marks.

scripts/make-docs            write them
scripts/make-docs --check    only say whether they are up to date (exit code 1 if not)
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import tyro

from tastemaker.cli import COMMANDS, EPILOGUE
from tastemaker.commands import doctor, inspecting, intake, people, sampling, training, whole
from tastemaker.doctor import KINDS
from tastemaker.metrics import METRICS
from tastemaker.recipe import Recipe

DOCS = Path(__file__).parent.parent / "docs"
OPTIONS = {
    "prompts": intake._PromptsOptions,
    "sample": sampling._SampleOptions,
    "inspect": inspecting._InspectOptions,
    "label": people._LabelOptions,
    "sft": training._SftOptions,
    "reward": training._RewardOptions,
    "ppo": training._PpoOptions,
    "dpo": training._DpoOptions,
    "evaluate": whole._EvaluateOptions,
    "report": whole._ReportOptions,
    "doctor": doctor._DoctorOptions,
}
POSITIONAL = get_args(tyro.conf.Positional[int])[1]
MADE = "<!-- made by scripts/make-docs; change the docstrings and run it again -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A field of a config: its name, its type as a reader knows it, its default and its meaning."""

    name: str
    kind: str
    default: str
    meaning: str


def entries(cls: type) -> list[Entry]:
    """The fields of a config, in order."""
    meanings, hints = field_docstrings(cls), typing.get_type_hints(cls)
    return [
        Entry(
            name=field.name,
            kind=describe(hints[field.name]),
            default=default_of(field),
            meaning=meanings.get(field.name, ""),
        )
        for field in dataclasses.fields(cls)
    ]


def field_docstrings(cls: type) -> dict[str, str]:
    """The strings that stand below the fields in a class body, joined to one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def describe(hint: Any) -> str:
    """A type in a reader's words."""
    plain = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path", type(None): "none"}
    origin, inner = get_origin(hint), get_args(hint)
    if hint in plain:
        return plain[hint]
    if dataclasses.is_dataclass(hint):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"  # type: ignore[union-attr]
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part) for part in inner)
    if origin is tuple and inner[1:] == (Ellipsis,):
        return f"list of {describe(inner[0])}"
    if origin is tuple:
        return "list: " + ", ".join(map(describe, inner))
    return f"table of {describe(inner[1])} by name"


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "empty"
    if field.default is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(field.default) and not isinstance(field.default, type):
        return changed_from(field.default)
    if field.default is None:
        return "none"
    if isinstance(field.default, tuple):
        return "empty" if not field.default else f"`{', '.join(map(short, field.default))}`"
    return f"`{short(field.default)}`"


def short(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return str(getattr(value, "name", type(value).__name__))
    return str(value).lower() if isinstance(value, bool) else str(value)


def changed_from(config: Any) -> str:
    """How a config that is a default differs from its own defaults."""
    changed = [
        f"{field.name} = {short(getattr(config, field.name))}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    ]
    return f"`{', '.join(changed)}`" if changed else "its defaults"


def configs(root: type) -> Iterator[type]:
    """A config and all that its fields hold, each once, in the order of the fields."""
    seen: list[type] = []

    def visit(hint: Any) -> None:
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            if hint not in seen:
                seen.append(hint)
                for inner in typing.get_type_hints(hint).values():
                    visit(inner)
        else:
            for inner in get_args(hint):
                visit(inner)

    visit(root)
    yield from seen


def table(rows: list[Entry]) -> list[str]:
    lines = ["| field | value | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        cells = (f"`{row.name}`", row.kind, row.default, row.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def configuration() -> str:
    """docs/configuration.md"""
    lines = [
        "# Configuration",
        "",
        MADE,
        "",
        "A recipe is a TOML file; its top level is [Recipe](#recipe), and every section below it is one of the",
        "tables that follow. An unknown key is an error that names the nearest known one. The recipe that ran is",
        "written whole to `OUT/recipe.json`, every default included.",
        "",
        "## Commands",
        "",
        *[f"- `tastemaker {name}`: {text}" for name, (text, _) in COMMANDS.items()],
        "",
        "```",
        EPILOGUE,
        "```",
        "",
    ]
    lines += [
        "### tastemaker run",
        "",
        "`tastemaker run RECIPE --out DIR` runs a recipe; finished stages are skipped while their inputs stay, and",
        "interrupted ones continue. Every field of the recipe can be set on the command line by its path, such as",
        "`--seed 1` or `--policy.ppo-ptx.kl-coef 0.05`. `--fields` prints the recipe with all of them, as a recipe.",
        "",
    ]
    for name, options in OPTIONS.items():
        lines += [f"### tastemaker {name}", "", *(inspect.getdoc(options) or "").splitlines(), ""]
        rows = [entry for entry in entries(options) if entry.name != "config"]
        lines += table([dataclasses.replace(row, name=option_name(options, row.name)) for row in rows])
        own = typing.get_type_hints(options).get("config")
        if own is not None:
            own = own.__base__ if own.__name__.startswith("_") else own  # the config as the command line takes it
            lines += [f"And every field of {describe(own)}, such as `--{option_of(own)}`.", ""]
    lines += [
        "## Like that one, but",
        "",
        "A variant (a named table of `sft`, `reward`, `policy` or `evaluation.contestants`) may take the settings of",
        "another of the same section and say only what is different:",
        "",
        "```toml",
        "[policy.strict]",
        'like = "ppo-ptx"',
        "kl_coef = 0.4",
        "```",
        "",
        "Tables inside, such as `optimizer`, are merged key by key; lists are replaced whole. The other may be like a",
        "third, and may come later in the file. What it sets cannot be taken away: let the fuller of two be like the",
        "plainer. All this is resolved when the file is read: `OUT/recipe.json` has every variant whole, and an option",
        "on the command line changes the variant that it names and none that is like it.",
        "",
        "## Sections of a recipe",
        "",
    ]
    for cls in configs(Recipe):
        lines += [f"### {cls.__name__}", "", *(inspect.getdoc(cls) or "").splitlines(), "", *table(entries(cls))]
    return "\n".join(lines).rstrip() + "\n"


def option_name(options: type, field: str) -> str:
    """`--field-name`, or FIELD where it is given by its place."""
    marks = getattr(typing.get_type_hints(options, include_extras=True)[field], "__metadata__", ())
    return field.upper() if POSITIONAL in marks else f"--{field.replace('_', '-')}"


def option_of(cls: type) -> str:
    numbers = [entry.name for entry in entries(cls) if entry.kind == "whole number"]
    return numbers[0].replace("_", "-")


def metrics() -> str:
    """docs/metrics.md"""
    rows = [f"| `{name}` | {metric.unit} | {metric.meaning} |" for name, metric in METRICS.items()]
    return "\n".join(
        [
            "# Metrics",
            "",
            MADE,
            "",
            "Every trained stage writes `metrics.jsonl`, one object a step: `step`, and those of these names that it",
            "has. A name that is not in this table cannot be written.",
            "",
            "| name | unit | meaning |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def with_findings(page: str) -> str:
    """docs/doctor.md with the table of findings as the code has it."""
    start, end = "<!-- findings: made by scripts/make-docs -->\n", "<!-- end of findings -->\n"
    before, _, rest = page.partition(start)
    _, mark, after = rest.partition(end)
    assert mark, f"docs/doctor.md lacks {start.strip()} or {end.strip()}"
    lines = ["| finding | what it says | when | likely causes | what to try |", "|---|---|---|---|---|"]
    for kind in KINDS:
        name = f"`{kind.name}`, {kind.severity}"
        cells = (name, kind.title, kind.when, "; ".join(kind.causes), "; ".join(kind.tries))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return before + start + "\n" + "\n".join(lines) + "\n\n" + end + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    check = parser.parse_args().check
    stale = []
    doctor_page = with_findings((DOCS / "doctor.md").read_text(encoding="utf-8"))
    for name, text in (("configuration.md", configuration()), ("metrics.md", metrics()), ("doctor.md", doctor_page)):
        path = DOCS / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    print(f"{'out of date' if check else 'written'}: {', '.join(stale)}" if stale else "up to date")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
