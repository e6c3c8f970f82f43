"""The embedded task `arithmetic`: its model, prompts and reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments import check_names, read_settings
from .tasks import Row, problems, verifier_reward
from .warm_start import WarmStart, warm_start


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
    chosen = read_settings(ArithmeticSettings, settings, where="task_settings")
    check_names(WarmStart, chosen.warm_start, where="task_settings.warm_start")
    shared = {"data_seed": chosen.data_seed, "validation": chosen.validation}
    for name in shared.keys() & chosen.warm_start.keys():
        raise ValueError(f"write {name} in task_settings itself, it serves rollouts and warm start")
    train, validation = problems(chosen.data_seed, train=chosen.train, validation=chosen.validation)
    folder = warm_start(chosen.folder, WarmStart(**shared, **chosen.warm_start))
    return folder, train, validation, [verifier_reward]
