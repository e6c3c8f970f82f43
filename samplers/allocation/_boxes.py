"""Check what allocators are given: numbers per prompt and bounds of counts. Axes: P prompts."""

import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MOST = 2**53
"""Largest total: budgets are guessed in float64, which holds every integer up to here."""


def boxes(
    num_prompts: int, total: int, minimum: ArrayLike, maximum: ArrayLike | None, *, least: int
) -> tuple[IntArray, IntArray]:
    """(P,) lower and upper bounds of the budgets, checked to be feasible."""
    total = checked_total(total)
    lower_P = bound_of("minimum", minimum, num_prompts)
    upper_P = bound_of("maximum", total if maximum is None else maximum, num_prompts)
    if (lower_P < least).any():
        raise ValueError(f"minimum must be at least {least}, got {int(lower_P.min())}")
    least_total = _sum(lower_P)
    if total < least_total:
        what = (
            f"{num_prompts} prompts {int(lower_P[0])} rollouts each"
            if (lower_P == lower_P[0]).all()
            else f"{num_prompts} prompts their minima"
        )
        raise ValueError(f"total={total} cannot give {what}; it must be at least {least_total}")
    if maximum is None:
        return lower_P, np.maximum(upper_P, lower_P)
    if (lower_P > upper_P).any():
        p = int(np.flatnonzero(lower_P > upper_P)[0])
        raise ValueError(
            f"minimum={int(lower_P[p])} exceeds maximum={int(upper_P[p])} of prompt {p}"
        )
    # More than the total binds nothing, and sums of it overflow.
    upper_P = np.minimum(upper_P, total)
    most_total = _sum(upper_P)
    if total > most_total:
        raise ValueError(
            f"total={total} exceeds what {num_prompts} prompts may get; "
            f"it must be at most {most_total}, the sum of their maxima"
        )
    return lower_P, upper_P


def bound_of(name: str, bound: ArrayLike, num_prompts: int) -> IntArray:
    """(P,) one integer for all prompts, or one for each; anything else is a ValueError."""
    bound = np.asarray(bound)
    if bound.dtype.kind not in "iu" or bound.shape not in [(), (num_prompts,)]:
        raise ValueError(
            f"{name} must be one integer or ({num_prompts},) integers, "
            f"got shape {bound.shape} of {bound.dtype}"
        )
    if bound.size and int(bound.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must fit into 64 bits with a sign, got {bound.max()}")
    return np.broadcast_to(bound, (num_prompts,)).astype(np.int64)


def checked_total(total: Any) -> int:
    """The total as an int of at most 2**53; anything else is a ValueError."""
    try:
        whole = operator.index(total)
    except TypeError:
        raise ValueError(f"total must be an integer, got {total!r}") from None
    if whole > MOST:
        raise ValueError(f"total must be at most 2**53 = {MOST}, got {whole}")
    return whole


def _sum(bound_P: IntArray) -> int:
    """The exact sum, also where int64 would overflow."""
    if np.abs(bound_P.astype(np.float64)).sum() < 2**62:
        return int(bound_P.sum())
    return sum(bound_P.tolist())


def one_per_prompt(std_P: ArrayLike, *, name: str = "std_P") -> FloatArray:
    """(P,) float64 of at least one prompt; any other shape is a ValueError."""
    std_P = np.asarray(std_P, dtype=np.float64)
    if std_P.ndim != 1 or len(std_P) == 0:
        raise ValueError(f"{name} must be 1-d with at least one prompt, got shape {std_P.shape}")
    return std_P
