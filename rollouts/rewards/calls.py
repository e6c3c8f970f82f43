"""Call a reward function within a time limit and turn what it returns into numbers.

A call runs in one of four ways:

    in the main thread     where `rollouts.rewards.watchdog` can interrupt it, even a regular expression
                           that backtracks or a huge integer power
    in a daemon thread     where `score` is not called from the main thread; a thread cannot be killed,
                           so one that is blocked in C code or in I/O is left behind
    in a forked process    a function with the attribute `isolated = True`, which can then do anything,
                           code that the policy wrote included: it is killed when its time is up, and
                           whatever ends it ends nothing else. What such a function remembers from
                           call to call is lost; it cannot use CUDA, and should leave torch alone.
    in an event loop       asynchronous functions, which wait together. The loop is one for the whole
                           run, as in TRL, because clients and semaphores belong to the loop they were
                           first used in.

Axes: K rows of one call.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import inspect
import itertools
import json
import math
import numbers
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from typing import Any, NoReturn

import torch

from rollouts.rewards.watchdog import Overdue, can_interrupt, interrupt_after


class RewardError(RuntimeError):
    """A reward function broke its contract, or more rows failed than the caller allows."""

    on_all_ranks = False
    """Whether every process of a run raises it at the same point."""


@dataclass(slots=True)
class Called:
    """What one call of a function gave for its K rows."""

    value_K: list[float | None]
    """Finite numbers; None where the function does not apply or the row failed."""
    failed: dict[int, str] = field(default_factory=dict)
    """Place in the call -> why what was returned there is no reward."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """What was given to `log_extra`, K values each."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """What was given to `log_metric`."""


class _Log:
    """TRL's `log_extra` and `log_metric`, for one call."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Add values to a column of the completions table: one per row, at once or in parts.

        What is neither a number nor a text is written as one.
        """
        values = values.tolist() if hasattr(values, "tolist") else values
        plain = [v if v is None or type(v) in (bool, int, float, str) else str(v) for v in values]
        self.columns.setdefault(str(column), []).extend(plain)

    def log_metric(self, name: str, value: float) -> None:
        """Add a number to a metric of the step, which is the mean of them."""
        self.metrics.setdefault(str(name), []).append(float(value))


@dataclass(frozen=True, slots=True)
class Call:
    """A function, and the arguments of one call."""

    function: Callable[..., Any]
    name: str
    arguments: Mapping[str, Any]
    rows: Sequence[int]
    """K, as the caller of `score` counts them; for messages."""
    logs: tuple[str, ...] = ()
    """Which of `log_extra` and `log_metric` the function takes."""

    def run(self) -> Called:
        """Call the function here and now, as long as it takes."""
        log = _Log()
        given = self.function(**self.arguments, **self._of(log))
        if inspect.isawaitable(given):  # of a decorated function, say
            given = event_loop().run(given)
        return self._finished(given, log)

    async def run_async(self) -> Called | BaseException:
        """Await the function; an exception is returned, as one may not leave the event loop."""
        log = _Log()
        try:
            given = self.function(**self.arguments, **self._of(log))
            return self._finished(await given, log)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            return error

    def _of(self, log: _Log) -> dict[str, Any]:
        return {name: getattr(log, name) for name in self.logs}

    def _finished(self, given: Any, log: _Log) -> Called:
        value_K, failed = numbers_of(given, self.name, self.rows)
        for column, values in log.columns.items():
            if len(values) != len(self.rows):
                raise RewardError(
                    f"reward function {self.name} gave log_extra {len(values)} values of {column!r} "
                    f"for {len(self.rows)} completions; give one per completion"
                )
        return Called(value_K, failed, log.columns, log.metrics)


@contextlib.contextmanager
def _no_exit() -> Iterator[None]:
    """In this block `os._exit` raises SystemExit, as `sys.exit` does; in child processes it exits.

    Code that a policy wrote would else end a run with status 0, without a word.
    """
    leave, owner = os._exit, os.getpid()

    def refuse(status: int) -> NoReturn:
        if os.getpid() != owner:
            leave(status)
        raise SystemExit(f"os._exit({status})")

    os._exit = refuse
    try:
        yield
    finally:
        os._exit = leave


def attempt(call: Call, seconds: float | None) -> Called | BaseException:
    """What the call gave, or what ended it: an exception, `SystemExit` too, or `Overdue`.

    Raises:
        RewardError: the function broke its contract.
        KeyboardInterrupt: somebody stops the run.
    """
    try:
        if is_marked(call.function, "isolated"):
            return _in_process(call, seconds)
        with _no_exit():
            return _within(seconds, call.run, name=f"reward function {call.name!r}")
    except (RewardError, KeyboardInterrupt):
        raise
    except BaseException as error:
        return error


def outcome_of(run: Callable[[], Any], seconds: float | None, *, name: str) -> Any:
    """What `run()` returns, or the exception that ended it; `Overdue` after `seconds`.

    Raises:
        RewardError: the function broke its contract.
        KeyboardInterrupt: somebody stops the run.
    """
    try:
        with _no_exit():
            return _within(seconds, run, name=name)
    except (RewardError, KeyboardInterrupt):
        raise
    except BaseException as error:
        return error


async def attempt_async(call: Call, seconds: float | None) -> Called | BaseException:
    """`attempt` for asynchronous functions; a coroutine that took too long is cancelled."""
    task = asyncio.ensure_future(call.run_async())
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if not done:
        task.cancel()
        return Overdue()
    if task.cancelled():
        return asyncio.CancelledError("the coroutine was cancelled")
    outcome = task.result()
    if isinstance(outcome, RewardError):
        raise outcome
    return outcome


def _within(seconds: float | None, run: Callable[[], Any], *, name: str) -> Any:
    """The result of `run()`; Overdue if it takes longer than `seconds`, None being for ever."""
    if seconds is None:
        return run()
    if can_interrupt():
        return interrupt_after(seconds, run, name=name)
    return _in_thread(run, seconds)


def _in_thread(run: Callable[[], Any], seconds: float) -> Any:
    """Run in a daemon thread, which is abandoned after `seconds`."""
    outcome: list[tuple[Any, BaseException | None]] = []
    # The current device is a setting of each thread; a new thread would use device 0.
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def work() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            outcome.append((run(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, name="reward", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        _tell_to_exit(thread)
        raise Overdue
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def _tell_to_exit(thread: threading.Thread) -> None:
    """Raise SystemExit at the thread's next line of Python, so that an endless loop does not go on."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
    )


