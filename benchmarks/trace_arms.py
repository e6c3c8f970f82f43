"""Define the arms of `benchmarks/trace.py`: what selects, allocates, stops and down-samples.

Axes: N rollouts of a step, K rows kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.trace_policy import FloatArray, Generator, IntArray, Policy
from samplers import allocation, downsampling, stopping
from samplers.keys import stable_hash
from samplers.posterior import BetaPosterior
from samplers.selection import (
    PosteriorMeanSelector,
    Selector,
    ThompsonSelector,
    UniformSelector,
    mopps,
)
from samplers.selection.bands import OnlineBandSelector, StaticBandSelector
from samplers.selection.diverse import DiverseSelector

# As `rl.objective.advantages` without torch; tests/benchmarks/test_trace.py keeps them equal.


def group_statistics(
    reward_N: FloatArray, prompt_N: IntArray
) -> tuple[IntArray, FloatArray, NDArray[np.bool_]]:
    """Size, mean and whether max > min of each row's group, one entry per row."""
    size_P = np.bincount(prompt_N)
    sum_P = np.bincount(prompt_N, weights=reward_N)
    low_P, high_P = np.full(len(size_P), np.inf), np.full(len(size_P), -np.inf)
    np.minimum.at(low_P, prompt_N, reward_N)
    np.maximum.at(high_P, prompt_N, reward_N)
    size_N = size_P[prompt_N]
    return size_N, sum_P[prompt_N] / size_N, (high_P > low_P)[prompt_N]


def leave_one_out(reward_N: FloatArray, prompt_N: IntArray) -> FloatArray:
    size_N, mean_N, mixed_N = group_statistics(reward_N, prompt_N)
    others_N = np.maximum(size_N - 1, 1)
    return np.where(mixed_N, reward_N - (mean_N * size_N - reward_N) / others_N, 0.0)


def centred(reward_N: FloatArray, prompt_N: IntArray) -> FloatArray:
    _, mean_N, mixed_N = group_statistics(reward_N, prompt_N)
    return np.where(mixed_N, reward_N - mean_N, 0.0)


def grpo(
    reward_N: FloatArray, prompt_N: IntArray, *, correction: int = 0, eps: float = 1e-6
) -> FloatArray:
    size_N, mean_N, mixed_N = group_statistics(reward_N, prompt_N)
    deviation_N = reward_N - mean_N
    square_N = np.bincount(prompt_N, weights=np.square(deviation_N))[prompt_N]
    std_N = np.sqrt(square_N / np.maximum(size_N - correction, 1))
    return np.where(mixed_N, deviation_N / (std_N + eps), 0.0)


def raft(reward_N: FloatArray, prompt_N: IntArray) -> FloatArray:
    high_P = np.full(int(prompt_N.max(initial=-1)) + 1, -np.inf)
    np.maximum.at(high_P, prompt_N, reward_N)
    high_N = high_P[prompt_N]
    return ((reward_N == high_N) & (high_N > 0)).astype(np.float64)


class Kept(NamedTuple):
    """Rows that reach the loss, and what each is multiplied with: weight times advantage."""

    rows_K: IntArray
    weight_K: FloatArray


class Batch(NamedTuple):
    """Every scored row of a step."""

    reward_N: FloatArray
    prompt_N: IntArray
    num_prompts: int
    """Of the step, those without rows included: the loss denominator P."""
    progress: float
    generator: Generator


def per_prompt(weight_K: FloatArray, prompt_K: IntArray, num_prompts: int) -> FloatArray:
    """Weights of the mean over prompts of the mean over each prompt's rows that reach the loss."""
    return weight_K / (np.bincount(prompt_K)[prompt_K] * num_prompts)


def all_rows(batch: Batch, *, advantage: Callable[..., FloatArray] = leave_one_out) -> Kept:
    advantage_N = advantage(batch.reward_N, batch.prompt_N)
    rows_N = np.arange(len(advantage_N))
    return Kept(rows_N, per_prompt(advantage_N, batch.prompt_N, batch.num_prompts))


