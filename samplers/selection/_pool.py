"""Shared by selectors: the order of the pool, the candidates, and the best of a score.

Axes: D prompts of the data set, K candidates.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Pool:
    """The prompts of a data set in the order of their keys.

    Random numbers are dealt in this order: what a prompt gets depends on the keys of the data set
    and not on the row each is in.

    Args:
        num_prompts: D.
        keys: (D,) distinct prompt keys; None takes the rows as they are.

    Raises:
        ValueError: if there is no prompt, or the keys are not D distinct ones.
    """

    def __init__(self, num_prompts: int, keys: Sequence[str] | None = None) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
        if keys is not None and not len(keys) == len(set(keys)) == num_prompts:
            raise ValueError(
                f"keys must be {num_prompts} distinct ones, got {len(keys)} of which "
                f"{len(set(keys))} are distinct"
            )
        self.num_prompts = num_prompts
        rows = range(num_prompts)
        order = rows if keys is None else sorted(rows, key=keys.__getitem__)
        self.row_D = np.array(order, dtype=np.int64)
        """(D,) rows in the order of their keys."""
        self.in_row_order = keys is None or bool((self.row_D[1:] > self.row_D[:-1]).all())

    def excluded(self, num_prompts: int, exclude: ArrayLike) -> IntArray:
        """The distinct rows of `exclude`, if `num_prompts` others are left.

        Raises:
            ValueError: if fewer are left, none is asked for, or a row is out of range.
        """
        exclude = np.asarray(exclude)
        rows = np.unique(exclude.astype(np.int64))
        whole = exclude.dtype.kind in "iu" or len(exclude) == 0
        if exclude.ndim != 1 or not whole or ((rows < 0) | (rows >= self.num_prompts)).any():
            raise ValueError(
                f"exclude must be rows in [0, {self.num_prompts}), got {exclude.tolist()}"
            )
        if not 1 <= num_prompts <= self.num_prompts:
            raise ValueError(
                f"num_prompts must be in [1, {self.num_prompts}], the size of the data set, "
                f"got {num_prompts}"
            )
        if num_prompts > self.num_prompts - len(rows):
            raise ValueError(
                f"num_prompts={num_prompts} exceeds the {self.num_prompts - len(rows)} prompts of "
                f"the data set that are left when {len(rows)} are excluded"
            )
        return rows

    def candidates(
        self, size: int | None, excluded: IntArray, generator: np.random.Generator
    ) -> IntArray:
        """(K,) rows in the order of their keys, none of them excluded.

        Args:
            size: how many, drawn uniformly without replacement; None, or more than there are, for
                all.
            excluded: rows that may not be among them.
            generator: not used where all are taken.
        """
        row_D = self.row_D
        if len(excluded):
            left_D = np.ones(self.num_prompts, dtype=bool)
            left_D[excluded] = False
            row_D = row_D[left_D[row_D]]
        if size is None or size >= len(row_D):
            return row_D
        return row_D[np.sort(generator.choice(len(row_D), size, replace=False))]

    def whole(self, row_K: IntArray) -> bool:
        """Whether the candidates are all rows from first to last, which need no picking."""
        return self.in_row_order and len(row_K) == self.num_prompts


def top(score_K: FloatArray, num_chosen: int, generator: np.random.Generator) -> IntArray:
    """Places of the largest scores, best first.

    Where scores tie for the last places the generator chooses among them, each as likely as the
    next: a fixed rule would favour the same prompts at every step. Linear in K.

    Args:
        score_K: (K,) scores; -inf is allowed, NaN is not.
        num_chosen: at most K.
        generator: used only if scores tie for the last places.

    Returns:
        (num_chosen,) int64 distinct places; equal scores stand in the order of their places.

    Raises:
        ValueError: if a score is NaN.
    """
    place = len(score_K) - num_chosen
    cut = np.partition(score_K, place)[place]
    # NaN sorts last, so any NaN is among the largest.
    chosen, tied = np.flatnonzero(~(score_K <= cut)), np.flatnonzero(score_K == cut)
    if np.isnan(score_K[chosen]).any():
        at = int(chosen[np.isnan(score_K[chosen])][0])
        raise ValueError(f"scores must be numbers, got nan for candidate {at}")
    missing = num_chosen - len(chosen)
    if missing < len(tied):
        tied = np.sort(generator.choice(tied, missing, replace=False))
    chosen = np.sort(np.concatenate([chosen, tied]))
    return chosen[np.argsort(-score_K[chosen], kind="stable")]
