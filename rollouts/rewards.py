"""Rewards: from completions to one number per rollout, and never a number for a failure.

A reward function is called as TRL calls it, but for `trainer_state`, `log_extra` and `log_metric`:

    fn(prompts=..., completions=..., completion_ids=..., **columns) -> list[float | None]

It is called with keyword lists of one entry per rollout: prompts and completions (strings; for
conversational prompts lists of messages), token ids, and every other column of the data set by its
name. `None` means that the function does not apply to that row.

Axes: N rollouts, K rows that were scored.
"""

from __future__ import annotations

import ctypes
import difflib
import functools
import inspect
import math
import numbers
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rollouts.prompts import Prompt

RewardFunction = Callable[..., list[float | None]]
"""`fn(prompts=..., completions=..., completion_ids=..., **columns)`. A function that asks another
machine sets its attribute `remote = True`; only such functions are retried."""

RESERVED_COLUMNS = ("prompt", "completion", "completion_ids")
"""Columns of the data set that reward functions do not receive, as in TRL."""


class RewardError(RuntimeError):
    """A reward function broke its contract, or more rows failed than the caller allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """The rewards of N rollouts, of which K were scored and N - K failed.

    Example, three rollouts of which the second failed::

        RewardResult(
            reward_N=torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64),
            scored=torch.tensor([True, False, True]),
            per_function={"exact_match": [1.0, None, 0.0]},
            failed={1: "exact_match: raised KeyError: 'x'"},
        )
    """

    reward_N: Tensor
    """(N,) float64: weighted sums of the functions that apply. A failed row has no reward; the 0
    that stands in its place must not be read, and `reward_K` leaves it out."""
    scored: Tensor
    """(N,) bool: False where a row failed. Such a row enters no statistic and trains nothing."""
    per_function: dict[str, list[float | None]]
    """Function name -> N rewards before weighting; None where it did not apply, or failed."""
    failed: dict[int, str]
    """Failed row -> function and reason."""

    @property
    def rows_K(self) -> Tensor:
        """(K,) int64, increasing: the rows that were scored."""
        return self.scored.nonzero().flatten()

    @property
    def reward_K(self) -> Tensor:
        """(K,) float64: the rewards of the rows `rows_K`."""
        return self.reward_N[self.scored]


def score(
    functions: Sequence[RewardFunction],
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    weights: Sequence[float] | None = None,
    timeout: float | None = None,
    max_failed_share: float = 0.0,
    retries: int = 0,
    retry_wait: float = 1.0,
    shared: Mapping[str, Any] | None = None,
) -> RewardResult:
    """Reward every rollout; a row whose reward cannot be had is marked failed, with the reason.

        reward_i = sum of w_f r_fi over the functions f that apply to row i (r_fi is not None)

    Each function is called once, for all rows. If the call raises or takes too long, the rows are
    halved again and again until the failing ones stand alone (so a function that compares the rows
    of a call with each other sees fewer of them then). A row fails if a function raises on it,
    exceeds the time, or returns NaN or infinity, or if no function with a weight applies to it.

    A call may take `timeout` seconds, whatever its number of rows. The search for slow rows is
    bounded too: all calls of one function take at most

        (2 + ceil(log2 N)) * ((1 + retries) * timeout + retry_wait * (2**retries - 1)) seconds

    with the retry terms for remote functions only; that finds one hanging row among quick ones, and
    rows not settled by then fail. With a timeout, calls run in a daemon thread that is waited for,
    because SIGALRM interrupts the main thread only, is lost inside C code, and cancels alarms that
    the function or its caller set. A thread cannot be killed: it is told to exit, which
    ends Python code; a thread blocked in C code or in I/O is left behind until that returns; C code
    that keeps the interpreter lock (a huge integer power) holds up everything, timeout included.
    Without a timeout nothing bounds the time.

    Args:
        functions: reward functions; their names are their keys in the result.
        prompts: N, the prompt of each rollout.
        completions: N texts; passed on as `[{"role": "assistant", "content": text}]` where the
            prompt is conversational.
        completion_ids: N lists of token ids.
        weights: one per function; None weights each 1. A function of weight 0 is only reported.
        timeout: seconds per call, or None.
        max_failed_share: more than this share of failed rows raises. 0 stops at the first failure.
        retries: repetitions of a failed call, for functions with `remote = True` only.
        retry_wait: seconds before the first repetition, doubled before each further one.
        shared: keyword arguments passed to every function as they are, not per row, such as TRL's
            `trainer_state`, `log_extra` and `log_metric`.

    Returns:
        The rewards. No rows at all give an empty result, and no function is called.

    Raises:
        RewardError: a function's arguments are not columns of the data set; it is asynchronous; it
            returns anything but one number or None per row; or too many rows failed. The message
            then names the first failing prompt, the function, the reason and the completion.
        ValueError: arguments of different lengths or out of range.
    """
    names = _checked(functions, prompts, completions, completion_ids, weights)
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be positive or None, got {timeout}")
    if not 0 <= max_failed_share <= 1:
        raise ValueError(f"max_failed_share must lie in [0, 1], got {max_failed_share}")
    if retries < 0 or retry_wait < 0:
        raise ValueError(
            f"retries and retry_wait must not be negative, got {retries} and {retry_wait}"
        )
    columns = _columns(prompts, completions, completion_ids)
    shared = dict(shared or {})
    if clash := sorted(columns.keys() & shared.keys()):
        raise ValueError(f"shared arguments {clash} are also columns of the data set: rename them")

    failures: dict[int, _Failure] = {}
    per_function: dict[str, list[float | None]] = {}
    for name, function in zip(names, functions, strict=True):
        if not prompts:
            per_function[name] = []
            continue
        _check_signature(function, name, columns, shared)
        values: list[float | None] = [None] * len(prompts)
        for rows, outcome in _outcomes(
            function, name, columns, shared, len(prompts), timeout, retries, retry_wait
        ):
            if isinstance(outcome, _Failure):
                new = dict.fromkeys(rows, outcome)
            else:
                new = {
                    row: _Failure(name, f"returned {value}")
                    for row, value in zip(rows, outcome, strict=True)
                    if value is not None and not math.isfinite(value)
                }
                for row, value in zip(rows, outcome, strict=True):
                    values[row] = None if row in new else value
            failures = new | failures
            _stop_if_too_many(failures, max_failed_share, prompts, completions)
        per_function[name] = values

    weight_of = dict(zip(names, [1.0] * len(names) if weights is None else weights, strict=True))
    rewards = [0.0] * len(prompts)
    for row in range(len(prompts)):
        terms = [
            weight * value
            for name, weight in weight_of.items()
            if weight != 0 and (value := per_function[name][row]) is not None
        ]
        if not terms and row not in failures:
            failures[row] = _Failure("/".join(names), "no reward function applied")
        if row not in failures:
            rewards[row] = math.fsum(terms)
    _stop_if_too_many(failures, max_failed_share, prompts, completions)
    return RewardResult(
        reward_N=torch.tensor(rewards, dtype=torch.float64),
        scored=torch.tensor([row not in failures for row in range(len(prompts))], dtype=torch.bool),
        per_function=per_function,
        failed={row: str(failures[row]) for row in sorted(failures)},
    )


# Calling a function, and finding the rows it fails on.


@dataclass(frozen=True, slots=True)
class _Failure:
    function: str
    reason: str
    error: BaseException | None = None

    def __str__(self) -> str:
        return f"{self.function}: {self.reason}"


class _TimedOut(Exception):  # noqa: N818 -- never leaves this module
    pass


def _outcomes(
    function: RewardFunction,
    name: str,
    columns: dict[str, list[Any]],
    shared: dict[str, Any],
    num_rows: int,
    timeout: float | None,
    retries: int,
    retry_wait: float,
) -> Any:
    """Yield (rows, their rewards) and (rows, why they failed) until every row is settled.

    The rows come in order, so that a caller who stops at the first failure names the first one.
    """
    if not getattr(function, "remote", False):
        retries = 0
    total = math.inf
    if timeout is not None:
        per_call = (1 + retries) * timeout + retry_wait * (2**retries - 1)
        total = (2 + math.ceil(math.log2(num_rows))) * per_call
    deadline = time.monotonic() + total

    pending = [range(num_rows)]
    while pending:
        rows = pending.pop()
        arguments = {key: [values[row] for row in rows] for key, values in columns.items()}
        call = functools.partial(function, **arguments, **shared)
        if time.monotonic() >= deadline:
            reason = f"not reached: the calls of this function took {total:g} s together"
            yield rows, _Failure(name, reason)
            continue
        try:
            values = _with_retries(call, timeout, deadline, retries, retry_wait)
        except RewardError:
            raise
        except Exception as error:
            if len(rows) > 1:
                half = len(rows) // 2
                pending += [rows[half:], rows[:half]]
            elif isinstance(error, _TimedOut):
                yield rows, _Failure(name, str(error))
            else:
                reason = f"raised {type(error).__name__}: {error}"
                yield rows, _Failure(name, reason, error)
            continue
        yield rows, _numbers(values, name, rows)


def _with_retries(
    call: Callable[[], Any],
    timeout: float | None,
    deadline: float,
    retries: int,
    retry_wait: float,
) -> Any:
    for attempt in range(retries + 1):
        left = deadline - time.monotonic()
        try:
            return call() if timeout is None else _with_timeout(call, min(timeout, max(left, 0.0)))
        except RewardError:
            raise
        except Exception:
            wait = retry_wait * 2**attempt
            if attempt == retries or time.monotonic() + wait >= deadline:
                raise
            time.sleep(wait)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _with_timeout(call: Callable[[], Any], timeout: float) -> Any:
    """Result of `call`, which runs in a daemon thread and is abandoned after `timeout` seconds."""
    outcome: list[tuple[Any, BaseException | None]] = []
    # The current device is a setting of each thread; a new thread would use device 0.
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def work() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, name="reward", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        # Raises SystemExit at the thread's next line of Python: an endless loop left running would
        # slow down everything after it, the training included.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
        )
        raise _TimedOut(f"took longer than {timeout:g} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def _numbers(values: Any, name: str, rows: Sequence[int]) -> list[float | None]:
    """What a function returned, as floats and None, one per row."""
    if inspect.iscoroutine(values):
        values.close()
        raise RewardError(f"reward function {name} is asynchronous; return a list, not a coroutine")
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"reward function {name} returned {start_of(values)} of type {type(values).__name__}; "
            f"expected a list of {len(rows)} numbers or None"
        )
    if len(values) != len(rows):
        raise RewardError(
            f"reward function {name} returned {len(values)} rewards for {len(rows)} completions; "
            f"expected one per completion"
        )
    return [_number(value, name, row) for value, row in zip(values, rows, strict=True)]


def _number(value: Any, name: str, row: int) -> float | None:
    if value is None:
        return None
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise RewardError(
            f"reward function {name} returned {start_of(value)} of type {type(value).__name__} for "
            f"row {row}; expected a number or None"
        )
    return float(value)


def _stop_if_too_many(
    failures: dict[int, _Failure],
    max_failed_share: float,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
) -> None:
    # The small number: 0.29 * 100 is 28.999999999999996 and must allow 29 failures.
    if len(failures) <= max_failed_share * len(prompts) + 1e-9:
        return
    row = min(failures)
    failure = failures[row]
    raise RewardError(
        f"at least {len(failures)} of {len(prompts)} rewards failed, more than "
        f"max_failed_share={max_failed_share:g} allows. The first: prompt {prompts[row].key}, "
        f"reward function {failure}; the completion begins "
        f"{start_of(completions[row])}"
    ) from failure.error


# Checking what the caller gave.


def _checked(
    functions: Sequence[RewardFunction],
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    weights: Sequence[float] | None,
) -> list[str]:
    """The functions' names, all arguments of `score` being consistent."""
    names = _names(functions)
    if not len(prompts) == len(completions) == len(completion_ids):
        raise ValueError(
            f"prompts, completions and completion_ids must be equally long, got {len(prompts)}, "
            f"{len(completions)} and {len(completion_ids)}"
        )
    if weights is not None and len(weights) != len(functions):
        raise ValueError(
            f"weights has {len(weights)} entries for {len(functions)} reward functions; give one "
            f"weight per function"
        )
    if weights is not None and not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite, got {list(weights)}")
    return names


