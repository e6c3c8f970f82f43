"""Waves: one selection of prompts each, rolled out to its end; and the groups they give a step.

A step is one wave, or as many as it takes until enough groups carry gradient (`GroupBuffer`, the
filter and refill of DAPO, arXiv:2503.14476). Axes: P prompts, N rollouts (flat rows).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rl.stages.gradient_norms import norms_of
from rl.stages.roll_out import Request, Scored, roll_out
from rollouts.batch import DenoisingRollouts, Rollouts, TokenRollouts, concatenate
from rollouts.prompts import Prompt
from rollouts.step_plan import StepPlan
from samplers.keys import rollout_seeds
from samplers.planner import Proposal
from samplers.refill import Refill

if TYPE_CHECKING:
    from rl.stages.line import Line


@dataclass(frozen=True, kw_only=True)
class Wave:
    """One selection of prompts, and every round that was made of it."""

    prompts: list[Prompt]
    proposals: list[Proposal]
    rounds: list[Scored]
    group_weight_P: np.ndarray  # what the stopping rule multiplies the groups' gradients by

    @property
    def index_P(self) -> np.ndarray:
        """(P,) rows of the data set."""
        return self.proposals[0].index_P


@dataclass(frozen=True, kw_only=True)
class Groups:
    """What a step may train on: whole groups, rows ordered by prompt, then slot."""

    prompts: list[Prompt]  # P, as `rollouts.prompt_N` counts them
    rollouts: Rollouts  # N rows, scored
    pass_rate_P: torch.Tensor  # known before any rollout of these groups
    weight_P: torch.Tensor  # of the stopping rule
    num_padded: int = 0  # groups that are missing and that the denominator counts as well


def size(rollouts: Rollouts) -> tuple[int, int]:
    """Rollouts and tokens, as the ledger counts them; of a diffusion model all denoising steps.

    A step without noise is no decision, and has been evaluated all the same.
    """
    if isinstance(rollouts, DenoisingRollouts):
        return len(rollouts), rollouts.mask_NT.numel()
    return len(rollouts), int(rollouts.length_N.sum())


def roll_out_wave(line: Line, *, version: int, **which: Any) -> Wave:
    """Propose, roll out, reward and observe, until the planner's step is over.

    Args:
        line: the stages of the run.
        version: optimizer steps taken.
        which: passed to `Planner.propose`: how many prompts, and which not.
    """
    planner, ledger = line.planner, line.ledger
    proposals: list[Proposal] = []
    rounds: list[Scored] = []
    while not proposals or planner.is_open:
        proposal = planner.propose(**which)
        prompts = [line.prompts[i] for i in proposal.index_P]
        params = line.params(version)
        request = Request(
            prompts=prompts,
            budget_P=proposal.budget_P,
            seed_N=proposal.seed_N,
            start_seed_P=_start_seeds(line, prompts, proposal, params),
        )
        scored = roll_out(line, request, params, version=version)
        if isinstance(params, StepPlan):
            roots = int(proposal.budget_P.sum()) // params.leaves_per_root
            line.memory.evaluations += params.evaluations(roots)
        ledger.drawn(*size(scored.rollouts))
        if scored.failed is not None:
            ledger.drawn(*size(scored.failed))
            ledger.account("failed", *size(scored.failed))
        if scored.unrewarded is not None:
            ledger.drawn(*size(scored.unrewarded))
            ledger.account("filtered", *size(scored.unrewarded), reason="unrewarded")
        success_N = planner.observe(
            proposal,
            scored.reward_N.numpy(),
            scored.rollouts.prompt_N.numpy(),
            full_marks_N=scored.full_marks_N(line.config.reward_weights),
        )
        rollouts = replace(scored.rollouts, success_N=torch.from_numpy(success_N))
        proposals.append(proposal)
        rounds.append(replace(scored, rollouts=rollouts))
        if planner.is_open and pilots_act(line.config):  # after the pilots
            with ledger.phase("gradient_norm"):
                measured = norms_of(line, rollouts, proposal.index_P)
            planner.observe_gradient_norms(*measured, at_once=True)
    if line.config.allocator == "cost_aware":
        length_P = line.ranks.lengths.of([prompt.key for prompt in prompts])
        planner.observe_lengths(proposals[0].index_P, np.maximum(length_P, 1.0))
    return Wave(
        prompts=prompts,
        proposals=proposals,
        rounds=rounds,
        group_weight_P=planner.group_weight_P,
    )


def pilots_act(config: Any) -> bool:
    """Whether the gradient norms of a step's pilots decide the budgets of that step."""
    measured = getattr(config, "gvm_gradient_norm", "none") != "none"
    return measured and config.pilot_rollouts > 0 and config.pilot_use == "discard"


def _start_seeds(
    line: Line, prompts: list[Prompt], proposal: Proposal, params: Any
) -> np.ndarray | None:
    """(P,) seed of the first rollout of each draw, the same in all its rounds; None if not shared."""
    if not (isinstance(params, StepPlan) and params.shared_start):
        return None
    pairs = zip(prompts, proposal.draw_P.tolist(), strict=True)
    run_seed = line.config.seed
    return np.concatenate(
        [rollout_seeds(run_seed, prompt.key, draw, [0]) for prompt, draw in pairs]
    )


