"""A step that fails: what was learnt before it is kept, and nothing of it is."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from rollouts.prompts import Prompt
from rollouts.rewards.contract import RewardError, RewardFunction, check_columns

if TYPE_CHECKING:
    from rl.trainer import RolloutTrainer

logger = logging.get_logger(__name__)


@dataclass
class Kept:
    """Whether the weights are still those of the last step, so that a checkpoint of it can be made."""

    is_whole: bool = True


@contextmanager
def kept(trainer: RolloutTrainer) -> Iterator[Kept]:
    """An error in this block goes on after the steps before it are written down.

    What the line learnt in the block is forgotten and the generators are set back, so that a run
    resumed from the checkpoint made here makes the failed step as if for the first time. Log lines
    that wait are written in any case. A checkpoint is made if steps were trained that none holds,
    `save_strategy` is not "no", and every process came here with whole weights: of several, one may
    have failed alone. An interrupt from the keyboard, or a reward that leaves Python, is such an error.
    """
    line, block = trainer.line, Kept()
    state, generators = line.state_dict(), _generators()  # a state is a copy
    try:
        yield block
    except BaseException:
        line.load_state_dict(state)
        _set_generators(*generators)
        flush(trainer)
        is_due = trainer.is_in_train and trainer.args.save_strategy != "no"
        if is_due and line.ranks.all_say(block.is_whole):
            _without_hiding(trainer.save_unsaved)
        raise


@contextmanager
def flushed(trainer: RolloutTrainer) -> Iterator[None]:
    """An error in this block, wherever it comes from, goes on after the log line that waits."""
    try:
        yield
    except BaseException:
        flush(trainer)
        raise


def flush(trainer: RolloutTrainer) -> None:
    """Write the log line of the steps since the last one, if there are any.

    Nothing is gathered, as other processes may be elsewhere; of several, the loss is not known.
    """
    waiting = trainer.steps_since_log
    if not waiting:
        return
    logs = {"learning_rate": waiting[-1].get("learning_rate", trainer._get_learning_rate())}
    num_steps = trainer.state.global_step - trainer._globalstep_last_logged
    if num_steps and trainer.line.ranks.num == 1:
        logs["loss"] = float(trainer._tr_loss) / num_steps
    trainer._total_loss_scalar += float(trainer._tr_loss)
    trainer._tr_loss.zero_()
    trainer._globalstep_last_logged = trainer.state.global_step
    _without_hiding(lambda: trainer.log(logs))


def check_held_out(rewards: list[RewardFunction], prompts: list[Prompt]) -> None:
    """Say before training what validation would fail for: a column that a reward needs.

    Raises:
        RewardError: naming the function and the column.
    """
    try:
        check_columns(rewards, prompts)
    except RewardError as error:
        raise RewardError(f"eval_dataset: {error}") from error


def require_finite_gradient(trainer: RolloutTrainer, model: torch.nn.Module) -> None:
    """Stop on all processes before a gradient that is not finite is clipped and reaches the weights.

    Each process looks at its own gradients, or shards of them. DeepSpeed shows none: it has taken the
    optimizer step by then.

    Raises:
        FloatingPointError: if the norm is NaN or infinite; on other processes RuntimeError.
    """
    if trainer.is_deepspeed_enabled:
        return
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    own = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients]
    with trainer.line.ranks.together():
        norm = float(torch.nn.utils.get_total_norm(own))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm of step {trainer.state.global_step + 1} is {norm}, and the update "
                "was not made; lower learning_rate or max_grad_norm, check the model's weights and "
                "dtype, and go on from the last checkpoint with resume_from_checkpoint: true"
            )


def require_finite_weights(trainer: RolloutTrainer) -> None:
    """Refuse to save weights that are NaN or infinite: a checkpoint of them is none to go on from.

    Each process looks at its own weights, or shards of them.

    Raises:
        FloatingPointError: naming the first such weight.
    """
    named = [(name, w) for name, w in trainer.model.named_parameters() if w.requires_grad]  # type: ignore[union-attr]
    own = [getattr(weight, "ds_tensor", weight) for _, weight in named]
    own = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in own]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for weight in own:
        by_device.setdefault(weight.device, []).append(weight.detach().isfinite().all())
    if all(torch.stack(found).all() for found in by_device.values()):
        return
    name = next(n for (n, _), w in zip(named, own, strict=True) if not w.isfinite().all())
    raise FloatingPointError(
        f"weight {name} is not finite after step {trainer.state.global_step}, and is not saved; lower "
        "learning_rate, check the model's dtype, and go on from the last checkpoint with "
        "resume_from_checkpoint: true"
    )


def _without_hiding(action: Callable[[], None]) -> None:
    """Do `action` on the way of another error: what goes wrong with it is told, not raised."""
    try:
        action()
    except (OSError, RuntimeError, FloatingPointError) as error:
        logger.warning(f"while a step's error was handled: {type(error).__name__}: {error}")


def _generators() -> tuple:
    """The states of the global generators, which rewards may use."""
    of_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    legacy = np.random.get_state()  # noqa: NPY002 -- others draw from it
    return random.getstate(), legacy, torch.get_rng_state(), of_cuda


def _set_generators(
    of_python: tuple, of_numpy: tuple, of_torch: torch.Tensor, of_cuda: list
) -> None:
    random.setstate(of_python)
    np.random.set_state(of_numpy)  # noqa: NPY002
    torch.set_rng_state(of_torch)
    if of_cuda:
        torch.cuda.set_rng_state_all(of_cuda)
