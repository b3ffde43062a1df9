"""Python functions named in recipes and on the command line: `module:function`.

Modules are looked for where Python looks, and in the folder that the command is run in.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tastemaker.errors import ConfigError
from tastemaker.files import is_saved_dataset


def load_function(path: str) -> Any:
    """The Python object named `module:attribute`."""
    module_name, _, name = path.partition(":")
    if not name or not module_name:
        raise ConfigError(f"{path!r} does not name a function; write module:function.")
    _look_here()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{path!r}: there is no module {error.name!r} to import. If a data set was meant, its owner is needed too, "
            "as OWNER/NAME:SPLIT."
        ) from error
    except Exception as error:  # a module of the user's own may raise anything while it is imported
        raise ConfigError(f"{path!r}: importing {module_name} fails with {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ConfigError(f"{path!r}: the module {module_name} has no {name!r}.")
    return getattr(module, name)


def function_fingerprint(path: str) -> str:
    """What a manifest remembers of a function: its name, and a hash of the file that its module stands in.

    What that file imports is not looked at. Of our own functions it is the name alone: a new version of ours is no
    reason to do everything again.
    """
    module_name = path.partition(":")[0]
    if module_name.partition(".")[0] == __package__:
        return path
    _look_here()
    try:
        spec = find_spec(module_name)
    except Exception:  # the modules above it are imported, and may raise anything; whoever loads it says so better
        return path
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return path
    return f"{path} {hashlib.md5(Path(spec.origin).read_bytes(), usedforsecurity=False).hexdigest()}"


def _look_here() -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def is_function_path(source: str) -> bool:
    """Whether a source or a reward names a Python function (`module:function`).

    Anything else with a colon in it is a path that exists, a data set (`OWNER/NAME:SPLIT`, or `FOLDER:SPLIT` of a saved
    one) or a model that a package brings.
    """
    module, colon, _ = source.partition(":")
    if not colon or "/" in module or module == "package" or Path(source).exists():
        return False
    return not is_saved_dataset(Path(module))
