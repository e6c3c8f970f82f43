"""The planner: choose prompts, divide the rollout budget, and update the posterior from rewards.

One posterior is read by the selector, by the scale that feeds the allocator and by the stopping
rule, and written by `observe`. What is decided at a step depends on earlier steps only; with pilots
or a stopping rule, later rounds depend on the rewards of the step's earlier ones as well. Processes
that hold equal planners and observe equal rewards decide equally. Axes: D prompts of the data set,
P prompts of the step, N rollouts of the round, n rollouts of one group, K measured prompts.
"""

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from inspect import signature
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samplers.allocation import Allocator, Scale, knapsack, knapsack_released, posterior_std
from samplers.allocation.scales import is_multipliable
from samplers.calibration import Reliability, calibration
from samplers.keys import fingerprint, rollout_seeds, stable_hash, step_generator
from samplers.open_step import (
    Measured,
    OpenStep,
    check_binary,
    check_counts,
    check_keys,
    check_pilots,
    check_rows,
    check_same_rule,
    checked_answer,
    read_only,
)
from samplers.posterior import BetaPosterior
from samplers.proposal import Decision, Proposal, admit, checked_rewards
from samplers.rows import check_names, row_list
from samplers.selection.selectors import Selector
from samplers.starts import Starts
from samplers.stopping import Counts, Stopping
from samplers.success import Success

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_STATE = (
    *("fingerprint", "run_seed", "step", "round", "draw_D", "last_visit_D"),
    *("training_step", "visited_K"),
    *("norm_D", "next_norm_D", "length_D", "next_length_D"),
    *("posterior", "selector", "success", "reliability", "starts", "last", "budget_P"),
)
"""Names in a planner's state."""


