"""Stopping rules: after some rollouts of a step, which prompts get more.

A rule is a function of the step's `Counts`. It answers True for each prompt that goes on, and may add
a weight for each prompt's gradient. The planner asks it after every round; the plan is the cap, so a
prompt without planned rollouts is done whatever its rule says.

Rules read counts in slot order and never who finished first: a group that stops because its quick
rollouts agree is a biased group. Axes: P prompts, R outcomes.

    rule                 stops a prompt                          objective
    positive, balanced   once enough passed (and failed)         changes: R / n overestimates p
    early                whose group will likely stay alike      changes: extreme prompts weigh less
    early_unbiased       the same, but some go on by lot         unchanged, by the weights it gives

Rules that stop on counts keep the direction of each prompt's leave-one-out gradient and change its
weight. Give the posterior every rollout either way: a rule that looks at outcomes only does not bias it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Counts:
    """What a stopping rule sees of the step's prompts, all rounds together: (P,) float64 arrays."""

    a_P: FloatArray
    """First parameter of the Beta posterior of earlier steps: successes remembered, plus 1."""
    b_P: FloatArray
    """Second parameter: failures remembered, plus 1."""
    successes_P: FloatArray
    """Rollouts that passed, whole numbers."""
    trials_P: FloatArray
    """Rollouts that were scored, whole numbers."""
    left_P: FloatArray
    """Rollouts that are still planned, 0 at the end of the plan."""
    chance_P: FloatArray
    """One uniform number in [0, 1) per group, for rules that let some go on by lot. The planner takes
    it from a hash of the draw key, so it is the same in every round."""

    @classmethod
    def of(
        cls,
        a_P: ArrayLike,
        b_P: ArrayLike,
        successes_P: ArrayLike,
        trials_P: ArrayLike,
        left_P: ArrayLike,
        chance_P: ArrayLike = 0.0,
    ) -> "Counts":
        """Counts as float64 copies, checked; one number stands for P equal ones.

        Raises:
            ValueError: if shapes differ, a count is negative or not finite, a posterior parameter is
                not positive, or a prompt has more successes than trials.
        """
        named = {
            "a_P": a_P,
            "b_P": b_P,
            "successes_P": successes_P,
            "trials_P": trials_P,
            "left_P": left_P,
            "chance_P": chance_P,
        }
        columns = _arrays(named, like=np.asarray(a_P, dtype=np.float64))
        counts = cls(**dict(zip(named, columns, strict=True)))
        _check_positive(counts.a_P, counts.b_P)
        if (counts.failures_P < 0).any():
            p = int(np.flatnonzero(counts.failures_P < 0)[0])
            raise ValueError(
                f"successes must be at most trials, got {counts.successes_P[p]} of "
                f"{counts.trials_P[p]} for prompt {p}"
            )
        return counts

    @property
    def failures_P(self) -> FloatArray:
        """(P,) rollouts that were scored and did not pass."""
        return self.trials_P - self.successes_P

    @property
    def mixed_P(self) -> FloatArray:
        """(P,) chance that the group ends with passes and failures in it.

        1 if it has both already; else 1 - P(the rest fail) after failures only, 1 - P(the rest pass)
        after passes only, and before any rollout 1 minus either.
        """
        return 1 - self.alike_P

    @property
    def alike_P(self) -> FloatArray:
        """(P,) chance that all rollouts of the group end alike: 1 - `mixed_P`, without cancellation."""
        a_P, b_P = self.a_P + self.successes_P, self.b_P + self.failures_P
        all_fail_P = np.where(self.successes_P == 0, rest_all_fail(a_P, b_P, self.left_P), 0.0)
        all_pass_P = np.where(self.failures_P == 0, rest_all_fail(b_P, a_P, self.left_P), 0.0)
        # Before any rollout both are possible, and where none is left both are certain.
        return np.minimum(all_fail_P + all_pass_P, 1.0)


