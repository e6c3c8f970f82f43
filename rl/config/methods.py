"""Every method by the name it has in YAML: plain tables, one per stage of the line.

A method is added by its function, in the file that owns its stage, and one entry here. Entries take
the settings they need from `RolloutConfig`, whose fields say what they mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from transformers.utils import logging

from rl.logprobs import micro_batches
from rl.logprobs.from_logits import ends
from rl.objective import advantages, hapo, losses, sequence_losses, token_selection
from rl.objective.kl import kl_loss
from rollouts.batch import Rollouts, TokenRollouts
from samplers import allocation, downsampling, rules
from samplers.posterior import BetaPosterior
from samplers.selection import (
    PosteriorMeanSelector,
    Selector,
    ThompsonSelector,
    UniformSelector,
    mopps,
)
from samplers.selection.bands import OnlineBandSelector, StaticBandSelector
from samplers.selection.diverse import DiverseSelector

if TYPE_CHECKING:
    from rl.config.settings import RolloutConfig

T = TypeVar("T")
logger = logging.get_logger(__name__)


def _set(value: T | None) -> T:
    """A setting that `validate` has seen to."""
    assert value is not None
    return value


# -- which prompts: make(config, posterior, keys, column_D) -> Selector


def _uniform(c: RolloutConfig, posterior: BetaPosterior, keys: list[str], _: Any) -> Selector:
    return UniformSelector(len(keys), seed=c.seed, keys=keys)


def _vade(c: RolloutConfig, posterior: BetaPosterior, keys: list[str], _: Any) -> Selector:
    return ThompsonSelector(
        posterior, score=c.selection_score, candidates=c.selection_candidates, keys=keys
    )


def _mopps(c: RolloutConfig, posterior: BetaPosterior, keys: list[str], _: Any) -> Selector:
    return mopps(posterior, target=c.selection_target, candidates=c.selection_candidates, keys=keys)


def _posterior_mean(
    c: RolloutConfig, posterior: BetaPosterior, keys: list[str], _: Any
) -> Selector:
    return PosteriorMeanSelector(posterior, score=c.selection_score, keys=keys)


def _band(c: RolloutConfig, posterior: BetaPosterior, keys: list[str], _: Any) -> Selector:
    return OnlineBandSelector(posterior, **_bounds(c), keys=keys)


def _static_band(c: RolloutConfig, _: BetaPosterior, keys: list[str], column_D: Any) -> Selector:
    return StaticBandSelector(column_D, **_bounds(c), keys=keys)


def _bounds(c: RolloutConfig) -> dict[str, Any]:
    return {"low": c.band_low, "high": c.band_high, "short": c.band_short}


def _diverse(
    c: RolloutConfig, posterior: BetaPosterior, keys: list[str], column_D: Any
) -> Selector:
    return DiverseSelector(
        posterior,
        np.stack([np.asarray(embedding, dtype=np.float64) for embedding in column_D]),
        gamma=_set(c.selection_gamma),
        score=c.selection_score,
        candidates=c.selection_candidates,
        keys=keys,
    )


SELECTORS: dict[str, Callable[..., Selector]] = {
    "uniform": _uniform,
    "vade": _vade,
    "mopps": _mopps,
    "posterior_mean": _posterior_mean,
    "band": _band,
    "static_band": _static_band,
    "diverse": _diverse,
}
NEEDS_COLUMN = {"static_band": "pass rates in [0, 1]", "diverse": "embeddings, equally long lists"}

# -- how many rollouts: integer solver, and what it is given of the posterior (a_P, b_P)

ALLOCATORS: dict[str, tuple[Callable, Callable | None]] = {
    # `gvm` binds its alpha and beta in `allocator_of`; None: the solver takes the posterior itself.
    "uniform": (allocation.uniform, allocation.posterior_std),
    "neyman": (allocation.neyman, allocation.posterior_std),
    "leave_one_out": (allocation.leave_one_out, allocation.posterior_std),
    "dr_grpo": (allocation.dr_grpo, allocation.posterior_std),
    "cost_aware": (allocation.neyman, allocation.posterior_std),  # by length: `rl/stages/draw.py`
    "gvm": (allocation.neyman, allocation.gvm),
    "log": (allocation.neyman, allocation.log_std),
    "accepted": (allocation.neyman, allocation.accepted_std),
    "reinforce_ada": (allocation.neyman, allocation.reinforce_ada_std),
    "knapsack": (allocation.knapsack, allocation.mean_pass_rate),
    "knapsack_posterior": (allocation.knapsack_posterior, None),
    "knapsack_released": (allocation.knapsack_released, allocation.passed_share),
}
BUDGET_MINIMA = {
    "leave_one_out": 2,
    "dr_grpo": 3,
    "knapsack": 2,
    "knapsack_posterior": 2,
    "knapsack_released": 2,
}
SCALES: dict[str, Callable] = {
    # In place of `posterior_std`, where that is an allocator's scale.
    "posterior_std": allocation.posterior_std,
    "plug_in_std": allocation.plug_in_std,
    "mean_std": allocation.mean_std,
    "thompson_std": allocation.thompson_std,
}


def allocator_of(config: RolloutConfig) -> tuple[Callable, Callable | None]:
    """The integer solver and the scale function (a_P, b_P) -> std_P named by `config`."""
    solve, scale = ALLOCATORS[config.allocator]
    if scale is allocation.posterior_std:
        scale = SCALES[config.allocation_scale]
    if config.allocator == "gvm":
        plug_in = config.pilot_rollouts > 0 and config.pilot_estimate == "pilot"
        scale = allocation.gvm_plug_in if plug_in else allocation.gvm
        scale = partial(scale, alpha=config.gvm_alpha, beta=config.gvm_beta)
    if config.allocator == "knapsack_released" and config.pilot_estimate == "pilot":
        scale = allocation.mean_pass_rate  # of counts, which are 0 where no pilot passed
    return solve, scale


# -- when to stop a group early: make(config) -> rule

STOPPINGS: dict[str, Callable[[RolloutConfig], rules.Stopping | None]] = {
    "none": lambda c: None,
    "positive": lambda c: rules.until_positive(needed=_set(c.stopping_needed)),
    "balanced": lambda c: rules.until_balanced(keep=_set(c.stopping_needed)),
    "early": lambda c: rules.while_mixed_is_likely(threshold=c.stopping_threshold),
    "early_unbiased": lambda c: rules.while_mixed_is_likely_unbiased(
        threshold=c.stopping_threshold, rho=c.stopping_rho
    ),
}

# -- what depends on which rollouts succeed, by the setting that names it

READS_SUCCESS: dict[str, tuple[str, ...]] = {
    "selector": ("vade", "mopps", "posterior_mean", "band", "diverse"),
    "allocator": tuple(name for name in ALLOCATORS if name != "uniform"),
    "stopping": tuple(name for name in STOPPINGS if name != "none"),
    "objective": ("log", "em"),
    "down_sampling": ("balanced",),
}

# -- advantages of full groups


class AdvantageMethod(NamedTuple):
    """An estimator, and what must be known of it to combine it."""

    function: Callable
    columns: tuple[str, ...] = ()  # of the rollouts, besides rewards and prompts
    has_std: bool = False  # divides by a std: takes `std_correction` and `std_eps`
    by_success: bool = False  # of successes in [0, 1] (`samplers/success.py`), not of rewards
    within_group: bool = False  # compares with the prompt's other rollouts: a lone one gets 0
    budgets: str | None = (
        None  # what n rollouts do to a prompt's weight; None: nothing, from n = 2 on
    )


_MEAN = "weighs a prompt of n rollouts by (n - 1) / n"
_STD = "weighs a prompt of n rollouts by what its std is likely to be, which depends on n"

ADVANTAGES: dict[str, AdvantageMethod] = {
    "leave_one_out": AdvantageMethod(advantages.leave_one_out, within_group=True),
    "grpo": AdvantageMethod(advantages.grpo, has_std=True, within_group=True, budgets=_STD),
    "centred": AdvantageMethod(advantages.centred, within_group=True, budgets=_MEAN),
    "raft": AdvantageMethod(advantages.raft, by_success=True),
    "batch_whitened": AdvantageMethod(advantages.batch_whitened, has_std=True),
    "batch_whitened_tokens": AdvantageMethod(
        advantages.batch_whitened_tokens,
        ("logprob_NT", "reference_logprob_NT", "mask_NT"),
        has_std=True,
    ),
    "batch_scaled": AdvantageMethod(
        advantages.batch_scaled, has_std=True, within_group=True, budgets=_MEAN
    ),
    "stratified": AdvantageMethod(
        advantages.stratified, ("stratum_N",), has_std=True, within_group=True, budgets=_STD
    ),
    "token_level": AdvantageMethod(
        hapo.token_level_group, ("length_N",), within_group=True, budgets=_STD
    ),
}
OBJECTIVE_BUDGETS = {
    "em": "weighs a prompt of pass rate p by 1 - (1 - p)^n, the chance that any of its n passes"
}
"""Objectives that budgets change whatever the advantage; `flat` says so by its name."""

AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
"""How several rewards become one advantage; see `advantages.normalised_sum`."""


def scale_of(config: RolloutConfig) -> str:
    """`scale_rewards` as one of `advantages.SCALES`; TRL's true and false, from YAML or typed, too."""
    given = config.scale_rewards
    known: dict[Any, str] = {None: "group", True: "group", False: "none"}
    known |= {"true": "group", "false": "none"}
    return known.get(given.lower() if isinstance(given, str) else given, str(given))


