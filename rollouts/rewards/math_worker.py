"""Compares mathematical answers in a process that can be killed.

`10^{1000000000}` in a completion keeps the interpreter lock for hours once sympy evaluates it: no
thread, no Python signal handler and no time limit inside that interpreter gets a turn. So answers
are compared in a child process, which the operating system kills when a comparison takes too long.

This file is both ends: `MathWorker` is the parent's, and run as a script it is the child, which
imports nothing heavy but math-verify. They exchange one line of JSON per comparison. POSIX only.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import subprocess
import sys
import threading
from typing import Any


class MathWorker:
    """Compares answers in a child process, which starts with the first comparison.

    The child ends with its parent, since its input then ends; a child that was killed is replaced
    at the next comparison. Threads take turns.
    """

    def __init__(self, *, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds must be positive, got {seconds}")
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def compare(self, references: list[str], answers: list[str]) -> bool | None:
        """Whether an answer equals the reference, as mathematics.

        Args:
            references: readings of the reference, of which the first that can be parsed counts.
            answers: the same of the answer. An answer that cannot be parsed is not equal.

        Returns:
            None if the reference cannot be parsed.

        Raises:
            TimeoutError: the comparison took longer than the worker's `seconds`.
            RuntimeError: the child ended for another reason; its last words are on stderr.
        """
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps([references, answers]) + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except BaseException:
                # Also when this thread is told to stop: an unread reply must not answer the next.
                self._stop()
                raise
            if reply:
                return json.loads(reply)
            self._stop()
        if process.returncode == -signal.SIGALRM:
            raise TimeoutError(f"comparing two answers took longer than {self._seconds:g} s")
        raise RuntimeError(f"the process that compares answers ended with {process.returncode}")

    def _start(self) -> subprocess.Popen[str]:
        # -P: this file's folder must not shadow installed modules. A session of its own: Ctrl-C in
        # the terminal is for the parent.
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, repr(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        return self._process

    def _stop(self) -> None:
        """End the child; its return code is then known. A child that is already dead stays so."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.kill()
            process.wait()


@functools.lru_cache(maxsize=4096)
def _parsed(readings: tuple[str, ...]) -> list[Any]:
    """What math-verify finds in the first reading in which it finds anything."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    for reading in readings:
        if found := parse(reading, extraction_config=configs, parsing_timeout=None):
            return found
    return []


def _serve(seconds: float) -> None:
    """Answer one comparison per line until the input ends."""
    import logging
    import resource

    from math_verify import verify

    # It warns that its own timeouts are off; the timer below replaces them.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # A huge number becomes a MemoryError here, hence "not equal", before it troubles the machine.
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = 4 << 30 if hard == resource.RLIM_INFINITY else min(4 << 30, hard)
    with contextlib.suppress(ValueError):  # macOS knows the limit but does not let it be set
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    # The default action ends the process even where no Python code gets a turn.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints is not a reply
    for line in sys.stdin:
        references, answers = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        gold = _parsed(tuple(references))
        equal = verify(gold, _parsed(tuple(answers)), timeout_seconds=None) if gold else None
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(equal) + "\n")
        replies.flush()


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
