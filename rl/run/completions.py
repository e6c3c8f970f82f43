"""Make tables of completions: some rollouts of a step as rows; send them to trackers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers.utils import logging

from rl.stages.records import Batch, Scored
from rollouts.batch import TokenRollouts
from rollouts.prompts import Prompt

logger = logging.get_logger(__name__)

ANSWERS = ("answer", "solution", "ground_truth", "reference", "target", "label")
"""Columns that may hold a reference answer; the first that a prompt has is shown."""

VALIDATED = 64
"""Prompts of a table of validation completions."""

PER_PROMPT = 4
"""Rows of one prompt, so that they can be compared; more where a step has too few prompts."""


def table_of(batch: Batch, *, rows: int, step: int) -> list[dict[str, Any]]:
    """Some rollouts of a step as a table of at most `rows` rows, up to four for each of several prompts.

    The prompts are spread evenly over those of the step, in the order they were drawn; a prompt's
    rollouts stand together, in the order of their slots. Columns: step, prompt_key, prompt (chat as
    text), answer (if the data set has one), completion, reward, reward/NAME of each function, advantage
    (None: the row did not train), tokens, truncated, decided (with verdicts: whether one ended the row),
    and logged/NAME of what reward functions gave to `log_extra`.
    """
    groups: dict[str, list[tuple[Prompt, Scored, int]]] = {}
    for visit in batch.visits:
        for scored in visit.rounds:
            for i, p in enumerate(scored.rollouts.prompt_N.tolist()):
                prompt = visit.prompts[p]
                groups.setdefault(prompt.key, []).append((prompt, scored, i))
    if not groups:
        return []
    advantages = _advantages(batch)
    keys = list(groups)
    wanted = min(len(keys), max(1, rows // PER_PROMPT))
    spread = [keys[i] for i in np.linspace(0, len(keys) - 1, wanted).round().astype(int)]
    share = -(-rows // wanted)
    chosen = [row for key in spread for row in groups[key][:share]][:rows]
    table = [_row(*row, advantages=advantages, step=step) for row in chosen]
    for name in (name for name in table[0] if name.startswith("logged/")):
        # A column is of one type: numbers, or texts.
        values = [row[name] for row in table]
        if not all(value is None or isinstance(value, int | float) for value in values):
            for row, value in zip(table, values, strict=True):
                row[name] = None if value is None else str(value)
    return table


def _row(
    prompt: Prompt, scored: Scored, i: int, *, advantages: dict[tuple, float], step: int
) -> dict[str, Any]:
    rollouts = scored.rollouts
    assert isinstance(rollouts, TokenRollouts)
    answers = [prompt.columns[name] for name in ANSWERS if prompt.columns.get(name) is not None]
    return {
        "step": step,
        "prompt_key": prompt.key,
        "prompt": text_of(prompt.prompt),
        **({"answer": str(answers[0])} if answers else {}),
        "completion": scored.shown_N[i],
        "reward": float(scored.reward_N[i]),
        **{f"reward/{name}": values[i] for name, values in scored.reward_by_function.items()},
        "advantage": advantages.get((prompt.key, _tokens(rollouts, i))),
        "tokens": int(rollouts.length_N[i]),
        "truncated": bool(rollouts.truncated_N[i]),
        **({} if rollouts.decided_N is None else {"decided": bool(rollouts.decided_N[i])}),
        **{f"logged/{name}": values[i] for name, values in scored.logged_columns.items()},
    }


def validation_table(prompts: list[Prompt], scored: Scored, *, step: int) -> list[dict[str, Any]]:
    """Completions of a validation as a table: at most 64 of its prompts, evenly spread, a row each.

    Columns: step, prompt_key, prompt (chat as text), completion and reward. A prompt without a reward
    is left out.
    """
    first: dict[int, int] = {}
    for i, p in enumerate(scored.rollouts.prompt_N.tolist()):
        first.setdefault(p, i)
    wanted = np.linspace(0, len(prompts) - 1, min(len(prompts), VALIDATED)).round().astype(int)
    return [
        {
            "step": step,
            "prompt_key": prompts[p].key,
            "prompt": text_of(prompts[p].prompt),
            "completion": scored.shown_N[first[p]],
            "reward": float(scored.reward_N[first[p]]),
        }
        for p in wanted.tolist()
        if p in first
    ]


def text_of(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as text: itself, or `role: content` of each message on lines of its own."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


def _advantages(batch: Batch) -> dict[tuple, float]:
    """(prompt key, token ids) -> advantage of each row that trains, the mean over its tokens.

    Rows of one prompt with the same tokens have the same reward; should their advantages differ all the
    same, as those of different strata do, the last is shown.
    """
    rollouts = batch.rollouts
    if rollouts.advantage_N is None or not isinstance(rollouts, TokenRollouts):
        return {}
    return {
        (batch.prompts[p].key, _tokens(rollouts, i)): float(rollouts.advantage_N[i])
        for i, p in enumerate(rollouts.prompt_N.tolist())
    }


def _tokens(rollouts: TokenRollouts, i: int) -> tuple[int, ...]:
    return tuple(rollouts.token_NT[i][rollouts.mask_NT[i]].tolist())


def track(
    table: list[dict[str, Any]], *, step: int, report_to: Iterable[str], callbacks: Iterable[Any]
) -> None:
    """Give a table to the trackers of a run; one that has no tables is named in a warning, once.

    Args:
        table: rows of `table_of`, at least one.
        step: the training step.
        report_to: names of the trackers.
        callbacks: the trainer's, among which TensorBoard's writer is found.
    """
    columns: list[Any] = list(table[0])
    cells = [[row[column] for column in columns] for row in table]
    for tracker in report_to:
        if tracker == "wandb":
            import wandb

            if wandb.run is not None:
                # A row of its own: held back for the next log line it would replace an earlier table.
                shown = wandb.Table(columns=columns, data=cells)
                wandb.log({"completions": shown, "train/global_step": step})
        elif tracker == "trackio":
            import pandas
            import trackio

            trackio.log({"completions": trackio.Table(dataframe=pandas.DataFrame(table))})
        elif tracker == "tensorboard":
            for callback in callbacks:
                if getattr(callback, "tb_writer", None) is not None:
                    callback.tb_writer.add_text("completions", _markdown(columns, cells), step)
        elif tracker == "mlflow":
            import mlflow

            values = dict(zip(columns, map(list, zip(*cells, strict=True)), strict=True))
            mlflow.log_table(values, artifact_file=f"completions/step-{step:06d}.json")
        else:
            logger.warning_once(
                f"tables of completions are not sent to {tracker}: they are in the run folder, as "
                "completions/*.parquet"
            )


def _markdown(columns: list[str], cells: list[list[Any]]) -> str:
    def line(values: Iterable[Any]) -> str:
        texts = [str(value).replace("|", "\\|").replace("\n", "<br>") for value in values]
        return f"| {' | '.join(texts)} |"

    return "\n".join([line(columns), line("---" for _ in columns), *map(line, cells)])
