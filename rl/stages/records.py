"""Plain data that passes between the stages: what to roll out, what came back, what trains.

Axes: P prompts, N rollouts (flat rows), K rows kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rollouts.batch import Rollouts
from rollouts.prompts import Prompt
from samplers.proposal import Proposal


@dataclass(frozen=True, kw_only=True)
class Request:
    """Rollouts to make: `budget_P` of each prompt, one seed per row."""

    prompts: list[Prompt]
    budget_P: np.ndarray
    seed_N: np.ndarray
    start_seed_P: np.ndarray | None = None
    """Seed of the noise that a prompt's samples share, where a denoising plan says so."""

    @property
    def prompt_N(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.budget_P)), self.budget_P)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One round: rollouts with rewards. Rows that failed or got no reward are kept apart."""

    rollouts: Rollouts
    shown_N: list[Any]
    """What the reward saw of each row: a text, or an image."""
    reward_by_function: dict[str, list[float | None]]
    failed: Rollouts | None
    failures: list[dict[str, str]]
    """Prompt key and reason of each failed row."""
    unrewarded: Rollouts | None = None
    """Rows to which no reward function applied."""
    logged_columns: dict[str, list[Any]] = field(default_factory=dict)
    """What reward functions gave to `log_extra`, per row."""
    logged_metrics: dict[str, list[float]] = field(default_factory=dict)
    """What reward functions gave to `log_metric`."""

    @property
    def reward_N(self) -> torch.Tensor:
        assert self.rollouts.reward_N is not None
        return self.rollouts.reward_N

    def full_marks_N(self, weights: list[float] | None) -> np.ndarray:
        """(N,) the largest reward each row could have: of the functions that apply to it."""
        weight_F = np.array(weights or [1.0] * len(self.reward_by_function)).clip(min=0)
        values = self.reward_by_function.values()
        applies_FN = np.array([[value is not None for value in column] for column in values])
        # As the rewards are summed: exactly rounded.
        return np.array([math.fsum(weight_F[applies]) for applies in applies_FN.T])


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One selection of prompts, with every round that was rolled out for it."""

    prompts: list[Prompt]
    proposals: list[Proposal]
    rounds: list[Scored]
    group_weight_P: np.ndarray
    """What the stopping rule multiplies the gradient of each group by."""

    @property
    def index_P(self) -> np.ndarray:
        """(P,) rows of the data set."""
        return self.proposals[0].index_P


@dataclass(frozen=True, kw_only=True)
class Groups:
    """What a step may train on: whole groups, rows ordered by prompt, then slot."""

    prompts: list[Prompt]
    """P prompts, as `rollouts.prompt_N` counts them."""
    rollouts: Rollouts
    """N rows with rewards."""
    a_P: torch.Tensor
    """(P,) parameters of each prompt's Beta posterior before any rollout of its group."""
    b_P: torch.Tensor
    weight_P: torch.Tensor
    """Weights of the stopping rule."""
    num_padded: int = 0
    """Groups that are missing, and that the denominator counts as well."""

    @property
    def pass_rate_P(self) -> torch.Tensor:
        """(P,) the posterior's pass rates before any rollout of these groups."""
        return self.a_P / (self.a_P + self.b_P)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step trains on, the same on every rank."""

    rollouts: Rollouts
    """K rows, with rewards and advantages."""
    weight_K: torch.Tensor
    """Per-prompt weights of the objective."""
    denominator: float
    original_denominator: float
    """The denominator of all rows, before any was dropped."""
    kl_denominator: float = 1.0
    """The sum of the weights that the KL covers."""
    bonus_denominator: float = 1.0
    """The number of decisions that the entropy bonus covers."""
    prompts: list[Prompt]
    """P prompts, as `rollouts.prompt_N` counts them."""
    visits: list[Visit]
    """Everything that was generated for the step."""
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def rounds(self) -> list[Scored]:
        """Every round of every visit, in the order they were made."""
        return [scored for visit in self.visits for scored in visit.rounds]
