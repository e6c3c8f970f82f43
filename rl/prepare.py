"""From the rows of a step to what its update needs: the weight of every decision, and over what.

Everything here is computed once per step, over the rows of all ranks, before any micro-batch is
cut. Axes: K rows, T decision steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rl import step_weights
from rl.importance import correction
from rl.recompute import ENTROPY, OLD, REFERENCE, recompute

if TYPE_CHECKING:
    from rl.line import Batch, Line


def prepare(line: Line, model: torch.nn.Module, batch: Batch) -> Batch:
    """Columns that only the policy before its update can tell, then the weights of decisions.

    The denominator counts what is left after tokens were selected, and weights as they were before
    the correction of the engine's mismatch, whose factors have mean near 1.
    """
    config, rollouts = line.config, batch.rollouts
    if not len(rollouts):
        return batch
    rollouts = recompute(line, model, rollouts, _columns(line))
    weight_NT = step_weights.token_weight(
        line.length_weight,
        batch.weight_K,
        rollouts.mask_NT,
        max_completion_length=config.max_completion_length,
    )
    metrics = dict(batch.metrics)
    if rollouts.entropy_NT is not None:
        decisions = rollouts.mask_NT.sum().clamp(min=1)
        metrics["entropy"] = float(rollouts.entropy_NT.sum() / decisions)
    if config.importance_correction != "none":
        assert rollouts.old_logprob_NT is not None
        level, mode = config.importance_correction.split("_")
        factor_NT, sums = correction(
            rollouts.old_logprob_NT,
            rollouts.logprob_NT,
            rollouts.mask_NT,
            level=level,
            mode=mode,
            cap=config.importance_cap,
            floor=config.importance_floor,
        )
        weight_NT = weight_NT * factor_NT
        metrics |= _of_correction(sums)
    return replace(batch, rollouts=replace(rollouts, weight_NT=weight_NT), metrics=metrics)


def _columns(line: Line) -> set[str]:
    config, columns = line.config, set()
    if config.importance_correction != "none" or config.old_logprobs == "trainer":
        columns.add(OLD)
    if config.beta:
        columns.add(REFERENCE)
    if line.needs_entropy:
        columns.add(ENTROPY)
    return columns


def _of_correction(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means of what the engine's and the trainer's log-probabilities differ by."""
    s = {name: float(value) for name, value in sums.items()}
    ratios, tokens = max(s["is_count"], 1.0), max(s["is_tokens"], 1.0)
    return {
        "importance/ratio_mean": s["is_ratio"] / ratios,
        "importance/ratio_max": s["is_ratio_max"],
        "importance/share_above_cap": s["is_above"] / ratios,
        "importance/share_below_floor": s["is_below"] / ratios,
        "importance/logprob_difference_mean": s["is_difference"] / tokens,
        "importance/logprob_difference_max": s["is_difference_max"],
    }