# In a process of its own.


class _ChildError(RuntimeError):
    """What went wrong in the child, in words."""


def _in_process(call: Call, seconds: float | None) -> Called | BaseException:
    for stream in (sys.stdout, sys.stderr):  # what waits there would be written by both
        with contextlib.suppress(ValueError, OSError, AttributeError):
            stream.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(call, writing)
    with contextlib.suppress(OSError):  # the child does so too; whoever comes first
        os.setpgid(child, child)
    os.close(writing)
    try:
        reply = _read_all(reading, seconds)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)  # what it started, too
        _, status = os.waitpid(child, 0)
    if reply is None:
        return Overdue()
    if not reply:
        code = os.waitstatus_to_exitcode(status)
        what = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        return _ChildError(f"the process of the call {what}")
    return _answer(reply, num_rows=len(call.rows))


def _answer(reply: bytes, *, num_rows: int) -> Called | BaseException:
    """What a child wrote. The code that it ran may have written there too: JSON, and looked through.

    Raises:
        RewardError: the child's, where the function broke its contract.
    """
    try:
        kind, payload = json.loads(reply)
        if kind == "contract":
            raise RewardError(str(payload))
        if kind == "raised":
            error = _ChildError(str(payload[0]))
            error.add_note(str(payload[1]))
            return error
        called = Called(
            [None if value is None else float(value) for value in payload["value_K"]],
            {int(place): str(reason) for place, reason in payload["failed"].items()},
            {str(name): list(values) for name, values in payload["columns"].items()},
            {str(name): list(map(float, of)) for name, of in payload["metrics"].items()},
        )
        known = [value for value in called.value_K if value is not None]
        if kind == "called" and len(called.value_K) == num_rows and all(map(math.isfinite, known)):
            return called
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        pass
    return _ChildError("the process of the call did not write the rewards of its rows")


def _child(call: Call, writing: int) -> NoReturn:
    """Run the call, write what came of it, and leave without any of the parent's clean-up."""
    reply: tuple[str, Any]
    try:
        os.setpgid(0, 0)
        reply = ("called", asdict(call.run()))
    except RewardError as error:
        reply = ("contract", str(error))
    except BaseException as error:
        reply = ("raised", (reason_of(error), traceback.format_exc()))
    body = json.dumps(reply).encode()
    with contextlib.suppress(BaseException):
        with open(writing, "wb") as pipe:
            pipe.write(body)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def _read_all(reading: int, seconds: float | None) -> bytes | None:
    """Everything until the other end is closed; None if that takes longer than `seconds`."""
    deadline = None if seconds is None else time.monotonic() + seconds
    pieces: list[bytes] = []
    while True:
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        if not select.select([reading], [], [], left)[0]:
            return None
        piece = os.read(reading, 1 << 20)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)


# In the event loop.


