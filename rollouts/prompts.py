"""Prompts: from the rows of a data set to keyed, tokenized prompts.

A prompt is identified by its key, never by its position: the key is a hash of what the row says, or
an id that the data set brings along. Everything that is wrong with a row is said before the first
rollout, with the row's number (counted from 0).

Axes: P prompts.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "target", "label")
"""Columns that hold the reference answer, where present. They are part of a prompt's key: the same
question with another reference answer is another prompt, with a success rate of its own."""

REWARD_ARGUMENTS = ("prompts", "completions")
"""Names every reward function is called with, so no column may be called that."""


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

    @property
    def is_conversational(self) -> bool:
        return not isinstance(self.prompt, str)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReport:
    """What became of the rows of a data set: `rows = kept + dropped`, and `truncated <= kept`."""

    rows: int
    kept: int
    dropped: int
    """Rows left out for their length."""
    truncated: int
    """Kept rows whose beginning was cut off for their length."""
    longest: int
    """Tokens of the longest prompt as read, before anything was dropped or cut."""
    tokens: int
    """Tokens of the kept prompts as they are used, summed."""
    is_conversational: bool

    def __str__(self) -> str:
        kind = "conversational" if self.is_conversational else "plain"
        return (
            f"{self.kept} of {self.rows} {kind} prompts kept, {self.dropped} dropped and "
            f"{self.truncated} truncated for their length; {self.tokens / self.kept:.1f} tokens on "
            f"average, the longest had {self.longest}"
        )


def prompt_key(row: Mapping[str, Any], id_column: str | None = None) -> str:
    """Identity of a row: the value of `id_column`, or a hash of its prompt and reference answer.

    The hash covers `prompt` and those of `ANSWER_COLUMNS` the row has, and nothing else: a comment,
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
    try:
        text = json.dumps(_without_none(content), sort_keys=True, ensure_ascii=False)
    except TypeError as error:
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
) -> tuple[list[Prompt], PromptReport]:
    """Check, key and tokenize every row of a data set.

    A row is a mapping with a column `prompt`, which is a string or a list of messages with `role`
    and `content`; all rows are of one kind. A string is tokenized as the tokenizer does by default.
    Messages go through the chat template, with the generation prompt added after a user's or a
    tool's message; after an assistant's message, that message is continued.

    Args:
        rows: a sequence or iterable of mappings, or a `datasets.Dataset`.
        tokenizer: must have a pad token (see `ensure_pad_token`), and a chat template if the
            rows are conversational.
        max_prompt_length: tokens; None accepts any length.
        overlong: what becomes of a longer prompt. "error" raises; "truncate" cuts off its
            beginning and keeps the last `max_prompt_length` tokens (of a conversation it may so cut
            off the system prompt); "drop" leaves the row out. The report counts both.
        id_column: column of unique ids to use as keys instead of the content hash.
        chat_template_kwargs: passed on to the chat template.

    Returns:
        The prompts in the order of their rows, and what became of the rows. Each prompt has the
        same `columns`: where a row lacks one that another row has, it is None.

    Raises:
        ValueError: an empty data set; a row without a prompt or with an empty or malformed one;
            plain and conversational rows mixed; two rows with one key; a prompt that is too long
            under "error", or every prompt dropped; a tokenizer without what the rows need.
    """
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ValueError(f"max_prompt_length must be at least 1 or None, got {max_prompt_length}")
    if overlong not in ("error", "truncate", "drop"):
        raise ValueError(f"overlong must be 'error', 'truncate' or 'drop', got {overlong!r}")
    ensure_pad_token(tokenizer)
    rows = _checked_rows(rows)
    is_conversational = not isinstance(rows[0]["prompt"], str)
    if is_conversational and tokenizer.chat_template is None:
        raise ValueError(
            "row 0 is a conversation, but the tokenizer has no chat template: set "
            "tokenizer.chat_template to one, use the tokenizer of an instruction-tuned model, or "
            "give the prompts as plain strings"
        )
    keys = _unique_keys(rows, id_column)
    ids_P = _token_ids(rows, tokenizer, is_conversational, dict(chat_template_kwargs or {}))

    too_long = [
        number
        for number, ids in enumerate(ids_P)
        if max_prompt_length is not None and len(ids) > max_prompt_length
    ]
    if too_long and overlong == "error":
        raise ValueError(
            f"row {too_long[0]} has {len(ids_P[too_long[0]])} tokens, but max_prompt_length is "
            f"{max_prompt_length} ({len(too_long)} of {len(rows)} rows are too long): raise "
            f"max_prompt_length, or set overlong='truncate' to keep the end of long prompts, or "
            f"overlong='drop' to leave them out"
        )
    dropped = set(too_long) if overlong == "drop" else set()
    if len(dropped) == len(rows):
        raise ValueError(
            f"overlong='drop' leaves no prompt: all {len(rows)} rows are longer than "
            f"max_prompt_length={max_prompt_length} tokens, the shortest has "
            f"{min(map(len, ids_P))}"
        )
    names = list(dict.fromkeys(name for row in rows for name in row if name != "prompt"))
    prompts = [
        Prompt(
            key=keys[number],
            prompt=row["prompt"],
            token_ids=ids_P[number][-max_prompt_length:] if max_prompt_length else ids_P[number],
            columns={name: row.get(name) for name in names},
        )
        for number, row in enumerate(rows)
        if number not in dropped
    ]
    report = PromptReport(
        rows=len(rows),
        kept=len(prompts),
        dropped=len(dropped),
        truncated=len(too_long) - len(dropped),
        longest=max(map(len, ids_P)),
        tokens=sum(len(prompt.token_ids) for prompt in prompts),
        is_conversational=is_conversational,
    )
    return prompts, report