def em(batch: Batch) -> Kept:
    """Accepted rows, averaged within their prompt."""
    rows_K = np.flatnonzero(raft(batch.reward_N, batch.prompt_N))
    ones_K = np.ones(len(rows_K))
    return Kept(rows_K, per_prompt(ones_K, batch.prompt_N[rows_K], batch.num_prompts))


def subset(
    batch: Batch,
    *,
    rows: Callable[[Batch, FloatArray], IntArray],
    advantage: Callable[..., FloatArray] = grpo,
    again: Callable[..., FloatArray] | None = None,
    flat: bool = False,
) -> Kept:
    """Rows chosen by `rows(batch, advantage_N)`; advantages are those of full groups unless `again`.

    `flat` averages over all rows kept, as D3S does, instead of within prompts first.
    """
    advantage_N = advantage(batch.reward_N, batch.prompt_N)
    rows_K = rows(batch, advantage_N)
    prompt_K = batch.prompt_N[rows_K]
    advantage_K = advantage_N[rows_K] if again is None else again(batch.reward_N[rows_K], prompt_K)
    if flat:
        return Kept(rows_K, advantage_K / max(len(rows_K), 1))
    return Kept(rows_K, per_prompt(advantage_K, prompt_K, batch.num_prompts))


HALF = 4
"""Rows kept of the 8 of a prompt by the down-samplers that keep a count."""

DOWNSAMPLERS: dict[str, tuple[str, Callable[[Batch], Kept]]] = {
    "all": ("every row, leave-one-out", all_rows),
    "grpo": ("every row, GRPO advantage", partial(all_rows, advantage=grpo)),
    "zero_variance": (
        "groups with a spread, averaged over these groups only",
        partial(
            subset,
            rows=lambda b, _: downsampling.zero_variance_filter(b.reward_N, b.prompt_N),
            advantage=leave_one_out,
            flat=True,
        ),
    ),
    "pods": (
        "4 of 8 by largest reward variance, advantages computed again",
        partial(
            subset,
            rows=lambda b, _: downsampling.max_variance(b.reward_N, b.prompt_N, keep=HALF),
            again=partial(grpo, correction=1, eps=1e-4),
        ),
    ),
    "half": (
        "2 highest and 2 lowest of 8, advantages computed again",
        partial(
            subset,
            rows=lambda b, _: downsampling.half(b.reward_N, b.prompt_N, keep=HALF),
            again=partial(grpo, correction=1, eps=1e-4),
        ),
    ),
    "within": (
        "4 of 8 by largest advantage variance (D3S within groups)",
        partial(subset, rows=lambda b, a: downsampling.max_variance(a, b.prompt_N, keep=HALF)),
    ),
    "d3s": (
        "scheduled share of the batch by largest advantage variance",
        partial(
            subset,
            rows=lambda b, a: downsampling.d3s(
                a, row_fraction=downsampling.row_fraction(b.progress)
            ),
            flat=True,
        ),
    ),
    "d3s_quarter": (
        "the same, a quarter throughout",
        partial(subset, rows=lambda b, a: downsampling.d3s(a, row_fraction=0.25), flat=True),
    ),
    "d3s_two_stage": (
        "scheduled share, within groups first",
        partial(
            subset,
            rows=lambda b, a: downsampling.d3s_two_stage(
                a, b.prompt_N, row_fraction=downsampling.row_fraction(b.progress)
            ),
            flat=True,
        ),
    ),
    "balanced": (
        "first 2 right and 2 wrong of 8, baseline of the whole pool (Reinforce-Ada)",
        partial(
            subset,
            rows=lambda b, _: downsampling.balanced(b.reward_N, b.prompt_N, keep=HALF),
            advantage=centred,
        ),
    ),
}


class Context(NamedTuple):
    """What a selector or a scale may be built from."""

    posterior: BetaPosterior
    policy: Policy
    keys: list[str]
    seed: int


