"""Filter and refill: draw groups until enough of them carry gradient, and account for them all.

Bookkeeping only: it decides which groups are trained on, whatever makes them, and remembers their
numbers, not their rollouts. For groups, rollouts and tokens, at every step,

    drawn + taken from the buffer = accepted + filtered + failed + discarded + put in the buffer

is asserted. Axis: n rollouts of one group.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from samplers.proposal import Decision, admit

AtCap = Literal["raise", "partial", "pad"]
UNITS = ("groups", "rollouts", "tokens")
FATES = ("accepted", "filtered", "failed", "discarded", "buffered")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One draw of one prompt; counts are of its scored rollouts, and 0 while it is in flight."""

    number: int
    """Place in the order of dispatch, over the whole run."""
    key: str
    """Prompt key; with `draw` it names the group."""
    draw: int
    step: int
    """Optimizer step that drew it."""
    kept: bool | None = None
    """Whether it passed the test; None in flight or failed."""
    reason: str = ""
    """Of the test, or "failed" if no rollout was scored; empty while it is in flight."""
    rollouts: int = 0
    tokens: int = 0
    reward_sum: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What a step trains on."""

    accepted: tuple[Group, ...]
    """In the order of dispatch, so those from the buffer first."""
    num_padded: int
    """Groups of weight 0 that the loss divides by as well: those missing under "pad", else 0."""
    discarded: tuple[Group, ...]
    """Mixed groups that are discarded: too old, or surplus where no buffer is kept."""


class RefillError(RuntimeError):
    """Too few groups carry gradient, and `at_cap` is "raise"."""


class Refill:
    """The groups of a step: dispatched, finished, and accepted in the order of dispatch.

    Groups may finish in any order, and equal rewards are accepted equally: were the first to finish
    the first to be kept, short answers would be favoured. Only what is missing is drawn, and whole
    rounds are awaited. Here a round is a step of the planner, which has observed every group before
    any is left out::

        refill.begin(step)
        while refill.missing:
            proposal = planner.propose(num_prompts=refill.missing, exclude=...)
            numbers = [refill.dispatch(key, draw) for key, draw in ...]
            ...                                               # make, score and observe the rollouts
            for number, reward_n in ...:
                refill.finish(number, reward_n, tokens=...)
        filled = refill.end()

    Under advantages that are 0 in a group without spread, leaving such groups out does not turn the
    gradient; it lengthens the step by one over the share kept. It does turn it if a KL term or a
    mean over the batch's tokens is at work, or if a cap cuts rounds short. So compare at equal
    *generated* rollouts. (Dynamic sampling of DAPO, arXiv:2503.14476; that surplus may be kept, and
    for how long, is a project default, not from the paper.)

    Args:
        groups_per_step: groups wanted.
        max_drawn: groups a step may draw at most; those from the buffer are not drawn again.
        at_cap: what happens when these are drawn, or the data has ended, and groups are missing:
            "raise" stops the run; "partial" trains on fewer and divides by fewer; "pad" trains on
            fewer and divides by `groups_per_step`, which makes the step smaller.
        max_age: optimizer steps for which surplus mixed groups are kept, to be accepted before new
            ones; with 0 they are discarded.
        decide: the test of a group's rewards (and successes, where `finish` is given them),
            `planner.admit` or one of your own; the default is that of spread.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        groups_per_step: int,
        *,
        max_drawn: int,
        at_cap: AtCap,
        max_age: int = 0,
        decide: Callable[..., Decision] = admit,
    ) -> None:
        if not 1 <= groups_per_step <= max_drawn:
            raise ValueError(
                f"need 1 <= groups_per_step <= max_drawn, got {groups_per_step} and {max_drawn}"
            )
        if at_cap not in ("raise", "partial", "pad"):
            raise ValueError(f"at_cap must be 'raise', 'partial' or 'pad', got {at_cap!r}")
        if max_age < 0:
            raise ValueError(f"max_age must be at least 0 optimizer steps, got {max_age}")
        self.groups_per_step = groups_per_step
        self.max_drawn = max_drawn
        self.at_cap = at_cap
        self.max_age = max_age
        self._decide = decide
        self.step: int | None = None
        """The open step; None between steps."""
        self._last_step: int | None = None
        self._next_number = 0
        self._groups: list[Group] = []  # drawn by the step, in the order of dispatch
        self._buffer: list[Group] = []
        self._aged: list[Group] = []
        self._counts = _nothing()
        self._totals = _nothing()
        self._sums = dict.fromkeys(("reward_accepted", "reward_scored"), 0.0)

    @property
    def missing(self) -> int:
        """Groups to dispatch now: those still wanted, as far as the cap allows.

        A group in flight counts as one that will be kept, so nothing is refilled before its selection
        is over.
        """
        self._opened()
        hoped = sum(group.reason == "" or group.kept is True for group in self._groups)
        wanted = self.groups_per_step - len(self._buffer) - hoped
        return max(0, min(wanted, self.max_drawn - len(self._groups)))

    @property
    def held(self) -> tuple[Group, ...]:
        """Groups of the buffer and of the open step, whose keys should not be proposed again."""
        return (*self._buffer, *self._groups)

    def begin(self, step: int) -> None:
        """Open a training step; discard surplus drawn more than `max_age` steps ago.

        Raises:
            ValueError: if a step is open, or this one does not come after the last.
        """
        step = operator.index(step)
        if self.step is not None:
            raise ValueError(f"step {self.step} must end before step {step} begins")
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step {step} cannot begin after step {self._last_step}")
        self.step = step
        self._counts = _nothing()
        self._sums = dict.fromkeys(self._sums, 0.0)
        for group in self._buffer:
            self._count("taken", group)
        self._aged = [group for group in self._buffer if step - group.step > self.max_age]
        self._buffer = [group for group in self._buffer if step - group.step <= self.max_age]

    def dispatch(self, key: str, draw: int) -> int:
        """Register a group that is about to be made; returns the number it is finished by.

        Called in the order of the proposal. More groups than are missing may be dispatched; what is
        too many is surplus.

        Raises:
            ValueError: if no step is open, the cap is reached, or the group is registered already.
        """
        step, draw = self._opened(), operator.index(draw)
        if len(self._groups) >= self.max_drawn:
            raise ValueError(f"step {step} has drawn all of max_drawn={self.max_drawn} groups")
        if any((group.key, group.draw) == (key, draw) for group in self.held):
            raise ValueError(f"draw {draw} of prompt {key} is registered already")
        group = Group(number=self._next_number, key=key, draw=draw, step=step)
        self._next_number += 1
        self._groups.append(group)
        self._add("groups_drawn", 1)
        return group.number

    def finish(
        self,
        number: int,
        reward_n: ArrayLike,
        *,
        tokens: int,
        success_n: ArrayLike | None = None,
        failed: int = 0,
        failed_tokens: int = 0,
    ) -> Decision | None:
        """Enter a group's rewards; groups finish in any order.

        Args:
            number: as `dispatch` returned it.
            reward_n: (n,) finite rewards of its scored rollouts.
            tokens: generated tokens of these.
            success_n: (n,) their successes, if known; `decide` is then given them second.
            failed: rollouts that were made but not scored; they decide nothing.
            failed_tokens: generated tokens of these.

        Returns:
            What the test said; None if no rollout was scored, and the group has failed.

        Raises:
            ValueError: if the group is not in flight, a count is negative, a reward is not finite, or
                `decide` gives something else than a `Decision` with a reason of its own.
        """
        step = self._opened()
        at = number - self._groups[0].number if self._groups else -1
        if not 0 <= at < len(self._groups) or self._groups[at].reason:
            raise ValueError(f"group {number} is not in flight at step {step}")
        tokens, failed = operator.index(tokens), operator.index(failed)
        failed_tokens = operator.index(failed_tokens)
        if min(tokens, failed, failed_tokens) < 0:
            raise ValueError(
                f"counts must be non-negative, got tokens={tokens}, failed={failed}, "
                f"failed_tokens={failed_tokens}"
            )
        reward_n = np.asarray(reward_n, dtype=np.float64)
        if reward_n.ndim != 1 or not np.isfinite(reward_n).all():
            raise ValueError(
                f"rewards of group {number} must be 1-d and finite, got {reward_n.tolist()}"
            )
        columns = [reward_n.copy()] if success_n is None else [reward_n.copy(), success_n]
        decision = _checked(self._decide(*columns)) if len(reward_n) else None
        if decision is None and tokens:
            raise ValueError(f"group {number} has {tokens} tokens in no scored rollout")
        group = replace(
            self._groups[at],
            kept=None if decision is None else bool(decision.kept),
            reason="failed" if decision is None else decision.reason,
            rollouts=len(reward_n),
            tokens=tokens,
            reward_sum=math.fsum(reward_n.tolist()),
        )
        self._groups[at] = group
        self._add("rollouts_drawn", group.rollouts + failed)
        self._add("tokens_drawn", tokens + failed_tokens)
        self._add("rollouts_failed", failed)
        self._add("tokens_failed", failed_tokens)
        return decision

    def end(self, *, data_ended: bool = False) -> Filled:
        """Close the step: accept groups, keep some for a later step, discard the rest.

        Args:
            data_ended: nothing is left to draw, so the rule for the cap applies before it.

        Raises:
            ValueError: if a group is in flight, or some are missing that could be drawn.
            RefillError: if groups are missing at the cap, or at the end of the data, under "raise".
                The step stays open.
            AssertionError: if groups, rollouts or tokens do not add up: a bug of this class.
        """
        step = self._opened()
        in_flight = [group.number for group in self._groups if not group.reason]
        if in_flight:
            raise ValueError(f"groups {in_flight} of step {step} are in flight: finish them first")
        if self.missing and not data_ended:
            raise ValueError(f"step {step} lacks {self.missing} groups that may still be drawn")
        mixed = [*self._buffer, *(group for group in self._groups if group.kept)]
        accepted, surplus = mixed[: self.groups_per_step], mixed[self.groups_per_step :]
        short = self.groups_per_step - len(accepted)
        if short and self.at_cap == "raise":
            raise RefillError(
                f"step {step}: {len(accepted)} of {self.groups_per_step} groups carry gradient after "
                f"{len(self._groups)} were drawn (max_drawn={self.max_drawn}"
                f"{', and the data has ended' if data_ended else ''}); of these "
                f"{sum(g.reason == 'all_pass' for g in self._groups)} pass throughout and "
                f"{sum(g.reason == 'all_fail' for g in self._groups)} fail throughout"
            )
        discarded = self._aged + (surplus if self.max_age == 0 else [])
        self._buffer = surplus if self.max_age else []
        for fate, groups in [
            ("accepted", accepted),
            ("discarded", discarded),
            ("buffered", self._buffer),
            ("failed", [group for group in self._groups if group.reason == "failed"]),
        ]:
            for group in groups:
                self._count(fate, group)
        for group in self._groups:
            if group.kept is False:
                self._count("filtered", group)
                self._count(f"filtered_{group.reason}", group)
        self._add("groups_padded", short if self.at_cap == "pad" else 0)
        self._sums = {
            "reward_accepted": math.fsum(group.reward_sum for group in accepted),
            "reward_scored": math.fsum(group.reward_sum for group in self._groups),
        }
        self._balance()
        self._groups, self._aged = [], []
        self.step, self._last_step = None, step
        return Filled(
            accepted=tuple(accepted),
            num_padded=short if self.at_cap == "pad" else 0,
            discarded=tuple(discarded),
        )

    def drain(self) -> tuple[Group, ...]:
        """Empty the buffer at the end of a run; return its groups, now counted as discarded.

        Raises:
            ValueError: if a step is open.
        """
        if self.step is not None:
            raise ValueError(f"step {self.step} must end before the buffer is drained")
        given_up, self._buffer = tuple(self._buffer), []
        self._counts = _nothing()
        self._sums = dict.fromkeys(self._sums, 0.0)
        for group in given_up:
            self._count("taken", group)
            self._count("discarded", group)
        return given_up

    def metrics(self) -> dict[str, float]:
        """Flat numbers: `refill/...` of the open or last step, `refill_total/...` of the run.

        Between steps also means, where there is anything to average: of rewards, over all scored
        rollouts the step drew and over those accepted, which look like learning where the former do
        not; and of lengths in tokens, by what became of the rollouts.
        """
        counts = self._counts
        metrics = {f"refill/{name}": float(count) for name, count in counts.items()}
        metrics |= {f"refill_total/{name}": float(count) for name, count in self._totals.items()}
        if self.step is not None:
            return metrics
        scored = counts["rollouts_drawn"] - counts["rollouts_failed"]
        for name, total, number in [
            ("reward_mean_unfiltered", self._sums["reward_scored"], scored),
            ("reward_mean_accepted", self._sums["reward_accepted"], counts["rollouts_accepted"]),
            ("length_mean_accepted", counts["tokens_accepted"], counts["rollouts_accepted"]),
            ("length_mean_filtered", counts["tokens_filtered"], counts["rollouts_filtered"]),
            ("length_mean_discarded", counts["tokens_discarded"], counts["rollouts_discarded"]),
        ]:
            if number:
                metrics[f"refill/{name}"] = total / number
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, an open step included: plain values, lists and dicts of them."""
        return {
            "step": self.step,
            "last_step": self._last_step,
            "next_number": self._next_number,
            "groups": [asdict(group) for group in self._groups],
            "buffer": [asdict(group) for group in self._buffer],
            "aged": [asdict(group) for group in self._aged],
            "counts": dict(self._counts),
            "totals": dict(self._totals),
            "sums": dict(self._sums),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`; groups in flight are still in flight, to be made again.

        Raises:
            ValueError: if the step has drawn more than `max_drawn` groups, or some wait in a buffer
                that is not kept.
        """
        if len(state["groups"]) > self.max_drawn or (state["buffer"] and not self.max_age):
            raise ValueError(
                f"the state has {len(state['groups'])} groups drawn and {len(state['buffer'])} in "
                f"the buffer, which max_drawn={self.max_drawn} and max_age={self.max_age} forbid"
            )
        self.step = state["step"]
        self._last_step = state["last_step"]
        self._next_number = state["next_number"]
        self._groups = [Group(**group) for group in state["groups"]]
        self._buffer = [Group(**group) for group in state["buffer"]]
        self._aged = [Group(**group) for group in state["aged"]]
        self._counts = dict(state["counts"])
        self._totals = dict(state["totals"])
        self._sums = dict(state["sums"])

    def _opened(self) -> int:
        if self.step is None:
            raise ValueError("no step is open: begin comes first")
        return self.step

    def _count(self, name: str, group: Group) -> None:
        for unit, amount in [
            ("groups", 1),
            ("rollouts", group.rollouts),
            ("tokens", group.tokens),
        ]:
            self._add(f"{unit}_{name}", amount)

    def _add(self, name: str, amount: int) -> None:
        for counts in (self._counts, self._totals):
            counts[name] = counts.get(name, 0) + amount

    def _balance(self) -> None:
        for unit in UNITS:
            had = self._counts[f"{unit}_drawn"] + self._counts[f"{unit}_taken"]
            fates = {fate: self._counts[f"{unit}_{fate}"] for fate in FATES}
            if had != sum(fates.values()):
                # Not an assert statement: this check holds under `python -O` too.
                raise AssertionError(f"step {self.step} had {had} {unit} and accounts for {fates}")


def _checked(decision: Any) -> Decision:
    """The decision of a user's own test, if it is one."""
    kept, reason = getattr(decision, "kept", None), getattr(decision, "reason", None)
    # A group without a reason is in flight, and "failed" is one without rewards.
    if not isinstance(kept, bool | np.bool_) or not isinstance(reason, str):
        raise ValueError(
            f"decide must give a Decision with a boolean `kept` and a string `reason`, "
            f"got {decision!r}"
        )
    if reason in ("", "failed"):
        raise ValueError(
            f"the reason decide gives must be neither empty nor 'failed', which is for groups "
            f"without a scored rollout; got {reason!r}"
        )
    return decision


def _nothing() -> dict[str, int]:
    reasons = ("filtered_all_pass", "filtered_all_fail", "filtered_lone")
    names = ("drawn", "taken", *FATES, *reasons)
    return {f"{unit}_{name}": 0 for unit in UNITS for name in names} | {"groups_padded": 0}
