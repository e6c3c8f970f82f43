"""The planner: which prompts, how many rollouts of each, and what is learnt from their rewards.

One posterior is read by the selector and by the scale that feeds the allocator, and written by
`observe`. What is decided at a step depends on earlier steps only; with pilots, the second round's
budgets depend on the first round's rewards as well. Processes that hold equal planners and observe
equal rewards decide equally. Axes: D prompts of the data set, P prompts of the step, N rollouts of
the round, n rollouts of one group, K measured prompts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.allocation import Allocator, Scale, posterior_std
from samplers.keys import fingerprint, rollout_seeds, stable_hash, step_generator
from samplers.posterior import BetaPosterior
from samplers.proposal import Decision, Proposal, Reason, checked_rewards
from samplers.selection import Selector

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(eq=False, slots=True)
class _Step:
    """The step's prompts and what has been seen of them; grows with each observed round."""

    step: int
    index_P: IntArray
    draw_P: IntArray
    pass_rate_P: FloatArray
    drawn_P: IntArray
    """Rollouts asked for in observed rounds; of these, `trials_P` were scored."""
    trials_P: IntArray
    successes_P: FloatArray
    low_P: FloatArray
    """Smallest and largest reward seen; inf and -inf before any."""
    high_P: FloatArray


class Planner:
    """Selector, allocator and posterior at work together, one step after another.

    ::

        proposal = planner.propose()                # prompts, budgets and seeds
        planner.observe(proposal, reward_N, prompt_N)   # every scored rollout, before any is dropped

    Without pilots a step is one round, allocated with the posterior of earlier steps, and nothing
    needs correcting. With `pilot > 0` round 0 makes that many rollouts of every prompt and round 1,
    with the same prompts and draws and the next slots, makes the rest.

    Args:
        posterior: of all D prompts; row i belongs to `keys[i]`.
        selector: chooses the prompts.
        allocate: spends the rollouts, for example `allocation.neyman`.
        keys: (D,) prompt keys, one per row of the data set, distinct.
        prompts_per_step: P.
        rollouts_per_step: rollouts generated per step over all its rounds, pilots included.
        scale: turns posterior parameters into what `allocate` is given.
        minimum, maximum: box of n_i, in rollouts; None for no maximum.
        pilot: pilots per prompt; 0 for none.
        estimate: what round 1 is allocated by: "posterior", which has seen the pilots by then, or
            "pilot", the pilots' own successes and failures, as published for GVM. For the latter
            take a scale that accepts counts; a prompt none of whose pilots was scored has scale 0.
        pilots: "pool" counts pilots towards n_i (and a budget is at least the pilots); "discard"
            makes n_i fresh rollouts. Both generate `rollouts_per_step`.
        run_seed: of selection and rollouts.
        success_above: a reward above it is a success; None takes rewards in [0, 1] as (fractional)
            successes and refuses others.

    Raises:
        ValueError: if settings contradict each other or the data set.
    """

    def __init__(
        self,
        posterior: BetaPosterior,
        selector: Selector,
        allocate: Allocator,
        *,
        keys: Sequence[str],
        prompts_per_step: int,
        rollouts_per_step: int,
        scale: Scale = posterior_std,
        minimum: int = 1,
        maximum: int | None = None,
        pilot: int = 0,
        estimate: Literal["posterior", "pilot"] = "posterior",
        pilots: Literal["pool", "discard"] = "pool",
        run_seed: int = 0,
        success_above: float | None = None,
    ) -> None:
        _check_keys(keys, posterior.num_prompts)
        if not 1 <= prompts_per_step <= len(keys):
            raise ValueError(
                f"prompts_per_step must be in [1, {len(keys)}], the size of the data set, "
                f"got {prompts_per_step}"
            )
        if estimate not in ("posterior", "pilot"):
            raise ValueError(f"estimate must be 'posterior' or 'pilot', got {estimate!r}")
        if pilots not in ("pool", "discard"):
            raise ValueError(f"pilots must be 'pool' or 'discard', got {pilots!r}")
        if pilot < 0 or (pilot == 0 and estimate == "pilot"):
            raise ValueError(f"pilot must be at least {int(estimate == 'pilot')}, got {pilot}")
        if pilot and rollouts_per_step <= pilot * prompts_per_step:
            raise ValueError(
                f"rollouts_per_step={rollouts_per_step} leaves nothing to allocate after {pilot} "
                f"pilots of {prompts_per_step} prompts; it must exceed {pilot * prompts_per_step}"
            )
        self.posterior = posterior
        self.selector = selector
        self.keys = tuple(keys)
        self.prompts_per_step = prompts_per_step
        self.rollouts_per_step = rollouts_per_step
        self._allocate = allocate
        self._scale = scale
        self._pilot = pilot
        self._estimate = estimate
        self._pooled = pilot if pilots == "pool" else 0
        self._total = rollouts_per_step - (pilot * prompts_per_step if pilots == "discard" else 0)
        self._minimum = max(minimum, self._pooled)
        self._maximum = maximum
        self._run_seed = run_seed
        self._success_above = success_above
        # A budget that cannot be spent, or a scale that cannot be computed, is told now and not
        # after the first rollouts.
        even_P = np.ones(prompts_per_step)
        self._spend(np.asarray(scale(even_P, even_P)))

        self._step = 0
        self._round = 0
        self._draw_D = np.zeros(len(keys), dtype=np.int64)
        self._norm_D = np.full(len(keys), np.nan)
        self._next_norm_D = np.full(len(keys), np.nan)
        self._last: _Step | None = None
        self._in_flight: Proposal | None = None

    def propose(self) -> Proposal:
        """The next round: prompts, budgets, draws and seeds.

        Until it is observed the same round is proposed again, also after `load_state_dict`.

        Raises:
            ValueError: if the selector does not choose P distinct rows, or the allocator does not
                spend exactly the total.
        """
        if self._in_flight is None:
            if self._last is None or self._last.step != self._step:
                self._last = self._open_step()
            self._in_flight = self._proposal(self._last, self._budget(self._last))
        return self._in_flight

    def observe(self, proposal: Proposal, reward_N: ArrayLike, prompt_N: ArrayLike) -> None:
        """Learn from every scored rollout of a round, before any is dropped, and close the round.

        Rows may come in any order: the same set of rewards teaches the same, bit for bit. Rollouts
        that failed to be scored are left out by the caller; a prompt left with none is to the
        posterior one that was not chosen, as nothing replaces what was known.

        Args:
            proposal: the round in flight.
            reward_N: (N,) finite rewards.
            prompt_N: (N,) int64, each row's place in `proposal.index_P`.

        Raises:
            ValueError: if the proposal is not the one in flight, a reward is not finite or, without
                `success_above`, not in [0, 1], or a prompt has more rewards than rollouts.
        """
        self._check_in_flight(proposal)
        threshold = self._success_above
        reward_N, prompt_N = checked_rewards(
            proposal, reward_N, prompt_N, keys=self.keys, in_unit_interval=threshold is None
        )
        success_N = reward_N if threshold is None else (reward_N > threshold).astype(np.float64)
        assert self._last is not None
        num_prompts = len(proposal.index_P)
        trials_P = np.bincount(prompt_N, minlength=num_prompts)
        order_N = np.argsort(prompt_N, kind="stable")
        groups = np.split(success_N[order_N], np.cumsum(trials_P)[:-1])
        # fsum is exactly rounded, so the sum does not depend on the order of the rows.
        successes_P = np.array([math.fsum(group.tolist()) for group in groups])

        scored_K = np.flatnonzero(trials_P)
        learn = self.posterior.observe if proposal.round == 0 else self.posterior.add
        learn(proposal.index_P[scored_K], successes_P[scored_K], trials_P[scored_K])

        last = self._last
        last.drawn_P += proposal.budget_P
        last.trials_P += trials_P
        last.successes_P += successes_P
        np.minimum.at(last.low_P, prompt_N, reward_N)
        np.maximum.at(last.high_P, prompt_N, reward_N)
        self._in_flight = None
        self._step += int(proposal.is_last)
        self._round = 0 if proposal.is_last else proposal.round + 1

    def admit(self, reward_n: ArrayLike) -> Decision:
        """Whether a group has any spread, max > min, without which it carries no gradient.

        The test is exact and on the rewards themselves: a group of equal fractional rewards has
        none. It is all or nothing: a group is never kept in part.

        Args:
            reward_n: (n,) finite rewards of one group, at least one.

        Returns:
            kept, for "mixed"; or not, for "lone" (one rollout, nothing to compare with),
            "all_pass" (all equal and above `success_above`, or positive where that is None) or
            "all_fail".

        Raises:
            ValueError: if there is no reward or one is not finite.
        """
        reward_n = np.asarray(reward_n, dtype=np.float64)
        if reward_n.ndim != 1 or len(reward_n) == 0 or not np.isfinite(reward_n).all():
            raise ValueError(f"reward_n must be 1-d, finite and not empty, got {reward_n.tolist()}")
        reason = self._reason(float(reward_n.min()), float(reward_n.max()), len(reward_n))
        return Decision(kept=reason == "mixed", reason=reason)

    def observe_gradient_norms(self, index_K: ArrayLike, norm_K: ArrayLike) -> None:
        """Remember gradient norms G, the last measured of each prompt; they scale later steps.

        They count from the next step that is opened: norms measured on rollouts must not decide
        how many more of them the same step makes. A prompt that was never measured is given the
        mean of the step's measured ones, or 1 if there is none.

        Args:
            index_K: (K,) distinct rows of the data set.
            norm_K: (K,) norms, finite and non-negative.

        Raises:
            ValueError: if either is not as above.
        """
        index_K, norm_K = np.asarray(index_K, dtype=np.int64), np.asarray(norm_K, dtype=np.float64)
        if index_K.ndim != 1 or index_K.shape != norm_K.shape:
            raise ValueError(
                f"index_K and norm_K must be 1-d and equally long, "
                f"got {index_K.shape} and {norm_K.shape}"
            )
        _check_rows(index_K, len(self.keys))
        valid_K = np.isfinite(norm_K) & (norm_K >= 0)
        if not valid_K.all():
            at = int(np.flatnonzero(~valid_K)[0])
            raise ValueError(
                f"gradient norms must be finite and non-negative, got {norm_K[at]} "
                f"for prompt {self.keys[index_K[at]]}"
            )
        self._next_norm_D[index_K] = norm_K

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, nested: NumPy arrays, strings, integers and None, nothing else.

        Integers: `step`, `round`, `run_seed`. String: `fingerprint` of the keys in row order.
        Arrays: `draw_D`, `norm_D` and `next_norm_D` (NaN where not measured), `budget_P` of the
        round in flight or None. Dicts: `posterior`, `selector`, and `last`, the prompts, counts and
        reward bounds of the step that is open or was closed last, or None.
        """
        last = self._last
        return {
            "fingerprint": fingerprint(self.keys),
            "run_seed": self._run_seed,
            "step": self._step,
            "round": self._round,
            "draw_D": self._draw_D.copy(),
            "norm_D": self._norm_D.copy(),
            "next_norm_D": self._next_norm_D.copy(),
            "posterior": self.posterior.state_dict(),
            "selector": self.selector.state_dict(),
            "last": None if last is None else {n: _copy(getattr(last, n)) for n in _Step.__slots__},
            "budget_P": None if self._in_flight is None else self._in_flight.budget_P.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`: from here on the planner decides what the saved one would have.

        Raises:
            ValueError: if the state was saved with another data set, or by a run of another seed.
        """
        if state["fingerprint"] != fingerprint(self.keys):
            raise ValueError(
                f"the checkpoint was made with another data set: its keys have fingerprint "
                f"{state['fingerprint']}, these {fingerprint(self.keys)}"
            )
        if state["run_seed"] != self._run_seed:
            raise ValueError(
                f"the checkpoint was made with run_seed={state['run_seed']}, "
                f"this run has {self._run_seed}"
            )
        self.posterior.load_state_dict(state["posterior"])
        self.selector.load_state_dict(state["selector"])
        self._step = int(state["step"])
        self._round = int(state["round"])
        self._draw_D = np.array(state["draw_D"], dtype=np.int64)
        self._norm_D = np.array(state["norm_D"], dtype=np.float64)
        self._next_norm_D = np.array(state["next_norm_D"], dtype=np.float64)
        last, budget_P = state["last"], state["budget_P"]
        self._last = None if last is None else _Step(**{n: _copy(v) for n, v in last.items()})
        self._in_flight = None
        if budget_P is not None:
            assert self._last is not None
            self._in_flight = self._proposal(self._last, np.array(budget_P, dtype=np.int64))

    def metrics(self) -> dict[str, float]:
        """Flat numbers of the posterior, of visits, and of the step that was proposed last.

        Budgets count a step's rollouts over all its rounds so far; shares of groups are over the
        step's prompts and everything scored of them so far.
        """
        metrics = {
            "planner/posterior_mean": float(self.posterior.mean().mean()),
            "planner/coverage": float((self._draw_D > 0).mean()),
            "planner/visits_max": float(self._draw_D.max()),
            "planner/gradient_norm_coverage": float(np.isfinite(self._next_norm_D).mean()),
        }
        last, in_flight = self._last, self._in_flight
        if last is None:
            return metrics
        budget_P = last.drawn_P if in_flight is None else last.drawn_P + in_flight.budget_P
        metrics |= {
            "planner/step": float(last.step),
            "planner/posterior_mean_chosen": float(last.pass_rate_P.mean()),
            "planner/budget_min": float(budget_P.min()),
            "planner/budget_mean": float(budget_P.mean()),
            "planner/budget_max": float(budget_P.max()),
            "planner/budget_std": float(budget_P.std()),
        }
        if not last.drawn_P.any():
            return metrics
        reasons = [
            self._reason(low, high, trials) if trials else "unscored"
            for low, high, trials in zip(
                last.low_P.tolist(), last.high_P.tolist(), last.trials_P.tolist(), strict=True
            )
        ]
        for reason in ("mixed", "all_pass", "all_fail", "lone", "unscored"):
            metrics[f"planner/share_{reason}"] = reasons.count(reason) / len(reasons)
        return metrics

    def _open_step(self) -> _Step:
        """Choose the step's prompts and number their draws."""
        index_P = self.selector.select(
            self.prompts_per_step,
            generator=step_generator(self._run_seed, "select", self._step),
        )
        index_P = np.array(index_P, dtype=np.int64)
        _check_rows(index_P, len(self.keys))
        if index_P.shape != (self.prompts_per_step,):
            raise ValueError(
                f"the selector chose an array of shape {index_P.shape}, "
                f"expected ({self.prompts_per_step},)"
            )
        draw_P = self._draw_D[index_P]
        self._draw_D[index_P] += 1
        self._norm_D = self._next_norm_D.copy()
        num_prompts = len(index_P)
        return _Step(
            step=self._step,
            index_P=index_P,
            draw_P=draw_P,
            pass_rate_P=self.posterior.mean(index_P),
            drawn_P=np.zeros(num_prompts, dtype=np.int64),
            trials_P=np.zeros(num_prompts, dtype=np.int64),
            successes_P=np.zeros(num_prompts),
            low_P=np.full(num_prompts, np.inf),
            high_P=np.full(num_prompts, -np.inf),
        )

    def _budget(self, last: _Step) -> IntArray:
        """(P,) rollouts of the round that comes now."""
        if self._pilot and self._round == 0:
            return np.full(len(last.index_P), self._pilot, dtype=np.int64)
        # Ties, and what does not divide, go by a hash of step and key: a prompt's budget depends
        # neither on its row nor on its place in the step, and no prompt is favoured for good.
        keys = [self.keys[index] for index in last.index_P]
        order_P = np.argsort([stable_hash(self._run_seed, "ties", last.step, key) for key in keys])
        std_P = self._scales(last, order_P) * self._norms(last.index_P[order_P])
        budget_P = np.empty(len(order_P), dtype=np.int64)
        budget_P[order_P] = self._spend(std_P) - self._pooled
        return budget_P

    def _scales(self, last: _Step, order_P: IntArray) -> FloatArray:
        """(P,) scales of the step's prompts taken in `order_P`."""
        if self._estimate == "posterior":
            return np.asarray(self._scale(*self.posterior.parameters(last.index_P[order_P])))
        trials_P, successes_P = last.trials_P[order_P], last.successes_P[order_P]
        scored_P = trials_P > 0
        std_P = np.zeros(len(order_P))
        std_P[scored_P] = self._scale(
            successes_P[scored_P], trials_P[scored_P] - successes_P[scored_P]
        )
        return std_P

    def _norms(self, index_P: IntArray) -> FloatArray:
        """(P,) gradient norms of the prompts, filled in where not measured."""
        norm_P = self._norm_D[index_P]
        measured_P = np.isfinite(norm_P)
        mean = norm_P[measured_P].mean() if measured_P.any() else 1.0
        return np.where(measured_P, norm_P, mean)

    def _spend(self, std_P: FloatArray) -> IntArray:
        """(P,) n_i, checked: a user's own allocator may be wrong."""
        budget_P = np.asarray(
            self._allocate(std_P, self._total, minimum=self._minimum, maximum=self._maximum)
        )
        if (
            budget_P.shape != std_P.shape
            or budget_P.dtype.kind not in "iu"
            or budget_P.sum() != self._total
            or budget_P.min() < self._minimum
            or (self._maximum is not None and budget_P.max() > self._maximum)
        ):
            raise ValueError(
                f"the allocator must give {len(std_P)} integers of at least {self._minimum}, at "
                f"most {self._maximum}, that sum to {self._total}, got {budget_P.tolist()}"
            )
        return budget_P.astype(np.int64)

    def _proposal(self, last: _Step, budget_P: IntArray) -> Proposal:
        seeds = [
            rollout_seeds(self._run_seed, self.keys[index], draw, range(first, first + budget))
            for index, draw, first, budget in zip(
                last.index_P.tolist(),
                last.draw_P.tolist(),
                last.drawn_P.tolist(),
                budget_P.tolist(),
                strict=True,
            )
        ]
        return Proposal(
            step=self._step,
            round=self._round,
            is_last=self._round == 1 or self._pilot == 0,
            index_P=_read_only(last.index_P),
            budget_P=_read_only(budget_P),
            draw_P=_read_only(last.draw_P),
            first_slot_P=_read_only(last.drawn_P),
            pass_rate_P=_read_only(last.pass_rate_P),
            seed_N=_read_only(np.concatenate(seeds)),
        )

    def _reason(self, low: float, high: float, num_rollouts: int) -> Reason:
        if high > low:
            return "mixed"
        if num_rollouts == 1:
            return "lone"
        threshold = 0.0 if self._success_above is None else self._success_above
        return "all_pass" if low > threshold else "all_fail"

    def _check_in_flight(self, proposal: Proposal) -> None:
        current = self._in_flight
        same = current is not None and (
            (proposal.step, proposal.round) == (current.step, current.round)
            and np.array_equal(proposal.index_P, current.index_P)
            and np.array_equal(proposal.budget_P, current.budget_P)
        )
        if not same:
            waiting = (
                "none is"
                if current is None
                else f"step {current.step}, round {current.round} is, with its own prompts"
            )
            raise ValueError(
                f"the proposal of step {proposal.step}, round {proposal.round} is not in flight "
                f"({waiting}): each proposal is observed once"
            )


def _check_keys(keys: Sequence[str], num_prompts: int) -> None:
    if len(keys) != num_prompts:
        raise ValueError(f"there are {len(keys)} keys but the posterior has {num_prompts} prompts")
    row_of: dict[str, int] = {}
    for row, key in enumerate(keys):
        if key in row_of:
            raise ValueError(f"rows {row_of[key]} and {row} of the data set share the key {key!r}")
        row_of[key] = row


def _check_rows(index_K: IntArray, num_prompts: int) -> None:
    in_range = ((index_K >= 0) & (index_K < num_prompts)).all()
    if not in_range or len(np.unique(index_K)) != len(index_K):
        raise ValueError(f"rows must be distinct and in [0, {num_prompts}), got {index_K.tolist()}")


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array = array.copy()
    array.setflags(write=False)
    return array


def _copy(value: Any) -> Any:
    return np.array(value) if isinstance(value, np.ndarray) else value
