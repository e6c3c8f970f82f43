"""Compute what is logged about a step: rewards before and after filtering, groups, the update.

Names that users of TRL know keep their meaning: reward, reward_std, frac_reward_zero_std,
rewards/{name}/mean and /std, completions/mean_length, completions/clipped_ratio, clip_ratio/*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from rl.stages.records import Batch, Scored, Visit
from rollouts.batch import DenoisingRollouts, Rollouts, TokenRollouts, concatenate
from rollouts.prompts import Prompt
from samplers.downsampling import selection_metrics
from samplers.planner import Planner


def of_rollouts(visits: list[Visit], kept: Rollouts) -> dict[str, float]:
    """Metrics of everything a step generated, and of what it trains on.

    Groups are the prompts of the step with at least one scored rollout. A constant group is all-pass
    if all its rows are successes of 1, else all-fail, as for the ledger's reasons of rows that were
    filtered. `reward_trained` is absent when nothing trains, and all of them when nothing was
    generated because the buffer held enough.
    """
    if not visits:
        return {}
    rollouts, rounds = drawn(visits), [scored for visit in visits for scored in visit.rounds]
    num_prompts = sum(len(visit.prompts) for visit in visits)
    reward_N, success_N, prompt_N = rollouts.reward_N, rollouts.success_N, rollouts.prompt_N
    assert reward_N is not None and success_N is not None
    rows = [prompt_N == p for p in prompt_N.unique().tolist()]
    constant = [group_N for group_N in rows if reward_N[group_N].max() == reward_N[group_N].min()]
    num_groups = max(len(rows), 1)
    num_all_pass = sum(bool((success_N[group_N] == 1).all()) for group_N in constant)
    length_N = rollouts.length_N.double()
    metrics = {
        "groups/mixed_share": 1 - len(constant) / num_groups,
        "groups/all_pass_share": num_all_pass / num_groups,
        "groups/all_fail_share": (len(constant) - num_all_pass) / num_groups,
        "frac_reward_zero_std": len(constant) / num_groups,
        "groups/unscored_prompts": float(num_prompts - len(rows)),
        "rows/trained_share": len(kept) / max(len(rollouts), 1),
        "rounds": float(len(rounds)),
    }
    if len(rollouts):
        metrics |= {
            "reward": reward_N.mean().item(),
            "reward_std": spread(reward_N.numpy()),
        }
    if len(rollouts) and isinstance(rollouts, TokenRollouts):
        metrics |= {
            "completions/mean_length": length_N.mean().item(),
            "completions/max_length": length_N.max().item(),
            "completions/clipped_ratio": rollouts.truncated_N.double().mean().item(),
        }
    if isinstance(rollouts, TokenRollouts) and rollouts.decided_N is not None and len(rollouts):
        metrics["verdicts/decided_share"] = rollouts.decided_N.double().mean().item()
    if len(kept):
        assert kept.reward_N is not None and kept.advantage_N is not None
        metrics |= {
            "reward_trained": kept.reward_N.mean().item(),
            "advantage_abs_mean": kept.advantage_N.abs().mean().item(),
        }
    if len(rollouts) and isinstance(rollouts, DenoisingRollouts):
        branches = [reward_N[rollouts.branch_N == b] for b in rollouts.branch_N.unique().tolist()]
        mixed = [bool(branch.max() > branch.min()) for branch in branches]
        metrics["branches/informative_share"] = float(np.mean(mixed))
    if len(kept) and isinstance(kept, TokenRollouts):
        metrics["completions/mean_length_trained"] = kept.length_N.double().mean().item()
    return with_logged(metrics | of_starts(visits) | of_functions(rounds), rounds)


def of_starts(visits: list[Visit]) -> dict[str, float]:
    """Metrics of groups with a start beside those without; nothing where starts are off.

    A mean over nothing is left out.
    """
    first = [visit.proposals[0] for visit in visits]
    if any(proposal.starts is None for proposal in first):
        return {}
    rollouts, start_P = drawn(visits), np.concatenate([proposal.start_P for proposal in first])
    assert rollouts.reward_N is not None
    reward_N, started_N = rollouts.reward_N.numpy(), start_P[rollouts.prompt_N.numpy()] > 0
    metrics = {"starts/share": float((start_P > 0).mean())}
    for name, values in (
        ("starts/length", start_P[start_P > 0]),
        ("starts/reward", reward_N[started_N]),
        ("starts/reward_without", reward_N[~started_N]),
    ):
        metrics |= {name: float(values.mean())} if len(values) else {}
    return metrics


def of_functions(rounds: Sequence[Scored]) -> dict[str, float]:
    """Mean and std of each reward function by itself, before its weight, over rows it applies to.

    A function that applied to no row is absent.
    """
    metrics: dict[str, float] = {}
    for name in rounds[0].reward_by_function:
        values = [v for s in rounds for v in s.reward_by_function[name] if v is not None]
        if values:
            metrics[f"rewards/{name}/mean"] = float(np.mean(values))
            metrics[f"rewards/{name}/std"] = spread(np.array(values, dtype=np.float64))
    return metrics


def with_logged(metrics: dict[str, float], rounds: Sequence[Scored]) -> dict[str, float]:
    """`metrics` and the mean of what rewards gave to `log_metric`, over calls and processes.

    A name that is taken, such as "reward", is written logged/NAME.
    """
    for name in sorted({name for scored in rounds for name in scored.logged_metrics}):
        values = [v for scored in rounds for v in scored.logged_metrics.get(name, [])]
        metrics[name if name not in metrics else f"logged/{name}"] = float(np.mean(values))
    return metrics


def spread(value_N: np.ndarray) -> float:
    """Unbiased std, as TRL logs it; 0 of one number. Large numbers do not overflow."""
    scale = float(np.abs(value_N).max(initial=0.0))
    if len(value_N) < 2 or scale == 0:
        return 0.0
    return float((value_N / scale).std(ddof=1) * scale)


def drawn(visits: list[Visit]) -> Rollouts:
    """Every scored rollout of the visits as one batch; prompts count on from visit to visit."""
    of_visits = [concatenate([scored.rollouts for scored in visit.rounds]) for visit in visits]
    sizes = [len(visit.prompts) for visit in visits]
    return concatenate(of_visits, offsets=np.cumsum([0, *sizes[:-1]]).tolist())


def of_selection(method: str, everything: Rollouts, chosen: Tensor) -> dict[str, float]:
    """What a down-sampler did to the groups; nothing where there was none."""
    if method == "none" or not len(everything):
        return {}
    assert everything.reward_N is not None and everything.advantage_N is not None
    return selection_metrics(
        chosen.numpy(),
        reward_N=everything.reward_N.numpy(),
        advantage_N=everything.advantage_N.numpy(),
        prompt_N=everything.prompt_N.numpy(),
        length_N=everything.length_N.numpy(),
    )


def of_update(sums: dict[str, float]) -> dict[str, float]:
    """Metrics of an update from the losses' sums over all decisions and ranks; empty without any."""
    tokens = sums.get("tokens", 0.0)
    if not tokens:
        return {}
    metrics = {"ratio/mean": sums["ratio"] / tokens, "kl_old": sums["kl_old"] / tokens}
    for name in ("low", "high", "dual"):
        if f"clipped_{name}" in sums:
            metrics[f"clip_ratio/{name}"] = sums[f"clipped_{name}"] / tokens
    for name, metric in (
        ("capped", "clip_ratio/capped"),
        ("phi", "vespo/phi_mean"),
        ("heterogeneity", "hapo/h_mean"),
        ("redistributed", "hapo/redistributed_share"),
    ):
        if name in sums:
            metrics[metric] = sums[name] / tokens
    if sums.get("mismatch_count"):
        metrics["mismatch"] = sums["mismatch"] / sums["mismatch_count"]
    if sums.get("entropy_tokens"):
        metrics["entropy"] = sums["entropy"] / sums["entropy_tokens"]
    if sums.get("kl_tokens"):
        metrics["kl"] = sums["kl_k3"] / sums["kl_tokens"]
        metrics["kl_k1"] = sums["kl_k1"] / sums["kl_tokens"]
    return metrics


