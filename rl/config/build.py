"""What a stage is under given settings: the method they name, with its settings bound.

Axes: D data set, P prompts, N rollouts (flat rows), K rows kept, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from rl.config.diffusion_settings import DiffusionSettings
from rl.config.methods import (
    ADVANTAGES,
    AGGREGATIONS,
    LOSSES,
    PILOT_USES,
    SCALES,
    SELECTORS,
    AdvantageMethod,
    AllocatorMethod,
    DownSamplingMethod,
    Settings,
    kept_to,
    method_of,
    own_method,
    required,
    settings_of,
)
from rl.config.own import (
    is_own,
    kept_rows,
    kept_tokens,
    own_advantage,
    parameters,
)
from rl.config.settings import LanguageSettings
from rl.objective import advantages
from rl.objective.check import check_advantage, check_loss
from rl.objective.kl import kl_loss
from rollouts.batch import Rollouts
from rollouts.prompts import Prompt
from samplers import downsampling, stopping
from samplers.posterior import BetaPosterior
from samplers.prior import RARE, Prior, StrataPrior, principal_components
from samplers.selection import Selector

logger = logging.get_logger(__name__)


def selector_of(
    config: Settings,
    posterior: BetaPosterior,
    keys: list[str],
    columns: Callable[[str], list[Any]] | None = None,
) -> Selector:
    """The selector named by `config`, over the prompts of these keys.

    Its function is given what its parameters name: `posterior`, `keys`, `num_prompts`, the column of
    `selection_column` as `column_D` (numbers as `pass_rate_D`, lists as `embedding_DC`), and settings.

    Raises:
        ValueError: if it reads a column, and the data set's are not given.
    """
    method = SELECTORS.get(config.selector) or method_of(config, "selector")
    given: dict[str, Any] = {"posterior": posterior, "keys": keys, "num_prompts": len(keys)}
    wanted = parameters(required(method.function))
    if reads := {"column_D", "pass_rate_D", "embedding_DC"} & {*wanted}:
        if columns is None:
            raise ValueError(f"selector {config.selector!r} needs the columns of the data set")
        column_D: Any = columns(config.selection_column or "")
        if "embedding_DC" in reads:
            column_D = np.stack([np.asarray(row, dtype=np.float64) for row in column_D])
        given |= dict.fromkeys(reads, column_D)
    given = {name: value for name, value in given.items() if name in wanted}
    return required(method.function)(**given, **settings_of(config, method))


def prior_of(
    config: Settings,
    num_prompts: int,
    columns: Callable[[str], list[Any]] | None = None,
    features: Callable[[], np.ndarray] | None = None,
) -> Prior | None:
    """The posterior's prior named by `config`; None for Beta(1, 1).

    Its function is given what its parameters name: `num_prompts`, the columns of
    `posterior_prior_column` as `stratum_D`, or as `feature_DC`, and settings.

    Args:
        columns: returns a column of the data set by its name.
        features: returns (D, H) features of the prompts, for where no column is named; called when the
            prior is first asked.

    Raises:
        ValueError: if columns are not there or not what is needed.
    """
    method = method_of(config, "posterior_prior")
    if method.function is None:
        return None
    wanted, given = parameters(method.function), settings_of(config, method)
    names = config.posterior_prior_column or []
    if {"stratum_D", "feature_DC"} & {*wanted} and names and columns is None:
        raise ValueError(f"posterior_prior {method.name!r} needs the columns of the data set")
    if not {"stratum_D", "feature_DC"} & {*wanted}:
        return method.function(num_prompts, **given)
    if "stratum_D" in wanted:
        prior = method.function(_strata(names, required(columns)), **given)
        _check_strata(prior, names)
        return prior
    most = config.posterior_prior_components

    def fewer(feature_DH: np.ndarray) -> np.ndarray:
        return feature_DH if feature_DH.shape[1] <= most else principal_components(feature_DH, most)

    if names:
        return method.function(fewer(_features(names, required(columns))), **given)
    if features is None:
        raise ValueError(
            f"posterior_prior {method.name!r} needs posterior_prior_column here, a column of "
            "embeddings, equally long lists of numbers"
        )
    return method.function(lambda: fewer(features()), num_prompts=num_prompts, **given)


def _strata(names: list[str], columns: Callable[[str], list[Any]]) -> list[str]:
    """(D,) what each prompt has in these columns, as text."""
    values = []
    for name in names:
        column_D = columns(name)
        for row, value in enumerate(column_D):
            if not isinstance(value, str | bool | int | float):
                raise ValueError(
                    f"posterior_prior_column {name!r} must hold words or numbers, row {row} has a "
                    f"{type(value).__name__}: write posterior_prior: features for embeddings"
                )
        values.append(column_D)
    return [json.dumps(row) for row in zip(*values, strict=True)]


def _check_strata(prior: StrataPrior, names: list[str]) -> None:
    if not prior.names:
        raise ValueError(
            f"posterior_prior_column {', '.join(names)}: no value stands in {RARE} prompts, so that "
            "none says anything of another; write posterior_prior: pooled, or columns of fewer values"
        )


def _features(names: list[str], columns: Callable[[str], list[Any]]) -> np.ndarray:
    """(D, H) the numbers of these columns, side by side."""
    parts = []
    for name in names:
        rows = []
        for row, value in enumerate(columns(name)):
            try:
                rows.append(np.asarray(value, dtype=np.float64).ravel())
            except (TypeError, ValueError):
                rows.append(np.zeros(0))
            wrong = not len(rows[-1]) or len(rows[-1]) != len(rows[0])
            if wrong or not np.isfinite(rows[-1]).all():
                raise ValueError(
                    f"posterior_prior_column {name!r} must hold equally long lists of finite numbers, "
                    f"row {row} has {str(value)[:60]}"
                )
        parts.append(np.stack(rows))
    return np.concatenate(parts, axis=1)


def allocator_of(config: Settings) -> tuple[Callable, Callable | None]:
    """The integer solver and the scale function (a_P, b_P) -> std_P named by `config`."""
    method = method_of(config, "allocator")
    assert isinstance(method, AllocatorMethod)
    solve, scale = required(method.function), method.scale
    if method.by_std:
        scale = required(SCALES[config.allocation_scale].function)
    if method.pilot_scale is not None and config.pilot_estimate == "pilot":
        scale = method.pilot_scale
    for name, value in settings_of(config, method).items():
        if scale is not None and name in parameters(scale):
            scale = partial(scale, **{name: value})
        else:
            solve = partial(solve, **{name: value})
    return solve, scale


def discards_pilots(config: Settings) -> bool:
    """Whether a step's first rollouts of each prompt are counted and not trained on."""
    return config.pilot_rollouts > 0 and not PILOT_USES[config.pilot_use].trains