def preset_advantage(config: RolloutConfig, named: str) -> str:
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
    if not differ or not keeps or config.multi_objective_aggregation != AGGREGATIONS[0]:
        return named
    warnings.warn(
        f"advantage is 'leave_one_out' here: budgets differ by {differ}, and {named!r}, the default, "
        f"{ADVANTAGES[named].budgets}, so that budgets would change the objective; write advantage: "
        f"{named} if that is meant",
        stacklevel=2,
    )
    return "leave_one_out"


def differing_budgets(config: RolloutConfig) -> str:
    """What gives the prompts of a step different numbers of rollouts; empty: nothing does."""
    if config.allocator != "uniform":
        return f"allocator {config.allocator!r}"
    return f"stopping {config.stopping!r}" if config.stopping != "none" else ""


def least_budget(config: RolloutConfig) -> int:
    """The default of `budget_min`: 2 where rollouts are compared and the allocator may give fewer."""
    least, most = BUDGET_MINIMA.get(config.allocator, 1), config.rollouts_per_prompt
    if config.allocator == "uniform" or not compares_within_group(config):
        return least
    # Of a branch there are always several, and settings out of range are for `validate`.
    if hasattr(config, "baseline") or not isinstance(most, int):
        return least
    return max(least, min(2, most, config.budget_max or 2))


