"""Where rollouts begin: at the end of the prompt, or part-way along something done for it before.

A prompt that hardly ever passes teaches nothing, and neither does one that always does. Rollouts of
the first are started along a success, which leaves less to do; those of the second along a failure,
which leaves something to repair. The start is given and not drawn: it trains nothing, and what follows
is rewarded as a whole with it. (PrefixRL, arXiv:2601.18795; AdaPrefix-GRPO, arXiv:2607.07674; Prefix
Sampling, arXiv:2605.05112. Their laws for the length were not visible: that of `Starts`, and every
constant, is a project default.)

Axes: D prompts of the data set, P prompts of the step, S prompts that have ever been started, B bands,
M traces in the memory, L tokens one after the other.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.keys import stable_hash
from samplers.rows import check_names

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
TokenArray = NDArray[np.int32]

NUM_BANDS = 4
"""Starts of one kind are counted apart by the quarter of their trace in which they end."""

SUCCESS, FAILURE = 1, -1


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class ChosenStarts:
    """Where the rollouts of a step's prompts begin. Its arrays are read-only.

    Example, three prompts, of which the second starts with two tokens of a success::

        ChosenStarts(length_P=[0, 2, 0], sign_P=[0, 1, -1], band_P=[0, 3, 0], token_L=[7, 9])
    """

    length_P: IntArray
    """(P,) tokens that the rollouts start with; 0: none."""
    sign_P: IntArray
    """(P,) 1 where the length was set for a success, -1 for a failure, 0 where none was to be had. A
    length may come out as 0, which is no start, and then tells the controller something all the same."""
    band_P: IntArray
    """(P,) how far along: 1 .. NUM_BANDS on a success, the negative on a failure, 0 without a start."""
    token_L: TokenArray
    """(L,) the tokens of all starts, one prompt after the other."""

    @property
    def prefix_P(self) -> list[tuple[int, ...]]:
        """The tokens that each prompt's rollouts start with."""
        parts = np.split(self.token_L, np.cumsum(self.length_P)[:-1])
        return [tuple(part.tolist()) for part in parts]

    def state_dict(self) -> dict[str, Any]:
        """Every field."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ChosenStarts:
        """What `state_dict()` gave.

        Raises:
            ValueError: if it is the state of something else.
        """
        check_names(state, [each.name for each in fields(cls)], "the starts of a step")
        return cls(**{name: _frozen(value) for name, value in state.items()})


@dataclass(frozen=True, eq=False, slots=True)
class Trace:
    """What was once done for a prompt."""

    token_L: TokenArray
    """(L,) the whole completion, its start included."""
    reward: float
    version: int
    """Optimizer steps the policy had taken."""


class Starts:
    """Remember traces, and choose where the rollouts of each prompt begin.

    With p the posterior mean of the prompt, of rollouts without a start alone, and
    low = min(1/2 - delta, until)::

        p < low        a prefix of its latest success, or of its reference solution if it has none
        p > 1 - low    a prefix of its latest failure
        else, or on a visit that is to have none, or without a trace: no start

    The prefix of a trace of l tokens has f l, where f is the prompt's own, one for successes (sign 1)
    and one for failures (sign -1). After each group of n rollouts with k passes it moves by

        f <- clip(f + step (1/2 - k/n) sign, 0, max_fraction)

    towards the length from which half of them pass. A start whose length comes out as 0 is none, but its
    group moves f all the same. `until` leaves a prompt alone that is no longer hopeless and, seen from
    the other end, one that is no longer solved. A group with a start is one of (prompt, start): its
    passes say nothing of the prompt, and are counted by themselves, for each of `NUM_BANDS` parts of a
    success and of a failure, as a Beta(1, 1) whose counts decay at each visit. (What `until` means for
    failures, the first f and the bands are project defaults too.)

    Args:
        keys: (D,) prompt keys, as the planner has them.
        delta: how far from 1/2 the pass rate must be for a start, in [0, 1/2).
        step: how far f moves, above 0.
        first_fraction: f before any group, in [0, 1].
        max_fraction: the largest f, in [0, 1].
        until: the pass rate past which there is no start along a success, in [0, 1].
        plain_share: the share of visits without a start, in [0, 1]; by a hash of prompt and draw.
        memory_tokens: tokens of all remembered traces together. The one used longest ago goes first.
        most_tokens: of a start, at least 1.
        references: (D,) token ids of a reference solution each, or None; they take no memory.
        cuts: of token ids (L,) says (L,) bool after which a start may end. None: after any.
        decay: what becomes of a start's counts at its next visit, as `posterior_decay_chosen`.
        run_seed: of the run.

    Raises:
        ValueError: for a number that is not as above.
    """

    def __init__(
        self,
        keys: Sequence[str],
        *,
        most_tokens: int,
        delta: float = 0.2,
        step: float = 0.2,
        first_fraction: float = 0.5,
        max_fraction: float = 0.9,
        until: float = 0.3,
        plain_share: float = 0.2,
        memory_tokens: int = 2_000_000,
        references: Sequence[Sequence[int] | None] | None = None,
        cuts: Callable[[TokenArray], NDArray[np.bool_]] | None = None,
        decay: float = 0.2,
        run_seed: int = 0,
    ) -> None:
        if not 0 <= delta < 0.5:
            raise ValueError(f"delta must be in [0, 0.5), got {delta}")
        if not 0 < step < math.inf:
            raise ValueError(f"step must be finite and above 0, got {step}")
        shares = {"first_fraction": first_fraction, "max_fraction": max_fraction, "until": until}
        for name, value in (shares | {"plain_share": plain_share, "decay": decay}).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if memory_tokens < 0 or most_tokens < 0:
            raise ValueError(
                f"memory_tokens and most_tokens must not be negative, got {memory_tokens} and "
                f"{most_tokens}"
            )
        if references is not None and len(references) != len(keys):
            raise ValueError(f"there are {len(references)} references for {len(keys)} prompts")
        self.keys = keys
        self.most_tokens = most_tokens
        self.max_fraction = max_fraction
        self.memory_tokens = memory_tokens
        self._first = min(first_fraction, max_fraction)
        self._low = min(0.5 - delta, until)
        self._step = step
        self._plain_share = plain_share
        self._decay = decay
        self._run_seed = run_seed
        self._cuts = cuts
        self._references = [
            None if ids is None else _tokens(ids)
            for ids in (references if references is not None else [None] * len(keys))
        ]
        # From the trace that was used longest ago to the one used last.
        self._traces: OrderedDict[tuple[int, int], Trace] = OrderedDict()
        self._held = 0
        # One place for each prompt that was ever started; columns for successes and failures.
        self._place_of: dict[int, int] = {}
        self._fraction_S2 = np.zeros((0, 2))
        self._passes_S2B = np.zeros((0, 2, NUM_BANDS))
        self._failures_S2B = np.zeros((0, 2, NUM_BANDS))

    # -- before a step

    def choose(
        self, index_P: ArrayLike, draw_P: ArrayLike, a_P: ArrayLike, b_P: ArrayLike
    ) -> ChosenStarts:
        """Where the rollouts of these prompts begin. Traces that are used count as used now.

        Args:
            index_P: (P,) rows of the data set.
            draw_P: (P,) how many times each was visited before.
            a_P, b_P: (P,) parameters of each prompt's posterior, of rollouts without a start.
        """
        rate_P = np.asarray(a_P) / (np.asarray(a_P) + np.asarray(b_P))
        index_P, draw_P = (np.asarray(each, dtype=np.int64) for each in (index_P, draw_P))
        length_P, sign_P, band_P = (np.zeros(len(index_P), dtype=np.int64) for _ in range(3))
        prefixes: list[TokenArray] = []
        for p, (row, draw) in enumerate(zip(index_P.tolist(), draw_P.tolist(), strict=True)):
            sign = SUCCESS * int(rate_P[p] < self._low) or FAILURE * int(rate_P[p] > 1 - self._low)
            if not sign or self.is_plain(row, draw):
                continue
            token_L = self._along(row, sign)
            if token_L is None:
                continue
            sign_P[p] = sign
            length_P[p] = length = self._length(token_L, self.fraction(row, sign))
            if length:
                band_P[p] = sign * (1 + NUM_BANDS * length // len(token_L))
                prefixes.append(token_L[:length])
        return ChosenStarts(
            length_P=_frozen(length_P),
            sign_P=_frozen(sign_P),
            band_P=_frozen(band_P),
            token_L=_frozen(np.concatenate([np.zeros(0, np.int32), *prefixes])),
        )

    def is_plain(self, row: int, draw: int) -> bool:
        """Whether this visit is one of those that never have a start."""
        chance = stable_hash(self._run_seed, "plain start", self.keys[row], draw) / 2**64
        return chance < self._plain_share

    def fraction(self, row: int, sign: int) -> float:
        """f of a prompt, for successes (sign 1) or failures (-1)."""
        place = self._place_of.get(row)
        return self._first if place is None else float(self._fraction_S2[place, _column(sign)])

    def parameters(
        self, index_P: ArrayLike, band_P: ArrayLike, a_P: FloatArray, b_P: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """(P,) a and b of each group: those given where there is no start, else the start's own."""
        a_P, b_P = a_P.copy(), b_P.copy()
        pairs = zip(np.asarray(index_P).tolist(), np.asarray(band_P).tolist(), strict=True)
        for p, (row, band) in enumerate(pairs):
            if not band:
                continue
            a_P[p] = b_P[p] = 1.0
            if row in self._place_of:
                at = self._place_of[row], _column(band), abs(band) - 1
                a_P[p] += self._passes_S2B[at]
                b_P[p] += self._failures_S2B[at]
        return a_P, b_P

    # -- after a step

    def learn(
        self, index_P: IntArray, chosen: ChosenStarts, successes_P: FloatArray, trials_P: IntArray
    ) -> None:
        """Learn from a step's groups: move f, and count passes of groups with a start.

        Args:
            index_P: (P,) rows of the data set.
            chosen: where their rollouts began.
            successes_P: (P,) successes of all rounds, which may be fractional.
            trials_P: (P,) rollouts they were counted in; a prompt with none teaches nothing.
        """
        for p in np.flatnonzero((chosen.sign_P != 0) & (trials_P > 0)).tolist():
            sign, band = int(chosen.sign_P[p]), int(chosen.band_P[p])
            successes, trials = float(successes_P[p]), int(trials_P[p])
            place, column = self._place(int(index_P[p])), _column(sign)
            moved = (
                self._fraction_S2[place, column] + self._step * (0.5 - successes / trials) * sign
            )
            self._fraction_S2[place, column] = min(max(moved, 0.0), self.max_fraction)
            if band:
                at = place, column, abs(band) - 1
                self._passes_S2B[at] = self._passes_S2B[at] * self._decay + successes
                self._failures_S2B[at] = self._failures_S2B[at] * self._decay + trials - successes

    def remember(
        self, row: int, token_ids: ArrayLike, *, success: float, reward: float, version: int
    ) -> None:
        """Remember a rollout as the prompt's latest success or failure, in the place of the one before.

        A trace that is longer than the whole memory is not kept, and the one before stays.

        Args:
            row: of the data set.
            token_ids: (L,) of the whole completion, its start included.
            success: as the posterior reads it; a success from 1/2 on (project default).
            reward: what it earned.
            version: optimizer steps the policy had taken.
        """
        token_L = _tokens(token_ids)
        if len(token_L) > self.memory_tokens:
            return
        at = row, SUCCESS if success >= 0.5 else FAILURE
        before = self._traces.pop(at, None)
        self._traces[at] = Trace(token_L, float(reward), int(version))
        self._held += len(token_L) - (0 if before is None else len(before.token_L))
        while self._held > self.memory_tokens:
            _, oldest = self._traces.popitem(last=False)
            self._held -= len(oldest.token_L)

    def trace(self, row: int, sign: int) -> Trace | None:
        """The prompt's latest success (sign 1) or failure (-1), if it is remembered."""
        return self._traces.get((row, sign))

    # -- the run

    def metrics(self) -> dict[str, float]:
        """`memory_tokens`, `memory_traces`, and `fraction`: the mean f of what was ever started."""
        found = {
            "memory_tokens": float(self._held),
            "memory_traces": float(len(self._traces)),
        }
        size = len(self._place_of)
        moved = self._fraction_S2[:size][self._fraction_S2[:size] != self._first]
        return found | ({"fraction": float(moved.mean())} if moved.size else {})

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as arrays: traces, the one used longest ago first; f and counts."""
        size = len(self._place_of)
        traces = list(self._traces.values())
        return {
            "trace_row_M": np.array([row for row, _ in self._traces], dtype=np.int64),
            "trace_sign_M": np.array([sign for _, sign in self._traces], dtype=np.int64),
            "trace_length_M": np.array([len(t.token_L) for t in traces], dtype=np.int64),
            "trace_reward_M": np.array([t.reward for t in traces], dtype=np.float64),
            "trace_version_M": np.array([t.version for t in traces], dtype=np.int64),
            "trace_token_L": np.concatenate([np.zeros(0, np.int32), *(t.token_L for t in traces)]),
            "row_S": np.array(list(self._place_of), dtype=np.int64),
            "fraction_S2": self._fraction_S2[:size].copy(),
            "passes_S2B": self._passes_S2B[:size].copy(),
            "failures_S2B": self._failures_S2B[:size].copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`: from here on the same starts are chosen.

        Raises:
            ValueError: if it is the state of something else.
        """
        check_names(state, self.state_dict(), "the state of starts")
        lengths = np.asarray(state["trace_length_M"], dtype=np.int64)
        parts = np.split(np.array(state["trace_token_L"], dtype=np.int32), np.cumsum(lengths)[:-1])
        columns = [
            np.asarray(state[f"trace_{name}_M"]).tolist()
            for name in ("row", "sign", "reward", "version")
        ]
        self._traces = OrderedDict(
            ((int(row), int(sign)), Trace(_frozen(token_L), float(reward), int(version)))
            for row, sign, reward, version, token_L in zip(*columns, parts, strict=False)
        )
        self._held = int(lengths.sum())
        rows = np.asarray(state["row_S"], dtype=np.int64).tolist()
        self._place_of = {row: place for place, row in enumerate(rows)}
        for name in ("fraction_S2", "passes_S2B", "failures_S2B"):
            setattr(self, f"_{name}", np.array(state[name], dtype=np.float64))

    def _along(self, row: int, sign: int) -> TokenArray | None:
        """What a start of this kind goes along, if there is anything."""
        if (row, sign) in self._traces:
            self._traces.move_to_end((row, sign))
            return self._traces[row, sign].token_L
        return self._references[row] if sign == SUCCESS else None

    def _length(self, token_L: TokenArray, fraction: float) -> int:
        """Tokens of a start along a trace: at least one of the trace is left to be drawn."""
        # The small number keeps .3 of 10 tokens at 3.
        length = int(fraction * len(token_L) + 1e-9)
        length = min(length, len(token_L) - 1, self.most_tokens)
        if self._cuts is None or length <= 0:
            return max(length, 0)
        ends = np.flatnonzero(np.asarray(self._cuts(token_L))[:length])
        return int(ends[-1]) + 1 if len(ends) else 0

    def _place(self, row: int) -> int:
        """Where the arrays have this prompt, which is new to them or not."""
        place = self._place_of.setdefault(row, len(self._place_of))
        if place == len(self._fraction_S2):
            more = max(16, place)  # arrays grow by doubling
            self._fraction_S2 = np.concatenate([self._fraction_S2, np.full((more, 2), self._first)])
            empty = np.zeros((more, 2, NUM_BANDS))
            self._passes_S2B = np.concatenate([self._passes_S2B, empty])
            self._failures_S2B = np.concatenate([self._failures_S2B, empty])
        return place


def _column(sign: int) -> int:
    """Where arrays with a column for successes and one for failures have this kind."""
    return 0 if sign > 0 else 1


def _tokens(token_ids: ArrayLike) -> TokenArray:
    """Token ids as they are remembered.

    Raises:
        ValueError: if they are none, or too large for 32 bits.
    """
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise ValueError(f"token ids must be a list of integers, got {ids.dtype} of {ids.shape}")
    if len(ids) and not 0 <= ids.min() <= ids.max() < 2**31:
        raise ValueError(f"token ids must be in [0, 2^31), got {ids.min()} to {ids.max()}")
    return _frozen(ids.astype(np.int32))


def _frozen(array: ArrayLike) -> NDArray[Any]:
    """An array that cannot be written to."""
    array = np.array(array)
    array.setflags(write=False)
    return array
