"""Compares a resumed run with what it was: settings, model, data and rewards that have changed.

What each setting decides (`rl/config/declare.py`) says what a change of it means. With `if_run_exists:
resume` a changed setting makes another run and is refused, unless it makes the run longer, more patient,
or matters to neither rollouts nor updates. With `resume_from_checkpoint` what decides the rollouts may
not change; other changes are warned of and recorded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from rl.config.declare import LENGTH, NOTHING, PATIENCE
from rl.config.declared import decides
from rl.config.diffusion_settings import DiffusionSettings
from rl.config.settings import LanguageSettings

logger = logging.get_logger(__name__)

STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Schedules that are no function of the step."""

OF_RECIPES = ("num_threads", "report")
"""Settings of recipes that no rollout and no update depends on."""


def _which(*what: str) -> frozenset[str]:
    """The settings, of language and of diffusion runs, that decide this."""
    return frozenset(decides(LanguageSettings, *what) + decides(DiffusionSettings, *what))


OF_NO_MATTER = _which(NOTHING).union(OF_RECIPES)
LONGER, PATIENT = _which(LENGTH), _which(PATIENCE)


def refuse_decisive(args: Any, saved: dict[str, Any], folder: str) -> None:
    """Raise if a setting that decides which rollouts are made differs from that of a checkpoint.

    Args:
        args: the settings now.
        saved: decisive settings of the checkpoint; one that did not exist yet is not compared.
        folder: the checkpoint, for the message.

    Raises:
        ValueError: naming each with its old and its new value.
    """
    changed = [
        f"{name} was {saved[name]!r}, is {value!r}"
        for name, value in args.decisive_settings().items()
        if name in saved and saved[name] != value
    ]
    if changed:
        raise ValueError(
            f"{folder} was made with other settings, so its run cannot be continued exactly: "
            f"{'; '.join(changed)}; write the old values, or another output_dir"
        )


def refuse_other_optimizer(args: Any, before: dict[str, Any], folder: str) -> None:
    """Raise if the state of a checkpoint's optimizer or schedule means nothing to those of now.

    Args:
        args: the settings now.
        before: the settings then, as `run.json` has them.
        folder: the checkpoint, for the message.

    Raises:
        ValueError: naming the setting with its old and its new value.
    """
    now = json.loads(json.dumps(args.to_dict(), default=str))
    names = ["optim", "optim_args", "optim_target_modules"]
    if {before.get("lr_scheduler_type"), now["lr_scheduler_type"]} & {*STATEFUL_SCHEDULES}:
        names.append("lr_scheduler_type")
    changed = {n: [before[n], now[n]] for n in names if n in before and before[n] != now[n]}
    if changed:
        raise ValueError(
            f"{folder} holds the state of another optimizer or schedule: {_told(changed)}; write the "
            "old values, or another output_dir"
        )


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A run that is resumed, against what it was."""

    step: int
    """The step it goes on from."""
    earlier: list[dict[str, Any]]
    """Changes of earlier resumes that are still of this run: [{"step": 4, "settings": {...}}, ...]."""
    now: dict[str, list[Any]]
    """{name: [value it had, value now]} of this resume."""
    libraries: dict[str, list[Any]] = field(default_factory=dict)
    """The same, of versions."""

    @property
    def changes(self) -> list[dict[str, Any]]:
        """[{"step": 6, "settings": {"learning_rate": [1e-5, 1e-6]}}, ...]: from step 7 on it is 1e-6."""
        return self.earlier + ([{"step": self.step, "settings": self.now}] if self.now else [])

    def refuse_another_run(self, folder: Any) -> None:
        """Raise if something that makes a run another one changed.

        Raises:
            ChangedRunError: naming each with its old and its new value.
        """
        others = {
            name: pair
            for name, pair in self.now.items()
            if name not in PATIENT and not (name in LONGER and _is_more(*pair))
        }
        if others:
            raise ChangedRunError(
                f"output_dir={folder} holds another run: {_told(others)}; write another output_dir "
                "for a run of its own, or resume_from_checkpoint: true to go on with the weights of "
                "this one"
            )

    def refuse_nothing_left(self, folder: Any, ended_by: str) -> None:
        """Raise if something changed in a run that takes no further step: its record would be false.

        Raises:
            ChangedRunError: naming each change, and what ended the run.
        """
        if self.now:
            raise ChangedRunError(
                f"output_dir={folder} holds a run that has ended, at step {self.step} by {ended_by}, "
                f"and no step would be made with the changes: {_told(self.now)}; write another "
                "output_dir, or a larger limit to go on"
            )

    def tell(self) -> None:
        """Warn of what changed."""
        for what, found in (("settings", self.now), ("libraries", self.libraries)):
            if found:
                logger.warning(
                    f"the run goes on from step {self.step} with other {what}: {_told(found)}"
                )


class ChangedRunError(ValueError):
    """What is to be resumed is another run than the one the folder holds."""


def compare(old: dict[str, Any], about: dict[str, Any], *, step: int) -> Compared:
    """What is another now in a run that goes on from `step`.

    Changes after `step` are of steps that the resumed run makes again: they are undone before
    settings are compared, and forgotten.

    Args:
        old: what `run.json` said of the run, or a checkpoint of it.
        about: what it is to say now.
        step: the step it goes on from.
    """
    earlier, before = list(old.get("changes", [])), _flat(old)
    while earlier and earlier[-1]["step"] >= step:
        undone = earlier.pop()["settings"]
        before |= {name: value for name, (value, _) in undone.items()}
    return Compared(
        step=step,
        earlier=earlier,
        now=_differences(before, _flat(about)),
        libraries=_differences(old.get("versions") or {}, about.get("versions") or {}),
    )


def _flat(about: dict[str, Any]) -> dict[str, Any]:
    """Everything that is compared, as plain values by name."""
    parts = [about.get(name) or {} for name in ("settings", "recipe", "origins")]
    found = {name: value for part in parts for name, value in part.items()}
    return json.loads(json.dumps(found, default=str))


def _differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    return {
        name: [before[name], value]
        for name, value in now.items()
        if name in before and before[name] != value and name not in OF_NO_MATTER
    }


def _told(changes: dict[str, list[Any]]) -> str:
    return "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changes.items())


def _is_more(old: Any, new: Any) -> bool:
    return new is None or (isinstance(old, (int, float)) and new > old)
