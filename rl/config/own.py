"""Names of methods, and functions of the user's own: `path/to/file.py:function`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from rollouts.from_file import load_function

_loaded: dict[tuple[str, int], Callable[..., Any]] = {}


def nearest(word: str, known: Iterable[Any]) -> str:
    """' Did you mean X?' for the known name nearest to `word`, or nothing."""
    close = get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def choice(name: str, value: Any, known: Any, more: str = "") -> None:
    """Raise ValueError unless `value` is one of the known names; the message suggests the nearest.

    Args:
        more: what else may be written, as the end of the list.
    """
    if value not in known:
        raise ValueError(
            f"{name} must be one of {', '.join(map(str, known))}{more}, got {value!r}."
            f"{nearest(str(value), known)}"
        )


def is_own(name: Any) -> bool:
    """Whether this is `path/to/file.py:function` and not the name of a method."""
    return isinstance(name, str) and name.rpartition(":")[0].endswith(".py")


def load_own(name: str, *, what: str) -> Callable[..., Any]:
    """The function of a file, loaded once as long as the file stays as it is.

    Args:
        name: `path/to/file.py:function`, from the folder that the run is started in.
        what: the setting that names it, for messages.

    Raises:
        ValueError: if there is no such file or function, naming the nearest.
    """
    path = Path(name.rpartition(":")[0]).expanduser()
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    key = (f"{path.resolve()}:{name.rpartition(':')[2]}", changed)
    if key not in _loaded:
        _loaded[key] = load_function(name, what=what)
    return _loaded[key]


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters of a function that may still be given."""
    given = function.keywords if isinstance(function, partial) else {}
    return tuple(name for name in inspect.signature(function).parameters if name not in given)
