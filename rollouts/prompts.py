"""Prompts: from the rows of a data set to keyed, tokenized prompts.

A prompt is identified by its key, never by its position: the key is a hash of what the row says, or
an id that the data set brings along. Everything that is wrong with a row is said before the first
rollout, with the row's number (counted from 0).

Axes: P prompts.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "target", "label")
"""Columns that hold the reference answer, where present. They are part of a prompt's key: the same
question with another reference answer is another prompt, with a success rate of its own."""

REWARD_ARGUMENTS = ("prompts", "completions")
"""Names every reward function is called with, so no column may be called that."""

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that the chat template reads beside the messages. They are part of a conversation's key: a
policy that knows other tools reads another prompt."""

UNSEEN_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
"""Columns by which data sets for multimodal models hand over what a language model here is not shown."""

TEMPLATE_ARGUMENTS = (
    *("conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "messages"),
)
"""Arguments of `apply_chat_template` that are decided here and so cannot be `chat_template_kwargs`."""

DEEPEST = 100
"""Levels of lists and mappings within one column of a row, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt: what the policy reads, and what its rewards need to know.

    Example::

        Prompt(key="7f3a...", prompt="2 + 3 =", token_ids=(17, 4, 18, 9), columns={"answer": "5"})
    """

    key: str
    """Identity across runs, orders and files: a content hash, or the data set's own id."""
    prompt: str | list[dict[str, Any]]
    """As the data set gave it, a string or a list of messages; reward functions see this."""
    token_ids: tuple[int, ...]
    """What the policy reads: chat template applied, special tokens included, never padded."""
    columns: dict[str, Any]
    """The row's other columns, which reward functions receive by name."""
    start_ids: tuple[int, ...] = ()
    """The beginning of the completion, where rollouts are given it and do not draw it: the last of
    `token_ids`. Rewards see it, and it counts towards `max_completion_length`; it trains nothing."""

    @property
    def is_conversational(self) -> bool:
        return not isinstance(self.prompt, str)

    def started(self, start_ids: Sequence[int]) -> Prompt:
        """The same prompt, whose rollouts begin with these tokens; itself for none."""
        if not len(start_ids):
            return self
        start = tuple(start_ids)
        return replace(self, token_ids=self.token_ids + start, start_ids=self.start_ids + start)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReport:
    """What became of the rows of a data set: `rows = kept + dropped`, and `truncated <= kept`."""

    rows: int
    kept: int
    dropped: int
    """Rows left out for their length, or because an earlier row has their key."""
    truncated: int
    """Kept rows whose beginning was cut off for their length."""
    longest: int
    """Tokens of the longest prompt as read, before anything was dropped or cut for its length."""
    tokens: int
    """Tokens of the kept prompts as they are used, summed."""
    is_conversational: bool
    repeated: int = 0
    """Rows with the key of an earlier one: dropped too, or kept under a key of their own."""

    def _repeated(self) -> str:
        return f", {self.repeated} repeat an earlier row" if self.repeated else ""

    def __str__(self) -> str:
        kind = "conversational" if self.is_conversational else "plain"
        return (
            f"{self.kept} of {self.rows} {kind} prompts kept, {self.dropped} dropped and "
            f"{self.truncated} truncated for their length{self._repeated()}; "
            f"{self.tokens / self.kept:.1f} tokens on average, the longest had {self.longest}"
        )


def prompt_key(row: Mapping[str, Any], id_column: str | None = None) -> str:
    """Identity of a row: the value of `id_column`, or a hash of its prompt and reference answer.

    The hash covers `prompt`, those of `ANSWER_COLUMNS` the row has and, of a conversation, those of
    `TEMPLATE_COLUMNS`, and nothing else: a comment,
    a source or a difficulty label added to the data set later leaves every key as it was. Entries
    that are None inside a message or an answer do not count, because a data set stored as a table
    fills absent ones with None.

    Returns:
        32 hexadecimal digits of BLAKE2b over canonical JSON; with `id_column` the id as a string.

    Raises:
        ValueError: no prompt or no id in the row, an id that is neither a string nor an integer, or
            a reference answer that JSON cannot express (then the data set needs an id column).
    """
    if id_column is not None:
        if id_column not in row:
            raise ValueError(f"no id column {id_column!r}; {_columns_hint(row, id_column)}")
        value = row[id_column]
        if isinstance(value, bool) or not isinstance(value, str | Integral) or value == "":
            raise ValueError(
                f"id column {id_column!r} holds {value!r}; an id must be a non-empty string or an "
                f"integer"
            )
        return str(value)
    if "prompt" not in row:
        raise ValueError(f"no column 'prompt'; {_columns_hint(row, 'prompt')}")
    content = {name: row[name] for name in ("prompt", *ANSWER_COLUMNS) if row.get(name) is not None}
    if not isinstance(row["prompt"], str):
        content |= {name: row[name] for name in TEMPLATE_COLUMNS if row.get(name)}
    try:
        text = json.dumps(_without_none(content), sort_keys=True, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"cannot derive a key from the prompt and reference answer ({error}); store the answer "
            f"as text or numbers, or name a column of unique ids with id_column="
        ) from error
    return _digest(text)


def data_fingerprint(keys: Sequence[str]) -> str:
    """Identity of a data set: 32 hexadecimal digits over its keys, in order.

    The order counts, because statistics per prompt are stored by row: a checkpoint taken on another
    order belongs to other prompts.
    """
    # Lengths in front: ["ab", "c"] and ["a", "bc"] must differ.
    return _digest("".join(f"{len(key)}:{key}" for key in keys))


def ensure_pad_token(
    tokenizer: PreTrainedTokenizerBase, pad_token: str | None = None
) -> PreTrainedTokenizerBase:
    """Set the tokenizer's pad token where the caller names one, and require that there is one.

    Nothing is guessed: with the end-of-sequence token as padding, code that masks by `pad_token_id`
    would also mask the end of every completion. (This library masks by length, so the choice is
    safe here.) Tokens the vocabulary lacks are refused rather than added, because
    the model's embedding would then be too small.

    Returns:
        The same tokenizer.

    Raises:
        ValueError: `pad_token` is not in the vocabulary, or there is no pad token at all.
    """
    if pad_token is not None:
        vocabulary = tokenizer.get_vocab()
        if pad_token not in vocabulary:
            raise ValueError(
                f"pad_token {pad_token!r} is not in the tokenizer's vocabulary of "
                f"{len(vocabulary)} tokens{_nearest(pad_token, vocabulary)}; name one that is, for "
                f"example the end-of-sequence token {tokenizer.eos_token!r}"
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer has no pad token: set tokenizer.pad_token = tokenizer.eos_token "
            f"({tokenizer.eos_token!r}), or --pad_token on the command line"
        )
    return tokenizer


def make_prompts(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None = None,
    overlong: Literal["error", "truncate", "drop"] = "error",
    id_column: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    duplicates: Literal["error", "drop", "keep"] = "error",
    num_positions: int | None = None,
    max_completion_length: int = 0,
) -> tuple[list[Prompt], PromptReport]:
    """Check, key and tokenize every row of a data set.

    A row is a mapping with a column `prompt`, which is a string or a list of messages with `role`
    and `content`; all rows are of one kind. A string is tokenized as the tokenizer does by default;
    where it begins already with what the tokenizer puts in front (a beginning-of-sequence token),
    that stands once, with a warning. Messages go through the chat template, with the generation
    prompt added after a user's or a tool's message; after an assistant's message, that message is
    continued. The template also gets the columns `tools` (a list, or its JSON) and
    `chat_template_kwargs` (a mapping). Nothing here runs a tool.

    Args:
        rows: a sequence or iterable of mappings, or a `datasets.Dataset`. A row with an attribute
            `where` is named by it in messages, beside its number.
        tokenizer: must have a pad token (see `ensure_pad_token`), and a chat template if the
            rows are conversational.
        max_prompt_length: tokens; None accepts any length.
        overlong: what becomes of a longer prompt. "error" raises; "truncate" cuts off its
            beginning and keeps the last `max_prompt_length` tokens (of a conversation it may so cut
            off the system prompt); "drop" leaves the row out. The report counts both.
        id_column: column of unique ids to use as keys instead of the content hash.
        chat_template_kwargs: passed on to the chat template; a row's own column of this name wins.
        duplicates: what becomes of a row with the key of an earlier one. "error" raises; "drop"
            leaves it out; "keep" gives it a key of its own, from the key and its number among the
            rows that share it, so that its statistics are its own too. Ids that stand twice always
            raise: an id that names two rows is a fault of the data set.
        num_positions: positions of the model. A prompt that leaves no room in them for a completion
            is too long, whatever `max_prompt_length`. None: no limit.
        max_completion_length: tokens that must fit behind the prompt.

    Returns:
        The prompts in the order of their rows, and what became of the rows. Each prompt has the
        same `columns`: where a row lacks one that another row has, it is None.

    Raises:
        ValueError: an empty data set; a row without a prompt or with an empty or malformed one, or
            with text that is not Unicode; images and the like, which a language model is not shown;
            plain and conversational rows mixed; two rows with one key; a prompt that is too long
            under "error", or every prompt dropped; a tokenizer without what the rows need.
    """
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ValueError(f"max_prompt_length must be at least 1 or None, got {max_prompt_length}")
    if overlong not in ("error", "truncate", "drop"):
        raise ValueError(f"overlong must be 'error', 'truncate' or 'drop', got {overlong!r}")
    most, limit = max_prompt_length, f"max_prompt_length is {max_prompt_length}"
    remedy = "raise max_prompt_length"
    if num_positions is not None:
        room = num_positions - max_completion_length
        if room < 1:
            raise ValueError(
                f"max_completion_length={max_completion_length} leaves no room for a prompt in the "
                f"model's {num_positions} positions: lower it"
            )
        if most is None or room < most:
            most, remedy = room, "lower max_completion_length"
            limit = (
                f"the model's {num_positions} positions, less "
                f"max_completion_length={max_completion_length}, hold {room}"
            )
    ensure_pad_token(tokenizer)
    rows = _checked_rows(rows)
    is_conversational = not isinstance(rows[0]["prompt"], str)
    if is_conversational and tokenizer.chat_template is None:
        raise ValueError(
            "row 0 is a conversation, but the tokenizer has no chat template: set "
            "tokenizer.chat_template to one, use the tokenizer of an instruction-tuned model, or "
            "give the prompts as plain strings"
        )
    given_rows, (keys, numbers, repeated) = len(rows), _keys(rows, id_column, duplicates)
    rows = [rows[number] for number in numbers]
    _refuse_unseen(rows, numbers)
    ids_P = _token_ids(rows, numbers, tokenizer, is_conversational, chat_template_kwargs or {})

    too_long = [number for number, ids in enumerate(ids_P) if most is not None and len(ids) > most]
    if too_long and overlong == "error":
        first = too_long[0]
        raise ValueError(
            f"{_name(numbers[first], rows[first])} has {len(ids_P[first])} tokens, but {limit} "
            f"({len(too_long)} of {len(rows)} rows are too long): {remedy}, or set "
            f"overlong='truncate' to keep the end of long prompts, or overlong='drop' to leave them "
            f"out (the setting overlong_prompts)"
        )
    dropped = set(too_long) if overlong == "drop" else set()
    if len(dropped) == len(rows):
        raise ValueError(
            f"overlong='drop' leaves no prompt: all {len(rows)} rows are longer than "
            f"max_prompt_length={most} tokens, the shortest has {min(map(len, ids_P))}"
        )
    names = list(dict.fromkeys(name for row in rows for name in row if name != "prompt"))
    prompts = [
        Prompt(
            key=keys[number],
            prompt=row["prompt"],
            token_ids=ids_P[number][-most:] if most else ids_P[number],
            columns={name: row.get(name) for name in names},
        )
        for number, row in enumerate(rows)
        if number not in dropped
    ]
    report = PromptReport(
        rows=given_rows,
        kept=len(prompts),
        dropped=given_rows - len(prompts),
        truncated=len(too_long) - len(dropped),
        longest=max(map(len, ids_P)),
        tokens=sum(len(prompt.token_ids) for prompt in prompts),
        is_conversational=is_conversational,
        repeated=repeated,
    )
    return prompts, report


def check_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    id_column: str | None = None,
    duplicates: Literal["error", "drop", "keep"] = "error",
) -> int:
    """What `make_prompts` refuses without a tokenizer, before a model is loaded.

    Returns:
        How many rows there are to use.

    Raises:
        ValueError: as `make_prompts` does.
    """
    rows = _checked_rows(rows)
    _, numbers, _ = _keys(rows, id_column, duplicates)
    _refuse_unseen([rows[number] for number in numbers], numbers)
    return len(numbers)


