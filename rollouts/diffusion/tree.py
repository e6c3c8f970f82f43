"""Lay out a batch of denoising trees: requested rows, their noise and their states.

States are numbered step by step; within a step by root, then down the tree, so that the states below
one state are neighbours. `span[step]` is the number of finished samples below a state of that step:
state g has the rows g * span .. (g + 1) * span - 1.

Axes: P prompts, N rollouts (finished samples), T denoising steps, S = T + 1 states of a chain,
M distinct states, U distinct states at one step.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rollouts.prompts import Prompt
from rollouts.step_plan import StepPlan


def requested_trees(
    prompts: Sequence[Prompt], budget_P: Any, seeds_N: Any, plan: StepPlan
) -> tuple[Tensor, Tensor]:
    """The prompt and the seed of every row, (N,) int64 each, checked.

    Raises:
        ValueError: if a column is malformed, a budget is no multiple of the leaves of a tree, nothing
            is asked for, or two samples of one prompt have one seed.
    """
    budget, seed_N = (torch.as_tensor(v).cpu() for v in (budget_P, seeds_N))
    for name, value in (("budget_P", budget), ("seeds_N", seed_N)):
        # An empty list has no integers to show its type by.
        whole = not (value.dtype.is_floating_point or value.dtype == torch.bool)
        if value.ndim != 1 or not (whole or value.numel() == 0):
            raise ValueError(
                f"{name} must be 1-d integers, got {value.dtype} of shape {tuple(value.shape)}"
            )
    if len(budget) != len(prompts):
        raise ValueError(f"budget_P has {len(budget)} entries for {len(prompts)} prompts")
    if (budget < 0).any() or budget.sum() == 0:
        raise ValueError(f"budget_P must be at least 0 and not all 0, got {budget.tolist()}")
    if (budget % plan.leaves_per_root).any():
        raise ValueError(
            f"budget_P counts leaves, which come in trees of {plan.leaves_per_root}: every budget "
            f"must be a multiple of {plan.leaves_per_root}, got {budget.tolist()}"
        )
    if len(seed_N) != budget.sum():
        raise ValueError(
            f"seeds_N has {len(seed_N)} entries, but budget_P asks for {int(budget.sum())} rollouts"
        )
    prompt_N = torch.arange(len(prompts)).repeat_interleave(budget.long())
    if len(torch.stack([prompt_N, seed_N.long()]).unique(dim=1).T) < len(seed_N):
        raise ValueError("the samples of one prompt must have different seeds, got one twice")
    return prompt_N, seed_N.long()


def segments(plan: StepPlan) -> list[tuple[int, int]]:
    """Windows that together are the whole chain, each a single split or without one."""
    splits = [step for step in range(plan.num_steps) if plan.children_of(step) > 1]
    cuts = sorted({0, plan.num_steps, *splits, *(step + 1 for step in splits)})
    return list(itertools.pairwise(cuts))


def row_columns(
    latents: Sequence[Tensor], logprobs: Sequence[Tensor | None], span: Sequence[int]
) -> dict[str, Tensor]:
    """`node_NS`, `logprob_NT` and `mask_NT` of the finished samples.

    Args:
        latents: S of them, (U, ...) states of each step.
        logprobs: S of them, (U,) float64 of the edge into each state; None where it drew no noise,
            and for the roots.
        span: S of them.
    """
    row_N = torch.arange(len(latents[-1]))
    starts = itertools.accumulate((len(x) for x in latents), initial=0)
    node_NS = torch.stack([start + row_N // s for start, s in zip(starts, span, strict=False)], 1)
    zero_N = torch.zeros(len(row_N), dtype=torch.float64)
    edges = list(zip(logprobs, span, strict=True))[1:]
    return {
        "node_NS": node_NS,
        "logprob_NT": torch.stack([zero_N if v is None else v[row_N // s] for v, s in edges], 1),
        "mask_NT": torch.tensor([v is not None for v, _ in edges]).repeat(len(row_N), 1),
    }


def tree_columns(
    latents: Sequence[Tensor], span: Sequence[int], prompt_N: Tensor
) -> dict[str, Tensor]:
    """`parent_M`, `step_M`, `leaves_M` and `prompt_M` of the tree; arguments as in `row_columns`."""
    columns: dict[str, list[Tensor]] = {
        "parent_M": [],
        "step_M": [],
        "leaves_M": [],
        "prompt_M": [],
    }
    before = 0
    for step, (x, leaves) in enumerate(zip(latents, span, strict=True)):
        state_U = torch.arange(len(x))
        if step == 0:
            parent_U = torch.full_like(state_U, -1)
        else:
            parent_U = before + state_U * leaves // span[step - 1]
            before += len(latents[step - 1])
        columns["parent_M"].append(parent_U)
        columns["step_M"].append(torch.full_like(state_U, step))
        columns["leaves_M"].append(torch.full_like(state_U, leaves))
        columns["prompt_M"].append(prompt_N[state_U * leaves])
    return {name: torch.cat(parts) for name, parts in columns.items()}


def seeded_noise(seeds: Sequence[int], step: int, shape: torch.Size) -> Tensor:
    """Standard normal noise of an edge, float32 on the CPU: row i is a function of (seeds[i], step)."""
    rows = [
        torch.randn(shape[1:], generator=seeded_generator(seed, "edge", step)) for seed in seeds
    ]
    return torch.stack(rows)


def seeded_generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """The generator of one row's noise at one step: BLAKE2b of (seed, purpose, step), 63 bits."""
    digest = hashlib.blake2b(f"{seed} {purpose} {step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
