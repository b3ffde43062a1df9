"""Python functions named in recipes and on the command line: `module:function`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from tastemaker.errors import ConfigError


def load_function(path: str) -> Any:
    """The Python object named `module:attribute`."""
    module_name, _, name = path.partition(":")
    if not name:
        raise ConfigError(f"{path!r} does not name a function; write module:function.")
    try:
        return getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{path!r}: there is no module {error.name!r} to import.") from error
    except AttributeError as error:
        raise ConfigError(f"{path!r}: the module {module_name} has no {name!r}.") from error


def is_function_path(source: str) -> bool:
    """Whether a reward source names a Python function (`module:function`) rather than a model folder."""
    return ":" in source and not Path(source).exists() and not source.startswith("package:")