def mismatch(
    logprob_NT: Tensor, rollouts: Rollouts, fresh_N: Tensor | None = None
) -> dict[str, Tensor]:
    """Sum and count of |log-probability before any update - the one recorded|, where there is weight.

    Args:
        logprob_NT: (N, T) of the trainer.
        rollouts: the rows, with weights.
        fresh_N: (N,) bool, rows of the policy at hand. None: all are.
    """
    assert rollouts.weight_NT is not None
    active_NT = rollouts.weight_NT != 0
    if fresh_N is not None:
        active_NT = active_NT & fresh_N[:, None]
    difference_NT = (logprob_NT.detach() - rollouts.logprob_NT).abs()
    return {"mismatch": difference_NT[active_NT].sum(), "mismatch_count": active_NT.sum()}


def add(sums: dict[str, float], statistics: dict[str, Tensor]) -> None:
    """Add a micro-batch's sums to those of the step, in place."""
    for name, value in statistics.items():
        sums[name] = sums.get(name, 0.0) + float(value)


def require_finite(
    loss: Tensor, logprob_NT: Tensor, rollouts: Rollouts, prompts: list[Prompt]
) -> None:
    """Stop before a NaN reaches the weights, naming the prompt.

    Raises:
        FloatingPointError: if the loss or a log-probability under the mask is NaN or infinite.
    """
    finite_N = (logprob_NT.detach().isfinite() | ~rollouts.mask_NT).all(dim=1)
    if finite_N.all() and loss.detach().isfinite():
        return
    rows = (~finite_N).nonzero().flatten().tolist() or range(len(rollouts))
    keys = sorted({prompts[int(rollouts.prompt_N[row])].key for row in rows})
    raise FloatingPointError(
        f"the loss or a log-probability is NaN or infinite, in rollouts of prompt {keys[0]}"
        f"{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}; lower learning_rate or "
        "max_grad_norm, and check the model's weights and dtype"
    )


