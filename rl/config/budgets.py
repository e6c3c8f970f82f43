"""What unequal budgets do to the objective, and the defaults that keep it."""

from __future__ import annotations

import warnings

from rl.config.build import discards_pilots
from rl.config.diffusion_settings import DiffusionSettings
from rl.config.methods import (
    ADVANTAGES,
    ALLOCATORS,
    MEAN,
    OBJECTIVES,
    Settings,
    method_of,
    required,
    scale_of,
)
from rl.config.settings import LanguageSettings


def preset_advantage(config: LanguageSettings, named: str) -> str:
    """The advantage where none is written: the preset's, unless other settings decide.

    `scale_rewards` says which of `grpo` and `centred` it is. Else, where budgets differ, both give
    way to `leave_one_out`, under which these do not change the objective; a warning says so.
    """
    if named not in ("grpo", "centred"):
        return named
    if config.scale_rewards is not None:
        return "centred" if scale_of(config) == "none" else "grpo"
    differ = differing_budgets(config)
    keeps = config.down_sampling != "pods" and config.objective != "flat"
    if not differ or not keeps or config.multi_objective_aggregation != "sum_then_normalize":
        return named
    warnings.warn(
        f"advantage is 'leave_one_out' here: budgets differ by {differ}, and {named!r}, the default, "
        f"{ADVANTAGES[named].budgets}, so that budgets would change the objective; write advantage: "
        f"{named} if that is meant",
        stacklevel=2,
    )
    return "leave_one_out"


def differing_budgets(config: Settings) -> str:
    """What gives the prompts of a step different numbers of rollouts; empty: nothing does."""
    if config.allocator != "uniform":
        return f"allocator {config.allocator!r}"
    return f"stopping {config.stopping!r}" if config.stopping != "none" else ""


def least_budget(config: Settings) -> int:
    """The default of `budget_min`: 2 where rollouts are compared and the allocator may give fewer."""
    allocator, most = ALLOCATORS.get(config.allocator), config.rollouts_per_prompt
    least = max(1, allocator.minimum) if allocator is not None else 1
    if config.allocator == "uniform" or not compares_within_group(config):
        return least
    # Of a branch there are always several, and numbers out of range are refused elsewhere.
    if isinstance(config, DiffusionSettings) or not isinstance(most, int):
        return least
    return max(least, min(2, most, config.budget_max or 2))


def compares_within_group(config: Settings) -> bool:
    """Whether a prompt's only rollout gets no advantage; a diffusion model's baseline may see more."""
    if isinstance(config, DiffusionSettings):
        return config.baseline == "prompt"
    method = ADVANTAGES.get(config.advantage or "")
    return method is not None and method.within_group


def what_budgets_change(config: Settings) -> list[str]:
    """Why the objective depends on how many rollouts each prompt gets; empty where it does not.

    `flat` is what the budgets make of it by its definition, and nothing more is said of it.
    """
    differ = differing_budgets(config)
    if not differ and config.rollouts_per_step % config.prompts_per_step:
        differ = f"rollouts_multiple_of={config.rollouts_multiple_of}"
    if not differ or config.objective == "flat":
        return []
    found, within = [], compares_within_group(config)
    if isinstance(config, DiffusionSettings):
        if within:
            found.append(f"baseline {config.baseline!r} {MEAN}")
    elif (effect := method_of(config, "advantage").budgets) is not None:
        of_batch = config.advantage == "grpo" and scale_of(config) == "batch"
        found.append(f"advantage {config.advantage!r} {MEAN if of_batch else effect}")
    if (effect := OBJECTIVES[config.objective or ""].budgets) is not None:
        found.append(f"objective {config.objective!r} {effect}")
    least = required(config.budget_min)
    if config.allocator != "uniform" and least < 1:
        found.append(f"budget_min={least} lets a prompt have no rollout, which takes it out")
    elif config.allocator != "uniform" and least == 1 and within:
        found.append("budget_min=1 lets a prompt have one rollout, which has no advantage")
    if (effect := method_of(config, "stopping").budgets) is not None:
        found.append(f"stopping {config.stopping!r} {effect}")
    if config.allocator != "uniform" and config.pilot_rollouts and not discards_pilots(config):
        found.append("pilots that are pooled decide their own prompt's budget")
    return [f"budgets differ by {differ}", *found] if found else []
