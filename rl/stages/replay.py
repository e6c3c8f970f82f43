"""Hold rows of earlier collections, and train on some of them once more beside those of the step.

What a row counts then, and that expectations stay, says `rl/objective/replay.py`. Advantages and weights
are those of a row's birth; its log-probabilities under the policy before the update are computed anew,
which takes one more forward pass of the replayed rows.

Only rows that will be replayed are held: of K rows that train K f / (1 - f). Each takes, per token of
the longest row drawn with it, 8 bytes of ids, 4 of log-probabilities, 8 of weights and 1 of mask, and
what else was computed per token, in memory and in the checkpoint. Every process holds all of them.
Axes: P prompts, K rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from rl.config.methods import method_of
from rl.config.settings import LanguageSettings
from rl.objective.replay import part_of_a_row, replay_factor, replayed_weight, rows_of_ages
from rl.policies.contract import Policy
from rl.ranks import Ranks
from rl.stages.objective import OLD, Objective
from rl.stages.recompute import recompute
from rl.stages.records import Batch
from rollouts.batch import Rollouts, TokenRollouts, concatenate
from rollouts.prompts import Prompt
from samplers.keys import step_generator
from samplers.ledger import Ledger

OF_THE_STEP = ("old_logprob_NT", "kl_weight_NT", "bonus_NT")
"""Columns that belong to one step and not to a row."""


@dataclass(frozen=True, kw_only=True)
class _Due:
    """Rows that are replayed at one age."""

    rollouts: TokenRollouts
    """Weights are over the denominator of their step, `logprob_NT` what ratios compared with then."""
    row_P: tuple[int, ...]
    """Rows of the data set, as `prompt_N` counts them."""


class Replay:
    """Chooses, when a step is prepared, which of its rows come again, and adds those that are due.

    Args:
        config: the settings.
        prompts: of the data set.
    """

    def __init__(self, config: LanguageSettings, prompts: list[Prompt]) -> None:
        self._share, self._steps = config.replay_share, config.replay_steps
        self._cap, self._seed = config.replay_weight_max, config.seed
        self._per_row = method_of(config, "loss").one_ratio_per_row
        self._prompts = prompts
        self._row_of = {prompt.key: row for row, prompt in enumerate(prompts)}
        self._held: dict[int, dict[int, _Due]] = {}
        """Step of birth -> step of replay -> rows. Replaced, never changed."""

    def mix(
        self,
        batch: Batch,
        objective: Objective,
        policy: Policy,
        ranks: Ranks,
        model: torch.nn.Module,
        *,
        step: int,
        ledger: Ledger,
    ) -> Batch:
        """`batch` with the rows that are due at `step`; some of its own are kept for later steps.

        The denominators stay those of the step. A KL to the reference and an entropy bonus are taken
        over the step's own rows alone, as they are without replay.

        Args:
            batch: the step's rows, prepared.
            objective: of the run.
            policy: scores the rows that are due.
            ranks: the processes.
            model: as it is trained, wrapped.
            step: optimizer steps taken.
            ledger: counts what is replayed.
        """
        held = {born: due for born, due in self._held.items() if born >= step - self._steps}
        born_and_due = [(born, due[step]) for born, due in held.items() if step in due]
        part = part_of_a_row(self._share, self._steps, len(held))
        self._held = {
            born: {when: rows for when, rows in due.items() if when > step}
            for born, due in (held | {step: self._chosen(batch, step)}).items()
        }
        metrics = {"replay/rows": 0.0, "replay/share": 0.0, "replay/fresh_part": part}
        if not born_and_due:
            ledger.replayed(0, 0)
            rollouts = batch.rollouts
            if len(rollouts):
                rollouts = _fresh(rollouts, objective, part)
            return replace(batch, rollouts=rollouts, metrics=batch.metrics | metrics)
        old = _joined([rows for _, rows in born_and_due], version=batch.rollouts.version)
        rows, about = self._weighed(old.rollouts, batch, objective, policy, ranks, model, part)
        mixed, prompts = rows, [self._prompts[row] for row in old.row_P]
        if len(batch.rollouts):
            fresh = _fresh(batch.rollouts, objective, part)
            assert isinstance(fresh, TokenRollouts)
            mixed = concatenate(_alike([fresh, rows]), offsets=[0, len(fresh.prompt_ids)])
            prompts = [*batch.prompts, *prompts]
        assert rows.weight_NT is not None
        ledger.replayed(len(rows), int((rows.weight_NT != 0).sum()))
        age = sum((step - born) * len(due.rollouts) for born, due in born_and_due) / len(rows)
        metrics |= {
            "replay/rows": float(len(rows)),
            "replay/share": len(rows) / len(mixed),
            "replay/age": age,
        }
        return replace(
            batch, rollouts=mixed, prompts=prompts, metrics=batch.metrics | metrics | about
        )

    def _chosen(self, batch: Batch, step: int) -> dict[int, _Due]:
        """Which rows of a step are replayed, by the step in which they are."""
        rollouts = batch.rollouts
        rows_A = rows_of_ages(
            len(rollouts),
            share=self._share,
            steps=self._steps,
            generator=step_generator(self._seed, "replay", step),
        )
        found: dict[int, _Due] = {}
        for age, rows in enumerate(rows_A, start=1):
            if len(rows):
                part = rollouts.take(torch.from_numpy(rows))
                found[step + age] = self._due(part, batch)
        return found

    def _due(self, rollouts: Rollouts, batch: Batch) -> _Due:
        """These rows of `batch`, to be kept."""
        assert isinstance(rollouts, TokenRollouts) and rollouts.weight_NT is not None
        then_NT = (
            rollouts.logprob_NT if rollouts.old_logprob_NT is None else rollouts.old_logprob_NT
        )
        used, prompt_N = rollouts.prompt_N.unique(return_inverse=True)
        longest = int(rollouts.mask_NT.any(dim=0).nonzero().max()) + 1
        rollouts = replace(
            rollouts,
            prompt_N=prompt_N,
            prompt_ids=tuple(rollouts.prompt_ids[p] for p in used.tolist()),
            logprob_NT=torch.where(rollouts.mask_NT, then_NT, 0.0),
            weight_NT=rollouts.weight_NT / batch.denominator,
            **dict.fromkeys(OF_THE_STEP),  # type: ignore[arg-type]
        )
        short = {name: value[:, :longest].clone() for name, value in _columns(rollouts, "_NT")}
        row_P = tuple(self._row_of[batch.prompts[p].key] for p in used.tolist())
        return _Due(rollouts=replace(rollouts, **short), row_P=row_P)  # type: ignore[arg-type]

    def _weighed(
        self,
        old: TokenRollouts,
        batch: Batch,
        objective: Objective,
        policy: Policy,
        ranks: Ranks,
        model: torch.nn.Module,
        part: float,
    ) -> tuple[TokenRollouts, dict[str, float]]:
        """Rows that are due, with their weights in this step, and how far the policy went from them."""
        scored = recompute(policy, ranks, model, old, {OLD})
        assert isinstance(scored, TokenRollouts)
        old = scored
        assert old.old_logprob_NT is not None and old.weight_NT is not None
        factor_NT, sums = replay_factor(
            old.old_logprob_NT, old.logprob_NT, old.mask_NT, cap=self._cap, per_row=self._per_row
        )
        weight_NT = replayed_weight(
            old.weight_NT, factor_NT, denominator=batch.denominator, part=part
        )
        old = replace(old, weight_NT=weight_NT)
        if objective.kl_function is not None:
            old = replace(old, kl_weight_NT=torch.zeros_like(weight_NT))
        if objective.config.entropy_coef:
            old = replace(old, bonus_NT=torch.zeros_like(old.mask_NT))
        count = max(float(sums["is_count"]), 1.0)
        return old, {
            "replay/ratio_mean": float(sums["is_ratio"]) / count,
            "replay/share_above_cap": float(sums["is_above"]) / count,
        }

    def state_dict(self) -> dict[str, Any]:
        """Every row that is held, column by column, by its steps of birth and of replay; a copy."""
        return {
            str(born): {
                str(when): {
                    "row_P": list(due.row_P),
                    "version": due.rollouts.version,
                    "prompt_ids": [list(ids) for ids in due.rollouts.prompt_ids],
                    "columns": {name: value.numpy() for name, value in _columns(due.rollouts)},
                }
                for when, due in of_birth.items()
            }
            for born, of_birth in self._held.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` exactly."""
        self._held = {
            int(born): {
                int(when): _Due(
                    row_P=tuple(due["row_P"]),
                    rollouts=TokenRollouts(
                        version=due["version"],
                        prompt_ids=tuple(tuple(ids) for ids in due["prompt_ids"]),
                        **{name: torch.tensor(value) for name, value in due["columns"].items()},
                    ),
                )
                for when, due in of_birth.items()
            }
            for born, of_birth in state.items()
        }


