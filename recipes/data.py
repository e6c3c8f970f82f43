"""Rows of prompts from a file, a folder or the hub, brought into the one shape the trainer reads.

That shape is a list of dicts with a column `prompt` (a string, or a list of messages) and whatever
else the reward functions ask for, usually `answer`. Rows are numbered from 0.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rollouts.prompts import prompt_key
from samplers.keys import stable_hash

Row = dict[str, Any]

SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "eval", "test")
"""Beginnings of file names that say which split of a data set a file in a folder holds."""


def load_rows(
    source: str | Path,
    *,
    split: str = "train",
    config: str | None = None,
    prompt_column: str = "prompt",
    answer_column: str | None = None,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
    conversational: bool = False,
    limit: int | None = None,
) -> list[Row]:
    """Rows of a data set, each with a column `prompt`.

    Args:
        source: a file (`READERS` lists the kinds); a folder written by `datasets.save_to_disk`; a
            folder of such files; or, where nothing of that name exists, an id on the hub.
        split: which split of a hub data set, of a saved `DatasetDict`, or of a folder whose file
            names begin with their split. A file by itself, or a folder whose files do not name
            splits, is one split and taken whole.
        config: configuration of a hub data set, such as "main" of openai/gsm8k.
        prompt_column: column to rename to `prompt`. A dot reaches into a nested column, as in
            "extra_info.question"; that one stays where it is, too.
        answer_column: column to rename to `answer`, likewise; None leaves the columns alone. A
            column that had the name before is replaced.
        prompt_template: text in which "{question}" stands for the row's column `question`; it makes
            the prompt instead of `prompt_column`. A literal brace is doubled: "\\\\boxed{{}}".
        system_prompt: put in front of every prompt as a message of role system.
        conversational: turn a string prompt into one message of role user. A system prompt implies
            it.
        limit: at most so many rows, the first ones.

    Raises:
        ValueError: nothing found under that name; a malformed file, with its line; no rows; a
            missing column; settings that contradict each other.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"dataset_limit must be at least 1 or None, got {limit}")
    if prompt_template is not None and prompt_column != "prompt":
        raise ValueError(
            f"prompt_template and prompt_column={prompt_column!r} both say what the prompt is: "
            f"leave out prompt_column and write {{{prompt_column}}} in the template"
        )
    template = None if prompt_template is None else _parsed_template(prompt_template)
    rows = [dict(row) for row in itertools.islice(_read(str(source), split, config), limit)]
    if not rows:
        raise ValueError(f"{str(source)!r} has no rows; at least one is needed")
    for number, row in enumerate(rows):
        prompt: Any
        if template is not None:
            prompt = _filled(template, row, number)
        else:
            prompt = _value(row, prompt_column, number, asked_by="prompt_column")
        if answer_column is not None:
            answer = _value(row, answer_column, number, asked_by="answer_column")
            row.pop(answer_column, None)
            row["answer"] = answer
        if template is None:
            row.pop(prompt_column, None)
        if conversational or system_prompt is not None:
            prompt = _messages(prompt, system_prompt, number)
        row["prompt"] = prompt
    return rows


def split_validation(
    rows: Sequence[Row], num_validation: int, seed: int, *, id_column: str | None = None
) -> tuple[list[Row], list[Row]]:
    """Hold out a uniform draw of the prompts, to judge learning on what is not trained on.

    The held-out prompts are the `num_validation` with the smallest stable_hash(seed, key). So the
    draw depends on the seed and the prompts alone, not on their order, and a smaller validation set
    is part of a larger one. Rows with one key stay on one side, so the two share no prompt.

    Args:
        rows: with a column `prompt`.
        num_validation: prompts, that is distinct keys, to hold out; 0 holds out none.
        seed: of the draw.
        id_column: column of unique ids, as for `rollouts.prompts.make_prompts`.

    Returns:
        (training rows, validation rows), each in the order given.

    Raises:
        ValueError: `num_validation` is negative, or leaves nothing to train on.
    """
    keys = [prompt_key(row, id_column) for row in rows]
    distinct = sorted(set(keys), key=lambda key: (stable_hash(seed, key), key))
    if not 0 <= num_validation < len(distinct):
        raise ValueError(
            f"validation_size must be at least 0 and leave a prompt to train on, got "
            f"{num_validation} of {len(distinct)} distinct prompts: write {len(distinct) - 1} or less"
        )
    held_out = set(distinct[:num_validation])
    training = [row for row, key in zip(rows, keys, strict=True) if key not in held_out]
    validation = [row for row, key in zip(rows, keys, strict=True) if key in held_out]
    return training, validation


# Finding and reading the data.


def _read(source: str, split: str, config: str | None) -> Iterable[Mapping[str, Any]]:
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_folder(path, split)
    looks_like_path = (
        path.suffix in READERS or source.startswith((".", "/", "~")) or source.count("/") > 1
    )
    if looks_like_path:
        raise ValueError(f"no file or folder {source!r}{_nearest_path(path)}")
    return _read_hub(source, split, config)