class EventLoop:
    """An event loop in a daemon thread, for as long as the process lives."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._owner = os.getpid()
        self._is_in_doubt = False
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._work, name="async rewards", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        asyncio.set_event_loop(self.loop)
        while not self.loop.is_closed():
            with contextlib.suppress(SystemExit, KeyboardInterrupt):  # of a task of the user's
                self.loop.run_forever()
                return

    def run(self, awaitable: Awaitable[Any]) -> Any:
        """The result of `awaitable`; it is cancelled if the thread that waits is interrupted."""

        async def result() -> Any:
            return await awaitable

        future = asyncio.run_coroutine_threadsafe(result(), self.loop)
        try:
            return future.result()
        except BaseException:
            if not future.done():
                future.cancel()
                self._is_in_doubt = True
            raise

    def is_alive(self) -> bool:
        """Whether the loop can be used; ask a loop that a coroutine blocks to exit."""
        if self._owner != os.getpid():  # of the process that this one was forked from
            return False
        if self._is_in_doubt:
            try:
                asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop).result(1.0)
            except TimeoutError:
                _tell_to_exit(self._thread)
                return False
            self._is_in_doubt = False
        return True


_event_loop: EventLoop | None = None


def event_loop() -> EventLoop:
    """The loop that asynchronous rewards share."""
    global _event_loop
    if _event_loop is None or not _event_loop.is_alive():
        _event_loop = EventLoop()
    return _event_loop


def run_in_loop(awaitable: Awaitable[Any], seconds: float | None, *, name: str) -> Any:
    """The result of `awaitable`.

    Raises:
        Overdue: it took longer than `seconds`, although it should have ended by itself, so that
            something blocks the loop.
    """
    run = functools.partial(event_loop().run, awaitable)
    with _no_exit():
        return _within(seconds, run, name=name)


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a function is `async def`, or an object whose call is; partials are looked into."""
    while isinstance(function, functools.partial):
        function = function.func
    return any(map(inspect.iscoroutinefunction, (function, function.__call__)))  # type: ignore[operator]


def is_marked(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has the attribute `name = True`; partials are looked into."""
    while not hasattr(function, name) and isinstance(function, functools.partial):
        function = function.func
    return bool(getattr(function, name, False))


# From what a function returned to numbers.


def numbers_of(
    given: Any, name: str, rows: Sequence[int]
) -> tuple[list[float | None], dict[int, str]]:
    """Finite floats and None, one per row, and why a row has no number although it was given one.

    A list, tuple, array, tensor (on any device, of any type, of shape (K,) or (K, 1)), series or
    iterator of numbers or None. Bool, NumPy's scalars, tensors of one element, Fraction and Decimal
    are numbers. NaN, infinity, what is too large for a float, and what raises when it is made one fail
    their row; the reasons are by place in the call.

    Raises:
        RewardError: anything else; texts too, since "1.0" is more often an answer than a reward.
    """
    expected = f"expected a list of {len(rows)} numbers or None"
    kind = type(given).__name__
    try:
        values = given
        if (getattr(given, "ndim", None) or 0) > 1 and math.prod(given.shape[1:]) == 1:
            values = given.reshape(-1)
        if hasattr(values, "tolist"):
            values = values.tolist()
    except Exception as error:
        raise RewardError(
            f"reward function {name} returned {start_of(given)} of type {kind}, which cannot be read "
            f"({described(error)}); {expected}"
        ) from error
    unordered = str | bytes | Mapping | set | frozenset
    if isinstance(values, unordered) or not isinstance(values, Iterable):
        raise RewardError(
            f"reward function {name} returned {start_of(given)} of type {kind}; {expected}"
        )
    if not isinstance(values, list | tuple):
        # An iterator may have no end. What it raises is raised as it is, as by the function itself.
        values = list(itertools.islice(values, len(rows) + 1))
    if len(values) != len(rows):
        raise RewardError(
            f"reward function {name} returned {len(values)} rewards for {len(rows)} completions; "
            f"expected one per completion"
        )
    rewards: list[float | None] = []
    failed: dict[int, str] = {}
    for place, value in enumerate(values):
        try:
            number = _number(value)
        except TypeError as error:
            raise RewardError(
                f"reward function {name} returned {start_of(value)} of type {type(value).__name__} "
                f"for row {rows[place]}; expected a number or None"
            ) from error
        except Exception as error:
            failed[place] = f"returned {start_of(value)}, which is no float ({described(error)})"
            number = None
        if number is not None and not math.isfinite(number):
            failed[place] = f"returned {number}"
            number = None
        rewards.append(number)
    return rewards, failed


def _number(value: Any) -> float | None:
    """The value as a float; TypeError if it is of another kind."""
    if value is None or type(value) is float:
        return value
    if hasattr(value, "item"):
        if math.prod(getattr(value, "shape", ())) != 1:
            raise TypeError("not one number")
        value = value.item()
    if not isinstance(value, numbers.Real | Decimal):
        raise TypeError("not a number")
    return float(value)


# For messages.


def reason_of(error: BaseException) -> str:
    """Why a row failed, after the name of the function."""
    return str(error) if isinstance(error, _ChildError) else f"raised {described(error)}"


def described(error: BaseException) -> str:
    """An exception as its type and text; also one whose text cannot be had."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def start_of(value: Any, length: int = 120) -> str:
    """The beginning of `value` as Python writes it, for messages; also of what cannot be written."""
    try:
        text = repr(value)
    except Exception:
        text = object.__repr__(value)
    return text if len(text) <= length else text[:length] + "..."
