"""Text rewards without model weights, and how a setting names one.

Each has TRL's signature (`rollouts.rewards.contract`) and gives rewards in [0, 1], but for the penalty
`soft_overlong`. Columns such as `answer` are those of the data set. All but the mathematics take time
linear in the length of a completion, whatever it says.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from rollouts.from_file import load_function
from rollouts.rewards.contract import RewardError, RewardFunction, nearest
from rollouts.rewards.math_worker import MathWorker
from rollouts.rewards.strict import countdown, valid_json


def _decides(decided: Callable[..., float | None]) -> Callable[[Any], Any]:
    """Gives a reward function its `decided` (`rollouts.rewards.verdicts`)."""

    def with_verdicts(function: Any) -> Any:
        function.decided = decided
        return function

    return with_verdicts


def _no_answer_any_more(prompt: Any, completion_so_far: str, answer: Any) -> float | None:
    """0 once the text is no beginning of any answer: verdict of `exact_match`."""
    begun = completion_so_far.lstrip()
    if answer is None or not begun:
        return None
    golds = [str(gold).strip() for gold in _alternatives(answer)]
    # White space may follow the whole answer.
    open_ = any(gold.startswith(begun) or begun.rstrip() == gold for gold in golds)
    return None if open_ else 0.0


def _tags_are_wrong(prompt: Any, completion_so_far: str) -> float | None:
    """0 once tags are doubled, in the wrong order or around nothing: verdict of `format_answer`."""
    opens = completion_so_far.count("<answer>")
    closes = completion_so_far.count("</answer>")
    if opens > 1 or closes > 1:
        return 0.0
    if not closes:
        return None
    _, _, rest = completion_so_far.partition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return None if closed and answer.strip() else 0.0


def final_answer(text: str) -> str:
    """The answer that a completion ends with, stripped of white space.

    The first of these that the text has: what stands in the last complete <answer>...</answer>;
    what follows the last "####"; what follows the last "Answer:"; the whole text. What follows a
    marker goes on to the end, because some tasks have answers of several lines; so a completion
    that goes on talking after its answer is not credited.
    """
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return text[start + len("<answer>") : end].strip()
    for marker in ("####", "Answer:"):
        _, found, rest = text.rpartition(marker)
        if found:
            return rest.strip()
    return text.strip()


@_decides(_no_answer_any_more)
def exact_match(completions: list[Any], answer: list[Any], **columns: Any) -> list[float | None]:
    """1 where the whole completion is the answer, white space around both aside; else 0.

    Column `answer`: a string, a number, or a list of accepted ones; None does not apply.
    """
    return [
        None
        if gold is None
        else float(_text(completion).strip() in [str(g).strip() for g in _alternatives(gold)])
        for completion, gold in zip(completions, answer, strict=True)
    ]


def exact_answer(completions: list[Any], answer: list[Any], **columns: Any) -> list[float | None]:
    """1 where `final_answer(completion)` is the answer by SQuAD's rules, else 0.

    Both are lower-cased, freed of punctuation and of the articles a, an, the, and compared word by word
    in order. (Rajpurkar et al., 2016, arXiv:1606.05250: "exact match".)

    Column `answer`: a string, a number, or a list of accepted ones; None does not apply.
    """
    return [
        None
        if gold is None
        else float(
            _words(final_answer(_text(completion))) in [_words(str(g)) for g in _alternatives(gold)]
        )
        for completion, gold in zip(completions, answer, strict=True)
    ]


def f1(completions: list[Any], answer: list[Any], **columns: Any) -> list[float | None]:
    """Overlap of the words of `final_answer(completion)` with those of the answer, in [0, 1].

        F1 = 2 * common / (words in the completion's answer + words in the reference answer)

    with words counted as often as they occur, after lower-casing and removing punctuation and the
    articles a, an, the. (Rajpurkar et al., 2016, arXiv:1606.05250.) No words on either side give 1,
    on one side only 0.

    Column `answer`: a string, a number, or a list of accepted ones, of which the best counts; None
    does not apply.
    """
    return [
        None
        if gold is None
        else max(_word_f1(final_answer(_text(completion)), str(g)) for g in _alternatives(gold))
        for completion, gold in zip(completions, answer, strict=True)
    ]


@_decides(_tags_are_wrong)
def format_answer(completions: list[Any], **columns: Any) -> list[float | None]:
    """1 where the completion has exactly one <answer>...</answer>, and it is not empty; else 0."""

    def follows(text: str) -> bool:
        if not text.count("<answer>") == text.count("</answer>") == 1:
            return False
        _, _, rest = text.partition("<answer>")
        answer, closed, _ = rest.partition("</answer>")
        return bool(closed) and bool(answer.strip())

    return [float(follows(_text(completion))) for completion in completions]


def math_verify(
    completions: list[Any],
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""1 where the completion's final answer equals the reference as mathematics, else 0.

    Compared by the library math-verify: 0.5, 1/2 and \frac{1}{2} are equal. The completion's
    answer is its last \boxed{...} if it has one, otherwise what math-verify finds in
    `final_answer(completion)`. A completion in which nothing can be parsed is wrong, not failed.
    A comparison that takes longer than `MATH_SECONDS` gives NaN, so `score` marks the row failed;
    a policy that writes 9^{9^{9}} gets there. Of a long completion `MATH_CHARACTERS` are read.

    Columns `answer` or `solution`: the reference, with or without LaTeX delimiters, or a worked
    solution that ends in \boxed{...} or "#### answer". Where it is None or cannot be parsed, the
    function does not apply.
    """
    if answer is None and solution is None:
        raise RewardError("reward function math_verify needs a column 'answer' or 'solution'")
    if importlib.util.find_spec("math_verify") is None:
        raise RewardError("reward function math_verify needs the library: pip install math-verify")
    empty = [None] * len(completions)
    rewards: list[float | None] = []
    for completion, first, second in zip(
        completions, answer or empty, solution or empty, strict=True
    ):
        reference = first if first is not None else second
        if reference is None:
            rewards.append(None)
            continue
        try:
            equal = _math_worker.compare(
                _readings(str(reference), is_reference=True),
                _readings(_text(completion), is_reference=False),
            )
        except TimeoutError:
            rewards.append(math.nan)
        else:
            rewards.append(None if equal is None else float(equal))
    return rewards


MATH_CHARACTERS = 4000
"""Characters of a completion that are read as mathematics: of a longer one those from its last boxed
formula on, or its last ones. Project default."""

MATH_SECONDS = 5.0
"""Seconds that the comparison of two mathematical answers may take."""

_math_worker = MathWorker(seconds=MATH_SECONDS)


def reasoning_gym(
    completions: list[Any], task: list[str], entry: list[Any], **columns: Any
) -> list[float | None]:
    """Score of `final_answer(completion)` by the reasoning-gym task's own verifier, in [0, 1].

    Many tasks give part of the credit for a right answer in a wrong form. Some verifiers raise for an
    answer they cannot read; it is wrong then, if they can read the reference answer.

    Columns: `task`, the name of the reasoning-gym data set; `entry`, the generated example with its
    question, answer and metadata, as a dict or as JSON.
    """
    try:
        import reasoning_gym as library
    except ImportError as error:
        raise RewardError(
            "reward function reasoning_gym needs the library: pip install reasoning-gym"
        ) from error
    rewards: list[float | None] = []
    for completion, name, example in zip(completions, task, entry, strict=True):
        example = json.loads(example) if isinstance(example, str) else example
        if name in _TUPLE_TASKS:
            example = _tuples(example)
        verifier = _verifier(library.get_score_answer_fn, name)
        try:
            credit = verifier(answer=final_answer(_text(completion)), entry=example)
        except Exception:
            verifier(answer=example["answer"], entry=example)  # raises if the entry is at fault
            credit = 0.0
        rewards.append(float(credit))
    return rewards


def soft_overlong(max_completion_len: int, soft_punish_cache: int) -> RewardFunction:
    """DAPO's penalty for long completions (Yu et al., 2025, arXiv:2503.14476, equation 13).

        0                                    length <= max - cache
        (max - cache - length) / cache       max - cache < length <= max
        -1                                   length > max

    with the length in tokens, the end token included. The arguments have TRL's names
    (`get_soft_overlong_punishment`). A reward of its own, to be added to one that says what is right.

    Args:
        max_completion_len: tokens from which on the penalty is whole; DAPO: 20480.
        soft_punish_cache: over how many tokens before it grows; DAPO: 4096. 0: not at all.
    """
    largest, cache = max_completion_len, soft_punish_cache
    if not (isinstance(largest, int) and isinstance(cache, int) and 0 <= cache <= largest > 0):
        raise ValueError(
            "soft_overlong needs whole numbers 0 <= soft_punish_cache <= max_completion_len, got "
            f"max_completion_len={largest!r} and soft_punish_cache={cache!r}"
        )

    # A partial, so that its arguments can be told from outside, as a resumed run does.
    penalty = functools.partial(_overlong, largest, cache)
    penalty.__name__ = "soft_overlong"  # type: ignore[attr-defined]
    penalty.decided = functools.partial(_too_long, largest)  # type: ignore[attr-defined]
    return penalty


def _too_long(
    largest: int, /, prompt: Any, completion_so_far: str, completion_ids: list[int]
) -> float | None:
    return -1.0 if len(completion_ids) > largest else None


def _overlong(
    largest: int, cache: int, /, completion_ids: list[list[int]], **columns: Any
) -> list[float | None]:
    over = [len(ids) - (largest - cache) for ids in completion_ids]
    return [0.0 if n <= 0 else -1.0 if n > cache else -n / cache for n in over]


BUILT_IN: dict[str, RewardFunction] = {
    "countdown": countdown,
    "exact_answer": exact_answer,
    "exact_match": exact_match,
    "f1": f1,
    "format_answer": format_answer,
    "math_verify": math_verify,
    "reasoning_gym": reasoning_gym,
    "valid_json": valid_json,
}
"""The reward functions that a configuration names."""

WITH_ARGUMENTS: dict[str, Callable[..., RewardFunction]] = {"soft_overlong": soft_overlong}
"""Those that it names with arguments: "soft_overlong(max_completion_len=256, soft_punish_cache=64)"."""


def names_model(spec: str) -> bool:
    """Whether a setting names a reward model: a folder, or a hub id "owner/name"."""
    if spec in BUILT_IN or ".py" in spec:
        return False
    return Path(spec).expanduser().is_dir() or bool(re.fullmatch(r"[\w.-]+/[\w.-]+", spec))


def check_reward_name(spec: str, names: Collection[str]) -> None:
    """Refuse a reward that cannot be there, without running its file or reading weights.

    Args:
        spec: as for `load_reward`.
        names: of the built-in rewards, `name(...)` among them without its arguments.

    Raises:
        ValueError: no such name or file, or a file that is not Python or does not define the name.
    """
    if spec in names or spec.partition("(")[0].strip() in names or names_model(spec):
        return
    path_text, colon, name = spec.rpartition(":")
    if not colon or not path_text.endswith(".py"):
        raise ValueError(
            f"no reward function {spec!r}{nearest(spec, names)}: write one of {sorted(names)}, or "
            "'path/to/file.py:function'"
        )
    path = Path(path_text).expanduser()
    if not path.is_file():
        load_reward(spec)  # which says what there is
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"reward file {path} is not Python: {error}") from None
    defined = {word for node in ast.walk(tree) for word in _binds(node)}
    if name not in defined and "*" not in defined:
        raise ValueError(f"{path} has no function {name!r}{nearest(name, defined)}")


