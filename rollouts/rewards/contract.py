"""Score rollouts: one number per rollout, and never a number for a failure.

A reward function is called as TRL calls it:

    fn(prompts=..., completions=..., completion_ids=..., **columns) -> list[float | None]

It is called with keyword lists of one entry per rollout: prompts and completions (strings; for
conversational prompts lists of messages), token ids, and every other column of the data set by its
name. `None` means that the function does not apply to that row. Functions that take them also get
`trainer_state`, and `log_extra(column, values)` and `log_metric(name, value)` for what they have to
say besides. A function may be `async def`.

Axes: N rollouts, K rows that were scored.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import difflib
import functools
import inspect
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rollouts.prompts import Prompt
from rollouts.rewards.calls import (
    Call,
    Called,
    RewardError,
    attempt,
    attempt_async,
    described,
    is_async,
    is_marked,
    reason_of,
    run_in_loop,
    start_of,
)
from rollouts.rewards.watchdog import Overdue, prepare

__all__ = [
    "LOGS",
    "RESERVED_COLUMNS",
    "SHARED_ARGUMENTS",
    "RewardError",
    "RewardFunction",
    "RewardResult",
    "check_columns",
    "name_of",
    "nearest",
    "own_copy",
    "score",
    "start_of",
]

RewardFunction = Callable[..., Any]
"""`fn(prompts=..., completions=..., completion_ids=..., **columns)`, or `async def` the same. Attributes
that a function may have: `remote = True` if it asks another machine (only such functions are
retried), `isolated = True` to run in a process that can be killed, `untimed = True` for no timeout,
`decided`, a function that says what an unfinished completion will earn (`rollouts.rewards.verdicts`)."""

RESERVED_COLUMNS = ("prompt", "completion", "completion_ids")
"""Columns of the data set that reward functions do not receive, as in TRL."""

LOGS = ("log_extra", "log_metric")
"""Functions that a reward function may call with what it has to say besides rewards, as in TRL."""

SHARED_ARGUMENTS = ("trainer_state", *LOGS)
"""What a trainer gives to reward functions besides columns, as TRL does, if they take it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """The rewards of N rollouts, of which K were scored; the others failed or have no reward.

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
    """(N,) bool: False where a row failed or is unrewarded. Such a row enters no statistic and trains
    nothing."""
    per_function: dict[str, list[float | None]]
    """Function name -> N rewards before weighting; None where it did not apply, or failed."""
    failed: dict[int, str]
    """Failed row -> function and reason."""
    unrewarded: list[int] = field(default_factory=list)
    """Rows that did not fail, but to which no function with a weight applies; not scored either."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """What functions gave to `log_extra`: column -> N values, None where none was given."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """What functions gave to `log_metric`."""

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
    `SystemExit` included, exceeds the time, or returns NaN or infinity. A row to which no function
    with a weight applies has no reward, which is no failure. (TRL gives it 0 if a function of weight
    0 applies.)

    Every call gets copies of its own of messages and of columns that hold lists or objects, so that
    a function may change them; texts and numbers need none. Asynchronous functions are awaited
    together, after the others. `log_extra` and `log_metric` go to the functions that take them, and
    what they are given is in the result.

    A call may take `timeout` seconds, whatever its number of rows. The search for slow rows is
    bounded too: all calls of one function take at most

        (2 + ceil(log2 N)) * ((1 + retries) * timeout + retry_wait * (2**retries - 1)) seconds

    with the retry terms for remote functions only; that finds one hanging row among quick ones, and
    rows not settled by then fail. `rollouts.rewards.calls` says how calls are interrupted, and what
    needs the attribute `isolated = True`. Without a timeout nothing bounds the time, and a function
    with the attribute `untimed = True` (a reward model) has none.

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
        shared: keyword arguments passed as they are, not per row, to the functions that take them,
            such as TRL's `trainer_state`.

    Returns:
        The rewards. No rows at all give an empty result, and no function is called.

    Raises:
        RewardError: a function's arguments are not columns of the data set; it returns anything but
            one number or None per row; or too many rows failed. The message then names the first
            failing prompt, the function, the reason and the completion.
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
    batch = _Rows(prompts, completions, completion_ids, dict(shared or {}))
    if clash := sorted(set(batch.columns) & batch.shared.keys()):
        raise ValueError(f"shared arguments {clash} are also columns of the data set: rename them")
    searches = [
        _Search(function, name, batch, timeout=timeout, retries=retries, retry_wait=retry_wait)
        for name, function in zip(names, functions, strict=True)
    ]
    failures: dict[int, _Failure] = {}

    def stop_if_too_many(search: _Search) -> None:
        _stop_if_too_many(search.failed | failures, max_failed_share, prompts, completions)

    if prompts:
        for search in searches:
            _check_signature(search.function, search.name, batch.columns, {*batch.shared, *LOGS})
        together = [search for search in searches if is_async(search.function)]
        for search in searches:
            if search not in together:
                search.run(stop_if_too_many)
                failures = search.failed | failures
        _run_together(together, max_failed_share)
        for search in together:
            stop_if_too_many(search)
            failures = search.failed | failures

    weight_F = [1.0] * len(names) if weights is None else weights
    rewards = [0.0] * len(prompts)
    unrewarded: list[int] = []
    for row in (row for row in range(len(prompts)) if row not in failures):
        terms = [
            weight * value
            for weight, search in zip(weight_F, searches, strict=True)
            if weight != 0 and (value := search.values[row]) is not None
        ]
        total = _sum(terms)
        if not terms:
            unrewarded.append(row)
        elif math.isfinite(total):
            rewards[row] = total
        else:
            failures[row] = _Failure("/".join(names), f"the weighted sum of {terms} is too large")
    _stop_if_too_many(failures, max_failed_share, prompts, completions)
    without = failures.keys() | set(unrewarded)
    return RewardResult(
        reward_N=torch.tensor(rewards, dtype=torch.float64),
        scored=torch.tensor([row not in without for row in range(len(prompts))], dtype=torch.bool),
        per_function={search.name: search.values for search in searches},
        failed={row: str(failures[row]) for row in sorted(failures)},
        unrewarded=unrewarded,
        columns=_logged_columns(searches),
        metrics=_logged_metrics(searches),
    )


def _sum(terms: list[float]) -> float:
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):  # ValueError: infinities of both signs
        return math.inf


def _logged_columns(searches: list[_Search]) -> dict[str, list[Any]]:
    """Columns by name; one that a second function has, too, gets its name added."""
    columns: dict[str, list[Any]] = {}
    for search in searches:
        for column, values in search.columns.items():
            columns[column if column not in columns else f"{column} ({search.name})"] = values
    return columns


def _logged_metrics(searches: list[_Search]) -> dict[str, list[float]]:
    metrics: dict[str, list[float]] = {}
    for search in searches:
        for name, values in search.metrics.items():
            metrics.setdefault(name, []).extend(values)
    return metrics


# Calling a function, and finding the rows it fails on.


@dataclass(frozen=True, slots=True)
class _Failure:
    function: str
    reason: str
    error: BaseException | None = None

    def __str__(self) -> str:
        return f"{self.function}: {self.reason}"


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A call to make, after `wait` seconds and within `seconds`."""

    rows: range
    seconds: float | None
    wait: float


