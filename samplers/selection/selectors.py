"""Selection: which prompts are rolled out next.

Selectors that believe something read the run's one `BetaPosterior` and keep no copy of it. Prompts
are taken in the order of their keys, where keys are given, so that shuffling the rows of the data
set changes nothing. `difficulty_band.py` and `diversity.py` hold more selectors. MPTS (risk-predictive
selection) is not among them: its predictor is a neural process, which NumPy cannot hold exactly to
the page, and a Beta posterior in its place would be MoPPS.
Axes: D prompts of the data set, K candidates, P chosen.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.keys import step_generator
from samplers.posterior import BetaPosterior
from samplers.selection._pool import Pool, top
from samplers.selection.scores import EXPECTED_SCORES, SCORES, ExpectedScore, Score, distance_to

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Function = TypeVar("Function")


class Selector(Protocol):
    """Chooses prompts, and remembers what it needs to choose the next ones.

    One that has `observe_spread(index_P, trials_P, low_P, high_P)` is told of every step the rows, their
    scored rollouts and the bounds of their rewards; what `metrics()` gives is logged.

    `check.check_sampler` tests whether a class of your own is one.
    """

    def select(
        self, num_prompts: int, *, generator: np.random.Generator, exclude: ArrayLike = ()
    ) -> IntArray:
        """(num_prompts,) int64, distinct rows of the data set, in the order of the step.

        Rows in `exclude`, for example those in flight, are not chosen; the planner passes them
        only if there are any.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What is remembered: arrays and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly."""
        ...


class UniformSelector:
    """Every prompt once an epoch, in an order that is a function of (seed, epoch).

    A call that reaches the end of an epoch goes on with the next one, so every step has as many
    prompts as it asked for and no tail is lost. A prompt that this call took from the old epoch
    already keeps its place in the new one and comes with the next call: no call repeats a prompt,
    and every epoch still visits every prompt exactly once. A prompt that is excluded when its turn
    comes is owed its visit and comes first once it is free.

    Args:
        num_prompts: D, prompts of the data set.
        seed: seed of the run.
        keys: (D,) prompt keys. With them the order is one of keys, whatever row each is in, so
            shuffling the data set's rows changes nothing; without them it is an order of rows.

    Raises:
        ValueError: if there is no prompt, or the keys are not D distinct ones.
    """

    def __init__(self, num_prompts: int, *, seed: int, keys: Sequence[str] | None = None) -> None:
        self._pool = Pool(num_prompts, keys)
        self.num_prompts = num_prompts
        self.seed = seed
        self._epoch = 0
        self._waiting = self._order(0)
        self._owed = np.empty(0, dtype=np.int64)

    def select(
        self, num_prompts: int, *, generator: np.random.Generator, exclude: ArrayLike = ()
    ) -> IntArray:
        """(num_prompts,) int64 distinct rows, the next ones of the epoch's order.

        Args:
            num_prompts: how many, at most D.
            generator: not used. The order belongs to the epoch and not to the step: a generator
                of the step would make it depend on how many prompts each step takes.
            exclude: rows that are passed over.

        Raises:
            ValueError: if more prompts are asked for than are left, or less than one.
        """
        excluded = self._pool.excluded(num_prompts, exclude)
        chosen = np.empty(0, dtype=np.int64)
        if len(self._owed):
            chosen, self._owed = _next(self._owed, num_prompts, excluded)
        taken, self._waiting = _next(
            self._waiting, num_prompts - len(chosen), np.concatenate([excluded, chosen])
        )
        chosen = np.concatenate([chosen, taken])
        while len(chosen) < num_prompts:
            self._owed = np.concatenate([self._owed, self._waiting])
            self._epoch += 1
            taken, self._waiting = _next(
                self._order(self._epoch),
                num_prompts - len(chosen),
                np.concatenate([excluded, chosen]),
            )
            chosen = np.concatenate([chosen, taken])
        return chosen

    def waive(self, rows: ArrayLike) -> None:
        """Forget the visits that these rows are owed from earlier epochs; their next turn stays theirs.

        For rows that are excluded for long, which would else come back once for every epoch missed.
        """
        if len(self._owed):
            self._owed = self._owed[~np.isin(self._owed, np.asarray(rows, dtype=np.int64))]

    def state_dict(self) -> dict[str, Any]:
        """What is remembered: `epoch`, an int, and the int64 rows it has left, `waiting`; `owed`
        are the rows that were passed over in earlier epochs, once for each visit."""
        return {
            "epoch": self._epoch,
            "waiting": self._waiting.copy(),
            "owed": self._owed.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly.

        Raises:
            ValueError: if the rows left are not distinct rows of this data set.
        """
        waiting = np.array(state["waiting"], dtype=np.int64)
        owed = np.array(state["owed"], dtype=np.int64)
        rows = np.concatenate([waiting, owed])
        within = bool(((rows >= 0) & (rows < self.num_prompts)).all())
        if not within or np.bincount(waiting, minlength=1).max() > 1:
            raise ValueError(
                f"waiting must be distinct rows in [0, {self.num_prompts}): "
                f"the state belongs to another data set"
            )
        self._epoch = int(state["epoch"])
        self._waiting = waiting
        self._owed = owed

    def _order(self, epoch: int) -> IntArray:
        return step_generator(self.seed, "epoch", epoch).permutation(self._pool.row_D)


