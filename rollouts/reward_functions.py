"""Reward functions that need no weights, and how a setting names one.

Each has TRL's signature (`rollouts.rewards`) and gives rewards in [0, 1]. Columns such as `answer` are
those of the data set.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import math
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rollouts.math_worker import MathWorker
from rollouts.rewards import RewardError, RewardFunction, nearest, start_of


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


def format_answer(completions: list[Any], **columns: Any) -> list[float | None]:
    """1 where the completion has exactly one <answer>...</answer>, and it is not empty; else 0."""

    def follows(text: str) -> bool:
        pair = re.search(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
        once = text.count("<answer>") == text.count("</answer>") == 1
        return once and pair is not None and bool(pair[1].strip())

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
    a policy that writes 9^{9^{9}} gets there.

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


MATH_SECONDS = 5.0
"""Seconds that the comparison of two mathematical answers may take."""

_math_worker = MathWorker(seconds=MATH_SECONDS)


def reasoning_gym(
    completions: list[Any], task: list[str], entry: list[Any], **columns: Any
) -> list[float | None]:
    """Score of `final_answer(completion)` by the reasoning-gym task's own verifier, in [0, 1].

    Many tasks give part of the credit for a right answer in a wrong form.

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
        rewards.append(float(verifier(answer=final_answer(_text(completion)), entry=example)))
    return rewards


BUILT_IN: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "f1": f1,
    "format_answer": format_answer,
    "math_verify": math_verify,
    "reasoning_gym": reasoning_gym,
}
"""The reward functions that a configuration names."""


def load_reward(spec: str) -> RewardFunction:
    """The reward function that a configuration asks for.

    Args:
        spec: a name in `BUILT_IN`, or "path/to/file.py:function". The file is loaded by itself; its
            folder is not put on the import path.

    Raises:
        ValueError: no such name, file or function (with the nearest one there is), or not callable.
            What goes wrong inside the file is raised as it is.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    path_text, colon, name = spec.rpartition(":")
    if not colon or not path_text.endswith(".py"):
        raise ValueError(
            f"no reward function {spec!r}{nearest(spec, BUILT_IN)}: write one of "
            f"{sorted(BUILT_IN)}, or 'path/to/file.py:function'"
        )
    path = Path(path_text).expanduser()
    if not path.is_file():
        neighbours = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ValueError(
            f"no reward file {str(path)!r} in {str(Path.cwd())!r}{nearest(path.name, neighbours)}"
        )
    # Under a name of its own, and known to Python: dataclasses and pickle look modules up.
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=8).hexdigest()
    module_name = f"reward_file_{digest}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    module_spec.loader.exec_module(module)
    functions = [key for key, value in vars(module).items() if callable(value)]
    if not hasattr(module, name):
        raise ValueError(
            f"{path} has no function {name!r}{nearest(name, functions)}; it has {functions}"
        )
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"{name!r} in {path} is {start_of(function)}, not a function")
    return function


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
    has_delimiters = any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed", "\\begin"))
    # A bare answer is all mathematics: without delimiters 2^{10} would be read as 2.
    return [f"${text}$", text] if is_short and not has_delimiters else [text]


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
