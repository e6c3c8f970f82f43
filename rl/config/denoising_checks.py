"""Refuse settings of a diffusion run under which nothing can be learned, before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from rl.config.diffusion_settings import DiffusionSettings
from rl.config.methods import BASELINES
from rollouts.step_plan import StepPlan


def check_numbers(config: DiffusionSettings) -> None:
    """Raise ValueError for the first number that is out of its range."""
    for name, low, high in (
        ("sibling_within_share", 0.0, 1.0),
        ("ema_decay", 0.0, 1.0),
        ("guidance_scale", 0.0, float("inf")),
        ("branch_threshold", 0.0, float("inf")),
        ("images_every", 0, float("inf")),
        ("history_steps", 0, float("inf")),
        ("max_evaluations", 1, float("inf")),
    ):
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")
    for name in ("validation_steps", "per_device_train_batch_size", "height", "width"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    try:
        torch.device(config.reward_device or "cpu")
    except RuntimeError:
        raise ValueError(
            f"reward_device must be a device such as cpu or cuda:1, got {config.reward_device!r}"
        ) from None
    if config.ema_decay and config.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end brings back weights that train, while ema_decay validates and "
            "saves their average: write one of the two"
        )
    if config.ema_decay == 1:
        raise ValueError("ema_decay must be below 1: an average with decay 1 never moves")
    if config.advantage_clip is not None and not config.advantage_clip > 0:
        raise ValueError(f"advantage_clip must be positive or null, got {config.advantage_clip}")


def check_kl(config: DiffusionSettings, *, asked: str | None) -> None:
    """Refuse a KL that the noise rule does not have; warn of one that beta: 0 leaves out.

    Raises:
        ValueError: for an unknown `kl_reduction`, or flow_grpo under a rule that is no SDE.
    """
    if asked is None:
        return
    assert isinstance(config.plan, dict)
    rule = config.plan["rule"]
    if asked == "flow_grpo" and rule not in ("flow_sde", "constant_sde"):
        raise ValueError(
            f"kl_reduction 'flow_grpo' divides by the diffusion coefficient of an SDE, and rule {rule} "
            "has none: write kl_reduction: mean, or rule: flow_sde or constant_sde"
        )
    if not config.beta and asked != config.logprob_reduction:
        warnings.warn(
            f"kl_reduction={asked!r} has no effect with beta: 0: write beta above 0", stacklevel=2
        )


def check_credit(config: DiffusionSettings, plans: Sequence[StepPlan]) -> None:
    """Raise ValueError if no sample could ever have an advantage, or a wrong one would train.

    Args:
        config: the settings.
        plans: the different ones of all training steps.
    """
    if BASELINES[config.baseline].over_steps and config.credit_scale != "none":
        raise ValueError(
            f"baseline {config.baseline!r} is in units of the rewards it remembers already: write "
            f"credit_scale: none, got {config.credit_scale!r}"
        )
    if config.baseline == "buffer" and config.history_steps < 2:
        raise ValueError(
            f"history_steps must be at least 2 for baseline 'buffer', the rewards of a prompt it "
            f"holds and compares, got {config.history_steps}"
        )
    if config.leaves_per_branch == 1:
        _unbranched(config)
    _alone(config)
    _trained_where_siblings_differ(config, plans)
    threshold, clip = config.branch_threshold, config.advantage_clip
    if threshold and clip is not None and clip <= threshold:
        raise ValueError(
            f"advantage_clip={clip} cuts off all that branch_threshold={threshold} lets train, so "
            "that all advantages are alike: write advantage_clip above branch_threshold, or null"
        )


def _unbranched(config: DiffusionSettings) -> None:
    what = None
    if config.edge_weight == "once":
        raise ValueError(
            "edge_weight='once' is about steps that samples of a branch share, but plan does not "
            "branch: write edge_weight: leaves"
        )
    if BASELINES[config.baseline].within == "branch":
        what, instead = f"baseline {config.baseline!r}", "baseline: prompt"
    elif config.branch_threshold is not None:
        what = f"branch_threshold={config.branch_threshold}"
        instead = "branch_threshold: null"
    if what is not None:
        raise ValueError(
            f"{what} compares the samples of a branch, but plan does not branch: write branch: "
            f"{{at: trained_start, children: 4}} in plan, or {instead}"
        )


def _lone_branch(config: DiffusionSettings) -> bool:
    """Whether no prompt can have samples of two roots."""
    never_more = bool(config.budget_min) or config.allocator == "uniform"
    return config.rollouts_per_prompt == config.leaves_per_branch and never_more


def _alone(config: DiffusionSettings) -> None:
    compares = BASELINES[config.baseline].within == "prompt"
    compares |= config.baseline == "history" and config.history_steps == 0
    if compares and config.leaves_per_branch == 1 and _lone_branch(config):
        raise ValueError(
            f"baseline {config.baseline!r} compares the samples of a prompt, and "
            "rollouts_per_prompt=1 gives every prompt one: write rollouts_per_prompt of at least 2, "
            "or baseline: history with history_steps above 0"
        )


def _trained_where_siblings_differ(config: DiffusionSettings, plans: Sequence[StepPlan]) -> None:
    """On an edge that all compared samples share, their advantages sum to 0."""
    within = BASELINES[config.baseline].within == "branch"
    within |= BASELINES[config.baseline].within == "prompt" and _lone_branch(config)
    if within and not any(_edges_that_learn(plan, config.baseline) for plan in plans):
        plan = max(plans, key=lambda plan: plan.trained[-1])
        where = "at an edge" if config.baseline == "parent" else "at or after the first edge"
        more = "" if BASELINES[config.baseline].within == "branch" else " in one branch a prompt"
        raise ValueError(
            f"baseline {config.baseline!r}{more} learns {where} that branches, and plan trains none: "
            f"it branches at {[edge for edge, count in plan.splits if count > 1]} and trains "
            f"{plan.trained}; write branch: {{at: trained_start, ...}}, or last_edge: trained"
        )
    drops = config.branch_threshold is not None or config.down_sampling != "none"
    if config.baseline != "siblings" or not drops:
        return
    for plan in plans:
        assert plan.first_split is not None
        if plan.trained[0] < plan.first_split:
            name = "branch_threshold" if config.branch_threshold is not None else "down_sampling"
            raise ValueError(
                f"baseline 'siblings' cancels on edges that siblings share, unless {name}="
                f"{getattr(config, name)!r} drops some of them, and plan trains edge "
                f"{plan.trained[0]} before it branches at {plan.first_split}: write branch: {{at: "
                "trained_start, ...}, or baseline: branch, which gives those edges exactly 0"
            )


def _edges_that_learn(plan: StepPlan, baseline: str) -> list[int]:
    """Trained edges on which samples of one root differ, or on which baseline 'parent' is not 0."""
    if baseline == "parent":
        return [edge for edge in plan.trained if plan.children_of(edge) > 1]
    first = plan.num_steps if plan.first_split is None else plan.first_split
    return [edge for edge in plan.trained if edge >= first]
