"""What only the policy before its update can tell of recorded rollouts, computed once per step.

Each rank runs its share of the rows; the columns are gathered, so that every rank decides from the
same ones. Axes: K rows, T decision steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rl.objective.kl import k1_penalty

if TYPE_CHECKING:
    from rl.stages.line import Line
    from rollouts.batch import Rollouts

OLD, ENTROPY, REFERENCE = "old_logprob_NT", "entropy_NT", "reference_logprob_NT"


@torch.no_grad()
def recompute(
    line: Line, model: torch.nn.Module, rollouts: Rollouts, columns: set[str]
) -> Rollouts:
    """`rollouts` with `columns` filled in: any of OLD, ENTROPY and REFERENCE.

    Log-probabilities and entropies are those of the training model at the sampling temperature,
    whatever the engine recorded. They come from micro-batches as the update will cut them.

    Args:
        line: the stages of the run.
        model: as it is trained, wrapped.
        rollouts: K rows, at least one, the same on every rank.
        columns: empty returns `rollouts` as they are.
    """
    if not columns:
        return rollouts
    ranks = line.ranks
    mine = ranks.rows_to_train(rollouts.length_N)
    micro = [mine[rows] for rows in line.micro_batches(rollouts.take(mine))]
    most, found, error = ranks.most(len(micro)), None, None
    try:
        found = _scored(line, model, rollouts, micro, columns, most)
    except Exception as caught:
        error = caught
    filled: dict[str, torch.Tensor] = {}
    for share in ranks.gather(found, error=error):
        for rows, of_part in share:
            for name, value_NT in of_part.items():
                empty_KT = value_NT.new_zeros(rollouts.mask_NT.shape)
                filled.setdefault(name, empty_KT)[rows] = value_NT
    return replace(rollouts, **filled)  # type: ignore[arg-type]


def _scored(
    line: Line,
    model: torch.nn.Module,
    rollouts: Rollouts,
    micro: list[torch.Tensor],
    columns: set[str],
    most: int,
) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Rows and columns of each of this rank's micro-batches; every rank runs `most` of them."""
    device, found = next(model.parameters()).device, []
    for i in range(most):
        # A rank that has finished takes part with any row: sharded weights need every rank.
        rows = micro[i] if i < len(micro) else torch.zeros(1, dtype=torch.int64)
        part, of_part = rollouts.take(rows).to(device), {}
        if columns & {OLD, ENTROPY}:
            of_part[OLD], of_part[ENTROPY] = line.score.statistics(model, part)
        if REFERENCE in columns:
            assert line.reference is not None
            with line.reference.of(model) as reference:
                of_part[REFERENCE] = line.score.logprobs(reference, part)
        if i < len(micro):
            found.append((rows, {name: of_part[name].cpu() for name in columns}))
    return found


def without_unknown(line: Line, rollouts: Rollouts) -> tuple[Rollouts, int]:
    """`rollouts` with log-probabilities the engine could not say in the trainer's own, and how many.

    An engine may give NaN for a token it drew (vLLM does, rarely). Its ratio is then 1 before the first
    update and the token trains as any other.
    """
    unknown_NT = rollouts.logprob_NT.isnan()
    if not unknown_NT.any():
        return rollouts, 0
    rows_K = unknown_NT.any(dim=1).nonzero().flatten()
    with line.policy() as policy:
        of_rows = recompute(line, policy, rollouts.take(rows_K), {OLD})
    assert of_rows.old_logprob_NT is not None
    own_NT = torch.zeros_like(rollouts.logprob_NT)
    own_NT[rows_K] = of_rows.old_logprob_NT.to(own_NT.dtype)
    logprob_NT = torch.where(unknown_NT, own_NT, rollouts.logprob_NT)
    return replace(rollouts, logprob_NT=logprob_NT), int(unknown_NT.sum())


def with_kl_penalty(line: Line, rollouts: Rollouts) -> Rollouts:
    """`rollouts` whose rewards are lowered by what their departure from the reference costs.

        reward_i - reward_kl * sum_t (logprob_it - reference_it)

    with the log-probabilities under which they were sampled: see `kl.k1_penalty`. The planner has
    observed the rewards as they were. Where the advantage charges each token by itself
    (`batch_whitened_tokens`), rewards stay and the reference's log-probabilities come along.
    """
    if not len(rollouts):
        return rollouts
    with line.policy() as policy:
        columns = recompute(line, policy, rollouts, {REFERENCE})
    assert columns.reference_logprob_NT is not None and rollouts.reward_N is not None
    if line.config.advantage == "batch_whitened_tokens":
        return columns
    penalty_N = k1_penalty(rollouts.logprob_NT, columns.reference_logprob_NT, rollouts.mask_NT)
    return replace(rollouts, reward_N=rollouts.reward_N - line.config.reward_kl * penalty_N)
