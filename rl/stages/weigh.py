"""From groups to the rows that train: advantages on full groups, rows chosen, what each counts.

Axes: P prompts, N rollouts (flat rows), K rows kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rl.config.methods import successes, trains_everywhere
from rl.objective import weights as step_weights
from rl.stages import metrics
from rl.stages.draw import Groups, Wave, size
from rl.stages.line import Batch
from rl.stages.recompute import with_kl_penalty, without_unknown
from rollouts.batch import Rollouts, TokenRollouts
from samplers.proposal import admit

if TYPE_CHECKING:
    from rl.stages.line import Line


def weigh(line: Line, groups: Groups, waves: list[Wave], *, progress: float) -> Batch:
    """Advantages, then down-sampling, then objective weights; rows without signal leave, accounted for.

    Advantages are those of full groups, whatever is dropped afterwards; PODS alone computes them
    again on the rows it keeps. Truncated rows that are to be masked (`mask_truncated_completions`,
    the overlong filtering of DAPO, arXiv:2503.14476) take part in all of it and lose their tokens
    last, so that the others weigh what they weighed, as in TRL. Where entropies count, rows without
    signal stay.

    Args:
        line: the stages of the run.
        groups: what may train.
        waves: everything that was drawn, for the metrics.
        progress: share of the run that is done, in [0, 1]; schedules read it.
    """
    config = line.config
    everything, unknown = without_unknown(line, groups.rollouts)
    if config.reward_kl:
        everything = with_kl_penalty(line, everything)
    everything = with_credit(everything, line.advantage(everything, groups.prompts))
    chosen = line.down_sample(everything, progress) if len(everything) else torch.arange(0)
    rollouts = everything.take(chosen)
    if line.advantage_after is not None and len(rollouts):
        rollouts = replace(rollouts, advantage_N=line.advantage_after(rollouts))
    weight_K, denominator, original = _objective(line, groups, everything, chosen)
    assert rollouts.advantage_N is not None
    trains_K = has_signal(rollouts) & (weight_K != 0) | trains_everywhere(config)
    trains_K &= _trained_length(line, rollouts) > 0
    kept = rollouts.take(trains_K.nonzero().flatten())
    trained_N = torch.zeros(len(everything), dtype=torch.bool)
    trained_N[chosen[trains_K]] = True
    _account(line, everything, chosen, trained_N)
    return Batch(
        rollouts=kept,
        weight_K=weight_K[trains_K],
        denominator=denominator,
        original_denominator=original,
        prompts=groups.prompts,
        waves=waves,
        metrics=metrics.of_rollouts(waves, kept)
        | metrics.of_selection(config.down_sampling, everything, chosen)
        | ({"importance/unknown_logprobs": float(unknown)} if unknown else {}),
    )


def with_credit(rollouts: Rollouts, advantage: torch.Tensor) -> Rollouts:
    """`rollouts` with an advantage per row, or per decision, of which the row's is the mean."""
    if advantage.ndim == 1:
        return replace(rollouts, advantage_N=advantage)
    advantage_NT = torch.where(rollouts.mask_NT, advantage, 0.0)
    mean_N = advantage_NT.sum(1) / rollouts.length_N.clamp(min=1)
    return replace(rollouts, advantage_N=mean_N, advantage_NT=advantage_NT)


def has_signal(rollouts: Rollouts) -> torch.Tensor:
    """(N,) bool: rows of which some decision has an advantage."""
    if rollouts.advantage_NT is not None:
        return (rollouts.advantage_NT != 0).any(dim=1)
    assert rollouts.advantage_N is not None
    return rollouts.advantage_N != 0


def _objective(
    line: Line, groups: Groups, everything: Rollouts, chosen: torch.Tensor
) -> tuple[torch.Tensor, float, float]:
    """Weights of the chosen rows, what their weighted sum is divided by, and what that of all rows is.

    A prompt's weight is shared by its rows that reach the loss (`weight_rows: trained`), so that a
    prompt of which few rows were kept counts no less, or by all that were drawn (`drawn`).
    """
    if not len(chosen):
        return torch.zeros(0, dtype=torch.float64), 1.0, 1.0  # of empty sums
    of_all, original = _weights(line, groups, everything)
    of_chosen, denominator = _weights(line, groups, everything.take(chosen))
    if line.config.weight_rows == "drawn":
        return of_all[chosen], original, original
    return of_chosen, denominator, original


def _trained_length(line: Line, rollouts: Rollouts) -> torch.Tensor:
    """(N,) decisions of each row that the loss may see: none of a truncated one that is masked."""
    if not line.config.mask_truncated_completions:
        return rollouts.length_N
    assert isinstance(rollouts, TokenRollouts)
    return torch.where(rollouts.truncated_N, 0, rollouts.length_N)


def _weights(line: Line, groups: Groups, rollouts: Rollouts) -> tuple[torch.Tensor, float]:
    """The objective's weight of each of these rows, and their denominator.

    A masked row counts where rows or prompts are counted, and has no tokens where those are: TRL's
    denominators, of its losses `grpo` and `dr_grpo` on one side and `dapo` on the other.
    """
    num_prompts = len(groups.prompts)
    weight_N = step_weights.objective_weight(
        line.objective,
        successes(rollouts),
        rollouts.prompt_N,
        num_prompts=num_prompts,
        pass_rate_P=groups.pass_rate_P,
        floor=line.config.log_floor,
    )
    denominator = step_weights.denominator(
        line.objective,
        line.length_weight,
        num_prompts=num_prompts,
        num_rollouts=len(rollouts),
        row_weight_N=weight_N,
        length_N=_trained_length(line, rollouts),
    )
    weight_N = weight_N * groups.weight_P[rollouts.prompt_N]
    return weight_N, denominator * (num_prompts + groups.num_padded) / num_prompts


def _account(
    line: Line, everything: Rollouts, chosen: torch.Tensor, trained_N: torch.Tensor
) -> None:
    """Tell the ledger what became of every row that leaves here."""
    reward_N, success_N, prompt_N = everything.reward_N, everything.success_N, everything.prompt_N
    assert reward_N is not None and success_N is not None
    truncated_N = None
    if line.config.mask_truncated_completions:
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
        line.ledger.account("filtered", *size(everything.take(torch.tensor(rows))), reason=reason)
