"""Validate on a fixed, uniform, held-out set: greedy accuracy, and pass rate when sampling.

The seeds of validation rollouts depend on prompt and slot alone, so every evaluation of every run draws
with the same random numbers. Rollouts made here are never trained on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rl.policies.contract import Policy
from rl.stages.draw import Sampling
from rl.stages.metrics import of_functions, spread, with_logged
from rl.stages.records import Request, Scored
from rollouts.prompts import Prompt
from samplers.keys import rollout_seeds
from samplers.ledger import Ledger
from samplers.success import Success


def evaluate(
    sampling: Sampling,
    policy: Policy,
    prompts: list[Prompt],
    *,
    version: int,
    success_above: float | None = None,
    seen: Callable[[str, Scored], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Validation metrics, without prefix; what no rollout could be scored for is absent.

        greedy_accuracy   share of prompts whose greedy completion passes: its success is 1
                          (of a diffusion model deterministic_accuracy: no noise along the chain)
        pass_rate         mean over prompts of the mean success of their sampled completions
        reward            mean reward of the sampled completions, and reward_std
        rewards/NAME/mean and /std of each reward function by itself, over the sampled completions
        pass_rate_se      standard error of pass_rate over prompts
        rollouts          how many were made, of all validations, those that failed included

    Args:
        sampling: rolls out, and reads rewards as it does in training.
        policy: generates and rewards.
        prompts: the held-out prompts.
        version: optimizer steps the policy has taken.
        success_above: reward above which a completion is a success of 1. Default: rewards are read as
            those of training (`samplers.success`), which validation does not change.
        seen: called with the name and the rollouts of each validation; may give further metrics.
    """
    started = time.perf_counter()
    read = sampling.planner.success if success_above is None else Success(above=success_above).of
    apart = Ledger()  # nothing here is drawn to train
    metrics: dict[str, float] = {}
    made = 0
    rewards: dict[str, np.ndarray] = {}
    marks: dict[str, np.ndarray] = {}
    prompt_of: dict[str, np.ndarray] = {}
    for name, (budget, params) in policy.validations.items():
        request = Request(
            prompts=prompts,
            budget_P=np.full(len(prompts), budget, dtype=np.int64),
            seed_N=np.concatenate(
                [rollout_seeds(0, f"validation {p.key}", 0, np.arange(budget)) for p in prompts]
            ),
        )
        scored = sampling.roll_out(policy, request, params, version=version, ledger=apart)
        made += len(request.seed_N)
        rollouts = scored.rollouts
        if not len(rollouts):  # no reward could be had, which max_failed_share allows
            continue
        metrics |= seen(name, scored) if seen is not None else {}
        rewards[name], prompt_of[name] = scored.reward_N.numpy(), rollouts.prompt_N.numpy()
        marks[name] = scored.full_marks_N(sampling.reward_weights)
        if name == "sampled":
            metrics |= {
                "reward": float(scored.reward_N.mean()),
                "reward_std": spread(rewards[name]),
                "mean_length": float(rollouts.length_N.double().mean()),
            } | of_functions([scored])
            metrics = with_logged(metrics, [scored])
    if rewards and sampling.ranks.is_main and success_above is None:
        sampling.success_line.validated(np.concatenate(list(rewards.values())))
    # All at once: before training, rewards that are no fractions are compared with each other.
    success = _split(read, rewards, marks)
    for name, success_N in success.items():
        passing_N = success_N if name == "sampled" else (success_N == 1).astype(np.float64)
        share_P = _means(passing_N, prompt_of[name], num_prompts=len(prompts))
        if name != "sampled":
            metrics[f"{name}_accuracy"] = float(share_P.mean())
            continue
        metrics |= {
            "pass_rate": float(share_P.mean()),
            "pass_rate_se": float(share_P.std() / max(len(share_P) - 1, 1) ** 0.5),
        }
    metrics["rollouts"] = float(made)
    policy.rest()
    sampling.ledger.seconds("validation", time.perf_counter() - started)
    return metrics


def check_best_metric(args: Any, sets: Mapping[str, Any]) -> None:
    """Refuse a best model by a metric that sets with names do not have.

    Raises:
        ValueError: saying what to write.
    """
    best = (args.metric_for_best_model or "").removeprefix("eval_")
    named = [name for name in sets if name]
    reads_best = args.load_best_model_at_end or args.save_strategy == "best"
    if not named or not reads_best or any(best.startswith(f"{name}_") for name in named):
        return
    raise ValueError(
        f"metric_for_best_model is {best!r}, but eval_dataset has sets with names: write "
        f"metric_for_best_model: {named[0]}_pass_rate, or another metric of one of "
        f"{', '.join(named)}"
    )


def _split(
    read: Callable[..., np.ndarray], rewards: dict[str, np.ndarray], marks: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Successes of each validation's rewards, all of which are read together."""
    if not rewards:
        return {}
    success_N = read(
        np.concatenate(list(rewards.values())), full_marks_N=np.concatenate(list(marks.values()))
    )
    ends = np.cumsum([len(reward_N) for reward_N in rewards.values()])
    return dict(zip(rewards, np.split(success_N, ends[:-1]), strict=True))


def _means(value_N: np.ndarray, prompt_N: np.ndarray, *, num_prompts: int) -> np.ndarray:
    """Mean of each prompt that has a row, in the order of the prompts."""
    count_P = np.bincount(prompt_N, minlength=num_prompts)
    sum_P = np.bincount(prompt_N, weights=value_N, minlength=num_prompts)
    return sum_P[count_P > 0] / count_P[count_P > 0]