Stopping = Callable[[Counts], BoolArray | tuple[BoolArray, FloatArray]]
"""`rule(counts) -> continue_P`, or `(continue_P, weight_P)`. Any function of this shape is a rule.

continue_P is (P,) bool, True where the prompt goes on. weight_P is (P,), finite and non-negative, what
the group's gradient is multiplied by. The planner asks about all prompts of the step after every round;
a prompt that has stopped stays stopped, and one that goes on has the largest weight it was given."""


def positive(*, needed: int = 1) -> Stopping:
    """Roll out until `needed` rollouts passed.

    Hard prompts get more rollouts although nobody estimates how hard they are. With rounds of M
    rollouts, `needed` = 1 and no cap, the expected number is M / (1 - (1 - p)^M). **Changes the
    objective**: the number of rollouts depends on their outcome, so the pool's pass rate overestimates
    p, by .03 at p = .1 with 4 rounds of 8.

    (Reinforce-Ada Seq, arXiv:2510.04996; rounds of 8 and a uniform plan of 32 are its released setting.
    The paper weights a prompt by 1 / p as well, which is another objective and is not done here.)

    Args:
        needed: passes that are enough, at least 1.

    Raises:
        ValueError: if `needed` is below 1.
    """
    if needed < 1:
        raise ValueError(f"needed must be at least 1, got {needed}")

    def rule(counts: Counts) -> BoolArray:
        return (counts.successes_P < needed) & (counts.left_P > 0)

    return rule


def balanced(*, keep: int = 4) -> Stopping:
    """Roll out until `keep` rollouts can be chosen half passed and half failed.

    That is floor(keep / 2) passes and keep - floor(keep / 2) failures. Easy prompts go on as well as
    hard ones. **Changes the objective** as `positive` does, and more so after the group is
    down-sampled to `keep`.

    (Reinforce-Ada Seq, arXiv:2510.04996, "balance"; 4 kept as in its code.)

    Args:
        keep: rollouts that will be kept, at least 2.

    Raises:
        ValueError: if `keep` is below 2.
    """
    if keep < 2:
        raise ValueError(f"keep must be at least 2, got {keep}")
    passes, failures = keep // 2, keep - keep // 2

    def rule(counts: Counts) -> BoolArray:
        lacking_P = (counts.successes_P < passes) | (counts.failures_P < failures)
        return lacking_P & (counts.left_P > 0)

    return rule


def early(*, threshold: float) -> Stopping:
    """Stop groups that are all alike so far and will likely stay so.

    Continue iff  P(mixed) >= threshold  and rollouts are left. A group that is mixed already has
    P(mixed) = 1 and gets all its rollouts. threshold = 1 stops every group that is all alike, as in
    "stop at 4 of 8 if all equal".

    **Changes the objective**: a stopped group has leave-one-out gradient 0, so directions stay and
    prompts near p = 0 and 1 weigh less. 4 of 8 keeps .58, .65, .84, .90, .65 of the weight at
    p = .05, .1, .3, .5, .9. `early_unbiased` keeps all of it.

    Args:
        threshold: in [0, 1]; 0 stops none.

    Raises:
        ValueError: if the threshold is out of range.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")

    def rule(counts: Counts) -> BoolArray:
        # Not mixed_P >= threshold: a chance of 1e-20 to stay alike would be lost there.
        return (counts.alike_P <= 1 - threshold) & (counts.left_P > 0)

    return rule


def early_unbiased(*, threshold: float, rho: float) -> Stopping:
    """`early`, but a group that it would stop goes on with probability rho and weighs 1 / rho.

    A group has one lot for all its rounds. It is stopped at the first test it fails, with weight 0, or
    it never is, with weight 1 / rho if it failed any test and 1 if it failed none. Whatever the rollouts
    are, the expected weight is rho / rho = 1: **the objective is that of no stopping**. The price is
    variance, from the few heavy groups.

    Args:
        threshold: as in `early`.
        rho: in (0, 1]; 1 stops none.

    Raises:
        ValueError: if a setting is out of range.
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be in (0, 1], got {rho}")
    plain = early(threshold=threshold)

    def rule(counts: Counts) -> tuple[BoolArray, FloatArray]:
        # A group at the end of its plan is complete: it is not stopped, and weighs 1.
        passes_P = (counts.left_P == 0) | plain(counts)
        lucky_P = counts.chance_P < rho
        weight_P = np.where(passes_P, 1.0, np.where(lucky_P, 1 / rho, 0.0))
        return passes_P | lucky_P, weight_P

    return rule


