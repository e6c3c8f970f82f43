"""The line for diffusion models: what its stages are when a decision is a denoising step.

Selection, budgets, down-sampling, objective, ledger and ranks are those of language models. Axes: N
rollouts (finished samples), T denoising steps, S = T + 1 states, U distinct states.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer

from rl.config.diffusion import CREDITS, DenoisingConfig
from rl.config.methods import down_sampler_of
from rl.logprobs.reference import require_fresh
from rl.objective import denoising_weights, prompt_history
from rl.objective.advantages import centred, grpo, leave_one_out
from rl.objective.losses import clipped_surrogate
from rl.objective.prompt_history import PromptHistory
from rl.objective.tree_advantages import Tree
from rl.policies.denoiser import choose_trained, denoiser_of
from rl.policies.language import PolicyKind, make_planner, without_dropout
from rl.policies.pipeline import lora_of
from rl.ranks import Ranks
from rl.stages.line import Line, Memory
from rollouts.batch import DenoisingRollouts
from rollouts.diffusion.engine import DiffusersEngine
from rollouts.diffusion.sde import gaussian_kl, step_logprob, step_noise
from rollouts.prompts import Prompt, PromptReport, plain_prompts
from rollouts.rewards.contract import RewardResult
from rollouts.rewards.image import load_image_reward, score_images
from rollouts.step_plan import StepPlan
from samplers.allocation.branches import in_branches, sibling_evidence
from samplers.downsampling import best_and_worst
from samplers.ledger import Ledger
from samplers.planner import Planner


class DenoisingScorer:
    """Scores recorded steps under the current weights, one evaluation for all children of a state.

    Args:
        engine: whose pipeline holds the model that trains.
        beta: weight of the KL to the reference policy; above 0 it is computed beside, in `kl_NT`.
    """

    def __init__(self, engine: DiffusersEngine, *, beta: float = 0.0) -> None:
        self.engine = engine
        self.beta = beta
        self.elements = 1
        """Of a latent scored last: what its log-probability is a sum over."""
        self.kl_NT: torch.Tensor | None = None
        """KL(policy || reference) of each decision scored last, in nats, with gradient."""

    def logprobs(self, model: torch.nn.Module, rollouts: DenoisingRollouts) -> torch.Tensor:
        """(N, T) float64 log-probabilities, differentiable; 0 where there is no weight."""
        self.elements = rollouts.tree.latent_M[0].numel()
        if not self.beta:
            return self.engine.logprobs(rollouts)
        assert rollouts.weight_NT is not None
        device = next(model.parameters()).device
        zero_N = torch.zeros(len(rollouts), dtype=torch.float64, device=device)
        logprobs, kls = [], []
        for step in range(rollouts.mask_NT.shape[1]):
            row_K = (rollouts.weight_NT[:, step] != 0).nonzero().flatten().cpu()
            logprob_N, kl_N = zero_N, zero_N
            if len(row_K):
                rows = rollouts.take(row_K.to(rollouts.weight_NT.device))
                place = (row_K.to(device),)
                logprob_K, kl_K = self._with_kl(rows, step)
                logprob_N, kl_N = zero_N.index_put(place, logprob_K), zero_N.index_put(place, kl_K)
            logprobs.append(logprob_N)
            kls.append(kl_N)
        self.kl_NT = torch.stack(kls, dim=1)
        return torch.stack(logprobs, dim=1)

    def _with_kl(self, rows: DenoisingRollouts, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and KL of each row's edge."""
        mean, std_U = self.engine.replay(rows, step=step)
        reference, _ = self.engine.replay(rows, step=step, reference=True)
        which_N = rows.node_NS[:, step].unique(return_inverse=True)[1].to(mean.device)
        x_next = rows.tree.latent_M[rows.node_NS[:, step + 1].cpu()].to(mean.device)
        logprob_N = step_logprob(x_next, mean[which_N], std_U[which_N])
        return logprob_N, gaussian_kl(mean, reference, std_U)[which_N]

    def statistics(
        self, model: torch.nn.Module, rollouts: DenoisingRollouts, *, differentiable: bool = False
    ) -> Any:
        """Not to be had: the entropy of a step is a constant of its noise."""
        raise TypeError("a denoising step has no entropy to be recomputed")