@dataclass(frozen=True)
class Selection:
    what: str
    make: Callable[[Context], Selector]
    decay_chosen: float = 0.2
    decay_rest: float = 0.999
    refill: bool = False


def _uniform(context: Context) -> Selector:
    return UniformSelector(len(context.keys), seed=context.seed, keys=context.keys)


def _vade(context: Context, score: str = "vade") -> Selector:
    return ThompsonSelector(context.posterior, score=score, keys=context.keys)


def _mean(context: Context) -> Selector:
    return PosteriorMeanSelector(context.posterior, keys=context.keys)


SELECTIONS: dict[str, Selection] = {
    "uniform": Selection("every prompt once an epoch", _uniform),
    "refill": Selection("uniform; groups without spread are replaced", _uniform, refill=True),
    "static_band": Selection(
        "uniform in [.3, .7] of the starting policy",
        lambda c: StaticBandSelector(
            (c.policy.start_rate_D * 8).round() / 8, short="nearest", keys=c.keys
        ),
    ),
    "online_band": Selection(
        "uniform where the posterior mean is in [.3, .7]",
        lambda c: OnlineBandSelector(c.posterior, short="nearest", keys=c.keys),
    ),
    "mean": Selection("largest expected p(1-p)^2, decay .2", _mean),
    "mean_0.5": Selection("the same, decay .5", _mean, 0.5),
    "mean_0.8": Selection("the same, decay .8", _mean, 0.8),
    "mean_1": Selection("the same, nothing forgotten", _mean, 1.0, 1.0),
    "vade": Selection("largest drawn p(1-p)^2, decay .2", _vade),
    "vade_0.5": Selection("the same, decay .5", _vade, 0.5),
    "vade_0.8": Selection("the same, decay .8", _vade, 0.8),
    "vade_1": Selection("the same, nothing forgotten", _vade, 1.0, 1.0),
    "vade_variance": Selection("largest drawn p(1-p)", partial(_vade, score="variance")),
    "vade_last": Selection("largest drawn p(1-p)^2, last group only", _vade, 0.0),
    "mopps": Selection(
        "draw nearest 1/2 of 4 candidates per prompt, nothing forgotten",
        lambda c: mopps(c.posterior, candidates=4, keys=c.keys),
        1.0,
        1.0,
    ),
    "diverse": Selection(
        "VADE with PDTS's spread over skills",
        lambda c: DiverseSelector(c.posterior, c.policy.skill_DM, gamma=0.05, keys=c.keys),
    ),
}


@dataclass(frozen=True)
class Allocation:
    what: str
    allocate: allocation.Allocator
    scale: Callable[..., FloatArray] | None = allocation.posterior_std
    """None for an allocator that takes the posterior's parameters itself."""
    objective: str = "mean"
    planner: dict[str, Any] = field(default_factory=dict)
    norms: str = ""
    """What scales the prompts besides: nothing, "measured" G, or the "oracle" scale itself."""


def permuted(std_P: FloatArray, total: int, **box: Any) -> IntArray:
    """The Neyman budgets dealt at random among prompts of positive scale: isolates raggedness."""
    budget_P = allocation.neyman(std_P, total, **box)
    live_K = np.flatnonzero(np.asarray(std_P) > 0)
    seed = stable_hash("permuted", *map(repr, np.asarray(std_P).tolist()))
    budget_P[live_K] = budget_P[np.random.default_rng(seed).permutation(live_K)]
    return budget_P


def flat_scale(a_P: FloatArray, b_P: FloatArray) -> FloatArray:
    return np.ones(len(a_P))