def compares_within_group(config: RolloutConfig) -> bool:
    """Whether a prompt's only rollout gets no advantage; a diffusion model's baseline may see more."""
    method = ADVANTAGES.get(config.advantage or "")
    of_prompt = getattr(config, "baseline", "prompt") == "prompt"
    return method is not None and method.within_group and of_prompt


def what_budgets_change(config: RolloutConfig) -> list[str]:
    """Why the objective depends on how many rollouts each prompt gets; empty where it does not.

    `flat` is what the budgets make of it by its definition, and nothing more is said of it.
    """
    differ = differing_budgets(config)
    if not differ and config.rollouts_per_step % config.prompts_per_step:
        differ = f"rollouts_multiple_of={config.rollouts_multiple_of}"
    if not differ or config.objective == "flat":
        return []
    found, method = [], ADVANTAGES[config.advantage or ""]
    within = compares_within_group(config)
    if method.budgets is not None and within:
        of_batch = config.advantage == "grpo" and scale_of(config) == "batch"
        effect = _MEAN if of_batch else method.budgets
        found.append(f"advantage {config.advantage!r} {effect}")
    if config.objective in OBJECTIVE_BUDGETS:
        found.append(f"objective {config.objective!r} {OBJECTIVE_BUDGETS[config.objective]}")
    least = _set(config.budget_min)
    if config.allocator != "uniform" and least < 1:
        found.append(f"budget_min={least} lets a prompt have no rollout, which takes it out")
    elif config.allocator != "uniform" and least == 1 and within:
        found.append("budget_min=1 lets a prompt have one rollout, which has no advantage")
    if config.stopping not in ("none", "early_unbiased"):
        found.append(f"stopping {config.stopping!r} ends groups by what they have earned")
    if config.allocator != "uniform" and config.pilot_rollouts and config.pilot_use == "pool":
        found.append("pilots that are pooled decide their own prompt's budget")
    return [f"budgets differ by {differ}", *found] if found else []