def kl_of(config: DenoisingConfig, scorer: DenoisingScorer) -> Callable[..., Any] | None:
    """`kl(logprob_NT, rows, *, denominator)`: the exact KL of the steps just scored; None at beta 0.

        sum(weight * factor * |mean - mean_ref|^2 / (2 std^2)) / denominator

    with the factor of `kl_reduction` (`denoising_weights.kl_factor`). The statistics, from which the
    metric `kl` is made, are in nats of whole latents whatever it is.
    """
    if not config.beta:
        return None
    reduction = config.kl_reduction
    assert reduction is not None

    def kl(
        logprob_NT: torch.Tensor, rows: DenoisingRollouts, *, denominator: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert scorer.kl_NT is not None and rows.weight_NT is not None
        kl_NT, active_NT = scorer.kl_NT, rows.weight_NT != 0
        total = kl_NT.detach()[active_NT].sum()
        sums = {"kl_k3": total, "kl_k1": total, "kl_tokens": active_NT.sum()}
        levels, elements = rows.tree.levels, scorer.elements
        factor_T = denoising_weights.kl_factor(reduction, levels, elements=elements)
        weighted_NT = rows.weight_NT * factor_T.to(kl_NT.device) * kl_NT
        return weighted_NT.sum() / denominator, sums

    return kl


def loss_of(config: DenoisingConfig, scorer: DenoisingScorer) -> Callable[..., Any]:
    """The clipped surrogate on log-probabilities of whole latents, or on their means over elements.

    Advantages are cut off here: rows are chosen by what they were before (B2-DiffuRL, whose best and
    worst of a branch would tie beyond the clip).
    """
    limit = math.inf if config.advantage_clip is None else config.advantage_clip

    def loss(
        logprob_NT: torch.Tensor,
        old_NT: torch.Tensor,
        advantage: torch.Tensor,
        weight_NT: torch.Tensor,
        *,
        denominator: float,
    ) -> Any:
        return clipped_surrogate(
            logprob_NT,
            old_NT,
            advantage.clamp(-limit, limit),
            weight_NT,
            denominator=denominator,
            epsilon_low=config.epsilon or 0.0,
            epsilon_high=config.epsilon_high or 0.0,
            dual_clip=config.delta,
            log_ratio_scale=1.0 if config.logprob_reduction == "sum" else 1.0 / scorer.elements,
        )

    return loss


def advantage_of(
    config: DenoisingConfig, rows: dict[str, int], history: PromptHistory | None
) -> Callable[[DenoisingRollouts, list[Prompt]], torch.Tensor]:
    """The credit that `config` names, (N,) or (N, T), of full groups; it remembers their rewards.

    Args:
        config: the settings.
        rows: data-set row of each prompt key.
        history: for baselines over several steps.
    """

    def advantage(rollouts: DenoisingRollouts, prompts: list[Prompt]) -> torch.Tensor:
        reward_N = rollouts.reward_N
        assert reward_N is not None
        if not len(reward_N):
            if history is not None:  # a step all the same, by which memories grow old
                history.observe(reward_N, rollouts.prompt_N)
            return torch.zeros(0, dtype=torch.float64)
        if history is not None:
            row_P = torch.tensor([rows[prompt.key] for prompt in prompts])
            row_N = row_P[rollouts.prompt_N]
            standardised = (
                prompt_history.history_standardised
                if config.baseline == "history"
                else partial(
                    prompt_history.buffer_standardised,
                    min_count=min(16, config.history_steps),  # 16 as published, or all it holds
                )
            )
            value = standardised(reward_N, row_N, history)
            history.observe(reward_N, row_N)
        elif config.baseline == "prompt" and config.credit_scale == "prompt":
            value = grpo(reward_N, rollouts.prompt_N, correction=0, eps=1e-6)
        else:
            value = _scaled(config, rollouts, _credit(config, rollouts))
        return value

    return advantage


def _credit(config: DenoisingConfig, rollouts: DenoisingRollouts) -> torch.Tensor:
    tree = rollouts.tree
    assert rollouts.reward_N is not None
    if config.baseline == "prompt":
        return centred(rollouts.reward_N, rollouts.prompt_N)
    if config.baseline == "siblings":
        return leave_one_out(rollouts.reward_N, rollouts.branch_N)
    shape = Tree(rollouts.node_NS, tree.parent_M, tree.step_M, tree.leaves_M, rollouts.prompt_N)
    return CREDITS[config.baseline](rollouts.reward_N, shape)


def _scaled(
    config: DenoisingConfig, rollouts: DenoisingRollouts, value: torch.Tensor
) -> torch.Tensor:
    """Divided by the population std of the rewards of the batch, or of the row's prompt."""
    reward_N = rollouts.reward_N
    assert reward_N is not None
    if config.credit_scale == "batch":
        return value / (reward_N.std(correction=0) + 1e-8)
    if config.credit_scale == "prompt":
        std_N = torch.zeros_like(reward_N)
        for p in rollouts.prompt_N.unique().tolist():
            group_N = rollouts.prompt_N == p
            std_N[group_N] = reward_N[group_N].std(correction=0)
        return value / (std_N + 1e-8).view(-1, *(1,) * (value.ndim - 1))
    return value


def down_sample_of(config: DenoisingConfig) -> Callable[[DenoisingRollouts, float], torch.Tensor]:
    """Rows that train: the best and the worst of each branch, or as for language models."""
    if config.branch_threshold is None:
        return down_sampler_of(config)

    def rows(rollouts: DenoisingRollouts, _: float) -> torch.Tensor:
        assert rollouts.advantage_N is not None
        value_N = rollouts.advantage_N.double().numpy()
        threshold = config.branch_threshold or None
        return torch.from_numpy(
            best_and_worst(value_N, rollouts.branch_N.numpy(), threshold=threshold)
        )

    return rows


def decisions_of(config: DenoisingConfig) -> Callable[[DenoisingRollouts], torch.Tensor]:
    """(N, T) weights of the steps that train: 1, or scaled by their noise or by distinct edges."""

    def decisions(rollouts: DenoisingRollouts) -> torch.Tensor:
        plan, one_N = rollouts.tree.plan, torch.ones(len(rollouts), dtype=torch.float64)
        weight_NT = denoising_weights.trained_steps(one_N, rollouts.mask_NT, plan.trained)
        if config.edge_weight == "once":
            distinct_T = torch.tensor([plan.states_at(step + 1) for step in range(plan.num_steps)])
            weight_NT = denoising_weights.once_per_edge(weight_NT, distinct_T, steps=plan.trained)
        if config.noise_weight == "none":
            return weight_NT
        # Of the whole chain but its last edge: a plan of one trained edge would have factor 1.
        std_T, _ = step_noise(rollouts.tree.levels, rule=plan.rule, level=plan.level)
        edges = range(max(plan.num_steps - 1, 1))
        return denoising_weights.noise_weighted(weight_NT, std_T, edges=edges)

    return decisions


def cut(rollouts: DenoisingRollouts, *, states: int) -> list[DenoisingRollouts]:
    """Micro-batches of one denoising step and at most `states` distinct latents before it.

    A row takes part once for each step it trains; its weight elsewhere is 0. Only so does the graph of
    one step at a time have to be kept.
    """
    assert rollouts.weight_NT is not None
    parts: list[DenoisingRollouts] = []
    for step in (rollouts.weight_NT != 0).any(dim=0).nonzero().flatten().tolist():
        only_T = torch.zeros(rollouts.mask_NT.shape[1], dtype=torch.bool)
        only_T[step] = True
        row_K = (rollouts.weight_NT[:, step] != 0).nonzero().flatten()
        place_K = rollouts.node_NS[row_K, step].unique(return_inverse=True)[1] // states
        for number in range(int(place_K.max()) + 1):
            rows = rollouts.take(row_K[place_K == number])
            assert rows.weight_NT is not None
            parts.append(replace(rows, weight_NT=torch.where(only_T, rows.weight_NT, 0.0)))
    return parts


def validations_of(config: DenoisingConfig) -> dict[str, tuple[int, StepPlan]]:
    """Samples of each held-out prompt: with the noise of training, and without any.

    A schedule that moves its noise along the chain has it on all edges where it ever is, so that the
    figures of all training steps are of one way to sample; with other `validation_steps` all edges do.
    """
    plan = config.step_plan(0)
    steps = config.validation_steps or plan.num_steps
    ever = {edge for each in config.step_plans() for edge in each.stochastic}
    stochastic = tuple(sorted(ever)) if steps == plan.num_steps else tuple(range(steps))
    noisy = StepPlan(num_steps=steps, rule=plan.rule, level=plan.level, stochastic=stochastic)
    still = StepPlan(num_steps=steps, rule=plan.rule, level=0.0, stochastic=())
    count = config.eval_rollouts_per_prompt
    return {"deterministic": (count, still), "sampled": (count, noisy)}


def reward_of(
    config: DenoisingConfig, rewards: list[Any], engine: DiffusersEngine
) -> Callable[..., tuple[list[np.ndarray], RewardResult]]:
    """`reward(prompts, rollouts, *, max_failed_share) -> (images, result)`: decode, then score."""

    def reward(
        prompts: list[Prompt], rollouts: DenoisingRollouts, *, max_failed_share: float
    ) -> tuple[list[np.ndarray], RewardResult]:
        _require_finite(rollouts, prompts)
        image_NHWC = engine.decode(rollouts)
        result, _ = score_images(
            rewards,
            image_NHWC,
            [str(prompt.prompt) for prompt in prompts],
            [dict(prompt.columns) for prompt in prompts],
            weights=config.reward_weights,
            timeout=config.reward_timeout,
            retries=config.reward_retries,
            max_failed_share=max_failed_share,
        )
        return list(image_NHWC), result

    return reward


def _require_finite(rollouts: DenoisingRollouts, prompts: list[Prompt]) -> None:
    """Raise FloatingPointError before a sample that is NaN becomes an image."""
    sample_N = rollouts.tree.latent_M[rollouts.node_NS[:, -1]]
    finite_N = sample_N.isfinite().flatten(1).all(dim=1)
    if not finite_N.all():
        row = int((~finite_N).nonzero()[0])
        raise FloatingPointError(
            f"{int((~finite_N).sum())} samples are NaN or infinite, first of prompt "
            f"{prompts[row].key}; lower learning_rate or max_grad_norm, and check the model's dtype"
        )


def make_denoising_planner(config: DenoisingConfig, keys: list[str], **given: Any) -> Planner:
    """`make_planner`, with budgets of whole branches, and siblings counted by what they tell."""
    leaves = config.leaves_per_branch
    return make_planner(
        config,
        keys,
        wrap=partial(in_branches, leaves=leaves),
        evidence=sibling_evidence(leaves, config.sibling_within_share),
        **given,
    )


def make_denoising_line(
    config: DenoisingConfig,
    *,
    prompts: list[Prompt],
    planner: Planner,
    engine: DiffusersEngine | None,
    model: torch.nn.Module,
    policy: Callable[[], AbstractContextManager[Any]],
    processor: Any,
    rewards: list[Any],
    accelerator: Accelerator,
) -> Line:
    """The line of `config` for the pipeline `processor`, whose denoiser is the model.

    Raises:
        ValueError: if the pipeline cannot be recorded, the processes shard the model, or `beta` has
            no reference policy.
    """
    if config.beta:
        require_adapter(model)
    if config.activation_checkpointing:  # diffusers' own; the base class asks by another name
        if config.activation_checkpointing_kwargs:
            raise ValueError(
                f"activation_checkpointing_kwargs={config.activation_checkpointing_kwargs} is for "
                "language models: a denoiser recomputes the blocks that diffusers chose; leave it out"
            )
        model.enable_gradient_checkpointing()  # type: ignore[operator]
        config.activation_checkpointing = False
    if engine is None:
        engine = DiffusersEngine(processor, **config.engine_settings())
    record_used(config, engine)
    validations = validations_of(config)
    engine.check(prompts, [*config.step_plans(), *(plan for _, plan in validations.values())])
    rows = {prompt.key: row for row, prompt in enumerate(prompts)}
    history = None
    if config.baseline == "history":
        history = PromptHistory(steps=config.history_steps)
    elif config.baseline == "buffer":
        history = PromptHistory(rewards=config.history_steps)
    score = DenoisingScorer(engine, beta=config.beta)
    states = config.per_device_train_batch_size
    return Line(
        prompts=prompts,
        planner=planner,
        engine=engine,  # type: ignore[arg-type]
        policy=policy,
        generating=lambda: nullcontext(model),  # type: ignore[arg-type,return-value]
        sampling=config.step_plan,
        validations=validations,
        tokenizer=None,
        reward=reward_of(config, rewards, engine),
        advantage=advantage_of(config, rows, history),  # type: ignore[arg-type]
        advantage_after=None,
        down_sample=down_sample_of(config),  # type: ignore[arg-type]
        buffer=None,
        history=history,
        objective=config.objective or "",
        length_weight=config.length_weight or "",
        decisions=decisions_of(config),  # type: ignore[arg-type]
        select_tokens=lambda rollouts, _: rollouts.mask_NT,
        reference=None,
        score=score,
        micro_batches=lambda rollouts: [torch.arange(len(rollouts))],
        cut=partial(cut, states=states),
        loss=loss_of(config, score),
        loss_columns={},
        kl=kl_of(config, score),
        ledger=Ledger(),
        memory=Memory(),
        ranks=Ranks(accelerator, by_hand=True),
        config=config,
    )


def record_used(config: DenoisingConfig, engine: Any) -> None:
    """Write into the settings what the engine is run with; a setting that it overrules is told.

    An engine of the caller's own has its own guidance and size; the settings are what `run.json`
    shows and what a resumed run is compared with.
    """
    for name, used in getattr(engine, "used", {}).items():
        said = getattr(config, name)
        if used == said:
            continue
        if said is not None:
            what = f"{name}: {said} of the settings"
            why = (
                "is not read by this model"
                if used is None
                else f"is not that of the engine that was given, which has {used}"
            )
            warnings.warn(f"{what} {why}; {used} is used and recorded", stacklevel=2)
        setattr(config, name, used)


def load_denoiser(model: Any, processor: Any, peft_config: Any = None) -> tuple[Any, Any]:
    """The denoiser of a pipeline, and the pipeline, loaded in float32 if it is a folder or hub id.

    With `peft_config` (a LoraConfig or its arguments) an adapter is added, which alone trains; without
    it one that is loaded (`load_lora_weights`, `add_adapter`, a PeftModel) does, and else all weights
    of the denoiser; other components never do. Dropout is off.

    Raises:
        ValueError: if there is no denoiser, an adapter that is loaded cannot train as it is, or
            weights in half precision would train.
    """
    from diffusers import DiffusionPipeline

    pipeline = (
        DiffusionPipeline.from_pretrained(model, use_safetensors=True)
        if isinstance(model, str)
        else model
    )
    peft_config = lora_of(peft_config)
    _, denoiser = denoiser_of(pipeline)
    choose_trained(pipeline, denoiser, peft_config)
    _require_precision(denoiser)
    without_dropout(denoiser)
    return denoiser, pipeline


def _require_precision(denoiser: torch.nn.Module) -> None:
    """Refuse to train half-precision weights, in which updates are rounded away or blown up."""
    for name, weight in denoiser.named_parameters():
        if weight.requires_grad and weight.dtype.itemsize < 4:
            kind = str(weight.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} would train in {kind}, which is too coarse for an optimizer: train an adapter "
                "beside frozen weights (use_peft: true, or a peft_config), or write dtype: float32, "
                "with bf16: true to compute in half precision all the same"
            )


