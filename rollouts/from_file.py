"""Functions of the user's own, loaded from `path/to/file.py:function`."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollouts.rewards.contract import nearest, start_of


def load_function(spec: str, *, what: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:function` names; of a class without arguments an object.

    The file is loaded by itself; its folder is not put on the import path.

    Args:
        spec: path and name.
        what: what it is to be, for messages: "reward", "advantage", ...

    Raises:
        ValueError: no such file or function (with the nearest one there is), or not callable. What goes
            wrong inside the file is raised as it is.
    """
    path_text, _, name = spec.rpartition(":")
    path = Path(path_text).expanduser()
    if not path.is_file():
        neighbours = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ValueError(
            f"no {what} file {str(path)!r} in {str(Path.cwd())!r}{nearest(path.name, neighbours)}"
        )
    # Under a name of its own, and known to Python: dataclasses and pickle look modules up.
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=8).hexdigest()
    module_name = f"{what}_file_{digest}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except ImportError as error:
        raise ImportError(f"{what} file {path}: {error}") from error
    except SystemExit as error:  # would end the run as if all were well
        raise ValueError(
            f"{path} ends the program ({start_of(error)}) when it is loaded; put what runs as a script "
            "under if __name__ == '__main__'"
        ) from error
    functions = [key for key, value in vars(module).items() if callable(value)]
    if not hasattr(module, name):
        raise ValueError(
            f"{path} has no function {name!r}{nearest(name, functions)}; it has {functions}"
        )
    function = getattr(module, name)
    if inspect.isclass(function) and what == "reward":
        function = _instance(function, f"{path}:{name}")
    if not callable(function):
        raise ValueError(f"{name!r} in {path} is {start_of(function)}, not a function")
    return function


def _instance(kind: type, where: str) -> Any:
    """An object of a class that needs no arguments."""
    try:
        inspect.signature(kind).bind()
    except TypeError as error:
        raise ValueError(
            f"{where} is a class whose objects need arguments ({error}): write a line such as "
            f"reward = {kind.__name__}(...) in the file, and name that: "
            f"{where.rpartition(':')[0]}:reward"
        ) from error
    return kind()
