"""Draw rollouts: select prompts, allocate budgets, generate on all ranks, reward, observe.

Every rank ends with every row, in the proposal's order, so that what follows is decided identically
everywhere. Axes: P prompts, N rollouts (flat rows).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from rl.config.build import discards_pilots
from rl.config.methods import Settings, method_of
from rl.lengths import ExpectedLengths
from rl.policies.contract import Policy
from rl.ranks import Ranks
from rl.stages.gradient_norms import norms_of
from rl.stages.metrics import drawn
from rl.stages.planning import make_buffer
from rl.stages.records import Groups, Request, Scored, Visit
from rl.stages.success_line import SuccessLine
from rollouts.batch import Rollouts, TokenRollouts, concatenate
from rollouts.prompts import Prompt
from rollouts.rewards.contract import RewardError, RewardResult
from samplers.ledger import Ledger
from samplers.planner import Planner, Proposal

logger = logging.get_logger(__name__)

Share = tuple[np.ndarray, Rollouts, list[Any], RewardResult]
"""What one rank made: rows of the request, their rollouts, what rewards saw of them, the rewards."""


class Sampling:
    """Where rollouts go: prompts, planner, refill buffer, expected lengths, and the ledger of it all.

    Args:
        config: the settings.
        prompts: one per data-set row.
        planner: decides prompts and budgets.
        ranks: the processes, each of which generates a share.
    """

    def __init__(
        self, config: Settings, prompts: list[Prompt], planner: Planner, ranks: Ranks
    ) -> None:
        self.prompts = prompts
        self.planner = planner
        self.ranks = ranks
        self.buffer = make_buffer(config, planner)
        """Draws until enough groups are mixed; None: each step draws once."""
        self.ledger = Ledger()
        self.lengths = ExpectedLengths()
        """The expected tokens of a rollout, by which rows are dealt; the same on every rank."""
        self.success_line = SuccessLine(config.success_above)
        self.reward_weights = config.reward_weights
        self._max_failed_share = config.max_failed_share
        self._at_least = config.refill_min_prompts or 0
        self._max_steps, self._max_tokens = config.max_steps, config.max_generated_tokens
        self._wants_lengths = method_of(config, "allocator").wants_lengths
        self._discards_pilots = discards_pilots(config)
        # Norms of discarded pilots count at once, those of rows that train from the next step on.
        kind = config.gvm_gradient_norm
        self._norm_of_pilots = kind if self._discards_pilots else "none"
        self._norm_of_step = "none" if self._discards_pilots else kind
        self._has_warned_of_unrewarded = False

    def draw(self, policy: Policy, *, version: int) -> tuple[Groups, list[Visit]]:
        """The groups that a step may train on, and everything that was rolled out for them.

        One visit of `prompts_per_step` prompts; with a buffer, visits until enough groups are mixed.

        Args:
            policy: generates and rewards.
            version: optimizer steps taken.

        Raises:
            RefillError: if groups are missing at the cap and `refill_at_cap` is "raise".
        """

        def some(num_prompts: int, exclude: list[int]) -> tuple[Visit, Groups]:
            visit = self.visit(policy, version=version, num_prompts=num_prompts, exclude=exclude)
            return visit, self._groups(visit)

        if self.buffer is not None:
            self.planner.begin(version)  # so that the posterior decays once for all selections
            return self.buffer.fill(
                some, self.prompts, self.ledger, version=version, at_least=self._at_least
            )
        visit = self.visit(policy, version=version)
        return self._groups(visit), [visit]

    def visit(self, policy: Policy, *, version: int, **which: Any) -> Visit:
        """Propose, roll out, reward and observe, until the planner's step is over.

        Args:
            policy: generates and rewards.
            version: optimizer steps taken.
            which: passed to `Planner.propose`: how many prompts, and which not.
        """
        planner, ledger = self.planner, self.ledger
        proposals: list[Proposal] = []
        rounds: list[Scored] = []
        while not proposals or planner.is_open:
            proposal = planner.propose(**which)
            prompts = _started([self.prompts[i] for i in proposal.index_P], proposal)
            params = policy.params(version)
            request = Request(
                prompts=prompts,
                budget_P=proposal.budget_P,
                seed_N=proposal.seed_N,
                start_seed_P=policy.start_seeds(prompts, proposal.draw_P, params),
            )
            scored = self.roll_out(policy, request, params, version=version, ledger=ledger)
            _account(ledger, request, scored)
            success_N = planner.observe(
                proposal,
                scored.reward_N.numpy(),
                scored.rollouts.prompt_N.numpy(),
                full_marks_N=scored.full_marks_N(self.reward_weights),
            )
            rollouts = replace(scored.rollouts, success_N=torch.from_numpy(success_N))
            _remember(planner, proposal, prompts, rollouts)
            proposals.append(proposal)
            rounds.append(replace(scored, rollouts=rollouts))
            if planner.is_open and self._norm_of_pilots != "none":  # between pilots and the rest
                with ledger.phase("gradient_norm"):
                    measured = norms_of(
                        policy, self.ranks, rollouts, proposal.index_P, kind=self._norm_of_pilots
                    )
                planner.observe_gradient_norms(*measured, at_once=True)
        if self._wants_lengths:
            length_P = self.lengths.of([prompt.key for prompt in prompts])
            planner.observe_lengths(proposals[0].index_P, np.maximum(length_P, 1.0))
        return Visit(
            prompts=prompts,
            proposals=proposals,
            rounds=rounds,
            group_weight_P=planner.group_weight_P,
        )

    def observe_gradient_norms(self, policy: Policy, visits: list[Visit]) -> None:
        """Measure the gradient norms of a step's rollouts for later steps, where the settings ask.

        Measured on rollouts that also train, G would bias the gradient it allocates in the same step.
        """
        if self._norm_of_step == "none":
            return
        with self.ledger.phase("gradient_norm"):
            index_P, norm_P = np.zeros(0, dtype=np.int64), np.zeros(0)
            if visits:
                index_P, norm_P = norms_of(
                    policy,
                    self.ranks,
                    drawn(visits),
                    np.concatenate([visit.index_P for visit in visits]),
                    kind=self._norm_of_step,
                )
            self.planner.observe_gradient_norms(index_P, norm_P)

    def progress(self, version: int) -> float:
        """Share of the run that is done, in [0, 1]: of its steps or its tokens, whichever is more.

        Tokens of the current step do not count, so that nothing of it decides its own schedule.
        """
        most = self._max_tokens
        step, totals = self.ledger.metrics(), self.ledger.totals
        spent = totals["tokens_drawn"] - step["ledger/tokens_drawn"]
        return min(max(version / self._max_steps, spent / most if most else 0.0), 1.0)

    def roll_out(
        self, policy: Policy, request: Request, params: Any, *, version: int, ledger: Ledger
    ) -> Scored:
        """`roll_out`, with a warning the first time that no reward function applies to some rows."""
        scored = roll_out(
            policy,
            self.ranks,
            self.lengths,
            request,
            params,
            version=version,
            max_failed_share=self._max_failed_share,
            ledger=ledger,
        )
        if scored.unrewarded is not None and not self._has_warned_of_unrewarded:
            self._has_warned_of_unrewarded = True
            if self.ranks.is_main:
                _warn_of_unrewarded(request, scored.unrewarded)
        return scored

    def state_dict(self) -> dict[str, Any]:
        """What later steps depend on: nested dicts of arrays and plain values."""
        return {
            "planner": self.planner.state_dict(),
            "ledger": self.ledger.state_dict(),
            "buffer": None if self.buffer is None else self.buffer.state_dict(),
            "lengths": self.lengths.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly."""
        self.planner.load_state_dict(state["planner"])
        self.ledger.load_state_dict(state["ledger"])
        if self.buffer is not None:
            self.buffer.load_state_dict(state["buffer"])
        self.lengths.load_state_dict(state["lengths"])

    def _groups(self, visit: Visit) -> Groups:
        """The groups of one visit, without pilots that are to be discarded."""
        rounds = visit.rounds
        if self._discards_pilots:
            self.ledger.account("filtered", *rounds[0].rollouts.size, reason="pilot")
            rounds = rounds[1:]
        rollouts = concatenate([scored.rollouts for scored in rounds])
        return Groups(
            prompts=visit.prompts,
            rollouts=rollouts.take(rollouts.prompt_N.argsort(stable=True)),
            a_P=torch.tensor(visit.proposals[0].a_P),
            b_P=torch.tensor(visit.proposals[0].b_P),
            weight_P=torch.tensor(visit.group_weight_P),
        )


