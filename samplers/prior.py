"""Priors: what is expected of a prompt's pass rate before any rollout of its own.

A prompt is visited once or twice in a run, so that a posterior is nearly always its prior. A prior that
learns from a prompt's neighbours (the whole pool, prompts of its kind, prompts of similar features)
says more than "anything":

    a_p = alpha_p + kappa m_p        b_p = beta_p + kappa (1 - m_p)

m_p in (0, 1) is the expected pass rate and kappa the number of rollouts that expectation is worth.
`BetaPosterior(..., prior=...)` teaches its prior whatever it is taught itself, and decays it once a
training step. m_p and kappa are then those of earlier rounds, never of a round's own rewards.
Axes: D prompts of the data set, P prompts of one call, S strata, C features, H raw features.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.rows import check_names, integer_rows

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

DECAY = 0.95
"""Share of what a prior knows that is kept from one training step to the next: half after 14."""

RARE = 8
"""Strata of fewer prompts are no strata: their prompts have the pool's rate (project default)."""

KAPPA = 8.0
"""kappa before anything is known of it; measured to work (project default)."""

KAPPA_RANGE = (2.0, 50.0)
"""An estimated kappa stays in here."""

EVIDENCE = 40.0
"""What the first guess of kappa weighs against pairs of rollouts: as 100 groups of two at a pass rate of
.3 do (project default)."""

PENALTY = 20.0
"""Of the squared coefficients of `FeaturesPrior`, in rollouts (project default)."""


class Prior(Protocol):
    """What a `BetaPosterior` asks of its prior."""

    num_prompts: int

    @property
    def kappa(self) -> float:
        """How many rollouts the prior counts as, positive."""
        ...

    def mean(self, index: ArrayLike | None = None) -> FloatArray:
        """Expected pass rates m of `index`, or of all prompts, strictly between 0 and 1."""
        ...

    def observe(self, index_P: IntArray, successes_P: FloatArray, trials_P: FloatArray) -> None:
        """Learn from counts of distinct prompts, 0 <= successes <= trials."""
        ...

    def decay(self) -> None:
        """End a training step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What is remembered: arrays, lists of strings and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly."""
        ...