def advantage_of(config: RolloutConfig) -> Callable[[Rollouts, Any], torch.Tensor]:
    """The estimator named by `config`, of a batch with rewards."""
    method = ADVANTAGES[config.advantage or ""]
    function, columns = method.function, method.columns
    if method.has_std:
        function = partial(function, **_std_of(config))
    if config.advantage == "grpo":
        function = partial(function, scale=scale_of(config))
    if config.advantage == "stratified":
        blend = {"alpha": config.stratum_alpha, "fallback": config.stratum_fallback}
        function = partial(function, **blend)
    if config.advantage == "batch_whitened_tokens":
        function = partial(function, beta=config.reward_kl)

    def advantage(rollouts: Rollouts, _: Any = None) -> torch.Tensor:
        more = [_column(rollouts, name) for name in columns]
        value_N = successes(rollouts) if method.by_success else _set(rollouts.reward_N)
        return function(value_N, rollouts.prompt_N, *more)

    def of_functions(rollouts: Rollouts, _: Any = None) -> torch.Tensor:
        reward_NF = _set(rollouts.reward_NF)
        weights = config.reward_weights or [1.0] * reward_NF.shape[1]
        weight_F = torch.tensor(weights, dtype=torch.float64)
        prompt_N, std = rollouts.prompt_N, _std_of(config)
        return advantages.normalised_sum(reward_NF, prompt_N, weight_F=weight_F, **std)

    return advantage if config.multi_objective_aggregation == AGGREGATIONS[0] else of_functions


def successes(rollouts: Rollouts) -> torch.Tensor:
    """How far each row succeeded; its reward, where nobody has read that as a success."""
    return _set(rollouts.reward_N if rollouts.success_N is None else rollouts.success_N)


def _std_of(config: RolloutConfig) -> dict[str, Any]:
    return {"correction": config.std_correction, "eps": config.std_eps}


def _column(rollouts: Rollouts, name: str) -> torch.Tensor | None:
    value = getattr(rollouts, name)
    if value is None and name == "stratum_N":
        # Without tools nobody is set apart, and every rollout of a prompt is a peer.
        logger.warning_once(
            "advantage 'stratified' is 'grpo' here: the engine labels no strata (stratum_N is None)"
        )
        return torch.zeros_like(rollouts.prompt_N)
    if name == "reference_logprob_NT":
        return value  # None where no reward pays for a KL
    return _set(value)


# -- which rows train: rows(config, reward_N, advantage_N, prompt_N, progress) -> rows_K


def _all(c: RolloutConfig, reward_N: Any, *_: Any) -> np.ndarray:
    return np.arange(len(reward_N))


def _d3s(c: RolloutConfig, _: Any, advantage_N: Any, __: Any, progress: float) -> np.ndarray:
    return downsampling.d3s(advantage_N, row_fraction=_row_fraction(c, progress))


def _d3s_two_stage(
    c: RolloutConfig, _: Any, advantage_N: Any, prompt_N: Any, progress: float
) -> np.ndarray:
    share = _row_fraction(c, progress)
    return downsampling.d3s_two_stage(advantage_N, prompt_N, row_fraction=share)


def _row_fraction(c: RolloutConfig, progress: float) -> float:
    return downsampling.row_fraction(
        progress, initial=c.row_fraction_initial, final=c.row_fraction_final
    )


def _max_variance(c: RolloutConfig, _: Any, advantage_N: Any, prompt_N: Any, __: Any) -> np.ndarray:
    return downsampling.max_variance(advantage_N, prompt_N, keep=_set(c.rows_per_prompt))


def _pods(c: RolloutConfig, reward_N: Any, _: Any, prompt_N: Any, __: Any) -> np.ndarray:
    return downsampling.max_variance(reward_N, prompt_N, keep=_set(c.rows_per_prompt))


def _half(c: RolloutConfig, reward_N: Any, _: Any, prompt_N: Any, __: Any) -> np.ndarray:
    return downsampling.half(reward_N, prompt_N, keep=_set(c.rows_per_prompt))


def _balanced(c: RolloutConfig, passed_N: Any, _: Any, prompt_N: Any, __: Any) -> np.ndarray:
    return downsampling.balanced(passed_N, prompt_N, keep=_set(c.rows_per_prompt))


DOWN_SAMPLERS: dict[str, Callable[..., np.ndarray]] = {
    "none": _all,
    "d3s": _d3s,
    "d3s_two_stage": _d3s_two_stage,
    "max_variance": _max_variance,
    "pods": _pods,
    "half": _half,
    "balanced": _balanced,
}
BY_PASSING = ("balanced",)  # given 1 for a pass and 0 else in the place of rewards
KEEPS_PER_PROMPT = ("max_variance", "pods", "half", "balanced")


