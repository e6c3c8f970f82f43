"""From the rows of a step to what its update needs: the weight of every decision, and over what.

Everything here is computed once per step, over the rows of all ranks, before any micro-batch is
cut. Axes: K rows, T decision steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rl.objective import hapo
from rl.objective import weights as step_weights
from rl.objective.importance import DEFAULT_CAP, correction
from rl.objective.token_selection import above_quantile
from rl.stages.draw import size
from rl.stages.recompute import ENTROPY, OLD, REFERENCE, recompute
from rl.stages.weigh import has_signal

if TYPE_CHECKING:
    from rl.stages.line import Batch, Line
    from rollouts.batch import Rollouts


def prepare(line: Line, model: torch.nn.Module, batch: Batch) -> Batch:
    """Columns that only the policy before its update can tell, then the weights of decisions.

    The denominators count what is left after tokens were selected, and weights as they were before
    the correction of the engine's mismatch, whose factors have mean near 1. That of the loss also has
    the rows without signal, which have left; the KL's own has the weight of the decisions that train
    and nothing else, so that beta means the same however many groups are mixed.
    """
    config, rollouts = line.config, batch.rollouts
    if not len(rollouts):
        return batch
    rollouts = recompute(line, model, rollouts, _columns(line))
    decision_NT = line.decisions(rollouts)
    weight_NT = step_weights.token_weight(
        line.length_weight,
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
    if _uses_pivot(line):
        assert rollouts.entropy_NT is not None
        columns = (rollouts.entropy_NT, rollouts.mask_NT)
        line.memory.pivot = hapo.pivot(*columns, quantile=config.hapo_quantile)
        signed = config.hapo_sign == "signed"
        h_NT = hapo.heterogeneity(*columns, line.memory.pivot, signed=signed)
        rollouts = replace(rollouts, heterogeneity_NT=h_NT)
    if config.token_selection != "none":
        kept_NT = line.select_tokens(rollouts, line.progress(line.ledger.step or 0))
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
    if config.token_selection != "none":
        kept_NT = weight_NT != 0
    if config.top_entropy_quantile < 1:
        assert rollouts.entropy_NT is not None
        quantile = 1 - config.top_entropy_quantile
        kept_NT = above_quantile(rollouts.entropy_NT, rollouts.mask_NT, quantile=quantile)
        weight_NT = torch.where(kept_NT, weight_NT, 0.0)
        metrics["select/token_share"] = float(kept_NT.sum() / rollouts.mask_NT.sum())
    if config.importance_correction != "none":
        factor_NT, of_factors = _correction(line, rollouts)
        weight_NT, metrics = weight_NT * factor_NT, metrics | of_factors
    rollouts = replace(rollouts, weight_NT=weight_NT)
    active_NT = (weight_NT != 0) & has_signal(rollouts)[:, None]
    if line.kl is not None and kl_weight_NT is not weight_NT:
        rollouts = replace(rollouts, kl_weight_NT=kl_weight_NT)
    if line.kl is not None:
        covered_NT = kl_weight_NT != 0
        everywhere = config.kl_rows == "all"
        active_NT |= covered_NT if everywhere else covered_NT & has_signal(rollouts)[:, None]
    if config.entropy_coef:
        rollouts = replace(rollouts, bonus_NT=kept_NT)
        active_NT |= kept_NT
    trains_K = active_NT.any(dim=1)
    _account(line, rollouts, trains_K, active_NT)
    return replace(
        batch,
        rollouts=rollouts.take(trains_K.nonzero().flatten()),
        denominator=denominator,
        kl_denominator=float(kl_weight_NT[trains_K].sum()) or 1.0,  # of an empty sum
        bonus_denominator=float(kept_NT[trains_K].sum()) or 1.0,
        metrics=metrics,
    )


def _account(
    line: Line, rollouts: Rollouts, trains_K: torch.Tensor, active_NT: torch.Tensor
) -> None:
    """Rows that train, and of their tokens those that do; a row all of whose tokens left is filtered."""
    trained = int(active_NT.sum())
    num_rows, num_tokens = size(rollouts)
    num_trained = int(trains_K.sum())
    line.ledger.account("trained", num_trained, trained)
    line.ledger.account(
        "filtered", num_rows - num_trained, num_tokens - trained, reason="tokens_not_selected"
    )


def _uses_pivot(line: Line) -> bool:
    """Whether this step's loss or the next step's temperature goes by entropies of this step."""
    return line.config.loss == "hapo" or line.config.adaptive_temperature_tau > 0


def _columns(line: Line) -> set[str]:
    config, columns = line.config, set()
    if config.importance_correction != "none" or config.old_logprobs == "trainer":
        columns.add(OLD)
    if config.beta and line.reference is not None:  # a diffusion model's KL comes with its scores
        columns.add(REFERENCE)
    by_entropy = config.token_selection != "none" or config.top_entropy_quantile < 1
    if by_entropy or _uses_pivot(line):
        columns.add(ENTROPY)
    return columns


def _correction(line: Line, rollouts: Rollouts) -> tuple[torch.Tensor, dict[str, float]]:
    """Factors of the weights, and means of what engine and trainer differ by."""
    config = line.config
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
