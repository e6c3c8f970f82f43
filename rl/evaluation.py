"""Validation on a fixed, uniform, held-out set: greedy accuracy, and pass rate when sampling.

The seeds of validation rollouts depend on prompt and slot alone, so every evaluation of every run draws
with the same random numbers. Rollouts made here are counted as validation, never trained on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rl.roll_out import Request, Scored, roll_out
from rollouts.prompts import Prompt
from samplers.keys import rollout_seeds
from samplers.ledger import Ledger

if TYPE_CHECKING:
    from rl.line import Line


def evaluate(
    line: Line,
    prompts: list[Prompt],
    *,
    version: int,
    success_above: float | None = None,
    seen: Callable[[str, Scored], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Validation metrics, without prefix; what no rollout could be scored for is absent.

        greedy_accuracy   share of prompts whose greedy completion has reward > success_above
                          (of a diffusion model deterministic_accuracy: no noise along the chain)
        pass_rate         mean over prompts of the share of sampled completions that do
        reward            mean reward of the sampled completions
        pass_rate_se      standard error of pass_rate over prompts
        rollouts          how many were made, of all validations, those that failed included

    Args:
        prompts: the held-out prompts.
        version: optimizer steps the policy has taken.
        success_above: reward above which a completion is right. Default: that of the settings, else
            0.5, which serves 0/1 rewards.
        seen: called with the name and the rollouts of each validation; may give further metrics.
    """
    started = time.perf_counter()
    if success_above is None:
        success_above = line.config.success_above
    threshold = 0.5 if success_above is None else success_above
    training, line = line.ledger, replace(line, ledger=Ledger())  # nothing here is drawn to train
    metrics: dict[str, float] = {}
    made = 0
    for name, (budget, params) in line.validations.items():
        request = Request(
            prompts=prompts,
            budget_P=np.full(len(prompts), budget, dtype=np.int64),
            seed_N=np.concatenate(
                [rollout_seeds(0, f"validation {p.key}", 0, np.arange(budget)) for p in prompts]
            ),
        )
        scored = roll_out(line, request, params, version=version)
        made += len(request.seed_N)
        rollouts = scored.rollouts
        if not len(rollouts):  # no reward could be had, which max_failed_share allows
            continue
        metrics |= seen(name, scored) if seen is not None else {}
        success_N = (scored.reward_N > threshold).double().numpy()
        prompt_N = rollouts.prompt_N.numpy()
        count_P = np.bincount(prompt_N, minlength=len(prompts))
        sum_P = np.bincount(prompt_N, weights=success_N, minlength=len(prompts))
        share_P = sum_P[count_P > 0] / count_P[count_P > 0]
        if name != "sampled":
            metrics[f"{name}_accuracy"] = float(share_P.mean())
            continue
        metrics |= {
            "pass_rate": float(share_P.mean()),
            "pass_rate_se": float(share_P.std() / max(len(share_P) - 1, 1) ** 0.5),
            "reward": float(scored.reward_N.mean()),
            "mean_length": float(rollouts.length_N.double().mean()),
        }
    metrics["rollouts"] = float(made)
    line.rest()
    training.seconds("validation", time.perf_counter() - started)
    return metrics
