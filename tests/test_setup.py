"""Make's targets and the script that makes the environment, tried without installing anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[0].split()
TOOLS = ("cat", "cmp", "dirname", "grep", "uname")


def run(command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTHON"))}
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        env=clean | environment,
        stdin=subprocess.DEVNULL,
    )


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_target_has_a_recipe_of_scripts_that_exist(target: str) -> None:
    dry = run(["make", "-C", ROOT, "--no-print-directory", "-n", target])
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.strip()
    assert "Nothing to be done" not in dry.stdout
    for script in re.findall(r"\bscripts/[\w-]+", dry.stdout):
        assert os.access(ROOT / script, os.X_OK), f"{script} cannot be run"
    for recipe in re.findall(r"\brecipes/\S+", dry.stdout):
        assert (ROOT / recipe).is_file()


def test_unknown_target_fails() -> None:
    assert run(["make", "-C", ROOT, "-n", "no-such-target"]).returncode != 0


def test_every_target_is_in_the_help_and_every_make_in_the_docs_is_a_target() -> None:
    shown = run(["make", "-C", ROOT, "--no-print-directory", "help"]).stdout
    assert sorted(re.findall(r"^make (\w+)", shown, re.MULTILINE)) == sorted(set(TARGETS) - {"help"})
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", text, re.MULTILINE):
            assert target in TARGETS, f"{page.relative_to(ROOT)} speaks of `make {target}`"


def test_continuous_integration_makes_test() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.parametrize("script", ["scripts/check", "scripts/set-up", "scripts/test", ".ci/run"])
def test_shell_reads_the_script(script: str) -> None:
    read = run(["sh", "-n", ROOT / script])
    assert read.returncode == 0, read.stderr


# --- set-up ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What set-up needs of a checkout, beside a folder of tools without any Python."""
    for name in ("pyproject.toml", "constraints.txt", "scripts/set-up"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tools").mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, f"this test needs {tool}"
        (tmp_path / "tools" / tool).symlink_to(found)
    return tmp_path


def write_program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def set_up(clone: Path, purpose: str = "test", **environment: str) -> subprocess.CompletedProcess[str]:
    return run(["/bin/sh", clone / "scripts/set-up", purpose], PATH=str(clone / "tools"), **environment)


def pretend_ready(clone: Path, purpose: str) -> None:
    """An environment whose Python only notes how it was called, and the stamp of a finished set-up."""
    write_program(clone / ".venv/bin/python", f'echo "$*" >> "{clone}/calls"')
    parts = [(clone / name).read_bytes() for name in ("pyproject.toml", "constraints.txt", "scripts/set-up")]
    (clone / f".venv/ready-to-{purpose}").write_bytes(b"".join(parts))


def calls(clone: Path) -> str:
    path = clone / "calls"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def test_old_python_is_refused_with_a_way_out(clone: Path) -> None:
    write_program(clone / "tools/python3", 'if [ "$1" = --version ]; then echo "Python 3.9.2"; else exit 1; fi')
    done = set_up(clone)
    assert done.returncode == 1
    assert "Python 3.11 or later is needed, and the path has Python 3.9.2" in done.stderr
    assert "PYTHON=/path/to/python3.12 make test" in done.stderr
    assert not (clone / ".venv").exists()


def test_missing_python_is_said(clone: Path) -> None:
    assert "the path has no python3" in set_up(clone).stderr


def test_named_python_is_preferred(clone: Path) -> None:
    write_program(clone / "tools/python3", "exit 0")
    write_program(clone / "mine", f'echo "mine $*" >> "{clone}/calls"; [ "$1" = -c ]')
    done = set_up(clone, PYTHON=str(clone / "mine"))
    assert "mine -m venv" in calls(clone)
    assert done.returncode == 1
    assert "cannot make a virtual environment" in done.stderr


def test_unknown_purpose_is_refused(clone: Path) -> None:
    done = set_up(clone, "everything")
    assert (done.returncode, done.stderr) == (2, "usage: scripts/set-up run|test\n")


def test_ready_environment_is_left_alone(clone: Path) -> None:
    pretend_ready(clone, "test")
    assert set_up(clone, "test").returncode == 0
    assert set_up(clone, "run").returncode == 0  # what serves to test serves to run
    assert calls(clone) == ""


def test_environment_to_run_is_not_enough_to_test(clone: Path) -> None:
    pretend_ready(clone, "run")
    assert set_up(clone, "run").returncode == 0
    assert calls(clone) == ""
    assert set_up(clone, "test").returncode == 0
    assert "--editable .[datasets,dev,gguf,lora,postgresql]" in calls(clone)


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_changed_dependencies_are_installed_once(clone: Path, changed: str) -> None:
    pretend_ready(clone, "run")
    with (clone / changed).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert set_up(clone, "run").returncode == 0
    first = calls(clone)
    assert "pip install --quiet --no-deps" in first
    assert re.search(r"torch==[\d.]+$", first, re.MULTILINE)
    assert re.search(r"--editable \.$", first, re.MULTILINE)
    assert set_up(clone, "run").returncode == 0
    assert calls(clone) == first


def test_another_torch_is_taken_where_the_pinned_one_is_not_to_be_had(clone: Path) -> None:
    pretend_ready(clone, "nothing")
    program = f'echo "$*" >> "{clone}/calls"; case "$*" in *torch==*) exit 1;; esac'
    write_program(clone / ".venv/bin/python", program)
    done = set_up(clone, "run")
    assert done.returncode == 0, done.stderr
    assert re.search(r"torch>=[\d.]+$", calls(clone), re.MULTILINE)
    kept = (clone / ".venv/constraints.txt").read_text(encoding="utf-8")
    assert "torch==" not in kept
    assert "transformers==" in kept


def test_failed_installation_is_tried_again(clone: Path) -> None:
    pretend_ready(clone, "nothing")
    write_program(clone / ".venv/bin/python", 'case "$*" in *--editable*) exit 1;; esac')
    assert set_up(clone, "run").returncode != 0
    assert not (clone / ".venv/ready-to-run").exists()


def test_python_of_the_script_is_that_of_the_project() -> None:
    script = (ROOT / "scripts/set-up").read_text(encoding="utf-8")
    oldest = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert oldest
    assert f"sys.version_info < (3, {oldest[1]})" in script
    assert f"Python 3.{oldest[1]} or later is needed" in script


def test_torch_of_the_script_is_that_of_the_constraints() -> None:
    script = (ROOT / "scripts/set-up").read_text(encoding="utf-8")
    pinned = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned
    assert re.search(rf"^TORCH={re.escape(pinned[1])}\b", script, re.MULTILINE)
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert oldest
    assert re.search(rf"^TORCH_OLDEST={re.escape(oldest[1])}\b", script, re.MULTILINE)
