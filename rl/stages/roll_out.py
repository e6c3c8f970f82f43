"""A proposal becomes scored rollouts: dealt to ranks, generated, decoded, rewarded, gathered.

Every rank ends with every row, in the proposal's order, so that what follows is decided identically
everywhere. Axes: P prompts, N rollouts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import logging

from rollouts.batch import Rollouts, concatenate
from rollouts.prompts import Prompt
from rollouts.rewards.contract import RewardError

if TYPE_CHECKING:
    from rl.stages.line import Line

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Rollouts to make: `budget_P` of each prompt, one seed a row."""

    prompts: list[Prompt]
    budget_P: np.ndarray
    seed_N: np.ndarray
    start_seed_P: np.ndarray | None = None
    """Seed of the noise that a prompt's samples share, where a diffusion plan says so."""

    @property
    def prompt_N(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.budget_P)), self.budget_P)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Rollouts with rewards; rows that failed or have no reward stand apart and are in no statistic."""

    rollouts: Rollouts
    shown_N: list[Any]  # what the reward saw of each row: a text, or an image
    reward_by_function: dict[str, list[float | None]]
    failed: Rollouts | None
    failures: list[dict[str, str]]  # prompt key and reason of each failed row
    unrewarded: Rollouts | None = None  # rows to which no reward function applied
    logged_columns: dict[str, list[Any]] = field(default_factory=dict)  # of `log_extra`, per row
    logged_metrics: dict[str, list[float]] = field(default_factory=dict)  # of `log_metric`

    @property
    def reward_N(self) -> torch.Tensor:
        assert self.rollouts.reward_N is not None
        return self.rollouts.reward_N

    def full_marks_N(self, weights: list[float] | None) -> np.ndarray:
        """(N,) the largest reward each row could have: of the functions that apply to it."""
        weight_F = np.array(weights or [1.0] * len(self.reward_by_function)).clip(min=0)
        values = self.reward_by_function.values()
        applies_FN = np.array([[value is not None for value in column] for column in values])
        # As the rewards are summed: exactly rounded.
        return np.array([math.fsum(weight_F[applies]) for applies in applies_FN.T])


def roll_out(line: Line, request: Request, params: Any, *, version: int) -> Scored:
    """Generate and score `request`, each rank its share.

    Args:
        line: the stages of the run.
        request: what to make.
        params: how, in the words of the engine.
        version: optimizer steps taken.

    Raises:
        RewardError: if more than `max_failed_share` of all rows could not be scored, or a reward
            function broke its contract: on all ranks at the same point (`on_all_ranks`). A rank that
            sees so many by itself stops scoring at once.
        RuntimeError: on the other ranks, if one rank fails for any other reason.
    """
    keys, lengths = [prompt.key for prompt in request.prompts], line.ranks.lengths
    together = getattr(params, "leaves_per_root", 1)
    mine = line.ranks.share_of(request.budget_P, lengths.of(keys), together=together)
    error: Exception | None = None
    share: tuple | None = None
    unscored: RewardError | None = None
    try:
        share = _generate_and_score(line, request, mine, params, version)
    except RewardError as caught:
        unscored = caught
    except Exception as caught:
        error = caught
    with line.ledger.phase("gather"):
        item = share if unscored is None else str(unscored)
        gathered = line.ranks.gather(item, error=error)
    _raise_together(gathered, unscored)
    shares = [s for s in gathered if s is not None]
    for _, rollouts, _, _ in shares:
        lengths.observe(keys, rollouts.prompt_N.numpy(), rollouts.length_N.numpy())
    return _merge(line, request, shares)


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
    line: Line, request: Request, rows: np.ndarray, params: Any, version: int
) -> tuple | None:
    if not len(rows):
        with line.generating() as policy:  # gathering sharded weights takes every rank
            line.load_weights(policy, version=version)  # and so may handing them on
            if getattr(line.engine, "generates_together", False):
                none = np.zeros(len(request.prompts), dtype=np.int64)
                settings = {"params": params, "version": version}
                line.engine.generate(request.prompts, none, seeds_N=none[:0], **settings)
            return None
    # With every prompt, those of other ranks at budget 0, so that shares are of one list of prompts.
    budget_P = np.bincount(request.prompt_N[rows], minlength=len(request.prompts))
    shared: dict[str, Any] = {}
    if request.start_seed_P is not None:
        shared = {"start_seeds_P": request.start_seed_P}
    with line.ledger.phase("rollout"), line.generating() as policy:
        line.load_weights(policy, version=version)
        rollouts = line.engine.generate(
            request.prompts,
            budget_P,
            seeds_N=request.seed_N[rows],
            params=params,
            version=version,
            **shared,
        )
    with line.ledger.phase("reward"):
        prompts = [request.prompts[p] for p in request.prompt_N[rows]]
        allowed = line.config.max_failed_share * len(request.seed_N) / len(rows)
        shown, result = line.reward(prompts, rollouts, max_failed_share=min(allowed, 1.0))
    return rows, rollouts, shown, result


def _merge(line: Line, request: Request, shares: list[tuple]) -> Scored:
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
    if len(failures) > line.config.max_failed_share * len(row_N) + 1e-9:
        error = RewardError(
            f"{len(failures)} of {len(row_N)} rollouts could not be scored, more than "
            f"max_failed_share={line.config.max_failed_share} allows; first, prompt "
            f"{failures[0]['prompt']}: {failures[0]['reason']}"
        )
        error.on_all_ranks = True
        raise error
    unrewarded = {int(rows[row]) for rows, _, _, result in shares for row in result.unrewarded}
    _warn_of_unrewarded(line, request, unrewarded)
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


def _warn_of_unrewarded(line: Line, request: Request, rows: set[int]) -> None:
    """Say once in a run that there are rows to which no reward function applies."""
    if not rows or line.memory.has_warned_of_unrewarded or not line.ranks.is_main:
        return
    line.memory.has_warned_of_unrewarded = True
    key = request.prompts[request.prompt_N[min(rows)]].key
    logger.warning(
        f"All reward functions returned None for {len(rows)} of {len(request.seed_N)} rollouts, first "
        f"of prompt {key}: such rollouts are in no mean and train nothing (said once; the ledger counts "
        "them as filtered_unrewarded)"
    )
