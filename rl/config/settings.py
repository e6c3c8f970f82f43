"""Every setting of a run: fields, their help and their declarations, and nothing else.

`SharedSettings` adds to `transformers.TrainingArguments` what runs of every policy share. On it stand,
side by side, `LanguageSettings` and `DiffusionSettings` (`rl/config/diffusion_settings.py`). Methods
(`rl/config/methods.py`) and checks (`rl/config/checks.py`) read these, and a run is made with
`RolloutConfig` (`rl/config/language.py`) or `DenoisingConfig` (`rl/config/diffusion.py`), which fill in
defaults and check.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from rl.config.declare import (
    LENGTH,
    NOTHING,
    OWN,
    OWN_ONE,
    PATIENCE,
    ROLLOUTS,
    TRAINING,
    Only,
    is_,
    on,
    setting,
)
from rl.objective.advantages import FALLBACKS
from rl.objective.advantages import SCALES as REWARD_SCALES
from rl.objective.kl import KL_LOSSES
from rl.objective.token_selection import SCOPES
from rl.objective.weights import DENOMINATORS, LENGTH_RULES
from samplers.allocation import align_total
from samplers.selection.scores import SCORES

# -- stages of the pipeline, as `--help` groups settings

RUN = "the run"
SELECT = "select prompts"
START = "choose starts"
ALLOCATE = "allocate rollouts"
STOP = "stop early, and refill"
PROMPTS = "read prompts"
GENERATE = "generate"
VLLM = "generate with vLLM"
DENOISE = "denoise"
REWARD = "reward"
ADVANTAGE = "compare rollouts"
KEEP = "choose the rows and tokens that train"
LOSS = "loss and objective"
KL = "stay near the starting policy"
CORRECT = "correct for an engine that differs"
UPDATE = "update the weights"
WATCH = "validate, log and save"

STAGES = (
    *(
        RUN,
        SELECT,
        START,
        ALLOCATE,
        STOP,
        PROMPTS,
        GENERATE,
        VLLM,
        DENOISE,
        REWARD,
        ADVANTAGE,
        KEEP,
        LOSS,
    ),
    *(KL, CORRECT, UPDATE, WATCH),
)
"""In the order of a training step."""

# -- when settings act that need another one

POSTERIOR = Only(
    lambda c, method: (
        c.stopping in ("early", "early_unbiased")
        or c.retire_above is not None
        or any(
            method(c, stage).reads_success
            for stage in ("selector", "starts", "allocator")
            if hasattr(c, stage)
        )
        or bool(getattr(c, "advantage", None) and method(c, "advantage").reads_posterior)
    ),
    "a selector, allocator or advantage that reads the posterior, stopping: early, retire_above or "
    "starts",
    unset=("flat",),
)
BELIEVING = Only(
    lambda c, method: method(c, "selector").reads_success,
    "a selector that reads the posterior, such as vade",
    unset=(0,),
)
BUDGETS = Only(lambda c, _: c.allocator != "uniform", "an allocator other than uniform", unset=(1,))
DROPS_ROWS = Only(
    lambda c, _: (
        c.down_sampling != "none"
        or getattr(c, "pilot_use", "pool") == "discard"
        or getattr(c, "branch_threshold", None) is not None
    ),
    "down_sampling, or another setting that drops rows",
)
BY_TRANSFORMERS = Only(
    lambda c, _: getattr(c, "engine", "transformers") == "transformers", "engine: transformers"
)
COLOCATED = Only(
    lambda c, _: c.engine == "vllm" and c.vllm_mode == "colocate",
    "engine: vllm with vllm_mode: colocate",
)
SERVER = Only(
    lambda c, _: c.engine == "vllm" and c.vllm_mode == "server",
    "engine: vllm with vllm_mode: server",
)
HAPO = Only(
    lambda c, _: c.loss == "hapo" or bool(c.adaptive_temperature_tau),
    "loss: hapo, or adaptive_temperature_tau above 0",
)
K3_WEIGHTED = Only(
    lambda c, _: bool(c.beta) and c.kl == "k3_weighted", "beta above 0 and kl: k3_weighted"
)
BETA = on("beta", "beta above 0")
CORRECTION = on("importance_correction", "importance_correction other than none")
MOVING = on("sync_ref_model", "sync_ref_model: true")
PILOTS = on("pilot_rollouts", "pilot_rollouts of at least 1")
REFILL = on("refill", "refill: true")
TOKENS = on("token_selection", "token_selection: d3s or entropy")

IMPORTANCE_CORRECTIONS = (
    "none",
    *("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
)


@dataclass
class SharedSettings(TrainingArguments):
    """What runs of every policy share.

    Fields of `TrainingArguments` keep their meaning, with these readings: one step is one collection
    of rollouts with `updates_per_step` optimizer updates; `per_device_train_batch_size` is the rows
    of a micro-batch and changes speed and memory, never the update; gradient accumulation is
    internal, so `gradient_accumulation_steps` must stay 1.
    """

    # -- the run
    max_generated_tokens: int | None = setting(
        None,
        "End the run after the step in which so many tokens have been generated, whatever "
        "became of them; schedules of d3s follow it. Default: max_steps alone.",
        stage=RUN,
        decides=LENGTH,
    )
    max_empty_steps: int = setting(
        20,
        "Steps in a row without any training signal before the run stops.",
        stage=RUN,
        decides=LENGTH,
    )
    if_run_exists: str = setting(
        "error",
        "What to do when output_dir already holds a run and resume_from_checkpoint is not "
        "set: stop with an error, or resume (go on from its last whole checkpoint if model, "
        "data, rewards and settings are the same, longer runs included; else an error).",
        stage=RUN,
        decides=NOTHING,
        choices=("error", "resume"),
    )

    # -- select prompts
    selector: str = setting(
        "uniform",
        "Which prompts are rolled out.",
        stage=SELECT,
        decides=ROLLOUTS,
    )
    prompts_per_step: int = setting(
        32,
        "Prompts of one step; with refill, groups that carry gradient.",
        stage=SELECT,
        decides=ROLLOUTS,
    )
    selection_score: str = setting(
        "vade",
        "What the selector prefers, p being the pass rate: vade p(1-p)^2, or variance p(1-p).",
        stage=SELECT,
        decides=ROLLOUTS,
        choices=tuple(SCORES),
        only=OWN,
    )
    selection_candidates: int | None = setting(
        None,
        "Candidates drawn for each prompt that is chosen. Default: all prompts.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=OWN,
    )
    selection_target: float = setting(
        0.5,
        "Pass rate that mopps looks for.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=OWN,
    )
    selection_column: str | None = setting(
        None,
        "Column of the data set: pass rates of the starting policy for static_band, "
        "embeddings for diverse.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=OWN,
    )
    selection_gamma: float | None = setting(
        None,
        "Weight of diverse's distances, in score per distance; no default fits all embeddings.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=OWN,
    )
    band_low: float = setting(
        0.3,
        "Lower end of the band.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=OWN,
    )
    band_high: float = setting(
        0.7,
        "Upper end of the band.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=OWN,
    )
    band_short: str = setting(
        "nearest",
        "What happens if the band holds too few prompts: an error, the prompts nearest to the"
        " band, or any prompts.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=OWN,
        choices=("raise", "nearest", "uniform"),
    )
    retire_above: float | None = setting(
        None,
        "Retire a prompt whose expected pass rate is at least this, with any selector: it leaves the "
        "pool until it is forgotten, but for retire_share of the picks. Published 0.9. Default: none "
        "is retired.",
        stage=SELECT,
        decides=ROLLOUTS,
    )
    retire_share: float = setting(
        0.02,
        "Share of the picks that go to retired prompts all the same.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=on("retire_above", "retire_above"),
    )
    greso_explore: float | None = setting(
        None,
        "Skip a prompt, when its turn comes, with probability 1 - greso_explore^c, c being its visits "
        "in a row whose rewards were all alike (GRESO, with any selector). Default: none is skipped.",
        stage=SELECT,
        decides=ROLLOUTS,
    )
    posterior_decay_chosen: float = setting(
        0.2,
        "Share of a chosen prompt's counts that is kept from step to step.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=POSTERIOR,
    )
    posterior_decay_rest: float = setting(
        0.999,
        "Share of the other prompts' counts that is kept from step to step.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=POSTERIOR,
    )
    posterior_prior: str | None = setting(
        None,
        "What is expected of a prompt before it is visited, which is most of what is known of it in a "
        "short run. Default: pooled where anything reads the posterior, but flat under "
        "knapsack_released.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=POSTERIOR,
    )
    posterior_prior_column: list[str] | None = setting(
        None,
        "Columns of the data set whose value is a prompt's kind (level, source), for posterior_prior "
        "column; or which hold embeddings, for features. Values of fewer than 8 prompts fall back to "
        "the whole pool.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=OWN,
    )
    posterior_kappa: float | None = setting(
        None,
        "How many rollouts the prior counts as. Default: estimated, between 2 and 50, from how much "
        "prompts differ from what was expected of them.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=OWN,
    )
    posterior_prior_decay: float = setting(
        0.95,
        "Share of what the prior has learnt that is kept from step to step.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=OWN,
    )
    posterior_prior_components: int = setting(
        16,
        "Principal components of the features that the prior's regression is given.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=OWN,
    )
    posterior_prior_penalty: float = setting(
        20.0,
        "Ridge penalty of the prior's regression, in rollouts.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=OWN,
    )
    uniform_share: float | None = setting(
        None,
        "Share of each step's prompts that is drawn uniformly instead, so that what was believed "
        "hopeless is tried again. Default: 0.03 where the selector reads a posterior whose prior "
        "learns; else 0.",
        stage=SELECT,
        decides=ROLLOUTS,
        only=BELIEVING,
    )
    success_above: float | None = setting(
        None,
        "A reward above this is a success of 1, any other of 0: for the posterior, pass rates"
        " and what a group is called. Default: a reward's share of full marks, the sum of the"
        " positive reward weights; from the first reward outside [0, full marks] on, whether "
        "it is above the mean of the rewards of all earlier steps.",
        stage=SELECT,
        decides=ROLLOUTS,
    )

    # -- allocate rollouts
    rollouts_per_prompt: int = setting(
        8,
        "Mean rollouts per prompt: a step generates prompts_per_step times as many, pilots "
        "included. With a stopping rule the most, on average.",
        stage=ALLOCATE,
        decides=ROLLOUTS,
    )
    rollouts_multiple_of: int = setting(
        1,
        "Round the rollouts of a step down to a multiple of this before they are allocated.",
        stage=ALLOCATE,
        decides=ROLLOUTS,
    )
    allocator: str = setting(
        "uniform",
        "How many rollouts each prompt gets. All but uniform give prompts different budgets, "
        "which change the objective under some advantages; then advantage is leave_one_out "
        "where none is written, and a warning says what budgets change.",
        stage=ALLOCATE,
        decides=ROLLOUTS,
    )
    allocation_scale: str = setting(
        "posterior_std",
        "How allocators that go by the reward's std estimate it.",
        stage=ALLOCATE,
        decides=ROLLOUTS,
        only=OWN,
    )
    budget_min: int | None = setting(
        None,
        "Fewest rollouts of a prompt. Default: what the allocator needs; 2 where rollouts of "
        "a prompt are compared with each other, because one alone would weigh nothing; else "
        "1.",
        stage=ALLOCATE,
        decides=ROLLOUTS,
        only=BUDGETS,
    )
    budget_max: int | None = setting(
        None,
        "Most rollouts of a prompt. Default: no cap.",
        stage=ALLOCATE,
        decides=ROLLOUTS,
        only=BUDGETS,
    )
    gvm_alpha: float = setting(
        1e-3,
        "Regulariser alpha of gvm; 0, for none, needs pilots.",
        stage=ALLOCATE,
        decides=ROLLOUTS,
        only=OWN,
    )
    gvm_beta: float = setting(
        2.0,
        "Exponent beta of gvm, at least 2.",
        stage=ALLOCATE,
        decides=ROLLOUTS,
        only=OWN,
    )

    # -- stop early, and refill
    stopping: str = setting(
        "none",
        "When a group ends before its budget is used up. All but early_unbiased change the "
        "objective.",
        stage=STOP,
        decides=ROLLOUTS,
    )
    stopping_round_size: int | None = setting(
        None,
        "Rollouts of a prompt in a round, after which the stopping rule looks again.",
        stage=STOP,
        decides=ROLLOUTS,
        only=on("stopping", "stopping other than none"),
    )
    stopping_needed: int | None = setting(
        None,
        "Passes that positive waits for (default 1); rows that balanced can keep (default 4).",
        stage=STOP,
        decides=ROLLOUTS,
        only=OWN_ONE,
    )
    stopping_threshold: float = setting(
        0.5,
        "Chance of becoming mixed below which early and early_unbiased stop a group.",
        stage=STOP,
        decides=ROLLOUTS,
        only=OWN,
    )
    stopping_rho: float = setting(
        0.5,
        "Chance that early_unbiased lets a group go on all the same, which then weighs 1/rho.",
        stage=STOP,
        decides=ROLLOUTS,
        only=OWN,
    )

    # -- read prompts
    id_column: str | None = setting(
        None,
        "Column that identifies a prompt. Default: a content hash.",
        stage=PROMPTS,
        decides=TRAINING,
    )
    duplicates: str = setting(
        "error",
        "What happens to rows that repeat a prompt and its reference answer: an error, one of"
        " them stays, or each is a prompt of its own.",
        stage=PROMPTS,
        decides=ROLLOUTS,
        choices=("error", "drop", "keep"),
    )

    # -- generate
    generation_batch_size: int = setting(
        256,
        "Most rollouts generated together on one process; more are faster and take more memory.",
        stage=GENERATE,
        decides=NOTHING,
        only=BY_TRANSFORMERS,
    )

    # -- reward
    reward_weights: list[float] | None = setting(
        None,
        "One weight per reward function. Default: 1.",
        stage=REWARD,
        decides=ROLLOUTS,
    )
    reward_timeout: float | None = setting(
        60.0,
        "Seconds that a call of a reward function may take. It is interrupted even where it "
        "holds the interpreter; code that runs what the policy wrote needs `isolated = True` "
        "on the function.",
        stage=REWARD,
        decides=PATIENCE,
    )
    reward_retries: int = setting(
        0,
        "How often a call is repeated for reward functions marked remote.",
        stage=REWARD,
        decides=PATIENCE,
    )
    max_failed_share: float = setting(
        0.0,
        "Share of a step's rollouts whose reward may fail before the run stops.",
        stage=REWARD,
        decides=PATIENCE,
    )

    # -- choose the rows and tokens that train
    down_sampling: str = setting(
        "none",
        "Which rows train.",
        stage=KEEP,
        decides=TRAINING,
    )
    row_fraction_initial: float = setting(
        0.25,
        "Share of rows d3s keeps at the start; project default, not from the paper.",
        stage=KEEP,
        decides=TRAINING,
        only=OWN,
    )
    row_fraction_final: float = setting(
        1.0,
        "Share of rows d3s keeps at the end.",
        stage=KEEP,
        decides=TRAINING,
        only=OWN,
    )
    rows_per_prompt: int | None = setting(
        None,
        "Rows of each prompt that are kept.",
        stage=KEEP,
        decides=TRAINING,
        only=OWN,
    )
    weight_rows: str = setting(
        "trained",
        "A prompt's weight is shared by its rows that reach the loss (trained), or by all its"
        " rows (drawn), so that prompts with dropped rows count less.",
        stage=KEEP,
        decides=TRAINING,
        choices=("trained", "drawn"),
        only=DROPS_ROWS,
    )

    # -- loss and objective
    objective: str | None = setting(
        None,
        "What the update ascends. Budgets do not change mean and log under an advantage that "
        "does not depend on them; they do change em, because a prompt without an accepted "
        "rollout is not in it. Default: the preset's.",
        stage=LOSS,
        decides=TRAINING,
    )
    epsilon: float | None = setting(
        None,
        "Lower clip range of the ratio. Default: 0.2; 3e-4 for ratios of whole rows (gspo).",
        stage=LOSS,
        decides=TRAINING,
    )
    epsilon_high: float | None = setting(
        None,
        "Upper clip range. Default: 0.2; dapo 0.28; gspo 4e-4.",
        stage=LOSS,
        decides=TRAINING,
    )
    delta: float | None = setting(
        None,
        "Cap of the ratio where the advantage is negative (dual clip).",
        stage=LOSS,
        decides=TRAINING,
    )
    log_floor: float = setting(
        0.05,
        "Smallest pass rate the log objective divides by.",
        stage=LOSS,
        decides=TRAINING,
        only=is_("objective", "log"),
    )

    # -- stay near the starting policy
    beta: float = setting(
        0.0,
        "Weight of the KL to the policy before training in the loss; 0: none, and no reference.",
        stage=KL,
        decides=TRAINING,
    )

    # -- correct for an engine that differs
    max_mismatch: float | None = setting(
        None,
        "Largest mean difference between the log-probabilities of trainer and engine before a"
        " step's first update, in nats per token (diffusion: per element of a latent); above "
        "it the run stops, or warns with importance_correction. Default: 1e-3 in float32, "
        "else 0.05. inf: no limit.",
        stage=CORRECT,
        decides=TRAINING,
    )

    # -- update the weights
    updates_per_step: int = setting(
        1,
        "Optimizer updates on one collection of rollouts; each takes its part of the rows.",
        stage=UPDATE,
        decides=TRAINING,
    )
    num_iterations: int = setting(
        1,
        "How often every row is trained on.",
        stage=UPDATE,
        decides=TRAINING,
    )
    learning_rate: float = setting(
        1e-6,
        "The initial learning rate.",
        stage=UPDATE,
        decides=TRAINING,
    )
    lr_scheduler_type: str = setting(
        "constant",
        "The learning-rate schedule.",
        stage=UPDATE,
        decides=TRAINING,
    )
    weight_decay: float = setting(
        0.0,
        "Weight decay.",
        stage=UPDATE,
        decides=TRAINING,
    )
    bf16: bool | None = setting(  # type: ignore[assignment]
        None,
        "bf16 autocast. Default: on a GPU that has it, yes; else no.",
        stage=UPDATE,
        decides=TRAINING,
    )
    activation_checkpointing: bool | None = setting(
        None,
        "Recompute activations in the backward pass: less memory, slower. "
        "gradient_checkpointing, its older name, is the same.",
        stage=UPDATE,
        decides=NOTHING,
    )

    # -- validate, log and save
    eval_rollouts_per_prompt: int = setting(
        4,
        "Sampled rollouts of each validation prompt, at the training temperature, beside a "
        "greedy one.",
        stage=WATCH,
        decides=TRAINING,
    )
    logging_steps: float = setting(
        1,
        "Steps between log lines.",
        stage=WATCH,
        decides=NOTHING,
    )
    logging_nan_inf_filter: bool = setting(
        False,
        "Leave NaN out of logged means. Off: a NaN loss stops the run.",
        stage=WATCH,
        decides=NOTHING,
    )

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except TypeError as error:  # of a mapping's keys, such as those of accelerator_config
            raise ValueError(str(error)) from error

    @property
    def rollouts_per_step(self) -> int:
        """Rollouts generated in one step, pilots included."""
        return align_total(
            self.prompts_per_step * self.rollouts_per_prompt, self.rollouts_multiple_of
        )

    def to_dict(self) -> dict[str, Any]:
        """As of the base class; for trackers also `of_run`, what the run is made of besides."""
        return super().to_dict() | getattr(self, "of_run", {})


@dataclass
class LanguageSettings(SharedSettings):
    """What runs of a language model have besides."""

    # -- the run
    trainer: str = setting(
        "raft++",
        "Preset that fills advantage, loss, objective and clips where they are left out.",
        stage=RUN,
        decides=TRAINING,
    )

    # -- allocate rollouts
    gvm_gradient_norm: str = setting(
        "none",
        "Gradient norms in the gvm rule: none, mean (Algorithm 2) or rms (the definition), "
        "measured at the lm_head on accepted rollouts. Norms of discarded pilots act in their"
        " own step, as published; all others from the next step on, because budgets that "
        "depend on rollouts that train would turn the gradient.",
        stage=ALLOCATE,
        decides=ROLLOUTS,
        choices=("none", "mean", "rms"),
        only=is_("allocator", "gvm"),
    )
    pilot_rollouts: int = setting(
        0,
        "Rollouts that every prompt gets before the rest is allocated.",
        stage=ALLOCATE,
        decides=ROLLOUTS,
    )
    pilot_estimate: str = setting(
        "posterior",
        "What the rest is allocated by: all that is known (posterior), or this step's pilots "
        "alone, as published (pilot).",
        stage=ALLOCATE,
        decides=ROLLOUTS,
        choices=("posterior", "pilot"),
        only=PILOTS,
    )
    pilot_use: str = setting(
        "pool",
        "What becomes of pilots.",
        stage=ALLOCATE,
        decides=ROLLOUTS,
        only=PILOTS,
    )

    # -- choose starts
    starts: str = setting(
        "none",
        "Where the rollouts of a prompt begin: at its end, or part-way along something done for it. A "
        "prompt that hardly passes starts along a success, one that hardly fails along a failure; the "
        "start trains nothing. Changes the objective: what is ascended is the mean reward over prompts "
        "and starts, which is that over prompts on visits without a start.",
        stage=START,
        decides=ROLLOUTS,
    )
    starts_column: str | None = setting(
        None,
        "Column of reference solutions, as text; a prompt without one has None. They serve until the "
        "prompt has a success of its own.",
        stage=START,
        decides=ROLLOUTS,
        only=OWN,
    )
    starts_delta: float = setting(
        0.2,
        "How far a prompt's pass rate must be from one half for a start (project default, not from "
        "the papers).",
        stage=START,
        decides=ROLLOUTS,
        only=OWN,
    )
    starts_until: float = setting(
        0.3,
        "Pass rate without a start past which there is no start along a success; none along a failure "
        "below 1 minus this (project default, not from the papers).",
        stage=START,
        decides=ROLLOUTS,
        only=OWN,
    )
    starts_fraction: float = setting(
        0.5,
        "Share of the success or failure that a prompt's first start has (project default, not from "
        "the papers).",
        stage=START,
        decides=ROLLOUTS,
        only=OWN,
    )
    starts_max_fraction: float = setting(
        0.9,
        "Largest such share (project default, not from the papers).",
        stage=START,
        decides=ROLLOUTS,
        only=OWN,
    )
    starts_step: float = setting(
        0.2,
        "How much of one half minus the group's pass rate is added to that share after each group, or "
        "taken off it for failures (project default, not from the papers).",
        stage=START,
        decides=ROLLOUTS,
        only=OWN,
    )
    starts_plain_share: float = setting(
        0.2,
        "Share of a prompt's visits that never have a start (project default, not from the papers).",
        stage=START,
        decides=ROLLOUTS,
        only=OWN,
    )
    starts_memory_tokens: int = setting(
        2_000_000,
        "Tokens of all remembered successes and failures together; those used longest ago are "
        "forgotten. 0: only reference solutions (project default, not from the papers).",
        stage=START,
        decides=ROLLOUTS,
        only=OWN,
    )
    starts_at: str = setting(
        "token",
        "Where a start may end: after any token, or at the end of a line.",
        stage=START,
        decides=ROLLOUTS,
        choices=("token", "line"),
        only=OWN,
    )

    # -- stop early, and refill
    refill: bool = setting(
        False,
        "Draw more prompts until prompts_per_step groups have both passes and failures "
        "(DAPO's filter).",
        stage=STOP,
        decides=ROLLOUTS,
    )
    refill_max_draws: int = setting(
        4,
        "Most groups drawn for each group wanted; those of the buffer are not drawn again.",
        stage=STOP,
        decides=ROLLOUTS,
        only=REFILL,
    )
    refill_min_prompts: int | None = setting(
        None,
        "Draw at least so many prompts in a round. More than are missing means fewer rounds and some "
        "groups too many. Default: as many as are missing.",
        stage=STOP,
        decides=ROLLOUTS,
        only=REFILL,
    )
    refill_at_cap: str = setting(
        "partial",
        "What happens if groups are still missing: an error, an update on fewer that divides "
        "by fewer (partial), or one that divides by all (pad).",
        stage=STOP,
        decides=ROLLOUTS,
        only=REFILL,
        choices=("raise", "partial", "pad"),
    )
    refill_max_age: int = setting(
        0,
        "Steps for which surplus groups wait to be trained on; 0: they are dropped.",
        stage=STOP,
        decides=ROLLOUTS,
        only=REFILL,
    )

    # -- read prompts
    max_prompt_length: int | None = setting(
        None,
        "Most tokens of a prompt. Default: no limit.",
        stage=PROMPTS,
        decides=ROLLOUTS,
    )
    overlong_prompts: str = setting(
        "error",
        "What happens to longer prompts: an error, their end is kept (truncate), or they are "
        "left out (drop).",
        stage=PROMPTS,
        decides=ROLLOUTS,
        choices=("error", "truncate", "drop"),
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(
        None,
        "Arguments of the chat template, such as {enable_thinking: false}; on the command "
        "line as JSON. A column of this name in the data wins.",
        stage=PROMPTS,
        decides=ROLLOUTS,
    )

    # -- generate
    max_completion_length: int = setting(
        256,
        "Most tokens of a completion, its start included where it has one (starts).",
        stage=GENERATE,
        decides=ROLLOUTS,
    )
    temperature: float = setting(
        1.0,
        "Sampling temperature of training rollouts.",
        stage=GENERATE,
        decides=ROLLOUTS,
    )
    top_p: float = setting(
        1.0,
        "Nucleus sampling: smallest set of at least this probability.",
        stage=GENERATE,
        decides=ROLLOUTS,
    )
    top_k: int = setting(
        0,
        "Sample from the k likeliest tokens; 0: all.",
        stage=GENERATE,
        decides=ROLLOUTS,
    )
    min_p: float = setting(
        0.0,
        "Drop tokens below this share of the likeliest one's probability.",
        stage=GENERATE,
        decides=ROLLOUTS,
    )
    repetition_penalty: float = setting(
        1.0,
        "Divides positive logits of tokens seen before and multiplies negative ones. Like "
        "top_k it decides what is drawn; log-probabilities and the update are those of the "
        "policy without it.",
        stage=GENERATE,
        decides=ROLLOUTS,
    )
    verdict_every: int | None = setting(
        None,
        "Tokens between two questions to the rewards whether a rollout is decided: whether it earns the "
        "same whatever follows. Such a rollout ends there, with the reward that it would have had. "
        "Needs a `decided` on every reward with a weight (docs/verdicts.md); the first step's rollouts "
        "are finished, to check it. 0: finish every rollout. Default: 8 where that leaves the expected "
        "gradient as it is (length_weight token_sum, no beta and no entropy_coef), else 0.",
        stage=GENERATE,
        decides=ROLLOUTS,
    )
    generation_kwargs: dict[str, Any] | str | None = setting(
        None,
        "TRL's: keys of transformers or vLLM become the settings of their meaning "
        "(max_new_tokens: max_completion_length, ...) or are refused.",
        stage=GENERATE,
        decides=TRAINING,
    )
    stop: list[str] | None = setting(
        None,
        "A completion ends when it contains one of these.",
        stage=GENERATE,
        decides=ROLLOUTS,
    )
    adaptive_temperature_tau: float = setting(
        0.0,
        "HAPO: draw tokens of high entropy hotter and others colder by up to this share of "
        "the temperature, judged by the entropies of the step before. 0: off; published 0.1.",
        stage=GENERATE,
        decides=ROLLOUTS,
    )
    hapo_quantile: float = setting(
        0.8,
        "HAPO: quantile of log entropies at which nothing changes.",
        stage=GENERATE,
        decides=ROLLOUTS,
        only=HAPO,
    )
    hapo_sign: str = setting(
        "signed",
        "HAPO: tokens of low entropy count as far below the quantile (signed, as in the "
        "paper), or as far from it as those of high entropy (released: its code loses the "
        "sign, and draws both hotter).",
        stage=GENERATE,
        decides=ROLLOUTS,
        only=HAPO,
        choices=("signed", "released"),
    )
    engine: str = setting(
        "transformers",
        "What generates: transformers (the model that trains) or vllm (needs a GPU).",
        stage=GENERATE,
        decides=ROLLOUTS,
        choices=("transformers", "vllm"),
    )
    skip_special_tokens: bool = setting(
        True,
        "Leave special tokens out of the texts that rewards, validation and tables get, as "
        "TRL does; nothing else is changed in them.",
        stage=GENERATE,
        decides=ROLLOUTS,
    )

    # -- generate with vLLM
    vllm_mode: str = setting(
        "colocate",
        "Where vLLM runs: colocate (one beside each process, on its GPU) or server (one apart).",
        stage=VLLM,
        decides=NOTHING,
        choices=("colocate", "server"),
        only=is_("engine", "vllm"),
    )
    vllm_server_base_url: str | None = setting(
        None,
        "Address of the vLLM server. Default: http://, vllm_server_host and vllm_server_port.",
        stage=VLLM,
        decides=NOTHING,
        only=SERVER,
    )
    vllm_server_host: str = setting(
        "localhost",
        "Host of the vLLM server.",
        stage=VLLM,
        decides=NOTHING,
        only=SERVER,
    )
    vllm_server_port: int = setting(
        8000,
        "Port of the vLLM server.",
        stage=VLLM,
        decides=NOTHING,
        only=SERVER,
    )
    vllm_group_port: int = setting(
        51216,
        "Free port of this machine, over which weights go to the vLLM server.",
        stage=VLLM,
        decides=NOTHING,
        only=SERVER,
    )
    vllm_tensor_parallel_size: int = setting(
        1,
        "Processes that share one colocated vLLM, each holding a part of its weights; it "
        "divides their number. A server gets --tensor-parallel-size when it is started.",
        stage=VLLM,
        decides=NOTHING,
        only=COLOCATED,
    )
    vllm_server_timeout: float = setting(
        240.0,
        "Seconds to wait for the server to come up.",
        stage=VLLM,
        decides=NOTHING,
        only=SERVER,
    )
    vllm_gpu_memory_utilization: float = setting(
        0.3,
        "Share of the GPU's memory that a colocated vLLM takes.",
        stage=VLLM,
        decides=NOTHING,
        only=COLOCATED,
    )
    vllm_max_model_length: int | None = setting(
        None,
        "Prompt and completion of a colocated vLLM, in tokens. Default: the model's.",
        stage=VLLM,
        decides=NOTHING,
        only=COLOCATED,
    )
    vllm_enable_sleep_mode: bool = setting(
        False,
        "A colocated vLLM gives its memory back while the trainer updates.",
        stage=VLLM,
        decides=NOTHING,
        only=COLOCATED,
    )

    # -- compare rollouts
    advantage: str | None = setting(
        None,
        "How rewards become advantages. Default: the preset's, but dr_grpo and hapo bring "
        "their own; leave_one_out in the place of grpo and centred where budgets differ, "
        "because it keeps the objective then.",
        stage=ADVANTAGE,
        decides=TRAINING,
    )
    scale_rewards: str | None = setting(
        None,
        "What advantage grpo divides by: the std of the prompt's rewards (group, the default;"
        " or true), of all rewards of the step (batch), or nothing (none, which is advantage "
        "centred; or false).",
        stage=ADVANTAGE,
        decides=TRAINING,
        choices=REWARD_SCALES,
    )
    std_correction: int = setting(
        1,
        "1 for the unbiased std (TRL, verl, PODS), 0 for the population std, wherever an "
        "advantage divides by one.",
        stage=ADVANTAGE,
        decides=TRAINING,
        only=OWN,
    )
    std_eps: float = setting(
        1e-4,
        "Added to the std that an advantage divides by (TRL, PODS; verl 1e-6).",
        stage=ADVANTAGE,
        decides=TRAINING,
        only=OWN,
    )
    multi_objective_aggregation: str = setting(
        "sum_then_normalize",
        "How several rewards become one advantage; normalize_then_sum (GDPO) needs advantage grpo.",
        stage=ADVANTAGE,
        decides=TRAINING,
    )
    stratum_alpha: float = setting(
        0.6,
        "stratified: share of the comparison within the stratum; the rest is within the prompt.",
        stage=ADVANTAGE,
        decides=TRAINING,
        only=OWN,
    )
    stratum_fallback: str = setting(
        "blend",
        "stratified: strata of one rollout get no advantage of their own (blend) or grpo's "
        "(group).",
        stage=ADVANTAGE,
        decides=TRAINING,
        only=OWN,
        choices=FALLBACKS,
    )

    # -- choose the rows and tokens that train
    mask_truncated_completions: bool = setting(
        False,
        "Leave completions that hit max_completion_length out of the loss. They stay in the "
        "comparison with the others, whose weights do not change; token_mean divides by the "
        "tokens of the others.",
        stage=KEEP,
        decides=TRAINING,
    )
    token_selection: str = setting(
        "none",
        "Which tokens of these rows train.",
        stage=KEEP,
        decides=TRAINING,
    )
    token_fraction_initial: float = setting(
        0.2,
        "Share of tokens at the start; project default, not from the paper.",
        stage=KEEP,
        decides=TRAINING,
        only=TOKENS,
    )
    token_fraction_final: float = setting(
        1.0,
        "Share of tokens at the end.",
        stage=KEEP,
        decides=TRAINING,
        only=TOKENS,
    )
    token_scope: str = setting(
        "batch",
        "Whether the share is one of the batch, or of each response (then |advantage| has no say).",
        stage=KEEP,
        decides=TRAINING,
        only=TOKENS,
        choices=SCOPES,
    )
    token_denominator: str = setting(
        "kept_tokens",
        "What the loss is divided by after tokens were left out.",
        stage=KEEP,
        decides=TRAINING,
        only=TOKENS,
        choices=DENOMINATORS,
    )
    top_entropy_quantile: float = setting(
        1.0,
        "Share of tokens, those of highest entropy, that stay in the policy's loss, as in "
        "TRL: divided by what all are divided by, and with the KL at every token. Published "
        "0.2; 1: all.",
        stage=KEEP,
        decides=TRAINING,
    )

    # -- loss and objective
    loss: str | None = setting(
        None,
        "What is differentiated. Default: the preset's.",
        stage=LOSS,
        decides=TRAINING,
    )
    length_weight: str | None = setting(
        None,
        "How a row's weight is spread over its tokens: row_mean (1/length), token_sum "
        "(1/max_completion_length), token_mean or row_sum (a row counts by its length). "
        "Default: the loss's.",
        stage=LOSS,
        decides=TRAINING,
        choices=LENGTH_RULES,
    )
    ratio_cap: float = setting(
        5.0,
        "cispo: largest ratio that a gradient is multiplied by.",
        stage=LOSS,
        decides=TRAINING,
    )
    entropy_coef: float = setting(
        0.0,
        "Weight of the mean entropy per token in the loss, over the rows that are in it, "
        "those without an advantage included; negative: a penalty.",
        stage=LOSS,
        decides=TRAINING,
    )

    # -- stay near the starting policy
    kl: str = setting(
        "k3_weighted",
        "Estimate of the KL as a loss: k2, k3 (GRPO) or k3_weighted (by the ratio).",
        stage=KL,
        decides=TRAINING,
        choices=tuple(KL_LOSSES),
        only=BETA,
    )
    kl_rows: str = setting(
        "trained",
        "Rows that the KL covers: those with an advantage (trained), or all (as in TRL: also "
        "groups that pass or fail as one). Its mean is over the rows that it covers.",
        stage=KL,
        decides=TRAINING,
        choices=("trained", "all"),
        only=BETA,
    )
    kl_ratio: str | None = setting(
        None,
        "The ratio of k3_weighted: token, or sequence (the mean over a row). Default: the "
        "loss's, as in TRL: sequence for gspo, gspo_token and luspo, else token, with which "
        "alone it is the KL's.",
        stage=KL,
        decides=TRAINING,
        choices=("token", "sequence"),
        only=K3_WEIGHTED,
    )
    sync_ref_model: bool = setting(
        False,
        "Move the policy that the KL holds to towards the one that trains, now and then (TR-DPO).",
        stage=KL,
        decides=TRAINING,
    )
    ref_model_mixup_alpha: float = setting(
        0.6,
        "sync_ref_model: share of the trained weights in the new ones; the rest are the old.",
        stage=KL,
        decides=TRAINING,
        only=MOVING,
    )
    ref_model_sync_steps: int = setting(
        512,
        "sync_ref_model: steps between two such moves.",
        stage=KL,
        decides=TRAINING,
        only=MOVING,
    )
    reward_kl: float = setting(
        0.0,
        "Weight of the summed log-ratio to the policy before training, subtracted from each "
        "reward.",
        stage=KL,
        decides=TRAINING,
    )

    # -- correct for an engine that differs
    old_logprobs: str = setting(
        "engine",
        "What ratios compare with: the log-probabilities that the engine recorded, or the "
        "trainer's own, recomputed before the first update.",
        stage=CORRECT,
        decides=TRAINING,
        choices=("engine", "trainer"),
    )
    importance_correction: str | None = setting(
        None,
        "Weights for an engine that differs from the trainer (another library, precision); "
        "implies old_logprobs: trainer. Default: sequence_mask with engine vllm "
        "(token_truncate for loss vespo), but none where top_k, top_p or min_p are set; else "
        "none.",
        stage=CORRECT,
        decides=TRAINING,
        choices=IMPORTANCE_CORRECTIONS,
    )
    importance_cap: float | None = setting(
        None,
        "Largest ratio trainer / engine that counts in full. Default: 3, as in TRL.",
        stage=CORRECT,
        decides=TRAINING,
        only=CORRECTION,
    )
    importance_floor: float | None = setting(
        None,
        "Smallest one. Default: none.",
        stage=CORRECT,
        decides=TRAINING,
        only=CORRECTION,
    )

    # -- update the weights
    replay_share: float = setting(
        0.0,
        "Share of a step's rows that comes from the last replay_steps collections, at most 0.5: every "
        "row is replayed once or never, with the advantage it had, weighed by the ratio of the policy "
        "to the one that made it. 0: none.",
        stage=UPDATE,
        decides=ROLLOUTS,
    )
    replay_steps: int = setting(
        2,
        "Collections that replay draws from, and so the age in steps of its oldest rows.",
        stage=UPDATE,
        decides=ROLLOUTS,
        only=on("replay_share", "replay_share above 0"),
    )
    replay_weight_max: float = setting(
        2.0,
        "Largest ratio that weighs a replayed token (or row, for losses with one ratio per row).",
        stage=UPDATE,
        decides=TRAINING,
        only=on("replay_share", "replay_share above 0"),
    )
    micro_batch_tokens: int | None = setting(
        None,
        "Tokens of a micro-batch, padding included, instead of per_device_train_batch_size rows.",
        stage=UPDATE,
        decides=NOTHING,
    )
    fused_logprobs: bool | None = setting(
        None,
        "Compute log-probabilities without ever holding the logits. Default: for vocabularies"
        " of 16,384 tokens and more.",
        stage=UPDATE,
        decides=TRAINING,
    )
    share_prompts: str = setting(
        "never",
        "Put the rollouts of one prompt behind one copy of it in the update, where the model allows it"
        " (else a warning says why not). auto: where that costs less; always; never. Log-probabilities"
        " and gradients are the same up to rounding.",
        stage=UPDATE,
        decides=TRAINING,
        choices=("never", "auto", "always"),
    )

    # -- validate, log and save
    completions_every: int = setting(
        0,
        "Steps between tables of completions; 0: none.",
        stage=WATCH,
        decides=NOTHING,
    )
    completions_rows: int = setting(
        16,
        "Rows of a completions table.",
        stage=WATCH,
        decides=NOTHING,
        only=on("completions_every", "completions_every of at least 1"),
    )

    @property
    def vllm_address(self) -> str:
        """Where the vLLM server is."""
        return (
            self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"
        )
