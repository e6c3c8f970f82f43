"""Compute the weight of every token (or denoising step) and the loss's denominators.

Everything here is computed once per step, over the rows of all ranks, before any micro-batch is
cut. Axes: K rows, T decision steps.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rl.config.methods import Settings
from rl.objective import hapo
from rl.objective import weights as step_weights
from rl.objective.importance import DEFAULT_CAP, correction
from rl.objective.token_selection import above_quantile
from rl.policies.contract import Policy
from rl.ranks import Ranks
from rl.stages.objective import PLACE, Objective, has_signal
from rl.stages.recompute import recompute
from rl.stages.records import Batch
from rollouts.batch import Rollouts
from samplers.ledger import Ledger


def prepare(
    batch: Batch,
    objective: Objective,
    policy: Policy,
    ranks: Ranks,
    model: torch.nn.Module,
    *,
    progress: float,
    ledger: Ledger,
) -> Batch:
    """Score the rows with the policy before its update, then weigh their decisions.

    The denominators count what is left after tokens were selected, and weights as they were before
    the correction of the engine's mismatch, whose factors have mean near 1. The denominator of the loss
    also counts the rows without signal, which have left; that of the KL counts the weights of the
    decisions that train and nothing else, so that beta means the same however many groups are mixed.

    Args:
        batch: the rows of the step.
        objective: says which columns and weights it needs.
        policy: scores the rows, and says which decisions may train.
        ranks: the processes.
        model: as it is trained, wrapped.
        progress: share of the run that is done, in [0, 1]; schedules read it.
        ledger: accounts for tokens that train and that leave.
    """
    config, rollouts = objective.config, batch.rollouts
    if not len(rollouts):
        return batch
    rollouts = recompute(policy, ranks, model, rollouts, objective.columns - {PLACE})
    decision_NT = policy.trainable(rollouts)
    weight_NT = step_weights.token_weight(
        config.length_weight or "",
        batch.weight_K,
        decision_NT != 0,
        max_completion_length=config.max_completion_length,
    )
    if decision_NT.dtype != torch.bool:
        weight_NT = weight_NT * decision_NT
    metrics, denominator = dict(batch.metrics), batch.denominator
    if rollouts.entropy_NT is not None:
        decisions = rollouts.mask_NT.sum().clamp(min=1)
        metrics["entropy"] = float(rollouts.entropy_NT.sum() / decisions)
    if PLACE in objective.columns:
        assert rollouts.entropy_NT is not None
        columns = (rollouts.entropy_NT, rollouts.mask_NT)
        pivot = hapo.pivot(*columns, quantile=config.hapo_quantile)
        policy.observe_entropies(pivot)
        signed = config.hapo_sign == "signed"
        h_NT = hapo.heterogeneity(*columns, pivot, signed=signed)
        rollouts = replace(rollouts, heterogeneity_NT=h_NT)
    if objective.select_tokens is not None:
        kept_NT = objective.select_tokens(rollouts, progress)
        weight_NT, denominator = step_weights.after_selection(
            config.token_denominator,
            weight_NT,
            rollouts.mask_NT,
            kept_NT,
            denominator=denominator,
            original_denominator=batch.original_denominator,
        )
        metrics["select/token_share"] = float(kept_NT.sum() / rollouts.mask_NT.sum())
    # The KL is of the policies and not of the rollouts, so nothing below changes its weights.
    kl_weight_NT, kept_NT = weight_NT, rollouts.mask_NT
    if objective.select_tokens is not None:
        kept_NT = weight_NT != 0
    if config.top_entropy_quantile < 1:
        assert rollouts.entropy_NT is not None
        quantile = 1 - config.top_entropy_quantile
        kept_NT = above_quantile(rollouts.entropy_NT, rollouts.mask_NT, quantile=quantile)
        weight_NT = torch.where(kept_NT, weight_NT, 0.0)
        metrics["select/token_share"] = float(kept_NT.sum() / rollouts.mask_NT.sum())
    if config.importance_correction != "none":
        factor_NT, of_factors = _correction(config, rollouts)
        weight_NT, metrics = weight_NT * factor_NT, metrics | of_factors
    rollouts = replace(rollouts, weight_NT=weight_NT)
    active_NT = (weight_NT != 0) & has_signal(rollouts)[:, None]
    if objective.kl_function is not None and kl_weight_NT is not weight_NT:
        rollouts = replace(rollouts, kl_weight_NT=kl_weight_NT)
    if objective.kl_function is not None:
        covered_NT = kl_weight_NT != 0
        everywhere = config.kl_rows == "all"
        active_NT |= covered_NT if everywhere else covered_NT & has_signal(rollouts)[:, None]
    if config.entropy_coef:
        rollouts = replace(rollouts, bonus_NT=kept_NT)
        active_NT |= kept_NT
    trains_K = active_NT.any(dim=1)
    _account(ledger, rollouts, trains_K, active_NT)
    return replace(
        batch,
        rollouts=rollouts.take(trains_K.nonzero().flatten()),
        denominator=denominator,
        kl_denominator=float(kl_weight_NT[trains_K].sum()) or 1.0,  # of an empty sum
        bonus_denominator=float(kept_NT[trains_K].sum()) or 1.0,
        metrics=metrics,
    )


def _account(
    ledger: Ledger, rollouts: Rollouts, trains_K: torch.Tensor, active_NT: torch.Tensor
) -> None:
    """Enter rows and tokens that train; a row is filtered if all of its tokens left."""
    trained = int(active_NT.sum())
    num_rows, num_tokens = rollouts.size
    num_trained = int(trains_K.sum())
    ledger.account("trained", num_trained, trained)
    ledger.account(
        "filtered", num_rows - num_trained, num_tokens - trained, reason="tokens_not_selected"
    )


def _correction(config: Settings, rollouts: Rollouts) -> tuple[torch.Tensor, dict[str, float]]:
    """Factors of the weights, and metrics of how much engine and trainer differ."""
    assert rollouts.old_logprob_NT is not None and config.importance_correction is not None
    level, mode = config.importance_correction.split("_")
    factor_NT, sums = correction(
        rollouts.old_logprob_NT,
        rollouts.logprob_NT,
        rollouts.mask_NT,
        level=level,
        mode=mode,
        cap=DEFAULT_CAP if config.importance_cap is None else config.importance_cap,
        floor=config.importance_floor,
    )
    s = {name: float(value) for name, value in sums.items()}
    ratios, tokens = max(s["is_count"], 1.0), max(s["is_tokens"], 1.0)
    return factor_NT, {
        "importance/ratio_mean": s["is_ratio"] / ratios,
        "importance/ratio_max": s["is_ratio_max"],
        "importance/share_above_cap": s["is_above"] / ratios,
        "importance/share_below_floor": s["is_below"] / ratios,
        "importance/logprob_difference_mean": s["is_difference"] / tokens,
        "importance/logprob_difference_max": s["is_difference_max"],
    }
