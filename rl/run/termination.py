"""On SIGTERM, finish the training step, save a checkpoint and report that the run is unfinished.

Between two steps what the planner knows and what the weights have learnt belong together, and only
there. So nothing is saved in the middle of a step, as transformers' own callback does.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from rl.ranks import Ranks

logger = logging.get_logger(__name__)


class Terminated(SystemExit):
    """The run was ended by SIGTERM before its last step; its last checkpoint is of the step it was at.

    The process ends with status 143, unless this is caught, so that nothing after it takes the model
    for a finished one.
    """


class Termination(TrainerCallback):
    """Ends the run after the step in which any process of it was sent SIGTERM, with a checkpoint."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._is_asked = False
        self.has_ended = False

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """In this block SIGTERM is a request; only the main thread of a process can have that."""
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "enable_jit_checkpoint needs the main thread: SIGTERM ends the run at once"
            )
            yield
            return
        self._is_asked = self.has_ended = False
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True

    def _end(self, control: Any) -> None:
        if self.has_ended or self._ranks.most(int(self._is_asked)):
            self.has_ended = control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end(control)
        control.should_save |= self.has_ended

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.on_step_end(args, state, control)
