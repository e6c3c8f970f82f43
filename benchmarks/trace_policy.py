"""The simulated policy of `benchmarks/trace.py`: pools of pass rates that move, and what is known of
their gradients in closed form. What it assumes is said there.

Axes: D prompts, P prompts of a step, K rows kept, M skills.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipes.simulate import POOLS
from samplers import allocation
from samplers.keys import step_generator

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Generator = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything arms must not differ in."""

    num_prompts: int = 512
    prompts_per_step: int = 32
    rollouts_per_prompt: int = 8
    steps: int = 120
    """Steps of an arm that generates `prompts_per_step * rollouts_per_prompt` in each."""
    learning_rate: float = 0.25
    transfer: float = 0.5
    """Share of a prompt's squared gradient that lies in the shared skills."""
    num_skills: int = 16
    noise: float = 2.0
    """Size of the reward-independent part of a rollout's score, in units of the informative one."""
    norm_spread: float = 0.27
    """Standard deviation of log G over prompts; 0.27 was measured on one model, by others."""
    drift: float = 0.02
    walk: float = 0.03
    threshold: float = 0.5
    """Share of what can be gained, start to all but the hopeless right, that counts as reached."""

    @property
    def rollouts_per_step(self) -> int:
        return self.prompts_per_step * self.rollouts_per_prompt


TRACES = ("static", "drifting", "walk", "learning")


class Gradient(NamedTuple):
    """What one step's rows say: on the prompts' own parameters and on the shared skills."""

    own_D: FloatArray
    shared_M: FloatArray


class Policy:
    """Pass rates of a pool that move as the trace says. See the module's first lines."""

    def __init__(self, pool: str, trace: str, seed: int, settings: Settings) -> None:
        if trace not in TRACES:
            raise ValueError(f"trace must be one of {', '.join(TRACES)}, got {trace!r}")
        self.settings = settings
        self.trace = trace
        generator = step_generator(seed, f"pool {pool}", 0)
        size, skills = settings.num_prompts, settings.num_skills
        # The second half is held out: never rolled out, it learns through shared skills only.
        rate = np.concatenate([POOLS[pool](size, generator) for _ in range(2)])
        with np.errstate(divide="ignore"):
            self._start = np.log(rate) - np.log1p(-rate)
        order = generator.random((2 * size, skills)).argsort(axis=1)
        self._skill = (order < 2) / math.sqrt(2)  # two skills each, equally
        self.norm_D = np.exp(generator.normal(0, settings.norm_spread, size))
        self._own_D = np.zeros(size)
        self._shared_M = np.zeros(skills)
        self._squared = 0.0
        self._seed = seed
        self._step = 0
        self.start_rate_D = rate[:size]
        self._rate = rate

    @property
    def skill_DM(self) -> FloatArray:
        return self._skill[: self.settings.num_prompts]

    @property
    def rate_D(self) -> FloatArray:
        """(D,) pass rates of the prompts that can be chosen."""
        return self._rate[: self.settings.num_prompts]

    @property
    def held_out_D(self) -> FloatArray:
        """(D,) pass rates of as many prompts from the same pool that are never chosen."""
        return self._rate[self.settings.num_prompts :]

    def gradient(
        self, index_P: IntArray, prompt_K: IntArray, reward_K: FloatArray, weight_K: FloatArray
    ) -> Gradient:
        """Sum of weight times score over the rows kept; `prompt_K` are places in `index_P`.

        Noise is added for all rows at once: sums of independent Gaussians are Gaussian.
        """
        settings, index_K = self.settings, index_P[prompt_K]
        pull_K = weight_K * (reward_K - self.rate_D[index_K])
        pull_P = np.bincount(prompt_K, weights=pull_K, minlength=len(index_P))
        own_D = np.zeros(settings.num_prompts)
        own_D[index_P] = math.sqrt(1 - settings.transfer) * pull_P
        shared_M = math.sqrt(settings.transfer) * pull_P @ self.skill_DM[index_P]
        size = settings.noise * math.sqrt(np.square(weight_K * self.norm_D[index_K]).sum())
        noise_M = step_generator(self._seed, "noise", self._step).normal(size=len(shared_M))
        return Gradient(own_D, shared_M + size / math.sqrt(len(noise_M)) * noise_M)

    def advance(self, gradient: Gradient | None) -> bool:
        """Move the pass rates by one step; whether the gradient was used for an update."""
        settings = self.settings
        self._step += 1
        generator = step_generator(self._seed, "move", self._step)
        if self.trace == "walk":
            rate = self._rate + generator.normal(0, settings.walk, len(self._rate))
            rate = np.abs(rate)
            self._rate = np.where(rate > 1, 2 - rate, rate)
        elif self.trace == "drifting":
            self._rate = _sigmoid(self._start + settings.drift * self._step)
        elif self.trace == "learning" and gradient is not None:
            squared = float(np.square(gradient.own_D).sum() + np.square(gradient.shared_M).sum())
            if squared == 0:
                return False
            self._squared = squared if not self._squared else 0.9 * self._squared + 0.1 * squared
            step = settings.learning_rate / math.sqrt(self._squared)
            self._own_D = self._own_D + step * gradient.own_D
            self._shared_M = self._shared_M + step * gradient.shared_M
            logit = self._start + math.sqrt(settings.transfer) * self._skill @ self._shared_M
            logit[: settings.num_prompts] += math.sqrt(1 - settings.transfer) * self._own_D
            self._rate = _sigmoid(logit)
        return gradient is not None


