"""The objective of a run: advantages, rows kept, weights, loss and KL, chosen once from the settings.

Axes: P prompts, N rollouts (flat rows), K rows kept, T decisions (tokens, or denoising steps).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rl.config.build import (
    advantage_after_of,
    advantage_of,
    down_sampler_of,
    kl_of,
    loss_columns_of,
    loss_of,
    successes,
    token_selector_of,
    trains_everywhere,
)
from rl.config.methods import Settings, method_of, own_method
from rl.config.own import is_own
from rl.config.settings import LanguageSettings
from rl.objective import weights
from rl.policies.contract import ScoredDecisions
from rl.stages.records import Batch, Groups
from rollouts.batch import Rollouts, TokenRollouts

ENTROPY, OLD, REFERENCE = "entropy_NT", "old_logprob_NT", "reference_logprob_NT"
"""Columns that the policy fills in before its first update."""
PLACE = "heterogeneity_NT"
"""The place of each entropy among those of the step, made from `ENTROPY`."""

Sums = dict[str, Tensor]
Advantage = Callable[..., Tensor]
"""`advantage(reward_N, prompt_N, **columns) -> (N,) or (N, T)`; columns of `Rollouts` by name."""
Loss = Callable[..., tuple[Tensor, Sums]]
"""`loss(logprob_NT, old_logprob_NT, advantage, weight_NT, *, denominator, **columns)` gives a scalar,
and sums of statistics. It must divide by `denominator` and by nothing else."""


class History(Protocol):
    """Rewards of earlier steps, for advantages that need them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a run ascends, from rewards to a loss. `objective_of` builds it from settings."""

    config: Settings
    advantage: Callable[[Rollouts, Groups], Tensor]
    """Advantages of full groups, (N,) or (N, T)."""
    advantage_after: Callable[[Rollouts], Tensor] | None = None
    """Advantages of the rows that were kept, compared once more (PODS)."""
    down_sample: Callable[[Rollouts, float], Tensor]
    """Rows to keep, at a share of the run that is done."""
    select_tokens: Callable[[Rollouts, float], Tensor] | None = None
    """(N, T) bool: the tokens that train; None: all."""
    loss_function: Loss
    loss_columns: Mapping[str, str] = field(default_factory=dict)
    """Keywords of the loss besides the common ones, and the attributes of `Rollouts` they take."""
    kl_function: Callable[..., tuple[Tensor, Sums]] | None = None
    """`kl(scored, rows, *, denominator)`; None at beta 0."""
    columns: frozenset[str] = frozenset()
    """Which of `ENTROPY`, `OLD`, `REFERENCE` and `PLACE` must be known before the update."""
    charges_kl_by_token: bool = False
    """Whether the advantage itself subtracts `reward_kl` at each token."""
    history: History | None = None
    """What advantages remember of earlier steps."""

    @property
    def trains_everywhere(self) -> bool:
        """Whether rows without an advantage stay: their entropies or their KL count."""
        return trains_everywhere(self.config)

    def credit(self, rollouts: Rollouts, groups: Groups) -> Rollouts:
        """`rollouts`, which are those of `groups`, with the advantages of full groups."""
        return with_credit(rollouts, self.advantage(rollouts, groups))

    def keep(self, rollouts: Rollouts, progress: float) -> Tensor:
        """(K,) the rows that down-sampling keeps, increasing."""
        return self.down_sample(rollouts, progress) if len(rollouts) else torch.arange(0)

    def credit_kept(self, rollouts: Rollouts) -> Rollouts:
        """`rollouts` as down-sampling kept them; compared once more where the method says so."""
        if self.advantage_after is None or not len(rollouts):
            return rollouts
        return replace(rollouts, advantage_N=self.advantage_after(rollouts))

    def trained_length(self, rollouts: Rollouts) -> Tensor:
        """(N,) decisions that the loss may see: none of a truncated row that is masked."""
        if not self.config.mask_truncated_completions:
            return rollouts.length_N
        assert isinstance(rollouts, TokenRollouts)
        return torch.where(rollouts.truncated_N, 0, rollouts.length_N)

    def row_weights(self, groups: Groups, rollouts: Rollouts) -> tuple[Tensor, float]:
        """The objective's weight of each of these rows, and their denominator.

        A masked row counts where rows or prompts are counted, and has no tokens where those are: TRL's
        denominators, of its losses `grpo` and `dr_grpo` on one side and `dapo` on the other.
        """
        config, num_prompts = self.config, len(groups.prompts)
        weight_N = weights.objective_weight(
            config.objective or "",
            successes(rollouts),
            rollouts.prompt_N,
            num_prompts=num_prompts,
            pass_rate_P=groups.pass_rate_P,
            floor=config.log_floor,
        )
        denominator = weights.denominator(
            config.objective or "",
            config.length_weight or "",
            num_prompts=num_prompts,
            num_rollouts=len(rollouts),
            row_weight_N=weight_N,
            length_N=self.trained_length(rollouts),
        )
        weight_N = weight_N * groups.weight_P[rollouts.prompt_N]
        return weight_N, denominator * (num_prompts + groups.num_padded) / num_prompts

    def loss(
        self, batch: Batch, rows: Rollouts, scored: ScoredDecisions, *, share: int
    ) -> tuple[Tensor, Sums]:
        """The policy's loss of some rows, and beta times their KL to the reference policy.

        The KL covers the decisions that train, with the weights of the loss and over their own sum.
        With entropies, `entropy_coef` times their mean over the decisions that earn a bonus is
        subtracted (TRL's `entropy_coef`, whose mean is over a micro-batch; here it is over the step).

        Args:
            batch: the step's batch, which has the denominators.
            rows: a micro-batch of it.
            scored: `rows` under the current weights.
            share: updates of the step; each takes that part of the denominators, as of the rows.
        """
        assert rows.advantage_N is not None and rows.weight_NT is not None
        old_NT = rows.logprob_NT if rows.old_logprob_NT is None else rows.old_logprob_NT
        more = {name: getattr(rows, column) for name, column in self.loss_columns.items()}
        advantage = rows.advantage_N if rows.advantage_NT is None else rows.advantage_NT
        loss, sums = self.loss_function(
            scored.logprob_NT,
            old_NT,
            advantage,
            rows.weight_NT,
            denominator=batch.denominator / share,
            **more,
        )
        if self.kl_function is not None:
            kl, of_kl = self.kl_function(scored, rows, denominator=batch.kl_denominator / share)
            loss, sums = loss + self.config.beta * kl, sums | of_kl
        if scored.entropy_NT is not None:
            assert rows.bonus_NT is not None
            total = torch.where(rows.bonus_NT, scored.entropy_NT, 0.0).sum()
            loss = loss - self.config.entropy_coef * total / (batch.bonus_denominator / share)
            sums = sums | {"entropy": total.detach(), "entropy_tokens": rows.bonus_NT.sum()}
        return loss, sums

    def state_dict(self) -> dict[str, Any]:
        """What advantages remember of earlier steps."""
        return {"history": None if self.history is None else self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly."""
        if self.history is not None:
            self.history.load_state_dict(state["history"])


def with_credit(rollouts: Rollouts, advantage: Tensor) -> Rollouts:
    """`rollouts` with an advantage per row, or per decision, of which the row's is the mean."""
    if advantage.ndim == 1:
        return replace(rollouts, advantage_N=advantage)
    advantage_NT = torch.where(rollouts.mask_NT, advantage, 0.0)
    mean_N = advantage_NT.sum(1) / rollouts.length_N.clamp(min=1)
    return replace(rollouts, advantage_N=mean_N, advantage_NT=advantage_NT)


def has_signal(rollouts: Rollouts) -> Tensor:
    """(N,) bool: rows of which some decision has an advantage."""
    if rollouts.advantage_NT is not None:
        return (rollouts.advantage_NT != 0).any(dim=1)
    assert rollouts.advantage_N is not None
    return rollouts.advantage_N != 0


def objective_of(
    config: LanguageSettings, *, advantage: Advantage | None = None, loss: Loss | None = None
) -> Objective:
    """The objective that `config` names, for a language model.

    Args:
        config: the settings.
        advantage, loss: functions of your own, instead of those `config` names.

    Raises:
        ValueError: if the loss reads a reference policy that the run does not have.
    """
    kl = kl_of(config)
    compares = method_of_run(config, "advantage", advantage)
    loses = method_of_run(config, "loss", loss)
    loss_columns = loss_columns_of(config, loss)
    needed = set(loss_columns.values()) & {PLACE, ENTROPY, OLD, REFERENCE}
    if REFERENCE in needed and not (config.beta or config.reward_kl):
        raise ValueError(
            f"loss {loses.name} reads {REFERENCE}, and this run has no reference policy: write beta or "
            "reward_kl"
        )
    if loses.wants_heterogeneity or config.adaptive_temperature_tau > 0:
        needed.add(PLACE)
    if config.importance_correction != "none" or config.old_logprobs == "trainer":
        needed.add(OLD)
    if kl is not None:
        needed.add(REFERENCE)
    selects = config.token_selection != "none"
    if selects or config.top_entropy_quantile < 1 or PLACE in needed:
        needed.add(ENTROPY)
    return Objective(
        config=config,
        advantage=advantage_of(config, advantage),
        advantage_after=advantage_after_of(config),
        down_sample=down_sampler_of(config),
        select_tokens=token_selector_of(config) if selects else None,
        loss_function=checked_loss(config, loss),
        loss_columns=loss_columns,
        kl_function=None
        if kl is None
        else lambda scored, rows, denominator: kl(scored.logprob_NT, rows, denominator=denominator),
        columns=frozenset(needed),
        charges_kl_by_token=compares.charges_kl or REFERENCE in compares.columns.values(),
    )


def method_of_run(config: Settings, stage: str, own: Callable[..., Any] | None) -> Any:
    """The record of the method that `config` names for a stage, or of the caller's own function."""
    return method_of(config, stage) if own is None else own_method(config, stage, own)


def checked_loss(config: Any, own: Loss | None) -> Loss:
    """The loss that `config` names, or the caller's own, of which each answer is checked.

    Raises:
        ValueError: if the caller's loss returns anything but a scalar and a dict of scalar sums.
    """
    function, method = loss_of(config, own), method_of_run(config, "loss", own)
    if own is None and not is_own(method.name):
        return function

    def loss(*columns: Tensor, **more: Any) -> tuple[Tensor, Sums]:
        found = function(*columns, **more)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
            raise ValueError(
                f"loss {method.name} must return a scalar loss and a dict of summed statistics, got "
                f"{type(found).__name__}"
            )
        value, sums = found
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss {method.name} must return a scalar tensor, got {got}")
        wrong = [n for n, v in sums.items() if not isinstance(v, Tensor) or v.ndim != 0]
        if wrong:
            raise ValueError(f"loss {method.name}: statistic {wrong[0]!r} must be a scalar tensor")
        return value, sums

    return loss
