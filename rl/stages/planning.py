"""Build the planner and the refill buffer that the settings describe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from rl.config.build import allocator_of, prior_of, selector_of, stopping_of
from rl.config.diffusion import DenoisingConfig
from rl.config.methods import Settings
from rl.stages.buffer import GroupBuffer
from rollouts.prompts import Prompt
from samplers.allocation import Allocator, Scale
from samplers.allocation.branches import in_branches, sibling_evidence
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.refill import Refill
from samplers.selection import RetiringSelector, Selector
from samplers.selection.uniform_share import UniformShare

SELECTOR_METHODS = ("select", "state_dict", "load_state_dict")


def make_planner(
    config: Settings,
    keys: list[str],
    *,
    columns: Callable[[str], list[Any]] | None = None,
    features: Callable[[], np.ndarray] | None = None,
    selector: Selector | Callable[[BetaPosterior, list[str]], Selector] | None = None,
    allocate: Allocator | None = None,
    scale: Scale | None = None,
    wrap: Callable[[Allocator], Allocator] = lambda allocator: allocator,
    full_marks: float = 1.0,
    evidence: float = 1.0,
) -> Planner:
    """The planner that `config` describes, over the data set whose prompt keys are `keys`.

    Args:
        config: the settings.
        keys: one key per data-set row.
        columns: returns a column of the data set by its name, for selectors and priors that need one.
        features: returns features of the prompts, for a prior that needs them and is given no column.
        selector: a selector of your own, or `make(posterior, keys)` that returns one, instead of the
            one `config` names.
        allocate, scale: an allocator and a scale of your own, instead of those `config` names.
        wrap: changes the allocator that is used, for example to give budgets in whole branches.
        full_marks: the largest reward there is, if rewards are fractions of one.
        evidence: how many rollouts one rollout counts as in the posterior.

    Raises:
        ValueError: if a step has more prompts than the data set, or a selector's column is not
            there or not what it needs; or `selector` returns something that selects nothing.
    """
    if len(keys) < config.prompts_per_step:
        raise ValueError(
            f"prompts_per_step={config.prompts_per_step} exceeds the {len(keys)} prompts of the data "
            f"set; write prompts_per_step: {len(keys)} or less"
        )
    posterior = BetaPosterior(
        len(keys),
        decay_chosen=config.posterior_decay_chosen,
        decay_rest=config.posterior_decay_rest,
        prior=prior_of(config, len(keys), columns, features),
    )
    chooses = _selector(config, posterior, keys, columns, selector)
    if config.uniform_share:
        chooses = UniformShare(chooses, len(keys), share=config.uniform_share, keys=keys)
    if config.retire_above is not None or config.greso_explore is not None:
        chooses = RetiringSelector(
            chooses,
            posterior,
            retire_above=config.retire_above,
            retire_share=config.retire_share,
            explore=config.greso_explore,
            keys=keys,
        )
    named, named_scale = allocator_of(config)
    assert config.budget_min is not None
    stopping = stopping_of(config)
    return Planner(
        posterior,
        chooses,
        wrap(allocate or named),
        keys=keys,
        prompts_per_step=config.prompts_per_step,
        rollouts_per_step=config.rollouts_per_step,
        scale=scale or named_scale,
        minimum=config.budget_min,
        maximum=config.budget_max,
        pilot=config.pilot_rollouts,
        estimate=config.pilot_estimate,  # type: ignore[arg-type]
        pilots=config.pilot_use,  # type: ignore[arg-type]
        stopping=stopping,
        wave=config.stopping_wave if stopping else None,
        run_seed=config.seed,
        success_above=config.success_above,
        full_marks=full_marks,
        evidence=evidence,
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


def _selector(
    config: Settings,
    posterior: BetaPosterior,
    keys: list[str],
    columns: Callable[[str], list[Any]] | None,
    own: Selector | Callable[[BetaPosterior, list[str]], Selector] | None,
) -> Selector:
    """The caller's own selector, or the one that `config` names."""
    if own is not None:
        is_made = hasattr(own, "select") and not isinstance(own, type)
        made: Any = own if is_made else own(posterior, keys)  # type: ignore[operator]
        lacking = [name for name in SELECTOR_METHODS if not hasattr(made, name)]
        if lacking:
            name = getattr(own, "__name__", type(own).__name__)
            raise ValueError(
                f"selector={name} must be a Selector or return one from (posterior, keys): "
                f"{type(made).__name__} has no {', '.join(lacking)}"
            )
        return made
    return selector_of(config, posterior, keys, columns)


def column_of(prompts: Sequence[Prompt]) -> Callable[[str], list[Any]]:
    """`column(name)`: one value per prompt; ValueError where a row has none."""

    def column(name: str) -> list[Any]:
        for row, prompt in enumerate(prompts):
            if prompt.columns.get(name) is None:
                known = ", ".join(sorted(prompt.columns)) or "none"
                raise ValueError(
                    f"column {name!r} is missing in row {row} of the data set, whose columns are {known}"
                )
        return [prompt.columns[name] for prompt in prompts]

    return column


def make_buffer(config: Settings, planner: Planner) -> GroupBuffer | None:
    """The buffer of groups that wait for a later step; None without refill."""
    if not config.refill:
        return None
    return GroupBuffer(
        Refill(
            config.prompts_per_step,
            max_drawn=config.refill_max_draws * config.prompts_per_step,
            at_cap=config.refill_at_cap,  # type: ignore[arg-type]
            max_age=config.refill_max_age,
            decide=planner.admit,
        )
    )
