"""Read every reward as a success in [0, 1], in the same way everywhere.

Posteriors, stopping rules, pass rates, and what a group is called (all pass, all fail) read these
numbers and no reward. Axes: N rollouts.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.rows import check_names

FloatArray = NDArray[np.float64]

ROUNDING = 1e-6
"""Share of full marks that may be missing or too much: ten tenths do not sum to 1."""


def full_marks(weights: Sequence[float]) -> float:
    """The largest reward that functions of rewards in [0, 1] can give together: sum of w_f over w_f > 0.

    A weight of 0 adds nothing. A negative weight is a penalty, whose best value is none: with it
    rewards can be negative, and then they are not read as fractions of full marks at all.
    """
    return math.fsum(weight for weight in weights if weight > 0)


@dataclass(frozen=True, slots=True)
class Seen:
    """Number, mean, smallest and largest of the rewards seen; all 0 before any."""

    count: int = 0
    mean: float = 0.0
    low: float = 0.0
    high: float = 0.0

    def and_also(self, other: "Seen") -> "Seen":
        """Both together. No sum is formed that could overflow."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        low, high = min(self.low, other.low), max(self.high, other.high)
        mean = self.mean * (self.count / count) + other.mean * (other.count / count)
        # The mean of equal numbers is that number: rounding must not put it below them.
        return Seen(count, min(max(mean, low), high), low, high)

    @classmethod
    def of(cls, reward_N: FloatArray) -> "Seen":
        """These rewards; the same in any order of rows."""
        if not len(reward_N):
            return cls()
        low, high = float(reward_N.min()), float(reward_N.max())
        mean = math.fsum((reward_N / len(reward_N)).tolist())
        return cls(len(reward_N), min(max(mean, low), high), low, high)


class Success:
    """Read rewards as successes s in [0, 1]; s = 1 is a pass.

        success_above given             s = 1 if reward > success_above else 0
        rewards within [0, full marks]  s = reward / full marks
        from the first other reward on  s = 1 if reward > mean of all rewards of earlier steps else 0

    In the first step that mean is the step's own, of its rewards up to the round at hand. It is fixed
    while a step lasts, and the change to it is warned of once. It moves with the policy, so a pass
    rate that is read with it says how a rollout compares with earlier ones and stays near a half;
    `success_above` sets a fixed line. (A project default, not from a paper.)

    Args:
        above: `success_above`, or None.
        full_marks: of a rollout to which all rewards apply, at least 0. With 0 only a reward of
            exactly 0 is within range, and it is no success.

    Raises:
        ValueError: if a number is not as above.
    """

    def __init__(self, *, above: float | None = None, full_marks: float = 1.0) -> None:
        if above is not None and math.isnan(above):
            raise ValueError("success_above must be a number or None, got nan")
        if not 0 <= full_marks < math.inf:
            raise ValueError(f"full_marks must be finite and at least 0, got {full_marks}")
        self.above = above
        self.full_marks = full_marks
        self._is_relative = False
        self._line: float | None = None  # of the step at hand, or observed last
        self._before, self._step = Seen(), Seen()  # rewards of earlier steps, and of this one
        self._warned = False

    @property
    def line(self) -> float | None:
        """The reward above which a rollout is a success; None while rewards are read as fractions."""
        return self._line if self.above is None else self.above

    def begin_step(self) -> None:
        """Begin a step: rewards of the step before count in the mean from here on."""
        self._before, self._step = self._before.and_also(self._step), Seen()
        self._line = self._before.mean if self._is_relative and self._before.count else None

    def observe(
        self,
        reward_N: FloatArray,
        full_marks_N: ArrayLike | None = None,
        *,
        counts_N: NDArray[np.bool_] | None = None,
    ) -> FloatArray:
        """(N,) successes of a round's rewards, which count in the mean of later steps.

        Args:
            reward_N: (N,) finite rewards.
            full_marks_N: (N,) full marks of each row, where not every reward applies to all rows.
            counts_N: (N,) which rewards count in that mean: not those of rollouts with a start. Default:
                all.
        """
        if self.above is not None:
            return self.of(reward_N)
        counted_N = reward_N if counts_N is None else reward_N[counts_N]
        self._step = self._step.and_also(Seen.of(counted_N))
        outside = self._outside(reward_N, full_marks_N)
        if outside is not None:
            self._is_relative = True
            self._warn(outside)
        if self._is_relative and self._line is None and self._step.count:
            self._line = (self._before if self._before.count else self._step).mean
        return self.of(reward_N, full_marks_N)

    def of(self, reward_N: FloatArray, full_marks_N: ArrayLike | None = None) -> FloatArray:
        """(N,) successes of rewards that are not observed, read as those observed last.

        Rewards out of range are compared with the mean of all that was observed; with their own
        mean if nothing was. Arguments are those of `observe`.
        """
        line = self.line
        if line is None and (outside := self._outside(reward_N, full_marks_N)) is not None:
            self._warn(outside)
            seen = self._before.and_also(self._step)
            line = (seen if seen.count else Seen.of(reward_N)).mean
        if line is not None:
            return (reward_N > line).astype(np.float64)
        share_N = np.zeros(len(reward_N))
        marks_N = self._marks(reward_N, full_marks_N)
        np.divide(reward_N, marks_N, out=share_N, where=marks_N > 0)
        share_N[share_N > 1 - ROUNDING] = 1.0
        return np.maximum(share_N, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """What is remembered: plain values and dicts of them."""
        return {
            "is_relative": self._is_relative,
            "line": self._line,
            "before": asdict(self._before),
            "step": asdict(self._step),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly.

        Raises:
            ValueError: if the state is of something else.
        """
        check_names(state, self.state_dict(), "the state of what counts as success")
        self._is_relative = bool(state["is_relative"])
        self._line = None if state["line"] is None else float(state["line"])
        self._before, self._step = Seen(**state["before"]), Seen(**state["step"])

    def _marks(self, reward_N: FloatArray, full_marks_N: ArrayLike | None) -> FloatArray:
        marks = self.full_marks if full_marks_N is None else full_marks_N
        return np.broadcast_to(np.asarray(marks, dtype=np.float64), reward_N.shape)

    def _outside(
        self, reward_N: FloatArray, full_marks_N: ArrayLike | None
    ) -> tuple[float, float] | None:
        """The first reward outside [0, full marks] with its full marks; None if all are inside."""
        marks_N = self._marks(reward_N, full_marks_N)
        margin_N = ROUNDING * np.where(marks_N > 0, marks_N, 0.0)
        outside_N = (reward_N < -margin_N) | (reward_N > marks_N + margin_N)
        if not outside_N.any():
            return None
        row = int(np.flatnonzero(outside_N)[0])
        return float(reward_N[row]), float(marks_N[row])

    def _warn(self, outside: tuple[float, float]) -> None:
        if self._warned:
            return
        self._warned = True
        reward, marks = outside
        warnings.warn(
            f"a reward of {reward:g} is outside [0, {marks:g}], so a rollout now counts as a success "
            "if its reward is above the mean of all rewards of earlier steps, and pass rates of "
            "different steps do not compare; write success_above: <reward> for a fixed line",
            stacklevel=4,
        )