def stopping_of(config: Settings) -> stopping.Stopping | None:
    """The stopping rule named by `config`; None: every group has its budget."""
    method = method_of(config, "stopping")
    if method.function is None:
        return None
    bound = settings_of(config, method)
    if is_own(method.name):  # the rule itself
        return partial(method.function, **bound) if bound else method.function
    return method.function(**bound)


def advantage_of(
    config: LanguageSettings, own: Callable[..., torch.Tensor] | None = None
) -> Callable[[Rollouts, Any], torch.Tensor]:
    """`advantage(rollouts, groups)` of a batch with rewards, as `config` names it.

    `groups` has the batch's `prompts`, and `a_P` and `b_P` of their posteriors before it; without it
    nothing is known of them, Beta(1, 1).

    Args:
        own: a function of your own, `f(reward_N, prompt_N, ...)`, in the place of the named one.

    Raises:
        ValueError: if a function of the user's own breaks its contract; see
            `rl.objective.check.check_advantage`.
    """
    method = _method_or_own(config, "advantage", own)
    if own is None and config.multi_objective_aggregation != "sum_then_normalize":
        return _of_functions(config)
    assert isinstance(method, AdvantageMethod)
    function = partial(required(method.function), **settings_of(config, method))
    columns, by_success, binary = method.columns, method.by_success, method.binary
    if own is not None or is_own(method.name):
        any_order = not isinstance(config, DiffusionSettings)
        kept_to(partial(check_advantage, any_order=any_order), config, method)

    def advantage(rollouts: Rollouts, groups: Any = None) -> torch.Tensor:
        more = {name: _column(rollouts, column) for name, column in columns.items()}
        value_N = successes(rollouts) if by_success else required(rollouts.reward_N)
        if binary and groups is not None:
            _require_binary(value_N, rollouts.prompt_N, groups.prompts, name=method.name)
        if method.reads_posterior:
            more |= (
                _parameters(rollouts) if groups is None else {"a_P": groups.a_P, "b_P": groups.b_P}
            )
        return function(value_N, rollouts.prompt_N, **more)

    def checked(rollouts: Rollouts, groups: Any = None) -> torch.Tensor:
        return own_advantage(advantage(rollouts, groups), rollouts, name=method.name)

    return advantage if own is None and not is_own(method.name) else checked