def _started(prompts: list[Prompt], proposal: Proposal) -> list[Prompt]:
    """The prompts of a round with the starts that were chosen for them."""
    if proposal.starts is None:
        return prompts
    starts = zip(prompts, proposal.starts.prefix_P, strict=True)
    return [prompt.started(start) for prompt, start in starts]


def _remember(
    planner: Planner, proposal: Proposal, prompts: list[Prompt], rollouts: Rollouts
) -> None:
    """Keep each prompt's latest success and failure for later starts, where there are any.

    Rows in which others wrote between the policy's tokens (tool output) are left out.
    """
    if planner.starts is None:
        return
    assert isinstance(rollouts, TokenRollouts)
    assert rollouts.reward_N is not None and rollouts.success_N is not None
    columns = (rollouts.prompt_N, rollouts.success_N, rollouts.reward_N, rollouts.length_N)
    for row, (p, success, reward, length) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        if not rollouts.mask_NT[row, :length].all():
            continue
        drawn = rollouts.token_NT[row, :length].numpy()
        whole = np.concatenate([np.array(prompts[p].start_ids, dtype=np.int64), drawn])
        planner.starts.remember(
            int(proposal.index_P[p]),
            whole,
            success=success,
            reward=reward,
            version=rollouts.version,
        )


def _account(ledger: Ledger, request: Request, scored: Scored) -> None:
    """Count what was drawn, and the rows that leave at once: without a reward, for either reason.

    Of a language model also what was processed: the tokens drawn, and those of prompts and starts, which
    are prefilled, once for each prompt of a round.
    """
    made = (scored.rollouts, scored.failed, scored.unrewarded)
    if isinstance(scored.rollouts, TokenRollouts):
        pairs = zip(request.prompts, request.budget_P.tolist(), strict=True)
        prefilled = sum(len(prompt.token_ids) for prompt, budget in pairs if budget)
        ledger.processed(prefilled + sum(part.size[1] for part in made if part is not None))
    ledger.drawn(*scored.rollouts.size)
    if scored.failed is not None:
        ledger.drawn(*scored.failed.size)
        ledger.account("failed", *scored.failed.size)
    if scored.unrewarded is not None:
        ledger.drawn(*scored.unrewarded.size)
        ledger.account("filtered", *scored.unrewarded.size, reason="unrewarded")