def _names(functions: Sequence[RewardFunction]) -> list[str]:
    """The functions' names, if these tell them apart and every function can be called."""
    if not functions:
        raise ValueError("at least one reward function is needed, got none")
    names = [_name(function) for function in functions]
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(
            f"two reward functions are called {doubled[0]!r}, so their rewards cannot be told "
            f"apart: give one another __name__"
        )
    for name, function in zip(names, functions, strict=True):
        if inspect.iscoroutinefunction(function):
            raise RewardError(
                f"reward function {name} is asynchronous; make it an ordinary function, for "
                f"example one that calls asyncio.run"
            )
    return names


def _name(function: RewardFunction) -> str:
    if not callable(function):
        raise ValueError(f"a reward function must be callable, got {function!r}")
    while isinstance(function, functools.partial) and not hasattr(function, "__name__"):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _columns(
    prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
) -> dict[str, list[Any]]:
    """Arguments of the reward functions that have one entry per row."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    columns = {
        name: [prompt.columns.get(name) for prompt in prompts]
        for name in names
        if name not in RESERVED_COLUMNS
    }
    texts = [
        [{"role": "assistant", "content": text}] if prompt.is_conversational else text
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    return {
        **columns,
        "prompts": [prompt.prompt for prompt in prompts],
        "completions": texts,
        "completion_ids": [list(ids) for ids in completion_ids],
    }


def check_columns(functions: Sequence[RewardFunction], prompts: Sequence[Prompt]) -> None:
    """Say before anything is generated whether each function can take what these prompts bring.

    Raises:
        RewardError: naming the function and the column it needs, with the nearest there is; or if it
            is asynchronous.
        ValueError: if there is none, or two have one name.
    """
    columns = _columns(prompts[:1], [""], [[]])
    for name, function in zip(_names(functions), functions, strict=True):
        _check_signature(function, name, columns, {})


def _check_signature(
    function: RewardFunction, name: str, columns: Mapping[str, Any], shared: Mapping[str, Any]
) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a callable written in C says nothing about its arguments
        return
    given = {**columns, **shared}
    try:
        signature.bind(**given)
    except TypeError as error:
        missing = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and parameter.name not in given
        ]
        if missing:
            raise RewardError(
                f"reward function {name} needs a column {missing[0]!r}; the data set has "
                f"{sorted(columns)}{nearest(missing[0], columns)}"
            ) from error
        raise RewardError(
            f"reward function {name} cannot take the arguments of a reward function ({error}); end "
            f"its parameters with **columns"
        ) from error


def start_of(value: Any, length: int = 120) -> str:
    """The beginning of `value` as Python writes it, for messages."""
    text = repr(value)
    return text if len(text) <= length else text[:length] + "..."


def nearest(name: str, known: Any) -> str:
    """A remark naming the known name most like `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (nearest: {close[0]!r})" if close else ""


# Rewards that come with the library.