def down_sampler_of(config: RolloutConfig) -> Callable[[Rollouts, float], torch.Tensor]:
    """`rows(rollouts, progress) -> rows_K`, increasing, of the method named by `config`."""
    method = DOWN_SAMPLERS[config.down_sampling]

    def rows(rollouts: Rollouts, progress: float) -> torch.Tensor:
        assert rollouts.reward_N is not None and rollouts.advantage_N is not None
        reward_N = rollouts.reward_N
        if config.down_sampling in BY_PASSING:
            reward_N = (_set(rollouts.success_N) == 1).double()
        columns = (reward_N.numpy(), rollouts.advantage_N.double().numpy())
        return torch.from_numpy(method(config, *columns, rollouts.prompt_N.numpy(), progress))

    return rows


def advantage_after_of(config: RolloutConfig) -> Callable[[Rollouts], torch.Tensor] | None:
    """PODS compares the rows it keeps with each other, by the unbiased std (arXiv:2504.13818)."""
    if config.down_sampling != "pods":
        return None
    again: Callable = partial(advantages.grpo, scale=scale_of(config), **_std_of(config))
    return lambda rollouts: again(_set(rollouts.reward_N), rollouts.prompt_N)


# -- which of their tokens train: select(config, rollouts, share) -> kept_NT


def _every_token(_: RolloutConfig, rollouts: Rollouts, __: float) -> torch.Tensor:
    return rollouts.mask_NT


def _d3s_tokens(c: RolloutConfig, rollouts: Rollouts, share: float) -> torch.Tensor:
    by_token = rollouts.advantage_NT is not None
    advantage = rollouts.advantage_NT if by_token else rollouts.advantage_N
    columns = (_set(advantage), _set(rollouts.entropy_NT), rollouts.mask_NT)
    return token_selection.top_tokens(*columns, fraction=share, scope=c.token_scope)


def _entropy_tokens(c: RolloutConfig, rollouts: Rollouts, share: float) -> torch.Tensor:
    columns = (_set(rollouts.entropy_NT), rollouts.mask_NT)
    return token_selection.top_entropy(*columns, fraction=share, scope=c.token_scope)


TOKEN_SELECTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "none": _every_token,
    "d3s": _d3s_tokens,
    "entropy": _entropy_tokens,
}


def token_selector_of(config: RolloutConfig) -> Callable[[Rollouts, float], torch.Tensor]:
    """`kept(rollouts, progress) -> kept_NT` of the method named by `config`."""
    method = TOKEN_SELECTIONS[config.token_selection]

    def kept(rollouts: Rollouts, progress: float) -> torch.Tensor:
        ends = {"initial": config.token_fraction_initial, "final": config.token_fraction_final}
        return method(config, rollouts, downsampling.token_fraction(progress, **ends))

    return kept


# -- losses and the presets that fill settings left unset

LOSSES: dict[str, tuple[Callable, tuple[str, ...]]] = {
    # function, and the settings it takes
    "raft": (losses.raft, ()),
    "raft_pp": (losses.raft_pp, ("epsilon_low", "epsilon_high")),
    "grpo": (losses.clipped_surrogate, ("epsilon_low", "epsilon_high", "dual_clip")),
    "dapo": (losses.clipped_surrogate, ("epsilon_low", "epsilon_high", "dual_clip")),
    "dr_grpo": (losses.clipped_surrogate, ("epsilon_low", "epsilon_high", "dual_clip")),
    "cispo": (losses.cispo, ("ratio_cap",)),
    "sapo": (losses.sapo, ()),
    "gspo": (sequence_losses.gspo, ("epsilon_low", "epsilon_high", "dual_clip")),
    "gspo_token": (sequence_losses.gspo_token, ("epsilon_low", "epsilon_high", "dual_clip")),
    "luspo": (sequence_losses.gspo, ("epsilon_low", "epsilon_high", "dual_clip")),
    "vespo": (sequence_losses.vespo, ()),
    "rloo": (sequence_losses.rloo, ("epsilon_low", "epsilon_high")),
    "hapo": (hapo.hapo, ("epsilon_low", "epsilon_high", "dual_clip")),
}
LOSS_COLUMNS: dict[str, dict[str, str]] = {
    # Ratios of whole rows are over every decision, also those whose weight is 0.
    name: {"mask_NT": "mask_NT"}
    for name in ("gspo", "gspo_token", "luspo", "vespo", "rloo")
} | {"hapo": {"h_NT": "heterogeneity_NT"}}
ONE_RATIO_PER_ROW = ("gspo", "luspo", "rloo")  # weights constant within a row
_ROW_RATIO = {"epsilon": 3e-4, "epsilon_high": 4e-4}
LOSS_DEFAULTS: dict[str, dict[str, Any]] = {
    "dapo": {"length_weight": "token_mean", "epsilon_high": 0.28},
    "dr_grpo": {"length_weight": "token_sum", "advantage": "centred"},
    "cispo": {"length_weight": "token_mean"},
    "gspo": _ROW_RATIO,
    "gspo_token": _ROW_RATIO,
    "luspo": _ROW_RATIO | {"length_weight": "row_sum"},
    "vespo": {"length_weight": "token_mean"},
    "hapo": {
        "length_weight": "token_mean",
        "epsilon_high": 0.28,
        "delta": 10.0,
        "advantage": "token_level",
    },
}
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {
        "advantage": "grpo",
        "loss": "grpo",
        "objective": "mean",
        "length_weight": "row_mean",
        "epsilon_high": 0.2,
    },
    "raft": {
        "advantage": "raft",
        "loss": "raft",
        "objective": "em",
        "length_weight": "row_mean",
        "epsilon_high": 0.2,
    },
    "raft++": {
        "advantage": "raft",
        "loss": "raft_pp",
        "objective": "em",
        "length_weight": "row_mean",
        "epsilon_high": 0.2,
    },
}


