"""The objective of a diffusion model: credits of denoising steps, rows kept, loss and exact KL.

Axes: P prompts, N rollouts (finished samples), T denoising steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from rl.config.build import advantage_of, down_sampler_of, loss_columns_of
from rl.config.diffusion import CREDITS, DenoisingConfig
from rl.objective import denoising_weights, prompt_history
from rl.objective.advantages import centred, grpo, leave_one_out
from rl.objective.losses import clipped_surrogate
from rl.objective.prompt_history import PromptHistory
from rl.objective.tree_advantages import Tree
from rl.policies.contract import ScoredDecisions
from rl.stages.objective import Advantage, Loss, Objective, Sums, checked_loss
from rollouts.batch import DenoisingRollouts
from rollouts.prompts import Prompt
from samplers.downsampling import best_and_worst


def denoising_objective_of(
    config: DenoisingConfig,
    prompts: list[Prompt],
    *,
    advantage: Advantage | None = None,
    loss: Loss | None = None,
) -> Objective:
    """The objective that `config` names, for a diffusion model.

    Args:
        config: the settings.
        prompts: of the data set, whose rewards a baseline over several steps remembers.
        advantage, loss: functions of your own, instead of those `config` names.
    """
    history = _history_of(config) if advantage is None else None
    rows = {prompt.key: row for row, prompt in enumerate(prompts)}
    named = credit_of(config, rows, history)
    credit: Any = lambda rollouts, groups: named(rollouts, groups.prompts)  # noqa: E731
    loss_function, loss_columns = denoising_loss(config), {"elements": "elements"}
    own: Any = config  # functions of the user's own are called alike for both kinds of policy
    if advantage is not None:
        credit = advantage_of(own, advantage)
    if loss is not None:
        loss_function, loss_columns = checked_loss(own, loss), loss_columns_of(own, loss)
    keep: Any = keep_of(config)
    return Objective(
        config=config,
        advantage=credit,
        down_sample=keep,
        loss_function=loss_function,
        loss_columns=loss_columns,
        kl_function=denoising_kl(config) if config.beta else None,
        history=history,
    )


def _history_of(config: DenoisingConfig) -> PromptHistory | None:
    """What the baseline remembers of earlier steps; None if it compares within a step."""
    if config.baseline == "history":
        return PromptHistory(steps=config.history_steps)
    if config.baseline == "buffer":
        return PromptHistory(rewards=config.history_steps)
    return None


def denoising_loss(config: DenoisingConfig) -> Loss:
    """The clipped surrogate on log-probabilities of whole latents, or on their means over elements.

    Advantages are clipped here: rows are chosen by what they were before (B2-DiffuRL, whose best and
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
        elements: int,
    ) -> tuple[torch.Tensor, Sums]:
        return clipped_surrogate(
            logprob_NT,
            old_NT,
            advantage.clamp(-limit, limit),
            weight_NT,
            denominator=denominator,
            epsilon_low=config.epsilon or 0.0,
            epsilon_high=config.epsilon_high or 0.0,
            dual_clip=config.delta,
            log_ratio_scale=1.0 if config.logprob_reduction == "sum" else 1.0 / elements,
        )

    return loss


def denoising_kl(config: DenoisingConfig) -> Callable[..., tuple[torch.Tensor, Sums]]:
    """`kl(scored, rows, *, denominator)`: the exact KL of the steps that were scored.

        sum(weight * factor * |mean - mean_ref|^2 / (2 std^2)) / denominator

    with the factor of `kl_reduction` (`denoising_weights.kl_factor`). The statistics, from which the
    metric `kl` is made, are in nats of whole latents for every `kl_reduction`.
    """
    reduction = config.kl_reduction
    assert reduction is not None

    def kl(
        scored: ScoredDecisions, rows: DenoisingRollouts, *, denominator: float
    ) -> tuple[torch.Tensor, Sums]:
        assert scored.kl_NT is not None and rows.weight_NT is not None
        kl_NT, active_NT = scored.kl_NT, rows.weight_NT != 0
        total = kl_NT.detach()[active_NT].sum()
        sums = {"kl_k3": total, "kl_k1": total, "kl_tokens": active_NT.sum()}
        levels, elements = rows.tree.levels, rows.elements
        factor_T = denoising_weights.kl_factor(reduction, levels, elements=elements)
        weighted_NT = rows.weight_NT * factor_T.to(kl_NT.device) * kl_NT
        return weighted_NT.sum() / denominator, sums

    return kl


def credit_of(
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


def keep_of(config: DenoisingConfig) -> Callable[[DenoisingRollouts, float], torch.Tensor]:
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
