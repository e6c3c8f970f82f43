"""One success posterior per prompt, read by selection, allocation and stopping alike.

Axes: D prompts of the data set, P prompts of one call, K rows.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.prior import Prior
from samplers.rows import check_names, integer_rows, row_list

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class BetaPosterior:
    """What is believed about every prompt's pass rate: Beta(alpha + 1, beta + 1), or with a prior
    Beta(alpha + kappa m, beta + kappa (1 - m)).

    alpha and beta count successes and failures, with old counts decayed because the policy moves::

        chosen       alpha <- decay_chosen alpha + successes
                     beta  <- decay_chosen beta + trials - successes
        not chosen   alpha <- decay_rest alpha,    beta <- decay_rest beta

    The +1/+1 prior sits outside the decay, so a prompt that is ignored returns to Beta(1, 1),
    knowing nothing, and becomes worth a visit again. Time is counted in training steps: a prompt
    decays once in each, however many rounds or refills the step makes (project default; the paper
    does not say).

    A prior (`samplers/prior.py`) expects pass rate m of a prompt, with the weight of kappa rollouts, and
    learns it from other prompts; kappa = 2 and m = 1/2 is the Beta above. Parameters are then positive
    and may lie below 1. The prior is taught what the posterior is, and decays where `decay_others` ends
    a training step.

    (VADE, arXiv:2511.18902. The paper's figure implies decays of 0.2 and 0.999; that these are
    its training values is a guess. For chosen prompts the same update as MoPPS, arXiv:2507.04632,
    with a0 = b0 = 1.)

    Args:
        num_prompts: D, prompts of the data set; prompt i is row i.
        decay_chosen: in [0, 1]; 0 remembers the last group only, 1 forgets nothing.
        decay_rest: in [0, 1]; 1 leaves prompts that were not chosen as they are.
        prior: of the same prompts, owned by this posterior. None: Beta(1, 1) for each.

    Raises:
        ValueError: if there is no prompt, a decay is outside [0, 1], or the prior is of other prompts.
    """

    alpha_D: FloatArray
    """(D,) decayed successes, at least 0."""
    beta_D: FloatArray
    """(D,) decayed failures, at least 0."""

    def __init__(
        self,
        num_prompts: int,
        *,
        decay_chosen: float = 0.2,
        decay_rest: float = 0.999,
        prior: Prior | None = None,
    ) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
        for name, decay in [("decay_chosen", decay_chosen), ("decay_rest", decay_rest)]:
            if not 0 <= decay <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {decay}")
        if prior is not None and prior.num_prompts != num_prompts:
            raise ValueError(
                f"the prior is of {prior.num_prompts} prompts, the posterior of {num_prompts}"
            )
        self.num_prompts = num_prompts
        self.prior = prior
        self.decay_chosen = decay_chosen
        self.decay_rest = decay_rest
        self.alpha_D = np.zeros(num_prompts)
        self.beta_D = np.zeros(num_prompts)

    def observe(self, index_P: ArrayLike, successes_P: ArrayLike, trials_P: ArrayLike) -> None:
        """Take in a whole training step: decay everything once, then add the counts.

        A step of several rounds calls `decay`, `add` and `decay_others` instead, as `Planner` does.

        Args:
            index_P: (P,) distinct rows that were rolled out; none at all only decays.
            successes_P: (P,) successes, 0 <= successes <= trials; fractional rewards may be summed.
            trials_P: (P,) rollouts they were counted in.

        Raises:
            ValueError: if a row is repeated or out of range, or counts are not as above.
        """
        index_P, successes_P, failures_P = self._counts(index_P, successes_P, trials_P)
        self.decay(index_P)
        self._add(index_P, successes_P, failures_P)
        self.decay_others(index_P)

    def add(self, index_P: ArrayLike, successes_P: ArrayLike, trials_P: ArrayLike) -> None:
        """Take in rollouts without any decay; arguments and errors are those of `observe`."""
        self._add(*self._counts(index_P, successes_P, trials_P))

    def decay(self, index_P: ArrayLike) -> None:
        """Decay the prompts that a training step chose, by `decay_chosen`.

        Args:
            index_P: (P,) distinct rows.

        Raises:
            ValueError: if a row is repeated or out of range.
        """
        index_P = self._rows("index_P", index_P)
        self.alpha_D[index_P] *= self.decay_chosen
        self.beta_D[index_P] *= self.decay_chosen

    def decay_others(self, index_P: ArrayLike) -> None:
        """End a training step: decay all prompts but those it chose, by `decay_rest`, and the prior.

        Arguments and errors are those of `decay`.
        """
        index_P = self._rows("index_P", index_P)
        for count_D in (self.alpha_D, self.beta_D):
            chosen_P = count_D[index_P]
            count_D *= self.decay_rest
            count_D[index_P] = chosen_P
        if self.prior is not None:
            self.prior.decay()

    def parameters(self, index: ArrayLike | None = None) -> tuple[FloatArray, FloatArray]:
        """Both parameters of the Beta of `index` or of all: alpha + 1 and beta + 1, or, with a prior,
        alpha + kappa m and beta + kappa (1 - m)."""
        of_prior = self._prior_counts(index)
        if index is None:
            return self.alpha_D + of_prior[0], self.beta_D + of_prior[1]
        rows = integer_rows("index", index)
        # `take` is faster than indexing where a million rows are picked.
        a, b = np.take(self.alpha_D, rows), np.take(self.beta_D, rows)
        a += of_prior[0]
        b += of_prior[1]
        return a, b

    def mean(self, index: ArrayLike | None = None) -> FloatArray:
        """Expected pass rate, a / (a + b), of `index` or of all prompts."""
        a, b = self.parameters(index)
        return a / (a + b)

    def std_of_reward(self, index: ArrayLike | None = None) -> FloatArray:
        """Root of the expected variance of a 0/1 reward, E[p (1 - p)] = a b / ((a+b) (a+b+1)).

        The expectation is over the posterior, so this is not the spread of the pass rate itself.
        """
        a, b = self.parameters(index)
        return np.sqrt(a * b / ((a + b) * (a + b + 1)))

    def draw(self, index: ArrayLike | None = None, *, generator: np.random.Generator) -> FloatArray:
        """One pass rate per prompt of `index`, or of all, drawn from the posterior.

        NumPy uses a varying number of random numbers per draw, so the counts of one prompt move
        the draws of those after it: keep the order fixed, and claim no common random numbers.
        """
        return generator.beta(*self.parameters(index))

    def state_dict(self) -> dict[str, Any]:
        """What is remembered: `alpha_D` and `beta_D`, (D,) float64 arrays, and with a prior its state,
        `prior`. Settings are not."""
        state: dict[str, Any] = {"alpha_D": self.alpha_D.copy(), "beta_D": self.beta_D.copy()}
        return state if self.prior is None else state | {"prior": self.prior.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`, bit for bit.

        Raises:
            ValueError: if the state is that of another number of prompts or of something else, counts
                are negative or not finite, or it has a prior and this posterior none, or the reverse.
        """
        has, had = self.prior is not None, isinstance(state, dict) and "prior" in state
        if has != had and isinstance(state, dict) and "alpha_D" in state:
            raise ValueError(
                f"the state is of a posterior {'with' if had else 'without'} a prior that learns, this "
                f"one has {'one' if has else 'none'}: write the posterior_prior that it was saved with"
                f"{'' if had else ', flat'}"
            )
        check_names(state, ("alpha_D", "beta_D", *["prior"] * has), "a posterior's state")
        loaded = {name: np.asarray(state[name], dtype=np.float64) for name in ("alpha_D", "beta_D")}
        for name, count_D in loaded.items():
            if count_D.shape != (self.num_prompts,):
                raise ValueError(
                    f"{name} has shape {count_D.shape}, expected {(self.num_prompts,)}: "
                    f"the state belongs to another data set"
                )
            if not (np.isfinite(count_D) & (count_D >= 0)).all():
                raise ValueError(f"{name} must be finite and non-negative")
        if self.prior is not None:
            self.prior.load_state_dict(state["prior"])
        # In place: whoever holds the arrays sees what was loaded.
        self.alpha_D[:] = loaded["alpha_D"]
        self.beta_D[:] = loaded["beta_D"]

    def _add(self, index_P: IntArray, successes_P: FloatArray, failures_P: FloatArray) -> None:
        if self.prior is not None:
            self.prior.observe(index_P, successes_P, successes_P + failures_P)
        self.alpha_D[index_P] += successes_P
        self.beta_D[index_P] += failures_P

    def _prior_counts(
        self, index: ArrayLike | None
    ) -> tuple[FloatArray, FloatArray] | tuple[float, float]:
        """What the prior adds to successes and failures."""
        if self.prior is None:
            return 1.0, 1.0
        mean, kappa = self.prior.mean(index), self.prior.kappa
        return kappa * mean, kappa * (1 - mean)

    def _counts(
        self, index_P: ArrayLike, successes_P: ArrayLike, trials_P: ArrayLike
    ) -> tuple[IntArray, FloatArray, FloatArray]:
        """Rows, successes and failures, checked."""
        index_P = integer_rows("index_P", index_P)
        successes_P = np.asarray(successes_P, dtype=np.float64)
        trials_P = np.asarray(trials_P, dtype=np.float64)
        if index_P.ndim != 1 or not index_P.shape == successes_P.shape == trials_P.shape:
            raise ValueError(
                f"index_P, successes_P and trials_P must be 1-d and equally long, got shapes "
                f"{index_P.shape}, {successes_P.shape} and {trials_P.shape}"
            )
        index_P = self._rows("index_P", index_P)
        # Written so that NaN fails too.
        valid_P = (successes_P >= 0) & (successes_P <= trials_P) & (trials_P < np.inf)
        if not valid_P.all():
            at = int(np.flatnonzero(~valid_P)[0])
            raise ValueError(
                f"successes must be in [0, trials], got {successes_P[at]} of {trials_P[at]} "
                f"for prompt {index_P[at]}"
            )
        return index_P, successes_P, trials_P - successes_P

    def _rows(self, name: str, index_K: ArrayLike) -> IntArray:
        index_K = row_list(name, index_K)
        if len(np.unique(index_K)) != len(index_K):
            raise ValueError(f"{name} must be distinct, got {index_K.tolist()}")
        if ((index_K < 0) | (index_K >= self.num_prompts)).any():
            raise ValueError(f"{name} must be in [0, {self.num_prompts}), got {index_K.tolist()}")
        return index_K
