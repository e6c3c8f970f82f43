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
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate import PartialState

from rollouts.prompts import prompt_key
from samplers.keys import stable_hash

from .arguments import TASKS, RecipeArguments
from .config import ConfigError
from .where import package_file


def embedded_task(recipe: RecipeArguments, *, seed: int) -> Any:
    """What the embedded task `recipe.task` prepares; the main process goes first and writes files.

    Raises:
        ConfigError: if a library that the task needs is missing.
    """
    assert recipe.task is not None
    try:
        prepare = import_module(TASKS[recipe.policy][recipe.task], __package__).prepare
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"task {recipe.task!r} needs {error.name}: pip install 'apportion[recipes]'"
        ) from error
    with PartialState().main_process_first():
        return prepare(recipe.task_settings or {}, seed=seed)


def load_data(
    recipe: RecipeArguments, *, seed: int, id_column: str | None
) -> tuple[list[Row], list[Row] | None]:
    """Training and validation rows of the data set that the settings name.

    Args:
        seed: of the draw of validation prompts, where no data set of their own is named.
        id_column: column of unique ids, as for `rollouts.prompts.make_prompts`.

    Raises:
        ConfigError: if no data or no reward is named.
        ValueError: as `load_rows` and `split_validation`.
    """
    if recipe.dataset_name is None:
        raise ConfigError("nothing to train on: write task, or dataset_name with your prompts")
    if not recipe.rewards:
        raise ConfigError("no reward: write rewards, names or path/to/file.py:function")
    columns: dict[str, Any] = {
        "prompt_column": recipe.prompt_column,
        "answer_column": recipe.answer_column,
        "prompt_template": recipe.prompt_template,
        "system_prompt": recipe.system_prompt,
        "conversational": recipe.conversational,
    }
    rows = load_rows(
        recipe.dataset_name,
        config=recipe.dataset_config,
        split=recipe.dataset_split,
        limit=recipe.dataset_limit,
        **columns,
    )
    if recipe.validation_name is not None:
        same = recipe.validation_name == recipe.dataset_name
        validation = load_rows(
            recipe.validation_name,
            config=recipe.dataset_config if same else None,
            split=recipe.validation_split,
            **columns,
        )
        return rows, validation
    size = recipe.validation_size
    if recipe.policy == "diffusion" and len(rows) <= size == RecipeArguments.validation_size:
        # The default, which nobody asked for. Prompts of a diffusion model come in short lists.
        size = len(rows) // 5
        told = f"{size} are held out" if size else "the prompts of training are validated with too"
        warnings.warn(
            f"validation_size: {recipe.validation_size} leaves nothing to train on of {len(rows)} "
            f"prompts, so {told}; write validation_size, 0 for no validation",
            stacklevel=2,
        )
        if not size:  # allowed: a sample is no answer that could be memorised
            return rows, rows
    if size:
        return split_validation(rows, size, seed=seed, id_column=id_column)
    return rows, None


class Row(dict[str, Any]):
    """A row that knows where it was read, which messages about it say."""

    where: str | None = None


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
    rows = _read_all(str(source), split, config, limit)
    if not rows:
        raise ValueError(f"{str(source)!r} has no rows; at least one is needed")
    for number, row in enumerate(rows):
        prompt: Any
        name = f"row {number} ({row.where})"
        if template is not None:
            prompt = _filled(template, row, name)
        else:
            prompt = _value(row, prompt_column, name, asked_by="prompt_column")
        if answer_column is not None:
            answer = _value(row, answer_column, name, asked_by="answer_column")
            row.pop(answer_column, None)
            row["answer"] = answer
        if template is None:
            row.pop(prompt_column, None)
        if conversational or system_prompt is not None:
            prompt = _messages(prompt, system_prompt, name)
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


Read = tuple[str, Mapping[str, Any]]
"""Where a row stands, such as "prompts.jsonl, line 7", and the row."""

MAGIC = {
    b"\x1f\x8b": "compressed with gzip: decompress it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstandard: decompress it first",
    b"BZh": "compressed with bzip2: decompress it first",
    b"\xfd7zXZ": "compressed with xz: decompress it first",
    b"PAR1": "a parquet file: name it .parquet",
    b"\xff\xfe": "UTF-16 or UTF-32: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
}
"""How a file begins that is no UTF-8 text -> what it is."""


def _read_all(source: str, split: str, config: str | None, limit: int | None) -> list[Row]:
    """The first `limit` rows of a data set, each with where it stands.

    Raises:
        ValueError: also for what a library says of a damaged file, with the file's name.
    """
    rows: list[Row] = []
    try:
        for where, content in itertools.islice(_read(source, split, config), limit):
            row = Row(content)
            row.where = where
            rows.append(row)
    except RecursionError:
        after = f", after {rows[-1].where}" if rows else ""
        raise ValueError(f"{source!r}{after}: nested too deep to be read") from None
    return rows


def _read(source: str, split: str, config: str | None) -> Iterable[Read]:
    path = package_file(source)
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_folder(path, split)
    looks_like_path = (
        path.suffix in READERS or source.startswith((".", "/", "~")) or source.count("/") > 1
    )
    if looks_like_path:
        raise ValueError(f"no file or folder {source!r}{_nearest_path(path)}")
    return _numbered(source, _read_hub(source, split, config))