def default_correction(config: RolloutConfig) -> str:
    """The default of `importance_correction`: TRL's for vLLM.

    After a filter vLLM's log-probabilities are those of a narrower distribution, and the ratio of a row
    falls with its length: there it is left to who asks for it.
    """
    filtered = config.top_k or config.top_p != 1 or config.min_p or config.repetition_penalty != 1
    if config.engine != "vllm" or filtered:
        return "none"
    return "token_truncate" if config.loss == "vespo" else "sequence_mask"


def loss_of(config: RolloutConfig) -> Callable:
    """The loss named by `config`, its clip ranges bound."""
    function, names = LOSSES[config.loss or ""]
    known = {
        "epsilon_low": config.epsilon,
        "epsilon_high": config.epsilon_high,
        "dual_clip": config.delta,
        "ratio_cap": config.ratio_cap,
    }
    return partial(function, **{name: known[name] for name in names}) if names else function


def kl_ratio_of(config: RolloutConfig) -> str:
    """`kl_ratio`, where it is left out that of the loss, as in TRL."""
    of_loss = "sequence" if config.loss in ("gspo", "gspo_token", "luspo") else "token"
    return config.kl_ratio or of_loss


def kl_of(config: RolloutConfig) -> Callable | None:
    """`kl(logprob_NT, rows, denominator=...)` named by `config`; None at beta 0."""
    if not config.beta:
        return None
    function = kl_loss(config.kl)

    def kl(logprob_NT: torch.Tensor, rows: Rollouts, *, denominator: float) -> Any:
        old_NT = rows.logprob_NT if rows.old_logprob_NT is None else rows.old_logprob_NT
        more = {"old_logprob_NT": old_NT} if config.kl == "k3_weighted" else {}
        if more and kl_ratio_of(config) == "sequence":
            more["mask_NT"] = rows.mask_NT
        weight_NT = _set(rows.weight_NT if rows.kl_weight_NT is None else rows.kl_weight_NT)
        columns = (_set(rows.reference_logprob_NT), weight_NT)
        return function(logprob_NT, *columns, denominator=denominator, **more)

    return kl


def trains_everywhere(config: RolloutConfig) -> bool:
    """Whether rows without an advantage stay in the batch: their entropies or their KL count."""
    by_kl = bool(config.beta) and config.kl_rows == "all"
    return by_kl or bool(config.entropy_coef) or config.top_entropy_quantile < 1


def micro_batches_of(config: RolloutConfig) -> Callable[[TokenRollouts], list[torch.Tensor]]:
    """How rows are cut into micro-batches: by their number, or by their tokens."""

    def by_tokens(rollouts: TokenRollouts) -> list[torch.Tensor]:
        prompt_K = torch.tensor([len(rollouts.prompt_ids[p]) for p in rollouts.prompt_N.tolist()])
        return micro_batches.by_tokens(
            prompt_K.long(), ends(rollouts.mask_NT), _set(config.micro_batch_tokens)
        )

    if config.micro_batch_tokens is not None:
        return by_tokens
    rows = config.per_device_train_batch_size
    return lambda rollouts: micro_batches.by_rows(ends(rollouts.mask_NT), rows)
