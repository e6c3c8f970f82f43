"""The ledger: account for every rollout and every token that was generated.

    drawn + taken = trained + filtered + surplus + failed + buffered

for rollouts and for tokens, at every step; what is buffered waits for a later step, which takes it.

Names of the counts say their unit first: `rollouts_drawn`, `rollouts_filtered_all_fail`,
`tokens_trained`, `seconds_rollout`, `updates`.
"""

import math
import operator
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FATES = ("trained", "filtered", "surplus", "failed", "buffered")
"""What can become of a rollout: used in an update; left out for what it is (a group without
spread, a down-sampled row); left out because there were enough; never scored; or kept for a later
step."""

Counts = dict[str, int | float]


class Ledger:
    """Counts of one step and of the run, closed step by step.

    Example, a step of three rollouts::

        ledger.begin(0)
        ledger.drawn(3, tokens=41)
        ledger.account("trained", 2, tokens=30)
        ledger.account("filtered", 1, tokens=11, reason="all_fail")
        ledger.updates(1)
        ledger.end()
    """

    def __init__(self) -> None:
        self.step: int | None = None
        """The open step; None between steps."""
        self._step_counts = _nothing()
        self._totals = _nothing()

    @property
    def totals(self) -> Counts:
        """Counts of the whole run, the open step included."""
        return dict(self._totals)

    def begin(self, step: int) -> None:
        """Open a step: its counts start at 0.

        Raises:
            ValueError: if the step before it was not closed.
        """
        if self.step is not None:
            raise ValueError(f"step {self.step} must end before step {step} begins")
        self.step = operator.index(step)
        # Every name seen so far is reported at every step, so that no curve has holes.
        self._step_counts = dict.fromkeys(self._totals, 0)

    def drawn(self, rollouts: int, tokens: int, *, kind: str = "rollout") -> None:
        """Count rollouts that were generated; any other kind ("pilot") is also counted by name."""
        self._count("drawn", rollouts, tokens, detail="" if kind == "rollout" else kind)

    def processed(self, tokens: int) -> None:
        """Count tokens that went through the model for rollouts: those drawn, and those prefilled.

        Raises:
            ValueError: if the count is negative or no step is open.
        """
        self._add("tokens_processed", self._checked("tokens", tokens))

    def taken(self, rollouts: int, tokens: int) -> None:
        """Count rollouts of earlier steps that come out of the buffer; this step accounts for them.

        Raises:
            ValueError: if more are taken than were buffered, a count is negative or no step is open.
        """
        for unit, count in (("rollouts", rollouts), ("tokens", tokens)):
            held = self._totals[f"{unit}_buffered"] - self._totals[f"{unit}_taken"]
            if count > held:
                raise ValueError(f"{count} {unit} taken from a buffer that holds {held}")
        self._count("taken", rollouts, tokens, detail="")

    def replayed(self, rollouts: int, tokens: int) -> None:
        """Count rollouts of earlier steps that train once more; they were accounted for when drawn.

        Raises:
            ValueError: if a count is negative or no step is open.
        """
        self._count("replayed", rollouts, tokens, detail="")

    def account(self, fate: str, rollouts: int, tokens: int, *, reason: str = "") -> None:
        """Say what became of rollouts that were drawn.

        Args:
            fate: one of `FATES`.
            rollouts: how many.
            tokens: generated tokens they hold.
            reason: if given, also counted under `<fate>_<reason>`.

        Raises:
            ValueError: if the fate is unknown, a count is negative or no step is open.
        """
        if fate not in FATES:
            raise ValueError(f"fate must be one of {', '.join(FATES)}, got {fate!r}")
        self._count(fate, rollouts, tokens, detail=reason)

    def seconds(self, phase: str, seconds: float) -> None:
        """Add wall-clock time to a phase; between steps it belongs to the step before.

        Raises:
            ValueError: if the time is negative or not finite.
        """
        seconds = float(seconds)
        if not 0 <= seconds < math.inf:
            raise ValueError(f"seconds of {phase} must be finite and non-negative, got {seconds}")
        self._add(f"seconds_{phase}", seconds)

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Time a block of code and add it to a phase; a block that raises is not counted."""
        start = time.perf_counter()
        yield
        self.seconds(phase, time.perf_counter() - start)

    def updates(self, count: int) -> None:
        """Count optimizer updates.

        Raises:
            ValueError: if the count is negative or no step is open.
        """
        self._add("updates", self._checked("updates", count))

    def end(self) -> None:
        """Close the step.

        Raises:
            AssertionError: if rollouts or tokens were not all accounted for, or more than were
                drawn: rows were lost or counted twice, a bug of the caller. The step stays open.
            ValueError: if no step is open.
        """
        if self.step is None:
            raise ValueError("no step is open: begin comes before end")
        for unit in ("rollouts", "tokens"):
            drawn, taken = (self._step_counts[f"{unit}_{name}"] for name in ("drawn", "taken"))
            fates = {fate: self._step_counts[f"{unit}_{fate}"] for fate in FATES}
            if drawn + taken != sum(fates.values()):
                parts = " + ".join(f"{count} {fate}" for fate, count in fates.items())
                # Not an assert statement: this check holds under `python -O` too.
                raise AssertionError(
                    f"step {self.step} drew {drawn} {unit} and took {taken} from the buffer, but "
                    f"accounts for {sum(fates.values())} = {parts}"
                )
        self.step = None

    def metrics(self) -> Counts:
        """Flat numbers: `ledger/...` of the current or last step, `ledger_total/...` of the run."""
        step = {f"ledger/{name}": count for name, count in self._step_counts.items()}
        return step | {f"ledger_total/{name}": count for name, count in self._totals.items()}

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, an open step included: plain integers, floats, strings and None."""
        return {
            "step": self.step,
            "step_counts": dict(self._step_counts),
            "totals": dict(self._totals),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly.

        Raises:
            ValueError: if a count that every ledger has is missing.
        """
        for part in ("step_counts", "totals"):
            missing = _nothing().keys() - state[part].keys()
            if missing:
                raise ValueError(f"{part} lacks {', '.join(sorted(missing))}: not a ledger's state")
        self.step = state["step"]
        self._step_counts = dict(state["step_counts"])
        self._totals = dict(state["totals"])

    def _count(self, name: str, rollouts: int, tokens: int, *, detail: str) -> None:
        counts = {
            "rollouts": self._checked("rollouts", rollouts),
            "tokens": self._checked("tokens", tokens),
        }
        for unit, count in counts.items():
            self._add(f"{unit}_{name}", count)
            if detail:
                self._add(f"{unit}_{name}_{detail}", count)

    def _checked(self, unit: str, count: int) -> int:
        if self.step is None:
            raise ValueError(f"no step is open: begin comes before counting {unit}")
        count = operator.index(count)
        if count < 0:
            raise ValueError(f"{unit} must be non-negative, got {count}")
        return count

    def _add(self, name: str, amount: int | float) -> None:
        for counts in (self._step_counts, self._totals):
            counts[name] = counts.get(name, 0) + amount


def _nothing() -> Counts:
    counts: Counts = {
        f"{unit}_{name}": 0
        for unit in ("rollouts", "tokens")
        for name in ("drawn", "taken", *FATES)
    }
    return counts | {"updates": 0}