def _numbered(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Read]:
    """Rows of a data set that has no lines, counted from 0."""
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", row


def _read_file(path: Path) -> Iterator[Read]:
    """Rows of a file; what is wrong with it is said with its name."""
    if path.suffix not in READERS:
        raise ValueError(
            f"cannot read {str(path)!r}: the name must end in one of {', '.join(READERS)}"
        )
    if path.suffix != ".parquet":
        with path.open("rb") as file:
            start = file.read(8)
        for magic, what in MAGIC.items():
            if start.startswith(magic):
                raise ValueError(f"{path} is {what}")
    try:
        yield from READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {_bad_line(path)}: {_not_utf8(error)}") from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"the byte 0x{byte:02x} is not UTF-8: save the file as UTF-8"


def _bad_line(path: Path) -> int:
    """The first line of a file that is not UTF-8, counted from 1."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _read_text(path: Path) -> Iterator[Read]:
    """A prompt a line; empty lines are left out."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}, line {number}", {"prompt": line.strip()}


def _read_jsonl(path: Path) -> Iterator[Read]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = _from_json(line, where)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: not JSON ({error.msg} at column {error.colno}); every "
                    f"line must be one object"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{where}: a {type(row).__name__}; every line must be one object "
                    f'such as {{"prompt": "2 + 3 =", "answer": "5"}}'
                )
            yield where, row


def _read_json(path: Path) -> Iterator[Read]:
    try:
        rows = _from_json(path.read_text(encoding="utf-8-sig"), str(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno}); if it "
            f"holds one object per line, name it .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}; it must be a list of objects")
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a {type(row).__name__}; it must be an object")
        yield where, row


def _from_json(text: str, where: str) -> Any:
    """What JSON says; a name that stands twice in one object is refused, not read as the last."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            raise ValueError(f"{where}: {_twice([name for name, _ in items])} in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError(f"{where}: nested too deep to be read") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        told = str(error)  # such as a number of more than 4300 digits
        raise ValueError(told if told.startswith(where) else f"{where}: {told}") from None


def _twice(names: Sequence[str]) -> str:
    """Which name stands twice, and which names there are."""
    name = next(name for position, name in enumerate(names) if name in names[:position])
    return f"the name {name!r} stands twice"


def _read_csv(path: Path) -> Iterator[Read]:
    csv.field_size_limit(sys.maxsize)  # of this process; its default is 131,072 characters
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            names = list(reader.fieldnames or ())
            if len(set(names)) < len(names):
                raise ValueError(f"{path}, line 1: {_twice(names)} in the header {names}")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(
                        f"{where}: the number of fields differs from the {len(names)} of the header "
                        f"{names}"
                    )
                yield where, row
        except csv.Error as error:
            raise ValueError(f"{path}, after line {reader.line_num}: not CSV ({error})") from error


def _read_parquet(path: Path) -> Iterator[Read]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError(f"{path}: {_twice(names)} among the columns {names}")
            rows = itertools.chain.from_iterable(b.to_pylist() for b in file.iter_batches())
            yield from _numbered(str(path), rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file that can be read: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[Read]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
"""Ending of a file's name -> its reader. Every value of a .csv file is a string."""


def _read_folder(folder: Path, split: str) -> Iterable[Read]:
    names = {entry.name for entry in folder.iterdir()}
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
        import datasets

        try:
            saved = datasets.load_from_disk(str(folder))
        except Exception as error:  # whatever a damaged file makes of it
            raise ValueError(
                f"{str(folder)!r} is not a saved data set that can be read: {error}"
            ) from error
        if not isinstance(saved, dict):
            return _numbered(str(folder), saved)
        if split not in saved:
            raise ValueError(
                f"{str(folder)!r} has no split {split!r}{_nearest(split, saved)}; it has "
                f"{sorted(saved)}"
            )
        return _numbered(f"{folder}, split {split}", saved[split])

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


def _value(row: Row, column: str, name: str, *, asked_by: str) -> Any:
    """The row's value under a column, which may be a path such as `reward_model.ground_truth`."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(
                f"{name} has no column {column!r}{_nearest(column, row)}; its columns are "
                f"{sorted(row)}; {asked_by} must name one of these"
            )
        value = value[part]
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


def _filled(template: Iterable[tuple[str, str | None]], row: Row, name: str) -> str:
    text = ""
    for literal, field in template:
        text += literal
        if field is None:
            continue
        value = _value(row, field, name, asked_by="prompt_template, if given,")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(
                f"{name}: the column {field!r} of the prompt template holds {value!r}; it "
                f"must be text or a number"
            )
        text += str(value)
    return text


def _messages(prompt: Any, system_prompt: str | None, name: str) -> list[Any]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list):
        raise ValueError(
            f"{name} has the prompt {prompt!r} of type {type(prompt).__name__}; it must be a "
            f"string or a list of messages"
        )
    if system_prompt is None:
        return messages
    if messages and not isinstance(messages[0], Mapping):
        raise ValueError(
            f"{name} has the message {messages[0]!r} of type {type(messages[0]).__name__}; it "
            f"must be a mapping with 'role' and 'content'"
        )
    if messages and messages[0].get("role") == "system":
        raise ValueError(
            f"{name} has a system message already ({messages[0].get('content')!r}): leave "
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
