"""What a run of a diffusion model has besides the shared settings: fields, and the plans they give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rl.config.declare import LENGTH, NOTHING, OWN, ROLLOUTS, TRAINING, setting
from rl.config.denoising_plans import plan_at
from rl.config.settings import (
    ADVANTAGE,
    DENOISE,
    KEEP,
    KL,
    LOSS,
    POSTERIOR,
    REWARD,
    RUN,
    WATCH,
    SharedSettings,
)
from rl.objective.denoising_weights import KL_REDUCTIONS
from rollouts.step_plan import StepPlan

CREDIT_SCALES = ("none", "prompt", "batch")
REDUCTIONS = ("sum", "mean")
NOISE_WEIGHTS = ("none", "std")
EDGE_WEIGHTS = ("leaves", "once")


@dataclass
class DiffusionSettings(SharedSettings):
    """What runs of a diffusion model have besides."""

    # What stages shared with language models ask of a run, and what is always so in this one.
    advantage = "centred"  # `baseline` and `credit_scale` say more
    pilot_rollouts, pilot_estimate, pilot_use, gvm_gradient_norm = 0, "posterior", "pool", "none"
    refill, refill_max_draws, refill_min_prompts, refill_at_cap, refill_max_age = (
        False,
        4,
        None,
        "partial",
        0,
    )
    max_completion_length, engine = 256, "transformers"
    adaptive_temperature_tau, hapo_quantile, hapo_sign = 0.0, 0.8, "signed"
    mask_truncated_completions, token_selection, top_entropy_quantile = False, "none", 1.0
    token_denominator, entropy_coef, reward_kl, kl_rows = "kept_tokens", 0.0, 0.0, "trained"
    old_logprobs, importance_correction, sync_ref_model = "engine", "none", False
    importance_cap, importance_floor, completions_every = None, None, 0
    replay_share = 0.0

    # -- the run
    max_evaluations: int | None = setting(
        None,
        "End the run after the step in which the denoiser has been evaluated so often for "
        "rollouts, counted in rows; a guidance pair is one.",
        stage=RUN,
        decides=LENGTH,
    )

    # -- denoise
    plan: dict[str, Any] | str | None = setting(
        None,
        "The denoising chain: num_steps, rule, level, and schedules of stochastic, branching "
        "and trained steps; see rl/config/denoising_plans.py.",
        stage=DENOISE,
        decides=ROLLOUTS,
    )
    guidance_scale: float | None = setting(
        5.0,
        "Classifier-free guidance, in rollouts and in training; 1: none. null: the pipeline's"
        " default, for pipelines without this argument.",
        stage=DENOISE,
        decides=ROLLOUTS,
    )
    negative_prompt: str | None = setting(
        None,
        "What guidance leads away from, one text for all prompts. Default: the pipeline's.",
        stage=DENOISE,
        decides=ROLLOUTS,
    )
    negative_prompt_column: str | None = setting(
        None,
        "Column of the data with a negative prompt for each prompt.",
        stage=DENOISE,
        decides=ROLLOUTS,
    )
    pipeline_kwargs: dict[str, Any] | str | None = setting(
        None,
        "Further arguments of the pipeline's call and of its encode_prompt, such as "
        "{true_cfg_scale: 4.0}, {num_frames: 49} or {clip_skip: 1}; those that would have no "
        "effect are refused.",
        stage=DENOISE,
        decides=ROLLOUTS,
    )
    height: int | None = setting(
        None,
        "Pixels. Default: the pipeline's.",
        stage=DENOISE,
        decides=ROLLOUTS,
    )
    width: int | None = setting(
        None,
        "Pixels. Default: the pipeline's.",
        stage=DENOISE,
        decides=ROLLOUTS,
    )
    shift: float | None = setting(
        None,
        "Shift of a flow model's noise levels, static, in the place of the scheduler's own "
        "(FLUX's is dynamic). Default: the scheduler's.",
        stage=DENOISE,
        decides=ROLLOUTS,
    )
    shared_start_noise: bool = setting(
        False,
        "All samples of a prompt start from one noise, drawn for the prompt and draw; "
        "validation does not. With as many samples for every prompt, branch: {at: "
        "stochastic_start} of that many children in plan has the same law and costs less.",
        stage=DENOISE,
        decides=ROLLOUTS,
    )

    # -- reward
    reward_device: str | None = setting(
        None,
        "Where the models of rewards by name run, such as cpu or cuda:1. Default: the run's.",
        stage=REWARD,
        decides=TRAINING,
    )

    # -- compare rollouts
    baseline: str = setting(
        "prompt",
        "What a sample is compared with.",
        stage=ADVANTAGE,
        decides=ROLLOUTS,
    )
    history_steps: int = setting(
        8,
        "Earlier steps that baseline history remembers, or rewards of a prompt that buffer does.",
        stage=ADVANTAGE,
        decides=ROLLOUTS,
        only=OWN,
    )
    credit_scale: str | None = setting(
        None,
        "Divide credits by the std of the rewards of the prompt or of the batch, or not at "
        "all. Default: batch; none for history and buffer, which are scaled already.",
        stage=ADVANTAGE,
        decides=ROLLOUTS,
        choices=CREDIT_SCALES,
    )
    advantage_clip: float | None = setting(
        5.0,
        "Cut advantages off here, after rows were chosen by them. null: nowhere.",
        stage=ADVANTAGE,
        decides=TRAINING,
    )
    sibling_within_share: float = setting(
        1.0,
        "Share of the variance of a prompt's rewards that lies within branches; siblings "
        "count that much less in the posterior (probe_branch_points measures it). 1: as "
        "independent.",
        stage=ADVANTAGE,
        decides=ROLLOUTS,
        only=POSTERIOR,
    )

    # -- choose the rows and tokens that train
    branch_threshold: float | None = setting(
        None,
        "Only the best and the worst sample of a branch train; the best from this advantage "
        "up, the worst from minus it down. 0: both unless all are equal. Default: all samples"
        " train.",
        stage=KEEP,
        decides=ROLLOUTS,
    )

    # -- loss and objective
    loss: str | None = setting(
        None,
        "What is differentiated: clipped ratios of denoising steps.",
        stage=LOSS,
        decides=TRAINING,
        choices=("grpo",),
    )
    length_weight: str | None = setting(
        None,
        "How a row's weight is spread over its denoising steps: row_mean (1/steps, the "
        "default) or row_sum.",
        stage=LOSS,
        decides=TRAINING,
        choices=("row_mean", "row_sum"),
    )
    logprob_reduction: str = setting(
        "sum",
        "Ratios are of log-probabilities summed over a latent, or of their mean (published).",
        stage=LOSS,
        decides=TRAINING,
        choices=REDUCTIONS,
    )

    # -- stay near the starting policy
    kl_reduction: str | None = setting(
        None,
        "The KL that beta weighs: sum over a latent, mean of its elements, or flow_grpo (the "
        "mean times the step size, as released). Default: as logprob_reduction.",
        stage=KL,
        decides=TRAINING,
        choices=KL_REDUCTIONS,
    )

    # -- loss and objective
    noise_weight: str = setting(
        "none",
        "Weight of a denoising step: none, or std (its noise, mean 1 over all steps but the last).",
        stage=LOSS,
        decides=TRAINING,
        choices=NOISE_WEIGHTS,
    )
    edge_weight: str = setting(
        "leaves",
        "Weight of a denoising step that several samples of a branch share: leaves (once for "
        "each, its share of the expected reward's gradient) or once (as BranchGRPO's release "
        "trains it).",
        stage=LOSS,
        decides=TRAINING,
        choices=EDGE_WEIGHTS,
    )

    # -- validate, log and save
    ema_decay: float = setting(
        0.0,
        "Validate and save a moving average of the weights, with this decay. 0: off.",
        stage=WATCH,
        decides=ROLLOUTS,
    )
    validation_steps: int | None = setting(
        None,
        "Denoising steps of validation samples. Default: the plan's.",
        stage=WATCH,
        decides=TRAINING,
    )
    images_every: int = setting(
        0,
        "Steps between pictures of training samples, beside the first step's; 0: none.",
        stage=WATCH,
        decides=NOTHING,
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