class Strength:
    """kappa, given or estimated: how near to its prior mean a prompt's pass rate is.

    With pass rates Beta(kappa m, kappa (1 - m)) two rollouts of one prompt are alike with correlation
    rho = 1 / (kappa + 1). Over the groups of S passes in n rollouts of the last steps,

        rho = sum [(S - n m)^2 - S (1 - m)^2 - (n - S) m^2]  /  sum n (n - 1) m (1 - m),

    products of deviations of different rollouts over what they would be were they the same one, so that
    binomial noise drops out and m is right or the estimate is larger for it: what m does not explain
    is what a prompt may differ by. This is kappa = m (1 - m) / v - 1, with v the variance between
    prompts net of binomial noise, pooled over strata. Groups of one rollout say nothing. Fractional
    rewards vary less inside a group than passes and failures would, which makes kappa too large: give
    it there.

    (Method of moments of the beta-binomial. Weights, first guess and range are project defaults.)

    Args:
        kappa: a positive number to keep; None estimates it, between `KAPPA_RANGE`.

    Raises:
        ValueError: if kappa is not positive and finite.
    """

    def __init__(self, kappa: float | None) -> None:
        if kappa is not None and not 0 < kappa < math.inf:
            raise ValueError(f"kappa must be positive and finite, or None, got {kappa}")
        self._given = None if kappa is None else float(kappa)
        self._alike = self._pairs = 0.0

    @property
    def kappa(self) -> float:
        """The given one, or the estimate."""
        if self._given is not None:
            return self._given
        low, high = KAPPA_RANGE
        rho = (self._alike + EVIDENCE / (1 + KAPPA)) / (self._pairs + EVIDENCE)
        return high if rho <= 1 / (1 + high) else max(1 / rho - 1, low)

    def observe(self, mean_P: FloatArray, successes_P: FloatArray, trials_P: FloatArray) -> None:
        """Learn from groups whose pass rates were expected to be `mean_P`."""
        several_P = trials_P > 1
        m, s, n = mean_P[several_P], successes_P[several_P], trials_P[several_P]
        self._alike += float((np.square(s - n * m) - s * (1 - 2 * m) - n * m * m).sum())
        self._pairs += float((n * (n - 1) * m * (1 - m)).sum())

    def decay(self, share: float) -> None:
        """Keep a share of what is known."""
        self._alike *= share
        self._pairs *= share

    def state_dict(self) -> dict[str, Any]:
        """Both sums."""
        return {"alike": self._alike, "pairs": self._pairs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly."""
        check_names(state, ("alike", "pairs"), "the state of a prior's strength")
        self._alike, self._pairs = float(state["alike"]), float(state["pairs"])


class StrataPrior:
    """Expects of a prompt the pass rate of its stratum: of prompts with the same value of a column.

        m_s = (A_s + 2 q_s) / (A_s + B_s + 2)          q_s = (A_o + 1) / (A_o + B_o + 2)

    A_s and B_s are the stratum's passes and failures, A_o and B_o those of all others; both decay once
    a training step. A stratum that is not visited thereby returns to what the rest of the pool says, and
    is tried again. With one stratum m = (A + 1) / (A + B + 2). (The pooling is empirical Bayes; the
    two rollouts at q are a project default.)

    Prompts without a stratum, or in one of fewer than `rare` prompts, have the rate of the whole pool.
    Rollouts count one by one, so prompts with larger budgets, and those a selector prefers, weigh more.

    Args:
        stratum_D: (D,) the stratum of each prompt by name; None for none.
        decay: in [0, 1], what is kept from step to step.
        kappa: see `Strength`.
        rare: strata of fewer prompts are none.

    Raises:
        ValueError: if there is no prompt, or a setting is out of range.
    """

    def __init__(
        self,
        stratum_D: Sequence[str | None],
        *,
        decay: float = DECAY,
        kappa: float | None = None,
        rare: int = RARE,
    ) -> None:
        _check(len(stratum_D), decay)
        counts: dict[str, int] = {}
        for name in stratum_D:
            if name is not None:
                counts[name] = counts.get(name, 0) + 1
        self.names = sorted(name for name, count in counts.items() if count >= rare)
        """(S,) the strata there are."""
        place = {name: at for at, name in enumerate(self.names)}
        self.num_prompts = len(stratum_D)
        none = len(self.names)
        self._place_D = np.array([none if n is None else place.get(n, none) for n in stratum_D])
        self._decay = decay
        self._strength = Strength(kappa)
        # The last place is that of prompts without a stratum.
        self._passed_S = np.zeros(none + 1)
        self._failed_S = np.zeros(none + 1)
        self._mean_S: FloatArray | None = None

    @property
    def kappa(self) -> float:
        """How many rollouts the prior counts as."""
        return self._strength.kappa

    @property
    def mean_S(self) -> FloatArray:
        """(S + 1,) expected pass rate of each stratum, and last of prompts without one."""
        if self._mean_S is None:
            passed, failed = self._passed_S, self._failed_S
            others_passed = passed.sum() - passed
            others = others_passed + (failed.sum() - failed)
            rate_of_others = (others_passed + 1) / (others + 2)
            mean_S = (passed + 2 * rate_of_others) / (passed + failed + 2)
            mean_S[-1] = (passed.sum() + 1) / (passed.sum() + failed.sum() + 2)
            self._mean_S = mean_S
        return self._mean_S

    def mean(self, index: ArrayLike | None = None) -> FloatArray:
        """Expected pass rates of `index`, or of all prompts."""
        place = self._place_D if index is None else self._place_D[integer_rows("index", index)]
        return self.mean_S[place]

    def observe(self, index_P: IntArray, successes_P: FloatArray, trials_P: FloatArray) -> None:
        """Learn from counts; kappa by what was expected before them."""
        self._strength.observe(self.mean(index_P), successes_P, trials_P)
        np.add.at(self._passed_S, self._place_D[index_P], successes_P)
        np.add.at(self._failed_S, self._place_D[index_P], trials_P - successes_P)
        self._mean_S = None

    def decay(self) -> None:
        """End a training step."""
        self._passed_S *= self._decay
        self._failed_S *= self._decay
        self._strength.decay(self._decay)
        self._mean_S = None

    def state_dict(self) -> dict[str, Any]:
        """`names` of the strata, (S + 1,) `passed_S` and `failed_S`, and `strength`."""
        return {
            "names": list(self.names),
            "passed_S": self._passed_S.copy(),
            "failed_S": self._failed_S.copy(),
            "strength": self._strength.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly; by name, so that strata may have come or gone.

        What is known of a stratum that is none any more goes to the prompts without one.

        Raises:
            ValueError: if the state is that of something else.
        """
        check_names(state, ("names", "passed_S", "failed_S", "strength"), "the state of strata")
        for name in ("passed_S", "failed_S"):
            if np.shape(state[name]) != (len(state["names"]) + 1,):
                raise ValueError(f"{name} must have one number for each stratum, and one more")
        place = {name: at for at, name in enumerate(self.names)}
        to = np.array([*(place.get(name, -1) for name in state["names"]), -1])
        for count_S, name in ((self._passed_S, "passed_S"), (self._failed_S, "failed_S")):
            count_S[:] = 0
            np.add.at(count_S, to, np.asarray(state[name], dtype=np.float64))
        self._strength.load_state_dict(state["strength"])
        self._mean_S = None


def pooled_prior(
    num_prompts: int, *, decay: float = DECAY, kappa: float | None = None
) -> StrataPrior:
    """Expects of every prompt the pass rate of the whole pool: a `StrataPrior` of one stratum."""
    return StrataPrior([""] * num_prompts, decay=decay, kappa=kappa, rare=1)


class FeaturesPrior:
    """Expects of a prompt what prompts with similar features have earned: ridge regression.

        m = c + x.v, clipped to [.05, .95]
        c, v minimise  sum_rows w (r - c - x.v)^2 + 2 (1/2 - c)^2 + penalty |v|^2

    over the rollouts of the last steps, whose weights w decay once a training step; it is solved in
    closed form from sums that decay likewise. Constant features leave the pool's rate, (A + 1) /
    (A + B + 2). Pass rates are regressed and not their logits, which few rollouts do not have.

    (After MPTS, arXiv:2501.11039, whose neural process ranks drifting synthetic prompts less well than
    ridge on the last 10 batches. Penalty, decay and bounds are project defaults.)

    Args:
        feature_DC: (D, C) finite; standardised here, so that their units do not matter. Or a function
            that returns them, called once, when they are first needed, and not where a state has them.
        num_prompts: D, where a function is given.
        decay: in [0, 1], what is kept from step to step.
        kappa: see `Strength`.
        penalty: of the squared coefficients, positive.

    Raises:
        ValueError: if features are not as above, or a setting is out of range.
    """

    def __init__(
        self,
        feature_DC: ArrayLike | Callable[[], ArrayLike],
        *,
        num_prompts: int | None = None,
        decay: float = DECAY,
        kappa: float | None = None,
        penalty: float = PENALTY,
    ) -> None:
        self._x_DC: FloatArray | None = None
        if callable(feature_DC):
            self._make: Callable[[], ArrayLike] | None = feature_DC
            self.num_prompts = num_prompts or 0
        else:
            self._make, self._x_DC = None, standardised(feature_DC)
            self.num_prompts = len(self._x_DC)
        _check(self.num_prompts, decay)
        if not 0 < penalty < math.inf:
            raise ValueError(f"penalty must be positive and finite, got {penalty}")
        self._decay = decay
        self._penalty = penalty
        self._strength = Strength(kappa)
        # Of the constant, which comes first, and of the features; of none before there are any.
        size = 0 if self._x_DC is None else self._x_DC.shape[1] + 1
        self._gram_CC = np.zeros((size, size))
        self._moment_C = np.zeros(size)
        self._mean_D: FloatArray | None = None

    @property
    def feature_DC(self) -> FloatArray:
        """(D, C) the standardised features; read-only."""
        if self._x_DC is None:
            assert self._make is not None
            x_DC = standardised(self._make())
            if len(x_DC) != self.num_prompts:
                raise ValueError(
                    f"there are features of {len(x_DC)} prompts, expected {self.num_prompts}"
                )
            self._x_DC = x_DC
            self._gram_CC = np.zeros((x_DC.shape[1] + 1,) * 2)
            self._moment_C = np.zeros(x_DC.shape[1] + 1)
        self._x_DC.setflags(write=False)
        return self._x_DC

    @property
    def kappa(self) -> float:
        """How many rollouts the prior counts as."""
        return self._strength.kappa

    def mean(self, index: ArrayLike | None = None) -> FloatArray:
        """Expected pass rates of `index`, or of all prompts."""
        if self._mean_D is None:
            x_DC = self.feature_DC
            gram_CC, moment_C = self._gram_CC.copy(), self._moment_C.copy()
            gram_CC[np.diag_indices_from(gram_CC)] += [2.0] + [self._penalty] * (len(moment_C) - 1)
            moment_C[0] += 1.0
            constant, *coefficients = np.linalg.solve(gram_CC, moment_C).tolist()
            predicted_D = constant + x_DC @ np.array(coefficients)
            # Rounded, as the last digits of matrix products differ between kinds of processors and
            # every process must decide alike.
            self._mean_D = np.round(np.clip(predicted_D, 0.05, 0.95), 9)
        return self._mean_D.copy() if index is None else self._mean_D[integer_rows("index", index)]

    def observe(self, index_P: IntArray, successes_P: FloatArray, trials_P: FloatArray) -> None:
        """Learn from counts; kappa by what was expected before them."""
        self._strength.observe(self.mean(index_P), successes_P, trials_P)
        x_PC = np.column_stack([np.ones(len(index_P)), self.feature_DC[index_P]])
        self._gram_CC += x_PC.T @ (x_PC * trials_P[:, None])
        self._moment_C += x_PC.T @ successes_P
        self._mean_D = None

    def decay(self) -> None:
        """End a training step."""
        self._gram_CC *= self._decay
        self._moment_C *= self._decay
        self._strength.decay(self._decay)
        self._mean_D = None

    def state_dict(self) -> dict[str, Any]:
        """`gram_CC` and `moment_C`, the sums, `strength`, and `feature_DC`, or None before they are
        needed, so that a run goes on with the features it began with."""
        return {
            "feature_DC": None if self._x_DC is None else self.feature_DC,
            "gram_CC": self._gram_CC.copy(),
            "moment_C": self._moment_C.copy(),
            "strength": self._strength.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly.

        Raises:
            ValueError: if the state is that of something else or of other prompts.
        """
        names = ("feature_DC", "gram_CC", "moment_C", "strength")
        check_names(state, names, "the state of a prior of features")
        features = state["feature_DC"]
        x_DC = None if features is None else np.array(features, dtype=np.float64)
        if x_DC is not None and (x_DC.ndim != 2 or len(x_DC) != self.num_prompts):
            raise ValueError(
                f"the state has features of shape {x_DC.shape}, there are {self.num_prompts} prompts"
            )
        if x_DC is not None or self._make is not None:
            self._x_DC = x_DC
        self._gram_CC = np.array(state["gram_CC"], dtype=np.float64)
        self._moment_C = np.array(state["moment_C"], dtype=np.float64)
        self._strength.load_state_dict(state["strength"])
        self._mean_D = None


def standardised(feature_DC: ArrayLike) -> FloatArray:
    """(D, C) features of mean 0 and std 1; constant ones are 0.

    Raises:
        ValueError: if they are not finite numbers in two axes.
    """
    x_DC = np.array(feature_DC, dtype=np.float64)
    if x_DC.ndim != 2 or 0 in x_DC.shape:
        raise ValueError(f"features must be (prompts, features), got shape {x_DC.shape}")
    if not np.isfinite(x_DC).all():
        row = int(np.flatnonzero(~np.isfinite(x_DC).all(axis=1))[0])
        raise ValueError(f"features must be finite, those of row {row} are not")
    scale_C = np.abs(x_DC).max(axis=0)  # so that squares neither overflow nor vanish
    x_DC /= np.where(scale_C > 0, scale_C, 1.0)
    x_DC -= x_DC.mean(axis=0)
    std_C = x_DC.std(axis=0)
    varies_C = std_C > 1e-12
    return np.where(varies_C, x_DC / np.where(varies_C, std_C, 1.0), 0.0)


def principal_components(feature_DH: ArrayLike, num_components: int) -> FloatArray:
    """(D, C) scores of the components of largest variance of standardised features.

    By subspace iteration from a fixed start, which is exact where variances fall off and costs
    O(D H C) whatever H is. C is at most D and H. Scores are not standardised.

    Raises:
        ValueError: as `standardised`, or if there is to be no component.
    """
    if num_components < 1:
        raise ValueError(f"num_components must be at least 1, got {num_components}")
    x_DH = standardised(feature_DH)
    most = min(*x_DH.shape, num_components)
    size = min(*x_DH.shape, most + 8)
    basis_HK = np.random.default_rng(0).standard_normal((x_DH.shape[1], size))
    for _ in range(12):
        basis_HK, _ = np.linalg.qr(x_DH.T @ (x_DH @ basis_HK))
    score_DK = x_DH @ basis_HK
    _, axes_KK = np.linalg.eigh(score_DK.T @ score_DK)  # in order of rising variance
    return score_DK @ axes_KK[:, ::-1][:, :most]


def _check(num_prompts: int, decay: float) -> None:
    if num_prompts < 1:
        raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay}")
