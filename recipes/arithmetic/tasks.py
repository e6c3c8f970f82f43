"""Problems of reasoning-gym at nine levels, and worked solutions to warm-start a model on.

The prompt is reasoning-gym's question, word for word; the answer counts when reasoning-gym's own
verifier gives it the full score. Levels run from nearly solved after the warm start to hopeless:
the longest chains and words are never in it.

A worked solution shows every step, "4-1=3-7=<answer>-4</answer>". The warm start is corrupted on
purpose, so that reinforcement learning has something to find: a step of a chain is with a declared
probability only estimated, which is written "~" in place of "=" and misses by 1 to 3, and a spelled
letter is with a declared probability lost, doubled or swapped. So the model can do better than it
does. Estimates are marked because what the model can see as one decision, it can unlearn as one;
unmarked slips have to be unlearnt separately for every pair of numbers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import reasoning_gym

from rollouts.rewards.text import reasoning_gym as reasoning_gym_score
from samplers.keys import stable_hash, step_generator

Row = dict[str, Any]
Entry = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One difficulty of one task."""

    name: str
    task: str
    """Name of the reasoning-gym data set."""
    settings: dict[str, Any]
    """Its settings, such as the number of terms."""
    warm_start_share: float
    """Share of the warm start's rows; 0: the model never sees such a problem before the rollouts."""
    corruption: float
    """Probability that a step of a worked solution goes wrong."""


def _chain(terms: int, share: float, corruption: float) -> Level:
    settings = {"min_terms": terms, "max_terms": terms, "min_digits": 1, "max_digits": 1}
    return Level(
        name=f"chain_sum {terms} terms",
        task="chain_sum",
        settings=settings,
        warm_start_share=share,
        corruption=corruption,
    )


def _spell(shortest: int, longest: int, share: float, corruption: float) -> Level:
    return Level(
        name=f"spell_backward {shortest}-{longest} letters",
        task="spell_backward",
        settings={"min_word_len": shortest, "max_word_len": longest},
        warm_start_share=share,
        corruption=corruption,
    )


LEVELS = (
    _chain(2, share=0.10, corruption=0.05),
    _chain(3, share=0.16, corruption=0.55),
    _chain(4, share=0.22, corruption=0.55),
    _chain(5, share=0.17, corruption=0.55),
    _chain(6, share=0.0, corruption=0.55),
    _spell(3, 4, share=0.09, corruption=0.03),
    _spell(5, 6, share=0.13, corruption=0.15),
    _spell(7, 8, share=0.13, corruption=0.15),
    _spell(9, 10, share=0.0, corruption=0.15),
)
"""The shares add up to 1."""

