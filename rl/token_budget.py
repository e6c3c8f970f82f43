"""A run that ends by what it generated, so that methods of unequal steps can be compared."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from samplers.ledger import Ledger


class TokenBudget(TrainerCallback):
    """Ends the run after the step in which its generated tokens reach `most`.

    Every generated token counts: pilots, filtered groups, surplus. The last step is logged,
    validated and saved as at `max_steps`, which still ends the run if it comes first.
    """

    def __init__(self, ledger: Ledger, most: int) -> None:
        self._ledger, self._most = ledger, most

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._ledger.totals["tokens_drawn"] >= self._most:
            control.should_training_stop = control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = args.save_strategy != "no"
