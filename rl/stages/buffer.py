"""Hold mixed groups for later steps, and draw until a step has enough (the refill of DAPO).

(Yu et al., 2025, arXiv:2503.14476.) Axes: P prompts, N rollouts (flat rows).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from rl.stages.records import Groups, Visit
from rollouts.batch import TokenRollouts, concatenate
from rollouts.prompts import Prompt
from samplers.ledger import Ledger
from samplers.refill import Refill

Draw = Callable[[int, list[int]], tuple[Visit, Groups]]
"""`draw(num_prompts, exclude)`: roll out so many prompts, none of the data-set rows `exclude`."""


@dataclass(frozen=True, kw_only=True)
class _Held:
    """A group that may be trained on at this step or a later one."""

    row: int  # of the data set
    rollouts: TokenRollouts
    a: float
    b: float
    weight: float


class GroupBuffer:
    """Draws until enough groups carry gradient, and keeps the surplus for the next step.

    `Refill` decides which groups are trained on; this holds their rollouts. A group that waited was
    made by an older policy: its recorded log-probabilities keep the ratio right.
    """

    def __init__(self, refill: Refill) -> None:
        self.refill = refill
        self._held: dict[int, _Held] = {}
        self._row_of: dict[str, int] | None = None  # of each key; the prompts never change

    def fill(
        self, draw: Draw, prompts: list[Prompt], ledger: Ledger, *, version: int, at_least: int
    ) -> tuple[Groups, list[Visit]]:
        """Draw prompts until the step is filled; its groups in order of dispatch, and the visits.

        Args:
            draw: rolls out a number of prompts.
            prompts: of the data set.
            ledger: accounts for groups that wait, leave or return.
            version: optimizer steps taken.
            at_least: prompts to draw at once, where fewer are missing.

        Raises:
            RefillError: if groups are missing at the cap and the rule for it is "raise".
        """
        refill = self.refill
        refill.begin(version)
        for held in self._held.values():
            ledger.taken(*held.rollouts.size)
        if self._row_of is None:
            self._row_of = {prompt.key: row for row, prompt in enumerate(prompts)}
        visits: list[Visit] = []
        free = len(prompts)
        while refill.missing and free:
            exclude = [self._row_of[group.key] for group in refill.held]
            free = len(prompts) - len(exclude)
            if free:
                wanted = max(refill.missing, at_least)
                left = refill.max_drawn - sum(len(visit.prompts) for visit in visits)
                visit, last = draw(min(wanted, left, free), exclude)
                visits.append(visit)
                self._take_in(visit, last, ledger)
        filled = refill.end(data_ended=free == 0)
        for group in filled.discarded:
            reason = "surplus" if group.step == version else "aged"
            ledger.account("surplus", *self._held.pop(group.number).rollouts.size, reason=reason)
        accepted = [self._held.pop(group.number) for group in filled.accepted]
        for held in self._held.values():
            ledger.account("buffered", *held.rollouts.size)
        if accepted:
            return _joined(prompts, accepted, filled.num_padded, version), visits
        no_row = torch.zeros(0, dtype=torch.int64)
        return replace(last, rollouts=last.rollouts.take(no_row)), visits

    def _take_in(self, visit: Visit, groups: Groups, ledger: Ledger) -> None:
        """Keep or filter each group of the visit, in the order of the proposal."""
        proposal = visit.proposals[0]
        numbers = [
            self.refill.dispatch(prompt.key, int(draw))
            for prompt, draw in zip(visit.prompts, proposal.draw_P, strict=True)
        ]
        unscored = [part for scored in visit.rounds for part in (scored.failed, scored.unrewarded)]
        failed = [part for part in unscored if part is not None]
        for place, number in enumerate(numbers):
            rollouts = _only(groups.rollouts, place)
            assert rollouts.reward_N is not None and rollouts.success_N is not None
            lost = [_only(part, place) for part in failed]
            decision = self.refill.finish(
                number,
                rollouts.reward_N.numpy(),
                tokens=rollouts.size[1],
                success_n=rollouts.success_N.numpy(),
                failed=sum(map(len, lost)),
                failed_tokens=sum(part.size[1] for part in lost),
            )
            if decision is not None and decision.kept:
                self._held[number] = _Held(
                    row=int(visit.index_P[place]),
                    rollouts=rollouts,
                    a=float(groups.a_P[place]),
                    b=float(groups.b_P[place]),
                    weight=float(groups.weight_P[place]),
                )
            elif decision is not None:
                ledger.account("filtered", *rollouts.size, reason=decision.reason)

    def metrics(self) -> dict[str, float]:
        """The last step's counts of groups, and means of rewards and lengths by what became of them.

        Rollouts and tokens are counted by the ledger.
        """
        groups = [f"refill/groups_{name}" for name in ("drawn", "accepted", "filtered", "padded")]
        means = [f"refill/reward_mean_{name}" for name in ("unfiltered", "accepted")]
        means += [f"refill/length_mean_{name}" for name in ("accepted", "filtered")]
        found = self.refill.metrics()
        return {name: found[name] for name in (*groups, *means) if name in found}

    def state_dict(self) -> dict[str, Any]:
        """The bookkeeping, and the rollouts of every group that waits, column by column."""
        return {
            "refill": self.refill.state_dict(),
            "held": {
                str(number): {
                    "row": held.row,
                    "a": held.a,
                    "b": held.b,
                    "weight": held.weight,
                    "version": held.rollouts.version,
                    "prompt_ids": [list(ids) for ids in held.rollouts.prompt_ids],
                    "columns": {
                        field.name: column.numpy()
                        for field in fields(held.rollouts)
                        if isinstance(column := getattr(held.rollouts, field.name), torch.Tensor)
                    },
                }
                for number, held in self._held.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly."""
        self.refill.load_state_dict(state["refill"])
        self._held = {
            int(number): _Held(
                row=held["row"],
                a=held["a"],
                b=held["b"],
                weight=held["weight"],
                rollouts=TokenRollouts(
                    version=held["version"],
                    prompt_ids=tuple(tuple(ids) for ids in held["prompt_ids"]),
                    **{name: torch.tensor(column) for name, column in held["columns"].items()},
                ),
            )
            for number, held in state["held"].items()
        }


def _only(rollouts: Any, place: int) -> TokenRollouts:
    """The rows of one prompt, as a batch of that prompt alone."""
    rows = rollouts.take((rollouts.prompt_N == place).nonzero().flatten())
    return replace(
        rows, prompt_N=torch.zeros_like(rows.prompt_N), prompt_ids=(rollouts.prompt_ids[place],)
    )


def _started(prompt: Prompt, prompt_ids: tuple[int, ...]) -> Prompt:
    """The prompt as the group's rollouts were given it, its start included."""
    return prompt.started(prompt_ids[len(prompt.token_ids) :])


def _joined(prompts: list[Prompt], held: list[_Held], num_padded: int, version: int) -> Groups:
    """One batch of the groups, each its own prompt."""
    parts = [replace(group.rollouts, version=version) for group in held]
    return Groups(
        prompts=[_started(prompts[group.row], group.rollouts.prompt_ids[0]) for group in held],
        rollouts=concatenate(parts, offsets=range(len(parts))),
        a_P=torch.tensor([group.a for group in held], dtype=torch.float64),
        b_P=torch.tensor([group.b for group in held], dtype=torch.float64),
        weight_P=torch.tensor([group.weight for group in held], dtype=torch.float64),
        num_padded=num_padded,
    )