LARGEST_MISS = 3
"""An estimate is off by 1 to so much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worked:
    """A worked solution.

    Example::

        Worked(text="4-1~5-7=<answer>-2</answer>", steps=2, corrupted=1)
    """

    text: str
    steps: int
    corrupted: int
    """Steps that went wrong."""


def problems(seed: int, *, train: int, validation: int) -> tuple[list[Row], list[Row]]:
    """Prompts to train on and to validate on, as many of each level.

    The prompts of both are distinct, and none is in both. Validation prompts are drawn first, so
    they do not depend on `train`.

    Args:
        seed: of the draw.
        train: training prompts of each level.
        validation: validation prompts of each level.

    Returns:
        (training rows, validation rows), level by level, with the columns `prompt`, `answer`,
        `task`, `level`, and `entry`, the example as JSON, from which the verifier scores.

    Raises:
        ValueError: if a level has fewer distinct problems than asked for. The smallest, sums of two
            terms, has 200.
    """
    train_rows: list[Row] = []
    validation_rows: list[Row] = []
    for level in LEVELS:
        drawn = list(itertools.islice(_distinct(level, seed), validation + train))
        if len(drawn) < validation + train:
            raise ValueError(
                f"level {level.name!r} has {len(drawn)} distinct problems, fewer than "
                f"{validation} + {train} for validation and training"
            )
        validation_rows += [_row(level, entry) for entry in drawn[:validation]]
        train_rows += [_row(level, entry) for entry in drawn[validation:]]
    return train_rows, validation_rows


def warm_start_rows(
    data_seed: int, *, size: int, held_out: list[Row], seed: int, copies: int = 2
) -> list[Row]:
    """Prompts with worked solutions, for supervised training.

    Args:
        data_seed: of the draw of problems, as for `problems`.
        size: rows, over all levels; each level gets its share, rounded.
        held_out: rows whose prompts must not occur.
        seed: of what goes wrong in the solutions.
        copies: solutions of each problem, corrupted independently. Where a level has too few
            problems for its share, they get more.

    Returns:
        Rows with the columns `prompt`, `completion`, `level`, `steps` and `corrupted`.
    """
    hidden = {row["prompt"] for row in held_out}
    generator = step_generator(seed, "worked solutions", 0)
    rows = []
    for level in LEVELS:
        wanted = round(size * level.warm_start_share)
        allowed = (e for e in _distinct(level, data_seed) if e["question"] not in hidden)
        entries = list(itertools.islice(allowed, -(-wanted // copies)))
        for number in range(wanted):
            entry = entries[number % len(entries)]
            worked = worked_solution(entry, level.corruption, generator=generator)
            rows.append(
                {
                    "prompt": entry["question"],
                    "completion": worked.text,
                    "level": level.name,
                    "steps": worked.steps,
                    "corrupted": worked.corrupted,
                }
            )
    return rows


def worked_solution(entry: Entry, corruption: float, *, generator: np.random.Generator) -> Worked:
    """Solve a problem step by step; each step goes wrong with probability `corruption`.

    Args:
        entry: an example of chain_sum or spell_backward.
        corruption: probability in [0, 1]; at 0 the verifier accepts the solution.
        generator: draws what goes wrong.
    """
    task = entry["metadata"]["source_dataset"]
    if task == "chain_sum":
        return _chain_solution(entry["metadata"]["expression"], corruption, generator)
    if task == "spell_backward":
        return _spelling(entry["metadata"]["word"], corruption, generator)
    raise ValueError(f"there are worked solutions of chain_sum and spell_backward, not of {task!r}")


def verifier_reward(
    completions: list[Any], task: list[str], entry: list[Any], **columns: Any
) -> list[float | None]:
    """1 where reasoning-gym's verifier gives the final answer the full score, else 0.

    Its partial credit (letters in their place, the right number among others) is left out, so that
    the reward is a success and its mean a pass rate.

    Columns: `task` and `entry`, as for the built-in reward `reasoning_gym`.
    """
    return [
        None if score is None else float(score == 1.0)
        for score in reasoning_gym_score(completions=completions, task=task, entry=entry)
    ]


def _chain_solution(expression: str, corruption: float, generator: np.random.Generator) -> Worked:
    first, *rest = expression.split()
    value, corrupted = int(first), 0
    text = first
    operations = list(zip(rest[::2], rest[1::2], strict=True))
    for number, (operator, term) in enumerate(operations, start=1):
        value += int(term) if operator == "+" else -int(term)
        sign = "="
        if generator.random() < corruption:
            sign = "~"
            miss = int(generator.integers(1, LARGEST_MISS + 1))
            value += miss if generator.random() < 0.5 else -miss
            corrupted += 1
        text += f"{operator}{term}{sign}"
        text += f"<answer>{value}</answer>" if number == len(operations) else str(value)
    return Worked(text=text, steps=len(operations), corrupted=corrupted)


def _spelling(word: str, corruption: float, generator: np.random.Generator) -> Worked:
    reversed_word, written, steps, corrupted, position = word[::-1], "", 0, 0, 0
    while position < len(word):
        letter = reversed_word[position]
        following = reversed_word[position + 1 : position + 2]
        position += 1
        steps += 1
        if generator.random() >= corruption:
            written += letter
            continue
        corrupted += 1
        kind = generator.integers(3)
        if kind == 1:
            written += letter + letter
        elif kind == 2 and following not in ("", letter):
            written += following + letter
            position += 1
        # else the letter is lost
    return Worked(text=f"<answer>{written}</answer>", steps=steps, corrupted=corrupted)


def _row(level: Level, entry: Entry) -> Row:
    return {
        "prompt": entry["question"],
        "answer": entry["answer"],
        "task": level.task,
        "level": level.name,
        "entry": json.dumps(entry),
    }


def _distinct(level: Level, seed: int) -> Iterator[Entry]:
    """Examples of a level with different questions; ends after 10,000 draws without a new one."""
    # Example i of a reasoning-gym data set is drawn with seed + i, so seeds have to lie far apart.
    start = stable_hash(seed, level.name) % 2**40
    source = reasoning_gym.create_dataset(level.task, seed=start, size=2**40, **level.settings)
    seen: set[str] = set()
    last_new = 0
    for number in itertools.count():
        if number - last_new > 10_000:
            return
        entry = source[number]
        if entry["question"] not in seen:
            seen.add(entry["question"])
            last_new = number
            yield entry
