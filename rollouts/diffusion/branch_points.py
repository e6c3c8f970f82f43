"""Measure where a denoising chain should branch: how much the reward still varies after each step.

Branching late shares evaluations, but siblings that part late look alike. How late is too late is a
property of the model and the reward, so it is measured. Axes: P prompts, N rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rollouts.diffusion.engine import DiffusersEngine
from rollouts.prompts import Prompt
from rollouts.rewards.image import ImageReward, score_images
from rollouts.step_plan import StepPlan


@dataclass(frozen=True, kw_only=True)
class BranchPoint:
    """What a probe found at one edge."""

    step: int
    """The edge t0 at which the chains branched."""
    within_share: float | None
    """w in [0, 1]: share of the reward's variance at a fixed prompt that lies within branches. None
    if all rewards of every prompt were equal."""
    within_share_se: float | None
    """Standard error of w over prompts, of `share_errors`. None without w, or for too few prompts."""
    informative_share: float
    """Branches whose rewards are not all equal. The others carry no gradient."""
    informative_share_se: float | None
    """Likewise, of the informative share."""
    effective_count: float | None
    """Independent samples that the leaves of one prompt are worth for its mean reward:
    n / (w + k (1 - w)). None without w."""
    best_children: float | None
    """See the function of this name. None without w."""
    evaluations: int
    """Denoiser evaluations spent on this point, in rows."""


def probe_branch_points(
    engine: DiffusersEngine,
    prompts: Sequence[Prompt],
    reward: ImageReward,
    *,
    points: Sequence[int],
    children: int,
    branches: int,
    params: StepPlan,
    seed: int = 0,
) -> list[BranchPoint]:
    """Branch at several edges in turn, and see how the reward varies within and between branches.

    All points start from the same noise, so that they are compared on the same chains. See
    `branch_statistics` for the estimators.

    Args:
        engine: generates and decodes.
        prompts: P prompts; w is pooled over them.
        reward: see `rollouts/rewards/image.py`; the metadata are the prompts' columns.
        points: edges t0, each of which must draw noise under `params`.
        children: k >= 2 samples of each branch.
        branches: branches of each prompt at each point, at least 2.
        params: the plan but for its splits, which it must not have.
        seed: of the probe.

    Returns:
        One entry for each of `points`, in their order.

    Raises:
        ValueError: if there are too few branches or children, or the plan branches already.
        RewardError: if the reward fails, or gives something else than one finite number an image.
    """
    if children < 2 or branches < 2:
        raise ValueError(
            f"variance within and between branches needs at least 2 children and 2 branches, got "
            f"children={children} and branches={branches}"
        )
    if params.first_split is not None:
        raise ValueError(f"params must not branch, got splits={params.splits}")
    budget_P = [branches * children] * len(prompts)
    generator = torch.Generator().manual_seed(seed)
    seeds_N = torch.randint(2**62, (sum(budget_P),), generator=generator)
    found = []
    for step in points:
        before = engine.evaluations
        rollouts = engine.generate(
            prompts, budget_P, seeds_N=seeds_N, params=replace(params, splits=((step, children),))
        )
        of_row = [prompts[p] for p in rollouts.prompt_N.tolist()]
        result, _ = score_images(
            [reward],
            engine.decode(rollouts),
            [str(p.prompt) for p in of_row],
            [dict(p.columns) for p in of_row],
        )
        share, informative = branch_statistics(
            result.reward_N, rollouts.prompt_N, rollouts.branch_N
        )
        share_se, informative_se = share_errors(
            result.reward_N, rollouts.prompt_N, rollouts.branch_N
        )
        num_leaves = branches * children
        found.append(
            BranchPoint(
                step=step,
                within_share=share,
                within_share_se=share_se,
                informative_share=informative,
                informative_share_se=informative_se,
                effective_count=(
                    None if share is None else num_leaves / (share + children * (1 - share))
                ),
                best_children=(
                    None if share is None else best_children(share, step, params.num_steps)
                ),
                evaluations=engine.evaluations - before,
            )
        )
    return found


def branch_statistics(
    reward_N: Tensor, prompt_N: Tensor, branch_N: Tensor
) -> tuple[float | None, float]:
    """Share of variance within branches, and share of branches that are informative.

        within  = sum over branches of squared deviations from the branch's mean / (N - B)
        between = (mean square between branches of a prompt - within) / k0,   at least 0
        w       = within / (within + between)

    with B branches and k0 = (N - sum_p sum_b k_b^2 / n_p) / (B - P) rows of a branch, the size if all
    are equal: the one-way random-effects estimators of variance components, pooled over prompts;
    both are unbiased but for the floor at 0.

    Args:
        reward_N: (N,) finite rewards.
        prompt_N: (N,) int64.
        branch_N: (N,) int64; a branch belongs to one prompt. Sizes may differ.

    Returns:
        w in [0, 1], None where no two rewards of a prompt differ; and the share of branches of at
        least two rows whose rewards are not all equal.

    Raises:
        ValueError: if a reward is not finite, or no branch has two rows, or no prompt two branches.
    """
    if not reward_N.isfinite().all():
        rows = (~reward_N.isfinite()).nonzero().flatten().tolist()
        raise ValueError(f"rewards must be finite, but those of rows {rows} are not")
    value_N = reward_N.double()
    _, branch_N = branch_N.unique(return_inverse=True)
    _, group_N = prompt_N.unique(return_inverse=True)
    size_B, size_P = branch_N.bincount(), group_N.bincount()
    num_rows, num_branches, num_prompts = len(value_N), len(size_B), len(size_P)
    if num_rows == num_branches or num_branches == num_prompts:
        raise ValueError(
            f"w needs branches of several rows and prompts of several branches, got {num_rows} rows "
            f"in {num_branches} branches of {num_prompts} prompts"
        )
    mean_N = (_sums(value_N, branch_N) / size_B)[branch_N]
    grand_N = (_sums(value_N, group_N) / size_P)[group_N]
    lowest_B = torch.full((num_branches,), math.inf, dtype=torch.float64)
    lowest_B = lowest_B.scatter_reduce(0, branch_N, value_N, "amin")
    highest_B = torch.full_like(lowest_B, -math.inf).scatter_reduce(0, branch_N, value_N, "amax")
    differs_B = highest_B > lowest_B
    informative = differs_B.sum().item() / (size_B > 1).sum().item()

    # Equal rewards must not differ from their mean by rounding.
    mean_N = torch.where(differs_B[branch_N], mean_N, value_N)
    within = (value_N - mean_N).square().sum().item() / (num_rows - num_branches)
    between_square = (mean_N - grand_N).square().sum().item() / (num_branches - num_prompts)
    rows_of_branch = num_rows - (size_B[branch_N] / size_P[group_N]).sum().item()
    rows_of_branch /= num_branches - num_prompts
    between = max(0.0, (between_square - within) / rows_of_branch)
    varied = any(
        value_N[group_N == p].max() > value_N[group_N == p].min() for p in range(num_prompts)
    )
    return (within / (within + between) if varied else None), informative


def share_errors(
    reward_N: Tensor, prompt_N: Tensor, branch_N: Tensor
) -> tuple[float | None, float | None]:
    """Standard errors of the two shares of `branch_statistics`, by leaving out one group at a time.

        se^2 = (G - 1) / G * sum_g (value without g - mean of these)^2

    with the G prompts as groups: they are what was drawn, and their branches are alike. With one
    prompt the groups are its branches, and the error is of this prompt's shares alone. (Jackknife:
    Tukey, 1958.)

    Args, Raises: as `branch_statistics`.

    Returns:
        Of w and of the informative share. None where there are too few groups, or w is None without
        one of them.
    """
    group_N = prompt_N if len(prompt_N.unique()) > 1 else branch_N
    groups = group_N.unique()
    shares, informative = [], []
    for group in groups:
        rest_N = group_N != group
        try:
            share, differs = branch_statistics(reward_N[rest_N], prompt_N[rest_N], branch_N[rest_N])
        except ValueError:  # too few are left to say anything
            return None, None
        shares.append(share)
        informative.append(differs)
    known = [share for share in shares if share is not None]
    return (_jackknife(known) if len(known) == len(groups) else None), _jackknife(informative)


def _jackknife(values: Sequence[float]) -> float:
    value_G = torch.tensor(values, dtype=torch.float64)
    return math.sqrt((len(value_G) - 1) * value_G.var(correction=0).item())


def _sums(value_N: Tensor, index_N: Tensor) -> Tensor:
    zero = torch.zeros(int(index_N.max()) + 1, dtype=torch.float64)
    return zero.index_add(0, index_N, value_N)


def best_children(share: float, step: int, num_steps: int) -> float:
    """Children per branch that measure a prompt's mean reward best per evaluation.

        k = sqrt(w / (1 - w) * (t0 + 1) / (T - t0 - 1)),   at least 1

    minimises (w / k + 1 - w) ((t0 + 1) + k (T - t0 - 1)), the variance of a branch's mean times its
    evaluations; derived here, not from a paper. inf at w = 1 and at the last edge, where a child
    costs nothing. It says nothing about the gradient.

    Args:
        share: w, of `branch_statistics`.
        step: t0.
        num_steps: T.
    """
    after = num_steps - step - 1
    if share == 1 or after == 0:
        return math.inf
    return max(1.0, math.sqrt(share / (1 - share) * (step + 1) / after))