def rest_all_fail(a_P: ArrayLike, b_P: ArrayLike, left_P: ArrayLike) -> FloatArray:
    """P(the next `left` rollouts all fail) under Beta(a, b); with a, b swapped, that all pass.

        prod_{j < left} (b + j) / (a + b + j)

    a and b already hold the group's rollouts so far. Beta(1, 1) and 4 failures, 4 left: 5/9.
    """
    a_P = np.asarray(a_P, dtype=np.float64)
    a_P, b_P, left_P = _arrays({"a_P": a_P, "b_P": b_P, "left_P": left_P}, like=a_P)
    _check_positive(a_P, b_P)
    chance_P = np.ones_like(a_P)
    for j in range(int(left_P.max(initial=0))):
        chance_P *= np.where(j < left_P, (b_P + j) / (a_P + b_P + j), 1.0)
    return chance_P


def success_distribution(a_P: ArrayLike, b_P: ArrayLike, trials: int) -> FloatArray:
    """P(r of `trials` pass) under Beta(a, b), for every r: the beta-binomial distribution.

        C(n, r) B(a + r, b + n - r) / B(a, b)

    Args:
        a_P, b_P: (P,) positive parameters.
        trials: n, at least 0.

    Returns:
        (P, n + 1) float64, column r; each row sums to 1.
    """
    a_P = np.asarray(a_P, dtype=np.float64)
    a_P, b_P = _arrays({"a_P": a_P, "b_P": b_P}, like=a_P)
    _check_positive(a_P, b_P)
    if trials < 0:
        raise ValueError(f"trials must be at least 0, got {trials}")
    # Rollout by rollout: after m of them, r passed. Only sums and products of positive numbers, so
    # nothing cancels.
    chance_PR = np.zeros((len(a_P), trials + 1))
    chance_PR[:, 0] = 1
    r_R = np.arange(trials + 1)
    for m in range(trials):
        passing_PR = chance_PR * (a_P[:, None] + r_R)
        failing_PR = chance_PR * np.maximum(b_P[:, None] + m - r_R, 0)
        chance_PR = failing_PR
        chance_PR[:, 1:] += passing_PR[:, :-1]
        chance_PR /= (a_P + b_P + m)[:, None]
    return chance_PR


def _check_positive(a_P: FloatArray, b_P: FloatArray) -> None:
    smallest = min(a_P.min(initial=np.inf), b_P.min(initial=np.inf))
    if smallest <= 0:
        raise ValueError(f"a and b must be positive, got {smallest}")


def _arrays(named: dict[str, ArrayLike], like: FloatArray) -> list[FloatArray]:
    """As (P,) float64, finite and non-negative; a single number is repeated where `like` is."""
    arrays = [np.array(value, dtype=np.float64) for value in named.values()]
    arrays = [np.full_like(like, x) if x.ndim == 0 else x for x in arrays]
    shapes = {name: x.shape for name, x in zip(named, arrays, strict=True)}
    if like.ndim != 1 or any(shape != like.shape for shape in shapes.values()):
        raise ValueError(f"counts must be 1-d and equally long, got shapes {shapes}")
    for name, x in zip(named, arrays, strict=True):
        wrong_P = ~((x >= 0) & (x < np.inf))
        if wrong_P.any():
            p = int(np.flatnonzero(wrong_P)[0])
            raise ValueError(f"{name} must be finite and non-negative, got {x[p]} for prompt {p}")
    return arrays