def costs(objective: str, rate_P: FloatArray, norm_P: FloatArray) -> FloatArray:
    """(P,) c of the variance sum c / n (EM) or sum c / (n - 1) (mean) at known pass rates.

    EM's c = G^2 / p is infinite for a hopeless prompt, so it is regularised as in GVM.
    """
    if objective == "mean":
        return np.square(norm_P) * rate_P * (1 - rate_P)
    return np.square(norm_P) * rate_P / (np.square(rate_P) + 1e-3)


def variance(objective: str, cost_P: FloatArray, budget_P: IntArray) -> float:
    """Variance of the gradient, up to a factor, of budgets fixed before the rollouts."""
    effective_P = budget_P - (objective == "mean")
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(cost_P > 0, cost_P / effective_P, 0.0).sum())


def oracle_budget(objective: str, cost_P: FloatArray, total: int) -> IntArray:
    """(P,) the budgets of least variance when pass rates and norms are known."""
    solve = allocation.leave_one_out if objective == "mean" else allocation.neyman
    return solve(np.sqrt(cost_P), total, minimum=2 if objective == "mean" else 1)


def oracle_over_uniform(rate_P: FloatArray) -> float:
    """Oracle variance over uniform variance, c / n rule, real-valued budgets, equal norms.

    (sum sqrt c)^2 / (P sum c),   c = p (1 - p)
    """
    cost_P = costs("mean", rate_P, np.ones(len(rate_P)))
    return float(np.sqrt(cost_P).sum() ** 2 / (len(cost_P) * cost_P.sum()))


def excess_log_loss(
    a_P: FloatArray, b_P: FloatArray, rate_P: FloatArray, right_P: IntArray, trials_P: IntArray
) -> float:
    """Mean nats by which the posterior predicts the counts worse than the true pass rates do."""

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    total = 0.0
    columns = (a_P.tolist(), b_P.tolist(), rate_P.tolist(), right_P.tolist(), trials_P.tolist())
    for a, b, p, right, trials in zip(*columns, strict=True):
        predicted = log_beta(a + right, b + trials - right) - log_beta(a, b)
        true = (right * math.log(p) if right else 0.0) + (
            (trials - right) * math.log1p(-p) if trials > right else 0.0
        )
        total += true - predicted
    return total / len(a_P)


def _sigmoid(logit: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-logit))
