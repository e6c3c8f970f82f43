"""Proposals of the planner, and checks of the rewards that answer them.

Axes: D prompts of the data set, P prompts of the step, N rollouts of the round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.starts import ChosenStarts

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Reason = Literal["mixed", "all_pass", "all_fail", "lone"]


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Proposal:
    """One round of rollouts to be made. Its arrays are read-only.

    Example, two prompts of a one-round step, three rollouts::

        Proposal(step=4, round=0, is_last=True,
                 index_P=[17, 3], budget_P=[1, 2], draw_P=[0, 2], first_slot_P=[0, 0],
                 a_P=[1.0, 1.0], b_P=[1.0, 4.0], seed_N=[...three...])     # prompt_N is [0, 1, 1]
    """

    step: int
    """Counts from 0."""
    round: int
    """0, 1 for the rollouts that follow the pilots, or counting on under a stopping rule."""
    is_last: bool
    """Whether the step is sure to end when this round is observed. A stopping rule may end it
    earlier: see `Planner.is_open`."""
    index_P: IntArray
    """(P,) rows of the data set, distinct, in the selector's order."""
    budget_P: IntArray
    """(P,) rollouts of this round; 0 is possible."""
    draw_P: IntArray
    """(P,) how often each prompt had been drawn before; with the key it names the group."""
    first_slot_P: IntArray
    """(P,) rollouts of earlier rounds of this step; this round's slots follow them."""
    a_P: FloatArray
    """(P,) parameters of the posterior before any rollout of this step; of a start's own counts where
    there is one."""
    b_P: FloatArray
    seed_N: IntArray
    """(N,) rollout seeds in [0, 2**63), ordered by prompt, then slot; N = budget_P.sum()."""
    starts: ChosenStarts | None = None
    """What the rollouts of each prompt begin with; None where the planner chooses no starts."""

    @property
    def start_P(self) -> IntArray:
        """(P,) tokens that each prompt's rollouts start with; 0 for none."""
        return np.zeros_like(self.index_P) if self.starts is None else self.starts.length_P

    @property
    def pass_rate_P(self) -> FloatArray:
        """(P,) posterior mean before any rollout of this step."""
        return self.a_P / (self.a_P + self.b_P)

    @property
    def prompt_N(self) -> IntArray:
        """(N,) each row's place in `index_P`."""
        return np.repeat(np.arange(len(self.index_P)), self.budget_P)


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a group carries gradient, and why."""

    kept: bool
    reason: Reason


def group_reason(low: float, high: float, num_rollouts: int, *, passes: bool) -> Reason:
    """What a group is, from its smallest and largest reward, its size and whether all rows pass.

    The test is max > min, exactly: the std of equal rewards need not come out as 0.
    """
    if high > low:
        return "mixed"
    if num_rollouts == 1:
        return "lone"
    return "all_pass" if passes else "all_fail"


def admit(reward_n: ArrayLike, success_n: ArrayLike | None = None) -> Decision:
    """Whether a group has any spread, max > min, without which it carries no gradient.

    The test is exact and on the rewards themselves: a group of equal fractional rewards has none.
    It is all or nothing: a group is never kept in part. (DAPO, arXiv:2503.14476.)

    Args:
        reward_n: (n,) finite rewards of one group, at least one.
        success_n: (n,) their successes, `Success.of`, of which 1 is a pass; this only separates
            "all_pass" from "all_fail". Default: rewards of at least 1 pass.

    Returns:
        kept, for "mixed"; or not, for "lone" (one rollout, nothing to compare with), "all_pass" or
        "all_fail" (none passes, although each may have the same partial credit).

    Raises:
        ValueError: if there is no reward, one is not finite, or successes have another shape.
    """
    reward_n = np.asarray(reward_n, dtype=np.float64)
    if reward_n.ndim != 1 or len(reward_n) == 0 or not np.isfinite(reward_n).all():
        raise ValueError(f"reward_n must be 1-d, finite and not empty, got {reward_n.tolist()}")
    success_n = reward_n if success_n is None else np.asarray(success_n, dtype=np.float64)
    if success_n.shape != reward_n.shape:
        raise ValueError(
            f"success_n must have one number per reward, got shapes {success_n.shape} and "
            f"{reward_n.shape}"
        )
    low, high = float(reward_n.min()), float(reward_n.max())
    reason = group_reason(low, high, len(reward_n), passes=bool((success_n >= 1).all()))
    return Decision(kept=reason == "mixed", reason=reason)


def checked_rewards(
    proposal: Proposal,
    reward_N: ArrayLike,
    prompt_N: ArrayLike,
    *,
    keys: Sequence[str],
) -> tuple[FloatArray, IntArray]:
    """Rewards and places as float64 and int64, if they can be those of the proposal's rollouts.

    Args:
        proposal: the round they were made for.
        reward_N: (N,) finite rewards, one per scored rollout, in any order.
        prompt_N: (N,) integers, each row's place in `proposal.index_P`.
        keys: (D,) prompt keys, for the messages.

    Raises:
        ValueError: if shapes, places or rewards are not as above, or a prompt has more rewards
            than rollouts; rewards are named by prompt key.
    """
    reward_N, prompt_N = np.asarray(reward_N, dtype=np.float64), np.asarray(prompt_N)
    if len(prompt_N) == 0:
        prompt_N = prompt_N.astype(np.int64)
    if reward_N.shape != prompt_N.shape or reward_N.ndim != 1:
        raise ValueError(
            f"reward_N and prompt_N must be 1-d and equally long, "
            f"got {reward_N.shape} and {prompt_N.shape}"
        )
    num_prompts = len(proposal.index_P)
    if prompt_N.dtype.kind not in "iu" or ((prompt_N < 0) | (prompt_N >= num_prompts)).any():
        raise ValueError(
            f"prompt_N must be integer places in index_P, in [0, {num_prompts}), "
            f"got {np.unique(prompt_N).tolist()}"
        )
    finite_N = np.isfinite(reward_N)
    if not finite_N.all():
        row = int(np.flatnonzero(~finite_N)[0])
        key = keys[proposal.index_P[prompt_N[row]]]
        raise ValueError(
            f"rewards must be finite; got {reward_N[row]} for prompt {key} (row {row})"
        )
    trials_P = np.bincount(prompt_N, minlength=num_prompts)
    if (trials_P > proposal.budget_P).any():
        place = int(np.flatnonzero(trials_P > proposal.budget_P)[0])
        raise ValueError(
            f"prompt {keys[proposal.index_P[place]]} has {trials_P[place]} rewards for "
            f"{proposal.budget_P[place]} rollouts"
        )
    return reward_N, prompt_N.astype(np.int64)