class ThompsonSelector:
    """The prompts whose drawn pass rates score best: VADE, its ablations, and MoPPS.

        p~_i ~ Beta(a_i, b_i),  one draw per candidate,      the P largest  score(p~_i)

    Drawing makes unknown prompts worth a visit. The draws that won are no estimate: among the
    chosen they lie close together whatever the pass rates are, so they are thrown away, and
    allocation reads the posterior's moments. Prompts that never pass stay attractive: a draw for
    one that failed 8 of 8 beats one that passed 4 of 8 with probability 0.21.

    VADE is the default over the whole pool, with the posterior's decays 0.2 and 0.999; its ablation
    that knows the last update only is a posterior with decay_chosen = 0. (VADE, arXiv:2511.18902,
    project page; that the training runs drew for every prompt is a guess.)

    Args:
        posterior: of all D prompts; read, never written.
        score: "vade" p (1-p)^2, "variance" p (1-p), or any function of drawn pass rates.
        candidates: candidates per chosen prompt, drawn uniformly each step; None for the whole
            pool, which is also what more than D candidates come to.
        keys: (D,) prompt keys; with them the rows' order does not matter.

    Raises:
        ValueError: if the score has no known name or `candidates` is below 1.
    """

    def __init__(
        self,
        posterior: BetaPosterior,
        *,
        score: str | Score = "vade",
        candidates: int | None = None,
        keys: Sequence[str] | None = None,
    ) -> None:
        if candidates is not None and candidates < 1:
            raise ValueError(f"candidates must be at least 1 per chosen prompt, got {candidates}")
        self._score = named_score(SCORES, score)
        self._pool = Pool(posterior.num_prompts, keys)
        self._posterior = posterior
        self._candidates = candidates

    def select(
        self, num_prompts: int, *, generator: np.random.Generator, exclude: ArrayLike = ()
    ) -> IntArray:
        """(num_prompts,) int64 distinct rows, the best score first.

        Raises:
            ValueError: if more prompts are asked for than are left, or a score is NaN.
        """
        excluded = self._pool.excluded(num_prompts, exclude)
        size = None if self._candidates is None else self._candidates * num_prompts
        row_K = self._pool.candidates(size, excluded, generator)
        index = None if self._pool.whole(row_K) else row_K
        pass_rate_K = self._posterior.draw(index, generator=generator)
        return row_K[top(checked_scores(self._score(pass_rate_K), row_K), num_prompts, generator)]

    def state_dict(self) -> dict[str, Any]:
        """Empty: what is known is the posterior's, and the generator belongs to the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore.

        Raises:
            ValueError: if there is something, another selector's.
        """
        refuse_state(state)