def plain_prompts(
    rows: Iterable[Mapping[str, Any]],
    *,
    id_column: str | None = None,
    duplicates: Literal["error", "drop", "keep"] = "error",
) -> tuple[list[Prompt], PromptReport]:
    """Check and key the rows of a data set whose prompts are texts that no tokenizer is needed for.

    Args:
        rows: a sequence or iterable of mappings with a column `prompt`, a string.
        id_column: column of unique ids to use as keys instead of the content hash.
        duplicates: what becomes of a row with the key of an earlier one, as in `make_prompts`.

    Returns:
        The prompts in the order of their rows, without token ids, and what became of the rows.

    Raises:
        ValueError: an empty data set, a row without a prompt or with an empty one, a conversation,
            two rows with one key.
    """
    rows = _checked_rows(rows)
    if not isinstance(rows[0]["prompt"], str):
        raise ValueError(f"row 0 is a conversation ({_start(rows[0]['prompt'])}); write a text")
    given_rows, (keys, numbers, repeated) = len(rows), _keys(rows, id_column, duplicates)
    rows = [rows[number] for number in numbers]
    names = list(dict.fromkeys(name for row in rows for name in row if name != "prompt"))
    prompts = [
        Prompt(
            key=key,
            prompt=row["prompt"],
            token_ids=(),
            columns={name: row.get(name) for name in names},
        )
        for key, row in zip(keys, rows, strict=True)
    ]
    report = PromptReport(
        rows=given_rows,
        kept=len(prompts),
        dropped=given_rows - len(prompts),
        truncated=0,
        longest=0,
        tokens=0,
        is_conversational=False,
        repeated=repeated,
    )
    return prompts, report