class _Search:
    """The calls of one function: all rows at once, then halves of those that failed, and so on.

    The rows are settled in order, so that a caller who stops at the first failure names the first.
    """

    def __init__(
        self,
        function: RewardFunction,
        name: str,
        batch: _Rows,
        *,
        timeout: float | None,
        retries: int,
        retry_wait: float,
    ) -> None:
        self.function, self.name = function, name
        self.values: list[float | None] = [None] * len(batch)
        self.failed: dict[int, _Failure] = {}
        self.columns: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = {}
        self._batch = batch
        self._accepted = _accepted(function, {*batch.shared, *LOGS})
        self._timeout = None if is_marked(function, "untimed") else timeout
        self._retries = retries if is_marked(function, "remote") else 0
        self._retry_wait = retry_wait
        self._unsettled = set(range(len(batch)))

    @property
    def seconds(self) -> float:
        """The most that all calls together may take."""
        if self._timeout is None or not len(self._batch):
            return math.inf
        per_call = (1 + self._retries) * self._timeout + self._retry_wait * (2**self._retries - 1)
        return (2 + math.ceil(math.log2(len(self._batch)))) * per_call

    def run(self, check: Callable[[_Search], None]) -> None:
        """Make the calls; `check` is called whenever rows are settled."""
        attempts = self._attempts(check)
        with contextlib.suppress(StopIteration):
            made = next(attempts)
            while True:
                if made.wait:
                    time.sleep(made.wait)
                made = attempts.send(attempt(self._call(made.rows), made.seconds))

    async def run_async(self, check: Callable[[_Search], None]) -> None:
        """The same for an asynchronous function."""
        attempts = self._attempts(check)
        made = next(attempts, None)
        while made is not None:
            await asyncio.sleep(made.wait)
            outcome = await attempt_async(self._call(made.rows), made.seconds)
            try:
                made = attempts.send(outcome)
            except StopIteration:
                return

    def give_up(self, reason: str) -> None:
        """All rows that are not settled fail."""
        self._fail(sorted(self._unsettled), reason)

    def _attempts(
        self, check: Callable[[_Search], None]
    ) -> Generator[_Attempt, Called | BaseException, None]:
        if self._timeout is not None:
            prepare()
        deadline = time.monotonic() + self.seconds
        pending = [range(len(self._batch))]
        while pending:
            rows = pending.pop()
            if time.monotonic() >= deadline:
                spent = f"the calls of this function took {self.seconds:g} s together"
                self._fail(rows, f"not reached: {spent}")
                check(self)
                continue
            outcome = yield from self._with_retries(rows, deadline)
            if isinstance(outcome, Called):
                self._take(rows, outcome)
            elif len(rows) > 1:
                half = len(rows) // 2
                pending += [rows[half:], rows[:half]]
                continue
            elif isinstance(outcome, Overdue):
                self._fail(rows, f"took longer than {self._timeout:g} s")
            else:
                self._fail(rows, reason_of(outcome), outcome)
            check(self)

    def _with_retries(
        self, rows: range, deadline: float
    ) -> Generator[_Attempt, Called | BaseException, Called | BaseException]:
        wait = 0.0
        for number in range(self._retries + 1):
            left = None
            if self._timeout is not None:
                left = min(self._timeout, max(deadline - time.monotonic() - wait, 0.0))
            outcome = yield _Attempt(rows, left, wait)
            wait = self._retry_wait * 2**number
            is_last = number == self._retries or time.monotonic() + wait >= deadline
            if isinstance(outcome, Called) or is_last:
                return outcome
        raise AssertionError("unreachable: the last attempt returns")

    def _call(self, rows: range) -> Call:
        shared = {name: self._batch.shared[name] for name in self._accepted & {*self._batch.shared}}
        logs = tuple(name for name in LOGS if name in self._accepted and name not in shared)
        return Call(self.function, self.name, self._batch.of(rows) | shared, rows, logs)

    def _take(self, rows: range, called: Called) -> None:
        for row, value in zip(rows, called.value_K, strict=True):
            self.values[row] = value
        for place, reason in called.failed.items():
            self.failed[rows[place]] = _Failure(self.name, reason)
        for column, values in called.columns.items():
            whole = self.columns.setdefault(column, [None] * len(self._batch))
            for row, value in zip(rows, values, strict=True):
                whole[row] = value
        for name, logged in called.metrics.items():
            self.metrics.setdefault(name, []).extend(logged)
        self._unsettled.difference_update(rows)

    def _fail(self, rows: Sequence[int], reason: str, error: BaseException | None = None) -> None:
        self.failed |= dict.fromkeys(rows, _Failure(self.name, reason, error))
        self._unsettled.difference_update(rows)


