"""Where a model lies, by the name that a user gives it: a folder, a GGUF file, a part of a Python package, the hub.

It only looks; `checkpoint` loads. So it needs no torch, and a path that is not there is refused before torch is loaded.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from tastemaker.errors import ModelError

PACKAGE_SCHEME = "package:"


def resolve_source(source: str) -> str:
    """A model source as the library understands it; `package:NAME/PATH` is a file that a Python package brings."""
    if not source.startswith(PACKAGE_SCHEME):
        return source
    package, _, inside = source.removeprefix(PACKAGE_SCHEME).partition("/")
    try:
        spec = find_spec(package)  # finds the package without running it
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"{source} names the Python package {package!r}, which is not installed.")
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.exists():
        raise ModelError(f"{source} names {path}, which the package {package!r} does not bring.")
    return str(path)


def model_source(source: str) -> Path | str:
    """A model that lies on this machine by its path, so that its content is what counts; any other by its name."""
    place = resolve_source(source)
    return Path(place) if Path(place).exists() else source


def check_policy(source: str) -> None:
    """Refuse what can be no language model: nothing there, or a folder without a config."""
    place = resolve_source(source)
    if place.endswith(".gguf"):
        check_gguf(Path(place))
    else:
        check_folder(place)


def check_folder(place: str) -> None:
    """Refuse what is neither a model's folder nor, by its form, a name on the hub."""
    path = Path(place)
    if path.is_file() and path.suffix == ".gguf":
        raise ModelError(
            f"{place} is a GGUF file, which holds a language model only; give the folder of a reward model here."
        )
    if path.is_file():
        raise ModelError(f"{place} is a file; give a model folder, a .gguf file or the name of a model on the hub.")
    if path.is_dir() and not (path / "config.json").exists():
        inside = path / "model"
        hint = f"; {inside} is one" if (inside / "config.json").exists() else ""
        raise ModelError(f"{place} is not a model folder: it has no config.json{hint}.")
    if not path.exists() and (place.startswith((".", "/", "~")) or place.count("/") != 1):
        raise ModelError(
            f"{place} does not exist; give a model folder, a .gguf file or the name of a model on the hub."
        )


def check_gguf(path: Path) -> None:
    """Refuse a GGUF file that is not there, or that nothing here can read."""
    if not path.exists():
        raise ModelError(f"{path} does not exist; give the path of a GGUF file.")
    if find_spec("gguf") is None:
        raise ModelError(f"reading {path} needs the gguf package: pip install 'tastemaker[gguf]'.")