def roll_out(
    policy: Policy,
    ranks: Ranks,
    lengths: ExpectedLengths,
    request: Request,
    params: Any,
    *,
    version: int,
    max_failed_share: float,
    ledger: Ledger,
) -> Scored:
    """Generate and score `request`, each rank its share.

    Args:
        policy: generates and rewards.
        ranks: the processes.
        lengths: the expected lengths that rows are dealt by; they learn from these rollouts.
        request: what to make.
        params: how, in the engine's terms.
        version: optimizer steps taken.
        max_failed_share: share of all rows that may fail to be scored.
        ledger: counts the seconds of each phase.

    Raises:
        RewardError: if more than `max_failed_share` of all rows could not be scored, or a reward
            function broke its contract: on all ranks at the same point (`on_all_ranks`). A rank that
            sees so many by itself stops scoring at once.
        RuntimeError: on the other ranks, if one rank fails for any other reason.
    """
    # What follows a start is shorter than a whole completion of the same prompt.
    keys = [p.key + " started" if p.start_ids else p.key for p in request.prompts]
    mine = ranks.share_of(request.budget_P, lengths.of(keys), together=policy.rows_together(params))
    error: Exception | None = None
    share: Share | None = None
    unscored: RewardError | None = None
    try:
        share = _generate_and_score(
            policy,
            request,
            mine,
            params,
            version=version,
            max_failed_share=max_failed_share,
            ledger=ledger,
        )
    except RewardError as caught:
        unscored = caught
    except Exception as caught:
        error = caught
    with ledger.phase("gather"):
        item = share if unscored is None else str(unscored)
        gathered = ranks.gather(item, error=error)
    _raise_together(gathered, unscored)
    shares = [s for s in gathered if s is not None]
    for _, rollouts, _, _ in shares:
        lengths.observe(keys, rollouts.prompt_N.numpy(), rollouts.length_N.numpy())
    return _merge(request, shares, max_failed_share)


def _raise_together(gathered: list[Any], own: RewardError | None) -> None:
    """Raise RewardError on every rank if one rank brings the text of one; its own with its cause."""
    failed = [(rank, item) for rank, item in enumerate(gathered) if isinstance(item, str)]
    if not failed:
        return
    rank, text = failed[0]
    error = own or RewardError(f"on process {rank}: {text}")
    error.on_all_ranks = True
    raise error


