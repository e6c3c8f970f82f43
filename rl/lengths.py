"""How long a rollout of a prompt is expected to be, from the lengths seen: what dealing goes by.

Expectations decide which rank generates a rollout, never which rollouts are made. Axes: P prompts,
N rollouts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np


class ExpectedLengths:
    """Mean completion length of each prompt, in tokens.

    The mean over the prompt's rollouts so far; of a prompt never seen, the mean over all rollouts; 1
    before any. (Project default, not from a paper.) Fed with the same rollouts, every rank and every
    resumed run expects the same, bit for bit.
    """

    def __init__(self) -> None:
        self._rollouts: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def of(self, keys: Sequence[str]) -> np.ndarray:
        """(P,) float64 expected tokens of one rollout of each prompt, by prompt key."""
        num_rollouts = self._rollouts.total()
        overall = self._tokens.total() / num_rollouts if num_rollouts else 1.0
        return np.array(
            [
                self._tokens[key] / self._rollouts[key] if key in self._rollouts else overall
                for key in keys
            ],
            dtype=np.float64,
        )

    def observe(self, keys: Sequence[str], prompt_N: np.ndarray, length_N: np.ndarray) -> None:
        """Learn the lengths of rollouts.

        Args:
            keys: P prompt keys.
            prompt_N: (N,) each row's place in `keys`.
            length_N: (N,) integer tokens of each row.
        """
        for place, length in zip(prompt_N.tolist(), length_N.tolist(), strict=True):
            self._rollouts[keys[place]] += 1
            self._tokens[keys[place]] += length

    def state_dict(self) -> dict[str, Any]:
        """Keys, sorted, and two integer arrays of their counts."""
        keys = sorted(self._rollouts)
        return {
            "keys": keys,
            "rollouts": np.array([self._rollouts[key] for key in keys], dtype=np.int64),
            "tokens": np.array([self._tokens[key] for key in keys], dtype=np.int64),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly."""
        keys = state["keys"]
        self._rollouts = Counter(dict(zip(keys, state["rollouts"].tolist(), strict=True)))
        self._tokens = Counter(dict(zip(keys, state["tokens"].tolist(), strict=True)))
