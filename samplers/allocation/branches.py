"""Rollouts in branches: budgets in multiples of a branch, and how much evidence siblings are.

The k leaves of a branch share the beginning of a denoising chain, so they are made together and
their rewards are correlated. Axes: P prompts.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def in_branches(
    allocate: Callable[..., NDArray[np.int64]], leaves: int
) -> Callable[..., NDArray[np.int64]]:
    """An allocator of rollouts that gives every prompt whole branches of `leaves` rollouts.

        budget = leaves * allocate(..., total / leaves, ceil(minimum / leaves), floor(maximum / leaves))

    Args:
        allocate: an `Allocator`. It divides branches, which it takes for rollouts.
        leaves: rollouts of a branch, at least 1. 1 returns `allocate` as it is.

    Returns:
        An allocator. It raises ValueError if its total is no multiple of `leaves`, or the box has
        no multiple of it.

    Raises:
        ValueError: if `leaves` is below 1.
    """
    leaves = operator.index(leaves)
    if leaves < 1:
        raise ValueError(f"leaves must be at least 1, got {leaves}")
    if leaves == 1:
        return allocate

    def allocated(*columns: Any, minimum: Any = 1, maximum: Any = None) -> NDArray[np.int64]:
        *about_P, total = columns
        if total % leaves:
            raise ValueError(
                f"the total must be a multiple of {leaves} rollouts, the leaves of a branch, got {total}"
            )
        low = -(-np.asarray(minimum) // leaves)
        high = None if maximum is None else np.asarray(maximum) // leaves
        if high is not None and np.any(high < low):
            raise ValueError(
                f"no multiple of {leaves} rollouts, the leaves of a branch, lies in the box "
                f"[{minimum}, {maximum}]"
            )
        low = low.item() if low.ndim == 0 else low
        high = high.item() if high is not None and high.ndim == 0 else high
        return leaves * allocate(*about_P, total // leaves, minimum=low, maximum=high)

    return allocated


def sibling_evidence(leaves: int, within_share: float) -> float:
    """How many independent rollouts one of `leaves` siblings is worth for the mean of its prompt.

        1 / (w + k (1 - w)),        w = Var within branches / Var of the reward at fixed prompt

    so that n leaves count as n / (w + k (1 - w)): the design effect of cluster sampling with
    intraclass correlation 1 - w (Kish, 1965). 1 for w = 1 (siblings as good as independent), 1 / k for
    w = 0 (all leaves of a branch have one reward).

    Args:
        leaves: k, rollouts of a branch, at least 1.
        within_share: w in [0, 1].
    """
    if leaves < 1:
        raise ValueError(f"leaves must be at least 1, got {leaves}")
    if not (math.isfinite(within_share) and 0 <= within_share <= 1):
        raise ValueError(f"within_share must be in [0, 1], got {within_share}")
    return 1 / (within_share + leaves * (1 - within_share))