def make_replay(config: Any, prompts: list[Prompt]) -> Replay | None:
    """The replay that `config` describes; None: every row trains in its own step alone."""
    return Replay(config, prompts) if config.replay_share else None


def _fresh(rollouts: Rollouts, objective: Objective, part: float) -> Rollouts:
    """The step's own rows, which leave a part of the step to others. The KL's weights stay."""
    weight_NT = rollouts.weight_NT
    assert weight_NT is not None
    if objective.kl_function is not None and rollouts.kl_weight_NT is None:
        rollouts = replace(rollouts, kl_weight_NT=weight_NT)
    if rollouts.old_logprob_NT is None:
        rollouts = replace(rollouts, old_logprob_NT=rollouts.logprob_NT)
    return replace(rollouts, weight_NT=weight_NT * part)


def _joined(dues: list[_Due], *, version: int) -> _Due:
    """Several sets of rows as one."""
    parts = _alike([replace(due.rollouts, version=version) for due in dues])
    ends = [sum(len(due.row_P) for due in dues[:i]) for i in range(len(dues))]
    row_P = tuple(row for due in dues for row in due.row_P)
    return _Due(rollouts=concatenate(parts, offsets=ends), row_P=row_P)


def _alike(parts: list[Any]) -> list[Any]:
    """`parts` without the columns that not all of them have: what one step alone computed."""
    names = [{name for name, _ in _columns(part)} for part in parts]
    lacking = {name for has in names for name in has if not all(name in has for has in names)}
    return [replace(part, **dict.fromkeys(lacking)) for part in parts]


def _columns(rollouts: Rollouts, ending: str = "") -> list[tuple[str, torch.Tensor]]:
    values = [(field.name, getattr(rollouts, field.name)) for field in fields(rollouts)]
    return [(n, v) for n, v in values if isinstance(v, torch.Tensor) and n.endswith(ending)]
