"""Warn once if `success_above` lies beside all rewards, so that no rollout differs from another."""

from __future__ import annotations

import warnings

import numpy as np


class SuccessLine:
    """Looks at the first rewards of training and of validation, and warns if all pass, or none.

    A recipe's `success_above` is in the unit of its own reward. Under another reward every rollout
    passes from the start, or none ever does, so that pass rates, and budgets that depend on them, mean
    nothing. Rewards that are all equal are skipped: no threshold can split them.

    Args:
        above: `success_above`, or None, which never warns.
        least: rollouts of training to wait for.
    """

    def __init__(self, above: float | None, *, least: int = 16) -> None:
        self.above = above
        self.least = least
        self._trained: list[float] = []
        self._is_done = above is None
        self._has_trained = self._has_validated = False

    def trained(self, reward_N: np.ndarray) -> None:
        """Take the rewards of a training step; judge them once there are `least`."""
        if self._is_done or self._has_trained:
            return
        self._trained += np.asarray(reward_N, dtype=np.float64).tolist()
        if len(self._trained) >= self.least:
            self._has_trained = True
            self._judge(np.array(self._trained), "of training")
            self._trained = []

    def validated(self, reward_N: np.ndarray) -> None:
        """Judge the rewards of the first validation."""
        if self._is_done or self._has_validated:
            return
        self._has_validated = True
        self._judge(np.asarray(reward_N, dtype=np.float64), "of the first validation")

    def _judge(self, reward_N: np.ndarray, what: str) -> None:
        if not len(reward_N):
            return
        low, high = float(reward_N.min()), float(reward_N.max())
        if low == high or low <= self.above < high:  # type: ignore[operator]
            return
        self._is_done = True
        which = "all pass" if low > self.above else "none passes"  # type: ignore[operator]
        warnings.warn(
            f"success_above={self.above:g}: the first {len(reward_N)} rollouts {what} have rewards "
            f"from {low:.4g} to {high:.4g}, so that {which}, and pass rates say nothing. Write "
            "success_above between them, in the unit of the reward, or leave it out",
            stacklevel=3,
        )