def plain_prompts(
    rows: Iterable[Mapping[str, Any]], *, id_column: str | None = None
) -> tuple[list[Prompt], PromptReport]:
    """Check and key the rows of a data set whose prompts are texts that no tokenizer is needed for.

    Args:
        rows: a sequence or iterable of mappings with a column `prompt`, a string.
        id_column: column of unique ids to use as keys instead of the content hash.

    Returns:
        The prompts in the order of their rows, without token ids, and what became of the rows.

    Raises:
        ValueError: an empty data set, a row without a prompt or with an empty one, a conversation,
            two rows with one key.
    """
    rows = _checked_rows(rows)
    if not isinstance(rows[0]["prompt"], str):
        raise ValueError(f"row 0 is a conversation ({_start(rows[0]['prompt'])}); write a text")
    keys = _unique_keys(rows, id_column)
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
        rows=len(rows),
        kept=len(prompts),
        dropped=0,
        truncated=0,
        longest=0,
        tokens=0,
        is_conversational=False,
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
        if not isinstance(row, Mapping):
            raise ValueError(
                f"row {number} is {_start(row)}; a row must be a mapping such as "
                f"{{'prompt': '2 + 3 =', 'answer': '5'}}"
            )
        if "prompt" not in row:
            raise ValueError(
                f"row {number} has no column 'prompt'; {_columns_hint(row, 'prompt')}: rename the "
                f"column that holds the prompt to 'prompt'"
            )
        for name in REWARD_ARGUMENTS:
            if name in row:
                raise ValueError(
                    f"row {number} has a column {name!r}, a name that reward functions are called "
                    f"with: rename the column"
                )
        _check_prompt(number, row["prompt"])
        if isinstance(row["prompt"], str) != isinstance(rows[0]["prompt"], str):
            first, this = (
                "plain" if isinstance(rows[i]["prompt"], str) else "a conversation"
                for i in (0, number)
            )
            raise ValueError(
                f"row 0 is {first} but row {number} is {this}: write all prompts as strings, or "
                f"all as lists such as [{{'role': 'user', 'content': '2 + 3 ='}}]"
            )
    return rows