def require_adapter(denoiser: torch.nn.Module) -> None:
    """Refuse a denoiser that is not the reference policy as soon as its adapters are off.

    Raises:
        ValueError: if other weights than those of adapters train, or an adapter is not 0 at first.
    """
    adapters = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    if not adapters:
        raise ValueError(
            f"beta: a reference policy needs LoRA adapters that can be turned off, but the "
            f"{type(denoiser).__name__} has none: write use_peft: true (a peft_config), or beta: 0"
        )
    off = {
        id(weight)
        for adapter in adapters
        for name, weight in adapter.named_parameters()
        if not name.startswith("base_layer.")
    }
    for name, weight in denoiser.named_parameters():
        if weight.requires_grad and id(weight) not in off:
            raise ValueError(
                f"beta holds the policy close to the model with its adapters off, but {name} trains "
                "and is in no adapter: give a pipeline without adapters and a peft_config, or write "
                "beta: 0"
            )
    require_fresh(denoiser)


def load_image_rewards(
    rewards: Any, weights: list[float] | None, *, device: str | torch.device = "cpu"
) -> list[Any]:
    """The image rewards behind names, paths and callables.

    Args:
        rewards: one or several.
        weights: one per reward, or None.
        device: where the models of rewards that are named are loaded, such as clip_score.

    Raises:
        ValueError: if there is none, a name is unknown, or `weights` has another length.
    """
    from rollouts.rewards.image_models import MODEL_REWARDS

    rewards = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
    if not rewards:
        raise ValueError("reward_funcs is empty; name at least one image reward")
    if weights is not None and len(weights) != len(rewards):
        raise ValueError(
            f"reward_weights has {len(weights)} entries for {len(rewards)} image rewards"
        )
    on_device = {name: partial(load, device=str(device)) for name, load in MODEL_REWARDS.items()}
    load = partial(load_image_reward, more=on_device)
    return [load(reward) if isinstance(reward, str) else reward for reward in rewards]


def image_prompt_maker(
    config: DenoisingConfig, *_: Any
) -> Callable[[Any], tuple[list[Prompt], PromptReport]]:
    """`make(rows) -> (prompts, report)` of rows with a text in column `prompt`."""
    how: Any = config.duplicates

    def make(rows: Any) -> tuple[list[Prompt], PromptReport]:
        if rows is None or isinstance(rows, str | Path):
            raise ValueError(
                f"train_dataset must be rows with a column 'prompt', got {rows!r}; read a file with "
                "datasets.load_dataset('json', data_files=...)['train'], or recipes/train.py with "
                "dataset_name"
            )
        return plain_prompts(rows, id_column=config.id_column, duplicates=how)

    return make


def _may_overlap(prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    """Validation on training prompts is allowed: a sample is no answer that could be memorised."""


DENOISING = PolicyKind(
    load=load_denoiser,
    load_rewards=load_image_rewards,
    prompt_maker=image_prompt_maker,
    refuse_overlap=_may_overlap,
    make_planner=make_denoising_planner,
    make_line=make_denoising_line,
    saves_processor=False,
)
"""Text-to-image pipelines of diffusers."""
