"""End a run: after its steps, when its budget is spent, or when validation stops improving."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

logger = logging.get_logger(__name__)


class NoSignalError(RuntimeError):
    """Too many steps in a row in which no rollout carried a gradient; the run has ended in order."""


class Budget(TrainerCallback):
    """Ends the run after the step in which what it has spent reaches `most`.

    Everything generated counts: pilots, filtered groups, surplus. The last step is logged,
    validated and saved as at `max_steps`, which still ends the run if it comes first.

    Args:
        spent: tokens of a language model, evaluations of a denoiser, or steps without signal, so far.
        most: of these.
        setting: the name of `most`.
    """

    def __init__(self, spent: Callable[[], float], most: int, *, setting: str) -> None:
        self._spent, self.most, self.setting = spent, most, setting

    @property
    def spent(self) -> float:
        """Spent so far, by this run and those it was resumed from."""
        return self._spent()

    @property
    def is_spent(self) -> bool:
        return self.spent >= self.most

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_spent:
            control.should_training_stop = control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = args.save_strategy != "no"


class EmptySteps(Budget):
    """Steps without signal. A class of its own: transformers warns of two callbacks of one class."""


class EvaluationBudget(Budget):
    """Evaluations of a denoiser. A class of its own, like `EmptySteps`."""


def spent_budgets(handler: CallbackHandler) -> str:
    """The budgets that are spent, by their settings; empty if there is none."""
    budgets = [each for each in handler.callbacks if isinstance(each, Budget)]
    return " and ".join(f"{each.setting}={each.most}" for each in budgets if each.is_spent)


@contextmanager
def no_step_if_spent(args: Any, handler: CallbackHandler, step: int) -> Iterator[None]:
    """In this block a run that goes on from `step` ends there, if a budget is spent.

    The base class takes a step before it looks at the control flags, so its steps are cut short.
    """
    spent = spent_budgets(handler)
    if not step or not spent:
        yield
        return
    logger.warning(f"{spent} reached by step {step}: no step is taken")
    planned, args.max_steps = args.max_steps, step
    try:
        yield
    finally:
        args.max_steps = planned


def num_steps(args: Any, num_prompts: int) -> int:
    """`max_steps`, or where it is negative the steps of `num_train_epochs` passes over the prompts.

    Raises:
        ValueError: if that is no step at all.
    """
    if args.max_steps > 0:
        return args.max_steps
    if args.max_steps == 0:
        raise ValueError(
            "max_steps must be at least 1, got 0; leave it out to train for num_train_epochs"
        )
    steps = -(-int(args.num_train_epochs * num_prompts) // args.prompts_per_step)
    if steps < 1:
        raise ValueError(
            f"num_train_epochs={args.num_train_epochs} of {num_prompts} prompts are no step; write "
            "max_steps, or num_train_epochs above 0"
        )
    return steps


def no_signal(num_empty: int, history: list[dict[str, float]]) -> NoSignalError:
    """The error of a run that ended for want of signal, after so many steps; `history` is its log."""
    first = max((row.get("step", 0) for row in history), default=0) - num_empty
    steps = [row for row in history if row.get("step", 0) > first and "rounds" in row]
    if steps and not any("reward" in row for row in steps):
        return NoSignalError(
            f"no reward could be had in the last {num_empty} steps: every reward failed or was None; "
            "steps.jsonl of the run folder has the reasons under failures. Repair the reward or its "
            "columns, and write resume_from_checkpoint: true to go on"
        )
    rewards = [row["reward"] for row in history if "reward" in row]
    last = f"; last mean reward {rewards[-1]:.3f}" if rewards else ""
    return NoSignalError(
        f"no rollout carried a gradient in the last {num_empty} steps (all groups constant{last}): "
        "the task is solved or hopeless for this policy, or the reward is wrong; raise "
        "max_empty_steps and write resume_from_checkpoint: true to go on"
    )
