"""Settings of a run that trains a diffusion model; the rest is `RolloutConfig`'s."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from rl.config.denoising_checks import OVER_STEPS, check_credit, check_kl, check_numbers
from rl.config.denoising_plans import plan_at, that_vary
from rl.config.methods import method_of
from rl.config.own import choice
from rl.config.settings import DECISIVE, RolloutConfig, setting
from rl.config.settings_act import ACTS_DENOISING, warn_of_idle
from rl.objective.tree_advantages import (
    branch_mean,
    depth_normalised,
    leave_branch_out,
    parent_difference,
)
from rollouts.step_plan import StepPlan

CREDITS = {
    "branch": branch_mean,
    "leave_one_out": leave_branch_out,
    "depth": depth_normalised,
    "parent": parent_difference,
}
"""Baselines that credit the steps of one chain apart."""

BASELINES = ("prompt", "history", "buffer", "siblings", *CREDITS)
CREDIT_SCALES = ("none", "prompt", "batch")
REDUCTIONS = ("sum", "mean")
NOISE_WEIGHTS = ("none", "std")
EDGE_WEIGHTS = ("leaves", "once")

DENOISING_DECISIVE = (
    *("plan", "guidance_scale", "height", "width", "sibling_within_share", "baseline"),
    *("shift", "shared_start_noise", "negative_prompt", "negative_prompt_column"),
    "pipeline_kwargs",
    *("history_steps", "credit_scale", "branch_threshold", "ema_decay"),
)
"""Settings of this kind that decide which rollouts are made and trained on, what their credits
remember, or what a checkpoint holds."""

LANGUAGE_ONLY = (
    *("refill", "mask_truncated_completions", "reward_kl", "adaptive_temperature_tau"),
    *("micro_batch_tokens", "fused_logprobs", "pilot_rollouts", "stop", "engine", "old_logprobs"),
    *("gvm_gradient_norm", "temperature", "top_p", "top_k", "min_p", "completions_every"),
    *("max_prompt_length", "max_completion_length", "repetition_penalty", "generation_kwargs"),
    "chat_template_kwargs",
    *("max_prompt_length", "max_completion_length", "scale_rewards", "std_correction", "std_eps"),
    *("multi_objective_aggregation", "entropy_coef", "top_entropy_quantile", "kl_ratio"),
    "kl_rows",
    "sync_ref_model",
)
"""Settings of `RolloutConfig` that have no meaning here and must stay as they are."""


@dataclass
class DenoisingConfig(RolloutConfig):
    """`RolloutConfig` for diffusion models: how chains are drawn, branch, are compared and train.

    A rollout is one finished sample and a decision one denoising step. `per_device_train_batch_size`
    counts distinct latents that are replayed together, `rollouts_per_prompt` samples, a multiple of
    the leaves of a branch. `epsilon` clips ratios of log-probabilities that are summed over a latent,
    or of their means (`logprob_reduction`), which differ by the number of its elements.
    """

    plan: dict[str, Any] | str | None = setting(
        None,
        "The denoising chain: num_steps, rule, level, and schedules of stochastic, branching and "
        "trained steps; see rl/config/denoising_plans.py.",
    )
    validation_steps: int | None = setting(
        None, "Denoising steps of validation samples. Default: the plan's."
    )
    max_evaluations: int | None = setting(
        None,
        "End after the step in which the denoiser has been evaluated so often for rollouts, in rows; "
        "a guidance pair is one.",
    )
    guidance_scale: float | None = setting(
        5.0,
        "Classifier-free guidance, in rollouts and in training; 1: none. null: the pipeline's default, "
        "for pipelines without this argument.",
    )
    negative_prompt: str | None = setting(
        None, "What guidance leads away from, one text for all prompts. Default: the pipeline's."
    )
    negative_prompt_column: str | None = setting(
        None, "Column of the data with a negative prompt for each prompt."
    )
    pipeline_kwargs: dict[str, Any] | str | None = setting(
        None,
        "Further arguments of the pipeline's call and of its encode_prompt, such as {true_cfg_scale: "
        "4.0}, {num_frames: 49} or {clip_skip: 1}; those that would have no effect are refused.",
    )
    height: int | None = setting(None, "Pixels. Default: the pipeline's.")
    width: int | None = setting(None, "Pixels. Default: the pipeline's.")
    shift: float | None = setting(
        None,
        "Shift of a flow model's noise levels, static, in the place of the scheduler's own (FLUX's is "
        "dynamic). Default: the scheduler's.",
    )
    shared_start_noise: bool = setting(
        False,
        "All samples of a prompt start from one noise, drawn for the prompt and draw; validation does "
        "not. With as many samples for every prompt, branch: {at: stochastic_start} of that many "
        "children in plan has the same law and costs less.",
    )
    reward_device: str | None = setting(
        None, "Where the models of rewards by name run, such as cpu or cuda:1. Default: the run's."
    )
    baseline: str = setting(
        "prompt",
        "What a sample is compared with: prompt (mean of its samples), history (and of earlier steps), "
        "buffer (its last ones), siblings (the others of its branch), branch, leave_one_out, depth or "
        "parent (rl/objective/tree_advantages.py).",
    )
    history_steps: int = setting(
        8,
        "Earlier steps that baseline 'history' remembers, or rewards of a prompt that 'buffer' does.",
    )
    credit_scale: str | None = setting(
        None,
        "Divide credits by the std of the rewards of the prompt or the batch, or none. Default: batch; "
        "none for history and buffer, which are scaled already.",
    )
    advantage_clip: float | None = setting(
        5.0, "Advantages are cut off here, after rows were chosen by them. null: nowhere."
    )
    branch_threshold: float | None = setting(
        None,
        "Only the best and the worst sample of a branch train; the best from this advantage up, the "
        "worst from minus it down. 0: both unless all are equal. Default: all samples train.",
    )
    logprob_reduction: str = setting(
        "sum", "Ratios are of log-probabilities summed over a latent, or of their mean (published)."
    )
    kl_reduction: str | None = setting(
        None,
        "The KL that beta weighs: sum over a latent, mean of its elements, or flow_grpo (the mean times "
        "the step size, as released). Default: as logprob_reduction.",
    )
    noise_weight: str = setting(
        "none",
        "Weight of a denoising step: none, or std (its noise, mean 1 over all steps but the last).",
    )
    edge_weight: str = setting(
        "leaves",
        "Weight of a denoising step that several samples of a branch share: leaves (once for each, its "
        "share of the expected reward's gradient) or once (as BranchGRPO's release trains it).",
    )
    sibling_within_share: float = setting(
        1.0,
        "Share of the variance of a prompt's rewards that lies within branches; siblings count that "
        "much less in the posterior (probe_branch_points measures it). 1: as independent.",
    )
    ema_decay: float = setting(
        0.0, "Validate and save a moving average of the weights, with this decay. 0: off."
    )
    images_every: int = setting(
        0, "Steps between pictures of training samples, beside the first step's; 0: none."
    )

    def __post_init__(self) -> None:
        if self.loss is None:
            self.loss = "grpo"
        for name in ("advantage", "objective", "length_weight"):
            if getattr(self, name) is None:
                setattr(
                    self, name, {"advantage": "centred", "objective": "mean"}.get(name, "row_mean")
                )
        if self.credit_scale is None:
            self.credit_scale = "none" if self.baseline in OVER_STEPS else "batch"
        budget_min = self.budget_min
        super().__post_init__()
        plans = self._read_plan()
        if self.pipeline_kwargs is not None:
            self.pipeline_kwargs = _plain(
                "pipeline_kwargs", self.pipeline_kwargs, "a mapping such as {true_cfg_scale: 4.0}"
            )
        choice("baseline", self.baseline, BASELINES)
        choice("credit_scale", self.credit_scale, CREDIT_SCALES)
        choice("logprob_reduction", self.logprob_reduction, REDUCTIONS)
        check_kl(self, asked=self.kl_reduction)
        if self.kl_reduction is None:
            self.kl_reduction = self.logprob_reduction
        choice("noise_weight", self.noise_weight, NOISE_WEIGHTS)
        choice("edge_weight", self.edge_weight, EDGE_WEIGHTS)
        choice("loss", self.loss, ("grpo",))
        choice("length_weight", self.length_weight, ("row_mean", "row_sum"))
        check_numbers(self)
        self._check_kind()
        self._check_shift()
        self._check_branches(budget_min)
        check_credit(self, plans)
        warn_of_idle(self, ACTS_DENOISING)

    def _read_plan(self) -> list[StepPlan]:
        """Make `plan` plain and give the plans of all steps: one that could not be run is told now."""
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
        for name in LANGUAGE_ONLY:
            default = RolloutConfig.__dataclass_fields__[name].default
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} is for language models; a diffusion model needs {name}: {default}"
                )
        for name, allowed in (
            ("token_selection", "none"),
            ("importance_correction", "none"),
            ("advantage", "centred"),  # `baseline` and `credit_scale` say more
        ):
            if getattr(self, name) != allowed:
                raise ValueError(f"{name} must be {allowed!r} for a diffusion model")
        if self.torch_compile:
            raise ValueError(
                "torch_compile does nothing for a diffusion model, whose rollouts and updates run the "
                "denoiser inside its pipeline: write torch_compile: false"
            )
        if self.down_sampling == "pods":
            raise ValueError(
                "down_sampling 'pods' compares the rows it keeps once more, which is not offered for "
                "diffusion models: write max_variance"
            )
        if self.down_sampling != "none" and self.branch_threshold is not None:
            raise ValueError(
                f"down_sampling={self.down_sampling!r} and "
                f"branch_threshold={self.branch_threshold} both choose the rows that train: write one"
            )
        if self.baseline in CREDITS and self.max_failed_share:
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
        for name in ("rollouts_per_prompt", "rollouts_per_step", "stopping_wave"):
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

    @property
    def plan_horizon(self) -> int:
        """Training steps that schedules may spread over."""
        return max(self.max_steps, 1)

    @property
    def leaves_per_branch(self) -> int:
        """Samples of one root, the same at every step of a run."""
        return self.step_plan(0).leaves_per_root

    def step_plan(self, step: int) -> StepPlan:
        """The denoising chain of training step `step`; after the last, that of the last."""
        assert isinstance(self.plan, dict)
        horizon = self.plan_horizon
        plan = plan_at(self.plan, min(step, horizon - 1), num_train_steps=horizon)
        return replace(plan, shared_start=self.shared_start_noise)

    def step_plans(self) -> list[StepPlan]:
        """The different chains of all training steps, in the order of their first."""
        return list(dict.fromkeys(map(self.step_plan, range(self.plan_horizon))))

    def engine_settings(self) -> dict[str, Any]:
        """Arguments of `DiffusersEngine` that the settings decide."""
        return {
            "guidance_scale": self.guidance_scale,
            "height": self.height,
            "width": self.width,
            "batch_size": self.generation_batch_size,
            "shift": self.shift,
            "negative_prompt": self.negative_prompt,
            "negative_prompt_column": self.negative_prompt_column,
            "pipeline_kwargs": self.pipeline_kwargs,
        }

    def decisive_settings(self) -> dict[str, Any]:
        """Settings that decide which rollouts are made; a resumed run must share them."""
        return {name: getattr(self, name) for name in (*DECISIVE, *DENOISING_DECISIVE)}


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
