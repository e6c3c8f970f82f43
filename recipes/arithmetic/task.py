"""The embedded task `arithmetic`: its model, prompts and reward.

python -m recipes.arithmetic.task --folder runs/warm-start [--seed 1]     # the warm start alone
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import warm_start
from .tasks import LEVELS, Row, problems, verifier_reward, warm_start_rows
from .words import build_tokenizer

TASK = warm_start.Task(
    name="arithmetic",
    levels=LEVELS,
    problems=problems,
    solutions=warm_start_rows,
    build_tokenizer=build_tokenizer,
    rewards=[verifier_reward],
)


def prepare(
    settings: Mapping[str, Any] | str, *, seed: int
) -> tuple[Path, list[Row], list[Row], list[Any]]:
    """The warm-started model, training rows, validation rows and rewards: `warm_start.prepare`.

    Args:
        settings: fields of `warm_start.TaskSettings`, or the same as JSON.
        seed: of the run. Nothing here depends on it.
    """
    return warm_start.prepare(TASK, settings)


if __name__ == "__main__":
    warm_start.command(TASK)
