"""Check rows that a caller names, and the names in a state that is loaded. Axis: K rows."""

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def integer_rows(name: str, index_K: ArrayLike) -> NDArray[np.int64]:
    """The rows as int64, of any shape; raise ValueError if they are not integers.

    Casting would take 1.7 for row 1, and a mask for rows 0 and 1. An empty list is no rows.
    """
    index_K = np.asarray(index_K)
    if index_K.size and index_K.dtype.kind not in "iu":
        values = index_K.ravel().tolist()
        wrong = next((value for value in values if not _is_integer(value)), values[0])
        raise ValueError(f"{name} must be integers, got {wrong!r} of {index_K.dtype}")
    return index_K.astype(np.int64)


def row_list(name: str, index_K: ArrayLike) -> NDArray[np.int64]:
    """`integer_rows` of one axis."""
    index_K = integer_rows(name, index_K)
    if index_K.ndim != 1:
        raise ValueError(f"{name} must be 1-d, got shape {index_K.shape}")
    return index_K


def check_names(state: Mapping[str, Any], names: Iterable[str], what: str) -> None:
    """Raise ValueError unless the state has these names and no others."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{what} must be a dict, got {state!r}")
    missing = sorted(set(names) - state.keys())
    unknown = sorted(map(str, state.keys() - set(names)))
    if missing or unknown:
        raise ValueError(
            f"{what} lacks {missing or 'nothing'} and has the unknown {unknown or 'nothing'}: "
            f"it was saved by another version, or is the state of something else"
        )


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