class _Enough(Exception):  # noqa: N818 -- never leaves this module
    """A search has more failures than are allowed."""


def _run_together(searches: list[_Search], max_failed_share: float) -> None:
    """The searches of asynchronous functions, at the same time.

    Each stops by itself at too many failures, and the caller looks at them in order, so that the
    order of answers decides nothing.
    """
    if not searches:
        return

    def enough(search: _Search) -> None:
        if len(search.failed) > max_failed_share * len(search.values) + 1e-9:
            raise _Enough

    async def one(search: _Search) -> RewardError | None:
        try:
            await search.run_async(enough)
        except _Enough:
            pass
        except RewardError as error:
            return error
        return None

    async def everything() -> list[RewardError | None]:
        return await asyncio.gather(*map(one, searches))

    seconds = max(search.seconds for search in searches)
    names = ", ".join(search.name for search in searches)
    try:
        errors = run_in_loop(
            everything(),
            None if math.isinf(seconds) else seconds + 1.0,
            name=f"the asynchronous reward functions {names} together",
        )
    except Overdue:
        for search in searches:
            search.give_up(
                "the event loop was blocked; an asynchronous reward must await, not wait"
            )
        return
    for error in errors:
        if error is not None:
            raise error


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


# The arguments of a call.


class _Rows:
    """What the reward functions of N rollouts are called with; every call gets its own."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        shared: dict[str, Any],
    ) -> None:
        self._prompts, self._completions, self._ids = prompts, completions, completion_ids
        self.shared = shared
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        self._names = [name for name in names if name not in RESERVED_COLUMNS]

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def columns(self) -> list[str]:
        """Names of the arguments that have one entry per row."""
        return [*self._names, "prompts", "completions", "completion_ids"]

    def of(self, rows: range) -> dict[str, list[Any]]:
        """Arguments for some rows, copied wherever a function could change them."""
        prompts = [self._prompts[row] for row in rows]
        columns = {
            name: [own_copy(prompt.columns.get(name), name) for prompt in prompts]
            for name in self._names
        }
        texts: list[Any] = [self._completions[row] for row in rows]
        for place, prompt in enumerate(prompts):
            if prompt.is_conversational:
                texts[place] = [{"role": "assistant", "content": texts[place]}]
        return {
            **columns,
            "prompts": [own_copy(prompt.prompt, "prompt") for prompt in prompts],
            "completions": texts,
            "completion_ids": [list(self._ids[row]) for row in rows],
        }


_IMMUTABLE = (str, int, float, bool, bytes, type(None))


def own_copy(value: Any, column: str) -> Any:
    """A deep copy; lists and dicts, as data sets hold them, are copied faster than `deepcopy` does."""
    kind = type(value)
    if kind in _IMMUTABLE:
        return value
    if kind is list:
        return [own_copy(one, column) for one in value]
    if kind is dict:
        return {key: own_copy(one, column) for key, one in value.items()}
    try:
        return copy.deepcopy(value)
    except Exception as error:
        warnings.warn(
            f"column {column!r} holds {kind.__name__} objects, which cannot be copied "
            f"({described(error)}): all calls of reward functions share them",
            stacklevel=2,
        )
        return value


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
    names = [name_of(function) for function in functions]
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(
            f"two reward functions are called {doubled[0]!r}, so their rewards cannot be told "
            f"apart: give one another __name__"
        )
    for name, function in zip(names, functions, strict=True):
        if inspect.isasyncgenfunction(function):
            raise RewardError(
                f"reward function {name} is an asynchronous generator; return a list instead of "
                "yielding"
            )
        if is_async(function) and is_marked(function, "isolated"):
            raise ValueError(
                f"reward function {name} is asynchronous and isolated: make it an ordinary function, "
                "for example one that calls asyncio.run"
            )
    return names


def name_of(function: RewardFunction) -> str:
    if not callable(function):
        raise ValueError(f"a reward function must be callable, got {function!r}")
    while isinstance(function, functools.partial) and not hasattr(function, "__name__"):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def check_columns(functions: Sequence[RewardFunction], prompts: Sequence[Prompt]) -> None:
    """Say before anything is generated whether each function can take what these prompts bring.

    A column that reward functions do not receive is named in a warning.

    Raises:
        RewardError: naming the function and the column it needs, with the nearest there is.
        ValueError: if there is no function, two have one name, or a column has the name of an
            argument that reward functions are given.
    """
    columns = _Rows(prompts[:1], [""], [[]], {}).columns
    if clash := [name for name in SHARED_ARGUMENTS if name in columns]:
        raise ValueError(
            f"column {clash[0]!r} has the name of an argument that reward functions are given; "
            "rename the column"
        )
    if hidden := [name for name in RESERVED_COLUMNS if prompts and name in prompts[0].columns]:
        warnings.warn(
            f"column {hidden[0]!r} is not given to reward functions, as in TRL; rename it if they need "
            "it",
            stacklevel=2,
        )
    for name, function in zip(_names(functions), functions, strict=True):
        _check_signature(function, name, columns, set(SHARED_ARGUMENTS))


def _accepted(function: RewardFunction, names: set[str]) -> set[str]:
    """Which of these keyword arguments the function takes."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a callable written in C says nothing about its arguments
        return names
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return names
    return {
        name
        for name in names
        if name in parameters and parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY
    }


def _check_signature(
    function: RewardFunction, name: str, columns: Sequence[str], shared: set[str]
) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    given = dict.fromkeys([*columns, *_accepted(function, shared)])
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


def nearest(name: str, known: Any) -> str:
    """A remark naming the known name most like `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (nearest: {close[0]!r})" if close else ""


# Rewards that come with the library.
