"""The embedded task `search`: its model, prompts, tool and reward.

python -m recipes.search.task --folder runs/warm-start [--seed 1]     # the warm start alone
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollouts.agents.search import SearchIndex
from rollouts.rewards.text import exact_answer, f1

from .. import warm_start
from .expert import LEVELS, Row, demonstrations
from .words import build_tokenizer
from .world import Question, World, draw


def problems(seed: int, *, train: int, validation: int) -> tuple[list[Row], list[Row]]:
    """Questions to train on and to validate on, as many of each level, in a world of the seed.

    Returns:
        (training rows, validation rows), level by level, with the columns `prompt` (one message),
        `answer`, `level`, `hops` and `supports`, the ids of the passages that lead to the answer.

    Raises:
        ValueError: if the world has not as many questions.
    """
    world = draw(seed)
    parts = (("train", world.train, train), ("validation", world.validation, validation))
    train_rows, validation_rows = [
        [
            _row(question)
            for level in LEVELS
            for question in _some(name, questions, level.hops, number)
        ]
        for name, questions, number in parts
    ]
    return train_rows, validation_rows


def _some(name: str, questions: list[Question], hops: int, number: int) -> list[Question]:
    there = [question for question in questions if question.hops == hops]
    if not 1 <= number <= len(there):
        raise ValueError(
            f"{name} must be from 1 to {len(there)}, the questions of {hops} hops; got {number}"
        )
    return there[:number]


def _row(question: Question) -> Row:
    return {
        "prompt": [{"role": "user", "content": question.text}],
        "answer": question.answer,
        "level": next(level.name for level in LEVELS if level.hops == question.hops),
        "hops": question.hops,
        "supports": [fact.id for fact in question.chain],
    }


def world_index(seed: int, folder: Path) -> SearchIndex:
    """The index of the world's corpus, made in the folder unless it is there."""
    world: World = draw(seed)
    corpus = world.write(folder / "corpus.jsonl")
    return SearchIndex.build(corpus, folder / "index.sqlite", quiet=True)


TASK = warm_start.Task(
    name="search",
    levels=LEVELS,
    problems=problems,
    solutions=demonstrations,
    build_tokenizer=build_tokenizer,
    rewards=[exact_answer, f1],
    defaults={"rows": 12_000, "steps": 600, "batch_size": 32, "hidden_size": 96},
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