_PILOT = {"pilot": 4, "estimate": "pilot", "pilots": "pool"}
_LOO = allocation.leave_one_out

ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation("8 each", allocation.uniform),
    "loo": Allocation("leave-one-out rule, posterior scale (iii)", _LOO),
    "loo_plug_in": Allocation("the same, plug-in scale (i)", _LOO, allocation.plug_in_std),
    "loo_mean": Allocation("the same, expected std (ii)", _LOO, allocation.mean_std),
    "loo_thompson": Allocation("the same, scale of a draw (iv)", _LOO, allocation.thompson_std),
    "loo_norm": Allocation("scale (iii) times measured G", _LOO, norms="measured"),
    "neyman": Allocation("c/n rule, posterior scale (iii)", allocation.neyman),
    "gvm": Allocation("GVM's rule by the posterior", allocation.neyman, allocation.gvm),
    "knapsack": Allocation("Knapsack RL", allocation.knapsack, allocation.mean_pass_rate),
    "knapsack_posterior": Allocation(
        "Knapsack RL, expected over the posterior", allocation.knapsack_posterior, None
    ),
    "permuted": Allocation("c/n budgets dealt at random", permuted),
    "oracle": Allocation("leave-one-out rule, true p and G", _LOO, flat_scale, norms="oracle"),
    "em_uniform": Allocation("8 each, accepted rows", allocation.uniform, objective="em"),
    "em_drop": Allocation(
        "4 pilots; rest to prompts with a success", allocation.neyman, allocation.live, "em", _PILOT
    ),
    "em_inverse_sqrt": Allocation(
        "4 pilots; rest by 1/sqrt p", allocation.neyman, allocation.inverse_sqrt, "em", _PILOT
    ),
    "em_inverse_sqrt_norm": Allocation(
        "the same times G",
        allocation.neyman,
        allocation.inverse_sqrt,
        "em",
        _PILOT,
        norms="measured",
    ),
    "em_gvm": Allocation(
        "4 pilots; GVM with G, alpha, beta; pooled",
        allocation.neyman,
        allocation.gvm_plug_in,
        "em",
        _PILOT,
        norms="measured",
    ),
    "em_gvm_discard": Allocation(
        "the same, pilots thrown away",
        allocation.neyman,
        allocation.gvm_plug_in,
        "em",
        _PILOT | {"pilots": "discard"},
        norms="measured",
    ),
    "em_gvm_posterior": Allocation(
        "GVM by the posterior, no pilots", allocation.neyman, allocation.gvm, "em"
    ),
    "em_gvm_both": Allocation(
        "4 pilots pooled; rest by the posterior that has seen them",
        allocation.neyman,
        allocation.gvm,
        "em",
        {"pilot": 4},
    ),
    "em_ada": Allocation(
        "Reinforce-Ada Est by the posterior", allocation.neyman, allocation.reinforce_ada_std, "em"
    ),
    "em_permuted": Allocation(
        "GVM budgets dealt at random among live prompts",
        permuted,
        allocation.gvm_plug_in,
        "em",
        _PILOT,
    ),
    "em_oracle": Allocation("true p and G", allocation.neyman, flat_scale, "em", norms="oracle"),
}


@dataclass(frozen=True)
class Stop:
    what: str
    rule: stopping.Stopping | None = None
    round_size: int | None = None
    plan: int = 1
    """Rollouts planned at most, in multiples of what other arms generate per step."""


STOPPINGS: dict[str, Stop] = {
    "none": Stop("budgets as allocated"),
    "early": Stop(
        "after 4 of 8 alike, stop if a mixed group is less likely than not",
        stopping.early(threshold=0.5),
        round_size=4,
    ),
    "early_alike": Stop("stop after 4 of 8 alike", stopping.early(threshold=1.0), round_size=4),
    "early_unbiased": Stop(
        "as early, but half of those go on and weigh double",
        stopping.early_unbiased(threshold=0.5, rho=0.5),
        round_size=4,
    ),
    "ada_positive": Stop(
        "rounds of 4 until one passed, at most 4 (Reinforce-Ada)",
        stopping.positive(),
        round_size=4,
        plan=2,
    ),
    "ada_balanced": Stop(
        "rounds of 4 until 2 passed and 2 failed, at most 4 (Reinforce-Ada)",
        stopping.balanced(keep=HALF),
        round_size=4,
        plan=2,
    ),
}


