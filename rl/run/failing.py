"""Undo the failed step, then flush logs and save a checkpoint.

Also: stop before weights or gradients that are not finite are used or saved.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from rl.ranks import Ranks

logger = logging.get_logger(__name__)


@dataclass
class Kept:
    """Whether the weights are still those of the last step, so that a checkpoint of it can be made."""

    is_whole: bool = True


@contextmanager
def kept(
    state_dict: Callable[[], dict[str, Any]],
    load_state_dict: Callable[[dict[str, Any]], None],
    *,
    flush: Callable[[], None],
    save: Callable[[bool], None],
) -> Iterator[Kept]:
    """Undo what the stages remember of a block that fails, then flush logs and save a checkpoint.

    The state and the global random generators are set back, so that a run resumed from the checkpoint
    makes the failed step as if for the first time. An interrupt from the keyboard, or a reward that
    leaves Python, is such an error too.

    Args:
        state_dict: the state of the stages, as a copy.
        load_state_dict: restores it.
        flush: writes the log lines that wait.
        save: makes a checkpoint where one is due, given whether the weights are whole.
    """
    block, state, generators = Kept(), state_dict(), _generators()
    try:
        yield block
    except BaseException:
        load_state_dict(state)
        _set_generators(*generators)
        flush()
        save(block.is_whole)
        raise


@contextmanager
def flushed(flush: Callable[[], None]) -> Iterator[None]:
    """Flush the logs if this block fails, wherever the error comes from."""
    try:
        yield
    except BaseException:
        flush()
        raise


def without_hiding(action: Callable[[], None]) -> None:
    """Run `action` during error handling; log its own errors so they cannot hide the original."""
    try:
        action()
    except (OSError, RuntimeError, FloatingPointError) as error:
        logger.warning(f"while a step's error was handled: {type(error).__name__}: {error}")


def require_finite_gradient(model: torch.nn.Module, ranks: Ranks, *, step: int) -> None:
    """Stop on all processes before a gradient that is not finite is clipped and reaches the weights.

    Each process looks at its own gradients, or shards of them. Not for DeepSpeed, which shows no
    gradients: it has taken the optimizer step by then.

    Args:
        model: as it is trained.
        ranks: the processes.
        step: the training step that is being made, for the message.

    Raises:
        FloatingPointError: if the norm is NaN or infinite; on other processes RuntimeError.
    """
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    own = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients]
    with ranks.together():
        norm = float(torch.nn.utils.get_total_norm(own))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm of step {step} is {norm}, and the update was not made; lower "
                "learning_rate or max_grad_norm, check the model's weights and dtype, and go on from "
                "the last checkpoint with resume_from_checkpoint: true"
            )


def require_finite_weights(named: Iterable[tuple[str, torch.nn.Parameter]], *, step: int) -> None:
    """Refuse to save trained weights that are NaN or infinite: no run could go on from them.

    Each process looks at its own weights, or shards of them.

    Args:
        named: the model's parameters by name.
        step: the last training step, for the message.

    Raises:
        FloatingPointError: naming the first such weight.
    """
    trained = [(name, weight) for name, weight in named if weight.requires_grad]
    own = [getattr(weight, "ds_tensor", weight) for _, weight in trained]
    own = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in own]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for weight in own:
        by_device.setdefault(weight.device, []).append(weight.detach().isfinite().all())
    if all(torch.stack(found).all() for found in by_device.values()):
        return
    name = next(n for (n, _), w in zip(trained, own, strict=True) if not w.isfinite().all())
    raise FloatingPointError(
        f"weight {name} is not finite after step {step}, and is not saved; lower learning_rate, check "
        "the model's dtype, and go on from the last checkpoint with resume_from_checkpoint: true"
    )


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
