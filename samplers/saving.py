"""Save states of planner, ledger, refill and posterior in one file that cannot execute anything.

NumPy's own format for arrays, JSON for the rest; both in one zip (`.npz`). For who uses `samplers`
alone: checkpoints of the trainers have their own form.
"""

import json
import math
import os
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PLAIN, _ARRAY, _FLOAT, _DICT = "plain", "__array__", "__float__", "__dict__"


def save_state(path: str | Path, state: Any) -> None:
    """Write a state as one file, whole or not at all; `load_state` gives it back exactly.

    The file is written beside its place, synced and renamed: after a kill there is the old file or
    the new one.

    Args:
        path: the file; its folder must exist. The name is used as it is.
        state: nested dicts with strings as keys, lists, arrays of numbers, booleans or strings, and
            numbers, strings, booleans or None. Tuples come back as lists, NumPy's numbers as Python's.

    Raises:
        TypeError: for anything else, naming its place in the state.
    """
    path = Path(path)
    arrays: dict[str, NDArray[Any]] = {}
    text = json.dumps(_plain(state, "state", arrays))
    columns = {f"array_{number}": array for number, array in enumerate(arrays.values())}
    handle, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            encoded = np.frombuffer(text.encode("ascii"), dtype=np.uint8)
            np.savez(file, allow_pickle=False, **{_PLAIN: encoded}, **columns)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def load_state(path: str | Path) -> Any:
    """What `save_state` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or was written by something else.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as columns:
            value = json.loads(columns[_PLAIN].tobytes().decode("ascii"))
            return _rebuilt(value, columns)
    except FileNotFoundError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(f"{path} is damaged or holds no state of save_state: {error}") from error


def _plain(value: Any, place: str, arrays: dict[str, NDArray[Any]]) -> Any:
    """What JSON writes for this value; its arrays are put into `arrays`, by their places."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufcU":
            raise TypeError(f"{place} is an array of {value.dtype}; write numbers or strings")
        arrays[place] = value
        return {_ARRAY: len(arrays) - 1}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{place} has the key {key!r}; keys must be strings")
        plain = {key: _plain(item, f"{place}[{key!r}]", arrays) for key, item in value.items()}
        # A dict that looks like a mark of this file is marked as none.
        return {_DICT: plain} if len(plain) == 1 and {*plain} <= {_ARRAY, _FLOAT, _DICT} else plain
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{place}[{i}]", arrays) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{place} is a {type(value).__name__}; write an array or a plain value")


def _rebuilt(value: Any, columns: Any) -> Any:
    if isinstance(value, list):
        return [_rebuilt(item, columns) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_ARRAY}:
        return columns[f"array_{value[_ARRAY]}"]
    if value.keys() == {_FLOAT}:
        return float(value[_FLOAT])
    if value.keys() == {_DICT}:
        value = value[_DICT]
    return {key: _rebuilt(item, columns) for key, item in value.items()}


def _sync_folder(folder: Path) -> None:
    """Sync a folder so that a rename in it survives a crash, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