class Arm(NamedTuple):
    """Names of one entry of each table; only these may differ between arms."""

    selection: str = "uniform"
    allocation: str = "uniform"
    stopping: str = "none"
    rows: str = "all"

    def __str__(self) -> str:
        return "/".join(self).removesuffix("/all").removesuffix("/none").removesuffix("/uniform")

    @classmethod
    def parse(cls, name: str) -> Arm:
        """Of "selection/allocation/stopping/rows"; what is left out is the plain one."""
        arm = cls(*name.split("/"))
        tables: tuple[dict[str, Any], ...] = (SELECTIONS, ALLOCATIONS, STOPPINGS, DOWNSAMPLERS)
        for part, table in zip(arm, tables, strict=True):
            if part not in table:
                raise ValueError(f"{part!r} in arm {name!r} is none of {', '.join(table)}")
        if not arm.is_possible:
            raise ValueError(
                f"arm {name!r} cannot be: EM has its own rows, and pilots no stopping rule"
            )
        return arm

    @property
    def is_possible(self) -> bool:
        part = ALLOCATIONS[self.allocation]
        return (part.objective == "mean" or self.rows == "all") and (
            not part.planner or self.stopping == "none"
        )

    @property
    def what(self) -> str:
        parts = (
            SELECTIONS[self.selection].what,
            ALLOCATIONS[self.allocation].what,
            STOPPINGS[self.stopping].what,
            DOWNSAMPLERS[self.rows][0],
        )
        return "; ".join(
            what for what, name, plain in zip(parts, self, Arm(), strict=True) if name != plain
        )


def mandatory_arms() -> list[Arm]:
    """The ladders of selection and allocation, the down-samplers, stopping, and some together."""
    arms = [Arm(name) for name in SELECTIONS]
    arms += [Arm(allocation=name) for name in ALLOCATIONS if name != "uniform"]
    arms += [Arm(stopping=name) for name in STOPPINGS if name != "none"]
    arms += [Arm(rows=name) for name in DOWNSAMPLERS if name != "all"]
    arms += [Arm("vade", "loo"), Arm("vade", "em_uniform"), Arm("vade", "em_gvm_posterior")]
    arms += [Arm("vade", stopping="early"), Arm("uniform", "uniform", "ada_balanced", "balanced")]
    return [*arms, Arm("vade", rows="pods"), Arm("vade", rows="d3s")]


RECIPES = {
    # What can be simulated of recipes/arithmetic/*.yaml. D3S's tokens, DAPO's clip and all of HAPO
    # concern tokens, of which there are none here.
    "grpo": Arm(rows="grpo"),
    "vade_grpo": Arm("vade", rows="grpo"),
    "d3s_grpo": Arm(rows="d3s"),
    "pods_grpo": Arm(rows="pods"),
    "gvm_grpo": Arm(allocation="gvm", rows="grpo"),
    "reinforce_ada": Arm(stopping="ada_balanced", rows="balanced"),
    "dapo": Arm("refill", rows="grpo"),
    "everything": Arm("vade_0.8", "loo", "early"),
}


def quick_arms() -> list[Arm]:
    names = ("uniform", "refill", "mean", "vade", "uniform/loo", "uniform/oracle")
    return [Arm.parse(name) for name in (*names, "uniform/uniform/none/d3s")]


def cross_arms() -> list[Arm]:
    """Every selector x allocator x stopping rule x down-sampler that can be combined."""
    arms = (
        Arm(a, b, c, d)
        for a in SELECTIONS
        for b in ALLOCATIONS
        for c in STOPPINGS
        for d in DOWNSAMPLERS
    )
    return [arm for arm in arms if arm.is_possible]


def reference(arm: Arm) -> Arm:
    """The arm that a difference is taken to: uniform, of the same objective."""
    is_em = ALLOCATIONS[arm.allocation].objective == "em"
    return Arm(allocation="em_uniform" if is_em else "uniform")
