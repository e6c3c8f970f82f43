"""The state of the planner's open step, and numbers it remembers of prompts between steps.

Axes: D prompts of the data set, P prompts of the step, N rollouts of a round, K measured prompts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.proposal import group_reason
from samplers.rows import row_list
from samplers.starts import ChosenStarts

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(eq=False, slots=True, kw_only=True)
class OpenStep:
    """The step's prompts and their counts so far; each observed round adds to them."""

    step: int
    index_P: IntArray
    draw_P: IntArray
    drawn_P: IntArray
    """Rollouts asked for in observed rounds; of these, `trials_P` were scored."""
    trials_P: IntArray
    successes_P: FloatArray
    low_P: FloatArray
    """Smallest and largest reward seen; inf and -inf before any."""
    high_P: FloatArray
    a_P: FloatArray
    """Parameters of the posterior before any rollout of the step; of a start's own counts where there is
    one."""
    b_P: FloatArray
    prior_P: FloatArray | None = None
    """Pass rates that the posterior's prior expected then; None where it is no prior that learns."""
    plan_P: IntArray | None = None
    """Rollouts at most, where a stopping rule may end a prompt earlier; None without one."""
    active_P: NDArray[np.bool_] | None = None
    """Prompts the stopping rule has not ended; None without one."""
    weight_P: FloatArray | None = None
    """Weights the stopping rule gave; None without one, or if it gives none."""
    starts: ChosenStarts | None = None
    """Where the rollouts of each prompt begin, in all rounds; None where no starts are chosen."""

    @classmethod
    def of(
        cls,
        step: int,
        index_P: IntArray,
        draw_P: IntArray,
        a_P: FloatArray,
        b_P: FloatArray,
        prior_P: FloatArray | None = None,
        starts: ChosenStarts | None = None,
    ) -> "OpenStep":
        """A step of which no round has been observed."""
        num_prompts = len(index_P)
        return cls(
            step=step,
            index_P=index_P,
            draw_P=draw_P,
            drawn_P=np.zeros(num_prompts, dtype=np.int64),
            trials_P=np.zeros(num_prompts, dtype=np.int64),
            successes_P=np.zeros(num_prompts),
            low_P=np.full(num_prompts, np.inf),
            high_P=np.full(num_prompts, -np.inf),
            a_P=a_P,
            b_P=b_P,
            prior_P=prior_P,
            starts=starts,
        )

    @property
    def started_P(self) -> NDArray[np.bool_]:
        """(P,) whether a prompt's rollouts have a start, and so say nothing of the prompt itself."""
        if self.starts is None:
            return np.zeros(len(self.index_P), dtype=bool)
        return self.starts.length_P > 0

    @property
    def pass_rate_P(self) -> FloatArray:
        """(P,) posterior mean before any rollout of the step."""
        return self.a_P / (self.a_P + self.b_P)

    @property
    def left_P(self) -> IntArray:
        """(P,) rollouts the plan still has; only with a stopping rule."""
        assert self.plan_P is not None
        return self.plan_P - self.drawn_P

    @property
    def group_weight_P(self) -> FloatArray:
        """(P,) weights of the groups' gradients."""
        return np.ones(len(self.index_P)) if self.weight_P is None else self.weight_P

    def answered(self, goes_on_P: NDArray[np.bool_], weight_P: FloatArray | None) -> None:
        """Take in a stopping rule's answer: a stopped prompt stays stopped, and keeps its weight.

        A prompt that goes on has the largest of the weights it has gone on with so far.
        """
        assert self.active_P is not None
        if weight_P is not None:
            highest_P = weight_P if self.weight_P is None else np.maximum(self.weight_P, weight_P)
            latest_P = np.where(goes_on_P, highest_P, weight_P)
            self.weight_P = np.where(self.active_P, latest_P, self.group_weight_P)
        self.active_P = self.active_P & goes_on_P & (self.left_P > 0)

    def take_in(
        self, budget_P: IntArray, reward_N: FloatArray, success_N: FloatArray, prompt_N: IntArray
    ) -> tuple[IntArray, FloatArray]:
        """Count a round; its trials and successes per prompt, the same in any order of rows."""
        trials_P = np.bincount(prompt_N, minlength=len(self.index_P))
        order_N = np.argsort(prompt_N, kind="stable")
        groups = np.split(success_N[order_N], np.cumsum(trials_P)[:-1])
        # fsum is exactly rounded, so the sum does not depend on the order of the rows.
        successes_P = np.array([math.fsum(group.tolist()) for group in groups])
        self.drawn_P += budget_P
        self.trials_P += trials_P
        self.successes_P += successes_P
        np.minimum.at(self.low_P, prompt_N, reward_N)
        np.maximum.at(self.high_P, prompt_N, reward_N)
        return trials_P, successes_P

    def metrics(self, in_flight_P: IntArray | None) -> dict[str, float]:
        """Budgets of all rounds so far, and shares of groups among the step's prompts."""
        budget_P = self.drawn_P if in_flight_P is None else self.drawn_P + in_flight_P
        metrics = {
            "step": float(self.step),
            "posterior_mean_chosen": float(self.pass_rate_P.mean()),
            "budget_min": float(budget_P.min()),
            "budget_mean": float(budget_P.mean()),
            "budget_max": float(budget_P.max()),
            "budget_std": float(budget_P.std()),
        }
        if self.plan_P is not None and self.active_P is not None:
            metrics["budget_planned_mean"] = float(self.plan_P.mean())
            metrics["share_stopped_early"] = float((~self.active_P & (self.left_P > 0)).mean())
        if not self.drawn_P.any():
            return metrics
        columns = (self.low_P, self.high_P, self.trials_P, self.successes_P == self.trials_P)
        reasons: list[str] = [
            group_reason(low, high, trials, passes=passes) if trials else "unscored"
            for low, high, trials, passes in zip(*(c.tolist() for c in columns), strict=True)
        ]
        for reason in ("mixed", "all_pass", "all_fail", "lone", "unscored"):
            metrics[f"share_{reason}"] = reasons.count(reason) / len(reasons)
        return metrics

    def copy(self) -> "OpenStep":
        """A copy with arrays of its own."""
        return OpenStep(**{name: copied(getattr(self, name)) for name in self.__slots__})

    def state_dict(self) -> dict[str, Any]:
        """Every field; arrays are copies."""
        state = {name: copied(getattr(self, name)) for name in self.__slots__}
        return state | {"starts": None if self.starts is None else self.starts.state_dict()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "OpenStep":
        """What `state_dict()` gave."""
        step = cls(**{name: copied(value) for name, value in state.items() if name != "starts"})
        if state["starts"] is not None:
            step.starts = ChosenStarts.from_state(state["starts"])
        return step


class Measured:
    """A number of each prompt, the last one measured, used from the next step on.

    Args:
        num_prompts: of the data set.
        what: the numbers, for messages.
        positive: whether 0 is refused too.
    """

    def __init__(self, num_prompts: int, what: str, *, positive: bool = False) -> None:
        # Never changed in place, so that a state can hold them as they are.
        self.used_D: FloatArray = np.broadcast_to(np.float64(np.nan), (num_prompts,))
        self.measured_D: FloatArray = self.used_D
        """(D,) NaN where never measured; `used_D` lags behind until a step is opened. Read-only."""
        self._what, self._positive = what, positive

    def observe(self, index_K: ArrayLike, value_K: ArrayLike, keys: Sequence[str]) -> None:
        """Remember numbers, if they are finite, of the right sign and of distinct rows."""
        index_K, value_K = row_list("index_K", index_K), np.asarray(value_K, np.float64)
        if index_K.shape != value_K.shape:
            raise ValueError(
                f"index_K and {self._what} must be 1-d and equally long, "
                f"got {index_K.shape} and {value_K.shape}"
            )
        check_rows(index_K, len(keys))
        valid_K = np.isfinite(value_K) & ((value_K > 0) if self._positive else (value_K >= 0))
        if not valid_K.all():
            at = int(np.flatnonzero(~valid_K)[0])
            raise ValueError(
                f"{self._what} must be finite and {'positive' if self._positive else 'non-negative'}, "
                f"got {value_K[at]} for prompt {keys[index_K[at]]}"
            )
        if len(index_K):
            measured_D = self.measured_D.copy()
            measured_D[index_K] = value_K
            self.measured_D = read_only(measured_D, copy=False)

    def open_step(self) -> None:
        """Use what was measured so far from here on."""
        self.used_D = self.measured_D

    def load(self, used_D: ArrayLike, measured_D: ArrayLike) -> None:
        """Restore these arrays from a state."""
        self.used_D, self.measured_D = (
            read_only(np.asarray(each, dtype=np.float64)) for each in (used_D, measured_D)
        )

    def of(self, index_P: IntArray) -> FloatArray:
        """(P,) numbers; the mean of the measured ones where not measured, 1 if there are none."""
        value_P = self.used_D[index_P]
        measured_P = np.isfinite(value_P)
        mean = value_P[measured_P].mean() if measured_P.any() else 1.0
        return np.where(measured_P, value_P, mean)


def check_keys(keys: Sequence[str], num_prompts: int) -> None:
    """Raise ValueError unless there are `num_prompts` distinct keys."""
    if len(keys) != num_prompts:
        raise ValueError(f"there are {len(keys)} keys but the posterior has {num_prompts} prompts")
    row_of: dict[str, int] = {}
    for row, key in enumerate(keys):
        if key in row_of:
            raise ValueError(f"rows {row_of[key]} and {row} of the data set share the key {key!r}")
        row_of[key] = row


def check_rows(index_K: IntArray, num_prompts: int) -> None:
    """Raise ValueError unless the rows are distinct ones of the data set."""
    in_range = ((index_K >= 0) & (index_K < num_prompts)).all()
    if not in_range or len(np.unique(index_K)) != len(index_K):
        raise ValueError(f"rows must be distinct and in [0, {num_prompts}), got {index_K.tolist()}")


def check_binary(success_N: FloatArray, prompt_N: IntArray, keys: Sequence[str]) -> None:
    """Raise ValueError unless successes are 0 or 1: a stopping rule counts passes."""
    binary_N = (success_N == 0) | (success_N == 1)
    if not binary_N.all():
        row = int(np.flatnonzero(~binary_N)[0])
        raise ValueError(
            f"a stopping rule counts passes, so a rollout must pass or fail, but the reward for "
            f"prompt {keys[prompt_N[row]]} (row {row}) is {success_N[row]:g} of full marks; write "
            f"success_above: the reward above which a rollout passes"
        )


def check_counts(
    scale: Callable[[FloatArray, FloatArray], FloatArray], pilot: int, name: str
) -> None:
    """Raise ValueError unless the scale takes pilots all of which failed, or passed."""
    for successes, what in ((0.0, "success"), (float(pilot), "failure")):
        try:
            std = float(scale(np.array([successes]), np.array([pilot - successes]))[0])
            problem = "" if 0 <= std < math.inf else f"it gives {std}"
        except ValueError as error:
            problem = str(error)
        if problem:
            raise ValueError(
                f"estimate='pilot' needs a scale that takes counts, and {name} cannot take {pilot} "
                f"pilots without a {what}: {problem}. Take one of the mean, as plug_in_std, "
                f"accepted_std, gvm_plug_in or inverse_sqrt, or estimate='posterior'"
            )


def checked_answer(answer: Any, num_prompts: int) -> tuple[NDArray[np.bool_], FloatArray | None]:
    """Check a stopping rule's answer: who goes on, and with what weights."""
    if isinstance(answer, tuple) and len(answer) != 2:
        raise ValueError(
            f"the stopping rule must give booleans, or booleans and weights, got {len(answer)} columns"
        )
    goes_on, weight = answer if isinstance(answer, tuple) else (answer, None)
    goes_on_P = np.asarray(goes_on)
    if goes_on_P.shape != (num_prompts,) or goes_on_P.dtype != bool:
        raise ValueError(
            f"the stopping rule must give {num_prompts} booleans, "
            f"got shape {goes_on_P.shape} of {goes_on_P.dtype}"
        )
    if weight is None:
        return goes_on_P, None
    weight_P = np.array(weight, dtype=np.float64)
    if weight_P.shape != (num_prompts,):
        raise ValueError(
            f"the stopping rule must give {num_prompts} weights, got shape {weight_P.shape}"
        )
    if not (np.isfinite(weight_P) & (weight_P >= 0)).all():
        raise ValueError(
            f"the stopping rule's weights must be finite and non-negative, got {weight_P.tolist()}"
        )
    return goes_on_P, weight_P


def check_pilots(
    pilot: int,
    estimate: str,
    pilots: Literal["pool", "discard"],
    *,
    num_prompts: int,
    rollouts: int,
) -> None:
    """Raise ValueError unless the settings of pilots fit each other and the step."""
    if estimate not in ("posterior", "pilot"):
        raise ValueError(f"estimate must be 'posterior' or 'pilot', got {estimate!r}")
    if pilots not in ("pool", "discard"):
        raise ValueError(f"pilots must be 'pool' or 'discard', got {pilots!r}")
    if pilot < 0 or (pilot == 0 and estimate == "pilot"):
        raise ValueError(f"pilot must be at least {int(estimate == 'pilot')}, got {pilot}")
    if pilot and rollouts <= pilot * num_prompts:
        raise ValueError(
            f"rollouts_per_step={rollouts} leaves nothing to allocate after {pilot} "
            f"pilots of {num_prompts} prompts; it must exceed {pilot * num_prompts}"
        )


def copied(value: Any) -> Any:
    """A copy if it is an array, the value itself if it is plain."""
    return np.array(value) if isinstance(value, np.ndarray) else value


def check_same_rule(last: dict[str, Any], stopping: object | None) -> None:
    """Raise ValueError if the saved open step has a stopping rule and the planner none, or reversed."""
    if (last["plan_P"] is None) == (stopping is None):
        return
    saved, here = ("without", f"stopping={stopping}") if stopping else ("under", "none")
    raise ValueError(
        f"step {last['step']} of the state is open and was planned {saved} a stopping rule, this "
        f"planner has {here}: change the rule between steps"
    )


def read_only(array: NDArray[Any], *, copy: bool = True) -> NDArray[Any]:
    """A copy that cannot be written to; without copying, the array itself."""
    array = array.copy() if copy else array
    array.setflags(write=False)
    return array