def _parameters(rollouts: Rollouts) -> dict[str, torch.Tensor]:
    """`a_P` and `b_P` of prompts of which nothing is known."""
    num_prompts = int(rollouts.prompt_N.max()) + 1 if len(rollouts) else 0
    return {name: torch.ones(num_prompts, dtype=torch.float64) for name in ("a_P", "b_P")}


def _require_binary(
    success_N: torch.Tensor, prompt_N: torch.Tensor, prompts: list[Prompt], *, name: str
) -> None:
    """Raise ValueError, naming the prompt, unless every success is 0 or 1."""
    other_N = (success_N != 0) & (success_N != 1)
    if other_N.any():
        row = int(other_N.nonzero()[0])
        raise ValueError(
            f"advantage {name!r} needs rewards that pass or fail, but that of a rollout of prompt "
            f"{prompts[int(prompt_N[row])].key} is {float(success_N[row]):g} of full marks; write "
            "success_above: the reward above which a rollout passes, or another advantage"
        )


def _of_functions(config: LanguageSettings) -> Callable[[Rollouts, Any], torch.Tensor]:
    """The advantage of several rewards, each compared by itself."""
    method = AGGREGATIONS[config.multi_objective_aggregation]
    function = partial(required(method.function), **settings_of(config, method))

    def advantage(rollouts: Rollouts, _: Any = None) -> torch.Tensor:
        reward_NF = required(rollouts.reward_NF)
        weights = config.reward_weights or [1.0] * reward_NF.shape[1]
        weight_F = torch.tensor(weights, dtype=torch.float64)
        return function(reward_NF, rollouts.prompt_N, weight_F=weight_F)

    return advantage


def successes(rollouts: Rollouts) -> torch.Tensor:
    """How far each row succeeded; its reward, where nobody has read that as a success."""
    return required(rollouts.reward_N if rollouts.success_N is None else rollouts.success_N)


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
    return required(value)


def down_sampler_of(config: Settings) -> Callable[[Rollouts, float], torch.Tensor]:
    """`rows(rollouts, progress) -> rows_K`, increasing, of the method named by `config`."""
    method = method_of(config, "down_sampling")
    function = method.function
    if function is None:
        return lambda rollouts, _: torch.arange(len(rollouts))
    bound = settings_of(config, method)
    takes_fraction = "row_fraction" in parameters(function)
    takes_progress = "progress" in parameters(function)

    def rows(rollouts: Rollouts, progress: float) -> torch.Tensor:
        more: dict[str, Any] = {"progress": progress} if takes_progress else {}
        if takes_fraction:
            ends = {"initial": config.row_fraction_initial, "final": config.row_fraction_final}
            more["row_fraction"] = downsampling.row_fraction(progress, **ends)
        columns = {n: _row_column(rollouts, column) for n, column in method.columns.items()}
        return kept_rows(function(**columns, **more, **bound), len(rollouts), name=method.name)

    return rows


def _row_column(rollouts: Rollouts, name: str) -> np.ndarray:
    """A column of the rollouts as NumPy; `passed_N` is 1 for a pass and 0 else."""
    if name == "passed_N":
        return (required(rollouts.success_N) == 1).double().numpy()
    column = required(getattr(rollouts, name))
    return (column.double() if name == "advantage_N" else column).numpy()


