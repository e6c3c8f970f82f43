"""Rewards of strict formats, which say of many unfinished completions that they have failed.

The whole completion is what is judged, so a wrong beginning cannot be made good: each reward has a
verdict for it (`rollouts.rewards.verdicts`).
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections import Counter
from fractions import Fraction
from typing import Any

_TOKEN = re.compile(r"\s*(\d+|[-+*/()])\s*")
"""A number or a sign of an expression of `countdown`."""

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}

MOST_CHARACTERS = 400
"""Characters of an expression of `countdown`; a longer one is wrong. Project default."""


class Countdown:
    """1 where the whole completion is an expression that makes the target of the numbers, else 0.

    An expression has whole numbers, + - * / and parentheses. Each of the numbers stands in it exactly
    once, and its exact value is the target. White space does not count.

    Columns `numbers`, the whole numbers to use, and `target`; None in either does not apply. (The task
    is that of the game; this strict form is a project default: reasoning-gym's verifier, reward
    `reasoning_gym`, reads the last answer of a longer text, so nothing is decided before its end.)
    """

    __name__ = "countdown"

    def __call__(
        self, completions: list[Any], numbers: list[Any], target: list[Any], **columns: Any
    ) -> list[float | None]:
        """The reward of each completion."""
        return [
            None if some is None or goal is None else float(_makes(_text(completion), some, goal))
            for completion, some, goal in zip(completions, numbers, target, strict=True)
        ]

    def decided(
        self, prompt: Any, completion_so_far: str, numbers: Any, target: Any
    ) -> float | None:
        """0 once a number is used twice or was not given, or anything else stands in the text."""
        if numbers is None or target is None:
            return None
        whole = completion_so_far.rstrip()
        used, end = _read(whole)
        if end < len(whole) or len(completion_so_far.strip()) > MOST_CHARACTERS:
            return 0.0
        growing = used.pop() if used and completion_so_far[-1].isdigit() else ""
        given = Counter(int(number) for number in numbers)
        left = given - Counter(map(int, used))
        if left.total() != given.total() - len(used):
            return 0.0
        begun = growing.lstrip("0")  # zeros may come before a number
        fits = not begun or any(str(number).startswith(begun) for number in left)
        return None if fits else 0.0


countdown = Countdown()


def _read(text: str) -> tuple[list[str], int]:
    """The numbers of an expression, as written, and where its last number or sign ends."""
    numbers, end = [], 0
    while match := _TOKEN.match(text, end):
        numbers += [match[1]] if match[1].isdigit() else []
        end = match.end()
    return numbers, end


def _makes(text: str, numbers: Any, target: Any) -> bool:
    whole = text.strip()
    used, end = _read(whole)
    if not whole or end < len(whole) or len(whole) > MOST_CHARACTERS:
        return False
    if Counter(map(int, used)) != Counter(int(number) for number in numbers):
        return False
    # Python reads 007 as no number.
    plain = re.sub(r"\d+", lambda match: str(int(match[0])), whole.replace("\n", " "))
    try:
        return _value(ast.parse(plain, mode="eval").body) == Fraction(target)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError, TypeError):
        return False


def _value(node: ast.AST) -> Fraction:
    """The exact value; TypeError for anything but + - * / of whole numbers (// and ** among it)."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise TypeError(f"{type(node).__name__} is no part of an expression")


class ValidJson:
    """1 where the whole completion is one JSON value, white space around it aside; else 0."""

    __name__ = "valid_json"

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        """The reward of each completion."""
        return [float(_error(_text(completion)) is None) for completion in completions]

    def decided(self, prompt: Any, completion_so_far: str) -> float | None:
        """0 once no continuation is JSON. Some texts that cannot be continued are left open."""
        error = _error(completion_so_far)
        if not isinstance(error, json.JSONDecodeError):
            return None
        rest = completion_so_far[error.pos :]
        if not rest.strip():
            return None
        if error.msg in ("Expecting ',' delimiter", "Extra data"):
            # After 1 may follow .5 or e5, which the parser reports as something after the 1.
            return None if rest[0] in ".eE" else 0.0
        if error.msg == "Expecting value":
            names = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
            is_open = rest == "-" or any(name.startswith(rest) for name in names)
            return None if is_open else 0.0
        if error.msg in (
            "Expecting ':' delimiter",
            "Expecting property name enclosed in double quotes",
        ):
            return 0.0
        return None


valid_json = ValidJson()


def _error(text: str) -> Exception | None:
    """Why a text is no JSON; None if it is."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of too many digits
        return error
    return None


def _text(completion: Any) -> str:
    """The text of a completion: the string, or the content of the last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