def _check_prompt(number: int, prompt: Any) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"row {number} has an empty prompt ({prompt!r}): fill it or remove it")
        return
    example = "[{'role': 'user', 'content': '2 + 3 ='}]"
    if not isinstance(prompt, list):
        raise ValueError(
            f"row {number} has the prompt {_start(prompt)} of type {type(prompt).__name__}; write "
            f"a string or a list of messages such as {example}"
        )
    if not prompt:
        raise ValueError(f"row {number} has an empty prompt ([]): fill it or remove it")
    for position, message in enumerate(prompt):
        where = f"row {number}, message {position}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"{where} is {_start(message)}; write a mapping with 'role' and 'content', as in "
                f"{example}"
            )
        content = message.get("content")
        # An assistant's message may consist of tool calls alone.
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(
                f"{where} has the content {_start(content)} of type {type(content).__name__}; "
                f"write a string, as in {example}"
            )
    if not any((message.get("content") or "").strip() for message in prompt):
        raise ValueError(
            f"row {number} has an empty prompt ({_start(prompt)}): fill it or remove it"
        )
    if prompt[-1]["role"] not in ("user", "tool", "assistant"):
        raise ValueError(
            f"row {number} ends with a message of role {prompt[-1]['role']!r}; the last message "
            f"must be the 'user' message to answer (or a 'tool' result, or an 'assistant' message "
            f"to continue)"
        )


def _unique_keys(rows: Sequence[Mapping[str, Any]], id_column: str | None) -> list[str]:
    """The key of every row; raises where two rows share one."""
    keys: list[str] = []
    first_row: dict[str, int] = {}
    for number, row in enumerate(rows):
        try:
            key = prompt_key(row, id_column)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        if key in first_row:
            remedy = (
                "remove the duplicate, or give a column of unique ids with id_column="
                if id_column is None
                else "make the ids unique, or leave id_column out to use a content hash"
            )
            what = "prompt and reference answer" if id_column is None else f"id {key!r}"
            raise ValueError(
                f"rows {first_row[key]} and {number} have the same {what} "
                f"({_start(row['prompt'])}), so their statistics cannot be told apart: {remedy}"
            )
        first_row[key] = number
        keys.append(key)
    return keys


def _token_ids(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    is_conversational: bool,
    chat_template_kwargs: dict[str, Any],
) -> list[tuple[int, ...]]:
    if is_conversational:
        texts = [
            _templated(number, row["prompt"], tokenizer, chat_template_kwargs)
            for number, row in enumerate(rows)
        ]
    else:
        texts = [row["prompt"] for row in rows]
    # A chat template writes its special tokens itself; the tokenizer must not add them twice.
    batch = tokenizer(texts, add_special_tokens=not is_conversational, padding=False)["input_ids"]
    ids_P = [tuple(ids) for ids in batch]
    for number, ids in enumerate(ids_P):
        if not ids:
            raise ValueError(
                f"row {number} has no tokens: the tokenizer makes nothing of "
                f"{_start(texts[number])}"
            )
        if ids[-1] == tokenizer.eos_token_id and not texts[number].endswith(tokenizer.eos_token):
            raise ValueError(
                f"the tokenizer ends the prompt of row {number} with {tokenizer.eos_token!r}, so "
                f"the policy would start after the end: set tokenizer.add_eos_token = False"
            )
    return ids_P


def _templated(
    number: int,
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any],
) -> str:
    is_continued = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            # A copy without None: templates ask whether a message *has* tool calls.
            [_without_none(message) for message in messages],
            tokenize=False,
            add_generation_prompt=not is_continued,
            continue_final_message=is_continued,
            **chat_template_kwargs,
        )
    except Exception as error:
        error.add_note(f"the chat template failed on row {number} of the data set")
        raise
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
