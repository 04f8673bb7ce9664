"""A step from a user's own file: `FILE.py:FUNCTION`.

The file is imported as a module of its own, with its folder on the path as when it is run; what stands under
`if __name__ == "__main__"` does not run. The function is called once. If it returns something that can be called, that
is the step, and so it is for `(step, model)`; if it returns anything else, the function itself is the step.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import ConfigError, suggest


def load_step(target: str) -> Callable[[], Any]:
    """The step that FILE.py:FUNCTION names. Raises `ConfigError` for a file or a function that is not there."""
    path, _, name = target.rpartition(":")
    if not path or not name.isidentifier():
        raise ConfigError(f"{target!r} names no step: write FILE.py:FUNCTION, as in train.py:step.")
    module = load_file(Path(path))
    function = getattr(module, name, None)
    if not callable(function):
        functions = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ConfigError(f"{path} has no function {name!r}. {suggest(name, functions)}")
    made = function()
    made = made[0] if isinstance(made, tuple) and made and callable(made[0]) else made
    return made if callable(made) else function


def load_file(path: Path) -> ModuleType:
    """Import a file under its own name."""
    if not path.is_file():
        raise ConfigError(f"there is no file {path}: write FILE.py:FUNCTION, with the path from here.")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise ConfigError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.resolve()))
    specification.loader.exec_module(module)
    return module
