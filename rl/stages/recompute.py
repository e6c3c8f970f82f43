"""Score rollouts with the policy before its first update: old and reference log-probs, entropies.

Each rank runs its share of the rows; the columns are gathered, so that every rank decides from the
same ones. Axes: K rows, T decision steps.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

import torch

from rl.objective.kl import k1_penalty
from rl.policies.contract import Policy
from rl.ranks import Ranks
from rl.stages.objective import ENTROPY, OLD, REFERENCE, Objective
from rollouts.batch import Rollouts


@torch.no_grad()
def recompute(
    policy: Policy,
    ranks: Ranks,
    model: torch.nn.Module,
    rollouts: Rollouts,
    columns: Set[str],
) -> Rollouts:
    """`rollouts` with `columns` filled in: any of OLD, ENTROPY and REFERENCE.

    Log-probabilities and entropies are those of the training model at the sampling temperature,
    whatever the engine recorded. They come from micro-batches as the update will cut them.

    Args:
        policy: scores the rows.
        ranks: the processes, each of which scores a share.
        model: as it is trained, wrapped.
        rollouts: K rows, at least one, the same on every rank.
        columns: empty returns `rollouts` as they are.
    """
    if not columns:
        return rollouts
    mine = ranks.rows_to_train(rollouts.length_N)
    micro = [mine[rows] for rows in policy.micro_batches(rollouts.take(mine))]
    most, found, error = ranks.most(len(micro)), None, None
    try:
        found = _scored(policy, model, rollouts, micro, columns, most)
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
    policy: Policy,
    model: torch.nn.Module,
    rollouts: Rollouts,
    micro: list[torch.Tensor],
    columns: Set[str],
    most: int,
) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Rows and columns of each of this rank's micro-batches; every rank runs `most` of them."""
    device, found = next(model.parameters()).device, []
    for i in range(most):
        # A rank that has finished takes part with any row: sharded weights need every rank.
        rows = micro[i] if i < len(micro) else torch.zeros(1, dtype=torch.int64)
        part = rollouts.take(rows).to(device)
        of_part: dict[str, torch.Tensor] = {}
        if columns & {OLD, ENTROPY}:
            scored = policy.score(model, part, entropy=True)
            assert scored.entropy_NT is not None
            of_part[OLD], of_part[ENTROPY] = scored.logprob_NT, scored.entropy_NT
        if REFERENCE in columns:
            of_part[REFERENCE] = policy.reference_logprobs(model, part)
        if i < len(micro):
            found.append((rows, {name: of_part[name].cpu() for name in columns}))
    return found


def without_unknown(policy: Policy, ranks: Ranks, rollouts: Rollouts) -> tuple[Rollouts, int]:
    """Fill in log-probabilities that the engine could not give, and count them.

    An engine may give NaN for a token it drew (vLLM does, rarely). Such a token gets the trainer's own
    log-probability, so that its ratio is 1 before the first update and it trains as any other.
    """
    unknown_NT = rollouts.logprob_NT.isnan()
    if not unknown_NT.any():
        return rollouts, 0
    rows_K = unknown_NT.any(dim=1).nonzero().flatten()
    with policy.whole() as model:
        of_rows = recompute(policy, ranks, model, rollouts.take(rows_K), {OLD})
    assert of_rows.old_logprob_NT is not None
    own_NT = torch.zeros_like(rollouts.logprob_NT)
    own_NT[rows_K] = of_rows.old_logprob_NT.to(own_NT.dtype)
    logprob_NT = torch.where(unknown_NT, own_NT, rollouts.logprob_NT)
    return replace(rollouts, logprob_NT=logprob_NT), int(unknown_NT.sum())


def with_kl_penalty(
    objective: Objective, policy: Policy, ranks: Ranks, rollouts: Rollouts
) -> Rollouts:
    """`rollouts` with rewards lowered by their KL to the reference, where `reward_kl` is set.

        reward_i - reward_kl * sum_t (logprob_it - reference_it)

    with the log-probabilities under which they were sampled: see `kl.k1_penalty`. The planner has
    observed the rewards as they were. Where the advantage charges each token by itself, rewards stay
    and the reference's log-probabilities come along.
    """
    if not objective.config.reward_kl or not len(rollouts):
        return rollouts
    with policy.whole() as model:
        columns = recompute(policy, ranks, model, rollouts, {REFERENCE})
    assert columns.reference_logprob_NT is not None and rollouts.reward_N is not None
    if objective.charges_kl_by_token:
        return columns
    penalty_N = k1_penalty(rollouts.logprob_NT, columns.reference_logprob_NT, rollouts.mask_NT)
    return replace(rollouts, reward_N=rollouts.reward_N - objective.config.reward_kl * penalty_N)
