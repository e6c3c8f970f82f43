"""Give a resumed run's optimizer the current settings instead of its checkpoint's."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

HYPERPARAMETERS = ("weight_decay", "betas", "eps", "momentum")
"""What settings of a run give an optimizer besides the learning rate, where it has them."""


def hyperparameters(optimizer: Any) -> list[dict[str, Any]]:
    """Each group's settings as they are now, without its weights."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def apply(
    optimizer: Any, scheduler: Any, given: list[dict[str, Any]], *, rate: float, rate_before: float
) -> None:
    """Give an optimizer and a schedule that were loaded from a checkpoint the settings of now, in place.

        learning rate of the next step = rate * schedule(steps taken)

    where the schedule is that of now: of the new number of steps, warm-up and kind, from the step it
    is at. So a run whose linear or cosine schedule had ended at 0 goes on, with more steps, at what the
    longer schedule has there, and a run of which nothing changed goes on bit for bit. Where a schedule
    is no function of the step (`reduce_lr_on_plateau`, `greedy`), the rate it has come to is multiplied
    by rate / rate_before.

    Args:
        given: `hyperparameters` of the optimizer as the settings made it, before the load.
        rate: the setting learning_rate.
        rate_before: what it was when the checkpoint was made.
    """
    follows = isinstance(scheduler, LambdaLR)
    if follows:
        scheduler.base_lrs = [group["initial_lr"] for group in given]
    rates = []
    for i, (group, new) in enumerate(zip(optimizer.param_groups, given, strict=True)):
        group.update({name: new[name] for name in HYPERPARAMETERS if name in new})
        if follows:
            group["initial_lr"] = new["initial_lr"]
            now = new["initial_lr"] * scheduler.lr_lambdas[i](scheduler.last_epoch)
        else:
            now = group["lr"] if rate == rate_before else group["lr"] * (rate / rate_before)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(now)
        else:
            group["lr"] = now
        rates.append(group["lr"])
    if follows or rate != rate_before:
        scheduler._last_lr = rates
