"""Stopping rules in the shape the planner asks for, made of the functions of `stopping.py`.

The plan is the cap: a prompt whose planned rollouts are used up is done whatever its rule says.
Axes: P prompts of the step.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from samplers import stopping

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


class Stopping(Protocol):
    """After a round: which prompts want more rollouts, and what their groups then weigh."""

    def __call__(
        self,
        successes_P: FloatArray,
        trials_P: IntArray,
        a_P: FloatArray,
        b_P: FloatArray,
        *,
        left_P: IntArray,
        chance_P: FloatArray,
    ) -> BoolArray | tuple[BoolArray, FloatArray]:
        """(P,) bool, True for prompts that go on; may come with (P,) weights of the gradient.

        It is asked about all prompts of the step; a prompt that has stopped stays so. Weights are
        finite and non-negative; a prompt that goes on has the largest it has gone on with.

        Args:
            successes_P, trials_P: whole numbers, of all rounds of this step; rollouts that were not
                scored are not among the trials.
            a_P, b_P: parameters of the posterior of earlier steps.
            left_P: rollouts the plan still has, 0 at its end.
            chance_P: one uniform number in [0, 1) per group, a hash of its draw key and so the same
                in every round, for rules that go on by lot.
        """
        ...


def until_positive(*, needed: int = 1) -> Stopping:
    """`stopping.positive`: until `needed` rollouts passed. Changes the objective.

    With waves of 8 and a uniform plan of 32 it is Reinforce-Ada's released setting.
    """

    def rule(
        successes_P: FloatArray,
        trials_P: IntArray,
        a_P: FloatArray,
        b_P: FloatArray,
        *,
        left_P: IntArray,
        chance_P: FloatArray,
    ) -> BoolArray:
        return stopping.positive(successes_P, 0, needed=needed, max_rounds=1)

    return rule


def until_balanced(*, keep: int = 4) -> Stopping:
    """`stopping.balanced`: until `keep` can be chosen half and half. Changes the objective."""

    def rule(
        successes_P: FloatArray,
        trials_P: IntArray,
        a_P: FloatArray,
        b_P: FloatArray,
        *,
        left_P: IntArray,
        chance_P: FloatArray,
    ) -> BoolArray:
        failures_P = trials_P - successes_P
        return stopping.balanced(successes_P, failures_P, 0, keep=keep, max_rounds=1)

    return rule


def while_mixed_is_likely(*, threshold: float) -> Stopping:
    """`stopping.early_stop`: ends groups that will stay alike. Changes the objective."""

    def rule(
        successes_P: FloatArray,
        trials_P: IntArray,
        a_P: FloatArray,
        b_P: FloatArray,
        *,
        left_P: IntArray,
        chance_P: FloatArray,
    ) -> BoolArray:
        return stopping.early_stop(a_P, b_P, successes_P, trials_P, left_P, threshold=threshold)

    return rule


def while_mixed_is_likely_unbiased(*, threshold: float, rho: float) -> Stopping:
    """The same, but a group goes on by lot with probability rho; keeps the objective.

    A group has one lot for all its rounds: it is stopped at the first test it fails, with weight 0,
    or it never is, with weight 1 / rho if it failed any and 1 if it failed none. Whatever the
    rollouts are, the expected weight is rho / rho = 1. `stopping.early_stop_unbiased` is the form
    for a single test.

    Raises:
        ValueError: if rho is not in (0, 1].
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be in (0, 1], got {rho}")

    def rule(
        successes_P: FloatArray,
        trials_P: IntArray,
        a_P: FloatArray,
        b_P: FloatArray,
        *,
        left_P: IntArray,
        chance_P: FloatArray,
    ) -> tuple[BoolArray, FloatArray]:
        passes_P = (left_P == 0) | stopping.early_stop(
            a_P, b_P, successes_P, trials_P, left_P, threshold=threshold
        )
        lucky_P = chance_P < rho
        weight_P = np.where(passes_P, 1.0, np.where(lucky_P, 1 / rho, 0.0))
        return passes_P | lucky_P, weight_P

    return rule