def advantage_after_of(config: Settings) -> Callable[[Rollouts], torch.Tensor] | None:
    """PODS compares the rows it keeps with each other, by the unbiased std (arXiv:2504.13818)."""
    method = method_of(config, "down_sampling")
    if not (isinstance(method, DownSamplingMethod) and method.compares_again):
        return None
    again: Callable = partial(advantages.grpo, **settings_of(config, ADVANTAGES["grpo"]))
    return lambda rollouts: again(required(rollouts.reward_N), rollouts.prompt_N)


def token_selector_of(config: LanguageSettings) -> Callable[[Rollouts, float], torch.Tensor]:
    """`kept(rollouts, progress) -> kept_NT` of the method named by `config`."""
    method = method_of(config, "token_selection")
    function = method.function
    if function is None:
        return lambda rollouts, _: rollouts.mask_NT
    bound = settings_of(config, method)
    takes_fraction = "fraction" in parameters(function)

    def kept(rollouts: Rollouts, progress: float) -> torch.Tensor:
        more: dict[str, Any] = {}
        if takes_fraction:
            ends = {"initial": config.token_fraction_initial, "final": config.token_fraction_final}
            more["fraction"] = downsampling.token_fraction(progress, **ends)
        columns = {n: _token_column(rollouts, column) for n, column in method.columns.items()}
        return kept_tokens(function(**columns, **more, **bound), rollouts, name=method.name)

    return kept


def _token_column(rollouts: Rollouts, name: str) -> torch.Tensor:
    """A column of the rollouts; `advantage` is the tokens', or the row's where they share one."""
    if name != "advantage":
        return required(getattr(rollouts, name))
    by_token = rollouts.advantage_NT is not None
    return required(rollouts.advantage_NT if by_token else rollouts.advantage_N)


def loss_of(config: LanguageSettings, own: Callable[..., Any] | None = None) -> Callable:
    """The loss named by `config`, its clips bound.

    Args:
        own: a function of your own in the place of the named one.

    Raises:
        ValueError: if a function of the user's own breaks its contract; see
            `rl.objective.check.check_loss`.
    """
    method = _method_or_own(config, "loss", own)
    if own is not None or is_own(method.name):
        kept_to(check_loss, config, method)
    bound = settings_of(config, method)
    return partial(required(method.function), **bound) if bound else required(method.function)


def loss_columns_of(
    config: LanguageSettings, own: Callable[..., Any] | None = None
) -> dict[str, str]:
    """Parameters of the loss besides the common ones -> the columns of the rollouts they are given."""
    method = _method_or_own(config, "loss", own)
    return dict(method.columns)


def kl_ratio_of(config: LanguageSettings) -> str:
    """`kl_ratio`, where it is left out that of the loss, as in TRL."""
    loss = LOSSES.get(config.loss or "")
    return config.kl_ratio or ("sequence" if loss is not None and loss.row_ratio else "token")


def kl_of(config: LanguageSettings) -> Callable | None:
    """`kl(logprob_NT, rows, denominator=...)` named by `config`; None at beta 0."""
    if not config.beta:
        return None
    function = kl_loss(config.kl)

    def kl(logprob_NT: torch.Tensor, rows: Rollouts, *, denominator: float) -> Any:
        old_NT = rows.logprob_NT if rows.old_logprob_NT is None else rows.old_logprob_NT
        more = {"old_logprob_NT": old_NT} if config.kl == "k3_weighted" else {}
        if more and kl_ratio_of(config) == "sequence":
            more["mask_NT"] = rows.mask_NT
        weight_NT = required(rows.weight_NT if rows.kl_weight_NT is None else rows.kl_weight_NT)
        columns = (required(rows.reference_logprob_NT), weight_NT)
        return function(logprob_NT, *columns, denominator=denominator, **more)

    return kl


def trains_everywhere(config: Settings) -> bool:
    """Whether rows without an advantage stay in the batch: their entropies or their KL count."""
    by_kl = bool(config.beta) and config.kl_rows == "all"
    return by_kl or bool(config.entropy_coef) or config.top_entropy_quantile < 1


def _method_or_own(config: Any, stage: str, own: Callable[..., Any] | None) -> Any:
    return method_of(config, stage) if own is None else own_method(config, stage, own)
