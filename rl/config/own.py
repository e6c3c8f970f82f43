"""Names of methods, and functions of the user's own: `path/to/file.py:function`.

Axes: N rollouts, K rows kept, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rollouts.batch import Rollouts
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


def own_advantage(advantage: Any, rollouts: Rollouts, *, name: str) -> torch.Tensor:
    """What a function of the user's own gave, if it can be trained on.

    Raises:
        ValueError: naming the function, if it is no float tensor of one row per rollout.
        FloatingPointError: if it is not finite.
    """
    shapes = [(len(rollouts),), tuple(rollouts.mask_NT.shape)]
    if not isinstance(advantage, torch.Tensor) or tuple(advantage.shape) not in shapes:
        got = tuple(advantage.shape) if isinstance(advantage, torch.Tensor) else type(advantage)
        raise ValueError(f"advantage {name} must return a tensor of shape {shapes[0]}, got {got}")
    if not advantage.dtype.is_floating_point:
        raise ValueError(f"advantage {name} must return floats, got {advantage.dtype}")
    if not bool(advantage.isfinite().all()):
        raise FloatingPointError(f"advantage {name} is not finite")
    return advantage.detach()


def kept_rows(kept: Any, num_rows: int, *, name: str) -> torch.Tensor:
    """The rows that a down-sampler kept, if they can be trained on.

    Raises:
        ValueError: naming it, if they are not increasing rows of the batch.
    """
    rows_K = np.asarray(kept)
    good = rows_K.ndim == 1 and rows_K.dtype.kind in "iu"
    good = good and bool((np.diff(rows_K) > 0).all())
    if not good or (len(rows_K) and not 0 <= rows_K[0] <= rows_K[-1] < num_rows):
        raise ValueError(
            f"down_sampling {name} must give increasing rows of {num_rows}, got {rows_K!r}"
        )
    return torch.from_numpy(rows_K.astype(np.int64))


def kept_tokens(kept_NT: Any, rollouts: Rollouts, *, name: str) -> torch.Tensor:
    """The tokens that a selection kept, if they can be trained on.

    Raises:
        ValueError: naming it, if they are not (N, T) bool, True on tokens of the policy alone.
    """
    mask_NT = rollouts.mask_NT
    good = isinstance(kept_NT, torch.Tensor) and kept_NT.dtype == torch.bool
    if not good or kept_NT.shape != mask_NT.shape or bool((kept_NT & ~mask_NT).any()):
        raise ValueError(
            f"token_selection {name} must give (N, T) bool of shape {tuple(mask_NT.shape)}, True on "
            f"tokens where mask_NT is alone, got {kept_NT!r}"
        )
    return kept_NT
