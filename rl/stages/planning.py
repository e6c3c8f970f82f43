"""Build the planner and the refill buffer that the settings describe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from rl.config.build import allocator_of, prior_of, selector_of, stopping_of
from rl.config.diffusion import DenoisingConfig
from rl.config.language import RolloutConfig
from rl.config.methods import Settings, method_of, settings_of
from rl.stages.buffer import GroupBuffer
from rollouts.engines.contract import TakesStarts
from rollouts.prompts import Prompt
from samplers.allocation import Allocator, Scale
from samplers.allocation.branches import in_branches, sibling_evidence
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.refill import Refill
from samplers.selection import RetiringSelector, Selector
from samplers.selection.uniform_share import UniformShare
from samplers.starts import Starts

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
    starts: Starts | None = None,
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
        starts: chooses where rollouts begin; see `make_starts`.

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
        round_size=config.stopping_round_size if stopping else None,
        run_seed=config.seed,
        success_above=config.success_above,
        full_marks=full_marks,
        evidence=evidence,
        starts=starts,
    )


def make_starts(
    config: RolloutConfig, prompts: Sequence[Prompt], tokenizer: Any, *, eos_ids: Sequence[int]
) -> Starts | None:
    """Where rollouts begin, as `config` says; None: each at the end of its prompt.

    A reference solution is read as text without special tokens, up to the first stop string.

    Args:
        config: the settings.
        prompts: of the data set.
        tokenizer: of the policy.
        eos_ids: ids that end a completion, at the first of which a reference is cut.

    Raises:
        ValueError: if the column of reference solutions is in no row, or holds something else than text.
    """
    method = method_of(config, "starts")
    if method.function is None:
        return None
    references = None
    if method.reads_column:
        references = _references(config, prompts, tokenizer, eos_ids)
    return method.function(
        [prompt.key for prompt in prompts],
        most_tokens=config.max_completion_length - 1,
        references=references,
        cuts=_LineEnds(tokenizer) if config.starts_at == "line" else None,
        decay=config.posterior_decay_chosen,
        run_seed=config.seed,
        **settings_of(config, method),
    )


def check_takes_starts(planner: Planner, engine: Any) -> None:
    """Refuse starts with an engine that does not say that it takes them.

    Raises:
        ValueError: if the planner chooses starts, and the engine is such a one.
    """
    takes = isinstance(engine, TakesStarts) and engine.takes_starts
    if planner.starts is not None and not takes:
        raise ValueError(
            f"starts need an engine that takes them, and {type(engine).__name__} does not say "
            "takes_starts = True: write starts: none, or let it draw what follows Prompt.start_ids "
            "(rollouts/engines/contract.py, TakesStarts) and test it with check_engine"
        )


def _references(
    config: RolloutConfig, prompts: Sequence[Prompt], tokenizer: Any, eos_ids: Sequence[int]
) -> list[list[int] | None]:
    """The token ids of each prompt's reference solution, or None."""
    name = config.starts_column or ""
    texts = [prompt.columns.get(name) for prompt in prompts]
    if not any(texts):
        known = ", ".join(sorted({column for prompt in prompts for column in prompt.columns}))
        raise ValueError(
            f"starts_column {name!r} has no reference solution in any row of the data set, whose "
            f"columns are {known or 'none'}"
        )
    references: list[list[int] | None] = []
    for row, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"starts_column {name!r} must hold text or None, got {text!r} in row {row}"
            )
        for stop in config.stop or ():
            text = text.partition(stop)[0] if text else text
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        ends = [place for place, token in enumerate(ids) if token in eos_ids]
        references.append(list(ids[: ends[0]] if ends else ids) or None)
    return references


class _LineEnds:
    """(L,) bool: after which tokens a line ends, by the text of each token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ends: dict[int, bool] = {}

    def __call__(self, token_L: np.ndarray) -> np.ndarray:
        return np.array([self._is_end(token) for token in token_L.tolist()], dtype=bool)

    def _is_end(self, token: int) -> bool:
        if token not in self._ends:
            text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            self._ends[token] = text.rstrip(" ").endswith("\n")
        return self._ends[token]


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
