"""The architecture holds: imports point down, lower layers start without torch, modules and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import tastemaker

PACKAGE = Path(tastemaker.__file__).parent
# From the ground up; a module may import those of its own layer (no cycles) and of the layers below.
LAYERS = (
    "errors processes ranges records shapes files config metrics artefacts console functions kept",
    "intervals statistics agreement personal_data store raters panel guidelines tinyworld tokenizer sources halves "
    "library_text settings model_places",
    "losses clipping packing attention llama head model shared_value lora checkpoint parallel memory recompute "
    "compiled",
    "generation training corpus scoring responses",
    "stages",
    "recipe preflight forecast inputs round round_comparisons round_evaluation evaluation_sampling pipeline report "
    "doctor labelling evaluation_alone inspection",
    "commands cli __main__",
)
LAYER = {name: number for number, layer in enumerate(LAYERS) for name in layer.split()}
WITHOUT_TORCH = [name for name, number in LAYER.items() if number <= 1 and (PACKAGE / f"{name}.py").exists()]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 60
ROOT = "tastemaker"


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name below the root."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


@cache
def imports(name: str) -> frozenset[str]:
    """What a module imports of ours, inside functions too; only what it needs for types alone is left out."""
    tree = modules()[name]
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            module = node.module or ""
            below = {f"{module}.{alias.name}" for alias in node.names}
            found |= {one if one.removeprefix(f"{ROOT}.") in modules() else module for one in below}
    return frozenset(one.removeprefix(f"{ROOT}.") for one in found if one.startswith(f"{ROOT}."))


def top(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_has_a_layer() -> None:
    assert {top(name) for name in modules() if name} - set(LAYER) == set()


@pytest.mark.parametrize("name", [name for name in modules() if name])
def test_imports_point_down(name: str) -> None:
    for used in imports(name):
        assert LAYER[top(used)] <= LAYER[top(name)], f"{name} imports {used}, which lies above it"


def test_there_are_no_cycles() -> None:
    graph = {name: imports(name) & set(modules()) for name in modules()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a cycle of imports: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for used in sorted(graph[name]):
                visit(used, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_stages_never_import_one_another() -> None:
    """Each stage is a file or a folder of `stages`; they meet only through records and artefacts."""
    for name in modules():
        if name.startswith("stages."):
            own = name.split(".")[1]
            others = {used for used in imports(name) if used.startswith("stages.") and used.split(".")[1] != own}
            assert others == set(), f"{name} imports {others}"


def test_the_labelling_application_is_a_face_of_the_store() -> None:
    for name in modules():
        if name.startswith("labelling"):
            assert {used for used in imports(name) if LAYER[top(used)] > 1 and top(used) != "labelling"} == set()
            assert "sqlalchemy" not in ast.dump(modules()[name]), f"{name} knows SQL"


def test_one_module_knows_of_other_processes() -> None:
    """`parallel` alone imports torch.distributed, and only inside functions: one process does without."""
    for name, tree in modules().items():
        named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                named |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Attribute):
                named.add(ast.unparse(node))
        assert name == "parallel" or not any(each.startswith("torch.distributed") for each in named), name
    at_the_top = [ast.unparse(node) for node in modules()["parallel"].body]
    assert not any("torch.distributed" in line.partition("\n")[0] and "import" in line for line in at_the_top)


def test_losses_import_nothing_of_ours() -> None:
    assert imports("losses") == set()


def test_the_check_sees_imports_inside_functions() -> None:
    at_the_top = {node.module for node in modules()["commands.people"].body if isinstance(node, ast.ImportFrom)}
    assert "tastemaker.store" not in at_the_top
    assert "store" in imports("commands.people")


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh Python holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_lower_layers_start_without_torch() -> None:
    names = sorted({*WITHOUT_TORCH, "store", "tinyworld"})
    loaded = loaded_by("\n".join(f"import tastemaker.{name}" for name in names))
    assert "tastemaker" in loaded
    assert loaded & {"torch", "transformers"} == set()


def test_commands_about_people_and_prompts_and_reports_start_without_torch() -> None:
    loaded = loaded_by(
        "import tastemaker.commands.intake, tastemaker.commands.people, tastemaker.labelling.serve, tastemaker.report\n"
        "import tastemaker.commands.doctor"
    )
    assert loaded & {"torch", "transformers"} == set()


def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_by("from tastemaker.cli import main\nmain(['--help'])")
    assert loaded & {"torch", "transformers", "scipy", "numpy", "sqlalchemy", "tyro", "rich"} == set()


@pytest.mark.parametrize(
    "arguments",
    [
        "sft --help",
        "reward --help",
        "ppo --help",
        "dpo --help",
        "run --help",
        "sft --model x/y --data d --out o --epoch 3",
        "sft --model x/y --data d --out o --epochs 0",
        "sft --model x/y --data no-such-file.jsonl --out o",
        "ppo --init ./no-such-model --reward m:f --data d --out o",
        "run no-such-recipe.toml --out o",
        "run recipe.toml --out o --max-memory plenty",
    ],
)
def test_what_trains_answers_questions_and_mistakes_without_torch(arguments: str) -> None:
    loaded = loaded_by(f"from tastemaker.cli import main\nmain({arguments.split()!r})")
    assert "tastemaker" in loaded
    assert loaded & {"torch", "transformers", "scipy", "sqlalchemy"} == set()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < MAX_FILE_LINES
    if "migrations" in path.parts:
        return  # the tables of a schema, one after another
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length < MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("name", list(modules()))
def test_every_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(modules()[name])


def test_pipeline_is_the_page_to_read_first() -> None:
    assert len((PACKAGE / "pipeline.py").read_text(encoding="utf-8").splitlines()) < 100