def mopps(
    posterior: BetaPosterior,
    *,
    target: float = 0.5,
    candidates: int | None = 16,
    keys: Sequence[str] | None = None,
) -> ThompsonSelector:
    """MoPPS: the candidates whose drawn pass rates lie closest to a target.

    16 candidates per prompt is the setting for MATH, with a posterior of decays 1 and 1; 8 with
    decay_chosen = 0.5, decay_rest = 1 that for Countdown and Geometry3k. That candidates are drawn
    afresh each step is a project default, not from the paper. `OnlineBandSelector(rate="draw")` is its
    other rule. (Qu et al., arXiv:2507.04632.)
    """
    return ThompsonSelector(posterior, score=distance_to(target), candidates=candidates, keys=keys)


class PosteriorMeanSelector:
    """The prompts of the largest expected score, without a draw.

    Exploits only: a prompt comes again for as long as its expected score is among the best, and
    unvisited ones (1/12 by "vade") wait behind every prompt known to be better. With no evidence
    all scores tie, and the generator chooses. Offered next to `ThompsonSelector` because sources
    disagree on which is better (VADE's ablation against arXiv:2603.01907).

    Args:
        posterior: of all D prompts; read, never written.
        score: "vade" E[p (1-p)^2], "variance" E[p (1-p)], or any function of a and b.
        keys: (D,) prompt keys; with them the rows' order does not matter.

    Raises:
        ValueError: if the score has no known name.
    """

    def __init__(
        self,
        posterior: BetaPosterior,
        *,
        score: str | ExpectedScore = "vade",
        keys: Sequence[str] | None = None,
    ) -> None:
        self._score = named_score(EXPECTED_SCORES, score)
        self._pool = Pool(posterior.num_prompts, keys)
        self._posterior = posterior

    def select(
        self, num_prompts: int, *, generator: np.random.Generator, exclude: ArrayLike = ()
    ) -> IntArray:
        """(num_prompts,) int64 distinct rows, the best score first; equal ones at random.

        Raises:
            ValueError: if more prompts are asked for than are left, or a score is NaN.
        """
        excluded = self._pool.excluded(num_prompts, exclude)
        row_K = self._pool.candidates(None, excluded, generator)
        index = None if self._pool.whole(row_K) else row_K
        score_K = self._score(*self._posterior.parameters(index))
        return row_K[top(checked_scores(score_K, row_K), num_prompts, generator)]

    def state_dict(self) -> dict[str, Any]:
        """Empty: what is known is the posterior's, and the generator belongs to the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore.

        Raises:
            ValueError: if there is something, another selector's.
        """
        refuse_state(state)


def refuse_state(state: dict[str, Any]) -> None:
    """Raise ValueError unless the state is empty, that of a selector that remembers nothing."""
    if state:
        raise ValueError(
            f"this selector remembers nothing, but the state holds {', '.join(sorted(state))}: "
            f"it belongs to another selector"
        )


def _next(queue: IntArray, count: int, passed_over: IntArray) -> tuple[IntArray, IntArray]:
    """The first `count` distinct rows of a queue that are not passed over, and what then waits."""
    if len(passed_over) == 0 and len(queue) >= count and len(np.unique(queue[:count])) == count:
        return queue[:count].copy(), queue[count:]
    # A queue may be long: only its head is looked through, as far as it takes.
    looked = 2 * (count + len(passed_over)) + 16
    while True:
        head = queue[:looked]
        _, first = np.unique(head, return_index=True)
        free = np.sort(first[~np.isin(head[first], passed_over)])[:count]
        if len(free) == count or len(head) == len(queue):
            return head[free], np.concatenate([np.delete(head, free), queue[looked:]])
        looked *= 4


def named_score(table: dict[str, Function], score: str | Function) -> Function:
    """The function itself, or the one of that name; ValueError if there is none."""
    if not isinstance(score, str):
        return score
    if score not in table:
        raise ValueError(f"score must be a function or one of {', '.join(table)}, got {score!r}")
    return table[score]


def checked_scores(score_K: FloatArray, row_K: IntArray) -> FloatArray:
    """The scores, if there is one per candidate: a user's own function may be wrong."""
    score_K = np.asarray(score_K, dtype=np.float64)
    if score_K.shape != row_K.shape:
        raise ValueError(f"the score must give {row_K.shape} numbers, got shape {score_K.shape}")
    return score_K