def _read_file(path: Path) -> Iterable[Mapping[str, Any]]:
    if path.suffix not in READERS:
        raise ValueError(
            f"cannot read {str(path)!r}: the name must end in one of {', '.join(READERS)}"
        )
    return READERS[path.suffix](path)


def _read_text(path: Path) -> Iterator[Mapping[str, Any]]:
    """A prompt a line; empty lines are left out."""
    with path.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                yield {"prompt": line.strip()}


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}); every "
                    f"line must be one object"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number}: a {type(row).__name__}; every line must be one object "
                    f'such as {{"prompt": "2 + 3 =", "answer": "5"}}'
                )
            yield row


def _read_json(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno}); if it "
            f"holds one object per line, name it .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}; it must be a list of objects")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: a {type(row).__name__}; it must be an object")
        yield row


def _read_csv(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num}: the number of fields differs from the "
                    f"{len(reader.fieldnames or ())} of the header {reader.fieldnames}"
                )
            yield row


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error
    with file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[Mapping[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
"""Ending of a file's name -> its reader. Every value of a .csv file is a string."""


def _read_folder(folder: Path, split: str) -> Iterable[Mapping[str, Any]]:
    names = {entry.name for entry in folder.iterdir()}
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
        import datasets

        saved = datasets.load_from_disk(str(folder))
        if not isinstance(saved, dict):
            return saved
        if split not in saved:
            raise ValueError(
                f"{str(folder)!r} has no split {split!r}{_nearest(split, saved)}; it has "
                f"{sorted(saved)}"
            )
        return saved[split]

    files = sorted(path for path in folder.iterdir() if path.suffix in READERS)
    if not files:
        raise ValueError(
            f"{str(folder)!r} holds no saved data set and no file that ends in one of "
            f"{', '.join(READERS)}"
        )
    if any(_first_word(path) in SPLIT_NAMES for path in files):
        chosen = [path for path in files if _first_word(path) == split]
        if not chosen:
            raise ValueError(
                f"no file in {str(folder)!r} belongs to the split {split!r}; there are "
                f"{[path.name for path in files]}"
            )
        files = chosen
    return itertools.chain.from_iterable(map(_read_file, files))


def _first_word(path: Path) -> str:
    """What a file name such as train-00000-of-00002.parquet or train_easy.jsonl begins with."""
    return re.split(r"[-_.]", path.name)[0]


def _read_hub(source: str, split: str, config: str | None) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(source, config, split=split)
    except OSError as error:  # not found, no connection, offline mode: all are OSErrors there
        raise ValueError(
            f"{source!r} is no file or folder here{_nearest_path(Path(source))}, and loading it "
            f"from the hub failed: {error}. Check the name and the connection (HF_HUB_OFFLINE must "
            f"not be set for a first download), or give a file that ends in one of "
            f"{', '.join(READERS)}"
        ) from error


# Bringing rows into shape.


def _value(row: Row, column: str, number: int, *, asked_by: str) -> Any:
    """The row's value under a column, which may be a path such as `reward_model.ground_truth`."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise ValueError(
                f"row {number} has no column {column!r}{_nearest(column, row)}; its columns are "
                f"{sorted(row)}; {asked_by} must name one of these"
            )
        value = value[name]
    return value


def _parsed_template(template: str) -> list[tuple[str, str | None]]:
    """The template as pairs of literal text and the column that follows it, None at the end."""
    hint = "; a column stands in braces, as in {question}, and a literal brace is doubled, as in {{"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"prompt_template {template!r} is malformed ({error}){hint}") from error
    for _, field, spec, conversion in parts:
        if field is not None and (not field or spec or conversion):
            raise ValueError(
                f"prompt_template {template!r} has a field without a plain column name{hint}"
            )
    if not any(field for _, field, _, _ in parts):
        raise ValueError(f"prompt_template {template!r} names no column{hint}")
    return [(literal, field) for literal, field, _, _ in parts]


def _filled(template: Iterable[tuple[str, str | None]], row: Row, number: int) -> str:
    text = ""
    for literal, field in template:
        text += literal
        if field is None:
            continue
        value = _value(row, field, number, asked_by="prompt_template, if given,")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(
                f"row {number}: the column {field!r} of the prompt template holds {value!r}; it "
                f"must be text or a number"
            )
        text += str(value)
    return text


def _messages(prompt: Any, system_prompt: str | None, number: int) -> list[Any]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list):
        raise ValueError(
            f"row {number} has the prompt {prompt!r} of type {type(prompt).__name__}; it must be a "
            f"string or a list of messages"
        )
    if system_prompt is None:
        return messages
    if messages and messages[0].get("role") == "system":
        raise ValueError(
            f"row {number} has a system message already ({messages[0].get('content')!r}): leave "
            f"out system_prompt, or remove the message from the data"
        )
    return [{"role": "system", "content": system_prompt}, *messages]


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (nearest: {close[0]!r})" if close else ""


def _nearest_path(path: Path) -> str:
    """The existing name that comes closest to the first part of the path that does not exist."""
    while not path.parent.exists():
        path = path.parent
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f" (nearest: {str(path.parent / close[0])!r})" if close else ""