def groups_of(line: Line, wave: Wave) -> Groups:
    """The groups of one wave; pilots that are to be discarded leave, accounted for."""
    rounds = wave.rounds
    if line.config.pilot_rollouts and line.config.pilot_use == "discard":
        line.ledger.account("filtered", *size(rounds[0].rollouts), reason="pilot")
        rounds = rounds[1:]
    rollouts = concatenate([scored.rollouts for scored in rounds])
    return Groups(
        prompts=wave.prompts,
        rollouts=rollouts.take(rollouts.prompt_N.argsort(stable=True)),
        pass_rate_P=torch.tensor(wave.proposals[0].pass_rate_P),
        weight_P=torch.tensor(wave.group_weight_P),
    )


@dataclass(frozen=True, kw_only=True)
class _Held:
    """A group that may be trained on at this step or a later one."""

    row: int  # of the data set
    rollouts: TokenRollouts
    pass_rate: float
    weight: float


class GroupBuffer:
    """Waves until enough groups carry gradient, and the surplus that waits for the next step.

    `Refill` decides which groups are trained on; this holds their rollouts. A group that waited was
    made by an older policy: its recorded log-probabilities keep the ratio right.
    """

    def __init__(self, refill: Refill) -> None:
        self.refill = refill
        self._held: dict[int, _Held] = {}
        self._row_of: dict[str, int] | None = None  # of each key; the prompts never change

    def collect(self, line: Line, *, version: int) -> tuple[Groups, list[Wave]]:
        """Roll out waves until the step is filled; its groups in order of dispatch, and the waves.

        Raises:
            RefillError: if groups are missing at the cap and the rule for it is "raise".
        """
        refill, ledger = self.refill, line.ledger
        refill.begin(version)
        for held in self._held.values():
            ledger.taken(*size(held.rollouts))
        if self._row_of is None:
            self._row_of = {prompt.key: row for row, prompt in enumerate(line.prompts)}
        waves: list[Wave] = []
        free = len(line.prompts)
        while refill.missing and free:
            exclude = [self._row_of[group.key] for group in refill.held]
            free = len(line.prompts) - len(exclude)
            if free:
                wanted = max(refill.missing, line.config.refill_wave or 0)
                left = refill.max_drawn - sum(len(wave.prompts) for wave in waves)
                wanted = min(wanted, left, free)
                waves.append(
                    roll_out_wave(line, version=version, num_prompts=wanted, exclude=exclude)
                )
                last = self._take_in(line, waves[-1])
        filled = refill.end(data_ended=free == 0)
        for group in filled.discarded:
            reason = "surplus" if group.step == version else "aged"
            ledger.account("surplus", *size(self._held.pop(group.number).rollouts), reason=reason)
        accepted = [self._held.pop(group.number) for group in filled.accepted]
        for held in self._held.values():
            ledger.account("buffered", *size(held.rollouts))
        if accepted:
            return _joined(line, accepted, filled.num_padded, version), waves
        no_row = torch.zeros(0, dtype=torch.int64)
        return replace(last, rollouts=last.rollouts.take(no_row)), waves

    def _take_in(self, line: Line, wave: Wave) -> Groups:
        """Say what became of the wave's groups, in the order of the proposal; the groups."""
        groups, proposal = groups_of(line, wave), wave.proposals[0]
        numbers = [
            self.refill.dispatch(prompt.key, int(draw))
            for prompt, draw in zip(wave.prompts, proposal.draw_P, strict=True)
        ]
        unscored = [part for scored in wave.rounds for part in (scored.failed, scored.unrewarded)]
        failed = [part for part in unscored if part is not None]
        for place, number in enumerate(numbers):
            rollouts = _only(groups.rollouts, place)
            assert rollouts.reward_N is not None and rollouts.success_N is not None
            lost = [_only(part, place) for part in failed]
            decision = self.refill.finish(
                number,
                rollouts.reward_N.numpy(),
                tokens=size(rollouts)[1],
                success_n=rollouts.success_N.numpy(),
                failed=sum(map(len, lost)),
                failed_tokens=sum(size(part)[1] for part in lost),
            )
            if decision is not None and decision.kept:
                self._held[number] = _Held(
                    row=int(wave.index_P[place]),
                    rollouts=rollouts,
                    pass_rate=float(groups.pass_rate_P[place]),
                    weight=float(groups.weight_P[place]),
                )
            elif decision is not None:
                line.ledger.account("filtered", *size(rollouts), reason=decision.reason)
        return groups

    def state_dict(self) -> dict[str, Any]:
        """The bookkeeping, and the rollouts of every group that waits, column by column."""
        return {
            "refill": self.refill.state_dict(),
            "held": {
                str(number): {
                    "row": held.row,
                    "pass_rate": held.pass_rate,
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
                pass_rate=held["pass_rate"],
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


def _joined(line: Line, held: list[_Held], num_padded: int, version: int) -> Groups:
    """One batch of the groups, each its own prompt."""
    parts = [replace(group.rollouts, version=version) for group in held]
    return Groups(
        prompts=[line.prompts[group.row] for group in held],
        rollouts=concatenate(parts, offsets=range(len(parts))),
        pass_rate_P=torch.tensor([group.pass_rate for group in held], dtype=torch.float64),
        weight_P=torch.tensor([group.weight for group in held], dtype=torch.float64),
        num_padded=num_padded,
    )
