"""The embedded task `maze`: its model, prompts and reward.

python -m recipes.maze.task --folder runs/warm-start [--seed 1]     # the warm start alone
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from .. import warm_start
from ..tiny_model import build_tokenizer
from .mazes import WORD, WORDS
from .tasks import LEVELS, Row, goal_reached, problems, warm_start_rows


def words() -> PreTrainedTokenizerFast:
    """Tokenizer with a token for each cell, shape and direction, four more, and the special ones."""
    return build_tokenizer(WORDS, pattern=WORD.pattern, longest=256)


TASK = warm_start.Task(
    name="maze",
    levels=LEVELS,
    problems=problems,
    solutions=warm_start_rows,
    build_tokenizer=words,
    rewards=[goal_reached],
    defaults={"rows": 32_000, "steps": 1400, "learning_rate": 2e-3, "num_layers": 2},
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
