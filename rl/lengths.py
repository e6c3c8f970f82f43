"""Estimate how long a rollout of each prompt will be, so that ranks get equal work.

Expectations decide which rank generates a rollout, never which rollouts are made. Axes: P prompts,
N rollouts, S prompts seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from samplers.keys import stable_hash


class ExpectedLengths:
    """Mean completion length of each prompt, in tokens.

    The mean over the prompt's rollouts so far; of a prompt never seen, the mean over all rollouts; 1
    before any. (Project default, not from a paper.) Fed with the same rollouts, every rank and every
    resumed run expects the same, bit for bit.

    Prompts are known by a 63-bit hash of their keys, so that the state is three arrays, which take a
    step no time for a million prompts. The chance that two of a million share one is 5e-8, and then
    they share an expectation.
    """

    def __init__(self) -> None:
        self._place: dict[int, int] = {}  # of each hash in the arrays
        self._hash_S = np.zeros(16, dtype=np.int64)
        self._rollouts_S = np.zeros(16, dtype=np.int64)
        self._tokens_S = np.zeros(16, dtype=np.int64)
        # Arrays grow by doubling: what lies beyond the prompts seen is 0.
        self._total_rollouts = self._total_tokens = 0

    def of(self, keys: Sequence[str]) -> np.ndarray:
        """(P,) float64 expected tokens of one rollout of each prompt, by prompt key."""
        overall = self._total_tokens / self._total_rollouts if self._total_rollouts else 1.0
        expected_P = np.full(len(keys), overall, dtype=np.float64)
        for p, key in enumerate(keys):
            place = self._place.get(_hash(key))
            if place is not None and (num_rollouts := int(self._rollouts_S[place])):
                expected_P[p] = int(self._tokens_S[place]) / num_rollouts
        return expected_P

    def observe(self, keys: Sequence[str], prompt_N: np.ndarray, length_N: np.ndarray) -> None:
        """Learn the lengths of rollouts.

        Args:
            keys: P prompt keys; prompts without a rollout are given too, in the order of
                the step, so that the state depends neither on who made which rollout nor on when.
            prompt_N: (N,) each row's place in `keys`.
            length_N: (N,) integer tokens of each row.
        """
        prompt_N, length_N = np.asarray(prompt_N), np.asarray(length_N)
        place_P = np.array([self._place_of(key) for key in keys], dtype=np.int64)
        np.add.at(self._rollouts_S, place_P[prompt_N], 1)
        np.add.at(self._tokens_S, place_P[prompt_N], length_N)
        self._total_rollouts += len(length_N)
        self._total_tokens += int(length_N.sum())

    def state_dict(self) -> dict[str, Any]:
        """Three (S,) int64 arrays: hashes of keys, and their counts of rollouts and tokens."""
        size = len(self._place)
        return {
            "hashes": self._hash_S[:size].copy(),
            "rollouts": self._rollouts_S[:size].copy(),
            "tokens": self._tokens_S[:size].copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly."""
        columns = [
            np.array(state[name], dtype=np.int64) for name in ("hashes", "rollouts", "tokens")
        ]
        self._hash_S, self._rollouts_S, self._tokens_S = columns
        self._place = {key: place for place, key in enumerate(self._hash_S.tolist())}
        self._total_rollouts = int(self._rollouts_S.sum())
        self._total_tokens = int(self._tokens_S.sum())

    def _place_of(self, key: str) -> int:
        """Where the arrays have this key, which is new to them or not."""
        hashed = _hash(key)
        place = self._place.setdefault(hashed, len(self._place))
        if place == len(self._hash_S):
            more = np.zeros(max(16, place), dtype=np.int64)
            self._hash_S = np.concatenate([self._hash_S, more])
            self._rollouts_S = np.concatenate([self._rollouts_S, more])
            self._tokens_S = np.concatenate([self._tokens_S, more])
        self._hash_S[place] = hashed
        return place


def _hash(key: str) -> int:
    return stable_hash(key) >> 1
