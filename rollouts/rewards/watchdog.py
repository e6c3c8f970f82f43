"""Interrupts a call that takes too long, also while it holds the interpreter lock.

A regular expression that backtracks or `9**9**9` holds the interpreter lock: no other thread of the
process gets a turn. But CPython looks for signals inside such code, if it runs in the main thread. So
a small second process keeps the time. When a call's time is up, it sends SIGVTALRM, whose handler
raises inside the call, and repeats it, as code may swallow what is raised. Code in C that never looks
for signals cannot be interrupted at all; after some time without an answer the process that runs it
is killed, with a message, because a run that stands still for ever is worse.

SIGVTALRM, because libraries use SIGALRM for timeouts of their own. This file is both ends:
`interrupt_after` is the parent's, and run as a script it is the child, which needs the standard
library alone. POSIX only.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

REPEAT_SECONDS = 0.5
"""Seconds between two signals."""

KILL_SECONDS = 30.0
"""Seconds without an answer to any signal, at least, before the process is killed. A call with a longer
limit is given that much time again."""


class Overdue(Exception):  # noqa: N818 -- not an error of the call
    """A call took longer than it may."""


class _Interrupt(BaseException):
    """Raised inside an overdue call; not an Exception, so that `except Exception` lets it pass."""


class _Watchdog:
    """The parent's end. The child starts with the first call, and ends with its parent."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self.armed = self.has_raised = self.is_impossible = False
        self.deadline = math.inf

    def prepare(self) -> None:
        if self._process is None or self._owner != os.getpid():  # a fork has its own
            self._launch()

    def start(self, seconds: float, name: str) -> None:
        self.prepare()
        # Absolute, so that a child that is slow to wake does not add to it: processes share the clock.
        self.deadline = time.monotonic() + seconds
        line = f"{self.deadline!r} {seconds!r} {max(seconds, KILL_SECONDS)!r} {name}\n".encode()
        try:
            self._send(line)
        except BrokenPipeError:
            self._launch()
            self._send(line)

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._send(b"\n")

    def _launch(self) -> None:
        # In the same process group: a job that is suspended must not be killed for it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._owner = os.getpid()
        assert self._process.stdin is not None and self._process.stdout is not None
        atexit.register(self._end, self._process)
        if not self._process.stdout.read(1):
            raise OSError(f"the process that times rewards ended with {self._process.wait()}")

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        if self._owner == os.getpid():
            process.kill()
            with process:  # closes its pipes
                pass

    def _send(self, line: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(line)

    def on_signal(self, *_: Any) -> None:
        # A signal that was meant for an earlier call is of no matter.
        if self.armed and time.monotonic() >= self.deadline:
            self.has_raised = True
            raise _Interrupt


_watchdog = _Watchdog()


def can_interrupt() -> bool:
    """Whether `interrupt_after` works here: in the main thread, and not inside such a call."""
    return (
        threading.current_thread() is threading.main_thread()
        and hasattr(signal, "SIGVTALRM")
        and not _watchdog.armed
        and not _watchdog.is_impossible
    )


def prepare() -> None:
    """Start the second process, if there is none yet, so that no call has to wait for it.

    Where none can be started, `can_interrupt` is False from then on.
    """
    if can_interrupt():
        try:
            _watchdog.prepare()
        except OSError:
            _watchdog.is_impossible = True


def interrupt_after(seconds: float, call: Callable[[], Any], *, name: str) -> Any:
    """The result of `call()`, which is interrupted after `seconds`. Only where `can_interrupt()`.

    Args:
        seconds: how long it may take, positive or 0.
        call: anything. A call that swallowed the interruption counts as overdue, whatever it returns.
        name: what the call is, for the message of the child.

    Raises:
        Overdue: the call took longer. What else it raises is raised as it is.
    """
    watchdog = _watchdog
    before = signal.getsignal(signal.SIGVTALRM)
    signal.signal(signal.SIGVTALRM, watchdog.on_signal)
    watchdog.has_raised = False
    try:
        try:
            watchdog.start(seconds, name)
            watchdog.armed = True
            result = call()
        finally:
            watchdog.armed = False
    except BaseException as error:  # a signal may also come while the line above is left
        watchdog.armed = False
        if not watchdog.has_raised or isinstance(error, KeyboardInterrupt):
            raise
    finally:
        watchdog.stop()
        if callable(before):  # else the handler stays: a late signal would end the process
            signal.signal(signal.SIGVTALRM, before)
    if watchdog.has_raised:
        raise Overdue
    return result


# The child.


def _watch(parent: int) -> None:
    """Wait for one line per call, and for one more at its end; signal the parent in between."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the parent
    os.write(1, b".")  # ready
    name = ""  # of the call that is going on
    while line := _line(parent):
        if not line.strip():  # the end of a call
            name = ""
            continue
        *times, name = line.decode().strip().split(None, 3)
        deadline, seconds, patience = map(float, times)
        if _is_readable(max(deadline - time.monotonic(), 0.0)):
            continue
        waited = 0.0
        while os.getppid() == parent:
            os.kill(parent, signal.SIGVTALRM)
            if _is_readable(REPEAT_SECONDS):
                break
            waited += 0.0 if _is_stopped(parent) else REPEAT_SECONDS
            if waited >= patience:
                print(
                    f"{name} took longer than {seconds:g} s and did not let itself be interrupted for "
                    f"{waited:g} s more; process {parent} is killed. Set the attribute `isolated = "
                    "True` of the function, so that it runs in a process that can be killed alone, and "
                    "resume from the last checkpoint.",
                    file=sys.stderr,
                    flush=True,
                )
                os.kill(parent, signal.SIGKILL)
                return
    if name:
        print(f"process {parent} ended within a call of {name}", file=sys.stderr, flush=True)


def _line(parent: int) -> bytes:
    """The next line; nothing if the parent is gone."""
    line = b""
    while not line.endswith(b"\n"):
        while not _is_readable(60.0):
            if os.getppid() != parent:  # gone, and a child of it holds the pipe open
                return b""
        piece = os.read(0, 1)
        if not piece:
            return b""
        line += piece
    return line


def _is_readable(seconds: float) -> bool:
    return bool(select.select([0], [], [], seconds)[0])


def _is_stopped(process: int) -> bool:
    """Whether a debugger or a shell holds the process, as far as the system tells."""
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


if __name__ == "__main__":
    _watch(int(sys.argv[1]))