def record_of(planner: Planner, batch: Batch, *, step: int) -> dict[str, Any]:
    """A step's decisions as one JSON line of the run folder: prompts, budgets, reward sums."""
    totals: dict[int, float] = {}
    proposals = [proposal for visit in batch.visits for proposal in visit.proposals]
    first = [visit.proposals[0] for visit in batch.visits]
    keys = [prompt.key for visit in batch.visits for prompt in visit.prompts]
    if batch.visits:
        rollouts = drawn(batch.visits)
        assert rollouts.reward_N is not None
        for p, reward in zip(rollouts.prompt_N.tolist(), rollouts.reward_N.tolist(), strict=True):
            totals[p] = totals.get(p, 0.0) + reward
    budgets = [
        budget
        for visit in batch.visits
        for budget in np.sum([q.budget_P for q in visit.proposals], axis=0).tolist()
    ]
    mean_D = planner.posterior.mean()
    return {
        "step": step,
        "prompts": keys,
        "draws": [draw for proposal in first for draw in proposal.draw_P.tolist()],
        "budgets": budgets,
        "reward_sums": [totals.get(p, 0.0) for p in range(len(keys))],
        "pass_rates_before": [round(p, 6) for q in first for p in q.pass_rate_P.tolist()],
        "seed_checksum": int(
            np.bitwise_xor.reduce(
                np.concatenate([p.seed_N for p in proposals] or [np.zeros(1, int)])
            )
        ),
        "failures": [failure for scored in batch.rounds for failure in scored.failures],
        "unrewarded": sum(len(s.unrewarded) for s in batch.rounds if s.unrewarded is not None),
        "reliability": {
            name: [[round(value, 4) for value in decile] for decile in table]
            for name, table in planner.reliability().items()
        },
        "posterior_histogram": np.histogram(mean_D, bins=20, range=(0, 1))[0].tolist(),
    }


def mean_metrics(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the steps of one log line; absent values are left out."""
    names = {name: None for row in rows for name in row}
    return {n: float(np.mean([row[n] for row in rows if n in row])) for n in names}
