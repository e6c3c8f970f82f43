"""Settings of a run that trains a diffusion model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from rl.config.budgets import least_budget
from rl.config.checks import check_shared, warn_of_budgets
from rl.config.declare import ROLLOUTS
from rl.config.declared import decides, says_where, warn_of_idle
from rl.config.denoising_checks import check_credit, check_kl, check_numbers
from rl.config.denoising_plans import that_vary
from rl.config.diffusion_settings import DiffusionSettings
from rl.config.fill_in import fill_in_prior, fill_in_shared, look_at_unused_weights
from rl.config.methods import BASELINES, method_of
from rollouts.step_plan import StepPlan

CREDITS: dict[str, Any] = {
    name: method.function for name, method in BASELINES.items() if method.of_tree
}
"""Baselines that credit the steps of one chain apart -> their functions."""


@says_where
@dataclass
class DenoisingConfig(DiffusionSettings):
    """Settings of a run that trains a diffusion model: how chains are drawn, branch, compare and train.

    A rollout is one finished sample and a decision one denoising step. `per_device_train_batch_size`
    counts distinct latents that are replayed together, `rollouts_per_prompt` samples, a multiple of
    the leaves of a branch. `epsilon` clips ratios of log-probabilities that are summed over a latent,
    or of their means (`logprob_reduction`), which differ by the number of its elements.

    Raises:
        ValueError: for an unknown name (with the nearest one), a plan that cannot be run or a setting
            out of range, before anything is loaded.
    """

    def __post_init__(self) -> None:
        defaults = {"loss": "grpo", "objective": "mean", "length_weight": "row_mean"}
        for name, value in (defaults | {"epsilon": 0.2, "epsilon_high": 0.2}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.credit_scale is None:
            method = BASELINES.get(self.baseline)
            self.credit_scale = "none" if method is not None and method.over_steps else "batch"
        fill_in_shared(self)
        budget_min = self.budget_min
        if budget_min is None:
            self.budget_min = least_budget(self)
        fill_in_prior(self)
        check_shared(self)
        warn_of_budgets(self)
        plans = self._read_plan()
        if self.pipeline_kwargs is not None:
            self.pipeline_kwargs = _plain(
                "pipeline_kwargs", self.pipeline_kwargs, "a mapping such as {true_cfg_scale: 4.0}"
            )
        check_kl(self, asked=self.kl_reduction)
        if self.kl_reduction is None:
            self.kl_reduction = self.logprob_reduction
        check_numbers(self)
        self._check_kind()
        self._check_shift()
        self._check_branches(budget_min)
        check_credit(self, plans)
        warn_of_idle(self)
        super().__post_init__()
        look_at_unused_weights(self)

    def _read_plan(self) -> list[StepPlan]:
        """Make `plan` plain and return the plans of all steps; refuse one that could not be run."""
        plan = self.plan = _plain(
            "plan", self.plan, "a mapping such as {num_steps: 20, rule: ddim, level: 1.0}"
        )
        if self.max_steps < 1 and (names := that_vary(plan)):
            raise ValueError(
                f"plan.{names[0]}={plan[names[0]]!r} changes from step to step, so that the steps must "
                f"be known: write max_steps in the place of num_train_epochs, got {self.max_steps}"
            )
        for entry in (plan.get("stochastic"), plan.get("trained")):
            if isinstance(entry, dict) and entry.get("schedule") == "backward_progressive":
                entry.setdefault("stages", self.plan_horizon)  # a resumed run keeps its schedule
        return self.step_plans()

    def _check_kind(self) -> None:
        if self.torch_compile:
            raise ValueError(
                "torch_compile does nothing for a diffusion model, whose rollouts and updates run the "
                "denoiser inside its pipeline: write torch_compile: false"
            )
        if self.down_sampling != "none" and self.branch_threshold is not None:
            raise ValueError(
                f"down_sampling={self.down_sampling!r} and "
                f"branch_threshold={self.branch_threshold} both choose the rows that train: write one"
            )
        if BASELINES[self.baseline].of_tree and self.max_failed_share:
            raise ValueError(
                f"baseline {self.baseline!r} needs the reward of every sample of a branch: write "
                f"max_failed_share: 0, got {self.max_failed_share}"
            )

    def _check_shift(self) -> None:
        if self.shift is None:
            return
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift must be positive and finite, got {self.shift}")
        assert isinstance(self.plan, dict)
        if self.plan["rule"] == "ddim":
            raise ValueError(
                f"shift={self.shift} is of flow-matching models, and rule ddim in plan is of others: "
                f"write no shift"
            )

    def _check_branches(self, budget_min: int | None) -> None:
        leaves = self.leaves_per_branch
        for name in ("rollouts_per_prompt", "rollouts_per_step", "stopping_round_size"):
            value = getattr(self, name)
            if value is not None and value % leaves:
                raise ValueError(
                    f"{name}={value} must be a multiple of the {leaves} leaves of a branch"
                )
        # Budgets are given out in branches, of which these allocators want more than one.
        lowest = method_of(self, "allocator").minimum * leaves
        if budget_min is None and lowest:
            self.budget_min = lowest
        if (self.budget_min or 0) < lowest or lowest > self.rollouts_per_prompt:
            raise ValueError(
                f"allocator {self.allocator!r} needs at least {lowest // leaves} branches of {leaves} "
                f"for every prompt, got budget_min={self.budget_min} and "
                f"rollouts_per_prompt={self.rollouts_per_prompt}"
            )

    def decisive_settings(self) -> dict[str, Any]:
        """Settings that decide which rollouts are made; a resumed run must share them."""
        return {name: getattr(self, name) for name in decides(self, ROLLOUTS)}


def _plain(name: str, value: Any, wanted: str) -> dict[str, Any]:
    """A setting that is a mapping, or JSON of one on the command line, as a checkpoint gives it back."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} must be a mapping or JSON, got {value!r}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(
            f"{name} must hold numbers, names and lists alone, got {value!r}: {error}"
        ) from error
