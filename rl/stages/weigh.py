"""Compute advantages on full groups, choose the rows that train, and weigh them.

Axes: P prompts, N rollouts (flat rows), K rows kept.
"""

from __future__ import annotations

import torch

from rl.policies.contract import Policy
from rl.ranks import Ranks
from rl.stages import metrics
from rl.stages.objective import Objective, has_signal
from rl.stages.recompute import with_kl_penalty, without_unknown
from rl.stages.records import Batch, Groups, Visit
from rollouts.batch import Rollouts, TokenRollouts
from samplers.ledger import Ledger
from samplers.proposal import admit


def weigh(
    groups: Groups,
    visits: list[Visit],
    objective: Objective,
    policy: Policy,
    ranks: Ranks,
    *,
    progress: float,
    ledger: Ledger,
) -> Batch:
    """Advantages, then down-sampling, then objective weights; rows without signal leave, accounted for.

    Advantages are those of full groups, whatever is dropped afterwards; PODS alone computes them
    again on the rows it keeps. Truncated rows that are to be masked (`mask_truncated_completions`,
    the overlong filtering of DAPO, arXiv:2503.14476) take part in all of it and lose their tokens
    last, so that the others weigh what they weighed, as in TRL. Where entropies count, rows without
    signal stay.

    Args:
        groups: what may train.
        visits: everything that was drawn, for the metrics.
        objective: computes advantages and weights, and chooses rows.
        policy: recomputes log-probabilities that the engine did not give.
        ranks: the processes.
        progress: share of the run that is done, in [0, 1]; schedules read it.
        ledger: accounts for the rows that leave.
    """
    everything, unknown = without_unknown(policy, ranks, groups.rollouts)
    everything = with_kl_penalty(objective, policy, ranks, everything)
    everything = objective.credit(everything, groups)
    chosen = objective.keep(everything, progress)
    rollouts = objective.credit_kept(everything.take(chosen))
    weight_K, denominator, original = _weights(objective, groups, everything, chosen)
    trains_K = has_signal(rollouts) & (weight_K != 0) | objective.trains_everywhere
    trains_K &= objective.trained_length(rollouts) > 0
    kept = rollouts.take(trains_K.nonzero().flatten())
    trained_N = torch.zeros(len(everything), dtype=torch.bool)
    trained_N[chosen[trains_K]] = True
    _account(ledger, objective, everything, chosen, trained_N)
    return Batch(
        rollouts=kept,
        weight_K=weight_K[trains_K],
        denominator=denominator,
        original_denominator=original,
        prompts=groups.prompts,
        visits=visits,
        metrics=metrics.of_rollouts(visits, kept)
        | metrics.of_selection(objective.config.down_sampling, everything, chosen)
        | ({"importance/unknown_logprobs": float(unknown)} if unknown else {}),
    )


def _weights(
    objective: Objective, groups: Groups, everything: Rollouts, chosen: torch.Tensor
) -> tuple[torch.Tensor, float, float]:
    """Weights of the chosen rows, their denominator, and the denominator of all rows.

    A prompt's weight is shared by its rows that reach the loss (`weight_rows: trained`), so that a
    prompt of which few rows were kept counts no less, or by all that were drawn (`drawn`).
    """
    if not len(chosen):
        return torch.zeros(0, dtype=torch.float64), 1.0, 1.0  # of empty sums
    of_all, original = objective.row_weights(groups, everything)
    of_chosen, denominator = objective.row_weights(groups, everything.take(chosen))
    if objective.config.weight_rows == "drawn":
        return of_all[chosen], original, original
    return of_chosen, denominator, original


def _account(
    ledger: Ledger,
    objective: Objective,
    everything: Rollouts,
    chosen: torch.Tensor,
    trained_N: torch.Tensor,
) -> None:
    """Enter every row that leaves here in the ledger, with the reason."""
    reward_N, success_N, prompt_N = everything.reward_N, everything.success_N, everything.prompt_N
    assert reward_N is not None and success_N is not None
    truncated_N = None
    if objective.config.mask_truncated_completions:
        assert isinstance(everything, TokenRollouts)
        truncated_N = everything.truncated_N
    chosen_N = torch.zeros_like(trained_N)
    chosen_N[chosen] = True
    group_reason = {
        p: admit(reward_N[prompt_N == p].numpy(), success_N[prompt_N == p].numpy()).reason
        for p in prompt_N.unique().tolist()
    }
    rows_of: dict[str, list[int]] = {}
    for row in (~trained_N).nonzero().flatten().tolist():
        reason: str = group_reason[int(prompt_N[row])]
        if reason == "mixed" and truncated_N is not None and truncated_N[row]:
            reason = "truncated"
        elif reason == "mixed":
            reason = "no_advantage" if chosen_N[row] else "down_sampled"
        rows_of.setdefault(reason, []).append(row)
    for reason, rows in rows_of.items():
        ledger.account("filtered", *everything.take(torch.tensor(rows)).size, reason=reason)
