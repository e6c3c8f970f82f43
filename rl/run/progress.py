"""Show a run's progress, rewards and cost: a live line, or one line per log in a file.

Step or budget, time left, reward and validation come first and always; further figures follow as far as
the line is wide, whole or not at all.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from transformers import TrainerCallback

from rl.run.end import Budget

PIPED_WIDTH = 110
"""Characters of a line that is not shown in a terminal."""


class ProgressLine(TrainerCallback):
    """The progress of a run on standard error.

    Args:
        args: the settings; `max_steps`, `disable_tqdm` and `log_level` are read.
        console: where to print. Default: standard error.
    """

    def __init__(self, args: Any, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live = self._console.is_terminal and not args.disable_tqdm
        self._quiet = (
            bool(args.disable_tqdm) and not sys.stderr.isatty() and args.log_level == "error"
        )
        self._budget: tuple[Budget, str] | None = None
        self._progress: Progress | None = None
        self._validation: list[str] = []

    def count(self, budget: Budget, unit: str) -> None:
        """Measure the run by what it spends of `budget`, in `unit`, instead of by its steps."""
        self._budget = budget, unit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self._live:
            return
        self._progress = Progress(
            TextColumn("{task.fields[place]}"),
            BarColumn(bar_width=10),
            TimeRemainingColumn(compact=True),
            TextColumn(
                "{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")
            ),
            console=self._console,
        )
        total = state.max_steps if self._budget is None else self._budget[0].most
        # What an earlier process did is no measure of this one's speed: the time left counts from here.
        self._task = self._progress.add_task("", total=total, place=self._place(state))
        self._progress.update(self._task, completed=self._done(state))
        self._progress.start()

    def _done(self, state: Any) -> float:
        return state.global_step if self._budget is None else self._budget[0].spent

    def _place(self, state: Any) -> str:
        if self._budget is None:
            return f"step {state.global_step}/{state.max_steps}"
        budget, unit = self._budget
        return f"step {state.global_step}, {short(budget.spent)}/{short(budget.most)} {unit}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done(state), place=self._place(state))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self._quiet or not logs:
            return
        self._validation = validation_of(logs) or self._validation
        if "reward" not in logs and not validation_of(logs):
            return
        earned, more = training_of(logs)
        parts = earned + self._validation
        if self._progress is not None:
            # The bar, the time left and the spaces between the columns take 10 + 5 + 3 characters.
            width = self._console.width - len(self._place(state)) - 18
            line = fitting(parts, more, width=width)
            self._progress.update(
                self._task, description=line, completed=self._done(state), place=self._place(state)
            )
        else:
            parts = [self._place(state), *parts]
            print(fitting(parts, more, width=PIPED_WIDTH), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Give the terminal back, however the run ended."""
        if self._progress is not None:
            self._progress.stop()


def fitting(always: list[str], more: list[str], *, width: int) -> str:
    """`always`, and of `more` what fits into `width` characters, in order; a longer part is left out."""
    line = " | ".join(always)
    for part in more:
        longer = f"{line} | {part}" if line else part
        if len(longer) <= width:
            line = longer
    return line


def validation_of(logs: dict[str, float]) -> list[str]:
    """The pass rate and the greedy accuracy of each validation set in a log line; [] without one.

    `eval_pass_rate` is the only set's, `eval_NAME_pass_rate` that of the set NAME.
    """
    parts = []
    for name in logs:
        if not (name.startswith("eval_") and name.endswith("pass_rate")):
            continue
        data_set = name.removeprefix("eval_").removesuffix("pass_rate").rstrip("_")
        part = f"{data_set or 'validation'} {logs[name]:.1%}"
        for kind in ("greedy", "deterministic"):
            accuracy = name.replace("pass_rate", f"{kind}_accuracy")
            if accuracy in logs:
                part += f" {kind} {logs[accuracy]:.1%}"
        parts.append(part)
    return parts


def training_of(logs: dict[str, float]) -> tuple[list[str], list[str]]:
    """The reward of a log line, and its further figures, the most useful first; ([], []) without reward.

    Seconds per step; groups with a signal; tokens (denoising steps) generated, and the share of them
    that trained; the same of rollouts; the mean reward of rows that trained; seconds of each phase.
    """
    if "reward" not in logs:
        return [], []
    total = "ledger_total/"
    more = []
    if "step_time" in logs:
        more.append(f"{logs['step_time']:.2g} s/step")
    if "groups/mixed_share" in logs:
        more.append(f"mixed {logs['groups/mixed_share']:.0%}")
    units = {"tokens": "denoising steps" if "denoiser_evaluations" in logs else "tokens"}
    for name, unit in (units | {"rollouts": "rollouts"}).items():
        drawn, trained = logs.get(f"{total}{name}_drawn"), logs.get(f"{total}{name}_trained")
        if drawn and trained is not None:
            more.append(f"{short(drawn)} {unit}, {trained / drawn:.0%} trained")
    if "reward_trained" in logs:
        more.append(f"reward trained {logs['reward_trained']:.3f}")
    else:
        more.append("none trained")
    seconds = {
        name.removeprefix(f"{total}seconds_"): value
        for name, value in logs.items()
        if name.startswith(f"{total}seconds_")
    }
    if seconds:
        more.append("s " + " ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    return [f"reward {logs['reward']:.3f}"], more


def short(count: float) -> str:
    """A count in three digits: 999, 1.5k, 150k, 2.35M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{float(f'{count / size:.3g}'):g}{unit}"
    return f"{count:.0f}"