def _binds(node: ast.AST) -> list[str]:
    """Names that a statement makes known."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.alias):
        return [(node.asname or node.name).split(".")[0]]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.Call):  # globals()["name"] = ..., setattr, exec: not to be read off
        called = getattr(node.func, "id", "")
        return ["*"] if called in ("globals", "setattr", "exec") else []
    return []


def load_reward(spec: str) -> RewardFunction:
    """The reward function that a configuration asks for.

    Args:
        spec: a name in `BUILT_IN`, one in `WITH_ARGUMENTS` with its arguments, or
            "path/to/file.py:function". The file is loaded by itself; its folder is not put on the
            import path. Of "path/to/file.py:Class" an instance is made.

    Raises:
        ValueError: no such name, file or function (with the nearest one there is), or not callable.
            What goes wrong inside the file is raised as it is.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    start = spec.partition("(")[0].strip()
    if start in WITH_ARGUMENTS:
        return _with_arguments(spec, start)
    path_text, colon, _ = spec.rpartition(":")
    if not colon or not path_text.endswith(".py"):
        names = [*BUILT_IN, *WITH_ARGUMENTS]
        raise ValueError(
            f"no reward function {spec!r}{nearest(spec, names)}: write one of {sorted(names)}, "
            "'path/to/file.py:function', or the folder or hub id of a reward model"
        )
    return load_function(spec, what="reward")


