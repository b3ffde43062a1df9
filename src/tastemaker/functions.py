"""Python functions named in recipes and on the command line: `module:function`.

Modules are looked for where Python looks, and in the folder that the command is run in.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from tastemaker.errors import ConfigError


def load_function(path: str) -> Any:
    """The Python object named `module:attribute`."""
    module_name, _, name = path.partition(":")
    if not name or not module_name:
        raise ConfigError(f"{path!r} does not name a function; write module:function.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{path!r}: there is no module {error.name!r} to import.") from error
    except Exception as error:  # a module of the user's own may raise anything while it is imported
        raise ConfigError(f"{path!r}: importing {module_name} fails with {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ConfigError(f"{path!r}: the module {module_name} has no {name!r}.")
    return getattr(module, name)


def is_function_path(source: str) -> bool:
    """Whether a reward source names a Python function (`module:function`) rather than a model folder."""
    return ":" in source and not Path(source).exists() and not source.startswith("package:")
