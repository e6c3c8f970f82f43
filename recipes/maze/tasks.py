"""Mazes at seven levels, paths to warm-start a model on, and the reward.

Levels run from nearly solved after the warm start to hopeless: the largest mazes are never in it. Its
paths search the maze, and on purpose guess some of their moves, so that reinforcement learning has
something to find. Guesses are marked because what the model can see as one decision, it can unlearn as
one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from samplers.keys import step_generator

from .mazes import distances, distinct, draw, read, search_path, walk

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One size of maze."""

    size: int
    """Of the grid with its walls."""
    warm_start_share: float
    """Share of the warm start's rows; 0: the model never sees such a maze before the rollouts."""
    most: int | None = None
    """Mazes that there are, where these are few."""
    loops: float = 0.15
    """Probability that a wall is open although every cell can be reached without."""
    careful: float = 0.35
    """Share of the warm start's paths that guess nothing."""
    guess: float = 0.5
    """Probability that a move of its other paths is guessed."""

    @property
    def name(self) -> str:
        return f"size {self.size}"


LEVELS = (
    Level(size=5, warm_start_share=0.2, most=60),
    Level(size=7, warm_start_share=0.4),
    Level(size=9, warm_start_share=0.4),
    Level(size=11, warm_start_share=0.0),
    Level(size=13, warm_start_share=0.0),
    Level(size=15, warm_start_share=0.0),
    Level(size=17, warm_start_share=0.0),
)
"""The shares add up to 1."""

LONGEST = 32
"""Moves of the warm start's paths, at most."""


def problems(seed: int, *, train: int, validation: int) -> tuple[list[Row], list[Row]]:
    """Mazes to train on and to validate on, as many of each level.

    No two of a level are alike, wherever they lie, and none is in both. Validation mazes are drawn
    first, so they do not depend on `train`.

    Args:
        seed: of the draw.
        train: training mazes of each level. The smallest, of which there are 60, trains on those that
            validation leaves, if they are fewer.
        validation: validation mazes of each level, fewer than 60.

    Returns:
        (training rows, validation rows), level by level, with the columns `prompt`, `level` and
        `shortest`, the moves of a shortest path.

    Raises:
        ValueError: if validation leaves nothing to train on.
    """
    train_rows: list[Row] = []
    validation_rows: list[Row] = []
    for level in LEVELS:
        here = train if level.most is None else min(train, level.most - validation)
        if here < 1:
            raise ValueError(
                f"level {level.name!r} has {level.most} mazes, so validation must be less than that and "
                f"train at least 1, got {validation} and {train}"
            )
        generator = step_generator(seed, f"mazes of {level.name}", 0)
        mazes = distinct(level.size, loops=level.loops, generator=generator)
        rows = [
            {"prompt": maze.text, "level": level.name, "shortest": distances(maze)[maze.start]}
            for maze in itertools.islice(mazes, validation + here)
        ]
        validation_rows += rows[:validation]
        train_rows += rows[validation:]
    return train_rows, validation_rows


def warm_start_rows(
    data_seed: int, *, size: int, held_out: list[Row], seed: int, copies: int = 4
) -> list[Row]:
    """Mazes with paths, for supervised training.

    Args:
        data_seed: of the draw of mazes.
        size: rows, over all levels; each level gets its share, rounded.
        held_out: rows whose mazes must not occur, wherever they lie.
        seed: of the guesses.
        copies: paths of each maze.

    Returns:
        Rows with the columns `prompt`, `completion` and `level`, and `moves` and `kinds` as
        `search_path` returns them.
    """
    hidden = {read(row["prompt"]).content for row in held_out}
    mazes = step_generator(data_seed, "mazes of the warm start", 0)
    paths = step_generator(seed, "paths of the warm start", 0)
    rows: list[Row] = []
    for level in LEVELS:
        wanted = len(rows) + round(size * level.warm_start_share)
        while len(rows) < wanted:
            maze = draw(level.size, loops=level.loops, generator=mazes)
            if maze.content in hidden:
                continue
            for _ in range(min(copies, wanted - len(rows))):
                guess = level.guess * (paths.random() >= level.careful)
                path, moves, kinds = search_path(maze, guess, longest=LONGEST, generator=paths)
                rows.append(
                    {
                        "prompt": maze.text,
                        "completion": path,
                        "level": level.name,
                        "moves": moves,
                        "kinds": kinds,
                    }
                )
    return rows


class GoalReached:
    """1 where the path reaches the goal before it hits a wall, else 0."""

    __name__ = "goal_reached"

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float]:
        """The reward of each completion; words after the goal or the first wall do not count."""
        pairs = zip(prompts, completions, strict=True)
        return [walk(read(prompt), path)[1] or 0.0 for prompt, path in pairs]

    def decided(self, prompt: str, completion_so_far: str) -> float | None:
        """What the finished completion will earn, whatever follows; None while that is open.

        A goal at the very end is open: with a character more it could be the name of a passage.
        """
        cells, reward = walk(read(prompt), completion_so_far)
        return None if reward == 1 and completion_so_far.endswith(cells[-1]) else reward


goal_reached = GoalReached()