def _with_arguments(spec: str, name: str) -> RewardFunction:
    """The reward behind "name(argument, other=argument)" with plain values."""
    make = WITH_ARGUMENTS[name]
    wanted = f"{name}({', '.join(f'{each}=...' for each in inspect.signature(make).parameters)})"
    try:
        call = ast.parse(spec.strip(), mode="eval").body
        if not isinstance(call, ast.Call):
            raise TypeError("no arguments")
        values = [ast.literal_eval(each) for each in call.args]
        named = {each.arg or "**": ast.literal_eval(each.value) for each in call.keywords}
        inspect.signature(make).bind(*values, **named)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"reward {spec!r} must be written {wanted}; {error}") from error
    return make(*values, **named)


def _text(completion: Any) -> str:
    """The text of a completion: the string, or the content of the last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _alternatives(gold: Any) -> list[Any]:
    return list(gold) if isinstance(gold, list | tuple) else [gold]


def _word_f1(found: str, gold: str) -> float:
    words, gold_words = _words(found), _words(gold)
    if not words or not gold_words:
        return float(words == gold_words)
    common = (Counter(words) & Counter(gold_words)).total()
    return 2 * common / (len(words) + len(gold_words))


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def _readings(text: str, *, is_reference: bool) -> list[str]:
    """Ways to read a text as mathematics, the best first."""
    is_short = is_reference
    if "\\boxed" not in text:
        shortened = final_answer(text)
        is_short = is_short or shortened != text.strip()
        text = shortened
    text = _mathematical_part(text)
    has_delimiters = any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed", "\\begin"))
    # A bare answer is all mathematics: without delimiters 2^{10} would be read as 2.
    return [f"${text}$", text] if is_short and not has_delimiters else [text]


def _mathematical_part(text: str) -> str:
    """The part of a long text with its answer: from the last boxed formula that is closed, else its end.

    math-verify takes more than quadratic time for some texts, such as 10^5 opening delimiters.
    """
    if len(text) <= MATH_CHARACTERS:
        return text
    start = text.rfind("\\boxed", 0, text.rfind("}") + 1)
    return text[start : start + MATH_CHARACTERS] if start >= 0 else text[-MATH_CHARACTERS:]


_TUPLE_TASKS = ("arc_agi", "rearc")
"""Tasks whose verifiers compare with tuples, which JSON turned into lists."""


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(v) for key, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


@functools.cache
def _verifier(find: Callable[[str], Callable[..., float]], task: str) -> Callable[..., float]:
    # Cached: finding a verifier builds the task's data set.
    return find(task)
