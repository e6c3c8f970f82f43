"""A run that ends by what it spent on rollouts, so that methods of unequal steps can be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState


class Budget(TrainerCallback):
    """Ends the run after the step in which what it has spent reaches `most`.

    Everything generated counts: pilots, filtered groups, surplus. The last step is logged,
    validated and saved as at `max_steps`, which still ends the run if it comes first.

    Args:
        spent: tokens of a language model, or evaluations of a denoiser, so far.
        most: of these.
    """

    def __init__(self, spent: Callable[[], float], most: int) -> None:
        self._spent, self._most = spent, most

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._spent() >= self._most:
            control.should_training_stop = control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = args.save_strategy != "no"
