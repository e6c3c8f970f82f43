"""What a run of `recipes/train.py` with `task: arithmetic` starts from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.arithmetic.tasks import Row, problems, verifier_reward
from recipes.arithmetic.warm_start import WarmStart, warm_start
from rl.config.own import nearest


@dataclass
class ArithmeticSettings:
    """`task_settings` of the YAML file.

    Example::

        ArithmeticSettings(folder="runs/warm-start", train=100, warm_start={"steps": 600})
    """

    folder: str = "runs/arithmetic-warm-start"
    """Where the warm-started model is, or is put. A name of its own for each setting keeps both."""
    train: int = 100
    """Training prompts of each level; there are nine levels."""
    validation: int = 28
    """Validation prompts of each level."""
    data_seed: int = 0
    """Of the problems. It is not the run's seed, so that every run is judged on the same prompts."""
    warm_start: dict[str, Any] = field(default_factory=dict)
    """Fields of `WarmStart` that are to differ from their defaults."""


def prepare(
    settings: Mapping[str, Any] | str, *, seed: int
) -> tuple[Path, list[Row], list[Row], list[Any]]:
    """The warm-started model, training rows, validation rows and rewards.

    Args:
        settings: fields of `ArithmeticSettings`, or the same as JSON.
        seed: of the run. Nothing here depends on it: seeds of one setting share model and prompts,
            and `warm_start: {seed: 1}` makes another model.

    Raises:
        ValueError: for a setting that does not exist or does not fit.
    """
    given = json.loads(settings) if isinstance(settings, str) else dict(settings)
    _check_names("task_settings", given, ArithmeticSettings)
    chosen = ArithmeticSettings(**given)
    _check_names("task_settings.warm_start", chosen.warm_start, WarmStart)
    shared = {"data_seed": chosen.data_seed, "validation": chosen.validation}
    for name in shared.keys() & chosen.warm_start.keys():
        raise ValueError(f"write {name} in task_settings itself, it serves rollouts and warm start")
    train, validation = problems(chosen.data_seed, train=chosen.train, validation=chosen.validation)
    folder = warm_start(chosen.folder, WarmStart(**shared, **chosen.warm_start))
    return folder, train, validation, [verifier_reward]


def _check_names(where: str, given: Mapping[str, Any], kind: type) -> None:
    names = [item.name for item in dataclasses.fields(kind)]
    for name in given:
        if name not in names:
            raise ValueError(
                f"{where} has no {name!r}.{nearest(name, names)} It has {', '.join(names)}"
            )