def _checked_rows(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows as a list, every prompt present, not empty, well formed and of the first's kind."""
    if isinstance(rows, Mapping):
        raise ValueError(
            f"rows must be one split, a sequence of mappings; got a {type(rows).__name__} of "
            f"{sorted(rows)}: pass one of its values"
        )
    rows = list(rows)
    if not rows:
        raise ValueError("the data set is empty: at least one row with a column 'prompt' is needed")
    for number, row in enumerate(rows):
        name = _name(number, row)
        if not isinstance(row, Mapping):
            raise ValueError(
                f"row {number} is {_start(row)}; a row must be a mapping such as "
                f"{{'prompt': '2 + 3 =', 'answer': '5'}}"
            )
        if "prompt" not in row:
            raise ValueError(
                f"{name} has no column 'prompt'; {_columns_hint(row, 'prompt')}: rename the "
                f"column that holds the prompt to 'prompt'"
            )
        for column in REWARD_ARGUMENTS:
            if column in row:
                raise ValueError(
                    f"{name} has a column {column!r}, a name that reward functions are called "
                    f"with: rename the column"
                )
        for column, value in row.items():
            if not isinstance(column, str):
                raise ValueError(f"{name} has a column {column!r}; the name must be text")
            _check_text(value, f"{name}, column {column!r},")
        _check_prompt(name, row["prompt"])
        if isinstance(row["prompt"], str) != isinstance(rows[0]["prompt"], str):
            first, this = (
                "plain" if isinstance(rows[i]["prompt"], str) else "a conversation"
                for i in (0, number)
            )
            raise ValueError(
                f"{_name(0, rows[0])} is {first} but {name} is {this}: write all prompts as strings, or "
                f"all as lists such as [{{'role': 'user', 'content': '2 + 3 ='}}]"
            )
    return rows


def _name(number: int, row: Any) -> str:
    """'row 3', and where it was read from, if the row knows."""
    where = getattr(row, "where", None)
    return f"row {number}" if where is None else f"row {number} ({where})"


def _check_text(value: Any, name: str, depth: int = 0) -> None:
    """Refuse text that is not Unicode, and what is nested too deep to be copied or written down."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{name} holds {value[error.start]!r} at character {error.start}, half of a "
                    "surrogate pair, which no tokenizer reads: correct or remove the row"
                ) from None
        return
    if not isinstance(value, Mapping | list | tuple):
        return
    if depth == DEEPEST:
        raise ValueError(f"{name} is nested more than {DEEPEST} levels deep: store it as text")
    if isinstance(value, Mapping):
        for key in value:
            _check_text(key, name, depth + 1)
        value = list(value.values())
    if value and isinstance(value[0], int | float) and isinstance(value[-1], int | float):
        return  # an embedding, say
    for entry in value:
        _check_text(entry, name, depth + 1)


def _check_prompt(name: str, prompt: Any) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{name} has an empty prompt ({prompt!r}): fill it or remove it")
        return
    example = "[{'role': 'user', 'content': '2 + 3 ='}]"
    if not isinstance(prompt, list):
        raise ValueError(
            f"{name} has the prompt {_start(prompt)} of type {type(prompt).__name__}; write "
            f"a string or a list of messages such as {example}"
        )
    if not prompt:
        raise ValueError(f"{name} has an empty prompt ([]): fill it or remove it")
    for position, message in enumerate(prompt):
        where = f"{name}, message {position}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"{where} is {_start(message)}; write a mapping with 'role' and 'content', as in "
                f"{example}"
            )
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                _check_part(where, part)
            continue
        # An assistant's message may consist of tool calls alone.
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(
                f"{where} has the content {_start(content)} of type {type(content).__name__}; "
                f"write a string, as in {example}"
            )
    if not any((_joined(message.get("content")) or "").strip() for message in prompt):
        raise ValueError(f"{name} has an empty prompt ({_start(prompt)}): fill it or remove it")
    if prompt[-1]["role"] not in ("user", "tool", "assistant"):
        raise ValueError(
            f"{name} ends with a message of role {prompt[-1]['role']!r}; the last message "
            f"must be the 'user' message to answer (or a 'tool' result, or an 'assistant' message "
            f"to continue)"
        )


def _check_part(where: str, part: Any) -> None:
    """A part of a message's content must be text."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return
    if isinstance(kind, str) and kind != "text":
        raise ValueError(
            f"{where} has a part of type {kind!r}, which a language model here is not shown: "
            "multimodal models are not supported yet; keep parts of type 'text' alone"
        )
    raise ValueError(
        f"{where} has the part {_start(part)}; write {{'type': 'text', 'text': '2 + 3 ='}}"
    )


def _joined(content: Any) -> Any:
    """The text of a message's content whose parts are text; anything else as it is."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content


def _refuse_unseen(rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> None:
    """Refuse images and the like, and tools for prompts that no chat template shows them in."""
    for number, row in zip(numbers, rows, strict=True):
        for column in UNSEEN_COLUMNS:
            value = row.get(column)
            if value is not None and not (isinstance(value, Sequence) and not len(value)):
                raise ValueError(
                    f"{_name(number, row)} has a column {column!r}, which a language model here is not "
                    "shown: multimodal models are not supported yet; remove the column, or rename it "
                    "if only the rewards read it"
                )
        for column in TEMPLATE_COLUMNS:
            if isinstance(row["prompt"], str) and row.get(column):
                raise ValueError(
                    f"{_name(number, row)} has a column {column!r}, which the chat template reads, but "
                    "its prompt is plain text, to which none is applied: write the prompt as messages, "
                    "or rename the column if only the rewards read it"
                )


def _keys(
    rows: Sequence[Mapping[str, Any]], id_column: str | None, duplicates: str
) -> tuple[list[str], list[int], int]:
    """Keys and numbers of the rows to use, and how many rows repeat an earlier one."""
    if duplicates not in ("error", "drop", "keep"):
        raise ValueError(f"duplicates must be 'error', 'drop' or 'keep', got {duplicates!r}")
    keys: list[str] = []
    numbers: list[int] = []
    first_row: dict[str, int] = {}
    count: dict[str, int] = {}
    for number, row in enumerate(rows):
        try:
            key = prompt_key(row, id_column)
        except ValueError as error:
            raise ValueError(f"{_name(number, row)}: {error}") from error
        count[key] = count.get(key, 0) + 1
        if key in first_row:
            if id_column is not None:
                raise ValueError(
                    f"rows {first_row[key]} and {number} have the same id {key!r} "
                    f"({_start(row['prompt'])}), so their statistics cannot be told apart: make the "
                    "ids unique, or leave id_column out to use a content hash"
                )
            if duplicates == "error":
                raise ValueError(
                    f"rows {first_row[key]} and {number} have the same prompt and reference answer "
                    f"({_start(row['prompt'])}), so their statistics cannot be told apart: remove the "
                    "duplicate, set duplicates to 'drop' or 'keep', or give a column of unique ids with "
                    "id_column="
                )
            if duplicates == "drop":
                continue
            key = _digest(f"{key} {count[key]}")
        first_row.setdefault(key, number)
        keys.append(key)
        numbers.append(number)
    return keys, numbers, sum(count.values()) - len(count)


def _token_ids(
    rows: Sequence[Mapping[str, Any]],
    numbers: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    is_conversational: bool,
    chat_template_kwargs: Mapping[str, Any],
) -> list[tuple[int, ...]]:
    if is_conversational:
        texts = _templated_texts(rows, numbers, tokenizer, chat_template_kwargs)
    else:
        texts = [row["prompt"] for row in rows]
        if chat_template_kwargs:
            raise ValueError(
                f"chat_template_kwargs={dict(chat_template_kwargs)} has no effect on prompts that are "
                "plain text, to which no chat template is applied: leave it out, or write the prompts "
                "as messages (conversational: true)"
            )
    # A chat template writes its special tokens itself; the tokenizer must not add them twice.
    batch = tokenizer(texts, add_special_tokens=not is_conversational, padding=False)["input_ids"]
    ids_P = [tuple(ids) for ids in batch]
    if not is_conversational:
        ids_P = _with_one_prefix(texts, ids_P, tokenizer)
    for number, row, text, ids in zip(numbers, rows, texts, ids_P, strict=True):
        if not ids:
            raise ValueError(
                f"{_name(number, row)} has no tokens: the tokenizer makes nothing of {_start(text)}"
            )
        if ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
            raise ValueError(
                f"the tokenizer ends the prompt of {_name(number, row)} with "
                f"{tokenizer.eos_token!r}, so the policy would start after the end: set "
                f"tokenizer.add_eos_token = False"
            )
    return ids_P


def _with_one_prefix(
    texts: Sequence[str], ids_P: list[tuple[int, ...]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...]]:
    """The ids, without a second copy of what the tokenizer puts in front of every text.

    A text made with a chat template begins with it already.
    """
    twice = 0
    bare = tuple(tokenizer(texts[0], add_special_tokens=False)["input_ids"])
    size = len(ids_P[0]) - len(bare)
    prefix = ids_P[0][:size]
    if size < 1 or ids_P[0][size:] != bare:
        return ids_P  # nothing is put in front
    for row, (text, ids) in enumerate(zip(texts, ids_P, strict=True)):
        if ids[:size] == prefix == ids[size : 2 * size]:
            alone = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            if ids == prefix + alone:
                ids_P[row] = alone
                twice += 1
    if twice:
        warnings.warn(
            f"{twice} of {len(texts)} prompts begin with {tokenizer.decode(list(prefix))!r} already, "
            "which the tokenizer puts in front of every text: it stands once, not twice",
            stacklevel=4,
        )
    return ids_P


def _templated_texts(
    rows: Sequence[Mapping[str, Any]],
    numbers: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any],
) -> list[str]:
    """The text that the chat template makes of every row; a warning for what it does not read."""
    texts, given = [], set(_template_kwargs("chat_template_kwargs", chat_template_kwargs))
    for number, row in zip(numbers, rows, strict=True):
        name = _name(number, row)
        own = _template_kwargs(f"{name}: chat_template_kwargs", row.get("chat_template_kwargs"))
        tools = _tools(name, row.get("tools"))
        given |= set(own) | ({"tools"} if tools else set())
        kwargs = {**chat_template_kwargs, **own}
        texts.append(_templated(name, row["prompt"], tools, tokenizer, kwargs))
    template = tokenizer.get_chat_template(tools=[{}] if "tools" in given else None)
    known = inspect.signature(tokenizer.apply_chat_template).parameters
    unread = sorted(n for n in given - {*known} | (given & {"tools"}) if not _mentions(template, n))
    if unread:
        warnings.warn(
            f"the chat template does not read {', '.join(unread)}, so that the policy's prompts are "
            "the same without: check the name, or give a template that reads it",
            stacklevel=4,
        )
    return texts


def _mentions(template: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _template_kwargs(name: str, value: Any) -> dict[str, Any]:
    """A mapping for the chat template, without its empty entries."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(
            f"{name} must be a mapping such as {{'enable_thinking': False}}, got {_start(value)}"
        )
    for key in TEMPLATE_ARGUMENTS:
        if key in value:
            more = "write a column 'tools'" if key == "tools" else "it is decided elsewhere"
            raise ValueError(f"{name} must not set {key!r}: {more}")
    return {key: entry for key, entry in value.items() if entry is not None}


def _tools(name: str, value: Any) -> list[Any] | None:
    """The tools of a row, for the chat template."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: tools is text that is not JSON ({error})") from error
    if not value:
        return None
    if not isinstance(value, list):
        raise ValueError(
            f"{name}: tools must be a list of JSON schemas or its JSON, got {_start(value)}"
        )
    return [_without_none(tool) for tool in value]


def _templated(
    name: str,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any],
) -> str:
    is_continued = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            # A copy without None: templates ask whether a message *has* tool calls.
            [
                {key: _joined(v) if key == "content" else v for key, v in _without_none(m).items()}
                for m in messages
            ],
            tools=tools,
            tokenize=False,
            add_generation_prompt=not is_continued,
            continue_final_message=is_continued,
            **chat_template_kwargs,
        )
    except Exception as error:
        raise ValueError(
            f"the chat template failed on {name} of the data set: {type(error).__name__}: {error}"
        ) from error
    assert isinstance(text, str)
    return text


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_none(v) for v in value]
    return value


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _start(value: Any, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else text[:length] + "..."


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (nearest: {close[0]!r})" if close else ""


def _columns_hint(row: Mapping[str, Any], name: str) -> str:
    return f"the row's columns are {sorted(row)}{_nearest(name, row)}"