def _generate_and_score(
    policy: Policy,
    request: Request,
    rows: np.ndarray,
    params: Any,
    *,
    version: int,
    max_failed_share: float,
    ledger: Ledger,
) -> Share | None:
    """This rank's share of a request; None if it has no row."""
    # With every prompt, those of other ranks at budget 0, so that shares are of one list of prompts.
    budget_P = np.bincount(request.prompt_N[rows], minlength=len(request.prompts))
    with ledger.phase("rollout"):
        rollouts = policy.generate(
            request.prompts,
            budget_P,
            seeds_N=request.seed_N[rows],
            params=params,
            version=version,
            start_seeds_P=request.start_seed_P,
        )
    if rollouts is None:
        return None
    with ledger.phase("reward"):
        prompts = [request.prompts[p] for p in request.prompt_N[rows]]
        allowed = max_failed_share * len(request.seed_N) / len(rows)
        shown, result = policy.reward(prompts, rollouts, max_failed_share=min(allowed, 1.0))
    return rows, rollouts, shown, result


def _merge(request: Request, shares: list[Share], max_failed_share: float) -> Scored:
    """The shares of all ranks as one round, in the order of the request."""
    row_N = np.concatenate([rows for rows, _, _, _ in shares])
    order = np.argsort(row_N)
    assert np.array_equal(row_N[order], np.arange(len(request.seed_N))), "rows lost on the way"
    rollouts = concatenate([rollouts for _, rollouts, _, _ in shares])
    reward_N = torch.cat([torch.as_tensor(result.reward_N) for *_, result in shares])
    shown = [one for _, _, part, _ in shares for one in part]
    by_function = {
        name: [value for *_, result in shares for value in result.per_function[name]]
        for name in shares[0][3].per_function
    }
    reasons: dict[int, str] = {}
    for rows, _, _, result in shares:
        reasons |= {int(rows[row]): reason for row, reason in result.failed.items()}
    failures = [
        {"prompt": request.prompts[request.prompt_N[row]].key, "reason": reason}
        for row, reason in sorted(reasons.items())
    ]
    if len(failures) > max_failed_share * len(row_N) + 1e-9:
        error = RewardError(
            f"{len(failures)} of {len(row_N)} rollouts could not be scored, more than "
            f"max_failed_share={max_failed_share} allows; first, prompt "
            f"{failures[0]['prompt']}: {failures[0]['reason']}"
        )
        error.on_all_ranks = True
        raise error
    unrewarded = {int(rows[row]) for rows, _, _, result in shares for row in result.unrewarded}
    without = reasons.keys() | unrewarded
    good, bad, none = (
        torch.tensor([i for i in order.tolist() if is_in(int(row_N[i]))], dtype=torch.long)
        for is_in in (lambda row: row not in without, reasons.__contains__, unrewarded.__contains__)
    )
    columns = [[math.nan if v is None else v for v in values] for values in by_function.values()]
    reward_NF = torch.tensor(columns, dtype=torch.float64).reshape(len(columns), len(row_N)).T
    logged = {name: None for *_, result in shares for name in result.columns}
    logged_columns = {
        name: [
            value
            for *_, part, result in shares
            for value in result.columns.get(name, [None] * len(part))
        ]
        for name in sorted(logged)
    }
    names = sorted({name for *_, result in shares for name in result.metrics})
    return Scored(
        rollouts=replace(
            rollouts.take(good), reward_N=reward_N[good], reward_NF=reward_NF[good].contiguous()
        ),
        shown_N=[shown[i] for i in good.tolist()],
        reward_by_function={n: [v[i] for i in good.tolist()] for n, v in by_function.items()},
        failed=rollouts.take(bad) if len(bad) else None,
        failures=failures,
        unrewarded=rollouts.take(none) if len(none) else None,
        logged_columns={n: [v[i] for i in good.tolist()] for n, v in logged_columns.items()},
        logged_metrics={n: [v for *_, r in shares for v in r.metrics.get(n, [])] for n in names},
    )


def _warn_of_unrewarded(request: Request, unrewarded: Rollouts) -> None:
    key = request.prompts[int(unrewarded.prompt_N[0])].key
    logger.warning(
        f"All reward functions returned None for {len(unrewarded)} of {len(request.seed_N)} rollouts, "
        f"first of prompt {key}: such rollouts are in no mean and train nothing (warned once; the "
        "ledger counts them as filtered_unrewarded)"
    )