class Planner:
    """Run selector, allocator and posterior together, one step after another.

    ::

        proposal = planner.propose()                # prompts, budgets and seeds
        planner.observe(proposal, reward_N, prompt_N)   # every scored rollout, before any is dropped

    Without pilots a step is one round, allocated with the posterior of earlier steps, and nothing
    needs correcting. With `pilot > 0` round 0 makes that many rollouts of every prompt and round 1,
    with the same prompts and draws and the next slots, makes the rest. With a stopping rule the
    allocator's budget is a plan, made in rounds of `round_size` per prompt; after each the rule says
    which prompts go on, and what it saves is not spent elsewhere.

    Args:
        posterior: of all D prompts; row i belongs to `keys[i]`.
        selector: chooses the prompts.
        allocate: spends the rollouts, for example `allocation.neyman`.
        keys: (D,) prompt keys, one per row of the data set, distinct.
        prompts_per_step: P.
        rollouts_per_step: rollouts generated per step over all its rounds, pilots included.
        scale: turns posterior parameters into what `allocate` is given. One that draws
            (`thompson_std`) has a keyword `generator` and is given the step's. With None the
            allocator is one of the posterior itself, `allocate(a_P, b_P, total, ...)`, such as
            `allocation.knapsack_posterior`; gradient norms and `estimate="pilot"` need a scale.
        minimum, maximum: box of n_i, in rollouts; None for no maximum.
        pilot: pilots per prompt; 0 for none.
        estimate: what round 1 is allocated by: "posterior", which has seen the pilots by then, or
            "pilot", the pilots' own successes and failures, as published for GVM. The latter needs a
            scale that accepts counts; a prompt none of whose pilots was scored has scale 0.
        pilots: "pool" counts pilots towards n_i (and a budget is at least the pilots); "discard"
            makes n_i fresh rollouts. Both generate `rollouts_per_step`. Pooled pilots with
            estimate="pilot" make n_i depend on their own rewards, and weights of 1 / n_i then no
            longer keep the objective: with pass rates .1 and .6, 10 rollouts of which 2 each are
            pilots, `plug_in_std` and `leave_one_out`, the prompts' gradients weigh .682 and .888 in
            expectation instead of 1. With the accepted mean of GVM's EM they may be pooled.
        stopping: the rule, for example one of `stopping.py`; not together with pilots.
        round_size: rollouts of one prompt in a round, after which the rule is asked.
        run_seed: of selection and rollouts.
        success_above: a reward above it is a success. None reads rewards as fractions of full marks,
            and from the first reward outside [0, full_marks] on compares them with the mean of
            earlier steps: `success.Success`. A stopping rule counts passes, so with one a reward must
            be 0, full marks, or read by a line.
        full_marks: the largest reward there is: `success.full_marks` of the rewards' weights.
        evidence: what a rollout counts as in the posterior, above 0 and at most 1: siblings that share
            the beginning of a denoising chain are less evidence than as many independent rollouts.
        starts: chooses where the rollouts of each prompt begin, between selection and allocation. What a
            group with a start earns is counted by `starts` and not by the posterior, and its own counts
            are what it is allocated by. None: every rollout begins at the end of its prompt.

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
        scale: Scale | None = posterior_std,
        minimum: int = 1,
        maximum: int | None = None,
        pilot: int = 0,
        estimate: Literal["posterior", "pilot"] = "posterior",
        pilots: Literal["pool", "discard"] = "pool",
        stopping: Stopping | None = None,
        round_size: int | None = None,
        run_seed: int = 0,
        success_above: float | None = None,
        full_marks: float = 1.0,
        evidence: float = 1.0,
        starts: Starts | None = None,
    ) -> None:
        check_keys(keys, posterior.num_prompts)
        if not 1 <= prompts_per_step <= len(keys):
            raise ValueError(
                f"prompts_per_step must be in [1, {len(keys)}], the size of the data set, "
                f"got {prompts_per_step}"
            )
        check_pilots(
            pilot, estimate, pilots, num_prompts=prompts_per_step, rollouts=rollouts_per_step
        )
        if (stopping is None) != (round_size is None) or (
            round_size is not None and round_size < 1
        ):
            raise ValueError(
                f"round_size must be at least 1 with a stopping rule and None without one, got "
                f"stopping={stopping} and round_size={round_size}"
            )
        if stopping is not None and pilot:
            raise ValueError(f"a stopping rule makes its own rounds; pilot must be 0, got {pilot}")
        if not 0 < evidence <= 1:
            raise ValueError(f"evidence must be above 0 and at most 1, got {evidence}")
        self.posterior = posterior
        self.selector = selector
        self.keys = tuple(keys)
        self.prompts_per_step = prompts_per_step
        self.rollouts_per_step = rollouts_per_step
        self._allocate = allocate
        self._scale = scale
        self._scale_draws = scale is not None and "generator" in signature(scale).parameters
        self._pilot = pilot
        self._estimate = estimate
        self._pooled = pilot if pilots == "pool" else 0
        self._discarded = pilot if pilots == "discard" else 0
        self._stopping = stopping
        self._round_size = round_size
        self._minimum = max(minimum, self._pooled)
        self._maximum = maximum
        self._run_seed = run_seed
        self._success = Success(above=success_above, full_marks=full_marks)
        learns = posterior.prior is not None
        self._reliability = {name: Reliability() for name in ("posterior", *["prior"] * learns)}
        self._evidence = evidence
        self.starts = starts
        # Refuse a budget that cannot be spent, or a scale that cannot be computed, before the first
        # rollouts.
        if scale is None and estimate == "pilot":
            raise ValueError("estimate='pilot' needs a scale that takes counts, got scale=None")
        even_P = np.ones(prompts_per_step)
        self._spend(*self._columns(even_P, even_P, step=0))
        if scale is not None and estimate == "pilot":
            name = getattr(scale, "__name__", repr(scale))
            check_counts(lambda a_P, b_P: self._columns(a_P, b_P, step=0)[0], pilot, name)
        # Multiples of pass rates are those of other prompts.
        self._multiplies = (
            scale is not None
            and is_multipliable(scale)
            and allocate not in (knapsack, knapsack_released)
        )

        self._step = 0
        self._round = 0
        self._training_step: int | None = None
        self._visited_K = np.zeros(0, dtype=np.int64)
        self._draw_D = np.zeros(len(keys), dtype=np.int64)
        self._last_visit_D = np.full(len(keys), -1)
        self._norms = Measured(len(keys), "gradient norms")
        self._lengths = Measured(len(keys), "lengths", positive=True)
        self._last: OpenStep | None = None
        self._in_flight: Proposal | None = None

    @property
    def is_open(self) -> bool:
        """Whether the step proposed last has further rounds, the one in flight included."""
        return self._last is not None and self._last.step == self._step

    @property
    def group_weight_P(self) -> FloatArray:
        """(P,) what the gradients of the last step's groups are to be multiplied by: 1, unless a
        stopping rule that keeps the objective says otherwise."""
        assert self._last is not None, "no step has been proposed"
        return self._last.group_weight_P.copy()

    def begin(self, training_step: int) -> None:
        """Begin a training step that may need several selections, as one with refill does.

        Every prompt then decays once in the training step: those with a scored rollout as chosen when
        the first of these is observed, all others when the next training step begins. Without this
        call each selection is a training step of its own.

        Args:
            training_step: its number, such as the optimizer steps taken; the same one again changes
                nothing.

        Raises:
            ValueError: if a selection is open, or a later training step began already.
        """
        before = self._training_step
        if before is not None and training_step == before:
            return
        if self.is_open:
            raise ValueError(
                f"training step {training_step} cannot begin: observe all rounds of the open step "
                f"{self._step} first"
            )
        if before is not None:
            if training_step < before:
                raise ValueError(
                    f"training step {training_step} cannot begin after training step {before}"
                )
            self._decay_others()
        self._training_step = training_step

    def propose(self, *, num_prompts: int | None = None, exclude: ArrayLike = ()) -> Proposal:
        """The next round: prompts, budgets, draws and seeds.

        Until it is observed the same round is proposed again, also after `load_state_dict`.

        Args:
            num_prompts: of the step, if not `prompts_per_step`; its rollouts are in proportion. A
                refill asks for the groups that are missing.
            exclude: rows of the data set that the selector must not choose, for example those of
                groups that wait in a buffer. The prompts of an open step are chosen already.

        Raises:
            ValueError: if the selector does not choose distinct rows as asked, the allocator does
                not spend exactly the total, the total is not an integer, the step is open with
                another number of prompts or with a row of `exclude`, or this is no list of integers.
        """
        exclude_K = row_list("exclude", exclude)
        if not self.is_open:
            wanted = self.prompts_per_step if num_prompts is None else num_prompts
            self._last = self._open_step(wanted, exclude_K)
        assert self._last is not None
        if num_prompts not in (None, len(self._last.index_P)):
            raise ValueError(
                f"step {self._step} is open with {len(self._last.index_P)} prompts, "
                f"{num_prompts} were asked for"
            )
        if (chosen_K := np.intersect1d(exclude_K, self._last.index_P)).size:
            raise ValueError(
                f"step {self._step} is open, and its prompts hold rows {chosen_K.tolist()}, which "
                f"exclude names: prompts are chosen when a step is opened; observe its rounds first"
            )
        if self._in_flight is None:
            self._in_flight = self._proposal(self._last, self._budget(self._last))
        return self._in_flight

    def observe(
        self,
        proposal: Proposal,
        reward_N: ArrayLike,
        prompt_N: ArrayLike,
        *,
        full_marks_N: ArrayLike | None = None,
    ) -> FloatArray:
        """Learn from every scored rollout of a round, before any is dropped, and close the round.

        Rows may come in any order: the same set of rewards teaches the same, bit for bit. Rollouts
        that failed to be scored are left out by the caller; a prompt left with none in the training
        step counts as not chosen in the posterior, as nothing replaces what was known. If this raises,
        also out of a stopping rule, the planner is as it was and the round in flight.

        Args:
            proposal: the round in flight.
            reward_N: (N,) finite rewards.
            prompt_N: (N,) int64, each row's place in `proposal.index_P`.
            full_marks_N: (N,) the largest reward each row could have, where some rewards do not apply
                to all rows. Default: `full_marks`.

        Returns:
            (N,) successes in [0, 1], as the rewards were read; 1 is a pass.

        Raises:
            ValueError: if the proposal is not the one in flight, a reward is not finite or, with a
                stopping rule, neither a pass nor a failure, a prompt has more rewards than rollouts,
                or the stopping rule answers something else than it may.
        """
        self._check_in_flight(proposal)
        if np.ndim(reward_N) != 1 or np.ndim(prompt_N) != 1:
            raise ValueError(
                f"reward_N and prompt_N must be 1-d and equally long, "
                f"got {np.shape(reward_N)} and {np.shape(prompt_N)}"
            )
        reward_N, prompt_N = checked_rewards(proposal, reward_N, prompt_N, keys=self.keys)
        # On copies: rewards or a stopping rule's answer that are refused leave everything as it was.
        success = copy(self._success)
        assert self._last is not None
        plain_N = ~self._last.started_P[prompt_N]
        success_N = success.observe(reward_N, full_marks_N, counts_N=plain_N)
        if self._stopping is not None:
            check_binary(success_N, prompt_N, [self.keys[index] for index in self._last.index_P])
        last = self._last.copy()
        trials_P, successes_P = last.take_in(proposal.budget_P, reward_N, success_N, prompt_N)
        ends = proposal.is_last or self._all_stopped(last)
        self._learn(last, trials_P, successes_P, ends=ends)
        if ends and self.starts is not None and last.starts is not None:
            self.starts.learn(last.index_P, last.starts, last.successes_P, last.trials_P)
        self._last, self._in_flight, self._success = last, None, success
        self._step += int(ends)
        self._round = 0 if ends else proposal.round + 1
        if ends and hasattr(self.selector, "observe_spread"):
            self.selector.observe_spread(last.index_P, last.trials_P, last.low_P, last.high_P)
        return success_N

    def success(self, reward_N: ArrayLike, *, full_marks_N: ArrayLike | None = None) -> FloatArray:
        """(N,) successes of rewards that the planner does not observe, such as those of validation.

        They are read as those observed last; arguments as for `observe`.
        """
        return self._success.of(np.asarray(reward_N, dtype=np.float64), full_marks_N)

    def admit(self, reward_n: ArrayLike, success_n: ArrayLike | None = None) -> Decision:
        """Whether a group carries gradient: `proposal.admit`; rewards are read by `success`."""
        if success_n is None and np.ndim(reward_n) == 1:
            success_n = self.success(reward_n)
        return admit(reward_n, success_n)

    def observe_gradient_norms(
        self, index_K: ArrayLike, norm_K: ArrayLike, *, at_once: bool = False
    ) -> None:
        """Remember gradient norms G, the last measured of each prompt; they scale later steps.

        They count from the next step that is opened: norms measured on rollouts that train must not
        decide how many more of them the same step makes. A prompt that was never measured is given
        the mean of the step's measured ones, or 1 if there is none.

        Norms of pilots that are discarded may count in the round that follows them, `at_once`, as in
        GVM's Algorithm 2 (arXiv:2505.02391). With pooled pilots it is refused: budgets that depend on
        what the pilots are, and not only on how many passed, turn the gradient.

        Args:
            index_K: (K,) distinct rows of the data set.
            norm_K: (K,) norms, finite and non-negative.

            at_once: between discarded pilots and the round that follows them.

        Raises:
            ValueError: if either is not as above, there is no scale for norms to multiply: scale=None,
                or the pass rates that `knapsack` takes; or at once and not after discarded pilots.
        """
        self._check_scale("gradient norms multiply a scale")
        after_pilots = self.is_open and self._round == 1 and self._in_flight is None
        if at_once and not (self._discarded and after_pilots):
            raise ValueError(
                "norms count at once only between pilots that are discarded and the round after them"
            )
        self._norms.observe(index_K, norm_K, self.keys)
        if at_once:
            self._norms.open_step()

    def observe_lengths(self, index_K: ArrayLike, length_K: ArrayLike) -> None:
        """Remember how long a rollout of a prompt is: later steps divide its scale by the root.

        Minimises  sum_p c_p / n_p  for what  sum_p length_p n_p  comes to, and makes
        `rollouts_per_step` rollouts all the same: `allocation.cost_aware` with their number given.
        It moves rollouts towards short prompts, which is a choice: without a call nothing does. As
        for gradient norms, lengths count from the next step, and a prompt without one has the mean.

        Args:
            index_K: (K,) distinct rows of the data set.
            length_K: (K,) expected tokens, or seconds, of one rollout, finite and positive.

        Raises:
            ValueError: if either is not as above, or there is no scale to divide, as for norms.
        """
        self._check_scale("lengths divide a scale")
        self._lengths.observe(index_K, length_K, self.keys)

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, nested: NumPy arrays, strings, integers and None, nothing else.

        Integers: `step`, `round`, `run_seed`, and `training_step`, or None before `begin`. String:
        `fingerprint` of the keys in row order. Arrays: `visited_K`, rows with a scored rollout in the
        training step, `draw_D`, `last_visit_D` (-1 for never), `norm_D` and `next_norm_D` (NaN where not
        measured), `length_D` and `next_length_D` likewise, `budget_P` of the round in flight or
        None. Dicts: `posterior`, `selector`, `success`, `reliability`, `starts` or None, and `last`, the
        prompts, counts and reward bounds of the step that is open or was closed last, or None.

        Nothing in it changes when the planner goes on: it need not be copied again. Arrays of norms
        and lengths are read-only.
        """
        last = self._last
        return {
            "fingerprint": self._fingerprint,
            "run_seed": self._run_seed,
            "step": self._step,
            "round": self._round,
            "training_step": self._training_step,
            "visited_K": self._visited_K.copy(),
            "draw_D": self._draw_D.copy(),
            "last_visit_D": self._last_visit_D.copy(),
            "norm_D": self._norms.used_D,
            "next_norm_D": self._norms.measured_D,
            "length_D": self._lengths.used_D,
            "next_length_D": self._lengths.measured_D,
            "posterior": self.posterior.state_dict(),
            "selector": self.selector.state_dict(),
            "success": self._success.state_dict(),
            "reliability": {name: r.state_dict() for name, r in self._reliability.items()},
            "starts": None if self.starts is None else self.starts.state_dict(),
            "last": None if last is None else last.state_dict(),
            "budget_P": None if self._in_flight is None else self._in_flight.budget_P.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`: from here on the planner decides what the saved one would have.

        Raises:
            ValueError: if the state was saved with another data set, by a run of another seed, by
                another version, or in the middle of a step with a stopping rule and there is none
                here, or the reverse.
        """
        check_names(state, _STATE, "a planner's state")
        last, budget_P = state["last"], state["budget_P"]
        if last is not None:
            check_names(last, OpenStep.__slots__, "the last step of a planner's state")
        if (state["starts"] is None) != (self.starts is None):
            saved, here = ("without", "chooses") if self.starts else ("with", "chooses no")
            raise ValueError(f"the state was saved {saved} starts, and this planner {here} starts")
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"the checkpoint was made with another data set: its keys have fingerprint "
                f"{state['fingerprint']}, these {self._fingerprint}"
            )
        if state["run_seed"] != self._run_seed:
            raise ValueError(
                f"the checkpoint was made with run_seed={state['run_seed']}, "
                f"this run has {self._run_seed}"
            )
        if last is not None and int(last["step"]) == int(state["step"]):
            check_same_rule(last, self._stopping)
        self.posterior.load_state_dict(state["posterior"])
        self.selector.load_state_dict(state["selector"])
        self._success.load_state_dict(state["success"])
        check_names(state["reliability"], self._reliability, "the reliability in a planner's state")
        for name, reliability in self._reliability.items():
            reliability.load_state_dict(state["reliability"][name])
        if self.starts is not None:
            self.starts.load_state_dict(state["starts"])
        self._step = int(state["step"])
        self._round = int(state["round"])
        began = state["training_step"]
        self._training_step = None if began is None else int(began)
        self._visited_K = np.array(state["visited_K"], dtype=np.int64)
        self._draw_D = np.array(state["draw_D"], dtype=np.int64)
        self._last_visit_D = np.array(state["last_visit_D"], dtype=np.int64)
        for measured, name in ((self._norms, "norm_D"), (self._lengths, "length_D")):
            measured.load(state[name], state[f"next_{name}"])
        self._last = None if last is None else OpenStep.from_state(last)
        self._in_flight = None
        if budget_P is not None:
            assert self._last is not None
            self._in_flight = self._proposal(self._last, np.array(budget_P, dtype=np.int64))

    def reliability(self) -> dict[str, list[tuple[float, float, float]]]:
        """Expected pass rate, observed one and rollouts, by decile of the expectation, over the last
        steps: of the `posterior` and, where it learns, of its `prior` alone."""
        return {name: each.table() for name, each in self._reliability.items()}

    def metrics(self) -> dict[str, float]:
        """Flat numbers of the posterior, of visits, and of the step that was proposed last.

        Coverage is over the data set: the share and the number of prompts ever proposed, the visits
        of the most visited, and for how many steps some prompt has not been (since the start, if
        never). Budgets count a step's rollouts over all its rounds so far; shares of groups are over
        the step's prompts and everything scored of them so far. `calibration` says how well the
        posterior predicted the step's outcomes; it is left out with a stopping rule, with `evidence`
        below 1 and with fractional rewards. `calibration_error` and `prior_calibration_error` are those
        of `Reliability` over the last steps, of what a prior alone expected the latter. A selector's own
        `metrics()` are under `selector/`.
        """
        last, in_flight = self._last, self._in_flight
        metrics = {
            "planner/posterior_mean": float(self.posterior.mean().mean()),
            "planner/coverage": float((self._draw_D > 0).mean()),
            "planner/prompts_visited": float((self._draw_D > 0).sum()),
            "planner/visits_max": float(self._draw_D.max()),
            "planner/steps_unvisited_max": float(
                0 if last is None else last.step - self._last_visit_D.min()
            ),
            "planner/gradient_norm_coverage": float(np.isfinite(self._norms.measured_D).mean()),
        }
        if self.posterior.prior is not None:
            expected_D = self.posterior.prior.mean()
            metrics["planner/prior_mean"] = float(expected_D.mean())
            metrics["planner/prior_std"] = float(expected_D.std())
            metrics["planner/prior_kappa"] = self.posterior.prior.kappa
        for name, reliability in self._reliability.items():
            if (error := reliability.error) is not None:
                of_prior = "prior_" * (name == "prior")
                metrics[f"planner/{of_prior}calibration_error"] = error
        if hasattr(self.selector, "metrics"):
            of_selector = self.selector.metrics()
            metrics |= {f"selector/{name}": float(value) for name, value in of_selector.items()}
        if self.starts is not None:
            metrics |= {f"starts/{name}": value for name, value in self.starts.metrics().items()}
        if last is None:
            return metrics
        budget_P = None if in_flight is None else in_flight.budget_P
        if self._success.line is not None:
            metrics["planner/success_above"] = self._success.line
        of_step = last.metrics(budget_P)
        if self._stopping is None and self._evidence == 1:
            # A rule that stops on outcomes makes their number depend on them, and correlated siblings
            # are no independent trials: neither count is beta-binomial.
            plain_P = ~last.started_P
            of_step |= calibration(
                last.a_P[plain_P],
                last.b_P[plain_P],
                last.successes_P[plain_P],
                last.trials_P[plain_P],
                generator=step_generator(self._run_seed, "calibration", last.step),
            )
        return metrics | {f"planner/{name}": value for name, value in of_step.items()}

    @cached_property
    def _fingerprint(self) -> str:
        """Fingerprint of the keys; computed once, as a million take a third of a second."""
        return fingerprint(self.keys)

    def _open_step(self, num_prompts: int, exclude: NDArray[Any]) -> OpenStep:
        """Choose the step's prompts and number their draws."""
        self._total(num_prompts)  # refuses what cannot be spent before anything is chosen
        # Not every selector knows how to pass over rows, and most steps need not.
        also = {"exclude": exclude} if len(exclude) else {}
        generator = step_generator(self._run_seed, "select", self._step)
        index_P = np.array(
            self.selector.select(num_prompts, generator=generator, **also), dtype=np.int64
        )
        check_rows(index_P, len(self.keys))
        if index_P.shape != (num_prompts,) or np.isin(index_P, exclude).any():
            raise ValueError(
                f"the selector chose an array of shape {index_P.shape}, expected ({num_prompts},) "
                f"without rows {exclude.tolist()}, got {index_P.tolist()}"
            )
        draw_P, prior = self._draw_D[index_P], self.posterior.prior
        a_P, b_P = self.posterior.parameters(index_P)
        starts = None
        if self.starts is not None:
            starts = self.starts.choose(index_P, draw_P, a_P, b_P)
            a_P, b_P = self.starts.parameters(index_P, starts.band_P, a_P, b_P)
        last = OpenStep.of(
            self._step,
            index_P,
            draw_P,
            a_P,
            b_P,
            prior_P=None if prior is None else prior.mean(index_P),
            starts=starts,
        )
        self._draw_D[index_P] += 1
        self._last_visit_D[index_P] = self._step
        self._success.begin_step()
        self._norms.open_step()
        self._lengths.open_step()
        if self._stopping is not None:
            last.plan_P = self._allocated(last)
            last.active_P = last.plan_P > 0
        return last

    def _budget(self, last: OpenStep) -> IntArray:
        """(P,) rollouts of the round that comes now."""
        if last.active_P is not None:
            assert self._round_size is not None
            return np.where(last.active_P, np.minimum(last.left_P, self._round_size), 0)
        if self._pilot and self._round == 0:
            return np.full(len(last.index_P), self._pilot, dtype=np.int64)
        return self._allocated(last) - self._pooled

    def _allocated(self, last: OpenStep) -> IntArray:
        """(P,) n_i of the step."""
        # Ties, and what does not divide, go by a hash of step and key: a prompt's budget depends
        # neither on its row nor on its place in the step, and no prompt is favoured for good.
        keys = [self.keys[index] for index in last.index_P]
        order_P = np.argsort([stable_hash(self._run_seed, "ties", last.step, key) for key in keys])
        columns = self._scales(last, order_P)
        if self._multiplies:
            index_P = last.index_P[order_P]
            length_P = self._lengths.of(index_P)
            columns = [columns[0] * self._norms.of(index_P) / np.sqrt(length_P)]
        budget_P = np.empty(len(order_P), dtype=np.int64)
        budget_P[order_P] = self._spend(*columns)
        return budget_P

    def _all_stopped(self, last: OpenStep) -> bool:
        """Ask the stopping rule which prompts go on; return whether none does."""
        if self._stopping is None or last.active_P is None:
            return False
        draws = zip(last.index_P.tolist(), last.draw_P.tolist(), strict=True)
        # One number per group, whatever its place and however often the rule is asked.
        chances = [
            stable_hash(self._run_seed, "continue", self.keys[index], draw) / 2**64
            for index, draw in draws
        ]
        answer = self._stopping(
            Counts.of(
                last.a_P, last.b_P, last.successes_P, last.trials_P, last.left_P, np.array(chances)
            )
        )
        last.answered(*checked_answer(answer, len(last.index_P)))
        return not last.active_P.any()

    def _learn(
        self, last: OpenStep, trials_P: IntArray, successes_P: FloatArray, *, ends: bool
    ) -> None:
        """Write a round's counts to the posterior; every prompt decays once in a training step.

        That is as chosen in its first scored round, or as not chosen at the end of the training step. A
        prompt whose rollouts have a start was not chosen, as far as the posterior goes.
        """
        trials_P, successes_P = (np.where(last.started_P, 0, n) for n in (trials_P, successes_P))
        self._reliability["posterior"].observe(last.pass_rate_P, successes_P, trials_P)
        if last.prior_P is not None:
            self._reliability["prior"].observe(last.prior_P, successes_P, trials_P)
        scored_P = trials_P > 0
        index_P = last.index_P[scored_P]
        first_P = ~np.isin(index_P, self._visited_K)
        self.posterior.decay(index_P[first_P])
        self.posterior.add(
            index_P, successes_P[scored_P] * self._evidence, trials_P[scored_P] * self._evidence
        )
        self._visited_K = np.concatenate([self._visited_K, index_P[first_P]])
        if ends and self._training_step is None:
            self._decay_others()

    def _decay_others(self) -> None:
        """End a training step: prompts that it did not visit decay as not chosen."""
        self.posterior.decay_others(self._visited_K)
        for reliability in self._reliability.values():
            reliability.decay()
        self._visited_K = self._visited_K[:0]

    def _scales(self, last: OpenStep, order_P: IntArray) -> list[FloatArray]:
        """The allocator's arguments for the step's prompts, in the order `order_P`."""
        if self._estimate == "posterior":
            a_P, b_P = self.posterior.parameters(last.index_P[order_P])
            if last.starts is not None:  # groups with one go by what it has earned so far
                started_P, failures_P = last.started_P[order_P], last.trials_P - last.successes_P
                a_P = np.where(started_P, (last.a_P + last.successes_P)[order_P], a_P)
                b_P = np.where(started_P, (last.b_P + failures_P)[order_P], b_P)
            return self._columns(a_P, b_P, step=last.step)
        trials_P, successes_P = last.trials_P[order_P], last.successes_P[order_P]
        scored_P = trials_P > 0
        std_P = np.zeros(len(order_P))
        counts = successes_P[scored_P], trials_P[scored_P] - successes_P[scored_P]
        (std_P[scored_P],) = self._columns(*counts, step=last.step)
        return [std_P]

    def _columns(self, a_P: FloatArray, b_P: FloatArray, *, step: int) -> list[FloatArray]:
        """The scale of these parameters; without a scale the parameters themselves."""
        if self._scale is None:
            return [a_P, b_P]
        drawn = (
            {"generator": step_generator(self._run_seed, "scale", step)}
            if self._scale_draws
            else {}
        )
        return [np.asarray(self._scale(a_P, b_P, **drawn))]

    def _check_scale(self, what: str) -> None:
        """Raise ValueError unless the scale may be multiplied."""
        if self._scale is None:
            raise ValueError(f"{what}, and this planner has scale=None")
        if not self._multiplies:
            name = getattr(self._scale, "__name__", repr(self._scale))
            raise ValueError(
                f"{what}, and this planner's allocator is given pass rates (scale={name}): "
                f"take an allocator of scales, such as neyman"
            )

    def _total(self, num_prompts: int) -> int:
        """Rollouts that the allocator divides among `num_prompts` prompts."""
        rollouts, rest = divmod(self.rollouts_per_step * num_prompts, self.prompts_per_step)
        if rest:
            raise ValueError(
                f"a step of {num_prompts} instead of {self.prompts_per_step} prompts cannot have "
                f"its share of rollouts_per_step={self.rollouts_per_step}: it is not an integer"
            )
        return rollouts - self._discarded * num_prompts

    def _spend(self, *column_P: FloatArray) -> IntArray:
        """(P,) budgets n_i from the allocator, checked: a user's own may be wrong."""
        num_prompts = len(column_P[0])
        total = self._total(num_prompts)
        budget_P = np.asarray(
            self._allocate(*column_P, total, minimum=self._minimum, maximum=self._maximum)
        )
        if (
            budget_P.shape != (num_prompts,)
            or budget_P.dtype.kind not in "iu"
            or budget_P.sum() != total
            or budget_P.min() < self._minimum
            or (self._maximum is not None and budget_P.max() > self._maximum)
        ):
            raise ValueError(
                f"the allocator must give {num_prompts} integers of at least {self._minimum}, at "
                f"most {self._maximum}, that sum to {total}, got {budget_P.tolist()}"
            )
        return budget_P.astype(np.int64)

    def _proposal(self, last: OpenStep, budget_P: IntArray) -> Proposal:
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
            is_last=self._is_last(last, budget_P),
            index_P=read_only(last.index_P),
            budget_P=read_only(budget_P),
            draw_P=read_only(last.draw_P),
            first_slot_P=read_only(last.drawn_P),
            a_P=read_only(last.a_P),
            b_P=read_only(last.b_P),
            seed_N=read_only(np.concatenate(seeds)),
            starts=last.starts,
        )

    def _is_last(self, last: OpenStep, budget_P: IntArray) -> bool:
        if last.active_P is None:
            return self._round == 1 or self._pilot == 0
        return not (last.active_P & (last.left_P > budget_P)).any()

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
